"""Schedulers of diffusers in NumPy, each equal to its original step by step; chosen by scheduler_config.json."""
