"""Weights are stored as asked, and computed as asked."""

from __future__ import annotations

import pytest
import torch
from conftest import spec_for
from engine import loading
from engine.checkpoint import Checkpoint
from engine.errors import InputError, NonFiniteError
from engine.guard import require_finite
from engine.precision import PRECISIONS, Card, automatic_precision, with_math
from engine.schedule import Schedule
from engine.workers import POSITIVE, LocalWorker
from test_sampling import condition

CHECKPOINT_DTYPE = torch.bfloat16
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": CHECKPOINT_DTYPE}
COMPUTED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("role", ["transformer", "text_encoder"])
def test_matrices_keep_the_storage_dtype_and_the_rest_the_compute_dtype(
    tiny: Checkpoint, role: str, precision: str
) -> None:
    component = loading.load(spec_for(tiny, role, precision))
    model = component.model if role == "text_encoder" else component
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    norms = {
        dtype for name, dtype in dtypes.items() if name.endswith(("norm.weight", "norm_q.weight", "bias"))
    }
    matrices = {
        dtype
        for name, dtype in dtypes.items()
        if "proj" in name and name.endswith("weight") and "patch" not in name
    }
    assert norms == {COMPUTED[precision]}
    assert matrices == {STORED[precision]}


def test_fp32_equals_weights_upcast_beforehand(tiny: Checkpoint) -> None:
    kept = loading.load(spec_for(tiny, "transformer"))
    upcast = loading.load(spec_for(tiny, "transformer"))
    upcast.float()
    inputs = transformer_inputs(torch.float32)
    with torch.inference_mode():
        assert torch.equal(kept(**inputs)[0], upcast(**inputs)[0])


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 5e-2), ("fp16", 5e-3)])
def test_low_precisions_stay_near_fp32(tiny: Checkpoint, precision: str, bound: float) -> None:
    spec = spec_for(tiny, "transformer", precision)
    with torch.inference_mode():
        low = loading.load(spec)(**transformer_inputs(spec.precision.compute))[0].float()
        full = loading.load(spec_for(tiny, "transformer"))(**transformer_inputs(torch.float32))[0]
    error = float((low - full).norm() / full.norm())
    assert 0 < error < bound


def test_math_forces_the_arithmetic_and_leaves_the_storage() -> None:
    forced = with_math(PRECISIONS["bf16"], "fp32")
    assert (forced.storage, forced.compute) == (torch.bfloat16, torch.float32)
    assert with_math(PRECISIONS["bf16"], "auto") == PRECISIONS["bf16"]
    with pytest.raises(InputError, match="fp8"):
        with_math(PRECISIONS["bf16"], "fp8")


def test_automatic_precision_never_is_fp16() -> None:
    assert automatic_precision(Card("gpu:0", "Tesla P40", native_bf16=False))[0] == "fp32"
    assert automatic_precision(Card("gpu:0", "RTX 4090", native_bf16=True))[0] == "bf16"


def test_a_worker_answers_in_fp32_whatever_it_computes_in(tiny: Checkpoint) -> None:
    spec = spec_for(tiny, "transformer", "bf16")
    schedule = Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1.0]))
    worker = LocalWorker(loading.load(spec), spec, schedule, (4, 4), {POSITIVE: condition(references=1)})
    assert worker.predict(torch.randn(1, 4, 64), 0, POSITIVE).dtype is torch.float32


def test_the_guard_counts_names_and_advises() -> None:
    bad = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    with pytest.raises(
        NonFiniteError, match=r"Step 3 of 40.* 1 NaN and 2 infinite values of 4.*transformer fp16.*fp32"
    ):
        require_finite(bad, "Step 3 of 40: the prediction", "transformer fp16 on gpu:0 (Tesla P40)")
    good = torch.tensor([1e38, -1e38])
    assert require_finite(good, "", "") is good


def transformer_inputs(dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(1, 8, 64, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 128, generator=generator).to(dtype),
        timestep=torch.tensor([0.5], dtype=dtype),
        img_shapes=[[(1, 2, 2), (1, 2, 2)]],
        return_dict=False,
    )
