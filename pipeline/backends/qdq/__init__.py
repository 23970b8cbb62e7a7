"""Quantized linears as GEMMs of hardware operands in ONNX ops, which `rtx` and `ort_cuda` have in common."""
