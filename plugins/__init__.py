"""Kernels and their bindings; they know no graphs. GPU targets have their place here and nothing yet."""
