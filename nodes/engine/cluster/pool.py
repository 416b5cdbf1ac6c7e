"""The workers of a cluster, and the pictures that they sample."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import errors
from ..sampling.resume import RunState, SavedRun, finished_state
from ..weights import room
from .link import ClusterError, Link
from .task import Task, plain_state, single, state_of
from .wire import WireError, packed, unpacked
from .worker import LIBRARIES, library_version

log = logging.getLogger("FireRed")

TIMEOUT_VARIABLE = "FIRERED_WORKER_TIMEOUT"
DEFAULT_TIMEOUT = 60.0  # seconds without an answer, after which a worker counts as hung
STUCK = 10  # times as long without a block done, for a worker that does answer
CONNECT_SECONDS = 30.0  # that joining a cluster may take
START_SECONDS = 120.0  # that a worker may take to start: it imports torch
TICK, IDLE_TICK = 0.05, 10.0  # seconds between two looks at the workers
POLL_SECONDS = 0.5  # between two questions to a worker how far it is
POLLS_A_SECOND = 200  # of all workers
STATE_SECONDS = 5.0  # between two states of a picture that cross the network
MAX_LOSSES = 3  # of workers that a picture may take along
RECRUIT_SECONDS = 1.0  # between two looks for cards to start workers on
RETRY_SECONDS = 60.0  # until a machine whose cards did not do is tried again
GRACE_SECONDS = 15.0  # in which the cluster notices that a card is free again
SPARE = 4  # workers that are started beside those wanted, to choose from
RAY = "Ray"  # the device's name for people

# A card's number (UUID) and the bytes that a worker needs on it, to the bytes that are free there then.
Claim = Callable[[str, float], float]
# Called with what is being done before the first step, or ""; with the number of steps done and of all steps;
# and with the estimate of the first unfinished picture, normalised latents (1, 16, 1, h, w), or None.
OnProgress = Callable[[str, int, int, torch.Tensor | None], None]


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

    free: bytes on its card when it started. call: what it computes now; poll: the question how far it is.
    heard, moved: when it last answered, and when it last had computed another block, on the monotonic clock.
    lost: why it is no more.
    """

    number: int
    node: str
    on_card: bool
    started: float
    described: Future[Any] | None
    about: Mapping[str, Any] = field(default_factory=dict)
    ready: bool = False
    reserved: bool = False
    picture: Picture | None = None
    call: Future[Any] | None = None
    poll: Future[Any] | None = None
    polled: float = 0.0
    stated: float = 0.0
    heard: float = 0.0
    moved: float = 0.0
    beats: int = 0
    doing: Mapping[str, Any] = field(default_factory=dict)
    lost: str = ""
    needs_claim: bool = False  # its card is one of this process, which must make room first

    def __str__(self) -> str:
        label, name = self.about.get("label", f"worker {self.number}"), self.about.get("name", "")
        return f"{label} ({name})" if name and name not in label else label

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


