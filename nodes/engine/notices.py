"""Log a message once per process, not for every tensor, step or picture."""

from __future__ import annotations

_said: set[tuple[object, ...]] = set()


def first_time(*about: object) -> bool:
    """True at the first call with these arguments in this process, False after it."""
    if about in _said:
        return False
    _said.add(about)
    return True
