"""An unfinished run kept on disk, so that a crash, a power cut or a cancelled queue costs a step and no more.

The file's name is a digest of everything the result depends on: a run with any other input never finds it.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import TypeGuard

import torch

from ..arithmetic import computing_environment
from ..files.cache import DiskCache, digest

log = logging.getLogger("FireRed")

RECIPE = 1  # raise it when the loop computes something else
MAX_SHARE = 0.01  # of the sampling time that may go into writing
NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class RunState:
    """Where a run is: `step` steps done of the picture after the finished ones.

    latents: packed (1, tokens, 64) FP32, after that step. finished: raw latents (1, 16, 1, h, w) of each
    picture done.
    """

    step: int
    latents: torch.Tensor
    finished: tuple[torch.Tensor, ...] = ()


class SavedRun:
    """One run's file. Writing happens as often as it costs under a hundredth of the time, and on failure.

    Nothing here stops a run: a disk that takes no more is logged once.
    """

    def __init__(self, store: DiskCache, name: str):
        self.name = name
        self._store = store
        self._due = 0.0  # on the monotonic clock, which no change of the time of day moves
        self._unsaved: RunState | None = None
        self._arithmetic = ""
        self._warned = False

    def result(self, batch: int) -> torch.Tensor | None:
        """The raw latents (batch, 16, 1, h, w) of a run that ended but was not decoded, or None.

        None too where kernels were chosen by a test: whether they would be chosen again is known to `open`,
        once the transformer is loaded.
        """
        kept = self._read()
        if kept is None or kept[1]:
            return None
        return self.finished_latents(kept[0], batch)

    def finished_latents(self, state: RunState, batch: int) -> torch.Tensor | None:
        """The raw latents (batch, 16, 1, h, w) of a state that has them all, or None."""
        if len(state.finished) != batch:
            return None
        latents = torch.cat(state.finished)
        if not bool(latents.isfinite().all()):  # as an unguarded run may end
            return None
        log.info("this run was sampled before and not decoded: its latents come from disk")
        return latents

    def open(self, arithmetic: str) -> RunState | None:
        """The state to go on from, or None. arithmetic: the kernels chosen now; others would end in other
        bits.
        """
        self._arithmetic = arithmetic
        kept = self._read()
        if kept and kept[1] != arithmetic:
            log.warning("starting over: the unfinished run used other kernels (%s)", kept[1])
            return None
        return kept[0] if kept else None

    def _read(self) -> tuple[RunState, str] | None:
        tensors = self._store.read(self.name)
        try:
            if tensors is None:
                return None
            finished = tensors["finished"]
            state = RunState(
                int(tensors["step"]), tensors["latents"], finished.split(1) if finished.numel() else ()
            )
            return state, bytes(tensors["arithmetic"].tolist()).decode()
        except (KeyError, ValueError, RuntimeError):
            return None  # not ours: the run starts over

    def update(self, state: RunState, now: bool = False) -> None:
        """Take note of a step, writing it if that is due or `now`."""
        self._unsaved = state
        if now or time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet; for when the run stops before its end."""
        if self._unsaved is None:
            return
        started = time.monotonic()
        state, self._unsaved = self._unsaved, None
        try:
            self._store.write(self.name, _tensors(state, self._arithmetic))
        except (OSError, RuntimeError) as error:  # a card that failed cannot give its latents either
            if not self._warned:
                log.warning("this run cannot be resumed after a crash: its state is not written (%s)", error)
            self._warned = True
        ended = time.monotonic()
        self._due = ended + (ended - started) / MAX_SHARE

    def forget(self) -> None:
        """Leave nothing behind."""
        self._unsaved = None
        self._store.remove(self.name)


def run_name(device: torch.device, *parts: object) -> str:
    """The name of the run that depends on all these parts, and on how this process computes on the device."""
    return digest(RECIPE, computing_environment(device, "diffusers", "bitsandbytes"), *parts)


def is_run_name(name: object) -> TypeGuard[str]:
    """Whether this can be a run's name, and so a file's."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _tensors(state: RunState, arithmetic: str) -> dict[str, torch.Tensor]:
    return {
        "arithmetic": torch.tensor(list(arithmetic.encode()), dtype=torch.uint8),
        "step": torch.tensor(state.step),
        "latents": state.latents,
        "finished": torch.cat(state.finished) if state.finished else torch.empty(0),
    }
