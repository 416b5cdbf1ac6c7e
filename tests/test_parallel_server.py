"""FireRed Parallel in a real ComfyUI, on a machine whose cards are the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SERVER_ARGUMENTS, make_work_folder
from prompts import (
    DECODE,
    ENCODE,
    PARALLEL,
    SAMPLE,
    SAVE,
    changed,
    edit_prompt,
    failure,
    keep_tensor,
    kept_tensor,
    loaded_components,
    succeed,
    through_parallel,
    wait_until_empty,
    with_node,
)
from warm_server import Server

from launcher.client import Client, Prompt

Latents = Callable[[Prompt], torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return make_work_folder(tmp_path_factory.mktemp("four_cards"), tiny_folder)


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[Server]:
    with Server(work, SERVER_ARGUMENTS) as running:
        succeed(running.client, with_node({}, "1", "ProbeCards", count=4))
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.client


def prompt(device: str = "gpu:0", **shared: str) -> Prompt:
    """An edit whose transformer goes through FireRed Parallel, if its inputs are given."""
    graph = changed(edit_prompt(), "1", precision="int8", math="fp32", device=device)
    graph = changed(graph, SAMPLE, resume="off", steps=3)
    if shared:
        graph = through_parallel(graph, **shared)
    return keep_tensor(graph, [SAMPLE, 0], "latent")


@pytest.fixture(scope="module")
def latents(client: Client, work: Path) -> Latents:
    """What the sampler of a prompt gives."""

    def run(graph: Prompt) -> torch.Tensor:
        succeed(client, graph)
        return kept_tensor(work, "latent")["samples"]

    return run


@pytest.fixture(scope="module")
def expected(latents: Latents) -> torch.Tensor:
    """What one card gives."""
    return latents(prompt())


@pytest.mark.parametrize(
    ("shared", "told", "exact"),
    [
        (dict(devices="gpu:0, gpu:1", mode="cfg"), "cfg over gpu:0 and gpu:1", True),
        (dict(devices="gpu:1 gpu:0", mode="layers"), "layers over gpu:1 and gpu:0", True),
        (dict(devices="gpu:0,gpu:1,gpu:3", mode="sequence"), "sequence over gpu:0, gpu:1 and gpu:3", False),
        (dict(mode="cfg+sequence"), "cfg+sequence over gpu:0, gpu:1, gpu:2 and gpu:3", False),
        (dict(mode="cfg"), "cfg over gpu:0 and gpu:1", True),
        (dict(devices="gpu:2, gpu:9, gpu:0"), "cfg+sequence over gpu:2 and gpu:0", True),
    ],
)
def test_cards_share_an_edit(
    server: Server, latents: Latents, expected: torch.Tensor, shared: dict[str, str], told: str, exact: bool
) -> None:
    before = len(server.text())
    found = latents(prompt(**shared))
    assert f"the transformer is shared: {told}\n" in server.text()[before:]
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(found, expected) or not exact


def test_a_second_card_copies_from_the_first(
    server: Server, client: Client, work: Path, latents: Latents
) -> None:
    client.post("/free", json={"unload_models": True, "free_memory": True})
    wait_until_empty(client, work)
    before = len(server.text())
    latents(prompt(devices="gpu:0, gpu:1, gpu:2", mode="sequence"))
    said = server.text()[before:]
    assert said.count("copied from gpu:0 in") == 2
    assert said.count("transformer int8, fp32 math, on gpu:0 (cpu) loaded in") == 1


def test_without_the_node_auto_uses_the_cards_that_the_plan_found(
    server: Server, latents: Latents, expected: torch.Tensor
) -> None:
    before = len(server.text())
    found = latents(prompt(device="auto"))
    told = r"the transformer is shared: cfg\+sequence over gpu:\d, gpu:\d, gpu:\d and gpu:\d\n"
    assert re.search(told, server.text()[before:])
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_one_card_named_computes_alone(server: Server, latents: Latents, expected: torch.Tensor) -> None:
    for shared in (dict(devices="gpu:1"), dict(devices="gpu:1, gpu:7", mode="sequence")):
        before = len(server.text())
        assert torch.equal(latents(prompt(device="auto", **shared)), expected)
        assert "one card computes alone" in server.text()[before:]


def test_a_transformer_on_the_cpu_stays_there(server: Server, latents: Latents) -> None:
    before = len(server.text())
    assert torch.equal(latents(prompt(device="cpu", mode="auto")), latents(prompt(device="cpu")))
    assert "the transformer stays on cpu, as its loader says" in server.text()[before:]


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        (dict(devices="gpu:0, gpu:0"), "devices names gpu:0 twice. Name every card once."),
        (
            dict(devices="cuda:0"),
            "devices names 'cuda:0'. Write auto, cards such as gpu:0, gpu:1, or ray for a cluster.",
        ),
        (dict(devices="gpu:1", mode="cfg"), "Mode cfg takes several cards, and devices names one."),
        (dict(devices="gpu:0, gpu:1, gpu:2", mode="cfg"), "Mode cfg takes two cards"),
        (dict(devices="gpu:0, gpu:1, gpu:2", mode="cfg+sequence"), "an even number of cards, not 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(client: Client, shared: dict[str, str], told: str) -> None:
    assert told in failure(client, prompt(**shared), PARALLEL)


def test_cancelling_stops_all_cards_and_the_next_prompt_runs(
    client: Client, latents: Latents, expected: torch.Tensor
) -> None:
    graph = prompt(mode="cfg+sequence")
    slow = changed(graph, SAMPLE, steps=200, seed=3)

    def interrupt(name: str, data: dict) -> None:
        if name == "progress" and data["node"] == SAMPLE and data["value"] >= 2:
            client.post("/interrupt")

    assert client.run(slow, interrupt).status == "interrupted"
    assert float((latents(graph) - expected).norm() / expected.norm()) < 1e-5


def test_every_copy_is_comfyuis_to_unload(client: Client, work: Path, latents: Latents) -> None:
    latents(changed(prompt(mode="cfg+sequence"), SAMPLE, seed=5))
    loaded = [name for name in loaded_components(client, work) if name.startswith("transformer")]
    assert len(loaded) == len(set(loaded)) == 4
    client.post("/free", json={"unload_models": True, "free_memory": True})
    assert wait_until_empty(client, work) == {}


def test_numerics_looks_at_one_card(client: Client) -> None:
    graph = prompt(devices="gpu:0, gpu:1", mode="layers")
    graph = with_node(
        graph, "8", "FireRedNumerics", transformer=[PARALLEL, 0], positive=[ENCODE, 0], look_at="1", steps=2,
        width=64, height=64,
    )  # fmt: skip
    for node in (SAMPLE, DECODE, SAVE, "keep_latent"):
        del graph[node]
    succeed(client, graph)
