"""Inference kernels: decoding on CPUs and GPUs, and prefill on GPUs."""
