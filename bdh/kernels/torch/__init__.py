"""Training operations in PyTorch, for all devices."""
