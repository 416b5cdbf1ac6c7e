"""How a long computation tells whoever wants to know how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # done, total; may raise to cancel


def untold(done: int, total: int) -> None:
    """Nobody wants to know."""
