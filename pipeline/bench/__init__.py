"""Latency and memory of a bundle on this machine, beside baselines."""
