"""How fast a device does some work.

A measurement starts at a size for the slowest card and grows as long as time and memory allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

MAX_RUN_SECONDS = 0.5  # sizes that would take longer are left out
BATCH_SECONDS, MAX_BATCH, BATCHES = 0.05, 50, 3

Work = Callable[[], object]


def measure_rate(
    prepare: Callable[[int], Work],
    operations: Callable[[int], float],
    sizes: Sequence[int],
    device: torch.device,
) -> float:
    """Operations a second at the largest size that takes at most MAX_RUN_SECONDS and fits into memory.

    prepare: makes the work of a size. operations: how many it does. Raises what the smallest size raises.
    """
    work: Work | None = None
    done = seconds = 0.0
    for size in sizes:
        if work and seconds * operations(size) / done > MAX_RUN_SECONDS:
            break
        try:
            larger = prepare(size)
            seconds_each(larger, device)  # loads its kernels, or compiles them
            seconds = seconds_each(larger, device)
        except RuntimeError:
            if work is None:
                raise
            break
        work, done = larger, operations(size)
    assert work is not None
    calls = min(MAX_BATCH, int(BATCH_SECONDS / seconds))
    batches = [seconds_each(work, device, calls) for _ in range(BATCHES if calls else 0)]
    return done / min([seconds, *batches])


def seconds_each(work: Work, device: torch.device, calls: int = 1) -> float:
    """Seconds a call; waits for the device before and after."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    _synchronize(device)
    return (time.perf_counter() - started) / calls


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
