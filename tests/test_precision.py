"""Each precision stores weights and computes as the user chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import replica_for, replica_on
from engine.cards.card import Card
from engine.errors import FireRedError, InputError, NonFiniteError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint
from engine.files.rotations import OURS
from engine.files.tensors import TensorTypes
from engine.models import loading
from engine.models.guard import Guard, require_finite_input
from engine.models.transformer import Transformer, rotary_embedding
from engine.numerics.ranges import judge
from engine.planning.machine import Device, Machine
from engine.planning.planner import Choice, make_plan
from engine.sampling.conditioning import POSITIVE
from engine.sampling.schedule import Schedule
from engine.sampling.workers import LocalWorker
from engine.units import GIB
from engine.weights.components import ComponentSpec
from engine.weights.estimates import ESTIMATE_ERROR
from engine.weights.formats import QuantizedLinear, bitsandbytes, int8_paths
from engine.weights.formats.int8_math import dequantize, quantize_rows, quantize_tokens
from engine.weights.formats.int8_paths import choose_path, fastest_path, integer_paths
from engine.weights.precision import PRECISIONS, ROLE_PRECISIONS, Precision, resolve
from engine.weights.room import DoesNotFitError, at_precision, require_fit, working_bytes
from machines import P40 as P40_SPEEDS
from test_sampling import condition

CHECKPOINT_DTYPE = torch.bfloat16
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": CHECKPOINT_DTYPE, "int8": torch.int8}
CPU = torch.device("cpu")
P40 = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=False, memory=24 * GIB)
LAYERS = {name: row.layer for name, row in PRECISIONS.items() if row.layer}
RTX_4090 = Card("gpu:0", "RTX 4090", torch.device("cpu"), native_bf16=True, memory=24 * GIB)


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("role", ["transformer", "text_encoder"])
def test_matrices_keep_the_storage_dtype_and_the_rest_the_compute_dtype(
    tiny: Checkpoint, role: str, precision: str
) -> None:
    replica = replica_for(tiny, role, precision)
    component = loading.load(replica)
    state = {name: tensor.dtype for name, tensor in component.model.state_dict().items()}
    norms = {
        dtype for name, dtype in state.items() if name.endswith(("norm.weight", "norm_q.weight", "bias"))
    }
    blocks = ("to_q.weight", "q_proj.weight", "net.2.weight")
    matrices = {dtype for name, dtype in state.items() if name.endswith(blocks)}
    assert norms == {replica.spec.math}
    assert matrices == {STORED[precision]}


def test_fp32_equals_weights_upcast_beforehand(tiny: Checkpoint) -> None:
    kept, upcast = (loading.load(replica_for(tiny, "transformer")) for _ in range(2))
    upcast.model.float()
    assert torch.equal(run_transformer(kept), run_transformer(upcast))


@pytest.mark.parametrize(
    ("precision", "bound"), [("bf16", 5e-2), ("fp16", 5e-3), ("int8", 5e-2), ("int8-fast", 8e-2)]
)
def test_low_precisions_stay_near_fp32(tiny: Checkpoint, precision: str, bound: float) -> None:
    full = run_transformer(loading.load(replica_for(tiny, "transformer")))
    low = run_transformer(loading.load(replica_for(tiny, "transformer", precision))).float()
    assert 0 < float((low - full).norm() / full.norm()) < bound


def test_math_forces_the_arithmetic_and_leaves_the_storage() -> None:
    forced = resolve(PRECISIONS["bf16"], RTX_4090, "fp32")
    assert (forced.storage, forced.compute) == (torch.bfloat16, torch.float32)
    with pytest.raises(InputError, match="fp8"):
        resolve(PRECISIONS["bf16"], RTX_4090, "fp8")


def test_arithmetic_follows_the_card() -> None:
    for name in ("bf16", "int8", "int8-fast", "nf4"):
        assert resolve(PRECISIONS[name], P40).compute is torch.float32
        assert resolve(PRECISIONS[name], RTX_4090).compute is torch.bfloat16
    assert resolve(ROLE_PRECISIONS["text_encoder"]["fp16"], P40).compute is torch.float32
    assert (
        resolve(PRECISIONS["bf16"], Card("cpu", "cpu", torch.device("cpu"), False, 0, is_gpu=False)).compute
        is torch.bfloat16
    )


def test_a_worker_answers_in_fp32_whatever_it_computes_in(tiny: Checkpoint) -> None:
    replica = replica_for(tiny, "transformer", "bf16")
    schedule = Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1.0]))
    worker = LocalWorker(loading.load(replica), schedule, (4, 4), {POSITIVE: condition(references=1)})
    assert worker.predict(torch.randn(1, 4, 64), 0)[POSITIVE].dtype is torch.float32


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp16", "precision to fp32 or int8"), ("fp32", "Check the checkpoint")]
)
def test_the_guard_counts_names_and_advises(tiny: Checkpoint, precision: str, remedy: str) -> None:
    bad, good = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")]), torch.tensor([1e38, -1e38])
    replica = replica_for(tiny, "transformer", precision)
    with pytest.raises(
        NonFiniteError,
        match=rf"Step 3 of 40 holds 1 NaN and 2 infinite.*transformer {precision} on cpu.*{remedy}",
    ):
        Guard(replica).check(bad, "Step 3 of 40")
    with pytest.raises(NonFiniteError, match=r"The latent holds 1 NaN .* check the node that made it"):
        require_finite_input(bad, "The latent")
    bnb = replica_on(P40, tiny, "transformer", "int8-bnb")
    with pytest.raises(
        NonFiniteError, match=r"int8-bnb, fp32 and fp16 math,.*Set its precision to fp32 or int8"
    ):
        Guard(bnb).check(bad, "Step 3 of 40")
    assert Guard(replica).check(good, "") is good and require_finite_input(good, "") is good


# INT8


def test_rotating_twice_gives_back_and_keeps_products() -> None:
    x, weight = torch.randn(5, 192), torch.randn(7, 192)
    assert torch.allclose(OURS.of(OURS.of(x)), x, atol=1e-5)
    assert torch.allclose(OURS.of(x) @ OURS.of(weight).T, x @ weight.T, atol=1e-4)
    assert torch.equal(OURS.of(torch.ones(3, 10)), torch.ones(3, 10))


def test_rows_are_quantised_to_half_a_level() -> None:
    x = torch.randn(6, 64) * torch.logspace(-8, 30, 6).unsqueeze(1)
    codes, scale = quantize_rows(x)
    assert codes.dtype is torch.int8 and scale.dtype is torch.float32
    assert bool(((dequantize(codes, scale, torch.float32) - x).abs() <= scale * 0.501).all())


def test_a_row_of_zeros_stays_zero_and_nan_is_not_hidden() -> None:
    tokens = torch.stack([torch.zeros(64), torch.full((64,), float("nan")), torch.full((64,), float("inf"))])
    codes, scale = quantize_tokens(tokens)
    product = codes.float() * scale
    assert bool((product[0] == 0).all()) and not bool(product[1:].isfinite().any())


def test_tokens_are_rounded_as_rounding_does() -> None:
    tokens = torch.randn(32, 128)
    codes, scale = quantize_tokens(tokens)
    assert torch.equal(codes, (OURS.of(tokens) * (127 / (scale * 127))).round().to(torch.int8))


@pytest.mark.parametrize("path", integer_paths(CPU, torch.float32, 64, OURS), ids=lambda path: path.name)
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e30])
def test_integer_products_of_heavy_activations_stay_within_the_bound(path, scale: float) -> None:
    x, weight = torch.randn(48, 256), torch.randn(64, 256)
    x[:, ::50] *= 100
    codes, weight_scale = quantize_rows(OURS.of(weight))
    y = path.multiply(x * scale, codes, weight_scale, torch.ones(64))
    expected = (x * scale).double() @ weight.double().T + 1
    assert float((y - expected).norm() / expected.norm()) < int8_paths.MAX_ERROR


def test_a_path_that_is_right_and_not_clearly_slower_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = integer_paths(CPU, torch.float32, 64, OURS)
    monkeypatch.setattr(int8_paths, "_seconds", lambda run, device: run() is None or 1.0)
    assert fastest_path(CPU, torch.bfloat16, (64, 128), OURS, []) == right


def test_our_kernels_are_taken_where_another_path_seems_a_little_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an H200, Triton's took 112 to 125 us at 3072x3072 and ours, which a block joins, 118 to 193."""
    (other,) = integer_paths(CPU, torch.float32, 64, OURS)
    ours: Any = replace(other, name="cuda", kernels=object())
    monkeypatch.setattr(int8_paths, "integer_paths", lambda *shape: [ours, other])
    for expected, measured in ((ours, [9.0, 1.9, 1.1]), (other, [1.0, 1.9, 0.5]), (None, [1.0, 1.9, 1.9])):
        times = iter(measured)
        monkeypatch.setattr(int8_paths, "_seconds", lambda run, device, times=times: next(times))
        assert fastest_path(CPU, torch.float32, (64, 128), OURS, []) == expected


