"""What a block of the transformer computes between its products, in few passes over memory (rows.cu).

A product of INT8 matrices is left as it is until the next kernel reads it. That one finishes it: scales, bias
and what comes next. Beside each kernel stands the plain torch form that defines it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..files.rotations import OURS
from .compiler import KernelError
from .driver import Argument, Module, if_they_pass

log = logging.getLogger("FireRed")

EPS = 1e-6  # of every norm
HEAD_SIZE = 128  # channels; a warp holds a head
VECTORS = 6  # of four channels, that a thread of quantize_rows holds
WIDEST = 1024 * 4 * VECTORS  # channels of a row
WIDEST_HEADS = 1024 * 4  # of a row of heads
MACROS: dict[torch.dtype, dict[str, object]] = {torch.float32: {}, torch.bfloat16: {"BF16": 1}}
# Largest relative errors of a row against FP64; rounding to INT8 causes 0.9 %.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
MAX_ROUNDING = 0.03
TEST_ROWS, TEST_WIDTH = 32, 24 * HEAD_SIZE


@dataclass(slots=True)
class Rows:
    """Rotated and quantised activations: INT8 (m, k) and FP32 scales (m, 1).

    plain: the same (..., m, k) before both, where a LoRA needs it.
    """

    tokens: torch.Tensor
    scales: torch.Tensor
    plain: torch.Tensor | None = None


@dataclass(slots=True)
class Product:
    """A product of INT8 matrices before its scales and its bias.

    sums: INT32 (m, n). token_scales (m, 1), weight_scales (n, 1): FP32. bias: (n) or None. kernels: what can
    finish it. added: what a LoRA adds (m, n), or None.
    """

    sums: torch.Tensor
    token_scales: torch.Tensor
    weight_scales: torch.Tensor
    bias: torch.Tensor | None
    kernels: RowKernels
    added: torch.Tensor | None = None

    def plain(self) -> torch.Tensor:
        """The finished product (m, n) FP64."""
        scaled = self.sums.double() * self.token_scales.double() * self.weight_scales.double().T
        return sum((each.double() for each in (self.bias, self.added) if each is not None), scaled)


Source = torch.Tensor | Product  # rows (..., m, n), finished or not


class Modulation(NamedTuple):
    """Rows of a block's modulation: (1 or 2, 6 * width). A second one is for the tokens after `targets`."""

    rows: torch.Tensor
    targets: int

    def parts(self) -> list[tuple[slice, torch.Tensor]]:
        """Tokens, and what they use: (6, width)."""
        rows = self.rows.unflatten(-1, (6, -1))
        if len(rows) == 1:
            return [(slice(None), rows[0])]
        return [(slice(None, self.targets), rows[0]), (slice(self.targets, None), rows[1])]


def normed(x: torch.Tensor, modulation: Modulation, first: int) -> torch.Tensor:
    """Layer norm of x (..., tokens, width), then shift and scale by rows `first` and `first + 1`."""
    whole = F.layer_norm(x, (x.shape[-1],), eps=EPS)
    return _joined(
        [
            torch.addcmul(rows[first], whole[..., tokens, :], 1 + rows[first + 1])
            for tokens, rows in modulation.parts()
        ]
    )


