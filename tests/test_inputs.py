"""What other nodes put into latents, conditioning, numbers and prompts: obeyed, refused or said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from engine.errors import InputError
from engine.files.checkpoint import Checkpoint
from engine.images import to_pil
from engine.latents import draw_noise, empty_as_qwen, read_latent
from engine.limits import SEED, STEPS, TRUE_CFG_SCALE, Choice, Real, Whole, require_text
from engine.models import loading
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition, ReferenceMethod, from_conditioning
from engine.sampling.sampling import ROTARY_POSITIONS, prepare_run, sample
from prompts import (
    DECODE,
    ENCODE,
    PHOTO,
    SAMPLE,
    SAVE,
    changed,
    edit_prompt,
    fail,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)

from launcher.client import Client, Prompt
from launcher.server import Server

EMPTY, BEFORE, LINKED, NUMERICS, PLAN = "21", "22", "23", "24", "25"


def sampling_prompt(batch: int = 1) -> Prompt:
    """The edit without its decode, one step, with an empty latent of that batch."""
    prompt = edit_prompt()
    for node in (DECODE, SAVE):
        del prompt[node]
    prompt = with_node(prompt, EMPTY, "EmptySD3LatentImage", width=64, height=64, batch_size=batch)
    prompt = changed(prompt, SAMPLE, latent=[EMPTY, 0], steps=1, cfg=1.0)
    return keep_tensor(prompt, [SAMPLE, 0], "sampled")


def with_latent_node(prompt: Prompt, class_type: str, **inputs: Any) -> Prompt:
    """The prompt with one of core's nodes between the empty latent and the sampler."""
    return changed(with_node(prompt, BEFORE, class_type, **inputs), SAMPLE, latent=[BEFORE, 0])


def with_conditioning_node(class_type: str, checkpoint: str = "tiny", **inputs: Any) -> Prompt:
    """The edit with one of core's nodes between the positive conditioning and the sampler."""
    prompt = changed(edit_prompt(checkpoint), SAMPLE, steps=1, cfg=1.0)
    prompt = with_node(prompt, BEFORE, class_type, conditioning=[ENCODE, 0], **inputs)
    return changed(prompt, SAMPLE, positive=[BEFORE, 0])


def linked(prompt: Prompt, node: str, name: str, value: object) -> Prompt:
    """The prompt with an input that comes by a link, which ComfyUI does not check."""
    prompt = with_node(prompt, LINKED, "ProbeValue", json=json.dumps(value))
    return changed(prompt, node, **{name: [LINKED, 0]})


def message(client: Client, prompt: Prompt, node: str = SAMPLE) -> str:
    error = fail(client, prompt)
    assert error["node_id"] == node
    return error["exception_message"]


def sampled(client: Client, work: Path, prompt: Prompt) -> dict[str, Any]:
    succeed(client, prompt)
    return kept_tensor(work, "sampled")


# A latent's batch_index


@pytest.fixture(scope="module")
def batch_of_three(client: Client, work: Path) -> torch.Tensor:
    return sampled(client, work, sampling_prompt(3))["samples"]


def test_a_picture_taken_from_a_batch_keeps_its_noise(
    client: Client, work: Path, batch_of_three: torch.Tensor
) -> None:
    inputs = dict(samples=[EMPTY, 0], batch_index=2, length=1)
    picked = sampled(client, work, with_latent_node(sampling_prompt(3), "LatentFromBatch", **inputs))
    assert torch.equal(picked["samples"], batch_of_three[2:])
    assert picked["batch_index"] == [2]  # core's KSampler hands it on too


def test_a_second_sampler_draws_what_it_would_after_cores(
    client: Client, work: Path, batch_of_three: torch.Tensor
) -> None:
    inputs = dict(samples=[EMPTY, 0], batch_index=1, length=1)
    prompt = with_latent_node(sampling_prompt(3), "LatentFromBatch", **inputs)
    second = prompt[SAMPLE]["inputs"] | {"latent": [SAMPLE, 0]}
    prompt = with_node(prompt, "second", "FireRedSampler", **second)
    succeed(client, keep_tensor(prompt, ["second", 0], "second"))
    assert torch.equal(kept_tensor(work, "second")["samples"], batch_of_three[1:2])


def test_a_batch_split_into_a_list_is_the_batch(
    client: Client, work: Path, batch_of_three: torch.Tensor
) -> None:
    prompt = with_latent_node(sampling_prompt(3), "RebatchLatents", latents=[EMPTY, 0], batch_size=1)
    prompt = with_node(prompt, "joined", "RebatchLatents", latents=[SAMPLE, 0], batch_size=3)
    succeed(client, keep_tensor(prompt, ["joined", 0], "joined"))
    assert torch.equal(kept_tensor(work, "joined")["samples"], batch_of_three)


