"""The engine on one card of a cluster, without ComfyUI. Another process calls its methods by name."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from ..arithmetic import apply_settings, library_version
from ..cards.card import Card
from ..cards.kernels import architecture, as_current, card_uuid, require_kernels
from ..cards.preflight import unfused_attention
from ..cuda.compiler import keep_kernels_in
from ..errors import FireRedError, first_line
from ..files.cache import FOLDER_VARIABLE, DiskCache, cache_limit
from ..models import loading
from ..models.transformer import Transformer
from ..progress import before_each_block
from ..sampling.record import RunRecord
from ..sampling.resume import RunState
from ..sampling.sampling import Cards, run_worker, sample
from ..sampling.workers import LocalWorker
from ..weights.checks import require_usable
from ..weights.precision import require_library
from .copies import ROLE, model_folders
from .task import Plain, Task, plain_state, single, state_of
from .wire import packed, unpacked

log = logging.getLogger("FireRed")

CALLS = ("describe", "sample", "prepare", "predict", "progress", "cancel")
LIBRARIES = ("torch", "diffusers")  # whose versions decide bits
KEPT_LINES = 100  # of the log, until the next progress call


class Cancelled(FireRedError):
    """The work was cancelled from ComfyUI."""


class EngineWorker:
    """Holds one transformer on one card and computes what tasks ask for."""

    def __init__(self, settings: Plain):
        """settings: `number`: the worker's, for its name on machines without accelerators. `card`: whether it
        has one of its machine's cards. `threads` and `torch`: the CPU's threads and the settings of torch
        that ComfyUI's process has, as they decide the bits of what is computed. `cache`: folder and limit of
        ComfyUI's cache, if this is its machine.
        """
        torch.set_num_threads(settings["threads"])
        apply_settings(settings["torch"])
        self._card = own_card(settings["number"], settings["card"])
        self._cache = disk_cache(settings.get("cache"))
        if (cache := self._cache) is not None:
            keep_kernels_in(lambda: cache)
        self._held: Transformer | None = None
        self._task: tuple[str, Task] | None = None
        self._branches: tuple[str, LocalWorker] | None = None
        self._cancelled = threading.Event()
        self._at_work = threading.Lock()
        self._doing = Doing()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        log.addHandler(_Lines(self._lines))

    def answer(self, method: str, content: bytes, task: bytes | None = None) -> bytes:
        """The packed result of one of CALLS, or its error and the state it leaves behind. Never raises.

        content: its packed arguments. task: the packed run that the call is about.
        """
        turn = None
        try:
            if method not in CALLS:
                raise FireRedError(f"a worker has no {method}")
            arguments = unpacked(content)
            turn = arguments.get("turn")
            if task is not None:
                arguments["task"] = task
            return packed({"result": getattr(self, method)(**arguments)})
        except BaseException as error:
            doing = self._doing
            answer = {"error": type(error).__name__, "message": _told(error), "arithmetic": doing.arithmetic}
            left = doing.state if doing.turn == turn else None
            try:
                return packed(answer | {"state": None if left is None else plain_state(left)})
            except RuntimeError:  # latents of a card that failed
                return packed(answer | {"state": None})

    def describe(self) -> Plain:
        """Which card this is, how many bytes are free on it, and the versions of the libraries."""
        card = self._card
        return {
            "label": card.label,
            "name": card.name,
            "uuid": card_uuid(card.device),
            "free": self._room(),
            "pid": os.getpid(),
            "versions": {name: library_version(name) for name in LIBRARIES},
        }

    def sample(
        self, task: bytes, key: str, turn: int, number: int, state: Plain | None, arithmetic: str
    ) -> Plain:
        """One picture of a run: its raw latents (1, 16, 1, h, w), and how it was computed.

        key: the run's name. turn: the call's number, which `progress` tells. number: the picture's, from 0.
        state: to go on from, computed by `arithmetic`.
        """
        with self._working(turn):
            asked = self._read(task, key)
            transformer, run = self._transformer(asked), single(asked.run, number)
            saved, record = _State(self, state, arithmetic), RunRecord()
            doing = self._doing

            def on_step(done: int, total: int, denoised: torch.Tensor) -> None:
                doing.step, doing.denoised = done, denoised

            with self._stoppable(transformer):
                latents = sample(
                    transformer, run, on_step, self._told_progress("computing the modulation"), saved,
                    asked.guard, record,
                )  # fmt: skip
            return {
                "latents": latents,
                "arithmetic": saved.arithmetic,
                "first_step": record.first_step,
                "skipped": record.skipped,
                "peak": max(record.peaks.values(), default=0),
            }

    def prepare(self, task: bytes, key: str, turn: int) -> Plain:
        """Make a run's branches ready for `predict`. Returns how they are computed."""
        with self._working(turn):
            asked = self._read(task, key)
            transformer, run = self._transformer(asked), asked.run
            if self._branches is None or self._branches[0] != key:
                self._branches = None
                told = self._told_progress("computing the modulation")
                self._branches = key, run_worker(transformer, run, asked.guard, told)
            return {"arithmetic": self._arithmetic(Cards([transformer]).arithmetic(run))}

    def predict(self, key: str, turn: int, branch: str, latents: torch.Tensor, step: int) -> Plain:
        """A branch's velocity, as Worker.predict gives it. `prepare` comes before it."""
        with self._working(turn):
            if self._branches is None or self._branches[0] != key or self._held is None:
                raise FireRedError("the worker was not prepared for this run")
            with self._stoppable(self._held):
                return {"velocity": self._branches[1].predict_branch(branch, latents, step)}

    def progress(self, state: bool = False, picture: bool = False) -> Plain:
        """What the worker does now. state, picture: whether to send the last state, and the estimate of the
        picture: normalised latents (1, 16, 1, h, w).
        """
        doing, lines = self._doing, []
        while self._lines:
            lines.append(self._lines.popleft())
        return {
            "turn": doing.turn,
            "what": doing.what,
            "done": doing.done,
            "total": doing.total,
            "beats": doing.beats,
            "step": doing.step,
            "arithmetic": doing.arithmetic,
            "state": plain_state(doing.state) if state and doing.state is not None else None,
            "denoised": doing.denoised if picture else None,
            "log": lines,
        }

    def cancel(self) -> None:
        """Make the call that computes now end before its next block."""
        self._cancelled.set()

    @contextmanager
    def _working(self, turn: int) -> Iterator[None]:
        """One call computes at a time."""
        with self._at_work, as_current(self._card.device):
            self._cancelled.clear()
            self._doing = Doing(turn, self._doing.beats + 1)
            yield

    def _read(self, content: bytes, key: str) -> Task:
        if self._task is None or self._task[0] != key:
            self._task = None
            self._task = key, Task.of(unpacked(content), self._card)
        return self._task[1]

    def _transformer(self, task: Task) -> Transformer:
        replica = task.run.replica
        if self._held is None or self._held.replica != replica:
            self._free()
            require_usable(ROLE, replica.spec.checkpoint)
            require_library(replica.spec.precision, self._card)
            task.run.require_room(self._room())
            self._held = loading.load(replica, self._told_progress("loading"), self._cache)
        elif self._cache is not None:
            loading.mark_used(replica.spec, self._cache)
        return self._held

    def _free(self) -> None:
        self._held = self._branches = None
        gc.collect()
        if self._card.device.type == "cuda":
            torch.cuda.empty_cache()

    def _room(self) -> int:
        """Bytes that this worker may use of its card, with what it holds let go."""
        if self._card.device.type != "cuda":
            return int(psutil.virtual_memory().available)
        free, _ = torch.cuda.mem_get_info(self._card.device)
        return free + torch.cuda.memory_reserved(self._card.device)

    def _arithmetic(self, kernels: str) -> str:
        """How this card computes: what a result's bits depend on."""
        kind = f"{self._card.name} {architecture(self._card.device)}"
        return f"{kind}: {kernels}" if kernels else kind

    def _stoppable(self, transformer: Transformer) -> Any:
        return before_each_block(transformer.model, self._card.device, self._beat)

    def _beat(self) -> None:
        self._doing.beats += 1
        if self._cancelled.is_set():
            raise Cancelled("cancelled")

    def _told_progress(self, what: str) -> Any:
        def report(done: int, total: int) -> None:
            self._doing.what, self._doing.done, self._doing.total = what, done, total
            self._beat()

        return report


