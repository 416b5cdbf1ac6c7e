"""How fast one card is at what the transformer does, measured on the card itself, in seconds."""

from __future__ import annotations

import functools
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import psutil
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..arithmetic import exact_fp32
from ..errors import FireRedError
from ..units import GIB
from .heartbeat import heartbeat_where_compiled
from .kernels import card_name, require_kernels
from .speeds import Speeds
from .timing import Work, measure_rate

log = logging.getLogger("FireRed")

WIDTH, HEADS, HEAD_SIZE = 3072, 24, 128  # of the transformer
ROWS = (32, 512, 4096)  # torch._int_mm takes no fewer than 17
COPIED_NUMBERS = (2**20, 2**26)  # FP32: 4 and 256 MiB
TOKENS = {
    SDPBackend.FLASH_ATTENTION: (256, 1024, 4096),
    SDPBackend.EFFICIENT_ATTENTION: (256, 1024, 4096),
    SDPBackend.CUDNN_ATTENTION: (256, 1024, 4096),
    SDPBackend.MATH: (256, 1024),  # holds all scores: 24 * tokens^2 numbers, a few times over
}
FUSED = [backend for backend in TOKENS if backend is not SDPBackend.MATH]
HEAD_SIZES = {"transformer": HEAD_SIZE, "text_encoder": 128, "vae": 384}  # the VAE's one head is that wide
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
# 16-bit arithmetic that is not clearly faster than FP32 is emulated (or, on Pascal, a courtesy).
NATIVE = 1.3


@dataclass(frozen=True)
class Memory:
    """Bytes free when measured, and in all."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free"


@dataclass(frozen=True)
class Rate:
    """TFLOPS (TOPS for integers) of one kind of work, or why there is none."""

    name: str
    tflops: float | None
    reason: str = ""


@dataclass(frozen=True)
class CardReport:
    """What preflight measured of one card.

    products: fp32, bf16, fp16, int8, native or not. attention: each backend of scaled_dot_product_attention
    in FP32 and BF16. memory: None where the device does not tell. seconds: what measuring took.
    """

    device: torch.device
    card: str
    speeds: Speeds
    products: tuple[Rate, ...]
    attention: tuple[Rate, ...]
    memory: Memory | None
    seconds: float

    def __str__(self) -> str:
        products = ", ".join(f"{rate.name} {rate.tflops:.3g}" for rate in self.products if rate.tflops)
        attention = fastest_attention(self.attention, "fp32")
        assert attention is not None  # or there would be no report
        bf16 = "native bf16" if self.speeds.bf16 else "no native bf16"
        return (
            f"{self.card}: {products} TFLOPS, {bf16}; attention {attention.name} {attention.tflops:.3g}; "
            f"{self.memory or 'memory unknown'}; measured in {self.seconds:.1f} s"
        )


@functools.cache
def preflight(device: torch.device) -> CardReport:
    """Test and measure a device, once per process; logs what it found in one line.

    Raises FireRedError where this torch build does not run on it or it computes wrong.
    """
    card = card_name(device)
    started = time.perf_counter()
    with heartbeat_where_compiled(f"testing {card}", device):
        require_kernels(device)
        memory = device_memory(device)
        with _current(device), exact_fp32(), torch.inference_mode():
            products = tuple(_measure_product(dtype, device) for dtype in NAMES)
            attention = tuple(
                _measure_attention(dtype, backend, device)
                for dtype in (torch.float32, torch.bfloat16)
                for backend in TOKENS
            )
            bandwidth = _measure_bandwidth(device)
    speeds = replace(_speeds(card, products, attention), bandwidth=bandwidth)
    report = CardReport(device, card, speeds, products, attention, memory, time.perf_counter() - started)
    log.info("%s", report)
    return report


def fastest_attention(rates: Sequence[Rate], dtype: str) -> Rate | None:
    """The fastest backend for "fp32" or "bf16", or None where none runs."""
    ran = (rate for rate in rates if rate.tflops and rate.name.startswith(f"{dtype} "))
    return max(ran, key=lambda rate: rate.tflops or 0.0, default=None)


def unfused_attention(device: torch.device) -> frozenset[tuple[str, torch.dtype]]:
    """The (role, dtype) for which attention on this device holds all its scores: no fused kernel runs.

    As torch is set up now: kernels that were switched off do not count. MPS chooses by itself and is taken to
    be fused.
    """
    enabled = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    backends = tuple(backend for backend, on in zip(FUSED, enabled, strict=True) if on)
    pairs = itertools.product(HEAD_SIZES, (torch.float32, torch.bfloat16, torch.float16))
    return frozenset(pair for pair in pairs if not _fuses(HEAD_SIZES[pair[0]], pair[1], backends, device))


@functools.cache
def _fuses(
    head_size: int, dtype: torch.dtype, backends: tuple[SDPBackend, ...], device: torch.device
) -> bool:
    if not backends:
        return False
    heads = torch.zeros((1, 1, 64, head_size), dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each backend tells why it does not run
        try:
            with sdpa_kernel(list(backends)), _current(device):
                F.scaled_dot_product_attention(heads, heads, heads)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    return True


def device_memory(device: torch.device) -> Memory | None:
    """The device's memory now; the host's for the CPU, None where torch does not tell."""
    if device.type == "cpu":
        return host_memory()
    if device.type not in ("cuda", "xpu"):
        return None
    try:
        return Memory(*getattr(torch, device.type).mem_get_info(device))
    except RuntimeError:  # some integrated GPUs
        return None


def host_memory() -> Memory:
    """What programs may still take of the host's memory, and all of it."""
    memory = psutil.virtual_memory()
    return Memory(memory.available, memory.total)


