"""Target `cpu`: ONNX Runtime, with stock ops alone or with token chains of our own."""
