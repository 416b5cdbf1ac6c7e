"""A sign of life from work that may be silent for minutes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .progress import duration

log = logging.getLogger("FireRed")

INTERVAL = 30.0  # seconds


@contextmanager
def heartbeat(what: str, log: Callable[[str], None], interval: float = INTERVAL) -> Iterator[None]:
    """Log now, then every `interval` seconds until the block is left, that `what` is still going on.

    what: as in "still testing gpu:0, 2 min 30 s so far". ROCm needs it: the first run of a shape may compile
    kernels for half an hour at full load.
    """
    started, left = time.monotonic(), threading.Event()

    def beat() -> None:
        while not left.wait(interval):
            log(f"still {what}, {duration(time.monotonic() - started)} so far")

    log(f"{what}: the first run on a card may compile kernels for minutes, up to half an hour")
    thread = threading.Thread(target=beat, name=f"heartbeat: {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def heartbeat_where_compiled(what: str, device: torch.device) -> AbstractContextManager[object]:
    """A heartbeat in the log where the device's kernels are compiled at their first run: on ROCm."""
    compiles = device.type == "cuda" and torch.version.hip is not None
    return heartbeat(what, log.info) if compiles else nullcontext()
