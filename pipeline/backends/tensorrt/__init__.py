"""What TensorRT and TensorRT-RTX share: plugins in a graph, FP16 parts, builds and engine files."""