class Pool:
    """Workers of one cluster for one count of cards. A thread of its own hands pictures to free workers."""

    def __init__(self, link: Link, wanted: int | None, claim: Claim = lambda card, nbytes: 0.0):
        """wanted: how many workers; None for every card of the cluster. claim: makes room on a card that
        this process uses too.
        """
        self.link, self.wanted = link, wanted
        self._claim = claim
        self._timeout = _seconds(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
        self._changed = threading.Condition()
        self._workers: list[Worker] = []
        self._numbers = itertools.count(1)
        self._pictures: dict[str, Picture] = {}  # not yet done, by name, in their order
        self._tasks: dict[str, Task] = {}
        self._needs: Task | None = None  # the last one: what a worker must have room for
        self._reasons: dict[str, str] = {}  # why workers did not do, by who
        self._tried: dict[str, float] = {}  # nodes whose cards did not do, and when
        self._nodes: Future[Any] | None = None
        self._last_loss = self._asked_wanted = self._recruited = -RETRY_SECONDS
        self._hopeless: ClusterError | None = None
        self._closed = False
        self._begun = time.monotonic()
        self.here = link.connect()
        self.here.add_done_callback(self._wake)
        threading.Thread(target=self._run, name="FireRed: cluster", daemon=True).start()

    # For prompts

    def submit(self, task: Task, saved: Callable[[str], SavedRun | None]) -> list[Picture]:
        """The pictures of a run, to be sampled. saved: the file of a run's name.

        A picture that is already being sampled is not begun again.
        """
        key, plain = task.run.name(task.guard), None
        pictures = []
        with self._changed:
            self._hope()
            for number in range(task.run.batch):
                name = single(task.run, number).name(task.guard)
                picture = self._pictures.get(name)
                if picture is None:
                    picture = Picture(name, key, number, saved(name))
                    _open(picture)
                    if not picture.is_done:
                        plain = plain or packed(task.plain())
                        self._pictures[name] = picture
                picture.cancelled = False
                pictures.append(picture)
            if plain is not None:
                self._share(key, task, plain)
            self._changed.notify_all()
        return pictures

    def wait(self, pictures: Sequence[Picture], steps: int, on_progress: OnProgress) -> torch.Tensor:
        """The raw latents (B, 16, 1, h, w) of these pictures. steps: of each.

        on_progress: may raise, to cancel. Raises what a picture failed with.
        """
        for picture in pictures:
            picture.watched = True
        try:
            while True:
                with self._changed:
                    failed = next((picture.error for picture in pictures if picture.error is not None), None)
                    if failed is not None:
                        raise failed
                    if all(picture.is_done for picture in pictures):
                        break
                    first = next(picture for picture in pictures if not picture.is_done)
                    done = sum(steps if each.is_done else each.step for each in pictures)
                    what, denoised = self._what(first), first.denoised
                    first.denoised = None
                on_progress(what, done, steps * len(pictures), denoised)
                self._make_room()
                with self._changed:
                    self._changed.wait(TICK)
            on_progress("", steps * len(pictures), steps * len(pictures), None)
        except BaseException:
            self.cancel(pictures)
            raise
        finally:
            for picture in pictures:
                picture.watched = False
        return torch.cat([picture.latents for picture in pictures if picture.latents is not None])

    def cancel(self, pictures: Sequence[Picture]) -> None:
        """Do not finish these pictures. Waits until their states are saved, but not for a hung worker."""
        deadline = time.monotonic() + TICK * 100
        with self._changed:
            for picture in pictures:
                picture.cancelled = True
            self._changed.notify_all()
            while any(each.name in self._pictures for each in pictures) and time.monotonic() < deadline:
                self._changed.wait(TICK)

    @contextmanager
    def reserved(self, task: Task, count: int, check: Callable[[], None]) -> Iterator[list[Worker]]:
        """Up to `count` workers that get no pictures inside the block; at least one.

        check: called while none is free; may raise, to cancel.
        """
        key = task.run.name(task.guard)
        with self._changed:
            self._hope()
            self._share(key, task, packed(task.plain()))
        taken: list[Worker] = []
        looked = False  # for more workers than there are
        try:
            while not taken:
                with self._changed:
                    if self._hopeless is not None:
                        raise self._hopeless
                    free = [each for each in self._workers if each.is_free]
                    if len(free) >= count or (free and looked and len(free) == len(self._workers)):
                        taken = free[:count]
                        for worker in taken:
                            worker.reserved = True
                    else:
                        looked |= self._recruit(bool(free))
                        self._changed.wait(TICK)
                check()
                self._make_room()
            yield taken
        finally:
            with self._changed:
                for worker in taken:
                    worker.reserved = False
                self._forget(key)

    def call(self, worker: Worker, method: str, key: str, **arguments: Any) -> Future[Any]:
        """Let a reserved worker compute. See `finished`."""
        with self._changed:
            now = time.monotonic()
            task = key if method == "prepare" else None
            worker.call = self._ask(worker, method, arguments | {"key": key}, task)
            worker.heard = worker.moved = worker.polled = now
            return worker.call

    def pause(self, seconds: float) -> None:
        """Wait for news of any worker, but not longer."""
        with self._changed:
            self._changed.wait(seconds)

    def finished(self, worker: Worker) -> bool:
        """Whether the call of a reserved worker has ended."""
        with self._changed:
            return worker.call is None or worker.call.done() or bool(worker.lost)

    def result(self, worker: Worker) -> Any:
        """What the call of a reserved worker gave. Raises ClusterError for a lost worker, or the error that
        the user must know.
        """
        with self._changed:
            call, worker.call = worker.call, None
            if worker.lost or call is None:
                raise ClusterError(worker.lost)
            try:
                return _result(call)
            except WorkerFailure as failure:
                self._lose(worker, str(failure))
                raise ClusterError(worker.lost) from None

    def stop_call(self, worker: Worker) -> None:
        """Cancel the call of a reserved worker, and wait a little for its end."""
        deadline = time.monotonic() + TICK * 100
        while worker.call is not None and not self.finished(worker) and time.monotonic() < deadline:
            with self._changed:
                self._cancel(worker)
                self._changed.wait(TICK)
        with self._changed:
            if worker.call is not None and not worker.call.done():
                self._lose(worker, "it did not stop when the work was cancelled")
            worker.call = None

    @property
    def workers(self) -> list[Worker]:
        """Those that are ready."""
        with self._changed:
            return [worker for worker in self._workers if worker.ready]

    def machines(self, check: Callable[[], None]) -> list[Machine]:
        """The machines of the cluster. check: called while they are asked; may raise. Raises ClusterError."""
        asked: Future[Any] | None = None
        while True:
            with self._changed:
                if self._hopeless is not None and self._closed:
                    raise self._hopeless
                if asked is None and self.here.done() and self.here.exception() is None:
                    asked = self.link.ask("nodes")
                if asked is not None and asked.done() and asked.exception() is None:
                    return [
                        Machine(each["machine"], each["cards"], each["free"], tuple(each["kinds"]))
                        for each in asked.result()
                    ]
                self._changed.wait(TICK)
            check()

    def release(self, card: str | None = None) -> None:
        """End the workers that compute nothing: all, or the one on that card (UUID) of this machine."""
        with self._changed:
            for worker in [each for each in self._workers if each.is_free]:
                if card is None or worker.about.get("uuid") == card:
                    self._end(worker)

    def close(self) -> None:
        """Leave the cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.link.close()

    @property
    def alive(self) -> bool:
        return not self._closed and self.link.alive

    # The pool's thread, which holds the lock while it looks

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                try:
                    self._look()
                except Exception as error:  # a fault here must not leave prompts waiting
                    log.exception("the cluster's pool failed")
                    self._fail_all(ClusterError(f"the cluster's pool failed: {error}"))
                busy = any(each.call or not each.ready for each in self._workers)
                active = self._pictures or busy or not self.here.done()
                self._changed.wait(TICK if active else IDLE_TICK)

    def _look(self) -> None:
        now = time.monotonic()
        failed = self.here.exception() if self.here.done() else None
        if not self.here.done() and now - self._begun > CONNECT_SECONDS:
            failed = ClusterError(f"it did not answer within {CONNECT_SECONDS:.0f} s")
            self.link.kill()
        if failed is not None or not self.link.alive:
            self._disconnected(failed)
            return
        for worker in list(self._workers):
            self._look_at(worker, now)
        self._choose()
        waiting = [each for each in self._pictures.values() if not self._at_work(each)]
        for picture in waiting:
            if picture.cancelled:
                self._finish(picture)
        waiting = [each for each in waiting if not each.cancelled and not each.is_done]
        waiting.sort(key=lambda picture: not picture.watched)
        for worker, picture in zip([each for each in self._workers if each.is_free], waiting, strict=False):
            self._begin(worker, picture, now)
        if waiting:
            self._recruit(any(each.ready for each in self._workers))
        elif self.link.address and now - self._asked_wanted > IDLE_TICK / 2:
            self._give_way(now)

    def _look_at(self, worker: Worker, now: float) -> None:
        if worker.described is not None and worker.described.done():
            self._meet(worker)
        elif not worker.ready and worker.described is not None and now - worker.started > START_SECONDS:
            self._lose(worker, f"it did not start within {START_SECONDS:.0f} s")
        if worker.poll is not None and worker.poll.done():
            self._hear(worker, now)
        if worker.call is None or worker.lost:
            return
        if worker.call.done():
            if worker.picture is not None:
                self._end_picture(worker, worker.picture)
        elif now - worker.heard > self._timeout:
            self._lose(worker, f"it has not answered for {self._timeout:.0f} s")
        elif now - worker.moved > self._timeout * STUCK:
            self._lose(worker, f"it has computed nothing for {self._timeout * STUCK:.0f} s")
        elif worker.poll is None and now - worker.polled > self._poll_seconds:
            picture = worker.picture
            if picture is not None and picture.cancelled:
                self._cancel(worker)
            state = picture is not None and now - worker.stated > STATE_SECONDS
            worker.stated = now if state else worker.stated
            shown = picture is not None and picture is self._first_watched
            worker.polled = now
            worker.poll = self._ask(worker, "progress", {"state": state, "picture": shown})

    @property
    def _poll_seconds(self) -> float:
        return max(POLL_SECONDS, len(self._workers) / POLLS_A_SECOND)

    @property
    def _first_watched(self) -> Picture | None:
        return next((each for each in self._pictures.values() if each.watched and not each.is_done), None)

    def _hear(self, worker: Worker, now: float) -> None:
        poll, worker.poll = worker.poll, None
        assert poll is not None
        try:
            worker.doing = _result(poll)
        except (ClusterError, WorkerFailure, errors.FireRedError):
            return  # the call ends too, or the worker stays silent until the timeout
        worker.heard = now
        if worker.doing["beats"] != worker.beats:
            worker.beats, worker.moved = worker.doing["beats"], now
        for line in worker.doing["log"]:
            log.warning("%s: %s", worker, line)
        picture = worker.picture
        if picture is not None and not picture.is_done and worker.doing["step"] >= picture.step:
            picture.step = worker.doing["step"] or picture.step
            if worker.doing["denoised"] is not None:
                picture.denoised = worker.doing["denoised"]
            if worker.doing["state"] is not None:
                self._keep(picture, state_of(worker.doing["state"]), worker.doing["arithmetic"])

    def _keep(self, picture: Picture, state: RunState, arithmetic: str, now: bool = False) -> None:
        """Note a picture's state, and save it where that is due."""
        picture.kept, picture.computed_by = state, arithmetic
        if picture.saved is not None:
            picture.saved.arithmetic = arithmetic
            picture.saved.update(state, now)

    def _begin(self, worker: Worker, picture: Picture, now: float) -> None:
        worker.picture = picture
        arguments = {
            "key": picture.task,
            "number": picture.number,
            "state": None if picture.kept is None else plain_state(picture.kept),
            "arithmetic": picture.computed_by,
        }
        worker.call = self._ask(worker, "sample", arguments, picture.task)
        worker.heard = worker.moved = worker.polled = worker.stated = now
        worker.doing = {}

    def _end_picture(self, worker: Worker, picture: Picture) -> None:
        """The call of a worker for this picture has ended."""
        call, worker.call = worker.call, None
        assert call is not None
        try:
            result = _result(call)
            latents = self._require_latents(result["latents"], picture)
        except WorkerFailure as failure:
            if failure.state is not None:
                self._keep(picture, state_of(failure.state), worker.doing.get("arithmetic", ""), now=True)
            if failure.kind != "Cancelled":
                wrong = failure.kind in WRONG_MACHINE
                if wrong:
                    self._tried[worker.node] = time.monotonic()
                self._lose(worker, str(failure), costs=not wrong)
                return
            if not picture.cancelled:  # any more
                worker.picture = None
                return
        except ClusterError as error:
            self._lose(worker, str(error))
            return
        except errors.FireRedError as error:
            picture.error = error
        else:
            picture.latents, picture.result = latents, result | {"worker": str(worker)}
            self._keep(picture, finished_state(latents), result["arithmetic"], now=True)
        worker.picture = None
        self._finish(picture)

    def _require_latents(self, latents: Any, picture: Picture) -> torch.Tensor:
        run = self._tasks[picture.task].run
        shape = (1, 16, 1, run.height, run.width)
        if not isinstance(latents, torch.Tensor) or latents.shape != shape or latents.dtype != torch.float32:
            raise ClusterError("it answered something else than latents")
        return latents

    def _require_hope(self, picture: Picture, worker: Worker) -> None:
        """Give a picture up that took along too many workers."""
        if picture.losses >= MAX_LOSSES and not picture.is_done:
            picture.error = ClusterError(
                f"Picture {picture.number + 1} failed on {picture.losses} workers. The last one was "
                f"{worker}: {worker.lost}."
            )
            self._finish(picture)

    def _finish(self, picture: Picture) -> None:
        """A picture is done, or given up."""
        if picture.saved is not None:
            picture.saved.flush()
        self._pictures.pop(picture.name, None)
        if not any(each.task == picture.task for each in self._pictures.values()):
            self._forget(picture.task)
        self._changed.notify_all()

    def _lose(self, worker: Worker, why: str, costs: bool = True) -> None:
        """A worker is no more. Its picture goes to another one. costs: whether that is the picture's loss."""
        if worker.lost:
            return
        worker.lost = self._reasons[str(worker)] = why
        if worker.ready:
            self._last_loss = time.monotonic()
        picture, worker.picture = worker.picture, None
        if picture is None:
            log.warning("%s is not used: %s", worker, why)
        else:
            picture.losses += costs
            at = picture.kept.step + 1 if picture.kept is not None else 1
            log.error("%s is lost: %s. Another one goes on with its picture at step %d", worker, why, at)
            self._require_hope(picture, worker)
        self._end(worker)
        self._changed.notify_all()

    def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self.link.ask("stop", worker=worker.number)

    def _cancel(self, worker: Worker) -> None:
        self._ask(worker, "cancel", {})

    def _give_way(self, now: float) -> None:
        """End the workers while nothing is sampled and another program of the cluster waits for a card."""
        idle = [each for each in self._workers if each.is_free and each.on_card]
        self._asked_wanted = now
        if not idle:
            return
        asked = self.link.ask("wanted")

        def told(done: Future[Any]) -> None:
            if done.exception() is None and done.result():
                with self._changed:
                    log.info("another program of the cluster waits for a card: %d workers end", len(idle))
                    for worker in idle:
                        if worker.is_free and worker in self._workers:
                            self._end(worker)

        asked.add_done_callback(told)

    # Workers

    def _recruit(self, some: bool) -> bool:
        """Start workers where there are fewer than wanted. Returns whether it has looked for places now.

        some: whether there is one.
        """
        now = time.monotonic()
        if self._nodes is None:
            if not all(worker.ready for worker in self._workers) or not self.here.done():
                return False
            if self.wanted is not None and len(self._workers) >= self.wanted:
                return True
            if now - self._recruited > RECRUIT_SECONDS:
                self._nodes = self.link.ask("nodes")
                self._nodes.add_done_callback(self._wake)
            return False
        if not self._nodes.done():
            return False
        asked, self._nodes = self._nodes, None
        if (failed := asked.exception()) is not None:
            self._disconnected(failed)
            return True
        self._recruited, started = now, 0
        for node, on_card in self._places(asked.result()):
            if now - self._tried.get(node, -RETRY_SECONDS) < RETRY_SECONDS:
                continue
            number = next(self._numbers)
            settings = {"number": number, "threads": torch.get_num_threads()}
            self.link.ask("start", worker=number, node=node, card=on_card, settings=settings)
            worker = Worker(number, node, on_card, now, None)
            worker.described = self._ask(worker, "describe", {})
            self._workers.append(worker)
            started += 1
        if not started and not self._workers and now - self._last_loss > GRACE_SECONDS:
            why = "; ".join(f"{who}: {reason}" for who, reason in self._reasons.items())
            why = why or "other programs of the cluster have all cards"
            self._fail_all(ClusterError(f"No card of {self._where} can sample this. {why}."))
        return True

    def _places(self, nodes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
        """Where to start workers: a machine each, and whether on a card of it."""
        count = None if self.wanted is None else self.wanted - len(self._workers)
        if any(node["cards"] for node in nodes):
            # In turns, so that few workers are on different machines.
            free = [[node["id"]] * node["free"] for node in nodes if node["free"]]
            places = [place for turn in itertools.zip_longest(*free) for place in turn if place is not None]
            chosen = places if count is None else places[: count + SPARE if count else 0]
            yield from ((node, True) for node in chosen)
            return
        taken = [worker.node for worker in self._workers]
        if count is None:
            yield from ((node["id"], False) for node in nodes if node["id"] not in taken)
            return
        order = sorted((node["id"] for node in nodes), key=lambda node: taken.count(node))
        yield from ((node, False) for node in itertools.islice(itertools.cycle(order), max(count, 0)))

    def _meet(self, worker: Worker) -> None:
        """A worker has started and says what it is."""
        described, worker.described = worker.described, None
        assert described is not None
        try:
            worker.about = _result(described)
        except (ClusterError, WorkerFailure, errors.FireRedError) as error:
            self._refuse(worker, str(error))
            return
        if reason := _difference(worker.about["versions"]):
            self._refuse(worker, reason)
        elif reason := self._too_full(worker, float(worker.about["free"])):
            here = worker.about["uuid"] is not None and worker.node == self.here.result()
            worker.needs_claim = here
            if not here:
                self._refuse(worker, reason)

    def _refuse(self, worker: Worker, reason: str) -> None:
        """Another look at its machine would not help for a while."""
        self._tried[worker.node] = time.monotonic()
        self._lose(worker, reason)

    def _make_room(self) -> None:
        """Unload models of this process where a worker needs their card. For the thread of a prompt."""
        for worker in [each for each in self._workers if each.needs_claim]:
            assert self._needs is not None
            run = self._needs.run
            free = self._claim(worker.about["uuid"], run.replica.spec.nbytes() + run.working_bytes())
            with self._changed:
                worker.needs_claim = False
                if worker in self._workers and (reason := self._too_full(worker, free)):
                    self._refuse(worker, reason)

    def _choose(self) -> None:
        """Once all that were started have said what they are, take the wanted ones with the most room."""
        if any(worker.described is not None or worker.needs_claim for worker in self._workers):
            return
        new = [worker for worker in self._workers if not worker.ready]
        count = len(new)
        if self.wanted is not None:
            count = max(self.wanted - (len(self._workers) - len(new)), 0)
        new.sort(key=lambda worker: -worker.about["free"])
        for worker in new[count:]:
            self._end(worker)
        for worker in new[:count]:
            worker.ready = True
            log.info("%s takes pictures, %.1f GiB free", worker, worker.about["free"] / 2**30)

    def _too_full(self, worker: Worker, free: float) -> str:
        """Why a worker has no room for the transformer; empty where it has. free: bytes on its card."""
        if self._needs is None:
            return ""
        run = self._needs.run
        working = run.working_bytes()
        if not worker.on_card:
            free /= sum(each.node == worker.node for each in self._workers)
        if room.has_room(run.replica, working, free):
            return ""
        needed = (run.replica.spec.nbytes() + working) / 2**30
        return f"it has {free / 2**30:.1f} GiB free, and this edit takes {needed:.1f} GiB"

    # Connection

    def _ask(
        self, worker: Worker, method: str, arguments: Mapping[str, Any], task: str | None = None
    ) -> Future[Any]:
        content = packed(arguments)
        asked = self.link.ask("call", worker=worker.number, method=method, content=content, task=task)
        asked.add_done_callback(self._wake)
        return asked

    def _wake(self, done: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _share(self, key: str, task: Task, plain: bytes) -> None:
        self._needs = task
        if key not in self._tasks:
            self._tasks[key] = task
            self.link.ask("share", key=key, content=plain)

    def _forget(self, key: str) -> None:
        if self._tasks.pop(key, None) is not None:
            self.link.ask("forget", key=key)

    @property
    def _where(self) -> str:
        return f"the Ray cluster at {self.link.address}" if self.link.address else "this machine's Ray"

    def _hope(self) -> None:
        """Before new work: what was in the way may be gone."""
        if self._closed:
            return
        self._hopeless = None
        if not self._workers:
            self._tried.clear()
            self._reasons.clear()

    def _disconnected(self, reason: BaseException | None) -> None:
        """The cluster cannot be used, from the beginning or any more. Pools that follow try again."""
        for worker in self._workers:
            worker.lost = worker.lost or "the cluster is gone"
        self._workers.clear()
        why = reason or "the process that Ray runs in has ended"
        self._fail_all(ClusterError(f"{self._where} cannot be used: {why}. What was computed is saved."))
        self._closed = True
        self.link.close()

    def _fail_all(self, error: ClusterError) -> None:
        self._hopeless = error
        for picture in list(self._pictures.values()):
            picture.error = error
            self._finish(picture)
        self._changed.notify_all()

    def _at_work(self, picture: Picture) -> bool:
        return any(worker.picture is picture for worker in self._workers)

    def _what(self, picture: Picture) -> str:
        """What is done before a picture's first step."""
        if not self.here.done():
            return f"connecting to {self._where}"
        worker = next((each for each in self._workers if each.picture is picture), None)
        if worker is None:
            return "" if any(each.ready for each in self._workers) else f"starting workers of {self._where}"
        return "" if worker.doing.get("step") else worker.preparing


WRONG_MACHINE = ("CheckpointError", "DoesNotFitError", "FireRedError")  # another one may do
FOR_THE_USER = ("NonFiniteError", "InputError")  # every worker would fail so


class WorkerFailure(Exception):
    """A worker's own error, which another worker may not have. state: of the picture, as in task.py."""

    def __init__(self, kind: str, message: str, state: Mapping[str, Any] | None):
        super().__init__(message)
        self.kind, self.state = kind, state


def _result(future: Future[Any]) -> Any:
    """The result in an answer of a worker. Raises ClusterError, WorkerFailure, or what the user must know."""
    content = future.result()
    try:
        answer = unpacked(content)
        if "result" in answer:
            return answer["result"]
        kind, message, state = answer["error"], answer["message"], answer["state"]
    except (WireError, TypeError, KeyError) as error:
        raise ClusterError(f"it answered something else ({error})") from error
    if kind in FOR_THE_USER:
        raise getattr(errors, kind)(message)
    raise WorkerFailure(kind, message, state)


def _difference(versions: Mapping[str, str | None]) -> str:
    """Which libraries differ from this process's; empty where none does."""
    ours = {name: library_version(name) for name in LIBRARIES}
    differing = [
        f"{name} {versions.get(name) or 'is missing'} (here {version})"
        for name, version in ours.items()
        if version is not None and _release(versions.get(name)) != _release(version)
    ]
    if not differing:
        return ""
    return f"it has other libraries: {', '.join(differing)}. Install the same ones there, and start Ray again"


def _release(version: str | None) -> str | None:
    """Without the part that names a build, such as +cu130."""
    return version if version is None else version.partition("+")[0]


def _open(picture: Picture) -> None:
    """Read what an earlier try left of a picture."""
    kept = picture.saved.kept() if picture.saved is not None else None
    if kept is None or picture.saved is None:
        return
    state, arithmetic = kept
    picture.latents = picture.saved.finished_latents(state, 1)
    if picture.latents is None and not state.finished and bool(state.latents.isfinite().all()):
        picture.kept, picture.computed_by, picture.step = state, arithmetic, state.step
        log.info("resuming picture %d at step %d", picture.number + 1, state.step + 1)


def _seconds(variable: str, default: float) -> float:
    try:
        return max(float(os.environ.get(variable, default)), 1.0)
    except ValueError:
        raise errors.InputError(f"{variable} is {os.environ[variable]!r}; set it to seconds.") from None
