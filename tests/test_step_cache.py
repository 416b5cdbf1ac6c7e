"""The step cache skips what is predictable, decides once for all branches, and survives an interruption."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.models import loading
from engine.sampling.conditioning import NEGATIVE, POSITIVE
from engine.sampling.denoise import denoise
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.resume import SavedRun
from engine.sampling.sampling import sample
from engine.sampling.schedule import Schedule
from engine.sampling.step_cache import StepCache
from prompts import SAMPLE, changed, edit_prompt, keep_tensor, kept_tensor, succeed, with_node
from test_sampling import plan

from launcher.client import Client, Prompt

STEPS = 20


def schedule(steps: int = STEPS) -> Schedule:
    sigmas = torch.linspace(1, 0, steps + 1)
    return Schedule(sigmas, sigmas[:-1])


class Field:
    """A velocity that changes smoothly with the latents; counts the steps it computes."""

    def __init__(self, bend: float = 0.3, guided: range = range(STEPS)):
        self.bend, self.guided, self.computed = bend, guided, list[int]()

    def __call__(self, latents: torch.Tensor, step: int) -> Mapping[str, torch.Tensor]:
        self.computed.append(step)
        velocity = 1 + self.bend * torch.sin(latents)
        return {POSITIVE: velocity} | ({NEGATIVE: 0.9 * velocity} if step in self.guided else {})


def cached(field: Field, threshold: float, start: float = 0.1, end: float = 1.0, **more: Any) -> StepCache:
    options = StepCacheOptions(threshold, start, end)
    return StepCache(field, schedule(), options, field.guided, **more)


def test_without_a_threshold_every_step_is_computed_and_the_result_is_the_same() -> None:
    noise = torch.randn(1, 8, 64)
    plain, field = denoise(Field(), noise, schedule(), 4.0), Field()
    cache = cached(field, 0.0)
    assert torch.equal(denoise(cache.predict, noise, schedule(), 4.0), plain)
    assert field.computed == list(range(STEPS)) and not cache.state()


def test_a_higher_threshold_skips_more_and_the_error_stays_small() -> None:
    noise = torch.randn(1, 8, 64)
    plain, computed = denoise(Field(), noise, schedule(), 4.0), []
    for threshold in (0.03, 0.1, 0.3):
        field = Field()
        cache = cached(field, threshold)
        result = denoise(cache.predict, noise, schedule(), 4.0)
        assert float((result - plain).norm() / plain.norm()) < threshold
        assert cache.skipped == STEPS - len(field.computed)
        computed.append(len(field.computed))
    assert STEPS > computed[0] > computed[1] > computed[2] >= 3


def test_steps_outside_the_part_and_the_last_are_computed() -> None:
    field = Field()
    denoise(cached(field, 10.0, start=0.3, end=0.6).predict, torch.randn(1, 8, 64), schedule(), 4.0)
    assert field.computed == [*range(6), *range(12, STEPS)]
    field = Field()
    denoise(cached(field, 10.0, start=0.0).predict, torch.randn(1, 8, 64), schedule(), 4.0)
    assert field.computed == [0, 1, STEPS - 1]


def test_a_branch_that_was_not_computed_is_never_extrapolated() -> None:
    """Guidance begins at step 8: two steps with both branches are needed before one may be skipped."""
    field = Field(guided=range(8, STEPS))
    cache = cached(field, 10.0)
    made = [set(cache.predict(torch.randn(1, 8, 64), step)) for step in range(STEPS)]
    assert made == [{POSITIVE}] * 8 + [{POSITIVE, NEGATIVE}] * (STEPS - 8)
    assert field.computed == [0, 1, 8, 9, STEPS - 1]


def test_predictions_that_are_not_finite_are_computed_every_time() -> None:
    field = Field()
    cache = StepCache(lambda x, step: {POSITIVE: field(x, step)[POSITIVE] * float("nan")}, schedule(),
                      StepCacheOptions(10.0))  # fmt: skip
    for step in range(STEPS):
        cache.predict(torch.randn(1, 8, 64), step)
    assert field.computed == list(range(STEPS))


@pytest.mark.parametrize("at", [1, 2, 3, 7, 12])
def test_an_interrupted_run_goes_on_in_the_same_bits(
    tiny: Checkpoint, tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    options = SamplingOptions(step_cache=StepCacheOptions(0.3, 0.1))
    run = plan(tiny, steps=16, options=options)
    with caplog.at_level(logging.INFO):
        whole = sample(transformer, run)
    (said,) = [record.getMessage() for record in caplog.records if "step cache" in record.message]
    assert said.startswith("the step cache computed ") and said.endswith(" of 16 steps")
    assert not torch.equal(whole, sample(transformer, plan(tiny, steps=16)))
    store = DiskCache(tmp_path, 10**9)

    def stop(done: int, total: int, denoised: torch.Tensor) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(transformer, run, stop, saved=SavedRun(store, run.name()))
    seen: list[int] = []
    resumed = sample(transformer, run, lambda done, *_: seen.append(done), saved=SavedRun(store, run.name()))
    assert seen == list(range(at + 1, 17)) and torch.equal(resumed, whole)


def test_several_pictures_each_have_a_cache_of_their_own(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    options = SamplingOptions(step_cache=StepCacheOptions(0.3, 0.1))
    both = plan(tiny, steps=8, options=options, samples=torch.zeros(2, 16, 4, 4))
    second = plan(tiny, steps=8, options=options, samples=torch.zeros(1, 16, 4, 4), draws=[1])
    assert torch.equal(sample(transformer, both)[1:], sample(transformer, second))


def test_the_node_skips_steps_in_comfyui(client: Client, work: Path) -> None:
    def prompt(**inputs: float) -> Prompt:
        linked = with_node(edit_prompt(), "30", "FireRedStepCache", transformer=["1", 0], **inputs)
        linked = changed(linked, SAMPLE, transformer=["30", 0], resume="off", steps=8)
        return keep_tensor(linked, [SAMPLE, 0], "latent")

    def latents(prompt: Prompt) -> torch.Tensor:
        succeed(client, prompt)
        return kept_tensor(work, "latent")["samples"]

    plain = keep_tensor(changed(edit_prompt(), SAMPLE, resume="off", steps=8), [SAMPLE, 0], "latent")
    without = latents(plain)
    assert torch.equal(latents(prompt(threshold=0)), without)
    skipped = latents(prompt(threshold=0.5, start=0.1))
    assert not torch.equal(skipped, without) and bool(skipped.isfinite().all())
