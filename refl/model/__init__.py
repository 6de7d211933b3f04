"""The text-to-image model: its family, noise schedule, LoRA, lean layers, offloading, drawing."""
