"""Sizes, packing, schedules, guidance and the loop."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import replica_for, replica_on
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from engine.cards.card import Card
from engine.errors import InputError, NonFiniteError
from engine.files.checkpoint import Checkpoint
from engine.latents import draw_noise, output_size, pack, pad_to_patches, require_latents, unpack
from engine.models import loading
from engine.progress import StepTimer, before_each_block, blocks
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition, from_conditioning
from engine.sampling.denoise import denoise, true_cfg
from engine.sampling.sampling import prepare_run, sample
from engine.sampling.schedule import Schedule, dynamic_shift, make_schedule
from engine.units import GIB
from engine.weights.room import DoesNotFitError


def condition(references: int = 0, size: tuple[int, int] = (4, 4), tokens: int = 5) -> Condition:
    generator = torch.Generator().manual_seed(tokens)
    latents = tuple(torch.randn(1, 16, 1, *size, generator=generator) for _ in range(references))
    return Condition(torch.randn(1, tokens, 128, generator=generator), None, latents)


def plan(checkpoint: Checkpoint, **changes):
    arguments = dict(steps=2, true_cfg_scale=4.0, width=32, height=32, seed=0) | changes
    conditions = {POSITIVE: condition(references=1), NEGATIVE: condition(references=1, tokens=3)}
    return prepare_run(replica_for(checkpoint, "transformer"), conditions, **arguments)


def test_a_run_that_cannot_fit_says_what_would(real_size: Checkpoint) -> None:
    """`int8` with FP32 arithmetic on a P40: 12.7 GiB of weights, and 9.2 to work with for 16 megapixels."""
    card = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)
    replica = replica_on(card, real_size, "transformer", "int8")
    pictures = condition(references=2, size=(128, 128))
    run = prepare_run(
        replica, {POSITIVE: pictures}, steps=2, true_cfg_scale=1.0, width=4096, height=4096, seed=0
    )
    run.require_room(22 * GIB)
    told = (
        r"Sampling 4096x4096 with 2 reference pictures takes 12.7 GiB .* on gpu:0 \(Tesla P40\) and 9.\d GiB"
    )
    with pytest.raises(
        DoesNotFitError, match=told + r".* can give 21.0 GiB\. What would fit: (.*)"
    ) as refused:
        run.require_room(21 * GIB)
    assert re.search(
        r"fit: 3\d\d\dx3\d\d\d, or no reference picture, or precision nf4\.$", str(refused.value)
    )
    with pytest.raises(DoesNotFitError, match="Choose a bigger card, or cpu"):
        run.require_room(GIB)
    unfused = replace(replica, card=replace(card, unfused=frozenset({("transformer", torch.float32)})))
    small = replace(run, replica=unfused, height=64, width=64)  # 9 thousand tokens
    with pytest.raises(DoesNotFitError, match=r"no fused attention kernel.*1 reference picture"):
        small.require_room(23.4 * GIB)
    replace(small, replica=replica).require_room(23.4 * GIB)


def test_packing_is_diffusers_packing_and_comes_back() -> None:
    latents = torch.randn(2, 16, 1, 6, 10)
    assert torch.equal(pack(latents), QwenImageEditPlusPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


def test_noise_is_what_diffusers_draws() -> None:
    noise = torch.cat(list(draw_noise((6, 10), 42, range(2))))
    generator = torch.Generator("cpu").manual_seed(42)
    for picture in noise.split(1):
        assert torch.equal(picture, torch.randn((1, 1, 16, 6, 10), generator=generator).transpose(1, 2))


def test_normalising_comes_back(tiny: Checkpoint) -> None:
    statistics, raw = tiny.latent_statistics(), torch.randn(1, 16, 1, 4, 4) * 3
    assert torch.allclose(statistics.denormalize(statistics.normalize(raw)), raw, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "image", "expected"),
    [
        ((0, 0), None, (1024, 1024)),
        ((0, 0), (1000, 667), (1248, 832)),
        ((0, 0), (1920, 1080), (1376, 768)),
        ((0, 0), (1368, 768), (1376, 768)),  # the size core's reference of 1920x1080 has
        ((640, 0), (200, 100), (640, 320)),
        ((0, 640), (200, 100), (1280, 640)),
        ((650, 650), (200, 100), (640, 640)),
    ],
)
def test_output_size(
    asked: tuple[int, int], image: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert output_size(*asked, image) == expected


@pytest.mark.parametrize("asked", [(16, 512), (8192, 512), (4096, 16), (1, 1)])
def test_absurd_sizes_are_refused(asked: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{asked[0]}x{asked[1]} pixels; each side must be 32 to 4096"):
        output_size(*asked, None)


@pytest.mark.parametrize("steps", [2, 8, 40])
@pytest.mark.parametrize("tokens", [64, 4096, 8192])
def test_the_schedule_is_the_checkpoints(tiny: Checkpoint, steps: int, tokens: int) -> None:
    config = tiny.component("scheduler").config()
    schedule = make_schedule(config, steps, tokens)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny.folder / "scheduler")
    sigmas = [1 - index * (1 - 1 / steps) / (steps - 1) for index in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, mu=dynamic_shift(config, tokens))
    assert torch.allclose(schedule.sigmas, scheduler.sigmas, atol=1e-7)
    assert float(schedule.sigmas[-2]) == pytest.approx(config["shift_terminal"], abs=1e-6)
    assert (float(schedule.sigmas[0]), float(schedule.sigmas[-1])) == (1.0, 0.0)
    assert torch.equal(schedule.timesteps, schedule.sigmas[:-1] * 1000 / 1000)


def test_one_step_goes_from_noise_to_the_end(tiny: Checkpoint) -> None:
    assert make_schedule(tiny.component("scheduler").config(), 1, 4096).sigmas.tolist() == [1.0, 0.0]


def test_no_steps_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(InputError, match="steps is 0"):
        make_schedule(tiny.component("scheduler").config(), 0, 4096)


def test_guidance_keeps_each_tokens_norm() -> None:
    positive, negative = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
    guided = true_cfg(positive, negative, 4.0)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(true_cfg(positive, negative, 1.0), positive, atol=1e-5)
    assert bool(true_cfg(torch.zeros(1, 6, 64), torch.zeros(1, 6, 64), 4.0).isfinite().all())


class Recorder:
    """Predicts a constant velocity and records what it was called with."""

    def __init__(self, *branches: str):
        self.asked: list[int] = []
        self._branches = branches

    def predict(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        self.asked.append(step)
        velocities = {POSITIVE: 1.0, NEGATIVE: 0.5}
        return {branch: torch.full_like(latents, velocities[branch]) for branch in self._branches}


CPU = torch.device("cpu")
SCHEDULE = Schedule(torch.tensor([1.0, 0.75, 0.5, 0.0]), torch.tensor([1.0, 0.75, 0.5]))


def test_euler_follows_a_constant_velocity_exactly() -> None:
    start = torch.randn(1, 4, 64)
    assert torch.allclose(denoise(Recorder(POSITIVE).predict, start, SCHEDULE, 4.0), start - 1.0)


def test_guidance_is_used_where_both_branches_are_predicted() -> None:
    """Guidance of any scale is rescaled to the norm of the positive prediction, which is 1."""
    recorder = Recorder(POSITIVE, NEGATIVE)
    guided = denoise(recorder.predict, torch.zeros(1, 4, 64), SCHEDULE, 4.0)
    assert recorder.asked == [0, 1, 2] and torch.allclose(guided, -torch.ones(1, 4, 64))
    opposed = denoise(recorder.predict, torch.zeros(1, 4, 64), SCHEDULE, -4.0)
    assert torch.allclose(opposed, torch.ones(1, 4, 64))  # 0.5 - 4 * 0.5 points the other way


def test_the_loop_goes_on_at_a_later_step() -> None:
    recorder = Recorder(POSITIVE)
    end = denoise(recorder.predict, torch.zeros(1, 4, 64), SCHEDULE, 1.0, first_step=2)
    assert recorder.asked == [2] and torch.allclose(end, torch.full((1, 4, 64), -0.5))


def test_a_step_callback_can_stop_the_run() -> None:
    recorder = Recorder(POSITIVE)

    def stop(state) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(recorder.predict, torch.zeros(1, 4, 64), SCHEDULE, 1.0, stop)
    assert len(recorder.asked) == 1


def test_the_run_stops_at_the_step_that_went_wrong(tiny: Checkpoint) -> None:
    transformer, steps = loading.load(replica_for(tiny, "transformer")), []

    def break_later(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("nan") if steps else None

    with (
        transformer.model.proj_out.register_forward_hook(break_later),
        pytest.raises(NonFiniteError, match=r"Step 2 of 3: the positive prediction.*transformer fp32 on cpu"),
    ):
        sample(transformer, plan(tiny, steps=3), lambda done, *_: steps.append(done))
    assert steps == [1]


def test_sampling_twice_is_bit_identical_and_a_seed_matters(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    first, second = sample(transformer, plan(tiny)), sample(transformer, plan(tiny))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(transformer, plan(tiny, seed=1)))


def test_a_batch_holds_what_single_runs_with_the_same_noise_give(tiny: Checkpoint) -> None:
    transformer = loading.load(replica_for(tiny, "transformer"))
    batch = sample(transformer, plan(tiny, samples=torch.zeros(2, 16, 1, 4, 4)))
    assert batch.shape == (2, 16, 1, 4, 4)
    assert torch.equal(batch[:1], sample(transformer, plan(tiny)))
    assert not torch.equal(batch[0], batch[1])


def test_progress_counts_every_pictures_steps(tiny: Checkpoint) -> None:
    seen = []
    sample(
        loading.load(replica_for(tiny, "transformer")),
        plan(tiny, samples=torch.zeros(2, 16, 1, 4, 4)),
        lambda done, total, denoised: seen.append((done, total, tuple(denoised.shape))),
    )
    assert seen == [(done, 4, (1, 16, 1, 4, 4)) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize("shape", [(1, 16, 5, 7), (1, 16, 1, 5, 7), (3, 4, 5, 7)])
def test_a_latent_gives_size_and_batch_odd_sizes_too(tiny: Checkpoint, shape: tuple[int, ...]) -> None:
    """Core's Empty Latent Image has four channels of zeros."""
    latents = sample(loading.load(replica_for(tiny, "transformer")), plan(tiny, samples=torch.zeros(shape)))
    assert latents.shape == (shape[0], 16, 1, 5, 7)


