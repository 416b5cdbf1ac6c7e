"""LoRAs, the schedule and the guidance interval over a transformer that stays loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import replica_for
from engine.errors import InputError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading
from engine.sampling.conditioning import NEGATIVE, POSITIVE
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.sampling import sample
from engine.sampling.schedule import make_schedule
from engine.sampling.workers import LocalWorker
from engine.weights.adapters import Adapter
from prompts import SAMPLE, changed, edit_prompt, failure, keep_tensor, kept_tensor, succeed, with_node
from test_lora import factors, lightx2v, opened
from test_sampling import plan

from launcher.client import Client, Prompt, PromptRejected
from launcher.server import Server

LORA, SCHEDULE = "20", "21"
LOADED = "transformer fp32 on cpu loaded"


# The schedule


@pytest.mark.parametrize("steps", [4, 8])
def test_a_shift_of_three_is_the_schedule_that_lightning_was_trained_with(
    tiny: Checkpoint, steps: int
) -> None:
    """The scheduler of lightx2v's Qwen-Image-Lightning: a dynamic shift of log(3) at every size."""
    config = tiny.component("scheduler").config()
    lightning = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    )
    lightning.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(3))
    ours = make_schedule(config, steps, 4096, shift=3.0)
    assert torch.allclose(ours.sigmas, lightning.sigmas, atol=1e-6)
    assert torch.allclose(ours.timesteps * 1000, lightning.timesteps, atol=1e-3)


def test_with_a_shift_every_size_has_the_same_schedule(tiny: Checkpoint) -> None:
    """So that a second size finds the modulation of the first."""
    config = tiny.component("scheduler").config()
    one, other = (make_schedule(config, 8, tokens, shift=3.0) for tokens in (1024, 9000))
    assert torch.equal(one.timesteps, other.timesteps)
    dynamic = make_schedule(config, 8, 1024)
    assert not torch.equal(dynamic.timesteps, make_schedule(config, 8, 9000).timesteps)
    assert not torch.equal(dynamic.timesteps, one.timesteps)


# The guidance interval


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), [0, 1, 2, 3]),
        ((0.0, 0.5), [0, 1]),
        ((0.25, 0.75), [1, 2]),
        ((0.5, 0.5), []),
        ((0.9, 1.0), []),
    ],
)
def test_the_negative_branch_is_computed_in_the_interval_only(
    tiny: Checkpoint, interval: tuple[float, float], guided: list[int]
) -> None:
    options = SamplingOptions(guidance_from=interval[0], guidance_to=interval[1])
    run = plan(tiny, steps=4, options=options)
    assert (NEGATIVE in run.conditions) == bool(guided)
    transformer = loading.load(replica_for(tiny, "transformer"))
    worker = LocalWorker(transformer, run.schedule, run.padded_size, run.conditions, options=options)
    latents = torch.randn(1, 4, 64)
    branches = [set(worker.predict(latents, step)) for step in range(4)]
    assert branches == [{POSITIVE, NEGATIVE} if step in guided else {POSITIVE} for step in range(4)]


