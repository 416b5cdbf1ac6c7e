"""How fast one card is at what the transformer does, measured on the card itself, in seconds."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..arithmetic import exact_fp32
from ..errors import FireRedError
from .heartbeat import heartbeat_where_compiled
from .kernels import as_current, card_name, require_kernels
from .speeds import Speeds
from .timing import Work, measure_rate

log = logging.getLogger("FireRed")

WIDTH, HEADS, HEAD_SIZE = 3072, 24, 128  # of the transformer
ROWS = (32, 512, 4096)  # torch._int_mm takes no fewer than 17
COPIED_NUMBERS = (2**20, 2**26)  # FP32: 4 and 256 MiB
TOKENS = (256, 1024, 4096)
MATH_TOKENS = TOKENS[:2]  # torch's plain attention holds all scores: 24 * tokens^2 numbers, a few times over
# The attention kernels that hold no scores, each with what tells whether it is switched on.
FUSED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
HEAD_SIZES = {"transformer": HEAD_SIZE, "text_encoder": 128, "vae": 384}  # the VAE's one head is that wide
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
KINDS = (*(f"matmul {name}" for name in NAMES.values()), "attention fp32", "attention bf16", "copy")
NATIVE = 1.3  # times as fast as FP32: slower 16-bit arithmetic is emulated, or there for compatibility alone


@dataclass(frozen=True)
class Rate:
    """TFLOPS (TOPS for integers, TB/s for copies) of one kind of work, or why there is none."""

    name: str
    tflops: float | None
    reason: str = ""


@dataclass(frozen=True)
class CardReport:
    """What preflight measured of one card.

    rates: "matmul fp32" and so on, native or not; "attention fp32 flash" and so on, a backend each; "copy".
    seconds: what measuring took.
    """

    device: torch.device
    card: str
    speeds: Speeds
    rates: tuple[Rate, ...]
    seconds: float

    def __str__(self) -> str:
        shown = [rate for kind in KINDS if kind != "copy" and (rate := _fastest(self.rates, kind))]
        rates = ", ".join(f"{rate.name} {rate.tflops:.3g}" for rate in shown)
        bf16 = "native bf16" if self.speeds.bf16 else "no native bf16"
        return f"{self.card}: {rates} TFLOPS, {bf16}; measured in {self.seconds:.1f} s"


@functools.cache
def preflight(device: torch.device) -> CardReport:
    """Test and measure a device, once per process; logs what it found in one line.

    Raises FireRedError where this torch build does not run on it or it computes wrong.
    """
    card = card_name(device)
    started = time.perf_counter()
    with heartbeat_where_compiled(f"testing {card}", device):
        require_kernels(device)
        with as_current(device), exact_fp32(), torch.inference_mode():
            products = [_measure_product(dtype, device) for dtype in NAMES]
            attention = [
                _measure_attention(dtype, backend, device)
                for dtype in (torch.float32, torch.bfloat16)
                for backend in (*FUSED, SDPBackend.MATH)
            ]
            rates = (*products, *attention, _measure_copy(device))
    report = CardReport(device, card, _speeds(card, rates), rates, time.perf_counter() - started)
    log.info("%s", report)
    return report


def unfused_attention(device: torch.device) -> frozenset[tuple[str, torch.dtype]]:
    """The (role, dtype) for which attention on this device holds all its scores: no fused kernel runs.

    Kernels that are switched off at the moment do not count.
    """
    backends = tuple(backend for backend, is_on in FUSED.items() if is_on())
    return frozenset(
        (role, dtype)
        for role, head_size in HEAD_SIZES.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not _fuses(backends, head_size, dtype, device)
    )


@functools.cache
def _fuses(
    backends: tuple[SDPBackend, ...], head_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    heads = torch.zeros((1, 1, 64, head_size), dtype=dtype, device=device)
    with warnings.catch_warnings(), sdpa_kernel(list(backends)), as_current(device):
        warnings.simplefilter("ignore")  # each backend tells why it does not run
        try:
            F.scaled_dot_product_attention(heads, heads, heads)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    return True


def _measure_product(dtype: torch.dtype, device: torch.device) -> Rate:
    def prepare(rows: int) -> Work:
        tokens, weight = random_on((rows, WIDTH), dtype, device), random_on((WIDTH, WIDTH), dtype, device)
        multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
        return lambda: multiply(tokens, weight.t())  # not contiguous, as in our layers

    return rate_or_reason(f"matmul {NAMES[dtype]}", prepare, lambda rows: 2.0 * rows * WIDTH**2, ROWS, device)


def _measure_attention(dtype: torch.dtype, backend: SDPBackend, device: torch.device) -> Rate:
    def prepare(tokens: int) -> Work:
        query, key, value = (random_on((1, HEADS, tokens, HEAD_SIZE), dtype, device) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(query, key, value)

    def operations(tokens: int) -> float:
        return 4.0 * tokens**2 * HEADS * HEAD_SIZE

    name = f"attention {NAMES[dtype]} {backend.name.removesuffix('_ATTENTION').lower()}"
    with sdpa_kernel(backend):
        return rate_or_reason(name, prepare, operations, TOKENS if backend in FUSED else MATH_TOKENS, device)


def _measure_copy(device: torch.device) -> Rate:
    """Of a copy within the device's memory, counting what is read and what is written."""

    def prepare(numbers: int) -> Work:
        source = torch.ones(numbers, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return rate_or_reason("copy", prepare, lambda numbers: 2.0 * 4 * numbers, COPIED_NUMBERS, device)


def rate_or_reason(
    name: str,
    prepare: Callable[[int], Work],
    operations: Callable[[int], float],
    sizes: Sequence[int],
    device: torch.device,
) -> Rate:
    """measure_rate in TFLOPS, or the reason torch gives for not running it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            return Rate(name, measure_rate(prepare, operations, sizes, device) / 1e12)
        except RuntimeError as error:
            return Rate(name, None, _reason(error, [str(warning.message) for warning in told]))


def _reason(error: Exception, told: Sequence[str]) -> str:
    """An attention backend's reason is in the warnings, among headings and what we disabled ourselves."""
    beside = ("not used because", "runtime disabled")
    reasons = [text for text in told if not any(phrase in text for phrase in beside)]
    return (reasons or [str(error)])[0].splitlines()[0].partition(". ")[0].partition(" (Triggered")[0]


def _speeds(card: str, rates: Sequence[Rate]) -> Speeds:
    """Raises FireRedError where there is no FP32 rate, which the others are compared with."""
    fastest = {kind: rate.tflops for kind in KINDS if (rate := _fastest(rates, kind))}
    fp32, fp32_attention = fastest.get("matmul fp32"), fastest.get("attention fp32")
    if not fp32 or not fp32_attention:
        reason = next(rate.reason for rate in rates if rate.reason)
        raise FireRedError(f"{card} cannot be measured in FP32: {reason}. Free its memory or choose another.")
    bf16, fp16, copied = (fastest.get(kind) or 0.0 for kind in ("matmul bf16", "matmul fp16", "copy"))
    native_bf16 = bf16 > NATIVE * fp32
    return Speeds(
        fp32=fp32,
        fp32_attention=fp32_attention,
        bf16=bf16 if native_bf16 else None,
        bf16_attention=fastest.get("attention bf16") if native_bf16 else None,
        fp16=fp16 if fp16 > NATIVE * fp32 else None,
        int8=fastest.get("matmul int8"),
        bandwidth=copied * 1e3 or None,
    )


def _fastest(rates: Sequence[Rate], kind: str) -> Rate | None:
    """The fastest of a kind, of attention that is of all backends, or None where none runs."""
    ran = (rate for rate in rates if rate.tflops and rate.name.startswith(kind))
    return max(ran, key=lambda rate: rate.tflops or 0.0, default=None)


def random_on(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers that leave everybody else's generator as it is."""
    generator = torch.Generator(device).manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device, generator=generator)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)
