"""A format is a row; a model becomes an ONNX graph in the `fpq` dialect, whose quantized layers are a checkpoint."""
