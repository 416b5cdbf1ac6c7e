"""Measure how large activations get inside a model, judge the precisions by it, and draw it.

Checks of each run's results belong in models (guard, trace).
"""
