"""Hands the pictures of runs to the workers of a cluster, and the branches of one run to reserved workers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import FireRedError
from ..files.cache import DiskCache
from ..sampling.resume import RunState, SavedRun, finished_state
from .crew import Claim, Crew
from .link import ClusterError, Link
from .remote import Machine, Picture, Worker, WorkerFailure, result_of
from .task import Task, plain_state, single, state_of
from .wire import packed

log = logging.getLogger("FireRed")

STUCK = 10  # times the link's timeout without a block done, for a worker that does answer
SILENT_SECONDS = 10.0  # without an answer, until it is tried whether a worker's machine can be reached
TICK, IDLE_TICK = 0.05, 10.0  # seconds between two looks at the workers
CANCEL_SECONDS = 5.0  # that a cancelled worker has to save what it computed
POLL_SECONDS = 0.5  # between two questions to a worker how far it is
POLLS_A_SECOND = 200  # of all workers
STATE_SECONDS = 5.0  # between two states of a picture that cross the network
STATES_A_SECOND = 20  # of all pictures; one of 1024x1024 has 1 MB
MAX_LOSSES = 3  # of workers that a picture may take along
WRONG_MACHINE = ("CheckpointError", "DoesNotFitError", "FireRedError")  # another machine may do

# Called with what is being done before the first step, or ""; with the number of steps done and of all steps;
# and with the estimate of the first unfinished picture, normalised latents (1, 16, 1, h, w), or None.
OnProgress = Callable[[str, int, int, torch.Tensor | None], None]


class Pool:
    """Workers of one cluster, and the pictures that wait for them. It has a thread of its own."""

    def __init__(
        self,
        link: Link,
        wanted: int | None,
        claim: Claim = lambda card, nbytes: 0.0,
        cache: DiskCache | None = None,
    ):
        """wanted, claim, cache: as in Crew."""
        self._changed = threading.Condition()
        self._crew = Crew(link, wanted, claim, cache, self._changed)
        self._pictures: dict[str, Picture] = {}  # not yet done, by name, in their order
        self._tasks: dict[str, Task] = {}
        self._shown: Picture | None = None  # the first that a prompt waits for, which gets previews
        self._asked_wanted = 0.0
        self._failed: ClusterError | None = None  # why nothing can be computed
        self._closed = False
        threading.Thread(target=self._run, name="FireRed: cluster", daemon=True).start()

    # For prompts

    @property
    def link(self) -> Link:
        return self._crew.link

    @property
    def alive(self) -> bool:
        return not self._closed and self.link.alive

    def want(self, count: int | None) -> None:
        """How many workers there shall be from now on; None for every card of the cluster."""
        with self._changed:
            self._crew.wanted = count
            surplus = 0 if count is None else max(len(self._crew.workers) - count, 0)
            for worker in [each for each in self._crew.workers if each.is_free][:surplus]:
                self._crew.end(worker)

    @property
    def workers(self) -> list[Worker]:
        """Those that are ready."""
        with self._changed:
            return [worker for worker in self._crew.workers if worker.ready]

    def machines(self, check: Callable[[], None]) -> list[Machine]:
        """The machines of the cluster. check: called while they are asked; may raise. Raises ClusterError."""
        return self._crew.machines(check)

    def submit(self, task: Task, saved: Callable[[str], SavedRun | None]) -> list[Picture]:
        """The pictures of a run, to be sampled. saved: the file of a run's name. Raises ClusterError.

        A picture that is already being sampled is not begun again.
        """
        key = task.run.name(task.guard)
        names = [single(task.run, number).name(task.guard) for number in range(task.run.batch)]
        made = [Picture(name, key, number, saved(name)) for number, name in enumerate(names)]
        for picture in made:
            _open(picture)
        needs = task.needs()
        plain = None if all(picture.is_done for picture in made) else packed(task.plain())
        with self._changed:
            self._expect(needs)
            pictures = [self._pictures.get(picture.name, picture) for picture in made]
            for picture in pictures:
                picture.cancelled = False
                if not picture.is_done and picture.name not in self._pictures:
                    assert plain is not None
                    self._share(key, task, plain)
                    self._pictures[picture.name] = picture
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
                self._crew.make_room()
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

    def cancel(self, pictures: Sequence[Picture], watched: bool = True) -> None:
        """Do not finish these pictures. Waits until their states are saved, but not for a hung worker.

        watched: whether also those that a prompt waits for.
        """
        deadline = time.monotonic() + CANCEL_SECONDS
        with self._changed:
            pictures = [picture for picture in pictures if watched or not picture.watched]
            for picture in pictures:
                picture.cancelled = True
            self._changed.notify_all()
            while any(each.name in self._pictures for each in pictures) and time.monotonic() < deadline:
                self._changed.wait(TICK)

    @contextmanager
    def reserved(self, task: Task, count: int, check: Callable[[], None]) -> Iterator[list[Worker]]:
        """Up to `count` workers that get no pictures inside the block; at least one. Raises ClusterError.

        check: called while none is free; may raise, to cancel.
        """
        key, needs, plain = task.run.name(task.guard), task.needs(), packed(task.plain())
        with self._changed:
            self._expect(needs)
            self._share(key, task, plain)
        taken: list[Worker] = []
        looked = False  # for more workers than there are
        try:
            while not taken:
                with self._changed:
                    if self._failed is not None:
                        raise self._failed
                    free = [each for each in self._crew.workers if each.is_free]
                    if len(free) >= count or (free and looked and len(free) == len(self._crew.workers)):
                        taken = free[:count]
                        for worker in taken:
                            worker.reserved = True
                    else:
                        looked |= self._crew.recruit()
                        self._changed.wait(TICK)
                check()
                self._crew.make_room()
            yield taken
        finally:
            with self._changed:
                for worker in taken:
                    worker.reserved = False
                self._forget(key)

    def call(self, worker: Worker, method: str, key: str, **arguments: Any) -> None:
        """Let a reserved worker compute. `result` gives what."""
        with self._changed:
            self._compute(worker, method, arguments | {"key": key}, key if method == "prepare" else None)

    def pause(self) -> None:
        """Wait a moment for news of any worker."""
        with self._changed:
            self._changed.wait(TICK)

    def finished(self, worker: Worker) -> bool:
        """Whether the call of a reserved worker has ended."""
        with self._changed:
            return worker.call is None or worker.call.done() or bool(worker.lost)

    def result(self, worker: Worker) -> Any:
        """What the ended call of a reserved worker gave. Raises ClusterError for a lost worker, or the error
        that the user must know.
        """
        with self._changed:
            call, worker.call = worker.call, None
            if worker.lost or call is None:
                raise ClusterError(worker.lost)
            try:
                return result_of(call)
            except (WorkerFailure, ClusterError) as failure:
                self._lose(worker, str(failure))
                raise ClusterError(worker.lost) from None

    def stop_call(self, worker: Worker) -> None:
        """Cancel the call of a reserved worker, and wait a little for its end."""
        deadline = time.monotonic() + CANCEL_SECONDS
        while not self.finished(worker) and time.monotonic() < deadline:
            with self._changed:
                self._crew.ask(worker, "cancel", {})
                self._changed.wait(2 * TICK)
        with self._changed:
            if worker.call is not None and not worker.call.done() and not worker.lost:
                self._lose(worker, "it did not stop when the work was cancelled")
            worker.call = None

    def release(self) -> None:
        """End the workers that compute nothing."""
        with self._changed:
            for worker in [each for each in self._crew.workers if each.is_free]:
                self._crew.end(worker)

    def release_card(self, card: str) -> bool:
        """End the worker on that card (UUID) of this machine, unless a prompt waits for what it computes.

        Returns whether there was one. A picture of a queued prompt goes on elsewhere.
        """
        with self._changed:
            for worker in self._crew.workers:
                picture = worker.picture
                unused = worker.is_free or (picture is not None and not picture.watched)
                if unused and not worker.reserved and worker.about.get("uuid") == card:
                    worker.picture = None
                    self._crew.end(worker)
                    return True
        return False

    def close(self) -> None:
        """Leave the cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.link.close()

    # The pool's thread, which holds the lock while it looks

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                try:
                    self._look(time.monotonic())
                except ClusterError as error:
                    self._fail(error)
                except Exception as error:  # a fault here must not leave prompts waiting
                    log.exception("the pool of the cluster's workers failed")
                    self._fail(ClusterError(f"the pool of the cluster's workers failed: {error}"))
                busy = any(each.call or not each.ready for each in self._crew.workers)
                active = self._pictures or busy or not self._crew.connected
                self._changed.wait(TICK if active else IDLE_TICK)

    def _look(self, now: float) -> None:
        try:
            self._crew.require_connected()
        except ClusterError:
            for worker in self._crew.workers:
                worker.lost = worker.lost or "the cluster is gone"
            self._crew.workers.clear()
            self._closed = True
            self.link.close()
            raise
        self._crew.look(now)
        self._shown = next((each for each in self._pictures.values() if each.watched), None)
        for worker in list(self._crew.workers):
            self._look_at(worker, now)
        at_work = {id(worker.picture) for worker in self._crew.workers}
        waiting = [each for each in self._pictures.values() if id(each) not in at_work]
        for picture in [each for each in waiting if each.cancelled]:
            self._finish(picture)
        waiting = sorted((each for each in waiting if not each.cancelled), key=lambda each: not each.watched)
        free = [worker for worker in self._crew.workers if worker.is_free]
        for worker, picture in zip(free, waiting, strict=False):
            self._begin(worker, picture, now)
        if waiting:
            self._crew.recruit()
        elif self.link.address and now - self._asked_wanted > IDLE_TICK / 2:
            self._give_way(now)

    def _look_at(self, worker: Worker, now: float) -> None:
        if worker.poll is not None and worker.poll.done():
            self._note_progress(worker, now)
        if worker.call is None or worker.lost:
            return
        picture, timeout = worker.picture, self.link.timeout
        if worker.call.done():
            if picture is not None:
                self._end_picture(worker, picture)
            elif not worker.reserved:  # what it computed was given up
                worker.call = None
        elif worker.poll is not None and now - worker.polled > timeout:
            self._lose(worker, f"it has not answered for {timeout:.0f} s")
        elif worker.poll is not None and now - worker.polled > SILENT_SECONDS and self._is_cut_off(worker):
            self._lose(worker, "its machine cannot be reached", again=False)
        elif now - worker.moved > timeout * STUCK:
            self._lose(worker, f"it has computed nothing for {timeout * STUCK:.0f} s")
        elif worker.poll is None and now - worker.polled > self._poll_seconds(picture):
            if picture is not None and picture.cancelled:
                self._crew.ask(worker, "cancel", {})
            between = max(STATE_SECONDS, len(self._crew.workers) / STATES_A_SECOND)
            state = picture is not None and now - worker.stated > between
            worker.stated, worker.polled = now if state else worker.stated, now
            shown = picture is not None and picture is self._shown
            worker.poll = self._crew.ask(worker, "progress", {"state": state, "picture": shown})

    def _is_cut_off(self, worker: Worker) -> bool:
        """Whether a silent worker's machine cannot be reached. Ray needs a minute to notice that."""
        if worker.reach is None:
            worker.reach = self._crew.reach(worker)
        return worker.reach.done() and not worker.reach.result()

    def _poll_seconds(self, picture: Picture | None) -> float:
        """Between two questions to a worker: less where a cancel has to reach it."""
        if picture is not None and picture.cancelled:
            return 2 * TICK
        return max(POLL_SECONDS, len(self._crew.workers) / POLLS_A_SECOND)

    def _note_progress(self, worker: Worker, now: float) -> None:
        """A worker has answered how far it is."""
        poll, worker.poll, worker.reach = worker.poll, None, None
        assert poll is not None
        try:
            doing = result_of(poll)
            current = worker.noted(doing, now)
            for line in doing["log"]:
                log.warning("%s: %s", worker, line)
            picture = worker.picture
            if not current or picture is None or picture.is_done:
                return
            picture.step = max(picture.step, doing["step"])
            if doing["denoised"] is not None:
                picture.denoised = doing["denoised"]
            self._keep_plain(picture, doing["state"], doing["arithmetic"])
        except (WorkerFailure, FireRedError):
            return  # the call fails too, or gives its result
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            self._lose(worker, f"it answered something else ({type(error).__name__}: {error})")

    def _keep_plain(
        self, picture: Picture, plain: Mapping[str, Any] | None, arithmetic: str, now: bool = False
    ) -> None:
        """As _keep, for what a worker sent, if it is a state to go on from."""
        if plain is not None and arithmetic and not plain["finished"]:
            self._keep(picture, state_of(plain), arithmetic, now)

    def _keep(self, picture: Picture, state: RunState, arithmetic: str, now: bool = False) -> None:
        """Note a picture's state, and save it where that is due."""
        before = picture.kept
        if before is not None and picture.computed_by == arithmetic and state.step < before.step and not now:
            return  # it was begun again
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
        self._compute(worker, "sample", arguments, picture.task)

    def _end_picture(self, worker: Worker, picture: Picture) -> None:
        """The call of a worker for this picture has ended."""
        call, worker.call, worker.poll = worker.call, None, None
        assert call is not None
        try:
            result = result_of(call)
            picture.latents = self._require_latents(result["latents"], picture)
            picture.result = result | {"worker": str(worker)}
            self._keep(picture, finished_state(picture.latents), result["arithmetic"], now=True)
        except WorkerFailure as failure:
            self._keep_plain(picture, failure.state, failure.arithmetic, now=True)
            if failure.kind != "Cancelled":
                self._lose(worker, str(failure), again=failure.kind not in WRONG_MACHINE)
                return
            if not picture.cancelled:  # any more
                worker.picture = None
                return
        except ClusterError as error:
            self._lose(worker, str(error))
            return
        except FireRedError as error:
            picture.error = error
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            self._lose(worker, f"it answered something else ({type(error).__name__}: {error})")
            return
        worker.picture = None
        self._finish(picture)

    def _require_latents(self, latents: Any, picture: Picture) -> torch.Tensor:
        run = self._tasks[picture.task].run
        shape = (1, 16, 1, run.height, run.width)
        if not isinstance(latents, torch.Tensor) or latents.shape != shape or latents.dtype != torch.float32:
            raise ClusterError("it answered something else than latents")
        return latents

    def _give_up(self, picture: Picture, worker: Worker) -> None:
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

    def _lose(self, worker: Worker, why: str, again: bool = True) -> None:
        """A worker is no more. Its picture goes to another one. again: as in Crew.lose; if not, the worker's
        machine is to blame and not the picture.
        """
        if worker.lost:
            return
        picture, worker.picture = worker.picture, None
        self._crew.lose(worker, why, again)
        if picture is None:
            log.error("%s is lost: %s", worker, why)
            return
        picture.losses += again and bool(worker.doing)  # else it had died before
        at = picture.kept.step + 1 if picture.kept is not None else 1
        log.error("%s is lost: %s. Another one goes on with its picture at step %d", worker, why, at)
        self._give_up(picture, worker)

    def _give_way(self, now: float) -> None:
        """End the workers while nothing is sampled and another program of the cluster waits for a card."""
        idle = [each for each in self._crew.workers if each.is_free and each.on_card]
        self._asked_wanted = now
        if not idle:
            return

        def told(done: Future[Any]) -> None:
            if done.exception() is not None or not done.result():
                return
            with self._changed:
                log.info("another program of the cluster waits for a card: %d workers end", len(idle))
                for worker in idle:
                    if worker.is_free and worker in self._crew.workers:
                        self._crew.end(worker)

        self.link.ask("others_wait").add_done_callback(told)

    def _compute(self, worker: Worker, method: str, arguments: Mapping[str, Any], task: str | None) -> None:
        """Let a worker compute. task: the key of the task that it needs for that."""
        worker.turn += 1
        call = self._crew.ask(worker, method, {**arguments, "turn": worker.turn}, task)
        worker.calls(call, time.monotonic())

    def _share(self, key: str, task: Task, plain: bytes) -> None:
        """Let workers have the task, under that key."""
        if key not in self._tasks:
            self.link.ask("share", key=key, content=plain)
            self._tasks[key] = task

    def _forget(self, key: str) -> None:
        if self._tasks.pop(key, None) is not None:
            self.link.ask("forget", key=key)

    def _expect(self, needs: tuple[int, int]) -> None:
        """New work comes. needs: as in Crew.expect. Raises ClusterError where the cluster is gone."""
        if self._closed:
            raise self._failed or ClusterError(f"{self.link.where} was left. Run the prompt again.")
        self._failed = None
        self._crew.expect(needs)

    def _fail(self, error: ClusterError) -> None:
        """Give up all pictures."""
        self._failed = error
        for worker in self._crew.workers:
            worker.picture = None
        for picture in list(self._pictures.values()):
            picture.error = error
            self._finish(picture)
        self._changed.notify_all()

    def _what(self, picture: Picture) -> str:
        """What is done before a picture's first step."""
        if not self._crew.connected:
            return f"connecting to {self.link.where}"
        worker = next((each for each in self._crew.workers if each.picture is picture), None)
        if worker is None:
            ready = any(each.ready for each in self._crew.workers)
            return "" if ready else f"starting workers of {self.link.where}"
        return "" if worker.doing.get("step") else worker.preparing


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
