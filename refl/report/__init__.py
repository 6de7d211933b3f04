"""What people look at: curves, sheets of images, the model card, the evaluation's report."""
