"""The portable model in tools that others made, each in an environment of its own: what runs it, what refuses it."""
