"""ComfyUI's memory manager loads and evicts our models as its own, and no model is in memory twice."""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.latents import MEGAPIXEL
from engine.models import loading
from engine.sampling import sampling
from engine.weights.estimates import ENCODE_BYTES, TRANSFORMER_VECTORS, Edit
from prompts import (
    DECODE,
    ENCODE,
    SAMPLE,
    SAVE,
    changed,
    core_prompt,
    edit_prompt,
    fail,
    keep_tensor,
    loaded_components,
    loaded_roles,
    residents,
    succeed,
    wait_until_empty,
    with_node,
)
from test_sampling import plan

from launcher.client import Client
from launcher.server import Server


def test_a_transformer_that_ran_leaves_nothing_behind(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", "int8"))
    sampling.sample(transformer, plan(tiny))
    parts = [weakref.ref(module) for module in transformer.model.modules()]
    del transformer
    gc.collect()
    assert [part for part in parts if part() is not None] == []


@pytest.mark.parametrize("role", ["transformer", "text_encoder", "vae"])
def test_cancelled_loading_leaves_nothing_behind(tiny: Checkpoint, tmp_path: Path, role: str) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(done: int, total: int) -> None:
        if done > total / 2:
            raise Cancelled

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    replica, cache = replica_for(tiny, role, "fp32" if role == "vae" else "int8"), DiskCache(tmp_path, 10**9)
    with pytest.raises(Cancelled):
        loading.load(replica, cancel, cache)
    before = tensors()
    for _ in range(3):
        with pytest.raises(Cancelled):
            loading.load(replica, cancel, cache)
    assert tensors() <= before and list(tmp_path.iterdir()) == []


def test_changing_a_precision_frees_the_old_weights(client: Client, work: Path) -> None:
    for precision in ("fp32", "int8"):
        succeed(client, changed(changed(edit_prompt(), "1", precision=precision), SAMPLE, seed=20))
    loaded = [name for name in loaded_components(client, work) if name.startswith("transformer")]
    assert loaded == ["transformer int8, fp32 math, on cpu"]


@pytest.mark.parametrize("what", [{"unload_models": True}, {"unload_models": True, "free_memory": True}])
def test_free_unloads_and_the_next_prompt_loads_again(
    client: Client, work: Path, what: dict[str, bool]
) -> None:
    succeed(client, changed(edit_prompt(), SAMPLE, seed=30))
    assert loaded_components(client, work)
    client.post("/free", json=what)
    assert wait_until_empty(client, work) == {}
    succeed(client, changed(edit_prompt(), SAMPLE, seed=31 + len(what)))
    assert "transformer" in loaded_roles(client, work)


def test_comfyui_evicts_what_its_cache_forgot(client: Client, work: Path) -> None:
    """Weights on a card stay when their loader's output is forgotten. ComfyUI evicts them while it walks its
    list of models, and that list must not change meanwhile.
    """
    graph = {name: node for name, node in edit_prompt().items() if name in ("1", "3")}
    graph = with_node(graph, "2", "ProbeEviction", one=["1", 0], other=["3", 0], name="eviction")
    succeed(client, graph)
    before, after = json.loads((work / "output" / "eviction.json").read_text())
    assert before > 0 and after == 0


def test_our_graph_and_cores_in_turn_hold_the_same_bytes_every_time(client: Client, work: Path) -> None:
    counted = []
    for turn in range(3):
        succeed(client, changed(edit_prompt(), SAMPLE, seed=40 + turn))
        succeed(client, core_prompt(turn))
        counted.append(sorted((name, size) for name, _, size in residents(client, work)["models"]))
    assert counted[1] == counted[2]
    assert len({name for name, _ in counted[-1]}) == len(counted[-1])


@pytest.mark.parametrize("node", [ENCODE, DECODE])
def test_encoding_and_decoding_stop_within_a_block(client: Client, node: str) -> None:
    """Each takes seconds at 1 megapixel. The interrupt comes when it starts."""
    prompt = changed(edit_prompt(), SAMPLE, width=1024, height=1024, steps=1, seed=50)
    prompt = changed(prompt, ENCODE, reference_megapixels=0.9 if node == ENCODE else 0.01)
    stopped: list[float] = []

    def interrupt(name: str, data: dict) -> None:
        if name == "executing" and data["node"] == node and not stopped:
            client.post("/interrupt")
            stopped.append(time.monotonic())

    assert client.run(prompt, interrupt).status == "interrupted"
    assert time.monotonic() - stopped[0] < 5
    succeed(client, changed(edit_prompt(), SAMPLE, seed=51))


def test_sampling_that_cannot_fit_is_refused_before_anything_is_loaded(client: Client, work: Path) -> None:
    """The config makes the transformer so wide that a usual edit takes half of the memory. An edit of 16
    megapixels then takes twice the memory.
    """
    folder = work / "models" / "diffusers" / "wide_transformer"
    shutil.copytree(work / "models" / "diffusers" / "tiny", folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    memory = client.get("/system_stats")["devices"][0]["vram_total"]
    width = int(memory / 2 / (TRANSFORMER_VECTORS * 4 * Edit().tokens))
    heads = width // config["attention_head_dim"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads}))
    graph = changed(edit_prompt(), "1", checkpoint="wide_transformer", precision="fp32", math="fp32")
    graph = changed(graph, SAMPLE, seed=60, width=4096, height=4096)
    looked_at = with_node(
        graph, "8", "FireRedNumerics",
        transformer=["1", 0], positive=[ENCODE, 0], width=4096, height=4096, look_at="1",
    )  # fmt: skip
    del looked_at[SAMPLE], looked_at[DECODE], looked_at[SAVE]
    for prompt, node in ((graph, "FireRedSampler"), (looked_at, "FireRedNumerics")):
        error = fail(client, prompt)
        assert error["node_type"] == node and error["exception_type"].endswith("DoesNotFitError")
        assert "Sampling 4096x4096 with 1 reference picture takes" in error["exception_message"]
        assert re.search(r"What would fit: \d+x\d+\.", error["exception_message"])
    assert not [name for name in loaded_components(client, work) if name.startswith("transformer fp32")]


def test_a_decode_that_cannot_fit_is_refused_by_the_decode(client: Client, work: Path) -> None:
    """The config makes the VAE so wide that a reference takes half of the memory. Decoding 4 megapixels whole
    then takes twice the memory.
    """
    folder = work / "models" / "diffusers" / "wide_vae"
    shutil.copytree(work / "models" / "diffusers" / "tiny", folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    memory = client.get("/system_stats")["devices"][0]["vram_total"]
    width = int(memory / 2 / (ENCODE_BYTES[4] * MEGAPIXEL))
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"base_dim": width}))
    graph = with_node({}, "1", "FireRedLoadVAE", checkpoint="wide_vae", precision="fp32")
    graph = with_node(graph, "2", "ProbeLatent", shape="1,16,1,256,256", fill="0.1")
    graph = with_node(graph, "3", "FireRedDecode", vae=["1", 0], latent=["2", 0], tiling="whole")
    error = fail(client, keep_tensor(graph, ["3", 0], "never"))
    assert error["node_type"] == "FireRedDecode"
    assert "Decoding 2048x2048 whole takes" in error["exception_message"]
    assert "Set tiling to auto" in error["exception_message"]