def test_a_fixed_seed_makes_a_batch_of_equal_pictures(
    client: Client, work: Path, batch_of_three: torch.Tensor
) -> None:
    inputs = dict(samples=[EMPTY, 0], seed_behavior="fixed")
    alike = sampled(client, work, with_latent_node(sampling_prompt(3), "LatentBatchSeedBehavior", **inputs))
    assert torch.equal(alike["samples"], batch_of_three[:1].expand(3, -1, -1, -1, -1))


@pytest.mark.parametrize("index", [[2, 0, 2, 5], [5, 4, 3, 3], [0, 1, 2, 3]])
def test_noise_is_what_core_prepares_for_a_batch_index(client: Client, work: Path, index: list[int]) -> None:
    prompt = with_node({}, "1", "ProbeLatent", shape="4,16,1,6,10", fill="0")
    prompt = with_node(prompt, "2", "ProbeKey", given=["1", 0], key="batch_index", json=json.dumps(index))
    succeed(client, with_node(prompt, "3", "ProbeNoise", latent=["2", 0], seed=42, name="by_core"))
    drawn = read_latent({"samples": torch.zeros(4, 16, 1, 6, 10), "batch_index": index}).draws
    assert torch.equal(torch.cat(list(draw_noise((6, 10), 42, drawn))), kept_tensor(work, "by_core"))


def test_a_resumed_batch_goes_on_with_its_own_noise(tiny: Checkpoint) -> None:
    """The name of a run knows which draws its pictures start from."""
    conditions = {POSITIVE: Condition(torch.randn(1, 5, 128), None, ())}
    arguments: dict[str, Any] = dict(steps=1, true_cfg_scale=1.0, width=0, height=0, seed=0)
    replica, zeros = replica_for(tiny, "transformer"), torch.zeros(2, 16, 4, 4)
    plans = [
        prepare_run(replica, conditions, samples=zeros, draws=draws, **arguments)
        for draws in (None, (0, 1), (1, 0), (0, 3))
    ]
    names = [plan.name() for plan in plans]
    assert names[0] == names[1] and len(set(names)) == 3
    transformer = loading.load(replica)
    straight, swapped = (sample(transformer, plan) for plan in plans[1:3])
    assert torch.equal(straight.flip(0), swapped)


@pytest.mark.parametrize(
    "index",
    [[0], [0, 1, 2], [-1, 0], [0, 0.5], [0, True], [0, 10**9], "01", 7, [0, None], [[0, 1]], {"0": 1}],
)
def test_a_batch_index_that_cannot_be_is_refused(index: object) -> None:
    with pytest.raises(InputError, match="batch_index"):
        read_latent({"samples": torch.zeros(2, 16, 4, 4), "batch_index": index})


def test_a_long_batch_index_is_drawn_one_by_one() -> None:
    """The noise of a huge batch is never in memory at once, and the first comes at once."""
    draws = read_latent({"samples": torch.zeros(1, 16, 1, 1).expand(200_000, 16, 1, 1)}).draws
    first = torch.randn((1, 1, 16, 128, 128), generator=torch.Generator().manual_seed(1))
    assert torch.equal(next(draw_noise((128, 128), 1, draws)), first.transpose(1, 2))


# A latent's mask, content and size


def test_a_mask_is_refused_by_name(client: Client) -> None:
    prompt = with_node(sampling_prompt(), "mask", "SolidMask", value=0.0, width=64, height=64)
    prompt = with_latent_node(prompt, "SetLatentNoiseMask", samples=[EMPTY, 0], mask=["mask", 0])
    said = message(client, prompt)
    assert (
        "The latent has a noise_mask, which Set Latent Noise Mask" in said and "ImageCompositeMasked" in said
    )
    inputs = dict(transformer=["1", 0], positive=[ENCODE, 0], latent=[BEFORE, 0], steps=1, look_at="1")
    del prompt[SAMPLE], prompt["keep_sampled"]
    prompt = with_node(prompt, NUMERICS, "FireRedNumerics", **inputs)
    assert "The latent has a noise_mask" in message(client, prompt, NUMERICS)


def test_a_mask_of_ones_is_none(client: Client, work: Path, batch_of_three: torch.Tensor) -> None:
    prompt = with_node(sampling_prompt(), "mask", "SolidMask", value=1.0, width=64, height=64)
    prompt = with_latent_node(prompt, "SetLatentNoiseMask", samples=[EMPTY, 0], mask=["mask", 0])
    assert torch.equal(sampled(client, work, prompt)["samples"], batch_of_three[:1])


def test_the_content_of_a_latent_is_said_to_count_for_nothing(
    client: Client, work: Path, server: Server, batch_of_three: torch.Tensor
) -> None:
    prompt = with_latent_node(sampling_prompt(), "ProbeLatent", shape="1,16,1,8,8", fill="0.7")
    assert torch.equal(sampled(client, work, prompt)["samples"], batch_of_three[:1])
    assert "only the size and the batch of a latent count, not what it shows" in server.text()


