"""Target `trt`: TensorRT with plugins compiled ahead of time."""
