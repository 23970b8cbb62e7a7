"""A whole small PixArt-alpha pipeline made from nothing: scenes, tokenizer, all parts trained, and their judge."""
