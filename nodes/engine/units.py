"""Units that several rooms count in."""

GIB = 2**30  # bytes
