"""What several methods learn with: rounding, straight-through gradients, GPTQ, low-rank branches."""
