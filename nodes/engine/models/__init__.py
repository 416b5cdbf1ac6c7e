"""The three models in memory: built, filled, guarded against NaN and infinity.

The transformer's forward is ours; text encoder and VAE are the libraries'.
"""
