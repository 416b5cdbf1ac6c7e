"""Workers of a cluster and their answers, as ComfyUI's process sees them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import errors
from ..sampling.resume import RunState, SavedRun
from .link import ClusterError
from .wire import WireError, unpacked

FOR_THE_USER = ("NonFiniteError", "InputError")  # every worker would fail so


class Machine(NamedTuple):
    """A machine of the cluster. free: how many of its cards no program of the cluster has."""

    name: str
    cards: int
    free: int
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.cards} {' and '.join(self.kinds)}".rstrip()


@dataclass(eq=False)
class Worker:
    """A worker as ComfyUI's process sees it.

    about: what it says of itself, once `described` is done. call: what it computes now; poll: the question
    how far it is; reach: whether its machine can be reached, if it does not answer. turn: the number of the
    last call. started, met, polled, moved: when it was started, when it had said what it is, when it was
    asked last, and when it last had computed another block, on the monotonic clock. lost: why it is no more.
    """

    number: int
    node: str
    on_card: bool
    started: float
    met: float = 0.0
    turn: int = 0
    described: Future[Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    ready: bool = False
    reserved: bool = False
    picture: Picture | None = None
    call: Future[Any] | None = None
    poll: Future[Any] | None = None
    reach: Future[bool] | None = None
    polled: float = 0.0
    stated: float = 0.0
    moved: float = 0.0
    beats: int = 0
    doing: Mapping[str, Any] = field(default_factory=dict)
    lost: str = ""
    needs_claim: bool = False  # this process must make room on its card first

    def __str__(self) -> str:
        label, name = self.about.get("label", f"worker {self.number}"), self.about.get("name", "")
        return f"{label} ({name})" if name and name not in label else label

    def calls(self, call: Future[Any], now: float) -> None:
        """It begins to compute, in the turn that the call was sent with."""
        self.call, self.poll, self.reach, self.doing = call, None, None, {}
        self.moved = self.polled = self.stated = now

    def noted(self, doing: Mapping[str, Any], now: float) -> bool:
        """Note how far it is. Returns whether that is about what it computes now."""
        if doing["turn"] != self.turn:
            return False
        if doing["beats"] != self.beats:
            self.beats, self.moved = doing["beats"], now
        self.doing = doing
        return True

    @property
    def preparing(self) -> str:
        """What it does before it computes steps, such as loading; empty where nothing is known."""
        what, total = self.doing.get("what", ""), self.doing.get("total", 0)
        return f"{self}: {what} {100 * self.doing['done'] // total} %" if what and total else ""

    @property
    def is_free(self) -> bool:
        return self.ready and not self.reserved and self.call is None and not self.lost


@dataclass(eq=False)
class Picture:
    """One picture of a run. It is done when it has latents or an error.

    name: of its run, see SamplingRun.name. number: in its task, from 0. latents: raw (1, 16, 1, h, w). step:
    the steps done. kept, computed_by: the state to go on from, and the kernels that computed it.
    """

    name: str
    task: str
    number: int
    saved: SavedRun | None
    kept: RunState | None = None
    computed_by: str = ""
    step: int = 0
    denoised: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    error: Exception | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    losses: int = 0
    cancelled: bool = False
    watched: bool = False  # whether a prompt waits for it

    @property
    def is_done(self) -> bool:
        return self.latents is not None or self.error is not None


class WorkerFailure(Exception):
    """A worker's own error, which another worker may not have.

    kind: the error's type. state: of the picture, as in task.py, computed by `arithmetic`.
    """

    def __init__(self, kind: str, message: str, state: Mapping[str, Any] | None, arithmetic: str):
        super().__init__(message)
        self.kind, self.state, self.arithmetic = kind, state, arithmetic


def result_of(future: Future[Any]) -> Any:
    """The result in an answer of a worker. Raises ClusterError, WorkerFailure, or what the user must know."""
    content = future.result()
    try:
        answer = unpacked(content)
        if "result" in answer:
            return answer["result"]
        kind, message = answer["error"], answer["message"]
        failure = WorkerFailure(kind, message, answer["state"], answer["arithmetic"])
    except (WireError, TypeError, KeyError) as error:
        raise ClusterError(f"it answered something else ({error})") from error
    if kind in FOR_THE_USER:
        raise getattr(errors, kind)(message)
    raise failure
