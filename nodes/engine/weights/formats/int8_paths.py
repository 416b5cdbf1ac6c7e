"""Which implementation of an INT8 product a layer takes: the fastest that passes a test on the card."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...cards.timing import seconds_each
from .int8_math import (
    ROTATION,
    dequantize,
    multiply_upcast,
    quantize_rows,
    quantize_tokens,
    rescale,
    rotate,
)

log = logging.getLogger("FireRed")

INT_MM_MULTIPLE = 8  # sizes torch._int_mm takes
# The test's bound on a product's relative error against FP64: rounding both sides makes 1.2 to 1.8 %.
MAX_ERROR = 0.03
TEST_ROWS, TIMING_ROWS = 64, 2048
# Weight-only has to be clearly faster to be taken: a tie must not fall one way today and the other tomorrow.
CLEARLY_FASTER = 0.9

Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Rescale = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class IntegerPath:
    """An implementation of the steps around torch._int_mm."""

    name: str
    quantize: Quantize
    rescale: Rescale

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x (m, k) times the INT8 weight's transpose (k, n): (m, n) in x's dtype."""
        tokens, scale = self.quantize(x)
        # The transpose stays a view: row-major times column-major is what every card's INT8 kernels take.
        return self.rescale(torch._int_mm(tokens, weight.t()), scale, weight_scale, bias, x.dtype)


def integer_paths(device: torch.device) -> list[IntegerPath]:
    """The implementations that might run on the device, without having tried them."""
    paths = [IntegerPath("torch", quantize_tokens, rescale)]
    if device.type == "cuda":
        try:
            from . import int8_triton
        except ImportError:
            return paths
        paths.insert(0, IntegerPath("triton", int8_triton.quantize_tokens, int8_triton.rescale))
    return paths


@functools.cache
def choose_path(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int
) -> tuple[IntegerPath | None, str]:
    """The fastest path that is right for this shape on this device, and its name; None is weight-only.

    A path is right when its product of heavy-tailed tokens, as large as 1e6, is within MAX_ERROR of FP64.
    """
    shape = f"{out_features}x{in_features}"
    if out_features % INT_MM_MULTIPLE or in_features % INT_MM_MULTIPLE:
        return None, f"{shape} weight-only (sizes)"
    generator = torch.Generator().manual_seed(0)
    unquantised = torch.randn(out_features, in_features, generator=generator).to(device)
    weight, scale = quantize_rows(rotate(unquantised))
    tokens = torch.randn(TEST_ROWS, in_features, generator=generator)
    tokens[:, :: ROTATION + 1] *= 100  # heavy channels
    tokens *= torch.logspace(-6, 6, TEST_ROWS).unsqueeze(1)
    tokens = tokens.to(device, dtype)
    bias = torch.randn(out_features, generator=generator).to(device, dtype)
    expected = tokens.double() @ rotate(dequantize(weight, scale, torch.float32)).double().T + bias.double()
    timed = tokens.repeat(TIMING_ROWS // TEST_ROWS, 1)
    fastest: IntegerPath | None = None
    weight_only = _seconds(functools.partial(multiply_upcast, timed, weight, scale, bias), device)
    best, notes = weight_only / CLEARLY_FASTER, []
    for path in integer_paths(device):
        try:
            product = path.multiply(tokens, weight, scale, bias).double()
            errors = (product - expected).norm(dim=1) / expected.norm(dim=1)
            if not bool((errors < MAX_ERROR).all()):
                notes.append(f"{path.name} wrong by {float(errors.max()):.1%}")
                continue
            seconds = _seconds(functools.partial(path.multiply, timed, weight, scale, bias), device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a card or a build cannot run is a path not taken
            notes.append(f"{path.name} failed: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if seconds < best:
            fastest, best = path, seconds * CLEARLY_FASTER
    if notes:
        log.info("int8-fast at %s: %s", shape, "; ".join(notes))
    return fastest, f"{shape} {fastest.name if fastest else 'weight-only'}"


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The shortest of a few runs, after one to warm up."""
    run()
    return min(seconds_each(run, device) for _ in range(repeats))
