"""Throughput of a Ray's workers: measured on this machine's cards or CPU, and simulated beyond.

    python tests/benchmarks/cluster.py measure CHECKPOINT [PRECISION [MATH]] [--workers 1 2] [--pictures 12]
    python tests/benchmarks/cluster.py simulate [--step 1.5] [--cards 8 64 512]

measure: pictures in one process, then on workers; one picture with a branch of guidance a worker. Times are
of a second run, in which the workers hold the weights. simulate: the real pool against workers that only
wait, for as long as steps take, over a network of one link to ComfyUI's machine.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_checkpoint
import torch
from engine.arithmetic import library_version
from engine.cards.card import Card
from engine.cluster import frames, link
from engine.cluster.branches import on_branches
from engine.cluster.pool import Pool
from engine.cluster.task import Task
from engine.cluster.wire import packed, unpacked
from engine.cluster.worker import LIBRARIES
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.sampling.conditioning import Condition
from engine.sampling.sampling import SamplingRun, prepare_run, sample
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import ROLE_PRECISIONS, resolve

TEXT_TOKENS = 250  # of a sentence with one picture
GIGABIT = 125e6  # bytes a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("precision", nargs="?", default="int8")
    measuring.add_argument("math", nargs="?", default="fp32")
    measuring.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    measuring.add_argument("--pictures", type=int, default=12)
    measuring.add_argument("--steps", type=int, default=4)
    measuring.add_argument("--size", type=int, default=1024)
    simulating = commands.add_parser("simulate")
    simulating.add_argument("--step", type=float, default=1.5, help="seconds of a step")
    simulating.add_argument("--steps", type=int, default=40)
    simulating.add_argument("--each", type=int, default=4, help="pictures a card")
    simulating.add_argument("--cards", type=int, nargs="+", default=[8, 64, 512])
    simulating.add_argument("--scale", type=float, default=4.0, help="times faster than life")
    args = parser.parse_args()
    (measure if args.command == "measure" else simulate)(args)


def measure(args: argparse.Namespace) -> None:
    run = make_run(open_checkpoint(args.checkpoint), args)
    device = run.replica.device
    print(f"{run.replica}, {args.pictures} pictures of {args.size}x{args.size}, {args.steps} steps, cfg 4")
    alone, expected = in_this_process(run)
    row("pictures", "one process", alone, alone, args.pictures)
    one = None
    for count in args.workers:
        pool = Pool(link.Link(""), count)
        started = time.monotonic()
        finish(pool, replace(run, draws=run.draws[:count]))
        print(f"{count} workers started and loaded in {time.monotonic() - started:.1f} s")
        crossed = Crossed()
        started = time.monotonic()
        latents = finish(pool, run)
        seconds = time.monotonic() - started
        one = one or seconds
        row("pictures", f"{count} workers", seconds, one, args.pictures)
        print(f"  same bits as one process: {torch.equal(latents, expected)}, {crossed}")
        print(
            f"  overhead a picture, of one process: {count * (seconds - alone / count) / args.pictures:.3f} s"
        )
        branches(pool, replace(run, draws=run.draws[:1]), expected[:1])
        if count > 1:
            started = time.monotonic()
            same = torch.equal(with_a_killed_worker(pool, run), expected)
            print(f"  a worker killed in the middle: {time.monotonic() - started:.2f} s, same bits: {same}")
        pool.close()
        time.sleep(3)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))


def branches(pool: Pool, run: SamplingRun, expected: torch.Tensor) -> None:
    """One picture, a branch of guidance a worker."""
    with on_branches(pool, Task(run, "stop"), lambda what: None) as shared:
        sample(shared, replace(run, seed=1))  # prepared, and kernels chosen
        ends: list[float] = []
        latents = sample(shared, run, lambda done, total, denoised: ends.append(time.monotonic()))
        each = (ends[-1] - ends[0]) / max(len(ends) - 1, 1)
        difference = (latents - expected).abs().max() / expected.abs().max()
        print(f"  cfg on {len(shared.used)}: {each:.3f} s a step, difference {difference:.1e}")


def with_a_killed_worker(pool: Pool, run: SamplingRun) -> torch.Tensor:
    """The pictures, where a worker gets signal 9 after a third of the steps."""
    pictures, killed = pool.submit(Task(run, "stop"), lambda name: None), False

    def act(what: str, done: int, total: int, denoised: torch.Tensor | None) -> None:
        nonlocal killed
        if not killed and done > total / 3:
            killed = True
            os.kill(next(each for each in pool.workers if each.call is not None).about["pid"], signal.SIGKILL)

    return pool.wait(pictures, run.schedule.steps, act)


def in_this_process(run: SamplingRun) -> tuple[float, torch.Tensor]:
    transformer = loading.load(run.replica)
    sample(transformer, replace(run, draws=run.draws[:1]))
    ends: list[float] = []
    started = time.monotonic()
    latents = sample(transformer, run, lambda done, total, denoised: ends.append(time.monotonic()))
    seconds = time.monotonic() - started
    print(f"  one process: {(ends[-1] - ends[0]) / (len(ends) - 1):.3f} s a step")
    return seconds, latents


def finish(pool: Pool, run: SamplingRun) -> torch.Tensor:
    pictures = pool.submit(Task(run, "stop"), lambda name: None)
    latents = pool.wait(pictures, run.schedule.steps, lambda *told: None)
    if peak := max(picture.result["peak"] for picture in pictures):
        print(f"  peak memory of a card: {peak / 2**30:.2f} GiB")
    return latents


def row(what: str, how: str, seconds: float, of: float, pictures: int) -> None:
    rate = pictures * 3600 / seconds
    print(
        f"{what:10} {how:14} {seconds:8.2f} s  {seconds / of:6.3f}  {rate:8.1f} pictures an hour", flush=True
    )


class Crossed:
    """Counts the bytes of messages from now on."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        write, exactly = frames.write_frame, frames._exactly

        def counted_write(stream: Any, message: Any) -> None:
            self.sent += sum(len(part) for part in _blobs(message))
            write(stream, message)

        def counted_read(stream: Any, length: int) -> bytes:
            self.received += length
            return exactly(stream, length)

        link.write_frame, frames._exactly = counted_write, counted_read

    def __str__(self) -> str:
        return f"{self.sent / 1e6:.1f} MB sent, {self.received / 1e6:.1f} MB received"


