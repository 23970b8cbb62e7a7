"""From a folder, a file or the hub's cache to a float model whose every tensor is accounted for."""
