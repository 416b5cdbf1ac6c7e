"""Report the progress of a long computation, and stop it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch

OnProgress = Callable[[int, int], None]  # done, total; may raise to cancel
LOG_SECONDS = 10.0  # between two log lines about steps
BLOCKS_AHEAD = 2  # how many blocks may be queued on a GPU


@runtime_checkable
class HasStops(Protocol):
    def stops(self) -> list[torch.nn.Module]:
        """The modules before which a forward may be stopped."""
        ...


def ignore_progress(done: int, total: int) -> None:
    """Default callback; does nothing."""


@contextmanager
def before_each_block(
    model: torch.nn.Module, device: torch.device, call: Callable[[], None]
) -> Iterator[None]:
    """Inside this context, `call` before every block of the model. An exception it raises ends the forward.

    Without a wait, the program would queue a whole forward on the GPU, with all its calls, before the first
    block is computed. So it waits until no more than BLOCKS_AHEAD blocks are queued.
    """
    running: deque[torch.cuda.Event] = deque()

    def pause(module: torch.nn.Module, inputs: object) -> None:
        if device.type == "cuda":
            if len(running) == BLOCKS_AHEAD:
                running.popleft().synchronize()
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            running.append(event)
        call()

    hooks = [block.register_forward_pre_hook(pause) for block in blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a model: what it names itself, or the members of its lists that have several parts."""
    if isinstance(model, HasStops):
        return model.stops()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [member for members in lists for member in members if len(list(member.children())) > 1]


class StepTimer:
    """Seconds a step and time left, for the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._started = self._last_line = clock()
        self._first: tuple[int, float] | None = None  # the first step seen done, and its time

    def line(self, done: int, total: int) -> str | None:
        """A log line such as "step 7/40, 87.5 s/step, 48 min left"; None for LOG_SECONDS after the last."""
        now = self._clock()
        first_done, first_time = self._first = self._first or (done, now)
        if done < total and now - self._last_line < LOG_SECONDS:
            return None
        self._last_line = now
        # The first step also sets things up, so its time counts only while there is no other.
        steps = done - first_done
        seconds = (now - first_time) / steps if steps else now - self._started
        rest = f"{duration((total - done) * seconds)} left" if done < total else "done"
        return f"step {done}/{total}, {seconds:.3g} s/step, {rest}"


def duration(seconds: float) -> str:
    """Seconds for people to read: "42 s", "2 min 30 s", "1 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