def test_a_run_without_any_guided_step_is_one_without_guidance(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    unguided = plan(tiny, true_cfg_scale=1.0)
    never = plan(tiny, options=SamplingOptions(guidance_to=0.0))
    assert never.name() == unguided.name()
    assert torch.equal(sample(transformer, never), sample(transformer, unguided))


def test_guidance_that_no_step_computes_is_told(tiny: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    plan(tiny, steps=2, options=SamplingOptions(guidance_from=0.6, guidance_to=0.9))
    assert "cfg 4 has no effect: none of the 2 steps is between guidance_from 0.6" in caplog.text


def test_an_interval_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(InputError, match=r"guidance_from \(0.5\) is after guidance_to \(0.4\)"):
        SamplingOptions(guidance_from=0.5, guidance_to=0.4)
    with pytest.raises(InputError, match=r"start \(1\) is after end \(0\)"):
        StepCacheOptions(0.1, start=1.0, end=0.0)


# Names of runs, and memory


def test_a_run_is_named_after_its_options(tiny: Checkpoint, tmp_path: Path) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for seed, path in enumerate(paths):
        lightx2v(factors(tiny, seed), path)
    one, other = (opened(tiny, path) for path in paths)
    options = [
        SamplingOptions(),
        SamplingOptions(adapters=(Adapter(one, 1.0),)),
        SamplingOptions(adapters=(Adapter(one, 0.9),)),
        SamplingOptions(adapters=(Adapter(other, 1.0),)),
        SamplingOptions(adapters=(Adapter(one, 1.0), Adapter(other, 1.0))),
        SamplingOptions(shift=3.0),
        SamplingOptions(guidance_to=0.5),
    ]
    runs = [plan(tiny, options=each) for each in options]
    assert len({run.name() for run in runs}) == len(runs)
    without = plan(tiny, options=SamplingOptions(adapters=(Adapter(one, 0.0),)))
    assert without.name() == runs[0].name()
    assert runs[1].working_bytes() - runs[0].working_bytes() == one.nbytes
    assert 0 < one.nbytes < paths[0].stat().st_size


# Through the server


@pytest.fixture(scope="module")
def lora(work: Path) -> str:
    folder = work / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(work / "models" / "diffusers" / "tiny")
    lightx2v(factors(checkpoint), folder / "style.safetensors")
    return "style.safetensors"


def with_lora(lora: str, strength: float, source: str = "1", node: str = LORA) -> Prompt:
    prompt = with_node(
        edit_prompt(), node, "FireRedLoadLoRA", transformer=[source, 0], strength=strength, lora=lora
    )
    return keep_tensor(changed(prompt, SAMPLE, transformer=[node, 0], resume="off"), [SAMPLE, 0], "latent")


def latents(client: Client, work: Path, prompt: Prompt) -> torch.Tensor:
    succeed(client, prompt)
    return kept_tensor(work, "latent")["samples"]


def test_a_lora_changes_the_picture_and_loads_nothing_again(
    client: Client, work: Path, server: Server, lora: str
) -> None:
    plain = keep_tensor(changed(edit_prompt(), SAMPLE, resume="off"), [SAMPLE, 0], "latent")
    without = latents(client, work, plain)
    loads = server.text().count(LOADED)
    assert loads
    whole, half, zero = (latents(client, work, with_lora(lora, strength)) for strength in (1.0, 0.5, 0.0))
    assert torch.equal(zero, without)
    assert not torch.equal(whole, without) and not torch.equal(half, whole)
    twice = with_node(
        with_lora(lora, 0.5), "22", "FireRedLoadLoRA", transformer=[LORA, 0], strength=0.5, lora=lora
    )
    chained = latents(client, work, changed(twice, SAMPLE, transformer=["22", 0]))
    assert torch.allclose(chained, whole, atol=1e-3)
    assert server.text().count(LOADED) == loads


def test_a_schedule_node_changes_the_steps(client: Client, work: Path, server: Server, lora: str) -> None:
    def prompt(**inputs: float) -> Prompt:
        linked = with_node(with_lora(lora, 1.0), SCHEDULE, "FireRedSchedule", transformer=[LORA, 0], **inputs)
        return changed(linked, SAMPLE, transformer=[SCHEDULE, 0])

    plain = latents(client, work, with_lora(lora, 1.0))
    assert torch.equal(latents(client, work, prompt()), plain)
    assert not torch.equal(latents(client, work, prompt(shift=3.0)), plain)
    assert not torch.equal(latents(client, work, prompt(guidance_to=0.5)), plain)


def test_a_replaced_lora_is_read_again(client: Client, work: Path, lora: str) -> None:
    path = work / "models" / "loras" / "replaced.safetensors"
    checkpoint = open_checkpoint(work / "models" / "diffusers" / "tiny")
    lightx2v(factors(checkpoint, seed=5), path)
    first = latents(client, work, with_lora(path.name, 1.0))
    lightx2v(factors(checkpoint, seed=6), path)
    assert not torch.equal(latents(client, work, with_lora(path.name, 1.0)), first)


@pytest.mark.parametrize(("strength", "message"), [(1e9, "bigger than max"), (-101, "smaller than min")])
def test_a_strength_out_of_bounds_is_refused(
    client: Client, lora: str, strength: float, message: str
) -> None:
    with pytest.raises(PromptRejected, match=message):
        client.run(with_lora(lora, strength))


def test_a_strength_that_is_no_number_is_refused_over_a_link(client: Client, lora: str) -> None:
    prompt = with_node(with_lora(lora, 1.0), "value", "ProbeValue", json="NaN")
    message = failure(client, changed(prompt, LORA, strength=["value", 0]), LORA)
    assert "strength is nan" in message


def test_a_lora_that_is_not_there_is_refused(client: Client, lora: str) -> None:
    with pytest.raises(PromptRejected, match="absent"):
        client.run(with_lora("absent.safetensors", 1.0))


def test_no_lora_at_all_is_told(client: Client, lora: str) -> None:
    assert "There is no LoRA chosen" in failure(client, changed(with_lora(lora, 1.0), LORA, lora=None), LORA)


def test_a_lora_of_another_model_says_so(client: Client, work: Path, lora: str) -> None:
    from safetensors.torch import save_file

    path = work / "models" / "loras" / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 64)}, path)
    assert "flux.safetensors is no LoRA for this transformer" in failure(
        client, with_lora(path.name, 1.0), LORA
    )


def test_a_run_with_a_lora_goes_on_where_it_stopped(tiny: Checkpoint, tmp_path: Path) -> None:
    from engine.files.cache import DiskCache
    from engine.sampling.resume import SavedRun

    lightx2v(factors(tiny), tmp_path / "style.safetensors")
    options = SamplingOptions(adapters=(Adapter(opened(tiny, tmp_path / "style.safetensors"), 1.0),))
    run = plan(tiny, steps=4, options=options)
    transformer = loading.load(replica_for(tiny, "transformer"))
    whole = sample(transformer, replace(run))
    store = DiskCache(tmp_path / "runs", 10**9)

    def stop(done: int, total: int, denoised: torch.Tensor) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(transformer, run, stop, saved=SavedRun(store, run.name()))
    seen: list[int] = []
    resumed = sample(transformer, run, lambda done, *_: seen.append(done), saved=SavedRun(store, run.name()))
    assert torch.equal(resumed, whole) and seen == [3, 4]
