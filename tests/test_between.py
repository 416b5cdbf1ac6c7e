"""What runs between products: which work goes to kernels of our own, and that it is the same work.

There is no GPU here, so the kernels' methods are their plain torch forms; each card tests its kernels against
these at load.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from conftest import replica_for
from engine.cuda import rows
from engine.cuda.rows import Modulation, Product, RowKernels, Rows, Source
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.rotations import OURS
from engine.models import between, loading
from engine.models.trace import find_culprit
from engine.models.transformer import Transformer, rotary_embedding
from engine.sampling.conditioning import POSITIVE
from engine.sampling.options import SamplingOptions
from engine.sampling.workers import LocalWorker
from engine.weights.adapters import Adapter
from engine.weights.formats import Int8FastLinear, int8_math
from engine.weights.formats.int8_paths import IntegerPath, int_mm
from test_guard import OVERFLOWING, SCHEDULE
from test_lora import factors, lightx2v, opened
from test_sampling import condition
from test_transformer import GRIDS, TEXT_TOKENS, inputs

CPU = torch.device("cpu")
HEAD_SIZE = 32  # of the tiny transformer
INT8_DIFFERENCE = 1e-5  # the same integers, summed in another order


class PlainRowKernels(RowKernels):
    """The kernels' plain forms, and how often each was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype, self.asked = dtype, Counter[str]()

    def _finished(self, source: Source) -> torch.Tensor:
        return source.plain().to(self.dtype) if isinstance(source, Product) else source

    def quantize(
        self,
        source: Source,
        modulation: Modulation | None = None,
        first: int = 0,
        *,
        activate: bool = False,
        keep: bool = False,
    ) -> Rows:
        self.asked["quantize"] += 1
        x = self._finished(source)
        if modulation is not None:
            x = rows.normed(x, modulation, first)
        x = rows.gelu(x) if activate else x
        return Rows(*int8_math.quantize_rows(OURS.of(x.flatten(0, -2).float())), x if keep else None)

    def normed(self, x: torch.Tensor, modulation: Modulation, first: int) -> torch.Tensor:
        self.asked["normed"] += 1
        return rows.normed(x, modulation, first)

    def gelu(self, source: Source) -> torch.Tensor:
        self.asked["gelu"] += 1
        return rows.gelu(self._finished(source))

    def heads(
        self,
        source: Source,
        weight: torch.Tensor | None,
        rotations: torch.Tensor | None,
        out: torch.Tensor,
        start: int = 0,
    ) -> None:
        self.asked["heads"] += 1
        heads = self._finished(source).unflatten(-1, (-1, HEAD_SIZE))
        if weight is not None:
            heads = torch.nn.functional.rms_norm(heads, (HEAD_SIZE,), weight, rows.EPS)
        heads = heads if rotations is None else rows.rotate_pairs(heads, rotations)
        out.view(-1, *out.shape[-2:])[start:][: heads.shape[-3]] = heads

    def add_gated(
        self, residual: torch.Tensor, source: Source, modulation: Modulation, gate: int
    ) -> torch.Tensor:
        self.asked["add_gated"] += 1
        return rows.add_gated(residual, self._finished(source), modulation, gate)

    def finished(self, source: Product) -> torch.Tensor:
        self.asked["finished"] += 1
        return self._finished(source)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PlainRowKernels:
    plain = PlainRowKernels()
    monkeypatch.setattr(between, "row_kernels", lambda device, dtype: plain)
    monkeypatch.setattr(rows, "HEAD_SIZE", HEAD_SIZE)
    return plain


def use(model: torch.nn.Module, kernels: PlainRowKernels) -> None:
    """Let every INT8 layer take rows."""
    for layer in model.modules():
        if isinstance(layer, Int8FastLinear):
            layer.path = IntegerPath.of_kernels("plain", kernels, int_mm)


def predict(transformer: Transformer, grid: str = "reference") -> torch.Tensor:
    grids, model = GRIDS[grid], transformer.model
    image, text = (x * 3 for x in inputs(grids))
    text = torch.cat([text, text], dim=1)  # more than the fewest rows that an INT8 product takes
    rotary = rotary_embedding(model.config, grids, 2 * TEXT_TOKENS, CPU)
    targets = grids[0][0] * grids[0][1]
    modulation = transformer.modulation.of(torch.tensor([0.5])).at(0)
    with torch.inference_mode():
        return model(image, text, modulation, rotary, targets)


