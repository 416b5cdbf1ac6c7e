"""Activation ranges are those of the forward itself, and the verdicts follow from them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny_checkpoint
import torch
from conftest import replica_for
from engine.drawing import ALARM, WIDTH
from engine.errors import InputError, NonFiniteError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.images import to_image
from engine.models import loading
from engine.numerics.charts import BIG_PANEL, COLOURS, HEIGHT, draw_ranges
from engine.numerics.measure import measure, measure_text_encoder, measure_transformer, parse_steps
from engine.numerics.ranges import BlockRange, judge, report
from engine.weights.precision import PRECISIONS
from PIL import Image, ImageColor
from prompts import ENCODE, PHOTO, SAMPLE, edit_prompt, keep_tensor, kept_tensor, succeed, with_node
from test_sampling import plan

from launcher.client import Client

NUMERICS = "21"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("overflowing") / "tiny"
    return open_checkpoint(tiny_checkpoint.build(folder, layers=3, overflow_block=1))


def measured(checkpoint: Checkpoint, precision: str, steps: list[int], samples: torch.Tensor | None = None):
    replica = replica_for(checkpoint, "transformer", precision)
    looked_at = dataclasses.replace(plan(checkpoint, samples=samples), replica=replica)
    return measure_transformer(loading.load(replica), looked_at, steps, samples)


def verdicts(role: str, **ranges: list[BlockRange]) -> dict[str, str]:
    return {row.precision: row.verdict for row in judge(role, ranges)}


# Measuring


class Block(torch.nn.Module):
    """Two linear layers whose inputs are known: the block's, and a hundred times that."""

    def __init__(self) -> None:
        super().__init__()
        (self.first, self.second) = (torch.nn.Identity(), torch.nn.Identity())
        self.second.in_features = self.second.out_features = 4  # as linear layers have

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * 100) / 100


def test_ranges_and_shares_are_those_of_the_values_that_passed() -> None:
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([Block(), Block()])})
    x = torch.tensor([[0.01, -0.05, 0.0, 1.0], [0.02, 0.04, -0.07, -2.0]])

    def forward() -> None:
        for scale, block in zip((1, 1000), model["transformer_blocks"], strict=True):
            block(x * scale)

    first, second = measure(model, forward)
    assert (first.name, first.number, first.largest) == ("transformer_blocks.0", 0, 200.0)
    assert first.outliers == 2 / 4  # 2, 5, 7 and 200 enter the linear layer
    assert first.overflows == 0
    assert second.largest == pytest.approx(2e5) and second.outliers == 1
    assert second.overflows == 1 / 12  # of three modules' four channels, only 200000 passes 65504
    assert not any(module._forward_hooks for module in model.modules())


def test_the_largest_value_is_the_one_that_hooks_of_ones_own_see(overflowing: Checkpoint) -> None:
    transformer, seen = loading.load(replica_for(overflowing, "transformer")), []
    net = transformer.model.block(1).img_mlp.net[2]
    with net.register_forward_hook(lambda m, args, output: seen.append(float(output.abs().max()))):
        ranges = measure_transformer(transformer, plan(overflowing), [1, 2])
    assert list(ranges) == ["step 1", "step 2"]
    for blocks, largest in zip(ranges.values(), seen, strict=True):
        assert [block.name for block in blocks] == [f"transformer_blocks.{n}" for n in range(3)]
        assert blocks[0].largest < 1000 and blocks[1].largest >= largest > 65504
        assert blocks[1].overflows > 0 == blocks[0].overflows


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-fast"])
def test_every_precision_measures_about_the_same(tiny: Checkpoint, precision: str) -> None:
    (exact,), (low,) = (measured(tiny, name, [1]).values() for name in ("fp32", precision))
    for a, b in zip(exact, low, strict=True):
        assert b.largest == pytest.approx(a.largest, rel=0.05)
        assert b.outliers == pytest.approx(a.outliers, abs=0.05)


def test_the_state_looked_at_is_the_latent_noised_to_the_step(tiny: Checkpoint) -> None:
    """Zeros are noise alone; at the first step a latent does not show, at the last it does."""
    samples = torch.randn(1, 16, 1, 4, 4) * 100
    noise, zeros, picture = (measured(tiny, "fp32", [1, 2], x) for x in (None, samples * 0, samples))
    assert noise == zeros
    assert picture["step 1"] == noise["step 1"] and picture["step 2"] != noise["step 2"]
    with pytest.raises(NonFiniteError, match="The latent holds 1 NaN"):
        samples[0, 0, 0, 0, 0] = float("nan")
        measured(tiny, "fp32", [1], samples)


def test_both_towers_of_the_text_encoder_are_measured_the_vision_tower_with_pictures(
    tiny: Checkpoint,
) -> None:
    encoder = loading.load(replica_for(tiny, "text_encoder"))
    assert list(measure_text_encoder(encoder, "hat", [])) == ["language model"]
    ranges = measure_text_encoder(encoder, "hat", [Image.new("RGB", (64, 64), "red")])
    assert list(ranges) == ["vision tower", "language model"]
    assert [block.name for block in ranges["vision tower"]] == ["visual.blocks.0", "visual.blocks.1"]
    assert all(0 < block.largest < 1000 for tower in ranges.values() for block in tower)


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [("1, 20, 40", 40, [1, 20, 40]), ("1, 20, 40", 8, [1, 8]), ("3 2,3", 4, [2, 3])],
)
def test_steps_to_look_at(text: str, steps: int, expected: list[int]) -> None:
    assert parse_steps(text, steps) == expected


