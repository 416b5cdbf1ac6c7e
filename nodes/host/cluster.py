"""A Ray cluster as ComfyUI uses it: one pool of workers for all prompts."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..engine.cards.card import Card
from ..engine.cards.kernels import card_uuid
from ..engine.cluster.link import Link, cluster_address, require_ray
from ..engine.errors import FireRedError, InputError
from ..engine.sampling.layout import AUTO, CFG, MODE, PICTURES
from .ahead import LookAhead
from .devices import accelerators, free_memory
from .progress import check_cancelled, sampling_reporter, show_text
from .server import prompt_server
from .storage import disk_cache, saved_run

if TYPE_CHECKING:
    from ..engine.cluster.pool import Picture, Pool
    from ..engine.cluster.task import Task
    from ..engine.planning.plan import Plan
    from ..engine.sampling.record import RunRecord
    from ..engine.sampling.resume import SavedRun
    from ..engine.sampling.sampling import SamplingRun

log = logging.getLogger("FireRed")

LABEL = re.compile(r"ray(?::(?P<count>\d+))?")
RELEASE_SECONDS = 10.0  # that a worker may take to leave its card
SHARES = {PICTURES: "a picture a worker", CFG: "a branch a worker"}


@dataclass(frozen=True)
class ClusterUse:
    """How a transformer uses a cluster. count: of cards; None for all. mode: PICTURES or CFG."""

    count: int | None
    mode: str

    @property
    def card(self) -> Card:
        """The cluster as one device. The sampler's own arithmetic is the CPU's."""
        cpu = torch.device("cpu")
        return Card("Ray", SHARES[self.mode], cpu, native_bf16=False, memory=0, is_gpu=False)


def cluster_use(labels: Sequence[str] | None, mode: str) -> ClusterUse | None:
    """What devices and mode of FireRed Parallel ask for; None where they name no cluster.

    Loads nothing and asks nobody. Raises InputError, and FireRedError where Ray is not installed.
    """
    found = [match for label in labels or () if (match := LABEL.fullmatch(label))]
    if not found:
        if MODE.require(mode) == PICTURES:
            raise InputError("Mode pictures is for a cluster: set devices to ray, or choose another mode.")
        return None
    if len(labels or ()) > 1:
        raise InputError("devices names ray and other cards. Name ray alone, or cards of this machine.")
    count = found[0]["count"]
    if count is not None and not 0 < int(count) < 10_000:
        raise InputError(f"devices is ray:{count}; write ray, or ray:N for N cards.")
    if mode not in (AUTO, PICTURES, CFG):
        raise InputError(
            f"Mode {mode} does not work over a cluster: what its cards exchange in every block is too much "
            "for a network. Choose pictures or cfg."
        )
    require_ray()
    cluster_address()
    return ClusterUse(None if count is None else int(count), PICTURES if mode == AUTO else mode)


def sample_on_cluster(
    use: ClusterUse,
    run: SamplingRun,
    saved: SavedRun | None,
    guard: str,
    record: RunRecord,
    queued: Callable[[Mapping[str, Any]], SamplingRun],
) -> torch.Tensor:
    """The run's raw latents (B, 16, 1, h, w), computed on the cluster. The run's card is the use's.

    saved: the run's file, if it is to be resumed. queued: the run of a queued prompt, see ahead.py. Raises
    ClusterError, and as `sample` does.
    """
    from ..engine.cluster.task import Task

    pool, task = _connected_pool(), Task(run, guard)
    pool.want(use.count)
    if use.mode == CFG:
        return _sample_branches(pool, task, saved, record)
    pictures = pool.submit(task, saved_run if saved is not None else lambda name: None)
    look = None
    if saved is not None:  # what is sampled ahead has to stay on disk until its prompt comes
        look = LookAhead(pool, lambda inputs: Task(queued(inputs), inputs.get("guard", guard))).look
    record.start(())
    latents = pool.wait(pictures, run.schedule.steps, _reporter(record, look))
    return _finished(pictures, latents, saved, record)


def _finished(
    pictures: Sequence[Picture], latents: torch.Tensor, saved: SavedRun | None, record: RunRecord
) -> torch.Tensor:
    """The latents of a run whose pictures are all done, which are saved as one from now on."""
    from ..engine.sampling.resume import finished_state

    record.add_workers([each.result for each in pictures if each.result])
    if saved is not None and len(pictures) > 1:
        saved.arithmetic = ""  # what is finished goes on anywhere
        saved.update(finished_state(latents), now=True)
        for picture in pictures:
            if picture.saved is not None:
                picture.saved.forget()
    return latents


def _sample_branches(pool: Pool, task: Task, saved: SavedRun | None, record: RunRecord) -> torch.Tensor:
    from ..engine.cluster.branches import on_branches
    from ..engine.sampling.sampling import sample

    report = sampling_reporter(torch.device("cpu"))
    with on_branches(pool, task, _checker()) as branches:
        latents = sample(branches, task.run, report, saved=saved, guard=task.guard, record=record)
        record.workers = branches.used
    return latents


def _reporter(
    record: RunRecord, look: Callable[[], None] | None
) -> Callable[[str, int, int, torch.Tensor | None], None]:
    """What Pool.wait tells, for the node. It is told often, so only news is passed on.

    look: called as often, for the queue.
    """
    report: Callable[[int, int, torch.Tensor | None], None] | None = None
    check, last = _checker(), -1

    def tell(what: str, done: int, total: int, denoised: torch.Tensor | None) -> None:
        nonlocal last, report
        check(what)
        if look is not None:
            look()
        if last < 0:
            record.first_step = done
        for _ in range(done - max(last, record.first_step)):
            record.step()
        if not what and (done != last or denoised is not None):
            report = report or sampling_reporter(torch.device("cpu"))  # its clock starts now
            report(done, total, denoised)
        last = done

    return tell


def _checker() -> Callable[[str], None]:
    """Called with what is being done: writes it on the node, and raises when the user cancelled."""
    last = ""

    def check(what: str) -> None:
        nonlocal last
        check_cancelled()
        if what and what != last:
            show_text(what)
        last = what

    return check


def cluster_line(plan: Plan) -> str:
    """What the cluster that the environment names would do, in a line; empty where it names none.

    Starts no worker. Never raises.
    """
    try:
        address = cluster_address()
        if not address:
            return ""
        require_ray()
        machines = _connected_pool().machines(check_cancelled)
    except FireRedError as error:
        return str(error)
    cards = sum(machine.cards for machine in machines)
    where = f"the Ray cluster at {address} has {len(machines)} machine{'s' * (len(machines) > 1)}"
    if not cards:
        return f"{where} without cards: with FireRed Parallel and devices ray, their CPUs sample"
    listed = ", ".join(f"{each}" for each in machines if each.cards)
    free, whole = sum(machine.free for machine in machines), plan.step_seconds
    line = f"{where} and {cards} cards, {free} of them free ({listed}). With FireRed Parallel and devices ray"
    line += f", {cards} pictures are sampled at a time"
    if whole is not None and plan.sharing is None:
        rate = cards * 3600 / (whole * plan.edit.steps)
        line += f", about {rate:.3g} an hour if each card is as fast as the one here"
    return f"{line}; with mode cfg, two cards sample one picture in about half the time"


_pool: Pool | None = None


def _connected_pool() -> Pool:
    """The pool of the cluster that the environment names. Its workers stay for the next prompt."""
    from ..engine.cluster.pool import Pool

    global _pool
    address = cluster_address()
    if _pool is not None and (not _pool.alive or _pool.link.address != address):
        _pool.close()
        _pool = None
    if _pool is None:
        link = Link(address)
        log.info("connecting to %s", link.where)
        _pool = Pool(link, None, _claim, disk_cache())
    return _pool


def _claim(uuid: str, nbytes: float) -> float:
    """Unload models of ComfyUI until a card has that many bytes free. Returns how many it has."""
    import comfy.model_management as mm

    device = next((each for each in accelerators() if card_uuid(each) == uuid), None)
    if device is None:
        return 0.0
    mm.free_memory(nbytes, device)
    mm.soft_empty_cache()
    return float(free_memory(device))


def release_card(device: torch.device, is_enough: Callable[[], bool]) -> None:
    """End the worker that holds a card of this machine, unless this prompt waits for it.

    is_enough: whether there is room on the card then. The driver takes a moment.
    """
    uuid = card_uuid(device)
    if uuid is None or _pool is None or not _pool.alive or not _pool.release_card(uuid):
        return
    log.info("the worker of the cluster on %s ends, to make room for this prompt", device)
    deadline = time.monotonic() + RELEASE_SECONDS
    while not is_enough() and time.monotonic() < deadline:
        check_cancelled()
        time.sleep(RELEASE_SECONDS / 100)


def release_workers() -> None:
    """End the workers that compute nothing."""
    if _pool is not None and _pool.alive:
        _pool.release()


def watch_free_requests() -> None:
    """Let the workers go where ComfyUI is asked to unload its models (POST /free)."""
    from aiohttp import web

    async def on_response(request: web.Request, response: web.StreamResponse) -> None:
        if request.method == "POST" and request.path.removeprefix("/api") == "/free":
            try:
                asked: Any = await request.json()
            except ValueError:
                return
            if isinstance(asked, dict) and (asked.get("unload_models") or asked.get("free_memory")):
                await asyncio.get_running_loop().run_in_executor(None, release_workers)

    if (server := prompt_server()) is not None:
        server.app.on_response_prepare.append(on_response)


def on_card(run: SamplingRun, use: ClusterUse) -> SamplingRun:
    """The run with the cluster as its device."""
    return replace(run, replica=replace(run.replica, card=use.card))