def test_a_component_in_use_is_not_evicted_and_afterwards_it_is(client: Client, work: Path) -> None:
    graph = with_node({"3": edit_prompt()["3"]}, "2", "ProbeBorrowed", one=["3", 0], name="borrowed")
    succeed(client, graph)
    freed, during, after, evicted = json.loads((work / "output" / "borrowed.json").read_text())
    assert freed == 0 and during == after > 0 and evicted == 0


def test_copies_on_several_cards_live_together(client: Client, work: Path) -> None:
    """A new copy frees the one on the same card, and one on a card frees the one in host memory."""
    graph = with_node({"3": edit_prompt()["3"]}, "2", "ProbeCopies", one=["3", 0], name="copies")
    succeed(client, graph)
    assert json.loads((work / "output" / "copies.json").read_text()) == [
        ["gpu:0", "gpu:1", True],
        ["gpu:0", "gpu:0", False],
        ["gpu:0", "cpu", True],
        ["cpu", "gpu:0", False],
    ]


def test_a_card_that_answers_nothing_is_left_alone(client: Client, server: Server, work: Path) -> None:
    before = len(server.text())
    succeed(client, with_node({}, "1", "ProbeBrokenCard", checkpoint="tiny", name="broken"))
    found = json.loads((work / "output" / "broken.json").read_text())
    assert found["chosen"] == ["gpu:0"] * 3
    (kind, text), again = found["errors"]
    assert kind == "FireRedError" and [kind, text] == again
    assert text.startswith("The VAE cannot run on gpu:1. gpu:99 does not answer: ")
    assert server.text()[before:].count("gpu:1 is not used") == 1
