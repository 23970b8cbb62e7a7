"""Number formats: a row each, their codec, and which type of hardware holds them exactly."""
