"""The place of kernels and their bindings for GPU targets; empty in this version."""
