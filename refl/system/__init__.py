"""Independent of models: errors, files, reading, options, checkpoints, signals, devices, processes, prompts,
randomness, images."""
