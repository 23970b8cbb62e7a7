"""Target `onnx`: the portable model itself, in stock ONNX Runtime."""
