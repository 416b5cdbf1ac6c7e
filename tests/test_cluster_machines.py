"""A Ray cluster of two nodes, which are processes of this machine, and all that can be wrong with it."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from cluster_runs import LONG, STEPS, finish, make_run, no_file
from engine.cluster import crew
from engine.cluster.link import ClusterError, Link, reaches
from engine.cluster.pool import Pool
from engine.cluster.task import Task
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.models.transformer import Transformer
from engine.sampling.sampling import sample
from prompts import once_at
from ray_nodes import TOKEN, Node, family, ray_variables, wait_for

from launcher.server import free_port

ASK_FOR_CARDS = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False)
many = ray.remote(num_gpus=100)(lambda: None).remote()
print("asked", flush=True)
sys.stdin.readline()
print(ray.get(ray.remote(num_gpus=1)(lambda: "got the card").remote(), timeout=60))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: the paths of sockets must be short."""
    path = Path(tempfile.mkdtemp(prefix="fr"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def variables() -> Iterator[None]:
    with ray_variables(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, FIRERED_WORKER_TIMEOUT="5"):
        yield


@pytest.fixture(scope="module")
def head(folder: Path, variables: None) -> Iterator[Node]:
    node = Node(folder)
    yield node
    node.kill()


@pytest.fixture
def second(folder: Path, head: Node) -> Iterator[Node]:
    node = Node(folder, head.address)
    yield node
    node.kill()


@pytest.fixture
def connected(head: Node) -> Iterator[Pool]:
    pool = Pool(Link(head.address), None)
    yield pool
    pool.close()
    pool.link._process.wait(30)


@pytest.fixture(scope="module")
def transformer(tiny: Checkpoint) -> Transformer:
    return loading.load(make_run(tiny).replica)


def test_a_checkpoint_that_a_machine_lacks_is_named(
    connected: Pool, tiny: Checkpoint, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny.folder, tmp_path / "here")
    run = make_run(Checkpoint(moved))
    pictures = connected.submit(Task(run, "stop"), no_file)
    shutil.move(moved, tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match=r"There is no here.*FIRERED_MODELS"):
        connected.wait(pictures, STEPS, lambda *told: None)


def test_two_machines_sample_and_one_of_them_is_lost(
    second: Node, connected: Pool, tiny: Checkpoint, transformer: Transformer
) -> None:
    finish(connected, make_run(tiny, 2))
    wait_for(lambda: len({worker.node for worker in connected.workers}) == 2)
    assert [machine.cards for machine in connected.machines(lambda: None)] == [0, 0]
    run = make_run(tiny, 4, LONG)
    latents = finish(connected, run, act=once_at(LONG, second.kill))
    assert torch.equal(latents, sample(transformer, run))
    assert len(connected.workers) == 1, "the other one was at work when it was lost"


def test_other_programs_of_the_cluster_get_a_card_that_is_not_used(
    folder: Path, head: Node, connected: Pool, tiny: Checkpoint
) -> None:
    node = Node(folder, head.address, cards=1)  # of which Ray is told; the worker finds none and computes
    try:
        finish(connected, make_run(tiny, 1))
        (worker,) = connected.workers
        assert worker.on_card
        other = subprocess.Popen(
            [sys.executable, "-c", ASK_FOR_CARDS, head.address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdout is not None and other.stdout.readline() == "asked\n"
        time.sleep(2)  # so that the cluster has noted it
        assert not connected.link.ask("others_wait").result(), "for more cards than any machine has"
        assert "got the card" in other.communicate("\n")[0]
        assert not connected.workers
    finally:
        node.kill()


def test_a_machine_with_other_libraries_is_named(
    folder: Path, head: Node, tiny: Checkpoint, tmp_path: Path
) -> None:
    other = tmp_path / "packages"
    (other / "diffusers-0.1.dist-info").mkdir(parents=True)
    (other / "diffusers-0.1.dist-info" / "METADATA").write_text("Name: diffusers\nVersion: 0.1\n")
    node = Node(folder, head.address, cards=1, PYTHONPATH=str(other))
    pool = Pool(Link(head.address), 1)
    try:
        with pytest.raises(ClusterError, match=r"diffusers 0\.1 \(here \d+.*Install the same"):
            finish(pool, make_run(tiny, 1))
    finally:
        node.kill()
        pool.close()


class _Other(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)


def test_an_address_with_another_program_is_said(
    variables: None, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "CONNECT_SECONDS", 5.0)
    address = f"127.0.0.1:{free_port()}"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(address.split(":")[1])), _Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    pool = Pool(Link(address), 1)
    with pytest.raises(ClusterError, match=f"the Ray cluster at {address} cannot be used"):
        finish(pool, make_run(tiny, 1))
    assert time.monotonic() - started < 45
    wait_for(lambda: not pool.link.alive)


def test_whether_a_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert reaches(*listening.getsockname())
    assert not reaches("127.0.0.1", free_port())


def test_an_address_where_nothing_listens_is_said_at_once(variables: None) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="Nothing answers at RAY_ADDRESS=127"):
        Link(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 5


OWNER = """
import sys, time
from engine.cluster.link import Link
link = Link("")
link.connect().result()
print(link._folder, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    processes = family(owner.pid)
    assert folder.is_dir() and len(processes) > 4
    owner.kill()
    wait_for(lambda: not any(map(psutil.Process.is_running, processes)) and not folder.exists())


def test_a_folder_whose_owner_and_bridge_were_killed_is_deleted_by_the_next_start(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = Path(tempfile.gettempdir(), f"firered-ray-{dead.pid}-x")
    left.mkdir()
    link = Link("")
    assert not left.exists() and link._folder is not None and link._folder.exists()
    link.close()
    wait_for(lambda: not link.alive and not link._folder.exists())


def test_a_lost_head_is_said_within_seconds_and_ends_only_the_process_of_ray(
    head: Node, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the file: it ends the head that the others share."""
    monkeypatch.setattr(crew, "ANSWER_SECONDS", 5.0)
    pool = Pool(Link(head.address), 1)
    lost_at: list[float] = []

    def lose() -> None:
        head.kill()
        lost_at.append(time.monotonic())

    with pytest.raises(ClusterError) as raised:
        finish(pool, make_run(tiny, 2, 10 * LONG), act=once_at(LONG // 3, lose))
    assert time.monotonic() - lost_at[0] < 30
    assert head.address in str(raised.value) or "failed on" in str(raised.value)
    pool.close()
    wait_for(lambda: not pool.link.alive)