@pytest.mark.parametrize("text", ["", "first", "0, 1", "-1", "1 2 3 4 5 6 7", "1.5"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=f"look_at is '{text}'; write up to 6 step numbers, 1 to 40"):
        parse_steps(text, 40)


# Verdicts


@pytest.mark.parametrize(
    ("largest", "fp16"), [(16000.0, "safe"), (17000.0, "at risk"), (65504.0, "breaks"), (2e7, "breaks")]
)
def test_fp16_is_judged_by_its_limit_and_others_hold_all(largest: float, fp16: str) -> None:
    ranges = {"step 1": [BlockRange("transformer_blocks.0", largest, 0.1, 0.0)]}
    others = {name: "safe" for name in PRECISIONS if name != "fp16"}
    assert verdicts("transformer", **ranges) == others | {"fp16": fp16}
    assert verdicts("text_encoder", **ranges)["fp16"] == "safe"  # storage only


def test_llm_int8_is_at_risk_where_most_columns_are_outliers() -> None:
    ranges = {"step 1": [BlockRange("transformer_blocks.7", 100.0, 0.51, 0.0)]}
    assert verdicts("transformer", **ranges) == {name: "safe" for name in PRECISIONS} | {
        "int8-bnb": "at risk"
    }


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_fp32_cannot_hold_breaks_everywhere(value: float) -> None:
    blocks = [
        BlockRange("transformer_blocks.0", 1.0, 0.0, 0.0),
        BlockRange("transformer_blocks.1", value, 1, 1),
    ]
    assert set(verdicts("transformer", step=blocks).values()) == {"breaks"}
    assert set(verdicts("transformer", step=blocks[::-1]).values()) == {"breaks"}


def test_the_report_names_the_blocks(overflowing: Checkpoint, tiny: Checkpoint) -> None:
    text = report(replica_for(overflowing, "transformer"), measured(overflowing, "fp32", [1, 2]))
    assert text.startswith("Measured on the transformer fp32 on cpu:\nstep 1: largest ")
    assert "in transformer_blocks.1; " in text
    assert "\nfp16: breaks (passes 65504 in transformer_blocks.1 (" in text
    assert "transformer_blocks.0" not in text.partition("\nfp16: ")[2]
    many = {"step 1": [BlockRange(f"transformer_blocks.{n}", 1e5 + n, 0.0, 0.0) for n in range(60)]}
    fp16 = next(row for row in judge("transformer", many) if row.precision == "fp16")
    assert fp16.why.startswith("passes 65504 in transformer_blocks.59 (1e+05), transformer_blocks.58")
    assert fp16.why.endswith("and 56 more blocks")


# The chart


def pixels(picture: Image.Image, colour: str) -> np.ndarray:
    """(n, 2): x and y of the pixels of just that colour."""
    y, x = np.nonzero((np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=2))
    return np.stack([x, y], axis=1)


def test_the_chart_shows_a_line_for_each_step_above_and_below_the_limit() -> None:
    ranges = {
        f"step {step}": [BlockRange(f"transformer_blocks.{n}", top, 0.5, 0.0) for n in range(60)]
        for step, top in ((1, 1e7), (40, 10.0))
    }
    picture = draw_ranges("Ranges", ranges)
    assert picture.size == (WIDTH, HEIGHT)
    left, top, right, bottom = BIG_PANEL
    heights = []
    for colour in (COLOURS[0], ALARM, COLOURS[1]):
        inside = [(x, y) for x, y in pixels(picture, colour) if left + 300 < x < right and top < y < bottom]
        assert len({x for x, _ in inside}) > 600
        heights.append(float(np.median([y for _, y in inside])))
    assert heights == sorted(heights) and heights[0] < heights[1] < heights[2]


@pytest.mark.parametrize("largest", [math.nan, math.inf, 0.0, 1e-12, 3e38])
def test_any_value_can_be_drawn_and_the_worst_stand_out(largest: float) -> None:
    blocks = [BlockRange("visual.blocks.0", largest, 1.0, 1.0)]
    picture = draw_ranges(
        "A title far too long to fit into the width of the picture " * 2, {"vision": blocks}
    )
    above = [y for x, y in pixels(picture, COLOURS[0]) if x < BIG_PANEL[0] + 8 and y < BIG_PANEL[1] - 2]
    assert bool(above) == (not math.isfinite(largest))  # a cross on the edge
    image = to_image([picture, picture])
    assert image.shape == (2, HEIGHT, WIDTH, 3) and (float(image.min()), float(image.max())) >= (0.0, 1.0)


# The node


def test_the_node_draws_and_reports_both_models(client: Client, work) -> None:
    prompt = with_node(
        edit_prompt(), NUMERICS, "FireRedNumerics", transformer=["1", 0], positive=[ENCODE, 0],
        latent=[SAMPLE, 0], text_encoder=["2", 0], images=[PHOTO, 0], prompt="hat", steps=4, look_at="1, 4",
    )  # fmt: skip
    run = succeed(client, keep_tensor(keep_tensor(prompt, [NUMERICS, 0], "chart"), [NUMERICS, 1], "report"))
    assert kept_tensor(work, "chart").shape == (2, HEIGHT, WIDTH, 3)
    text = kept_tensor(work, "report")
    assert run.outputs[NUMERICS]["text"] == [text]
    assert "transformer" in text and "step 1: largest" in text and "step 4: largest" in text
    assert "vision tower: largest" in text and "language model: largest" in text


def test_only_transformer_and_conditioning_are_needed(client: Client) -> None:
    prompt = with_node(
        edit_prompt(),
        NUMERICS,
        "FireRedNumerics",
        transformer=["1", 0],
        positive=[ENCODE, 0],
        width=64,
        height=64,
    )
    run = succeed(client, prompt)
    assert "step 40: largest" in run.outputs[NUMERICS]["text"][0]
