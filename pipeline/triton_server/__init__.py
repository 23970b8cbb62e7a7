"""`ditc export --triton DIR BUNDLE`: a model repository for Triton Inference Server, Python backend."""
