"""Files on disk: find, check and read checkpoints; read and write the cache of derived files.

What becomes of the tensors in them belongs in weights and models.
"""
