"""Pictures and branches of guidance on workers of a Ray, without ComfyUI. The workers compute on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray_nodes
import tiny_checkpoint
import torch
from cluster_runs import LONG, PICTURES, STEPS, files_in, finish, make_run, no_file
from conftest import replica_for
from engine.cluster import crew
from engine.cluster import pool as pools
from engine.cluster.branches import on_branches
from engine.cluster.link import Link
from engine.cluster.pool import Pool
from engine.cluster.remote import Picture
from engine.cluster.task import Task
from engine.errors import NonFiniteError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.models.transformer import Transformer
from engine.sampling.resume import RunState
from engine.sampling.sampling import SamplingRun, sample
from prompts import once_at
from ray_nodes import wait_for


@pytest.fixture(scope="module")
def run(tiny: Checkpoint) -> SamplingRun:
    return make_run(tiny)


@pytest.fixture(scope="module")
def transformer(tiny: Checkpoint) -> Transformer:
    return loading.load(replica_for(tiny, "transformer", "int8"))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A Ray of this machine with two workers."""
    with ray_nodes.ray_variables(FIRERED_WORKER_TIMEOUT="5"):
        started = Pool(Link(""), 2)
    yield started
    started.close()


def kill(pool: Pool, signal_number: int = signal.SIGKILL) -> None:
    """Send a signal to the worker that has the first picture."""
    worker = next(each for each in pool.workers if each.call is not None)
    os.kill(worker.about["pid"], signal_number)


def test_pictures_are_bit_for_bit_those_of_one_machine(
    pool: Pool, run: SamplingRun, transformer: Transformer
) -> None:
    pictures = pool.submit(Task(run, "stop"), no_file)
    told: list[tuple[str, int, int]] = []
    latents = pool.wait(pictures, STEPS, lambda what, done, total, _: told.append((what, done, total)))
    assert torch.equal(latents, sample(transformer, run))
    assert len({picture.result["worker"] for picture in pictures}) == 2
    assert told[-1] == ("", STEPS * PICTURES, STEPS * PICTURES)
    assert "Ray" in told[0][0]


