"""The ONNX domain `fpq`: schemas, function bodies, NumPy reference, and the builder of graphs in it."""