def _blobs(part: Any) -> list[bytes]:
    if isinstance(part, bytes):
        return [part]
    if isinstance(part, dict):
        part = list(part.values())
    return [blob for each in part for blob in _blobs(each)] if isinstance(part, list | tuple) else []


def make_run(checkpoint: Checkpoint, args: argparse.Namespace) -> SamplingRun:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else "cpu"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 2**36
    card = Card("gpu:0" if gpu else "cpu", name, device, gpu, memory, is_gpu=gpu)
    precision = resolve(ROLE_PRECISIONS["transformer"][args.precision], card, args.math)
    replica = Replica(ComponentSpec.of("transformer", checkpoint, precision), card)
    width = checkpoint.component("transformer").config()["joint_attention_dim"]
    side = args.size // 8
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, 16, 1, side, side, generator=generator)
    conditions = {
        branch: Condition(torch.randn(1, TEXT_TOKENS, width, generator=generator), None, (reference,))
        for branch in ("positive", "negative")
    }
    return prepare_run(
        replica, conditions, steps=args.steps, true_cfg_scale=4.0, width=0, height=0, seed=1,
        samples=torch.zeros(args.pictures, 16, 1, side, side),
    )  # fmt: skip


# Simulation


def simulate(args: argparse.Namespace) -> None:
    print(f"{args.steps} steps of {args.step} s, {args.each} pictures a card, results over 1 Gbit/s")
    for cards in args.cards:
        network = Network(cards, args.steps, args.step, args.scale)
        pool = Pool(network, None)  # type: ignore[arg-type]
        run = simulated_run(cards * args.each, args.steps)
        finish(pool, replace(run, draws=run.draws[:1]))
        busy = time.process_time()
        started = time.monotonic()
        finish(pool, replace(run, seed=2))
        seconds = (time.monotonic() - started) * args.scale
        ideal = args.each * args.step * args.steps
        busy = (time.process_time() - busy) / seconds
        rate = cards * args.each * 3600 / seconds
        print(
            f"{cards:4} cards: {rate:8.0f} pictures an hour, {ideal / seconds:.3f} of ideal; "
            f"ComfyUI's process {busy:.2f} of a core; {network.received / seconds / 1e6:.1f} MB/s",
            flush=True,
        )
        pool.close()


