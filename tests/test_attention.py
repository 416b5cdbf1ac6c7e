"""INT8 attention: what it costs a prediction, who may choose it, and that a choice that cannot be is told.

The kernels need a card, and are tested there at load. Here stands in what they compute, in plain torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import replica_for
from engine.cuda.attention import rounded_attention
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.limits import EXACT, INT8
from engine.models import attention, loading
from engine.models.transformer import attend
from engine.numerics.attention import AttentionVerdict, can_compare, keep_verdict, kept_verdict
from engine.numerics.measure import compare_attention
from engine.sampling.conditioning import POSITIVE
from engine.sampling.options import SamplingOptions
from engine.sampling.workers import LocalWorker
from engine.weights.formats import Int8FastLinear, int8_math, weights_only
from engine.weights.formats.int8_paths import IntegerPath
from prompts import changed, edit_prompt, failure, succeed, with_node
from test_guard import SCHEDULE
from test_sampling import condition, plan

from launcher.client import Client
from launcher.server import Server

CPU = torch.device("cpu")
LOADER = "1"


class Rounded:
    """The kernels' work on a CPU."""

    @staticmethod
    def takes(query: torch.Tensor) -> bool:
        return query.dtype == torch.float32

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        return rounded_attention(*arguments)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "int8_attention", lambda device: Rounded())


def prediction(checkpoint: Checkpoint, precision: str, kind: str) -> torch.Tensor:
    transformer = loading.load(replica_for(checkpoint, "transformer", precision))
    conditions = {POSITIVE: condition(tokens=20, references=1)}
    options = SamplingOptions(attention=kind)
    worker = LocalWorker(transformer, SCHEDULE, (10, 10), conditions, options=options)
    latents = torch.randn(1, 25, 64, generator=torch.Generator().manual_seed(0))
    return worker.predict(latents, 0)[POSITIVE]


def test_the_workers_attention_is_the_chosen_one(tiny: Checkpoint, kernels: None) -> None:
    exact, rounded = (prediction(tiny, "fp32", kind) for kind in (EXACT, INT8))
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 0.05


def test_other_arithmetic_stays_exact(tiny: Checkpoint, kernels: None) -> None:
    assert torch.equal(prediction(tiny, "bf16", INT8), prediction(tiny, "bf16", EXACT))


def test_without_kernels_it_is_exact() -> None:
    assert attention.attention_on(CPU, INT8) is attend is attention.attention_on(CPU, EXACT)


def test_it_is_another_run() -> None:
    """An unfinished run is not taken up with another attention; one of before the choice existed is."""
    assert SamplingOptions(attention=INT8).identity(True) != SamplingOptions().identity(True) == []


def test_a_verdict_compares_attention_with_products(tiny: Checkpoint, kernels: None) -> None:
    replica = replica_for(tiny, "transformer", "int8-fast")
    transformer = loading.load(replica)
    layers = [layer for layer in transformer.model.modules() if isinstance(layer, Int8FastLinear)]
    path = IntegerPath("torch", int8_math.quantize_tokens, int8_math.rescale)
    for layer in layers:
        layer.path = path
    run = dataclasses.replace(plan(tiny, width=160, height=160), replica=replica)
    verdict = compare_attention(transformer, run, [1, 2])
    assert 0 < verdict.attention < 0.05 and 0 < verdict.products < 0.05
    assert all(layer.path is path for layer in layers)
    with weights_only(transformer.model):
        assert all(layer.path is None for layer in layers)
        without = compare_attention(transformer, run, [1])
    assert without.products == 0 and not without.safe  # what rounds nothing leaves no room for rounding


def test_a_verdict_is_kept_for_the_files_that_it_is_about(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6)
    assert kept_verdict(cache, "files") is None
    keep_verdict(cache, "files", AttentionVerdict(0.01, 0.02))
    kept = kept_verdict(cache, "files")
    assert kept is not None and kept.safe and kept.attention == pytest.approx(0.01)
    assert kept_verdict(cache, "other files") is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert kept_verdict(cache, "files") is None


def test_there_is_nothing_to_compare_on_a_cpu(tiny: Checkpoint) -> None:
    assert not can_compare(replica_for(tiny, "transformer", "int8-fast"))


def test_a_choice_that_the_device_lacks_is_told(client: Client, server: Server) -> None:
    succeed(client, changed(edit_prompt(), LOADER, attention="int8", precision="fp32"))
    told = "attention int8 is for heads of 128 channels, and this model's have 32, so it is computed exactly"
    assert told in server.text()


def test_a_bad_choice_over_a_link_is_named(client: Client) -> None:
    prompt = with_node(edit_prompt(), "30", "ProbeValue", json='"fast"')
    message = failure(client, changed(prompt, LOADER, attention=["30", 0]), LOADER)
    assert "attention is 'fast'; choose one of auto, exact, int8." in message


def test_a_new_verdict_makes_auto_choose_again(client: Client, work: Path) -> None:
    prompt = changed(edit_prompt(), LOADER, precision="int8-fast")
    succeed(client, prompt)
    assert LOADER not in succeed(client, prompt).executed
    identity = open_checkpoint(work / "models/diffusers/tiny").component("transformer").identity()
    cache = DiskCache(work / "models/firered_cache", 10**9)
    keep_verdict(cache, identity, AttentionVerdict(0.01, 0.02))
    assert LOADER in succeed(client, prompt).executed
    others = (("int8", "auto"), ("int8-fast", "exact"))
    prompts = [changed(prompt, LOADER, precision=name, attention=kind) for name, kind in others]
    for other, change in zip(prompts, (0.02, 0.01), strict=True):
        succeed(client, other)
        keep_verdict(cache, identity, AttentionVerdict(change, change / 2))
        assert LOADER not in succeed(client, other).executed  # it is not about these
