"""Keep FP32 arithmetic exact, and list the settings that decide a result's bits besides its inputs."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Environment variables that change which kernels the libraries choose.
ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
KERNEL_SWITCH = "FIRERED_KERNELS"  # an environment variable: off, for plain torch in place of our kernels
# torch's settings that let products be summed in 16 bits. Older releases lack some of them.
REDUCED_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@dataclass(frozen=True)
class Switch:
    """A setting of torch for FP32 arithmetic. before: its value now. exact: its value for true FP32."""

    set: Callable[[Any], object]
    before: str | bool
    exact: str | bool


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute FP32 products and convolutions in true FP32 inside the block.

    By default, torch lets cuDNN compute FP32 convolutions in TF32: a relative error of 1e-3 instead of 3e-6
    over 12 convolutions. Other code may have allowed TF32 or BF16 in products too. The settings belong to
    the whole process, so the block restores them at its end.
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
    """The settings of this torch. torch 2.9 has new ones, and raises when some of the older are read."""
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


# What of torch.backends decides bits and is set by programs that use torch.
FLAGS = (
    "mkldnn.enabled",
    *(f"cudnn.{name}" for name in ("enabled", "benchmark", "deterministic")),
    *(f"cuda.matmul.{name}" for name in REDUCED_SUMS),
)
SDP_FLAGS = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp", "fp16_bf16_reduction_math_sdp")


def settings_now() -> dict[str, bool]:
    """This process's settings of torch that decide bits, for apply_settings in another process."""
    backends: Any = torch.backends
    found = {name: operator.attrgetter(name)(backends) for name in FLAGS if _has(backends, name)}
    found |= {name: _sdp_is_on(name) for name in SDP_FLAGS}
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def apply_settings(settings: Mapping[str, bool]) -> None:
    """Compute as the process whose settings_now these are."""
    backends: Any = torch.backends
    now = settings_now()
    for name, value in settings.items():
        if now.get(name) in (None, value):
            continue
        if name == "deterministic":
            torch.use_deterministic_algorithms(value, warn_only=True)
        elif name in SDP_FLAGS:
            allow = name.startswith("fp16")
            getattr(backends.cuda, f"{'allow' if allow else 'enable'}_{name}")(value)
        else:
            owner, _, flag = name.rpartition(".")
            setattr(operator.attrgetter(owner)(backends), flag, value)


def _sdp_is_on(name: str) -> bool:
    cuda: Any = torch.backends.cuda
    asked = f"{name}_allowed" if name.startswith("fp16") else f"{name}_enabled"
    return bool(getattr(cuda, asked)())


def _has(owner: Any, name: str) -> bool:
    """Whether this torch has a setting and lets it be read."""
    try:
        operator.attrgetter(name)(owner)
    except (AttributeError, RuntimeError):
        return False
    return True


def computing_environment(device: torch.device, *libraries: str) -> tuple[object, ...]:
    """Everything but the inputs that decides the bits of a result computed on `device` in exact_fp32.

    That is: versions of torch and `libraries`, torch's settings, and the CPU's threads and instruction set.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    settings: list[object] = [
        *map(library_version, libraries),
        torch.__version__,
        *map(os.environ.get, ENVIRONMENT),
    ]
    settings += [torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled]
    settings += [cudnn.version(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic]
    settings += [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    settings += [cuda.math_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()]
    settings += [str(cuda.preferred_blas_library())]
    settings += [str(getattr(cuda.matmul, name, None)) for name in REDUCED_SUMS]
    if own_kernels_off():
        settings.append(KERNEL_SWITCH)
    if device.type == "cpu":
        settings += [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    return tuple(settings)


def own_kernels_off() -> bool:
    return os.environ.get(KERNEL_SWITCH, "").lower() in ("off", "0", "false", "no")


def library_version(library: str) -> str | None:
    """Of an installed package; None for one that is not."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
