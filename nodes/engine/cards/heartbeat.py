"""A sign of life from work that may be silent for minutes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..notices import first_time
from ..progress import duration

log = logging.getLogger("FireRed")

INTERVAL = 30.0  # seconds
NOTE = "the first run on a card may compile kernels for minutes, up to half an hour"


@contextmanager
def heartbeat(
    what: str, log: Callable[[str], None], interval: float = INTERVAL, note: str = NOTE
) -> Iterator[None]:
    """Log the note now, then every `interval` seconds until the block is left that `what` still goes on.

    what: as in "still testing gpu:0, 2 min 30 s so far". ROCm needs it: the first run of a shape may compile
    kernels for half an hour at full load. note: empty where it was said before.
    """
    started, left = time.monotonic(), threading.Event()

    def beat() -> None:
        while not left.wait(interval):
            log(f"still {what}, {duration(time.monotonic() - started)} so far")

    if note:
        log(f"{what}: {note}")
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
    return heartbeat(what, log.info, note=compile_note(device)) if compiles else nullcontext()


def compile_note(device: torch.device) -> str:
    """That kernels may be compiled, the first time anything runs on the device; then nothing."""
    return NOTE if first_time(NOTE, device) else ""