def test_an_empty_latent_of_another_model_gives_its_size(client: Client, work: Path) -> None:
    """Core makes it this model's size by what the latent says of its pixels."""
    prompt = with_node(
        sampling_prompt(), BEFORE, "EmptyHunyuanVideo15Latent", width=96, height=64, length=1, batch_size=1
    )
    latent = sampled(client, work, changed(prompt, SAMPLE, latent=[BEFORE, 0]))
    assert latent["samples"].shape == (1, 16, 1, 8, 12)
    assert "downscale_ratio_spacial" not in latent


@pytest.mark.parametrize("downscale", [0, -8, float("nan"), "8", 1e9])
def test_an_absurd_downscale_is_refused(downscale: object) -> None:
    with pytest.raises(InputError, match="downscale_ratio_spacial is"):
        empty_as_qwen(torch.zeros(1, 128, 4, 4), downscale)


# Keys of a conditioning


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        ("ConditioningSetTimestepRange", dict(start=0.5, end=1.0), "start_percent 0.5, set by Conditioning"),
        ("ConditioningSetTimestepRange", dict(start=0.0, end=0.0), "end_percent 0.0, set by Conditioning"),
        (
            "ConditioningSetAreaStrength",
            dict(strength=0.0),
            "strength 0.0, set by ConditioningSetAreaStrength",
        ),
        (
            "ConditioningSetArea",
            dict(width=64, height=64, x=0, y=0, strength=1.0),
            "area, set by ConditioningSetArea",
        ),
        (
            "FluxKontextMultiReferenceLatentMethod",
            dict(reference_latents_method="offset"),
            "asks for the reference method 'offset'; this checkpoint was trained with 'index'",
        ),
        (
            "FluxKontextMultiReferenceLatentMethod",
            dict(reference_latents_method="index_timestep_zero"),
            "asks for the reference method 'index_timestep_zero'; this checkpoint was trained with 'index'",
        ),
    ],
)
def test_what_core_obeys_and_we_do_not_is_refused(
    client: Client, node: str, inputs: dict[str, Any], said: str
) -> None:
    assert said in message(client, with_conditioning_node(node, **inputs))


def test_a_mask_on_the_prompt_is_refused(client: Client) -> None:
    inputs = dict(mask=["mask", 0], strength=1.0, set_cond_area="default")
    prompt = with_conditioning_node("ConditioningSetMask", **inputs)
    prompt = with_node(prompt, "mask", "SolidMask", value=0.0, width=64, height=64)
    assert "has mask, set by ConditioningSetMask" in message(client, prompt)
    succeed(client, changed(prompt, "mask", value=1.0))


@pytest.mark.parametrize(
    ("checkpoint", "method"), [("tiny", "index"), ("zero_cond_t", "index_timestep_zero")]
)
def test_the_reference_method_of_the_checkpoint_is_accepted(
    client: Client, checkpoint: str, method: str
) -> None:
    node = "FluxKontextMultiReferenceLatentMethod"
    succeed(client, with_conditioning_node(node, checkpoint, reference_latents_method=method))


def test_keys_without_effect_are_said_once(client: Client, server: Server) -> None:
    prompt = with_conditioning_node("FluxGuidance", guidance=3.5)
    for seed in (1, 2):
        succeed(client, changed(prompt, SAMPLE, seed=seed))
    assert server.text().count("guidance in a conditioning is not used by this sampler") == 1


def conditioning(**extras: Any) -> list[list[Any]]:
    return [[torch.ones(1, 3, 128), extras]]


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("start_percent", [0, 0.0], [0.001, float("nan"), "0"]),
        ("end_percent", [1, 1.0], [0.999, float("nan")]),
        ("clip_start_percent", [0.0], [0.5]),
        ("clip_end_percent", [1.0], [0.5]),
        ("strength", [1, 1.0], [0.0, 2.0]),
        ("area", [], [(8, 8, 0, 0), ("percentage", 1.0, 1.0, 0, 0)]),
        ("mask", [torch.ones(1, 8, 8)], [torch.zeros(1, 8, 8), "mask"]),
        ("mask_strength", [0.5, 1, 2.0], [0, 0.0, -1.0]),
        ("timestep_start", [], [999.0]),
        ("timestep_end", [], [0.0]),
        ("control", [], [object()]),
        ("hooks", [[]], [object(), [1]]),
        ("gligen", [], [("position", None, [])]),
        ("noise_concat", [], [torch.zeros(1, 16, 1, 4, 4)]),
        ("model_conds", [{}], [{"c_concat": 1}]),
    ],
)
def test_each_key_is_refused_but_where_it_changes_nothing(
    key: str, neutral: list[Any], other: list[Any]
) -> None:
    for value in [None, *neutral]:
        from_conditioning(conditioning(**{key: value}), "positive", 128)
    for value in other:
        with pytest.raises(InputError, match=f"The negative conditioning has {key}.*set by"):
            from_conditioning(conditioning(**{key: value}), "negative", 128)


