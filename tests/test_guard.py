"""Instead of a black image there is an error: the step, the module, its range, and what to change."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from conftest import replica_for, replica_on
from engine.cards.card import Card
from engine.errors import NonFiniteError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.models import loading, vae
from engine.models.guard import GUARDS, OFF, STOP, WARN, Guard
from engine.models.trace import FP16_MAX, Culprit, find_culprit
from engine.sampling.conditioning import NEGATIVE, POSITIVE
from engine.sampling.denoise import denoise
from engine.sampling.options import SamplingOptions
from engine.sampling.schedule import Schedule
from engine.sampling.workers import LocalWorker
from engine.weights.adapters import Adapter
from engine.weights.precision import ROLE_PRECISIONS
from PIL import Image
from prompts import SAMPLE, changed, edit_prompt, fail, succeed
from safetensors.torch import load_file, save_file
from test_lora import factors, lightx2v, opened
from test_sampling import condition
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.client import Client
from launcher.server import Server

SCHEDULE = Schedule(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5]))
OVERFLOWING = "transformer_blocks.1.img_mlp.net.2"
P40 = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=2**35)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A transformer of three blocks, whose second exceeds FP16's range."""
    folder = tmp_path_factory.mktemp("overflowing") / "tiny"
    return open_checkpoint(tiny_checkpoint.build(folder, layers=3, overflow_block=1))


def worker_for(checkpoint: Checkpoint, precision: str, guard: str = STOP) -> LocalWorker:
    replica = replica_for(checkpoint, "transformer", precision)
    conditions = {POSITIVE: condition(references=1), NEGATIVE: condition(tokens=3)}
    return LocalWorker(loading.load(replica), SCHEDULE, (4, 4), conditions, guard)


def run(worker: LocalWorker) -> torch.Tensor:
    latents = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    return denoise(worker.predict, latents, SCHEDULE, 4.0)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def poison(model: torch.nn.Module, weight: str) -> None:
    """Put a NaN into the weight of that name."""
    with torch.inference_mode():
        model.get_parameter(weight).view(-1)[0] = float("nan")


# The loop


def test_fp16_stops_at_the_first_step_and_names_the_module_that_overflowed(overflowing: Checkpoint) -> None:
    worker = worker_for(overflowing, "fp16")
    with pytest.raises(NonFiniteError) as caught:
        run(worker)
    message = str(caught.value)
    assert message.startswith("Step 1 of 2: the positive prediction ")
    assert (
        f"transformer fp16 on cpu. First to break: {OVERFLOWING} (Linear) was given values up to" in message
    )
    assert message.endswith("Set its precision to fp32 or int8, and math to fp32: safe on every card.")
    assert hooks(worker.model) == 0


def test_what_fp16_clips_is_found_though_the_prediction_is_finite(overflowing: Checkpoint) -> None:
    latents = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    assert bool(worker_for(overflowing, "fp16", OFF).predict(latents, 0)[POSITIVE].isfinite().all())
    with pytest.raises(NonFiniteError, match=r"was clipped to FP16's limit of 65504 inside.* would be wrong"):
        run(worker_for(overflowing, "fp16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int8-fast"])
def test_the_same_checkpoint_completes_at_precisions_with_fp32s_range(
    overflowing: Checkpoint, precision: str
) -> None:
    worker = worker_for(overflowing, precision)
    largest: list[float] = []
    net = worker.model.get_submodule(OVERFLOWING)
    handle = net.register_forward_hook(lambda m, args, output: largest.append(float(output.abs().max())))
    assert bool(run(worker).isfinite().all())
    handle.remove()
    assert len(largest) == 4 and min(largest) > FP16_MAX