@pytest.mark.parametrize(
    "shape", [(1, 4, 8, 8), (1, 128, 8, 8), (1, 16, 3, 8, 8), (16, 8, 8), (1, 16, 1, 0, 8)]
)
def test_latents_of_other_models_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(batch, 16, 1, height/8, width/8\)"):
        require_latents(torch.ones(shape), "The latent")


def test_odd_references_are_padded_as_core_pads() -> None:
    latents = torch.arange(15.0).view(1, 1, 1, 3, 5)
    padded = pad_to_patches(latents)
    assert padded.shape == (1, 1, 1, 4, 6)
    assert torch.equal(padded[..., :3, :5], latents)
    assert torch.equal(padded[..., 3, :5], latents[..., 0, :])
    assert torch.equal(padded[..., :3, 5], latents[..., 0])


def test_a_mask_only_cuts_padding() -> None:
    embeds = torch.randn(1, 4, 128)
    trimmed = from_conditioning([[embeds, {"attention_mask": torch.tensor([[1, 1, 1, 0]])}]], "positive", 128)
    assert torch.equal(trimmed.prompt_embeds, embeds[:, :3]) and trimmed.mask is None
    holed = from_conditioning([[embeds, {"attention_mask": torch.tensor([[1, 0, 1, 0]])}]], "positive", 128)
    assert holed.mask is not None and holed.mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ([], "0 entries"),
        ([[torch.ones(1, 3, 128), {}]] * 2, "2 entries"),
        ([[torch.ones(1, 3, 64), {}]], "64 wide, this transformer takes 128"),
        ([[torch.ones(3, 128), {}]], r"shape \(3, 128\)"),
        ([[torch.ones(1, 3, 128), {"attention_mask": torch.ones(1, 2)}]], "attention_mask has shape"),
        (
            [[torch.ones(1, 3, 128), {"reference_latents": [torch.ones(1, 4, 8, 8)]}]],
            "Reference latent 1 of the positive",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(conditioning: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_conditioning(conditioning, "positive", 128)


def test_a_batch_of_references_is_several(tiny: Checkpoint) -> None:
    """Core's text encode makes such references from a batch of pictures."""
    extras = {"reference_latents": [torch.zeros(2, 16, 1, 4, 6)]}
    batched = from_conditioning([[torch.ones(1, 3, 128), extras]], "positive", 128)
    assert [tuple(latent.shape) for latent in batched.reference_latents] == [(1, 16, 1, 4, 6)] * 2
    assert batched.image_size == (48, 32)


def test_nan_in_conditioning_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="positive conditioning"):
        from_conditioning([[torch.full((1, 3, 128), float("nan")), {}]], "positive", 128)


def test_the_log_tells_seconds_a_step_and_time_left() -> None:
    times = iter([0.0, 100.0, 104.0, 187.5, 275.0])
    timer = StepTimer(lambda: next(times))
    assert timer.line(1, 4) == "step 1/4, 100 s/step, 5 min 0 s left"  # with what is set up once
    assert timer.line(2, 4) is None  # 4 seconds later
    assert timer.line(3, 4) == "step 3/4, 43.8 s/step, 44 s left"
    assert timer.line(4, 4) == "step 4/4, 58.3 s/step, done"


def test_a_forward_can_be_stopped_before_any_block(tiny: Checkpoint) -> None:
    transformer, asked = loading.load(replica_for(tiny, "transformer")), []

    def stop_before_the_second() -> None:
        asked.append(len(asked))
        if len(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_each_block(transformer.model, CPU, stop_before_the_second):
        sample(transformer, plan(tiny))
    assert asked == [0, 1]
    sample(transformer, plan(tiny))  # and nothing is left in it
    assert asked == [0, 1]
    encoder, autoencoder = (loading.load(replica_for(tiny, role)) for role in ("text_encoder", "vae"))
    assert [len(blocks(model)) for model in (transformer.model, encoder.model, autoencoder.model)] == [
        2,
        4,
        29,
    ]
