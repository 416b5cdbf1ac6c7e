"""The FireRed engine: torch, diffusers and transformers only, no ComfyUI import anywhere below.

Its rooms, each standing on those before it: cards, files, weights, models, sampling, numerics, planning. What
lies beside them is a few words that everyone shares.
"""
