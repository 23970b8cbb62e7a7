"""Kernels of the `cpu` target that stock onnxruntime lacks, in C; compiled at first use into the user's cache."""
