"""Independent of models: errors, files, checkpoints, signals, devices, processes, randomness, prompts,
images."""
