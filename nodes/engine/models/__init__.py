"""The three models: build and load them, run them, guard their results against NaN and infinity.

The transformer is our own; the text encoder and the VAE come from transformers and diffusers. Layers and
stored formats belong in weights, the denoise loop in sampling.
"""
