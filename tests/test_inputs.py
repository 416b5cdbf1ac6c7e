"""What other nodes put into latents and conditioning is obeyed, refused or named in the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from engine.errors import InputError
from engine.files.checkpoint import Checkpoint
from engine.latents import QWEN_STATISTICS, draw_noise, empty_as_qwen, read_latent
from engine.models import loading
from engine.sampling.conditioning import POSITIVE, Condition, ReferenceMethod, from_conditioning
from engine.sampling.sampling import prepare_run, sample
from prompts import (
    DECODE,
    ENCODE,
    SAMPLE,
    SAVE,
    changed,
    edit_prompt,
    failure,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)

from launcher.client import Client, Prompt
from launcher.server import Server

EMPTY, BEFORE, NUMERICS = "21", "22", "23"


def sampling_prompt(batch: int = 1) -> Prompt:
    """The edit in one step, with an empty latent of that batch size and without decoding."""
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
    assert picked["batch_index"] == [2]  # core's KSampler keeps it too


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
    """The name of a run depends on the draws that its pictures start from."""
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
    """The noise of a huge batch is never in memory as a whole, and the first draw needs no other."""
    draws = read_latent({"samples": torch.zeros(1, 16, 1, 1).expand(200_000, 16, 1, 1)}).draws
    first = torch.randn((1, 1, 16, 128, 128), generator=torch.Generator().manual_seed(1))
    assert torch.equal(next(draw_noise((128, 128), 1, draws)), first.transpose(1, 2))


# A latent's mask, content and size


def test_a_mask_on_an_empty_latent_is_refused(client: Client) -> None:
    """There is nothing that could stay outside of it. The numerics node only takes the size."""
    prompt = with_node(sampling_prompt(), "mask", "SolidMask", value=0.0, width=64, height=64)
    prompt = with_latent_node(prompt, "SetLatentNoiseMask", samples=[EMPTY, 0], mask=["mask", 0])
    assert "there is a noise mask, but the latent is empty" in failure(client, prompt)
    inputs = dict(transformer=["1", 0], positive=[ENCODE, 0], latent=[BEFORE, 0], steps=1, look_at="1")
    del prompt[SAMPLE], prompt["keep_sampled"]
    succeed(client, with_node(prompt, NUMERICS, "FireRedNumerics", **inputs))


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
    """Core resizes it for this model, because the latent says how many pixels a side of it stands for."""
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
    assert said in failure(client, with_conditioning_node(node, **inputs))


def test_a_mask_on_the_prompt_is_refused(client: Client) -> None:
    inputs = dict(mask=["mask", 0], strength=1.0, set_cond_area="default")
    prompt = with_conditioning_node("ConditioningSetMask", **inputs)
    prompt = with_node(prompt, "mask", "SolidMask", value=0.0, width=64, height=64)
    assert "has mask, set by ConditioningSetMask" in failure(client, prompt)
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


@pytest.mark.parametrize("size", [(float("inf"), 1), (float("nan"), 1), (0, 1), (1,), "big", 5])
def test_a_size_that_is_none_is_taken_for_another_packs_key(size: object) -> None:
    assert from_conditioning(conditioning(image_size=size), "positive", 128).image_size is None


@pytest.mark.parametrize(
    "statistics",
    [([0.0] * 16, [0.0] * 16), ([float("inf")] * 16, [1.0] * 16), ([0.0] * 4, [1.0] * 4), "other", 5, [[]]],
)
def test_statistics_that_are_none_leave_the_checkpoints_own(statistics: object) -> None:
    read = from_conditioning(conditioning(latent_statistics=statistics), "positive", 128)
    assert read.statistics == QWEN_STATISTICS


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
