"""What a training run consists of: options, batches, updates, validation, checkpoints of its state."""