def test_nothing_listens_beyond_loopback(pool: Pool) -> None:
    bridge = pool.link._process.pid
    pids = [bridge, *(process.pid for process in ray_nodes.family(bridge))]
    assert len(pids) > 4
    assert ray_nodes.listening(pids) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_answers_that_come_late_belong_to_their_picture(
    pool: Pool, tiny: Checkpoint, transformer: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(pools, "STATE_SECONDS", 0.0)
    kept: dict[str, list[int]] = {}
    keep = Pool._keep

    def noted(self: Pool, picture: Picture, state: RunState, arithmetic: str, now: bool = False) -> None:
        assert now or not state.finished, "a finished picture's state"
        if not now:
            steps = kept.setdefault(picture.name, [])
            assert not steps or state.step >= steps[-1]
            steps.append(state.step)
        keep(self, picture, state, arithmetic, now)

    monkeypatch.setattr(Pool, "_keep", noted)
    run = make_run(tiny, 12, 6)
    assert torch.equal(finish(pool, run, files_in(tmp_path)), sample(transformer, run))
    assert kept


def test_an_answer_of_the_head_that_nobody_needed_is_not_taken_for_silence(
    pool: Pool, run: SamplingRun, transformer: Transformer
) -> None:
    answered: Future[list[object]] = Future()
    answered.set_result([])
    pool._crew._nodes, pool._crew._asked = answered, time.monotonic() - 100
    assert torch.equal(finish(pool, run), sample(transformer, run))
    assert pool.alive


def test_workers_that_died_idle_do_not_count_against_a_picture(
    pool: Pool, run: SamplingRun, transformer: Transformer
) -> None:
    for worker in pool.workers:
        os.kill(worker.about["pid"], signal.SIGKILL)
    time.sleep(0.5)
    pictures = pool.submit(Task(run, "stop"), no_file)
    latents = pool.wait(pictures, STEPS, lambda *told: None)
    assert torch.equal(latents, sample(transformer, run))
    assert not any(picture.losses for picture in pictures)


def test_an_error_of_the_guard_names_the_machine(pool: Pool, tmp_path: Path) -> None:
    folder = tiny_checkpoint.build(tmp_path / "overflowing", overflow_block=1)
    run = make_run(open_checkpoint(folder), 1, precision="fp16")
    with pytest.raises(NonFiniteError, match=rf"Step 1 of 3.*on {socket.gethostname()} cpu \d.*img_mlp"):
        finish(pool, run)


def test_branches_differ_by_no_more_than_rounding(
    pool: Pool, run: SamplingRun, transformer: Transformer
) -> None:
    single = replace(run, draws=run.draws[:1])
    with on_branches(pool, Task(single, "stop"), lambda what: None) as branches:
        assert len(branches.used) == 2
        shared = sample(branches, single)
    alone = sample(transformer, single)
    assert (shared - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_a_killed_worker_costs_its_picture_a_few_steps(
    pool: Pool, tiny: Checkpoint, transformer: Transformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, saver = make_run(tiny, 2, LONG), files_in(tmp_path)
    latents = finish(pool, run, saver, once_at(LONG // 3, lambda: kill(pool)))
    assert torch.equal(latents, sample(transformer, run))
    assert "is lost" in caplog.text


def test_a_worker_killed_in_a_step_costs_that_step(
    pool: Pool, tiny: Checkpoint, transformer: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tiny, 1, LONG)
    with on_branches(pool, Task(run, "stop"), lambda what: None) as branches:
        pid = pool.workers[0].about["pid"]
        soon = threading.Timer(0.005, os.kill, (pid, signal.SIGKILL))  # which is inside of a step
        act = once_at(LONG // 3, soon.start)
        shared = sample(branches, run, lambda done, total, denoised: act(done))
        assert len(branches.used) == 1
    assert (shared - sample(transformer, run)).abs().max() <= 1e-5
    assert "goes on with" in caplog.text


def test_a_hung_worker_is_replaced_after_the_timeout(
    pool: Pool, tiny: Checkpoint, transformer: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tiny, 2, LONG)
    stopped: list[int] = []

    def stop() -> None:
        worker = next(each for each in pool.workers if each.call is not None)
        stopped.append(worker.about["pid"])
        os.kill(stopped[0], signal.SIGSTOP)

    assert torch.equal(finish(pool, run, act=once_at(LONG // 3, stop)), sample(transformer, run))
    assert "has not answered for 5 s" in caplog.text
    wait_for(lambda: not psutil.pid_exists(stopped[0]))


def test_a_cancelled_batch_goes_on_where_it_was(
    pool: Pool, tiny: Checkpoint, transformer: Transformer, tmp_path: Path
) -> None:
    run, saver = make_run(tiny, 2, LONG), files_in(tmp_path)
    begun = pool.submit(Task(run, "stop"), saver)

    def cancel(what: str, done: int, *others: object) -> None:
        if done >= LONG // 3 and all(picture.step for picture in begun):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.wait(begun, LONG, cancel)
    wait_for(lambda: all(worker.is_free for worker in pool.workers))
    pictures = pool.submit(Task(run, "stop"), saver)
    assert all(picture.step or picture.is_done for picture in pictures), "both pictures' states were saved"
    latents = pool.wait(pictures, LONG, lambda *told: None)
    firsts = [picture.result.get("first_step", LONG) for picture in pictures]
    assert min(firsts) > 1 and max(firsts) >= LONG // 8
    assert torch.equal(latents, sample(transformer, run))


def test_a_worker_whose_machine_is_out_of_reach_is_given_up_before_the_timeout(
    pool: Pool,
    tiny: Checkpoint,
    transformer: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last test of the file: nothing is started on that machine for a minute."""
    finish(pool, make_run(tiny, 2))
    wait_for(lambda: len(pool.workers) == 2)
    tried: list[object] = []
    monkeypatch.setattr(crew, "reaches", lambda *address: tried.append(address))
    monkeypatch.setattr(pools, "SILENT_SECONDS", 1.0)
    run = make_run(tiny, 2, LONG)
    stop = once_at(LONG // 3, lambda: kill(pool, signal.SIGSTOP))
    assert torch.equal(finish(pool, run, act=stop), sample(transformer, run))
    assert "its machine cannot be reached" in caplog.text and len(tried) == 1
