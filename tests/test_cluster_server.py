"""FireRed Parallel with `ray` in a real ComfyUI: a Ray of this machine, without accelerators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SERVER_ARGUMENTS, make_work_folder
from prompts import (
    SAMPLE,
    changed,
    edit_prompt,
    keep_tensor,
    kept_tensor,
    loaded_components,
    succeed,
    with_node,
)

from launcher.client import Client, Prompt
from launcher.server import Server

SHARED, BATCH = "30", "31"
PICTURES, STEPS = 3, 3


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


def batch(devices: str | None = "ray:2", mode: str = "auto", **sampler: object) -> Prompt:
    """An edit of a batch of pictures, on a cluster unless devices is None."""
    graph = changed(edit_prompt(), "1", precision="int8", math="fp32")
    graph = with_node(graph, BATCH, "EmptyLatentImage", width=64, height=64, batch_size=PICTURES)
    graph = changed(graph, SAMPLE, latent=[BATCH, 0], **{"resume": "off", "steps": STEPS} | sampler)
    if devices is not None:
        graph = with_node(graph, SHARED, "FireRedParallel", transformer=["1", 0], devices=devices, mode=mode)
        graph = changed(graph, SAMPLE, transformer=[SHARED, 0])
    return keep_tensor(graph, [SAMPLE, 0], "latent")


def sampled(client: Client, work: Path, graph: Prompt) -> torch.Tensor:
    succeed(client, graph)
    return kept_tensor(work, "latent")["samples"]


def test_pictures_are_those_of_one_machine(server: Server, client: Client, work: Path) -> None:
    shared = sampled(client, work, batch())
    assert "on Ray (a picture a worker)" in (report := kept_tensor(work, "latent")["firered_report"])
    assert len(re.findall(r"cpu \d: \d picture", report)) == 2, report
    assert not any(name.startswith("transformer") for name in loaded_components(client, work))
    alone = sampled(client, work, batch(None))
    assert shared.shape == alone.shape and torch.equal(shared, alone)


def test_x(server: Server) -> None:
    print(server.text())
