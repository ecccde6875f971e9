"""Training operations in Triton, for NVIDIA GPUs."""
