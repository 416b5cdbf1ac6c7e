"""Units that several packages use."""

GIB = 2**30  # bytes
