"""What knows nothing of models: errors, files, signals, devices, launching, randomness, prompts."""
