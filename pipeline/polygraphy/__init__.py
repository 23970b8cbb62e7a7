"""Polygraphy: what `verify --polygraphy` writes for it, and what it runs engines with, in Python and in a shell."""
