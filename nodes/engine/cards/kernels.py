"""Whether this torch build can compute on a card, found out before anything is loaded onto it.

torch itself only warns, and fails at the first kernel with "no kernel image is available for execution".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..errors import FireRedError, first_line

# Two matching releases, each with the index that has the same builds for Windows, where PyPI's have no CUDA.
# The second is the newest on PyPI with kernels for cards before Turing (compute capability 7.5).
TORCH = ("torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0", "https://download.pytorch.org/whl/cu130")
TORCH_BEFORE_TURING = (
    "torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1",
    "https://download.pytorch.org/whl/cu126",
)
ELSEWHERE = "a build for it from https://pytorch.org/get-started/locally"


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


def card_uuid(device: torch.device) -> str | None:
    """The card's number, the same in every process of its machine; None for another kind of device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


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


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one: some kernels look at that instead of their tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CardError(RuntimeError):
    """An error of torch on one card. The original one is its cause."""

    def __init__(self, device: torch.device, error: RuntimeError):
        super().__init__(str(error))
        self.device = device


@contextmanager
def on_card(device: torch.device) -> Iterator[None]:
    """The device as the current one inside the block. Raises CardError for an error of torch."""
    try:
        with as_current(device):
            yield
    except CardError:
        raise
    except RuntimeError as error:
        raise CardError(device, error) from error


def install_line(architecture: str, windows: bool = os.name == "nt") -> str:
    """What installs a torch for this card: a pip command, or where to look."""
    capability = architecture.removeprefix("sm_")  # 61 is 6.1, a Pascal card
    if not (capability.isdecimal() and 50 <= int(capability) < 130):
        return ELSEWHERE
    packages, index = TORCH if int(capability) >= 75 else TORCH_BEFORE_TURING
    return f"pip install {packages}" + (f" --index-url {index}" if windows else "")


def cannot_compute(card: str, architecture: str, built: Sequence[str], error: Exception) -> FireRedError:
    """What to say of a card that raised `error` at its first product. built: the build's architectures."""
    build = f" (built for {', '.join(built)})" if built else ""
    return FireRedError(
        f"This torch {torch.__version__}{build} cannot compute on {card}: {first_line(error)}. "
        f"Install with ComfyUI's Python: {install_line(architecture)}. "
        "If that does not help, update the driver and restart."
    )


def require_kernels(
    device: torch.device,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> None:
    """Raise FireRedError unless a product computed on the card is right."""
    card = card_name(device)
    numbers = (torch.arange(64 * 64) % 7).float().reshape(64, 64)  # small: exact in any arithmetic
    try:
        # The sum needs a kernel of torch itself; the product's library may know cards that torch does not.
        there = numbers.to(device) + 1
        product = multiply(there, there).cpu()
    except RuntimeError as error:
        if is_out_of_memory(error) or "busy or unavailable" in str(error):
            raise FireRedError(
                f"{card} is full or held by another program ({first_line(error)}). Close what uses it, or "
                "choose another device."
            ) from error
        raise cannot_compute(card, architecture(device), torch.cuda.get_arch_list(), error) from error
    if not torch.equal(product, (numbers + 1) @ (numbers + 1)):
        raise FireRedError(
            f"{card} multiplies small whole numbers wrong. Update its driver, undo any overclocking, or "
            "choose another device."
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where the device's allocator, or a library of its own, has no error type for it."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)
