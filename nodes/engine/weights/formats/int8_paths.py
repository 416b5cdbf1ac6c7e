"""Choose the implementation of INT8 products: the fastest one that passes a test on the card."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...cards.timing import seconds_each
from ...cuda.products import multiply_int8
from ...cuda.rows import Product, RowKernels, row_kernels
from ...files.rotations import OURS, Rotation, rotated
from .int8_math import (
    dequantize,
    multiply_upcast,
    quantize_rows,
    quantize_tokens,
    rescale,
)

log = logging.getLogger("FireRed")

INT_MM_MULTIPLE = 8  # torch._int_mm takes only multiples of it
# The largest relative error of a correct product against FP64. Rounding both sides causes 1.2 to 1.8 %.
MAX_ERROR = 0.03
TEST_ROWS, TIMING_ROWS, TIMING_CALLS = 64, 2048, 8
# Weight-only is chosen only if it is clearly faster. At a tie, each start could choose another path.
CLEARLY_FASTER = 0.9

WEIGHT_ONLY = "weight-only"

Quantize = Callable[[torch.Tensor, Rotation | None], tuple[torch.Tensor, torch.Tensor]]
Rescale = Callable[..., torch.Tensor]
Multiply = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Rotation | None], torch.Tensor
]


def int_mm(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """INT8 (m, k) times the transpose of INT8 (n, k): INT32 (m, n), by the library that torch calls.

    The transpose stays a view: INT8 kernels of every card take row-major times column-major.
    """
    return torch._int_mm(tokens, weight.t())


@dataclass(frozen=True)
class IntegerPath:
    """An implementation of INT8 products and of the steps around them.

    kernels: those that can join these steps with what a block does before and after a product, or None.
    """

    name: str
    quantize: Quantize
    rescale: Rescale
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = int_mm
    kernels: RowKernels | None = None

    @classmethod
    def of_kernels(cls, name: str, kernels: RowKernels, product: Callable[..., torch.Tensor]) -> IntegerPath:
        def quantize(x: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor]:
            rows = kernels.quantize(x.contiguous())
            return rows.tokens, rows.scales

        def rescale(
            sums: torch.Tensor,
            scale: torch.Tensor,
            weight_scale: torch.Tensor,
            bias: torch.Tensor | None,
            dtype: torch.dtype,
        ) -> torch.Tensor:
            return kernels.finished(Product(sums, scale, weight_scale, bias, kernels))

        return cls(name, quantize, rescale, product, kernels)

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        rotation: Rotation | None = OURS,
    ) -> torch.Tensor:
        """x (m, k) times the INT8 weight's transpose (k, n): (m, n) in x's dtype."""
        tokens, scale = self.quantize(x, rotation)
        return self.rescale(self.product(tokens, weight), scale, weight_scale, bias, x.dtype)


def integer_paths(
    device: torch.device, dtype: torch.dtype, width: int, rotation: Rotation | None
) -> list[IntegerPath]:
    """The implementations that may run on the device for tokens of that width. No product is tested yet."""
    paths = []
    kernels = row_kernels(device, dtype) if rotation == OURS else None
    if kernels is not None and kernels.take(width):
        paths += [
            IntegerPath.of_kernels("cuda", kernels, int_mm),
            IntegerPath.of_kernels("cuda", kernels, multiply_int8),  # the same integers: no other name
        ]
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from . import int8_triton

            paths.append(IntegerPath("triton", int8_triton.quantize_tokens, int8_triton.rescale))
    return [*paths, IntegerPath("torch", quantize_tokens, rescale)]


@functools.cache
def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    rotation: Rotation | None = OURS,
) -> tuple[IntegerPath | None, str]:
    """The fastest correct path for this shape on this device, and a line for the log. None is weight-only.

    A path is correct when its product of heavy-tailed tokens up to 1e6 is within MAX_ERROR of FP64. All cards
    of one kind take the path that was the fastest on the first of them, so that they compute the same bits.
    """
    shape = f"{out_features}x{in_features}"
    if out_features % INT_MM_MULTIPLE or in_features % INT_MM_MULTIPLE:
        return None, f"{shape} {WEIGHT_ONLY} (sizes)"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = fastest_path(
        device, dtype, (out_features, in_features), rotation, _taken(kind, shape, dtype, rotation)
    )
    _taken(kind, shape, dtype, rotation).append(path)
    return path, f"{shape} {path.name if path else WEIGHT_ONLY}"


@functools.cache
def _taken(kind: str, shape: str, dtype: torch.dtype, rotation: Rotation | None) -> list[IntegerPath | None]:
    """The paths that cards of this kind have taken."""
    return []


def fastest_path(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rotation: Rotation | None,
    taken: Sequence[IntegerPath | None],
) -> IntegerPath | None:
    """The path for this shape (out, in); None is weight-only.

    taken: by other cards of the same kind. The first of these is the only one that may be chosen, if any.
    """
    product = _TestProduct.of(device, dtype, *shape, rotation)
    fastest: IntegerPath | None = None
    best, faults = float("inf") if taken else product.seconds(multiply_upcast) / CLEARLY_FASTER, []
    for path in integer_paths(device, dtype, shape[1], rotation):
        if taken and (taken[0] is None or (path.name, path.product) != (taken[0].name, taken[0].product)):
            continue
        if fastest is not None and fastest.kernels is not None and path.kernels is None:
            continue  # it may win here by a little, but in a block our kernels join steps that are two here
        try:
            wrong = product.error(path.multiply)
            if not wrong < MAX_ERROR:
                faults.append(f"{path.name} wrong by {wrong:.1%}")
                continue
            seconds = product.seconds(path.multiply)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a card or a build that cannot run this path
            faults.append(f"{path.name} failed: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if seconds < best:
            fastest, best = path, seconds * CLEARLY_FASTER
    if fastest is not None and fastest.product is multiply_int8:
        log.info("int8-fast at %s: our own DP4A product is the fastest", "x".join(map(str, shape)))
    if faults:
        log.info("int8-fast at %s: %s", "x".join(map(str, shape)), "; ".join(faults))
    return fastest


@dataclass(frozen=True)
class _TestProduct:
    """Inputs of a product on a device, and its result in FP64.

    tokens: (TEST_ROWS, k). weight: INT8 (n, k), rotated by `rotation`. scale: (n, 1). bias: (n).
    """

    tokens: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    rotation: Rotation | None
    expected: torch.Tensor

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        out_features: int,
        in_features: int,
        rotation: Rotation | None,
    ) -> _TestProduct:
        """A product with heavy channels. Its tokens have magnitudes from 1e-6 to 1e6."""
        generator = torch.Generator().manual_seed(0)
        unquantised = torch.randn(out_features, in_features, generator=generator).to(device)
        weight, scale = quantize_rows(rotated(unquantised, rotation))
        tokens = torch.randn(TEST_ROWS, in_features, generator=generator)
        tokens[:, :: OURS.block + 1] *= 100  # heavy channels
        tokens *= torch.logspace(-6, 6, TEST_ROWS).unsqueeze(1)
        tokens = tokens.to(device, dtype)
        bias = torch.randn(out_features, generator=generator).to(device, dtype)
        matrix = rotated(dequantize(weight, scale, torch.float32), rotation).double()
        return cls(tokens, weight, scale, bias, rotation, tokens.double() @ matrix.T + bias.double())

    def error(self, multiply: Multiply) -> float:
        """The largest relative error of a token's result; NaN where one is NaN."""
        product = multiply(self.tokens, self.weight, self.scale, self.bias, self.rotation).double()
        return float(((product - self.expected).norm(dim=1) / self.expected.norm(dim=1)).max())

    def seconds(self, multiply: Multiply) -> float:
        """The time of a product with TIMING_ROWS tokens."""
        timed = self.tokens.repeat(TIMING_ROWS // TEST_ROWS, 1)
        run = functools.partial(multiply, timed, self.weight, self.scale, self.bias, self.rotation)
        return _seconds(run, self.tokens.device)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Of a run, the shortest of a few times, after one run to warm up."""
    run()
    calls = TIMING_CALLS if device.type == "cuda" else 1  # on a fast card, starting one takes as long
    return min(seconds_each(run, device, calls) for _ in range(repeats))