def test_a_warning_comes_once_a_run_in_the_errors_words_and_the_run_goes_on(
    overflowing: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(worker_for(overflowing, "fp16"))
    with caplog.at_level(logging.WARNING, "FireRed"):
        warned = run(worker_for(overflowing, "fp16", WARN))
    assert [record.getMessage() for record in caplog.records] == [str(caught.value)]
    caplog.clear()
    assert torch.equal(run(worker_for(overflowing, "fp16", OFF)), warned)
    assert not caplog.records


def test_the_guard_changes_no_bit_of_a_good_run(tiny: Checkpoint) -> None:
    results = [run(worker_for(tiny, "fp16", level)) for level in GUARDS]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_trouble_that_does_not_repeat_is_called_that(tiny: Checkpoint) -> None:
    worker = worker_for(tiny, "fp32")
    model, calls = worker.model, []

    def flip(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else None

    with model.proj_out.register_forward_hook(flip), pytest.raises(NonFiniteError) as caught:
        run(worker)
    message = str(caught.value)
    assert message.startswith(
        "Step 2 of 2: the positive prediction holds 256 NaN and 0 infinite values of 256"
    )
    assert "What it computed before stayed within" in message
    assert "A traced repeat stayed finite, so this is not reproducible: suspect the card" in message
    assert "Set its precision" not in message and len(calls) == 4


# The trace


def test_the_traced_forward_is_the_same_forward_and_finds_nothing_in_a_good_one(tiny: Checkpoint) -> None:
    worker = worker_for(tiny, "int8")
    model, latents, seen = worker.model, torch.randn(1, 4, 64), []
    expected = worker.predict(latents, 0)[NEGATIVE]
    assert find_culprit(model, lambda: seen.append(worker.predict(latents, 0)[NEGATIVE])) is None
    assert torch.equal(seen[0], expected) and hooks(model) == 0


class Scaled(torch.nn.Module):
    """A module that computes between its two parts, of which the second works in place."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.before, self.after = scale, torch.nn.RMSNorm(8), torch.nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.after(self.before(x) * self.scale * self.scale)


def test_arithmetic_between_modules_is_blamed_on_the_module_around_it() -> None:
    model = torch.nn.ModuleDict({"small": Scaled(10), "big": Scaled(1e30)})
    x, mask = torch.randn(2, 8).clamp(-3, 3), torch.full((2, 2), float("-inf"))

    def forward() -> None:
        model["big"](model["small"](x, attention_mask=mask), attention_mask=mask)

    culprit = find_culprit(model, forward)
    assert culprit is not None and (culprit.name, culprit.kind) == ("big", "Scaled")
    assert 50 < culprit.largest_in < 1000 and not culprit.given_bad


def test_inputs_that_are_bad_already_blame_no_module(tiny: Checkpoint) -> None:
    worker = worker_for(tiny, "fp32", OFF)
    latents = torch.full((1, 4, 64), float("inf"))
    culprit = find_culprit(worker.model, lambda: worker.predict(latents, 0))
    assert culprit is not None and culprit.given_bad and culprit.name == ""
    assert str(culprit).startswith("the model itself (QwenImageTransformer) was given NaN or infinity")


def test_a_failing_forward_leaves_no_hook_behind(tiny: Checkpoint) -> None:
    worker = worker_for(tiny, "fp32")
    with pytest.raises(RuntimeError):
        find_culprit(worker.model, lambda: worker.predict(torch.ones(1, 4, 63), 0))
    assert hooks(worker.model) == 0


def test_bitsandbytes_int8_without_a_threshold_is_traced_to_the_linear_that_took_the_big_value(
    tiny: Checkpoint,
) -> None:
    """With threshold 0 everything goes through FP16, where a value above 65504 makes its row NaN."""
    replica = replica_on(P40, tiny, "transformer", "int8-bnb")
    worker = LocalWorker(loading.load(replica), SCHEDULE, (4, 4), {POSITIVE: condition()})
    block = worker.model.block(1)
    block.img_mlp.net[0].proj._state.SCB.mul_(3e5)
    latents = torch.randn(1, 4, 64)
    predict = functools.partial(worker.predict, latents, 0)
    assert find_culprit(worker.model, predict) is None
    block.img_mlp.net[2]._state.threshold = 0.0
    with pytest.raises(
        NonFiniteError, match=r"int8-bnb, fp32 and fp16 math,.*Set its precision to fp32 or"
    ) as e:
        denoise(worker.predict, latents, SCHEDULE, 1.0)
    assert "transformer_blocks.1.img_mlp.net.2 (Int8BnbLinear) was given values up to" in str(e.value)


# The other components


def test_a_nan_weight_in_the_vae_decoder_is_named(tiny: Checkpoint) -> None:
    autoencoder = loading.load(replica_for(tiny, "vae"))
    poison(autoencoder.model, "decoder.mid_block.resnets.1.conv2.weight")
    raw = torch.zeros(1, 16, 1, 4, 4)

    with pytest.raises(NonFiniteError) as caught:
        vae.decode(autoencoder, raw)
    assert "vae fp32 on cpu. First to break: decoder.mid_block.resnets.1.conv2 (FrameConv)" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        "Its weight holds NaN or infinity: the file is damaged. Download the vae again."
    )


@pytest.mark.parametrize(
    "module", ["visual.blocks.1.mlp.down_proj", "language_model.layers.1.self_attn.o_proj"]
)
def test_a_nan_weight_in_the_text_encoder_is_named(tiny: Checkpoint, module: str) -> None:
    replica = replica_for(tiny, "text_encoder")
    encoder = loading.load(replica)
    poison(encoder.model, f"{module}.weight")
    with pytest.raises(
        NonFiniteError,
        match=rf"The prompt's embedding .*First to break: {module} \(UpcastLinear\).*Its weight holds NaN",
    ):
        encoder.encode("red hat", [Image.new("RGB", (64, 64), "red")])
    assert hooks(encoder.model) == 0


def test_a_weight_too_large_for_fp16_is_no_damaged_file(tiny_copy: Path) -> None:
    path = tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.weight"][0, 0] = 1e5
    save_file(tensors, path, {"format": "pt"})
    checkpoint = open_checkpoint(tiny_copy)
    with pytest.raises(NonFiniteError, match=r"First to break: proj_out .*Set its precision to fp32 or int8"):
        run(worker_for(checkpoint, "fp16"))
    assert bool(run(worker_for(checkpoint, "fp32")).isfinite().all())


def test_the_remedy_offers_what_the_component_has(tiny: Checkpoint) -> None:
    bad = torch.tensor([float("inf")])
    for role, remedy in (("vae", "to fp32:"), ("text_encoder", "to fp32 or int8:")):
        replica = replica_for(tiny, role, "bf16")
        with pytest.raises(NonFiniteError, match=f"Set its precision {remedy} safe on every card"):
            Guard(replica).check(bad, "It")
    assert set(ROLE_PRECISIONS["vae"]) == {"bf16", "fp32", "fp16"}


class Operations(TorchDispatchMode):
    """Records the names of the tensor operations on more than 8 values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(arg, torch.Tensor) and arg.numel() > 8 for arg in args):
            self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))


