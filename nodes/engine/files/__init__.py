"""Bytes on disk: checkpoints as others wrote them, and the cache of what we derive from them."""
