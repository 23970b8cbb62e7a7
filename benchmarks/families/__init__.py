"""Classes of diffusers whose row is learned from their pipeline: tiny models of each, built, proven and drawn with."""
