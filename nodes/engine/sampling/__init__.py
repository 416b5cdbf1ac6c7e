"""From conditioning to latents: read conditioning, schedule, denoise loop, workers, resume, cached encodings.

What one forward of a model computes belongs in models.
"""
