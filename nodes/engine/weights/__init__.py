"""A component's weights: precisions, stored formats, layers, filling a model, and the memory it takes.

What a model computes with its weights belongs in models.
"""