def test_a_path_that_forgets_the_bias_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (right,) = integer_paths(CPU, torch.float32, 64, OURS)
    forgetful = int8_paths.IntegerPath(
        "forgetful", right.quantize, lambda y, a, w, bias, dtype: right.rescale(y, a, w, None, dtype)
    )
    monkeypatch.setattr(int8_paths, "integer_paths", lambda *shape: [forgetful])
    assert fastest_path(CPU, torch.float32, (64, 128), OURS, []) is None
    assert "int8-fast at 64x128: forgetful wrong by" in caplog.text


def test_a_wrong_path_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The reason is only logged: the choice is part of a run's identity, and its reason may vary."""
    caplog.set_level("INFO")
    (right,) = integer_paths(CPU, torch.float32, 64, OURS)
    wrong = int8_paths.IntegerPath("wrong", lambda x, _: quantize_tokens(x * 1.1), right.rescale)
    broken = int8_paths.IntegerPath("broken", lambda x, _: 1 / 0, right.rescale)
    monkeypatch.setattr(int8_paths, "integer_paths", lambda *shape: [wrong, broken])
    assert fastest_path(CPU, torch.float32, (64, 128), OURS, []) is None
    assert "int8-fast at 64x128: wrong wrong by" in caplog.text
    assert "broken failed: ZeroDivisionError: division by zero" in caplog.text


