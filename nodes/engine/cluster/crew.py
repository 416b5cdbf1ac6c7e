"""The workers of a cluster: where they are started, and which of them are taken."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..arithmetic import library_version, settings_now
from ..errors import FireRedError
from ..files.cache import DiskCache
from ..units import GIB
from ..weights.estimates import fits
from .link import ClusterError, Link, reaches
from .remote import Machine, Worker, WorkerFailure, result_of
from .wire import packed
from .worker import LIBRARIES

log = logging.getLogger("FireRed")

CONNECT_SECONDS = 25.0  # that joining a cluster may take
LOCAL_SECONDS = 120.0  # that starting a Ray of this machine may take
CHOOSE_SECONDS = 5.0  # that workers wait for others to choose from
ANSWER_SECONDS = 15.0  # that the cluster's head may take to list its machines
START_SECONDS = 120.0  # that a worker may take to start: it imports torch
RECRUIT_SECONDS = 1.0  # between two looks for cards to start workers on
RETRY_SECONDS = 60.0  # until a machine whose cards did not do is tried again
GRACE_SECONDS = 15.0  # in which the cluster notices that a card is free again
SPARE = 4  # workers that are started beside those wanted, to choose from

# A card's number (UUID) and the bytes that a worker needs on it, to the bytes that are free there then.
Claim = Callable[[str, float], float]


class Crew:
    """The workers of one cluster. Whoever calls it holds the lock `changed`, if nothing else is said."""

    def __init__(
        self,
        link: Link,
        wanted: int | None,
        claim: Claim,
        cache: DiskCache | None,
        changed: threading.Condition,
    ):
        """wanted: how many workers; None for every card of the cluster. claim: makes room on a card that
        this process uses too. cache: of this machine, which its workers use too.
        """
        self.link, self.wanted = link, wanted
        self.workers: list[Worker] = []
        self._needs = 0, 0
        self._claim, self._cache, self._changed = claim, cache, changed
        self._numbers = itertools.count(1)
        self._reasons: dict[str, str] = {}  # why workers did not do, by who
        self._tried: dict[str, float] = {}  # nodes whose cards did not do, and when
        self._addresses: dict[str, tuple[str, int]] = {}  # of nodes
        self._nodes: Future[Any] | None = None
        self._asked = 0.0  # when, for _nodes
        self._last_end = self._recruited = -RETRY_SECONDS  # when a worker left a card that will do
        self._expected = 0.0  # when there was new work
        self._begun = time.monotonic()
        self._here = self._woken(link.connect())

    @property
    def connected(self) -> bool:
        return self._here.done() and self._here.exception() is None

    def require_connected(self) -> None:
        """Raise ClusterError for a cluster that does not answer, answers something else, or is gone."""
        why: object = self._here.exception() if self._here.done() else None
        limit = CONNECT_SECONDS if self.link.address else LOCAL_SECONDS
        if not self._here.done() and time.monotonic() - self._begun > limit:
            why = f"it did not answer within {limit:.0f} s"
            self.link.kill()
        elif why is None and self._is_silent():
            why = f"its head has not answered for {ANSWER_SECONDS:.0f} s"
            self.link.kill()
        elif why is None and not self.link.alive:
            why = "the process that Ray runs in has ended"
        if why is not None:
            raise ClusterError(f"{self.link.where} cannot be used: {why}. What was computed is saved.")

    def _is_silent(self) -> bool:
        """Whether the cluster's head does not answer."""
        waits = self._nodes is not None and not self._nodes.done()
        return waits and time.monotonic() - self._asked > ANSWER_SECONDS

    def expect(self, needs: tuple[int, int]) -> None:
        """New work comes, and what was in the way may be gone.

        needs: bytes of the weights and beside them, which a worker must have room for.
        """
        self._needs, self._expected = needs, time.monotonic()
        if not self.workers:
            self._tried.clear()
            self._reasons.clear()

    def ask(
        self, worker: Worker, method: str, arguments: Mapping[str, Any], task: str | None = None
    ) -> Future[Any]:
        """Call a worker's method. task: the key of a shared task that it is about."""
        content = packed(arguments)
        asked = self.link.ask("call", worker=worker.number, method=method, content=content, task=task)
        return self._woken(asked)

    def reach(self, worker: Worker) -> Future[bool]:
        """Try to connect to a worker's machine. Gives whether that succeeds."""
        tried: Future[bool] = Future()

        def connect() -> None:
            tried.set_result(reaches(*self._addresses[worker.node]))

        threading.Thread(target=connect, name="FireRed: cluster", daemon=True).start()
        return self._woken(tried)

    def machines(self, check: Callable[[], None]) -> list[Machine]:
        """The machines of the cluster. Called without the lock. Raises ClusterError.

        check: called while they are asked; may raise.
        """
        asked: Future[Any] | None = None
        deadline = math.inf
        while asked is None or not asked.done():
            with self._changed:
                self.require_connected()
                if asked is None and self.connected:
                    asked, deadline = self._woken(self.link.ask("nodes")), time.monotonic() + ANSWER_SECONDS
                self._changed.wait(RECRUIT_SECONDS)
            check()
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.link.where} has not answered for {ANSWER_SECONDS:.0f} s.")
        return [
            Machine(each["machine"], each["cards"], each["free"], tuple(each["kinds"]))
            for each in asked.result()
        ]

    def look(self, now: float) -> None:
        """Meet the workers that have started, and take those that do. now: on the monotonic clock."""
        for worker in list(self.workers):
            if worker.described is not None and worker.described.done():
                self._meet(worker)
            elif worker.described is not None and now - worker.started > START_SECONDS:
                self._refuse(worker, f"it did not start within {START_SECONDS:.0f} s")
        self._choose()

    def recruit(self) -> bool:
        """Start workers where there are fewer than wanted. Returns whether it has looked for places now.

        Raises ClusterError where there is no worker and no place for one.
        """
        now = time.monotonic()
        if self._nodes is None:
            if not all(worker.ready for worker in self.workers) or not self.connected:
                return False
            if self.wanted is not None and len(self.workers) >= self.wanted:
                return True
            if now - self._recruited > RECRUIT_SECONDS:
                self._nodes, self._asked = self._woken(self.link.ask("nodes")), now
            return False
        if not self._nodes.done():
            return False
        asked, self._nodes = self._nodes, None
        if now - self._asked > ANSWER_SECONDS:  # there was no need to look, and it may have changed
            return False
        self._recruited = now
        self._addresses |= {each["id"]: each["address"] for each in asked.result()}
        for node, on_card in self._places(asked.result()):
            if now - self._tried.get(node, -RETRY_SECONDS) >= RETRY_SECONDS:
                self._start(node, on_card, now)
        waited = now - (self._last_end if self._reasons else max(self._last_end, self._expected))
        if not self.workers and waited > GRACE_SECONDS:
            why = "; ".join(f"{who}: {reason}" for who, reason in self._reasons.items())
            why = why or "Other programs of the cluster have all cards"
            raise ClusterError(f"No card of {self.link.where} can sample this. {why}.")
        return True

    def make_room(self) -> None:
        """Unload models of this process where a worker needs their card.

        For the thread of a prompt, which calls it without the lock.
        """
        for worker in [each for each in self.workers if each.needs_claim]:
            free = self._claim(worker.about["uuid"], sum(self._needs))
            with self._changed:
                worker.needs_claim = False
                if worker in self.workers and (reason := self._too_full(worker, free)):
                    self._refuse(worker, reason)

    def lose(self, worker: Worker, why: str, again: bool = True) -> None:
        """A worker is no more. again: whether another one may be started on its machine soon."""
        worker.lost = self._reasons[str(worker)] = why
        if not again:
            self._tried[worker.node] = time.monotonic()
        self.end(worker, again)

    def end(self, worker: Worker, again: bool = True) -> None:
        """again: whether its card will do for another one."""
        self.workers.remove(worker)
        self.link.ask("stop", worker=worker.number)
        if worker.ready and again:
            self._last_end = time.monotonic()
        self._changed.notify_all()

    def _start(self, node: str, on_card: bool, now: float) -> None:
        number = next(self._numbers)
        settings = {
            "number": number, "card": on_card, "threads": torch.get_num_threads(), "torch": settings_now(),
        }  # fmt: skip
        if self._cache is not None and node == self._here.result():
            settings["cache"] = [str(self._cache.folder), self._cache.limit]
        self.link.ask("start", worker=number, node=node, card=on_card, settings=settings)
        worker = Worker(number, node, on_card, now)
        worker.described = self.ask(worker, "describe", {})
        self.workers.append(worker)

    def _places(self, nodes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
        """Where to start workers: a machine each, and whether on a card of it."""
        count = None if self.wanted is None else self.wanted - len(self.workers)
        if any(node["cards"] for node in nodes):
            # In turns, so that few workers are on different machines.
            free = [[node["id"]] * node["free"] for node in nodes if node["free"]]
            places = [place for turn in itertools.zip_longest(*free) for place in turn if place is not None]
            yield from ((node, True) for node in places[: None if count is None else count + SPARE])
            return
        taken = [worker.node for worker in self.workers]
        if count is None:
            yield from ((node["id"], False) for node in nodes if node["id"] not in taken)
            return
        order = sorted((node["id"] for node in nodes), key=lambda node: taken.count(node))
        yield from ((node, False) for node in itertools.islice(itertools.cycle(order), max(count, 0)))

    def _meet(self, worker: Worker) -> None:
        """A worker has started and says what it is."""
        described, worker.described = worker.described, None
        assert described is not None
        worker.met = time.monotonic()
        try:
            worker.about = result_of(described)
        except (WorkerFailure, FireRedError) as error:
            self._refuse(worker, str(error))
            return
        if reason := _difference(worker.about["versions"]):
            self._refuse(worker, reason)
        elif reason := self._too_full(worker, float(worker.about["free"])):
            here = worker.about["uuid"] is not None and worker.node == self._here.result()
            worker.needs_claim = here
            if not here:
                self._refuse(worker, reason)

    def _refuse(self, worker: Worker, reason: str) -> None:
        log.warning("%s is not used: %s", worker, reason)
        self.lose(worker, reason, again=False)

    def _choose(self) -> None:
        """Take every worker that does or, once all have said what they are, as many as wanted.

        Those with the most room come first.
        """
        new = [worker for worker in self.workers if not worker.ready]
        met = [worker for worker in new if worker.described is None and not worker.needs_claim]
        count = len(met)
        if self.wanted is not None:
            count = max(self.wanted - (len(self.workers) - len(new)), 0)
            first = min((worker.met for worker in met), default=math.inf)
            if len(met) < len(new) and (len(met) < count or time.monotonic() - first < CHOOSE_SECONDS):
                return
        met.sort(key=lambda worker: -worker.about["free"])
        for worker in met[count:]:
            self.end(worker)
        for worker in met[:count]:
            worker.ready = True
            log.info("%s is ready, %.1f GiB free", worker, worker.about["free"] / GIB)

    def _too_full(self, worker: Worker, free: float) -> str:
        """Why a worker has no room for the transformer; empty where it has. free: bytes on its card."""
        if not worker.on_card:
            free /= sum(each.node == worker.node for each in self.workers)
        if fits(*self._needs, free):
            return ""
        return f"it has {free / GIB:.1f} GiB free, and this edit takes {sum(self._needs) / GIB:.1f} GiB"

    def _woken(self, asked: Future[Any]) -> Future[Any]:
        """The future, which wakes who waits for news."""

        def wake(done: Future[Any]) -> None:
            with self._changed:
                self._changed.notify_all()

        asked.add_done_callback(wake)
        return asked


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
