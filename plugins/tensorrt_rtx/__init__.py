"""TensorRT-RTX plugins: the project's GPU kernels behind custom ONNX ops, and the loader that the wheel needs."""
