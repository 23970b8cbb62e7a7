"""Proof: gates between an engine and the quantized PyTorch model, and the report that shows them."""
