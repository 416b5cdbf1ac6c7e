"""The FireRed engine. It uses torch, diffusers and transformers; nothing here imports ComfyUI.

Its packages import only from those before them: cards, files, weights, models, sampling, numerics, planning.
The modules beside the packages are shared by all of them.
"""
