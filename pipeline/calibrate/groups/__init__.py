"""Searches for the group size of each layer."""
