"""Training kernels for Hopper GPUs (H100, H200), in Gluon: for bfloat16, `n_embd` 256 and 512.

They do what those in `bdh.kernels.triton.neuron_kernels` do, with warps that have parts of their own: one loads, groups
of four multiply and work on what came out, in turns, so that neither waits for the other. Triton's interpreter does not
run them; tests on a GPU hold them to the others.
"""
