"""The one run on a GPU: kernels checked, timed and tuned, and the denoiser as a whole."""
