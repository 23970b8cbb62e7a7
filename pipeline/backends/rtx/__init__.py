"""Target `rtx`: TensorRT-RTX, built ahead of time without a GPU."""
