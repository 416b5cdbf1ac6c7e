"""Which arithmetic torch really uses: FP32 kept FP32, and what besides the inputs decides a result's bits."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# What changes the kernels that libraries choose, set outside of Python.
ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
# Sums of products in 16 bits; older releases of torch lack some of these settings.
REDUCED_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@dataclass(frozen=True)
class Switch:
    """A process-wide setting of how FP32 is computed. before: what it is set to. exact: FP32 itself."""

    set: Callable[[Any], object]
    before: str | bool
    exact: str | bool


@contextmanager
def exact_fp32() -> Iterator[None]:
    """FP32 products and convolutions in FP32 inside the block, and as they were after it.

    torch lets cuDNN compute FP32 convolutions in TF32 unless told otherwise (a relative error of 1e-3 instead
    of 3e-6 over 12 convolutions), and other code may have allowed TF32 or BF16 in products too. The settings
    belong to the whole process, so they are put back.
    """
    changed = [switch for switch in _switches() if switch.before != switch.exact]
    for switch in changed:
        switch.set(switch.exact)
    try:
        yield
    finally:
        for switch in changed:
            switch.set(switch.before)


def _switches() -> Iterator[Switch]:
    """torch 2.9 has a setting for each part, beside older ones that it refuses to read in some states."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        for part in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv):
            before = part.fp32_precision
            exact = before if before == "none" else "ieee"
            yield Switch(functools.partial(setattr, part, "fp32_precision"), before, exact)
    else:
        yield Switch(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest")
        yield Switch(
            functools.partial(setattr, backends.cudnn, "allow_tf32"), backends.cudnn.allow_tf32, False
        )


def computing_environment(device: torch.device, *libraries: str) -> tuple[object, ...]:
    """What besides its inputs decides the bits of what a device computes inside exact_fp32.

    Versions of torch and of the `libraries`, torch's settings, and on the CPU its threads and instructions.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    settings: list[object] = [*map(_version, libraries), torch.__version__, *map(os.environ.get, ENVIRONMENT)]
    settings += [torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled]
    settings += [cudnn.version(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic]
    settings += [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    settings += [cuda.math_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()]
    settings += [str(cuda.preferred_blas_library())]
    settings += [str(getattr(cuda.matmul, name, None)) for name in REDUCED_SUMS]
    if device.type == "cpu":
        settings += [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    return tuple(settings)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
