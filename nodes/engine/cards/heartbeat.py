"""Log lines that show that long work still runs."""

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
    """Log `note` now, and a line every `interval` seconds until the block ends.

    what: as in "still testing gpu:0, 2 min 30 s so far". On ROCm, the first run of a shape may compile
    kernels for half an hour at full load. note: "" logs none.
    """
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(interval):
            log(f"still {what}, {duration(time.monotonic() - started)} so far")

    if note:
        log(f"{what}: {note}")
    thread = threading.Thread(target=beat, name=f"heartbeat: {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def heartbeat_where_compiled(what: str, device: torch.device) -> AbstractContextManager[object]:
    """A heartbeat on ROCm, where the first run compiles kernels; elsewhere a context that does nothing."""
    compiles = device.type == "cuda" and torch.version.hip is not None
    return heartbeat(what, log.info, note=compile_note(device)) if compiles else nullcontext()


def compile_note(device: torch.device) -> str:
    """NOTE at the first call for a device, "" after it."""
    return NOTE if first_time(NOTE, device) else ""