def test_a_lora_that_overflows_is_named(tiny: Checkpoint, tmp_path: Path) -> None:
    """Its own factors are finite, and so is the checkpoint: only together they are too much."""
    path = tmp_path / "wild.safetensors"
    lightx2v({name: (down * 1e18, up * 1e18) for name, (down, up) in factors(tiny).items()}, path)
    options = SamplingOptions(adapters=(Adapter(opened(tiny, path), 100.0),))
    transformer = loading.load(replica_for(tiny, "transformer"))
    worker = LocalWorker(transformer, SCHEDULE, (4, 4), {POSITIVE: condition()}, options=options)
    with pytest.raises(NonFiniteError, match=r"lower the strength of the LoRA \(wild at 100\)"):
        run(worker)


def test_checking_reads_a_good_prediction_once(tiny: Checkpoint) -> None:
    """So the guard takes less than 0.5 % of a step."""
    guard, tensor = Guard(replica_for(tiny, "transformer")), torch.randn(1, 4096, 64)
    with Operations() as operations:
        assert guard.check(tensor, "It") is tensor
    assert operations.names == ["aten.aminmax.default"]
    with pytest.raises(
        NonFiniteError, match=rf"stayed within {tensor.abs().max():.4g}\. First to break: a \(b"
    ):
        guard.check(tensor * float("nan"), "It", lambda: Culprit("a", "b", 1.0))


# The nodes


@pytest.fixture(scope="module")
def overflowing_name(work: Path) -> str:
    """The name of an overflowing checkpoint in the running ComfyUI."""
    return tiny_checkpoint.build(work / "models/diffusers/overflowing", layers=3, overflow_block=1).name


def test_the_sampler_node_stops_with_the_module_named(client: Client, overflowing_name: str) -> None:
    error = fail(client, changed(edit_prompt(overflowing_name), "1", precision="fp16"))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == (
        "FireRedSampler",
        "NonFiniteError",
    )
    assert error["exception_message"].startswith("Step 1 of 2: the positive prediction ")
    assert f"First to break: {OVERFLOWING} (Linear)" in error["exception_message"]
    succeed(client, changed(edit_prompt(overflowing_name), "1", precision="int8"))


def test_a_guard_that_only_warns_lets_the_run_finish(
    client: Client, server: Server, overflowing_name: str
) -> None:
    message, before = "Step 1 of 2: the positive prediction was clipped to FP16's limit", server.text()
    prompt = changed(edit_prompt(overflowing_name), "1", precision="fp16")
    succeed(client, changed(prompt, SAMPLE, guard="warn", seed=40))
    assert server.text().removeprefix(before).count(message) == 1