def test_what_core_itself_sets_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    known = dict(pooled_output=torch.zeros(1, 8), default=True, mask_strength=0.5, image_size=(64, 64))
    with caplog.at_level(logging.DEBUG):
        from_conditioning(conditioning(**known), "positive", 128)
    assert not caplog.records


@pytest.mark.parametrize("method", ["index", "index_timestep_zero", "offset", "uxo", "negative_index", 3])
def test_a_reference_method_only_matters_with_references(method: object) -> None:
    asked = conditioning(reference_latents_method=method)
    from_conditioning(asked, "positive", 128)
    asked[0][1]["reference_latents"] = [torch.ones(1, 16, 1, 4, 4)]
    for own in ReferenceMethod:
        if own.value == method:
            from_conditioning(asked, "positive", 128, own)
        else:
            with pytest.raises(InputError, match="asks for the reference method"):
                from_conditioning(asked, "positive", 128, own)


@pytest.mark.parametrize(
    "given",
    [
        "cat",
        5,
        None,
        {},
        [],
        ["cat"],
        [5],
        [[]],
        [[torch.ones(1, 3, 128)]],
        [[torch.ones(1, 3, 128), None]],
        [[None, {}]],
        [["cat", {}]],
        [[torch.ones(1, 3, 128).to_sparse(), {}]],
        [[torch.ones(1, 3, 128), {"reference_latents": torch.ones(1, 16, 1, 4, 4)}]],
        [[torch.ones(1, 3, 128), {"reference_latents": ["cat"]}]],
        [[torch.ones(1, 3, 128), {"attention_mask": "all"}]],
        [[torch.ones(1, 3, 128), {"attention_mask": torch.tensor([[0.3, 1.0, 1.0]])}]],
    ],
)
def test_a_malformed_conditioning_is_words(given: Any) -> None:
    with pytest.raises(InputError, match="positive conditioning"):
        from_conditioning(given, "positive", 128)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn]
)
def test_embeddings_of_any_dtype_sample(tiny: Checkpoint, dtype: torch.dtype) -> None:
    condition = from_conditioning([(torch.ones(1, 3, 128).to(dtype), {})], "positive", 128)
    replica = replica_for(tiny, "transformer")
    plan = prepare_run(
        replica, {POSITIVE: condition}, steps=1, true_cfg_scale=1.0, width=32, height=32, seed=0
    )
    assert sample(loading.load(replica), plan).isfinite().all()


# Limits


def test_more_than_ten_pictures_are_counted_before_they_are_encoded(client: Client, server: Server) -> None:
    prompt = with_node(edit_prompt(), BEFORE, "RepeatImageBatch", image=[PHOTO, 0], amount=11)
    error = fail(client, changed(prompt, ENCODE, **{"images.image0": [BEFORE, 0]}))
    assert "There are 11 pictures; one edit takes up to 10." in error["exception_message"]
    few = changed(changed(prompt, BEFORE, amount=4), ENCODE, **{"images.image0": [BEFORE, 0]})
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
    """diffusers' own table is the judge. size: pixels; references: latents."""
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
    assert said in message(client, linked(prompt, node, name, value), node)


def test_whole_numbers_of_another_type_work(client: Client) -> None:
    succeed(client, linked(changed(edit_prompt(), SAMPLE, cfg=1.0), SAMPLE, "steps", 1.0))
    succeed(client, linked(changed(edit_prompt(), SAMPLE, steps=1), SAMPLE, "cfg", 2))


def test_a_number_typed_as_text_is_checked_too(client: Client) -> None:
    """ComfyUI turns a widget's "nan" into NaN, which is neither below the minimum nor above the maximum."""
    assert "cfg is nan" in message(client, changed(edit_prompt(), SAMPLE, cfg="nan"))


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
    told = message(client, changed(edit_prompt(), ENCODE, **{branch: text}), ENCODE)
    assert told.startswith("The negative prompt " if branch == "negative_prompt" else "The prompt ")
    assert said in told


def test_odd_but_sound_prompts_work(client: Client) -> None:
    for text in ("a \0 hat", "\U0001f431 <|cat|> <image>", "\u200f\u0645"):
        succeed(client, changed(edit_prompt(), ENCODE, prompt=text))


def test_half_a_character_is_found_without_an_encoder() -> None:
    assert require_text("\U0001f431", "The prompt") == "\U0001f431"
    with pytest.raises(InputError, match=r"The prompt holds half of a character .* at position 2"):
        require_text("a\udc31", "The prompt")
