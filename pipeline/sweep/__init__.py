"""`ditc sweep SWEEP.toml`: recipes x models x methods x options, built as jobs of this process or of a Ray cluster."""
