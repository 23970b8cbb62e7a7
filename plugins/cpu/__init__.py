"""Kernels of the `cpu` target that stock onnxruntime lacks, in C; compiled where an engine is built."""