def add_gated(x: torch.Tensor, change: torch.Tensor, modulation: Modulation, gate: int) -> torch.Tensor:
    """x + gate * change, both (..., tokens, width). gate: a row of the modulation."""
    return _joined(
        [
            torch.addcmul(x[..., tokens, :], rows[gate], change[..., tokens, :])
            for tokens, rows in modulation.parts()
        ]
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def rotate_pairs(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """heads (..., tokens, heads, size) times the rotations, complex (tokens, size / 2). Pairs of channels are
    complex numbers.
    """
    dtype = torch.float64 if rotations.dtype == torch.complex128 else torch.float32
    pairs = torch.view_as_complex(heads.to(dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(1)).flatten(-2).to(heads.dtype)


class RowKernels:
    """The kernels on one card for one arithmetic. Raises KernelError where they do not compile or load.

    Rows are contiguous.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        if dtype not in MACROS:
            raise KernelError(f"there are no kernels for {dtype}")
        module = Module("rows.cu", device, {"EPS": f"{EPS}f"} | MACROS[dtype])
        self.dtype = dtype
        self._quantize, self._heads = module.kernel("quantize_rows"), module.kernel("finish_heads")
        self._finish, self._upcast = module.kernel("finish_rows"), module.kernel("upcast_rows")

    def take(self, width: int) -> bool:
        """Whether rows may be so wide."""
        return width % OURS.block == 0 and width <= WIDEST

    def quantize(
        self,
        source: Source,
        modulation: Modulation | None = None,
        first: int = 0,
        *,
        activate: bool = False,
        keep: bool = False,
    ) -> Rows:
        """The source, normed (with a modulation) or after gelu (activate), rotated by OURS, then rounded.

        keep: whether to keep what is not rotated and rounded yet. NaN or infinity goes into the row's scale.
        """
        (rows, width), device = shape(source), numbers(source).device
        tokens = torch.empty((rows, width), dtype=torch.int8, device=device)
        scales = torch.empty((rows, 1), dtype=torch.float32, device=device)
        plain = self._empty(source) if keep else None
        self._run(source, modulation, first, activate, plain, tokens, scales)
        return Rows(tokens, scales, plain)

    def normed(self, x: torch.Tensor, modulation: Modulation, first: int) -> torch.Tensor:
        """The function of that name."""
        out = torch.empty_like(x)
        self._run(x, modulation, first, False, out, None, None)
        return out

    def gelu(self, source: Source) -> torch.Tensor:
        """The function of that name."""
        out = self._empty(source)
        self._run(source, None, 0, True, out, None, None)
        return out

    def _run(
        self,
        source: Source,
        modulation: Modulation | None,
        first: int,
        activate: bool,
        plain: torch.Tensor | None,
        tokens: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
        rows, width = shape(source)
        threads = -(-width // (VECTORS * 4 * 32)) * 32
        shift, scale = _part(modulation, first, width), _part(modulation, first + 1, width)
        self._quantize(
            (rows, 1, 1), threads, *_source(source), shift, scale, *_switch(modulation), activate, plain,
            tokens, scales, width,
        )  # fmt: skip

    def heads(
        self,
        source: Source,
        weight: torch.Tensor | None,
        rotations: torch.Tensor | None,
        out: torch.Tensor,
        start: int = 0,
    ) -> None:
        """The source's heads, normed by their root mean squares and rotated as by rotate_pairs, into `out`.

        weight: (size) of the norm, or None for none. rotations: complex64 (m, size / 2), or None. out:
        (tokens, heads * size) in any shape, whose tokens from `start` on are written. There are at most 32
        heads.
        """
        rows, width = shape(source)
        to = out.data_ptr() + start * width * out.element_size()
        self._heads((rows, 1, 1), width // 4, *_source(source), weight, rotations, to)

    def add_gated(
        self, residual: torch.Tensor, source: Source, modulation: Modulation, gate: int
    ) -> torch.Tensor:
        """The function of that name."""
        rows, width = shape(residual)
        out = torch.empty_like(residual)
        part, switch = _part(modulation, gate, width), _switch(modulation)
        self._finish((rows, 1, 1), _threads(width), *_source(source), residual, part, *switch, out, width)
        return out

    def finished(self, source: Product) -> torch.Tensor:
        """The product with its scales, its bias and what is added."""
        rows, width = source.sums.shape
        out = self._empty(source)
        self._finish((rows, 1, 1), _threads(width), *_source(source), None, None, 0, 0, out, width)
        return out

    def upcast(self, weight: torch.Tensor, scales: torch.Tensor, rotates: bool) -> torch.Tensor:
        """INT8 rows (n, k) times their FP32 scales (n, 1), and rotated by OURS if `rotates`."""
        rows, width = weight.shape
        out = torch.empty((rows, width), dtype=self.dtype, device=weight.device)
        self._upcast((rows, 1, 1), _threads(width), weight, scales, out, width, rotates)
        return out

    def _empty(self, source: Source) -> torch.Tensor:
        found = numbers(source)
        return torch.empty(found.shape, dtype=self.dtype, device=found.device)


def numbers(source: Source) -> torch.Tensor:
    return source.sums if isinstance(source, Product) else source


def shape(source: Source) -> tuple[int, int]:
    """Tokens and width."""
    *_, rows, width = numbers(source).shape
    return rows, width


def _source(source: Source) -> tuple[Argument, ...]:
    """As the kernels take it."""
    if isinstance(source, Product):
        return source.sums, source.token_scales, source.weight_scales, source.bias, source.added
    return source, None, None, None, None


def _part(modulation: Modulation | None, number: int, width: int) -> int | None:
    """The address of a part of the modulation."""
    if modulation is None:
        return None
    rows = modulation.rows
    return rows.data_ptr() + number * width * rows.element_size()


def _switch(modulation: Modulation | None) -> tuple[int, int]:
    """From which token on another row of the modulation counts, and how far after the first it is."""
    if modulation is None or len(modulation.rows) == 1:
        return 0, 0
    return modulation.targets, modulation.rows.stride(0)


def _threads(width: int) -> int:
    """For a row that a block goes over in turns."""
    return min(256, -(-width // 128) * 32)


@functools.cache
def row_kernels(device: torch.device, dtype: torch.dtype) -> RowKernels | None:
    """The kernels for a card and an arithmetic, if they pass a test on that card; else None, logged."""

    def fault(kernels: RowKernels) -> str:
        wrong = [name for name, found, plain in _test_cases(kernels, device) if not _agrees(found, plain)]
        return f"wrong results of {', '.join(wrong)}" if wrong else ""

    instead = "plain torch between the products, as our kernels cannot be used"
    return if_they_pass(device, instead, lambda card: RowKernels(card, dtype), fault)


def _test_cases(
    kernels: RowKernels, device: torch.device
) -> Iterator[tuple[str, torch.Tensor | Rows, torch.Tensor]]:
    """Each kernel's name, what it computes, and the same in plain torch, in FP64.

    The rows have magnitudes from 1e-6 to 1e6; the last but one holds NaN, and the last infinity.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    size = torch.logspace(-6, 6, TEST_ROWS, device=device).unsqueeze(1)
    size[-2:] = torch.tensor([[torch.nan], [torch.inf]])
    residual, rows = (random(TEST_ROWS, TEST_WIDTH).to(kernels.dtype) for _ in range(2))
    rows *= size.to(kernels.dtype)
    sums = torch.randint(-(2**24), 2**24, rows.shape, generator=generator, dtype=torch.int32).to(device)
    bias, weight = (random(width).to(kernels.dtype) for width in (TEST_WIDTH, HEAD_SIZE))
    added = random(TEST_ROWS, TEST_WIDTH).to(kernels.dtype)
    product = Product(sums, size * 1e-6, random(TEST_WIDTH, 1).abs(), bias, kernels, added)
    modulation = Modulation(random(2, 6 * TEST_WIDTH).to(kernels.dtype), TEST_ROWS // 2)
    exact = Modulation(modulation.rows.double(), modulation.targets)
    rotations = torch.polar(
        torch.ones(TEST_ROWS, HEAD_SIZE // 2, device=device), random(TEST_ROWS, HEAD_SIZE // 2)
    )

    yield "normed", kernels.normed(rows, modulation, 3), normed(rows.double(), exact, 3)
    yield "normed and quantised", kernels.quantize(rows, modulation), normed(rows.double(), exact, 0)
    for kind, source, plain in (("rows", rows, rows.double()), ("product", product, product.plain())):
        yield f"quantised {kind}", kernels.quantize(source), plain
        yield f"gelu of {kind}", kernels.gelu(source), gelu(plain)
        yield f"quantised gelu of {kind}", kernels.quantize(source, activate=True), gelu(plain)
        heads = torch.empty_like(rows)
        kernels.heads(source, weight, rotations, heads)
        normed_heads = F.rms_norm(plain.unflatten(-1, (-1, HEAD_SIZE)), (HEAD_SIZE,), weight.double(), EPS)
        rotated = rotate_pairs(normed_heads, rotations.to(torch.complex128))
        yield f"heads of {kind}", heads, rotated.flatten(-2)
        total = kernels.add_gated(residual, source, modulation, 5)
        yield f"sum with {kind}", total, add_gated(residual.double(), plain, exact, 5)
    yield "finished product", kernels.finished(product), product.plain()
    quantised = kernels.quantize(residual)
    upcast = kernels.upcast(quantised.tokens, quantised.scales, True)
    yield (
        "upcast",
        torch.cat([upcast[:-2], rows[-2:]]),
        torch.cat([_upcast(quantised)[:-2], rows[-2:].double()]),
    )


def _upcast(rows: Rows) -> torch.Tensor:
    """What the rows stand for, in FP64, not rotated."""
    return OURS.of(rows.tokens.double() * rows.scales.double())


def _agrees(found: torch.Tensor | Rows, expected: torch.Tensor) -> bool:
    """Whether each row is near the expected one, and not finite where that is not finite."""
    if isinstance(found, Rows):
        found, bound = _upcast(found), MAX_ROUNDING
    else:
        found, bound = found.double(), MAX_ERROR[found.dtype]
    good = expected.isfinite().all(dim=1)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return bool((errors[good] <= bound).all()) and not bool(found[~good].isfinite().all(dim=1).any())
