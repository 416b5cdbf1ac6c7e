"""Save an unfinished run on disk, so that it goes on at its last saved step after a crash or a cancel.

The file's name is a digest of everything that the result depends on, so other inputs have another file.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from ..arithmetic import computing_environment
from ..files.cache import DiskCache, digest

log = logging.getLogger("FireRed")

RECIPE = 1  # raise it when the results of the loop change
MAX_SHARE = 0.01  # of the sampling time may go into writing
STEP_CACHE = "step_cache."  # prefix of the names of its tensors
EDIT = "edit"  # the tensor that holds what runs of the same edit have in common, and the seed
NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    step: the number of steps done of the current picture. latents: the current picture's, packed
    (1, tokens, 64) FP32. finished: raw latents (1, 16, 1, h, w) of each picture before it. step_cache: from
    StepCache.state.
    """

    step: int
    latents: torch.Tensor
    finished: tuple[torch.Tensor, ...] = ()
    step_cache: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Saved(Protocol):
    """Where a run's states go, and the last one of an earlier try comes from. See SavedRun."""

    def open(self, arithmetic: str) -> RunState | None: ...
    def finished_latents(self, state: RunState, batch: int) -> torch.Tensor | None: ...
    def update(self, state: RunState, now: bool = False) -> None: ...
    def flush(self) -> None: ...


class SavedRun:
    """The file of one run. It is written as often as MAX_SHARE allows, and when the run fails.

    A failure to write is logged once and does not stop the run.
    """

    def __init__(self, store: DiskCache, name: str, edit: str = "", seed: int = 0):
        """edit: a name that runs share which differ in the seed alone, for other_seeds."""
        self.name = name
        self._store, self._edit, self._seed = store, edit, seed
        self._due = 0.0  # on the monotonic clock
        self._unsaved: RunState | None = None
        self.arithmetic = ""  # the kernels that compute the states
        self._warned = False

    def result(self, batch: int) -> torch.Tensor | None:
        """The raw latents (batch, 16, 1, h, w) of a run that ended but was not decoded, or None.

        Also None for a run whose kernels were chosen by a test. `open` compares them once the transformer is
        loaded and has chosen its own.
        """
        kept = self.kept()
        if kept is None or kept[1]:
            return None
        return self.finished_latents(kept[0], batch)

    def finished_latents(self, state: RunState, batch: int) -> torch.Tensor | None:
        """The raw latents (batch, 16, 1, h, w) of a state with all pictures finished and finite, or None."""
        if len(state.finished) != batch:
            return None
        latents = torch.cat(state.finished)
        if not bool(latents.isfinite().all()):  # possible without a guard
            return None
        log.info("this run was sampled before but not decoded: its latents come from disk")
        return latents

    def open(self, arithmetic: str) -> RunState | None:
        """The state to go on from, or None. arithmetic: the kernels chosen now, which must be the same."""
        self.arithmetic = arithmetic
        kept = self.kept()
        if kept and kept[1] != arithmetic:
            log.warning("starting over: the unfinished run used other kernels (%s)", kept[1])
            return None
        return kept[0] if kept else None

    def kept(self) -> tuple[RunState, str] | None:
        """The state on disk and the kernels that computed it; None without one, or for a damaged file."""
        tensors = self._store.read(self.name)
        try:
            if tensors is None:
                return None
            finished = tensors["finished"]
            state = RunState(
                int(tensors["step"]),
                tensors["latents"],
                finished.split(1) if finished.numel() else (),
                {name: tensor for name, tensor in tensors.items() if name.startswith(STEP_CACHE)},
            )
            return state, bytes(tensors["arithmetic"].tolist()).decode()
        except (KeyError, ValueError, RuntimeError):
            return None  # damaged: the run starts over

    def update(self, state: RunState, now: bool = False) -> None:
        """Remember a step. Writes it if that is due, or at once with `now`."""
        self._unsaved = state
        if now or time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write the last step, if it is not written yet. For a run that stops before its end."""
        if self._unsaved is None:
            return
        started = time.monotonic()
        state, self._unsaved = self._unsaved, None
        try:
            self._store.write(self.name, _tensors(state, self.arithmetic) | self._about())
        except (OSError, RuntimeError) as error:  # RuntimeError: latents of a card that failed
            if not self._warned:
                log.warning("this run cannot be resumed after a crash: its state is not written (%s)", error)
            self._warned = True
        ended = time.monotonic()
        self._due = ended + (ended - started) / MAX_SHARE

    def other_seeds(self) -> dict[int, int]:
        """Seeds of unfinished runs of the same edit, each with its step. Empty if this run goes on itself."""
        if not self._edit or self._store.find(self.name) is not None:
            return {}
        found = {}
        for name in self._store.names():
            with (
                contextlib.suppress(OSError, SafetensorError, ValueError),  # no such tensor, or just deleted
                safe_open(self._store.path(name), "pt") as file,
            ):
                edit, seed = bytes(file.get_tensor(EDIT).tolist()).decode().split()
                if edit == self._edit and 0 not in file.get_slice("latents").get_shape():
                    found[int(seed)] = int(file.get_tensor("step"))
        return found

    def _about(self) -> dict[str, torch.Tensor]:
        text = f"{self._edit} {self._seed}".encode()
        return {EDIT: torch.tensor(list(text), dtype=torch.uint8)} if self._edit else {}

    def forget(self) -> None:
        """Delete the file."""
        self._unsaved = None
        self._store.remove(self.name)


def finished_state(latents: torch.Tensor) -> RunState:
    """The state of a run that has these raw latents (B, 16, 1, h, w)."""
    return RunState(0, torch.empty(0), latents.split(1))


def run_name(device: torch.device, *parts: object) -> str:
    """The name of a run that depends on these parts and on how this process computes on the device."""
    return digest(RECIPE, computing_environment(device, "diffusers", "bitsandbytes"), *parts)


def is_run_name(name: object) -> TypeGuard[str]:
    """Whether this can be a run's name. Run names are safe as file names."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _tensors(state: RunState, arithmetic: str) -> dict[str, torch.Tensor]:
    return {
        "arithmetic": torch.tensor(list(arithmetic.encode()), dtype=torch.uint8),
        "step": torch.tensor(state.step),
        "latents": state.latents,
        "finished": torch.cat(state.finished) if state.finished else torch.empty(0),
        **state.step_cache,
    }