def _measure_product(dtype: torch.dtype, device: torch.device) -> Rate:
    """Tokens times a square weight's transpose, which stays a view as in our layers."""

    def prepare(rows: int) -> Work:
        tokens, weight = _random((rows, WIDTH), dtype, device), _random((WIDTH, WIDTH), dtype, device)
        multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
        return lambda: multiply(tokens, weight.t())

    return rate_or_reason(NAMES[dtype], prepare, lambda rows: 2.0 * rows * WIDTH**2, ROWS, device)


def _measure_attention(dtype: torch.dtype, backend: SDPBackend, device: torch.device) -> Rate:
    def prepare(tokens: int) -> Work:
        query, key, value = (_random((1, HEADS, tokens, HEAD_SIZE), dtype, device) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(query, key, value)

    name = f"{NAMES[dtype]} {backend.name.removesuffix('_ATTENTION').lower()}"
    with sdpa_kernel(backend):
        return rate_or_reason(
            name, prepare, lambda tokens: 4.0 * tokens**2 * HEADS * HEAD_SIZE, TOKENS[backend], device
        )


def _measure_bandwidth(device: torch.device) -> float | None:
    """GB/s of the device's memory, read and written."""

    def prepare(numbers: int) -> Work:
        source = torch.ones(numbers, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    rate = rate_or_reason("copy", prepare, lambda numbers: 2.0 * 4 * numbers, COPIED_NUMBERS, device).tflops
    return rate * 1e3 if rate else None


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


def _speeds(card: str, products: Sequence[Rate], attention: Sequence[Rate]) -> Speeds:
    rates = {rate.name: rate.tflops for rate in products}
    fp32, attended = rates["fp32"], fastest_attention(attention, "fp32")
    if fp32 is None or attended is None or attended.tflops is None:
        reason = next(rate.reason for rate in (*products, *attention) if rate.reason)
        raise FireRedError(f"{card} cannot be measured in FP32: {reason}. Free its memory or choose another.")
    bf16_attended = fastest_attention(attention, "bf16")
    native = {name: rate if rate and rate > NATIVE * fp32 else None for name, rate in rates.items()}
    return Speeds(
        fp32=fp32,
        fp32_attention=attended.tflops,
        bf16=native["bf16"],
        bf16_attention=bf16_attended.tflops if bf16_attended and native["bf16"] else None,
        fp16=native["fp16"],
        int8=rates["int8"],
    )


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers without touching anybody's generator."""
    generator = torch.Generator(device).manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device, generator=generator)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one: some kernels look at that instead of their tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
