"""Kernels of the `cpu` target that stock onnxruntime lacks, in C; compiled with the package, or at first use."""
