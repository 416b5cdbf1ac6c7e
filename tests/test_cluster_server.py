"""FireRed Parallel with `ray` in a real ComfyUI: a Ray of this machine, whose workers compute on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SERVER_ARGUMENTS, make_work_folder
from prompts import (
    PARALLEL,
    SAMPLE,
    at_step,
    changed,
    edit_prompt,
    failure,
    keep_tensor,
    kept_tensor,
    loaded_components,
    succeed,
    through_parallel,
    with_node,
)
from ray_nodes import TOKEN, Node, family, ray_variables, wait_for
from warm_server import Server

from launcher.client import Client, Prompt, ServerError

BATCH = "31"
PICTURES, STEPS, LONG = 2, 3, 100


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return make_work_folder(tmp_path_factory.mktemp("cluster"), tiny_folder)


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[Server]:
    with Server(work, SERVER_ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.client


def batch(
    devices: str | None = "ray:2", mode: str = "auto", pictures: int = PICTURES, **sampler: object
) -> Prompt:
    """An edit of a batch of pictures, on a cluster unless devices is None."""
    graph = changed(edit_prompt(), "1", precision="int8", math="fp32")
    graph = with_node(graph, BATCH, "EmptyLatentImage", width=128, height=128, batch_size=pictures)
    graph = changed(graph, SAMPLE, latent=[BATCH, 0], **{"resume": "off", "steps": STEPS} | sampler)
    if devices is not None:
        graph = through_parallel(graph, devices=devices, mode=mode)
    return keep_tensor(graph, [SAMPLE, 0], "latent")


def sampled(client: Client, work: Path, graph: Prompt) -> torch.Tensor:
    succeed(client, graph)
    return kept_tensor(work, "latent")["samples"]


def workers(server: Server) -> list[psutil.Process]:
    """The processes that compute. Ray names them after the class that they run."""
    return [each for each in family(server.process.pid) if "ray::Actor" in " ".join(each.cmdline()[:1])]


def test_pictures_are_those_of_one_machine(server: Server, client: Client, work: Path) -> None:
    run = client.run(batch())
    assert run.status == "success", run.error
    assert run.progress(SAMPLE)[-1] == (STEPS * PICTURES, STEPS * PICTURES)
    assert any("Ray" in text for node, text in run.texts if node == SAMPLE)
    kept = kept_tensor(work, "latent")
    assert "on Ray (a picture a worker)" in kept["firered_report"]
    assert len(re.findall(r"cpu \d+: 1 picture", kept["firered_report"])) == 2, kept["firered_report"]
    assert not any(name.startswith("transformer") for name in loaded_components(client, work))
    assert torch.equal(kept["samples"], sampled(client, work, batch(None)))


def test_queued_prompts_that_differ_in_the_seed_go_to_free_workers(
    server: Server, client: Client, work: Path
) -> None:
    graphs = [
        keep_tensor(batch(pictures=1, steps=LONG, seed=seed, resume="on"), [SAMPLE, 0], f"seed{seed}")
        for seed in (1, 2)
    ]
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(client.run, graphs))
    assert [run.status for run in runs] == ["success", "success"]
    kept = [kept_tensor(work, f"seed{seed}") for seed in (1, 2)]
    names = {
        re.findall(r"cpu \d+", each["firered_report"])[-1] for each in kept if "cpu" in each["firered_report"]
    }
    ahead = sum("computed by an earlier prompt" in each["firered_report"] for each in kept)
    assert len(names) == 2 or ahead, [each["firered_report"] for each in kept]
    for seed, each in zip((1, 2), kept, strict=True):
        alone = sampled(client, work, batch(None, pictures=1, steps=LONG, seed=seed))
        assert torch.equal(each["samples"], alone)


def test_two_workers_share_an_edit(client: Client, work: Path) -> None:
    shared = sampled(client, work, batch(mode="cfg", pictures=1))
    assert "on Ray (a branch a worker)" in kept_tensor(work, "latent")["firered_report"]
    assert (shared - sampled(client, work, batch(None, pictures=1))).abs().max() <= 1e-6 * shared.abs().max()


def test_a_cancelled_batch_stops_at_once_and_goes_on(server: Server, client: Client, work: Path) -> None:
    graph, before = batch(steps=LONG, resume="on", seed=5), len(server.text())
    at = []

    def cancel() -> None:
        client.post("/interrupt")
        at.append(time.monotonic())

    assert client.run(graph, at_step(LONG // 2, cancel)).status == "interrupted"
    assert time.monotonic() - at[0] < 8
    latents = sampled(client, work, graph)
    assert "resuming picture 1 at step" in server.text()[before:]
    assert torch.equal(latents, sampled(client, work, batch(None, steps=LONG, seed=5)))


def test_a_killed_worker_does_not_end_the_prompt(server: Server, client: Client, work: Path) -> None:
    graph = batch(steps=LONG, seed=6)
    run = client.run(graph, at_step(LONG // 2, lambda: workers(server)[0].kill()))
    assert run.status == "success", run.error
    assert torch.equal(
        kept_tensor(work, "latent")["samples"], sampled(client, work, batch(None, steps=LONG, seed=6))
    )


@pytest.mark.parametrize(
    ("devices", "mode", "said"),
    [
        ("ray, gpu:0", "auto", "Name ray alone"),
        ("ray:0", "auto", "ray:N for N cards"),
        ("ray:x", "auto", "or ray for a cluster"),
        ("ray", "sequence", "Choose pictures or cfg"),
        ("auto", "pictures", "set devices to ray"),
    ],
)
def test_what_a_cluster_cannot_do_is_said(client: Client, devices: str, mode: str, said: str) -> None:
    assert said in failure(client, batch(devices, mode), PARALLEL)


def test_workers_go_when_comfyui_is_asked_for_its_memory(server: Server, client: Client) -> None:
    succeed(client, batch(seed=7))
    there = workers(server)
    assert len(there) == 2
    client.post("/free", json={"unload_models": True})
    wait_for(lambda: not any(map(psutil.Process.is_running, there)))


def test_a_killed_comfyui_leaves_nothing_and_its_batch_goes_on_in_a_cluster(
    server: Server, client: Client, work: Path
) -> None:
    """The last test of the file: it ends the server that the others share."""
    graph = batch(pictures=3, steps=LONG, resume="on", seed=8)
    saved = work / "models" / "firered_cache" / "runs"
    before = set(saved.glob("*.safetensors"))
    processes: list[psutil.Process] = []

    def kill() -> None:
        wait_for(lambda: set(saved.glob("*.safetensors")) > before)
        processes.extend(family(server.process.pid))
        os.kill(server.process.pid, signal.SIGKILL)

    with pytest.raises(ServerError):
        client.run(graph, at_step(STEPS, kill))
    assert len(processes) > 6
    wait_for(lambda: not any(map(psutil.Process.is_running, processes)))
    with a_cluster() as address, Server(work, SERVER_ARGUMENTS) as second:
        shared = sampled(second.client, work, graph)
        assert "resumed at step" in kept_tensor(work, "latent")["firered_report"]
        alone = sampled(second.client, work, batch(None, pictures=1, steps=LONG, seed=8))
        assert torch.equal(shared[:1], alone)
        plan = with_node({}, "1", "FireRedHardwarePlan", checkpoint="tiny")
        plan = with_node(plan, "2", "PreviewAny", source=["1", 1])
        shown = json.dumps(succeed(second.client, plan).outputs)
        assert f"the Ray cluster at {address} has 1 machine without cards" in shown


@contextmanager
def a_cluster() -> Iterator[str]:
    """The address of a cluster of one node, which programs find in the environment."""
    folder = Path(tempfile.mkdtemp(prefix="fr"))
    node = Node(folder)
    try:
        with ray_variables(RAY_ADDRESS=node.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN):
            yield node.address
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)
