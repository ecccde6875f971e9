"""Training kernels for Hopper GPUs (H100, H200), in Gluon: for bfloat16, `n_embd` 256 and 512.

They compute the same as those of `bdh.kernels.triton.neuron_kernels` with specialized warps: some load tiles, and
groups of four warps multiply and process the products in turns, so that neither part waits for the other. Triton's
interpreter does not run them; tests on a GPU compare them with the Triton kernels.
"""
