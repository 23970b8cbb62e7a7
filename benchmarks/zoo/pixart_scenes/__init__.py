"""A whole small PixArt-alpha pipeline in latent space, made from nothing: scenes, captions, tokenizer, autoencoder,
text encoder, denoiser, and the reader that judges its pictures."""