def test_cards_of_one_kind_take_the_same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next card, busy with something else, measures other times."""
    (path,) = integer_paths(CPU, torch.float32, 64, OURS)
    for expected, measured in ((path, [1.0, 0.1, 9.9]), (None, [0.1, 1.0])):
        times = iter(measured)
        monkeypatch.setattr(int8_paths, "_seconds", lambda run, device, times=times: next(times))
        assert fastest_path(CPU, torch.float32, (64, 128), OURS, []) == expected
        assert fastest_path(CPU, torch.float32, (64, 128), OURS, [expected]) == expected


def test_sizes_the_integer_product_cannot_take_are_weight_only() -> None:
    assert choose_path(CPU, torch.float32, 63, 128) == (None, "63x128 weight-only (sizes)")


@pytest.mark.parametrize("name", LAYERS)
def test_every_format_multiplies_within_its_error(name: str) -> None:
    """The real bitsandbytes on the CPU. The same classes run on a GPU."""
    bounds = {"int8": 0.012, "int8-fast": 0.02, "nf4": 0.12, "int8-bnb": 0.03}
    weight, x = torch.randn(64, 256) * 0.02, torch.randn(2, 40, 256)
    with torch.device("meta"):
        layer = torch.nn.modules.linear.Linear(256, 64)
    module = LAYERS[name](layer, torch.float32)
    module.bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
    module.set_weight(weight)
    if name == "int8-fast":
        (module.path,) = integer_paths(
            CPU, torch.float32, 64, OURS
        )  # the CPU's self-test may find weight-only faster
    expected = x @ weight.T + module.bias
    with torch.inference_mode():
        y = module(x)
    assert y.shape == expected.shape
    assert float((y - expected).norm() / expected.norm()) < bounds[name]


# bitsandbytes


@pytest.mark.parametrize("right", [bitsandbytes.Nf4Linear, bitsandbytes.Int8BnbLinear])
def test_bitsandbytes_is_tried_by_multiplying_once(right: type[bitsandbytes.BitsAndBytesLinear]) -> None:
    """bitsandbytes has kernels for this CPU, although the nodes offer it on GPUs only."""
    tried = []

    class Wrong(right):  # quantises well, as on cards whose INT8 product is broken
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tried.append(1)
            return torch.zeros_like(super().forward(x))

    card = Card("gpu:0", "GTX 1080", CPU, native_bf16=False, memory=2**33)
    right.require_usable(card, torch.float32, "nf4")
    for _ in range(2):
        with pytest.raises(FireRedError, match=r"gpu:0 \(GTX 1080\) \(a product is wrong by 100%\)"):
            Wrong.require_usable(card, torch.float32, "nf4")
    assert len(tried) == 1


# A new precision


class HalvesLinear(QuantizedLinear):
    """Stores its matrix as 16-bit floats, to stand for a format that does not exist yet."""

    weight_bytes = 2.0
    cached_as = "halves"

    def layout(self) -> TensorTypes:
        return {"halves": (torch.float16, (self.out_features, self.in_features))}

    def set_weight(self, weight: torch.Tensor) -> None:
        self.halves = weight.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.halves.to(x.dtype), self.bias)


def test_a_new_precision_is_a_row_of_the_table(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads, is kept on disk, judged, planned and proposed; nothing else has to be told of it."""
    row = Precision("halves", None, None, HalvesLinear, loss=1)
    monkeypatch.setitem(PRECISIONS, "halves", row)
    replica, cache = replica_for(tiny, "transformer", "halves"), DiskCache(tmp_path, 10**9)
    full = run_transformer(loading.load(replica_for(tiny, "transformer")))
    first, again = (run_transformer(loading.load(replica, cache=cache)) for _ in range(2))
    assert float((first - full).norm() / full.norm()) < 0.01 and torch.equal(first, again)
    assert len(list(tmp_path.glob("*-transformer-halves-float32-*"))) == 1
    assert str(replica) == "transformer halves, fp32 math, on cpu"
    assert "halves" in [verdict.precision for verdict in judge("transformer", {})]
    card = Card("gpu:0", "Tesla P40", CPU, native_bf16=False, memory=2**40)
    machine = Machine((Device(card, 2**40, P40_SPEEDS),), Device(card, 2**40))
    planned = make_plan(machine, tiny, choices={"transformer": Choice(precision="halves")})
    assert planned.placement("transformer").weights == replica.spec.nbytes() and planned.step_seconds
    needed = working_bytes(on_card(tiny, "halves", memory=0)) + replica.spec.nbytes()
    smaller = on_card(tiny, "halves", memory=int(needed))
    wide = at_precision(smaller, replace(row, name="wide", layer=WideLinear, compute=torch.float32))
    with pytest.raises(DoesNotFitError, match=r"What fits: .*halves"):
        require_fit(wide)


