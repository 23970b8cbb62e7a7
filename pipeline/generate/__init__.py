"""From prompts to pictures: conditions, samplers, and an engine in its diffusers pipeline."""
