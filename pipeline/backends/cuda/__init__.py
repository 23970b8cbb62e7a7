"""Target `cuda`: PyTorch with the project's Triton kernels."""
