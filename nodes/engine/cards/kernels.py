"""Whether this torch build can compute on a card at all, found out before anything is loaded onto it.

torch itself only warns, and fails at the first kernel with "no kernel image is available for execution".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import torch

from ..errors import FireRedError, first_line

# Matching releases, the newest that suits a card first: with the CUDA architectures of the build that PyPI
# has for Linux, and the index that has the same build for Windows, where PyPI's has no CUDA.
RELEASES = (
    (
        "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0",
        ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
        "https://download.pytorch.org/whl/cu130",
    ),
    (
        "torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1",
        ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
        "https://download.pytorch.org/whl/cu126",
    ),
)
ELSEWHERE = "a build that names it, from https://pytorch.org/get-started/locally"
CUDA_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def device_label(device: torch.device) -> str:
    """As the nodes spell it: "cpu", "gpu:0"."""
    return device.type if device.type in ("cpu", "mps") else f"gpu:{device.index or 0}"


def card_name(device: torch.device) -> str:
    """As people know it: "gpu:0 (Tesla P40, sm_61)", or "cpu (avx2)".

    Raises FireRedError for a card that does not answer.
    """
    label = device_label(device)
    try:
        model = getattr(torch, device.type).get_device_name(device) if label.startswith("gpu") else ""
        return f"{label} ({', '.join(filter(None, (model, architecture(device))))})"
    except Exception as error:  # a driver raises whatever it likes
        raise no_answer(label, error) from error


def no_answer(label: str, error: Exception) -> FireRedError:
    """What to say of a card that raised `error` when it was asked what it is."""
    return FireRedError(
        f"{label} does not answer: {first_line(error)}. Close programs that hold it, check its driver, or "
        "choose another device."
    )


def architecture(device: torch.device) -> str:
    """What kernels are built for: "sm_61" (NVIDIA), "gfx1100" (AMD), "avx2" (a CPU), or the device's type."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().lower()
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_kernels(architecture: str, built: Sequence[str]) -> bool:
    """Whether a build for these architectures runs on a card of that one.

    CUDA code (sm_) runs on later cards of the same major version, its portable form (compute_) on all later
    ones, and what ends in "a" on one architecture alone
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide, "Binary Compatibility").
    """
    card = CUDA_ARCHITECTURE.fullmatch(architecture)
    if card is None:
        families = [name.removesuffix("-generic").replace("-", "") for name in built if "generic" in name]
        return architecture in built or architecture.startswith(tuple(families))
    major, minor = int(card[2]), int(card[3])
    for kind, of_major, of_minor, only in filter(None, map(_parse, built)):
        exact, same_major = (of_major, of_minor) == (major, minor), of_major == major
        if exact or (only != "a" and of_minor <= minor and same_major):
            return True
        if kind == "compute" and not only and of_major < major:
            return True
    return False


def install_line(architecture: str, windows: bool = os.name == "nt") -> str:
    """What installs a torch for this card: a pip command, or where to look."""
    for packages, built, index in RELEASES:
        if architecture.startswith("sm_") and has_kernels(architecture, built):
            return f"pip install {packages}" + (f" --index-url {index}" if windows else "")
    return ELSEWHERE


def require_build(card: str, architecture: str, built: Sequence[str]) -> None:
    """Raise FireRedError where a build for these architectures is not for the card; an empty list may be."""
    if built and not has_kernels(architecture, built):
        raise FireRedError(
            f"This torch {torch.__version__} has no kernels for {card}: it was built for {', '.join(built)}. "
            f"Install with ComfyUI's Python: {install_line(architecture)}"
        )


def require_kernels(
    device: torch.device,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> None:
    """Raise FireRedError unless this torch build is for the card and a product computed there is right."""
    card, needed = card_name(device), architecture(device)
    if device.type == "cuda":
        require_build(card, needed, torch.cuda.get_arch_list())
    numbers = (torch.arange(64 * 64) % 7).float().reshape(64, 64)  # small: exact in any arithmetic
    try:
        product = multiply(numbers.to(device), numbers.to(device)).cpu()
    except RuntimeError as error:
        if is_out_of_memory(error) or "busy or unavailable" in str(error):
            raise FireRedError(
                f"{card} is full or held by another program ({first_line(error)}). Close what uses it, or "
                "choose another device."
            ) from error
        raise FireRedError(
            f"{card} cannot compute with this torch {torch.__version__}: {first_line(error)}. "
            "Update the driver and restart; if that does not help, install with ComfyUI's Python: "
            f"{install_line(needed)}"
        ) from error
    if not torch.equal(product, numbers @ numbers):
        raise FireRedError(
            f"{card} multiplies small whole numbers wrong. Update its driver, undo any overclocking, or "
            "choose another device."
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where the device's allocator, or a library of its own, has no error type for it."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def _parse(name: str) -> tuple[str, int, int, str] | None:
    found = CUDA_ARCHITECTURE.fullmatch(name)
    return (found[1], int(found[2]), int(found[3]), found[4]) if found else None
