"""Several cards of this process compute one image, and it is the image that one card gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from conftest import replica_on
from engine.cards.card import Card
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.models.transformer import Transformer
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition
from engine.sampling.layout import BOTH, CFG, LAYERS, SEQUENCE, Layout
from engine.sampling.sampling import SamplingRun, prepare_run, sample
from engine.weights.components import Replica

MODES = {CFG: 2, SEQUENCE: 3, BOTH: 4, LAYERS: 2}  # with the number of cards that each is tested on
LAYERS_OF_TINY = 2
# Parts of the tokens are summed in another order. Where that turns a rounding, it is more than in FP32.
SUMS_DIFFER = {"bf16": 2e-2, "int8-fast": 1e-3}


def card(number: int, name: str = "Tesla P40") -> Card:
    """A card of this process that is the CPU."""
    return Card(f"gpu:{number}", name, torch.device("cpu", number), native_bf16=False, memory=2**35)


def layout(checkpoint: Checkpoint, mode: str, precision: str = "fp32", cards: int = 0) -> Layout:
    cards = cards or MODES[mode]
    replicas = [replica_on(card(number), checkpoint, "transformer", precision) for number in range(cards)]
    if mode == LAYERS:
        replicas = [
            replace(each, spec=replace(each.spec, held=tuple(range(number, LAYERS_OF_TINY, cards))))
            for number, each in enumerate(replicas)
        ]
    return Layout(mode, tuple(replicas))


def load_all(layout: Layout) -> list[Transformer]:
    return [loading.load(replica) for replica in layout.replicas]


def pictures(*sizes: tuple[int, int], tokens: int, masked: bool = False) -> Condition:
    generator = torch.Generator().manual_seed(tokens)
    latents = tuple(torch.randn(1, 16, 1, *size, generator=generator) for size in sizes)
    mask = torch.arange(tokens)[None] % 3 != 1 if masked else None
    return Condition(torch.randn(1, tokens, 128, generator=generator), mask, latents)


def prepared(
    replica: Replica, sizes: Sequence[tuple[int, int]] = ((4, 4),), masked: bool = False, **changes: Any
) -> SamplingRun:
    arguments: dict[str, Any] = dict(steps=3, true_cfg_scale=4.0, width=96, height=160, seed=0)
    conditions = {
        POSITIVE: pictures(*sizes, tokens=7, masked=masked), NEGATIVE: pictures(*sizes, tokens=2)
    }  # fmt: skip
    return prepare_run(replica, conditions, **(arguments | changes))


def alone(checkpoint: Checkpoint, precision: str = "fp32", **changes: Any) -> torch.Tensor:
    replica = replica_on(card(0), checkpoint, "transformer", precision)
    return sample(loading.load(replica), prepared(replica, **changes))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-fast", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_image_of_one_card(tiny: Checkpoint, mode: str, precision: str) -> None:
    shared = layout(tiny, mode, precision)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared))
    expected = alone(tiny, precision)
    if mode in (CFG, LAYERS):
        assert torch.equal(found, expected)
    else:
        assert difference(found, expected) < SUMS_DIFFER.get(precision, 1e-5)


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["", "zero_cond_t"])
@pytest.mark.parametrize("mode", MODES)
def test_masks_and_several_odd_pictures_are_shared_too(tmp_path: Path, mode: str, zero_cond_t: bool) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", zero_cond_t=zero_cond_t))
    shared = layout(checkpoint, mode)
    changes: dict[str, Any] = dict(sizes=((6, 10), (7, 3), (2, 2)), masked=True)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared, **changes))
    assert difference(found, alone(checkpoint, **changes)) < 1e-5
