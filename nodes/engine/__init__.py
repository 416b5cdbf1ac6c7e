"""The FireRed engine. It uses torch, diffusers and transformers; nothing here imports ComfyUI.

Its packages import only from those before them: cards, files, cuda, weights, models, sampling,
numerics, planning, cluster.
The modules beside the packages are shared by all of them.
"""
