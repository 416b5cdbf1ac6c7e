"""Runs of prompts that wait in ComfyUI's queue, for the free workers of a cluster.

ComfyUI executes one prompt at a time. A queued prompt that differs from the one that runs only in numbers of
its sampler, such as the seed, needs nothing that is not there: its pictures can be sampled ahead. When its
turn comes, the sampler finds them by the run's name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from comfy_execution.utils import get_executing_context

from ..engine.cluster.link import ClusterError
from ..engine.errors import first_line
from .server import prompt_queue
from .storage import QUEUE_SECONDS, saved_run

if TYPE_CHECKING:
    from ..engine.cluster.pool import Picture, Pool
    from ..engine.cluster.task import Task

log = logging.getLogger("FireRed")

Prompt = Mapping[str, Mapping[str, Any]]
FEWEST_AHEAD = 4  # pictures sampled ahead, while the number of workers is not known
LOOK_SECONDS = 1.0  # between two looks into the queue


class LookAhead:
    """Gives a pool the pictures of queued prompts, in their order, about as many as it has workers.

    A thread cancels the pictures whose prompt leaves the queue.
    """

    def __init__(self, pool: Pool, task_of: Callable[[Mapping[str, Any]], Task]):
        """task_of: the run of a prompt, from the inputs of its sampler that are no links."""
        self._pool, self._task_of = pool, task_of
        self._ahead: dict[str, list[Picture]] = {}
        self._next = 0.0  # when to look, on the monotonic clock

    def look(self) -> None:
        """Look into the queue, not more than once in LOOK_SECONDS."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        room = max(len(self._pool.workers), FEWEST_AHEAD)
        new: dict[str, list[Picture]] = {}
        for prompt_id, inputs in queued_variants():
            unfinished = [each for pictures in self._ahead.values() for each in pictures if not each.is_done]
            if len(unfinished) >= room:
                break
            if prompt_id not in self._ahead:
                new[prompt_id] = self._ahead[prompt_id] = self._submit(inputs)
        if new:
            threading.Thread(
                target=_watch, args=(self._pool, new), name="FireRed: queue", daemon=True
            ).start()

    def _submit(self, inputs: Mapping[str, Any]) -> list[Picture]:
        try:
            return self._pool.submit(self._task_of(inputs), saved_run)
        except ClusterError:
            raise
        except Exception as error:  # that prompt's own node will say it
            log.info("a queued prompt is not sampled ahead: %s", first_line(error))
            return []


def queued_variants() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The queued prompts whose sampler gets the same over its links as the node that runs now.

    Each with that node's other inputs. What is sampled ahead lies on disk until its prompt comes, so prompts
    with resume off are left out.
    """
    queue, context = prompt_queue(), get_executing_context()
    if queue is None or context is None:
        return
    running, pending = queue.get_current_queue_volatile()
    here = next((item[2] for item in running if item[1] == context.prompt_id), None)
    for item in sorted(pending, key=lambda item: item[0]):
        there = item[2]
        if here is not None and _same_links(here, there, context.node_id):
            inputs = there[context.node_id]["inputs"]
            if inputs.get("resume", "on") == "on":
                yield item[1], {name: value for name, value in inputs.items() if not _is_link(value)}


def _same_links(here: Prompt, there: Prompt, node: str) -> bool:
    """Whether a node of both prompts gets the same over its links."""
    if node not in here or node not in there or here[node]["class_type"] != there[node]["class_type"]:
        return False
    links_here, links_there = (
        {name: value for name, value in prompt[node]["inputs"].items() if _is_link(value)}
        for prompt in (here, there)
    )
    return links_here == links_there and all(
        _same(here, there, str(source)) for source, _ in links_here.values()
    )


def _same(here: Prompt, there: Prompt, node: str) -> bool:
    """Whether a node of both prompts gives the same."""
    if not _same_links(here, there, node):
        return False
    return here[node]["inputs"] == there[node]["inputs"]


def _is_link(value: object) -> bool:
    return isinstance(value, list)


def _watch(pool: Pool, ahead: Mapping[str, list[Picture]]) -> None:
    """Cancel pictures whose prompt is no longer queued, until none is left to watch."""
    left = dict(ahead)
    while left and pool.alive:
        time.sleep(QUEUE_SECONDS * 5)
        queue = prompt_queue()
        running, pending = queue.get_current_queue_volatile() if queue is not None else ([], [])
        there = {item[1] for item in (*running, *pending)}
        for prompt_id, pictures in list(left.items()):
            if all(picture.is_done or picture.watched for picture in pictures):
                del left[prompt_id]
            elif prompt_id not in there:
                pool.cancel(pictures, watched=False)
                del left[prompt_id]
