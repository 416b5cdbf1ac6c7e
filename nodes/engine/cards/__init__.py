"""Devices and what they can do: kernels of this torch, measured speeds, copies, installed libraries.

Nothing here knows a model or a checkpoint.
"""
