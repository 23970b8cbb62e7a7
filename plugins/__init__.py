"""Kernels and their bindings for GPU targets. Empty in this version: the place is kept."""