class Doing:
    """What a worker does, for `progress`.

    turn: the number of the call. what, done, total: before the first step. beats: grows with every block.
    step: the steps done.
    """

    def __init__(self, turn: int = 0, beats: int = 0):
        self.turn, self.beats = turn, beats
        self.what, self.done, self.total = "", 0, 0
        self.step = 0
        self.arithmetic = ""
        self.state: RunState | None = None
        self.denoised: torch.Tensor | None = None


class _State:
    """What sampling.sample takes as a SavedRun: the state goes over the wire instead of to a disk."""

    def __init__(self, worker: EngineWorker, state: Plain | None, arithmetic: str):
        self._worker, self._state, self._computed_by = worker, state, arithmetic
        self.arithmetic = ""

    def open(self, kernels: str) -> RunState | None:
        self.arithmetic = self._worker._doing.arithmetic = self._worker._arithmetic(kernels)
        if self._state is None:
            return None
        if self._computed_by != self.arithmetic:
            log.warning("starting over: another card computed the unfinished picture (%s)", self._computed_by)
            return None
        return state_of(self._state)

    def finished_latents(self, state: RunState, batch: int) -> torch.Tensor | None:
        return None

    def update(self, state: RunState, now: bool = False) -> None:
        self._worker._doing.state = state

    def flush(self) -> None:
        """The state stays in memory until it is asked for."""


class _Lines(logging.Handler):
    """Keeps warnings, for ComfyUI's log."""

    def __init__(self, lines: deque[str]):
        super().__init__(logging.WARNING)
        self._kept = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())


def own_card(number: int, on_card: bool) -> Card:
    """The card that this process has, or the CPU. number: of the worker, to tell CPU workers apart.

    on_card: whether Ray gave it a card. Others of the machine may be another program's.

    Raises FireRedError for a card on which this torch does not run.
    """
    machine, cpu = socket.gethostname(), torch.device("cpu")
    if not on_card or not torch.cuda.is_available():
        memory = int(psutil.virtual_memory().total)
        label = f"{machine} cpu {number}"
        return Card(label, "cpu", cpu, False, memory, is_gpu=False, unfused=unfused_attention(cpu))
    device = torch.device("cuda", 0)
    require_kernels(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # Ray gives a worker its card so
    memory = torch.cuda.get_device_properties(device).total_memory
    label = f"{machine} gpu:{visible}"
    name = torch.cuda.get_device_name(device)
    return Card(label, name, device, False, memory, unfused=unfused_attention(device))


def disk_cache(of_comfyui: Sequence[Any] | None = None) -> DiskCache | None:
    """The cache of derived files that this machine names; else ComfyUI's, if it is the same machine; else the
    one beside its models, if it names those. of_comfyui: folder and limit in bytes. Raises as cache_limit.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return DiskCache(Path(folder), cache_limit())
    if of_comfyui is not None:
        return DiskCache(Path(of_comfyui[0]), of_comfyui[1])
    folders = model_folders()
    return DiskCache(folders[0] / "firered_cache", cache_limit()) if folders else None


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, FireRedError) else first_line(error)