class Network:
    """Stands for Link: workers that wait instead of computing. Time runs `scale` times as fast."""

    address = where = "simulated"
    alive, timeout = True, 60.0

    def __init__(self, cards: int, steps: int, step: float, scale: float):
        self._cards, self._steps, self._scale = cards, steps, scale
        self._seconds = steps * step / scale
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._changed, self._number = threading.Condition(), 0
        self._free_at = 0.0  # when the network link has sent everything
        self.received = 0
        self._started: dict[int, float] = {}
        self._turns: dict[int, int] = {}
        self._taken: Counter[str] = Counter()
        threading.Thread(target=self._run, daemon=True).start()

    def connect(self) -> Future[str]:
        return self._after(0.0, "here")

    def ask(self, request: str, **arguments: Any) -> Future[Any]:
        if request == "nodes":
            nodes = [
                {"id": f"n{number}", "machine": f"n{number}", "address": ["", 0], "cards": 8, "kinds": [],
                 "free": 8 - self._taken[f"n{number}"]}
                for number in range(self._cards // 8)
            ]  # fmt: skip
            return self._after(0.001, nodes)
        if request == "start":
            self._taken[arguments["node"]] += 1
        if request != "call":
            return self._after(0.0, None)
        method, worker = arguments["method"], arguments["worker"]
        if method == "describe":
            about = {"label": f"card {worker}", "name": "simulated", "free": 2**36, "uuid": None,
                     "versions": {name: library_version(name) for name in LIBRARIES}}  # fmt: skip
            return self._after(0.01, packed({"result": about}))
        if method == "sample":
            self._started[worker] = time.monotonic()
            self._turns[worker] = unpacked(arguments["content"])["turn"]
            latents = torch.zeros(1, 16, 1, 128, 128)
            result = {"latents": latents, "arithmetic": "", "first_step": 0, "skipped": 0, "peak": 0}
            return self._after(self._seconds, packed({"result": result}))
        asked = unpacked(arguments["content"])
        part = min((time.monotonic() - self._started.get(worker, 0.0)) / self._seconds, 1.0)
        state = {"step": 1, "latents": torch.zeros(1, 4096, 64), "finished": [], "step_cache": {}}
        doing = {
            "turn": self._turns.get(worker, 0),
            "what": "",
            "done": 0,
            "total": 0,
            "beats": int(part * 1e4),
            "step": int(part * self._steps),
            "arithmetic": "simulated",
            "log": [],
            "state": state if asked.get("state") else None,
            "denoised": torch.zeros(1, 16, 1, 128, 128) if asked.get("picture") else None,
        }
        return self._after(0.001, packed({"result": doing}))

    def close(self) -> None:
        """Nothing has to end."""

    def kill(self) -> None:
        """Nothing has to end."""

    def _after(self, seconds: float, result: Any) -> Future[Any]:
        """The result after that time and, for bytes, after those that the network has to move before."""
        future: Future[Any] = Future()
        size = len(result) if isinstance(result, bytes) else 0
        with self._changed:
            self.received += size
            self._number += 1
            due = time.monotonic() + seconds
            heapq.heappush(
                self._events, (due, self._number, size, functools.partial(future.set_result, result))
            )
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._events or self._events[0][0] > time.monotonic():
                    wait = self._events[0][0] - time.monotonic() if self._events else None
                    self._changed.wait(wait)
                _, _, size, act = heapq.heappop(self._events)
            if size:
                self._free_at = max(self._free_at, time.monotonic()) + size / GIGABIT / self._scale
                time.sleep(max(self._free_at - time.monotonic(), 0.0))
            act()


def simulated_run(pictures: int, steps: int) -> SamplingRun:
    folder = tiny_checkpoint.build(Path(tempfile.mkdtemp()) / "tiny")
    args = argparse.Namespace(precision="int8", math="fp32", size=1024, steps=steps, pictures=pictures)
    return make_run(open_checkpoint(folder), args)


if __name__ == "__main__":
    main()
