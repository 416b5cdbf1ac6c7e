"""The process that Ray runs in: it passes ComfyUI's requests to workers, and their answers back.

Requests come through standard input and answers leave through standard output, as `frames` writes them. When
the input ends, because ComfyUI closed it or was killed, this process ends and takes along what it started.
It imports neither torch nor the engine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)  # some Pythons for Windows do not
from frames import read_frame, write_frame  # type: ignore[import-not-found] # noqa: E402

while HERE in sys.path:
    sys.path.remove(HERE)  # Ray would give it to the workers

LOOPBACK = "127.0.0.1"
STORE_BYTES = 512 * 2**20  # of a local Ray's shared memory
CONCURRENT_CALLS = 4  # of a worker: one computes, others ask how far it is
CLOSE_SECONDS = 5.0
KIND = "accelerator_type:"  # begins the name of a resource of Ray: a card's model


class Actor:
    """An EngineWorker in a Ray worker, or the reason why there is none. Ray sends this class by value."""

    def __init__(self, settings: dict[str, Any]):
        from importlib import import_module

        try:
            self.worker = import_module("engine.cluster.worker").EngineWorker(settings)
        except BaseException as error:
            self.worker, self.problem = None, f"{type(error).__name__}: {error}"

    def answer(self, method: str, content: bytes, task: bytes | None = None) -> tuple[bool, Any]:
        """Whether there is a worker, and its answer or the reason."""
        if self.worker is None:
            return False, self.problem
        return True, self.worker.answer(method, content, task)


class Bridge:
    """Does requests, one after the other. Calls of workers are only started here."""

    def __init__(self, replies: BinaryIO):
        self._replies, self._writing = replies, threading.Lock()
        self._actors: dict[int, Any] = {}
        self._tasks: dict[str, Any] = {}
        self._folder: Path | None = None

    def do(self, number: int, request: str, arguments: dict[str, Any]) -> None:
        """Answer a request now or later: (number, whether it succeeded, result or reason)."""
        try:
            if request == "call":
                self._call(number, **arguments)
                return
            result = getattr(self, request)(**arguments)
        except BaseException as error:
            self._reply(number, False, _reason(error))
        else:
            self._reply(number, True, result)

    def connect(self, engine: str, address: str, folder: str, token: str, variables: dict[str, str]) -> str:
        """Join the cluster at `address` or, without one, start a Ray on this machine's loopback alone.

        engine: the folder of the package that workers run. folder: where a local Ray keeps its files. token:
        a local Ray's secret. variables: of the workers' environment.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if not address:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
            self._folder = Path(folder)
        import ray
        from ray._private import ray_constants

        options: dict[str, Any] = {"address": address}
        if not address:
            ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray listens on all of the machine's addresses
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
                "_temp_dir": os.path.join(folder, "ray"),  # where Ray lets everybody write
            }
        ray.init(
            **options,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"py_modules": [engine], "env_vars": variables},
        )
        here = ray.util.get_node_ip_address()
        if not address and here != LOOPBACK:
            raise RuntimeError(f"Ray {ray.__version__} does not stay on {LOOPBACK}: it listens on {here}")
        return ray.get_runtime_context().get_node_id()

    def nodes(self) -> list[dict[str, Any]]:
        """The machines of the cluster that answer: names, addresses, how many cards each has and has free."""
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [
            {
                "id": node["NodeID"],
                "machine": node["NodeManagerHostname"],
                "address": [node["NodeManagerAddress"], node["NodeManagerPort"]],
                "cards": int(node["Resources"].get("GPU", 0)),
                "free": int(free.get(node["NodeID"], {}).get("GPU", 0)),
                "kinds": [name.removeprefix(KIND) for name in node["Resources"] if name.startswith(KIND)],
            }
            for node in ray.nodes()
            if node["Alive"]
        ]

    def start(self, worker: int, node: str, card: bool, settings: dict[str, Any]) -> None:
        """Start a worker on a machine, with one of its cards that no other program of the cluster has."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._actors[worker] = (
            ray.remote(Actor)
            .options(
                num_cpus=0,
                num_gpus=1 if card else 0,
                max_concurrency=CONCURRENT_CALLS,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(settings)
        )

    def share(self, key: str, content: bytes) -> None:
        """Keep a task for calls. It crosses to each machine once."""
        import ray

        self._tasks[key] = ray.put(content)

    def forget(self, key: str) -> None:
        self._tasks.pop(key, None)

    def stop(self, worker: int) -> None:
        """End a worker, also one that does not answer."""
        import ray

        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def others_wait(self) -> bool:
        """Whether other programs of the cluster wait for a card that a machine of it has."""
        import ray
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        machines = [node.total_resources() for node in (*status.active_nodes, *status.idle_nodes)]
        demands = status.resource_demands
        asked = [*demands.ray_task_actor_demand, *demands.placement_group_demand]
        bundles = (part.bundle for demand in asked for part in demand.bundles_by_count)
        return any("GPU" in bundle and any(_has(each, bundle) for each in machines) for bundle in bundles)

    def _call(self, number: int, worker: int, method: str, content: bytes, task: str | None = None) -> None:
        actor = self._actors[worker]
        shared = None if task is None else self._tasks[task]
        future = actor.answer.remote(method, content, shared).future()

        def told(done: Any) -> None:
            error = done.exception()
            if error is not None:
                self._reply(number, False, _reason(error))
            else:
                self._reply(number, *done.result())

        future.add_done_callback(told)

    def _reply(self, number: int, succeeded: bool, result: Any) -> None:
        with self._writing, contextlib.suppress(OSError):
            write_frame(self._replies, (number, succeeded, result))

    def close(self) -> None:
        """Leave the cluster. A Ray that was started here ends."""
        with contextlib.suppress(Exception):
            import ray

            ray.shutdown()

    def clean_up(self) -> None:
        """Delete a local Ray's files."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._folder is not None and self._folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)  # what still ends may still write


def _has(machine: dict[str, float], bundle: dict[str, float]) -> bool:
    """Whether a machine that computes nothing else has these resources."""
    return all(machine.get(name, 0) >= amount for name, amount in bundle.items())


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def main() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Ray prints must not get between the answers
    bridge, waiting = Bridge(replies), queue.Queue[Any]()

    def read() -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                waiting.put(read_frame(requests))
        # Also in the middle of a request that takes long. Ray's processes end with this one.
        closing = threading.Thread(target=bridge.close, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        bridge.clean_up()
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        bridge.do(*waiting.get())


if __name__ == "__main__":
    main()
