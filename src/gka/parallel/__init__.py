"""Training on many GPUs."""
