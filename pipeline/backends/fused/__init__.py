"""The graph of fused ops that `cuda`, `trt` and the plugins of `rtx` run."""
