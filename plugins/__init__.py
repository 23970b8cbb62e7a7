"""The kernels, each with its specification, its reference in NumPy, and its hosts; they know no graphs."""
