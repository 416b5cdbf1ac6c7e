"""One edit on several machines: each computes a branch of guidance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..progress import OnProgress
from ..sampling.conditioning import POSITIVE
from ..sampling.sampling import SamplingRun
from ..sampling.workers import Worker as Computer
from .link import ClusterError
from .pool import Pool
from .remote import Worker
from .task import Task

log = logging.getLogger("FireRed")

Check = Callable[[str], None]  # called with what is being done; may raise, to cancel


class Branches:
    """Computes a run's predictions on workers of a cluster, as sampling.Computing and Worker say.

    A worker that is lost is left out: the other one computes the step again, and the rest of the run.
    """

    devices: Sequence[torch.device] = ()

    def __init__(self, pool: Pool, workers: Sequence[Worker], task: Task, check: Check):
        self._pool, self._workers, self._run, self._check = pool, list(workers), task.run, check
        self._key = task.run.name(task.guard)
        prepared = self._on_each({worker: {} for worker in self._workers}, "prepare")
        self._computed_by = [each["arithmetic"] for each in prepared.values()]

    def __str__(self) -> str:
        return ", ".join(self.used)

    @property
    def used(self) -> list[str]:
        """The names of the workers."""
        return list(map(str, self._workers))

    def arithmetic(self, run: SamplingRun) -> str:
        return "; ".join(dict.fromkeys(self._computed_by))

    def worker(self, run: SamplingRun, guard: str, on_modulation: OnProgress) -> Computer:
        return self

    def predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """As Worker.predict, on the device of the latents. Raises ClusterError where no worker is left."""
        guided = self._run.options.is_guided(step, self._run.schedule.steps)
        left = [name for name in self._run.conditions if guided or name == POSITIVE]
        velocities: dict[str, torch.Tensor] = {}
        while left:
            now = dict(zip(self._workers, left, strict=False))
            arguments = {
                worker: {"branch": branch, "latents": latents, "step": step} for worker, branch in now.items()
            }
            for worker, answer in self._on_each(arguments, "predict").items():
                velocities[now[worker]] = answer["velocity"].to(latents.device)
            left = [name for name in left if name not in velocities]
        return {name: velocities[name] for name in self._run.conditions if name in velocities}

    def _on_each(self, arguments: Mapping[Worker, Mapping[str, object]], method: str) -> dict[Worker, dict]:
        """What the method gives on each of these workers; without those that are lost meanwhile."""
        for worker, given in arguments.items():
            self._pool.call(worker, method, self._key, **given)
        try:
            for worker in arguments:
                while not self._pool.finished(worker):
                    self._pool.pause()
                    self._check(worker.preparing if method == "prepare" else "")
            answers, lost = {}, None
            for worker in arguments:
                try:
                    answers[worker] = self._pool.result(worker)
                except ClusterError as error:
                    lost = error
                    self._workers.remove(worker)
        except BaseException:
            for worker in arguments:
                self._pool.stop_call(worker)
            raise
        if not self._workers:
            raise ClusterError(f"The last worker is lost: {lost}. Run the prompt again to go on.")
        if lost is not None and method == "predict":
            log.error("this step is done again, and the run goes on with %s alone", self)
        return answers


@contextmanager
def on_branches(pool: Pool, task: Task, check: Check) -> Iterator[Branches]:
    """Workers for the run's branches, as many as there are, ready to predict inside the block."""
    with pool.reserved(task, len(task.run.conditions), lambda: check("waiting for workers")) as workers:
        yield Branches(pool, workers, task, check)