class WideLinear(HalvesLinear):
    weight_bytes = 10_000.0


# Fitting


def test_a_component_too_big_for_its_card_says_what_fits(tiny: Checkpoint) -> None:
    needed = int(working_bytes(on_card(tiny, "bf16", memory=0)) * (1 - ESTIMATE_ERROR)) + 1
    replica = on_card(tiny, "bf16", memory=needed + 300_000)
    with pytest.raises(
        DoesNotFitError, match=r"transformer bf16 on gpu:0 \(Tesla P40\) needs .* What fits: .*nf4"
    ):
        require_fit(replica)
    require_fit(on_card(tiny, "bf16", memory=needed + replica.spec.nbytes()))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
@pytest.mark.parametrize("role", ["transformer", "text_encoder"])
def test_the_size_is_known_before_loading(tiny: Checkpoint, role: str, precision: str) -> None:
    replica = replica_for(tiny, role, precision)
    actual = sum(tensor.nbytes for tensor in loading.load(replica).model.state_dict().values())
    assert replica.spec.nbytes() == pytest.approx(actual, rel=0.05)


def on_card(checkpoint: Checkpoint, precision: str, memory: int) -> ComponentSpec:
    card = Card("gpu:0", "Tesla P40", torch.device("cpu"), native_bf16=True, memory=memory)
    return replica_on(card, checkpoint, "transformer", precision)


def run_transformer(transformer: Transformer) -> torch.Tensor:
    model, generator = transformer.model, torch.Generator().manual_seed(0)
    grids, dtype = [(4, 5), (4, 5)], transformer.model.img_in.bias.dtype
    image = torch.randn(1, 40, 64, generator=generator).to(dtype)
    text = torch.randn(1, 20, 128, generator=generator).to(dtype)
    modulation = transformer.modulation.of(torch.tensor([0.5])).at(0)
    with torch.inference_mode():
        return model(image, text, modulation, rotary_embedding(model.config, grids, 20, CPU), 20)
