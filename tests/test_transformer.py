"""Our transformer equals diffusers' QwenImageTransformer2DModel in every configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from conftest import replica_for
from diffusers import QwenImageTransformer2DModel
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.models.config import TransformerConfig
from engine.models.modulation import is_folded
from engine.models.transformer import QwenImageTransformer, attend, attention_mask, rotary_embedding
from engine.sampling.schedule import make_schedule

CPU = torch.device("cpu")
# Rows and columns of tokens: what is denoised, then references.
GRIDS = {"one": [(4, 5)], "reference": [(4, 6), (4, 5)], "several": [(5, 7), (3, 3), (8, 1), (2, 9)]}
TEXT_TOKENS = 13


@pytest.fixture(scope="module", params=[False, True], ids=["index", "zero_cond_t"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("transformer") / "checkpoint"
    return open_checkpoint(tiny_checkpoint.build(folder, zero_cond_t=request.param))


@pytest.fixture(scope="module")
def original(checkpoint: Checkpoint) -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel.from_pretrained(checkpoint.folder / "transformer")
    return model.float().eval()


def inputs(
    grids: list[tuple[int, int]], seed: int = 0, text_width: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the pictures and of the text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(rows * columns for rows, columns in grids)
    image = torch.randn(1, tokens, 64, generator=generator)
    return image, torch.randn(1, TEXT_TOKENS, text_width, generator=generator)


@torch.inference_mode()
def by_diffusers(
    original: QwenImageTransformer2DModel,
    grids: list,
    timestep: torch.Tensor,
    mask: torch.Tensor | None,
    text_width: int = 128,
) -> torch.Tensor:
    image, text = inputs(grids, text_width=text_width)
    velocity = original(
        hidden_states=image,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=timestep.expand(1),
        img_shapes=[[(1, *grid) for grid in grids]],
        return_dict=False,
    )[0]
    return velocity[:, : grids[0][0] * grids[0][1]]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_predictions_are_diffusers(
    checkpoint: Checkpoint, original: QwenImageTransformer2DModel, grids: list, masked: bool
) -> None:
    transformer = loading.load(replica_for(checkpoint, "transformer"))
    model = transformer.model
    mask = torch.tensor([[True] * 4 + [False] * 3 + [True] * 6]) if masked else None
    timesteps = make_schedule(checkpoint.component("scheduler").config(), 5, 64).timesteps
    schedule = transformer.modulation.of(timesteps)
    rotary = rotary_embedding(model.config, grids, TEXT_TOKENS, CPU)
    image, text = inputs(grids)
    for step, timestep in enumerate(timesteps):
        expected = by_diffusers(original, grids, timestep, mask)
        with torch.inference_mode():
            whole = attention_mask(mask, image.shape[1])
            found = model(image, text, schedule.at(step), rotary, expected.shape[1], whole)
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_rotations_are_diffusers_to_the_bit(original: QwenImageTransformer2DModel) -> None:
    config = TransformerConfig.of(dict(original.config))
    for grids in GRIDS.values():
        shapes = [[(1, *grid) for grid in grids]]
        expected = original.pos_embed(shapes, max_txt_seq_len=TEXT_TOKENS, device=CPU)
        found = rotary_embedding(config, grids, TEXT_TOKENS, CPU)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_every_weight_has_diffusers_name_or_is_folded(original: QwenImageTransformer2DModel) -> None:
    ours = QwenImageTransformer(TransformerConfig.of(dict(original.config))).state_dict()
    theirs = original.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items() if not is_folded(name)
    }
    folded = sum(value.numel() for name, value in theirs.items() if is_folded(name))
    assert folded > 0.3 * sum(value.numel() for value in theirs.values())


def test_attention_can_be_computed_elsewhere(tiny: Checkpoint) -> None:
    """A function that replaces the attention gets every query, key and value."""
    transformer, seen = loading.load(replica_for(tiny, "transformer")), []

    def half_the_heads_at_a_time(*tensors: Any) -> torch.Tensor:
        *heads, mask = tensors
        seen.append([tuple(x.shape) for x in heads])
        halves = zip(*(x.chunk(2, dim=1) for x in heads), strict=True)
        return torch.cat([attend(*half, mask) for half in halves], dim=1)

    model, grids = transformer.model, GRIDS["reference"]
    arguments = (*inputs(grids), transformer.modulation.of(torch.tensor([0.5])).at(0))
    arguments = (*arguments, rotary_embedding(model.config, grids, TEXT_TOKENS, CPU), 24)
    with torch.inference_mode():
        expected = model(*arguments)
        found = model(*arguments, attend=half_the_heads_at_a_time)
    assert seen == [[(1, 2, TEXT_TOKENS + 44, 32)] * 3] * 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_fp16_is_clipped_as_diffusers_clips_it(tmp_path: Path) -> None:
    """The guard needs this to find the module that went out of range."""
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", overflow_block=0))
    transformer = loading.load(replica_for(checkpoint, "transformer", "fp16"))
    largest: list[float] = []
    transformer.model.block(0).register_forward_hook(
        lambda block, args, output: largest.append(float(output[0].abs().max()))
    )
    image, text = (x.half() for x in inputs(GRIDS["one"]))
    rotary = rotary_embedding(transformer.model.config, GRIDS["one"], TEXT_TOKENS, CPU)
    with torch.inference_mode():
        transformer.model(image, text, transformer.modulation.of(torch.tensor([0.5])).at(0), rotary, 20)
    assert largest == [torch.finfo(torch.float16).max]
