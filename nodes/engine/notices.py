"""What is worth saying once and not for every tensor, step or picture."""

from __future__ import annotations

_said: set[tuple[object, ...]] = set()


def first_time(*about: object) -> bool:
    """Whether this process asks for the first time about just this; later calls with the same are False."""
    if about in _said:
        return False
    _said.add(about)
    return True
