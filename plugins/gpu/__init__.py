"""Triton kernels for NVIDIA GPUs from SM80 to SM120, compiled ahead of time with no GPU, interpreted on any CPU."""
