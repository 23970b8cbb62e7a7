"""NVIDIA ModelOpt both ways: what it calibrated becomes a checkpoint of ours, and our formats are a backend of it."""