def change(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["", "zero_cond_t"])
def test_int8_layers_pass_rows_and_unfinished_products(
    tmp_path: Path, kernels: PlainRowKernels, zero_cond_t: bool
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", zero_cond_t=zero_cond_t))
    transformer = loading.load(replica_for(checkpoint, "transformer", "int8-fast"))
    for layer in transformer.model.modules():
        if isinstance(layer, Int8FastLinear):
            layer.path = IntegerPath("torch", int8_math.quantize_tokens, int8_math.rescale)
    separate = predict(transformer)
    kernels.asked.clear()
    use(transformer.model, kernels)
    joined = predict(transformer)
    blocks = transformer.model.config.layers
    # each stream: two norms, the attention's result, the MLP's middle; queries, keys and values; two sums
    assert kernels.asked == {"quantize": 8 * blocks, "heads": 6 * blocks, "add_gated": 4 * blocks}
    assert change(joined, separate) < INT8_DIFFERENCE


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_other_layers_get_plain_tensors(tiny: Checkpoint, kernels: PlainRowKernels, precision: str) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", precision))
    found, blocks = predict(transformer), transformer.model.config.layers
    assert kernels.asked == {"normed": 4 * blocks, "heads": 6 * blocks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(between, "row_kernels", lambda device, dtype: None)
        expected = predict(transformer)
    assert change(found, expected) < 1e-6


def test_short_texts_are_not_multiplied_as_integers(tiny: Checkpoint, kernels: PlainRowKernels) -> None:
    """torch._int_mm takes no fewer than 17 rows."""
    transformer = loading.load(replica_for(tiny, "transformer", "int8-fast"))
    use(transformer.model, kernels)
    model, grids = transformer.model, GRIDS["one"]
    image, text = inputs(grids)
    rotary = rotary_embedding(model.config, grids, TEXT_TOKENS, CPU)
    with torch.inference_mode():
        velocity = model(image, text, transformer.modulation.of(torch.tensor([0.5])).at(0), rotary, 20)
    assert bool(velocity.isfinite().all())
    assert kernels.asked["quantize"] == 4 * model.config.layers  # of the image's stream alone


def test_a_lora_is_added_where_layers_pass_products(
    tiny: Checkpoint, tmp_path: Path, kernels: PlainRowKernels
) -> None:
    path = tmp_path / "one.safetensors"
    lightx2v(factors(tiny), path)
    lora = opened(tiny, path)
    transformer = loading.load(replica_for(tiny, "transformer", "int8-fast"))
    conditions = {POSITIVE: condition(tokens=20, references=1)}
    latents = torch.randn(1, 25, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for adapters in ((), (Adapter(lora, 1.0),)):
        for joined in (False, True):
            for layer in transformer.model.modules():
                if isinstance(layer, Int8FastLinear):
                    layer.path = IntegerPath("torch", int8_math.quantize_tokens, int8_math.rescale)
            if joined:
                use(transformer.model, kernels)
            options = SamplingOptions(adapters=adapters)
            worker = LocalWorker(transformer, SCHEDULE, (10, 10), conditions, options=options)
            found.append(worker.predict(latents, 0)[POSITIVE])
    without, without_joined, with_lora, with_lora_joined = found
    assert change(without_joined, without) < INT8_DIFFERENCE
    assert change(with_lora_joined, with_lora) < INT8_DIFFERENCE
    assert change(with_lora, without) > 0.01
    assert kernels.asked["add_gated"] == 2 * 4 * transformer.model.config.layers  # products stay unfinished
    assert not kernels.asked["finished"]


def test_a_trace_sees_every_module(tmp_path: Path, kernels: PlainRowKernels) -> None:
    """Modules that are watched get and give tensors, so that the one that fails is found."""
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", layers=3))
    transformer = loading.load(replica_for(checkpoint, "transformer", "int8-fast"))
    use(transformer.model, kernels)
    layer = transformer.model.get_submodule(OVERFLOWING)
    assert isinstance(layer, Int8FastLinear)
    layer.weight_scale[3] = torch.nan
    assert not bool(predict(transformer).isfinite().all())
    culprit = find_culprit(transformer.model, lambda: predict(transformer))
    assert culprit is not None
    assert culprit.name == OVERFLOWING


def test_norms_that_are_watched_run_as_modules(tiny: Checkpoint, kernels: PlainRowKernels) -> None:
    transformer = loading.load(replica_for(tiny, "transformer", "int8-fast"))
    use(transformer.model, kernels)
    expected, seen = predict(transformer), []

    def watch(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.append(output.shape)

    hook = transformer.model.block(0).attn.norm_k.register_forward_hook(watch)
    found = predict(transformer)
    hook.remove()
    assert len(seen) == 1
    assert change(found, expected) < INT8_DIFFERENCE
    assert kernels.asked["finished"] > 0
