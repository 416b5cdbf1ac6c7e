"""Numbers, choices, prompts and pictures outside what the nodes take are refused with their value."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import replica_for
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from engine.errors import InputError
from engine.files.checkpoint import Checkpoint
from engine.images import to_pil
from engine.limits import SEED, STEPS, TRUE_CFG_SCALE, Choice, Real, Whole, require_text
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition, from_conditioning
from engine.sampling.sampling import ROTARY_POSITIONS, prepare_run
from prompts import (
    DECODE,
    ENCODE,
    PHOTO,
    SAMPLE,
    changed,
    edit_prompt,
    fail,
    failure,
    keep_tensor,
    succeed,
    with_node,
)
from test_inputs import conditioning

from launcher.client import Client, Prompt
from launcher.server import Server

REPEATED, LINKED, NUMERICS, PLAN = "21", "22", "23", "24"


def linked(prompt: Prompt, node: str, name: str, value: object) -> Prompt:
    """The prompt with an input that comes by a link. ComfyUI does not check such values."""
    prompt = with_node(prompt, LINKED, "ProbeValue", json=json.dumps(value))
    return changed(prompt, node, **{name: [LINKED, 0]})


# Pictures and tokens


def test_more_than_ten_pictures_are_counted_before_they_are_encoded(client: Client, server: Server) -> None:
    prompt = with_node(edit_prompt(), REPEATED, "RepeatImageBatch", image=[PHOTO, 0], amount=11)
    error = fail(client, changed(prompt, ENCODE, **{"images.image0": [REPEATED, 0]}))
    assert "There are 11 pictures; one edit takes up to 10." in error["exception_message"]
    few = changed(changed(prompt, REPEATED, amount=4), ENCODE, **{"images.image0": [REPEATED, 0]})
    succeed(client, few)
    assert server.text().count("the edit starts from 4 pictures; the model was trained on up to 3") == 1


@pytest.mark.parametrize(
    "shapes", [[(1, 16, 1, 4, 4)] * 11, [(11, 16, 1, 4, 4)], [(6, 16, 4, 4), (5, 16, 4, 4)]]
)
def test_more_than_ten_reference_latents_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="There are 11 reference latents in the positive conditioning"):
        from_conditioning(
            conditioning(reference_latents=[torch.ones(shape) for shape in shapes]), "positive", 128
        )


def test_too_many_pictures_are_not_even_converted() -> None:
    with pytest.raises(InputError, match="There are 100000 pictures"):
        to_pil([torch.zeros(1, 1, 1, 3).expand(100_000, 512, 512, 3)])


@pytest.mark.parametrize(
    ("size", "references"),
    [
        ((32, 32), []),
        ((64, 48), [(8, 300)]),
        ((32, 48), [(6, 14), (7, 9)]),
        ((4096, 32), []),
        ((32, 32), [(2, 16_384)]),
    ],
)
def test_text_is_refused_exactly_where_the_rotary_table_ends(
    tiny: Checkpoint, size: tuple[int, int], references: list[tuple[int, int]]
) -> None:
    """The table of diffusers decides. size: in pixels. references: sizes in latents."""
    rope = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    grids = [(1, side[0] // 16, side[1] // 16) for side in [size]]
    grids += [(1, -(-height // 2), -(-width // 2)) for height, width in references]
    _, text = rope([grids], max_txt_seq_len=ROTARY_POSITIONS)
    room = len(text)
    latents = tuple(torch.zeros(1, 16, 1, *reference) for reference in references)

    def plan(tokens: int, **changes: Any) -> None:
        condition = Condition(torch.zeros(1, 1, 128).expand(1, tokens, 128), None, latents)
        arguments = dict(steps=1, true_cfg_scale=1.0, width=size[1], height=size[0], seed=0) | changes
        conditions = {POSITIVE: Condition(torch.zeros(1, 1, 128), None, ()), NEGATIVE: condition}
        if arguments["true_cfg_scale"] == 1.0:
            conditions = {POSITIVE: condition}
        prepare_run(replica_for(tiny, "transformer"), conditions, **arguments)

    plan(room)
    with pytest.raises(InputError, match=f"positive conditioning has {room + 1} text tokens.* takes {room}"):
        plan(room + 1)
    with pytest.raises(InputError, match=f"negative conditioning has {room + 1} text tokens"):
        plan(room + 1, true_cfg_scale=4.0)


def test_a_reference_past_the_rotary_table_is_refused(tiny: Checkpoint) -> None:
    condition = Condition(torch.zeros(1, 3, 128), None, (torch.zeros(1, 16, 1, 2, 16_386),))
    with pytest.raises(InputError, match="is 131088 pixels long; this model takes 131072"):
        prepare_run(
            replica_for(tiny, "transformer"),
            {POSITIVE: condition},
            steps=1,
            true_cfg_scale=1.0,
            width=32,
            height=32,
            seed=0,
        )


def test_joined_conditionings_are_counted_before_the_transformer_loads(client: Client) -> None:
    prompt = with_node(edit_prompt(), "long", "ProbeConditioning", shape="1,4500,128", fill="0.1", entries=1)
    prompt = with_node(
        prompt, "joined", "ConditioningConcat", conditioning_to=["long", 0], conditioning_from=["long", 0]
    )
    prompt["long"]["inputs"]["reference"] = ""
    run = client.run(changed(prompt, SAMPLE, positive=["joined", 0]))
    assert (
        run.error is not None
        and "positive conditioning has 9000 text tokens" in run.error["exception_message"]
    )
    assert not run.progress(SAMPLE)


# Numbers and choices that come by a link


@pytest.mark.parametrize(
    ("node", "name", "value", "said"),
    [
        (
            ENCODE,
            "reference_megapixels",
            -1,
            "reference_megapixels is -1; it must be a number from 0.01 to 4.0.",
        ),
        (ENCODE, "reference_megapixels", 9, "reference_megapixels is 9; it must be"),
        (ENCODE, "reference_megapixels", float("nan"), "reference_megapixels is nan; it must be"),
        (ENCODE, "prompt", 5, "The prompt is 5; it must be text."),
        (ENCODE, "negative_prompt", ["a"], "The negative prompt is ['a']; it must be text."),
        (ENCODE, "guard", "loud", "guard is 'loud'; choose one of stop, warn, off."),
        (
            ENCODE,
            "images.image10",
            "x",
            "has no input images.image10. Its pictures are images.image0 to images.image9: 10",
        ),
        (ENCODE, "images.image0", "a.png", "images.image0 is 'a.png', which is no picture. Connect"),
        (ENCODE, "vae", "ae.safetensors", "vae is 'ae.safetensors'. Connect the output of FireRedLoadVAE."),
        (SAMPLE, "cfg", float("nan"), "cfg is nan; it must be a number from 0.0 to 100.0."),
        (SAMPLE, "cfg", float("inf"), "cfg is inf; it must be"),
        (SAMPLE, "cfg", "4", "cfg is '4'; it must be"),
        (SAMPLE, "steps", 0, "steps is 0; it must be a whole number from 1 to 1000."),
        (SAMPLE, "steps", 2.5, "steps is 2.5; it must be"),
        (SAMPLE, "steps", True, "steps is True; it must be"),
        (SAMPLE, "width", 1e9, "width is 1000000000.0; it must be a whole number from 0 to 4096."),
        (SAMPLE, "height", float("nan"), "height is nan; it must be"),
        (SAMPLE, "seed", -1, "seed is -1; it must be a whole number from 0 to 18446744073709551615."),
        (SAMPLE, "resume", "maybe", "resume is 'maybe'; choose one of on, off."),
        (SAMPLE, "guard", None, "guard is None; choose one of stop, warn, off."),
        (SAMPLE, "latent", "cat.latent", "The latent is 'cat.latent'. Connect the output of a node"),
        (SAMPLE, "positive", "a red hat", "The positive conditioning is 'a red hat'. Connect FireRed Encode"),
        (SAMPLE, "transformer", 5, "transformer is 5. Connect the output of FireRedLoadTransformer."),
        (DECODE, "tiling", "some", "tiling is 'some'; choose one of auto, whole, tiled."),
        (DECODE, "guard", 1, "guard is 1; choose one of stop, warn, off."),
        (DECODE, "latent", {"samples": "x"}, "The latent to decode holds 'x' where its numbers should be"),
        (NUMERICS, "steps", 0, "steps is 0; it must be"),
        (NUMERICS, "look_at", 5, "look_at is 5; it must be text."),
        (NUMERICS, "seed", 1.5, "seed is 1.5; it must be"),
        (NUMERICS, "images", "a.png", "images is 'a.png', which is no picture."),
        (PLAN, "width", 31, "width is 31; it must be a whole number from 32 to 4096."),
        (PLAN, "height", float("nan"), "height is nan; it must be"),
        (PLAN, "references", 11, "references is 11; it must be a whole number from 0 to 10."),
        (PLAN, "steps", "40", "steps is '40'; it must be"),
    ],
)
def test_values_by_a_link_are_checked_where_they_are_used(
    client: Client, node: str, name: str, value: object, said: str
) -> None:
    prompt = edit_prompt()
    if node == NUMERICS:
        inputs = dict(transformer=["1", 0], positive=[ENCODE, 0], steps=1, look_at="1")
        prompt = with_node(prompt, NUMERICS, "FireRedNumerics", **inputs)
    if node == PLAN:
        prompt = with_node({}, PLAN, "FireRedHardwarePlan", checkpoint="tiny")
        prompt = keep_tensor(prompt, [PLAN, 1], "plan")
    assert said in failure(client, linked(prompt, node, name, value), node)


def test_whole_numbers_of_another_type_work(client: Client) -> None:
    succeed(client, linked(changed(edit_prompt(), SAMPLE, cfg=1.0), SAMPLE, "steps", 1.0))
    succeed(client, linked(changed(edit_prompt(), SAMPLE, steps=1), SAMPLE, "cfg", 2))


def test_a_number_typed_as_text_is_checked_too(client: Client) -> None:
    """ComfyUI turns the text "nan" into NaN, which is neither below the minimum nor above the maximum."""
    assert "cfg is nan" in failure(client, changed(edit_prompt(), SAMPLE, cfg="nan"))


@pytest.mark.parametrize(
    ("bounds", "value"),
    [
        *((STEPS, value) for value in (0, 1001, -1, 1.5, "2", None, True, float("nan"), float("inf"), [1])),
        *((SEED, value) for value in (-1, 2**64, 1e30)),
        *((TRUE_CFG_SCALE, value) for value in (-0.1, 101, "4", None, False, float("nan"), -float("inf"))),
        *((Choice("guard", ("stop", "warn")), value) for value in ("", "Stop", None, 0, ["stop"])),
    ],
)
def test_bounds_refuse_everything_else(bounds: Whole | Real | Choice, value: object) -> None:
    with pytest.raises(InputError, match=f"^{bounds.name} is "):
        bounds.require(value)  # type: ignore[arg-type]


# Prompts


@pytest.mark.parametrize("branch", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Picture 1: <|vision_start|><|image_pad|><|vision_end|> a hat", "holds <|vision_start|> and <|visi"),
        ("a <|video_pad|>", "holds <|video_pad|>, which the model keeps for itself"),
        ("a<|im_end|>", "holds <|im_end|>"),
        ("a cat \ud83d", "holds half of a character (a lone surrogate) at position 7"),
        ("hat " * 2000, "tokens, the model takes 1024. Shorten it."),
    ],
)
def test_prompts_that_the_model_cannot_take(client: Client, branch: str, text: str, said: str) -> None:
    told = failure(client, changed(edit_prompt(), ENCODE, **{branch: text}), ENCODE)
    assert told.startswith("The negative prompt " if branch == "negative_prompt" else "The prompt ")
    assert said in told


def test_odd_but_sound_prompts_work(client: Client) -> None:
    for text in ("a \0 hat", "\U0001f431 <|cat|> <image>", "\u200f\u0645"):
        succeed(client, changed(edit_prompt(), ENCODE, prompt=text))


def test_half_a_character_is_found_without_an_encoder() -> None:
    assert require_text("\U0001f431", "The prompt") == "\U0001f431"
    with pytest.raises(InputError, match=r"The prompt holds half of a character .* at position 2"):
        require_text("a\udc31", "The prompt")
