"""What one device is, as far as choosing a precision for it needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A device and what it can do.

    label: as the nodes spell it, "gpu:0". device: as torch spells it. memory: bytes in all. is_gpu: an
    accelerator rather than the CPU. unfused: (role, dtype of its arithmetic) in which no kernel there does
    attention without holding all its scores.
    """

    label: str
    name: str
    device: torch.device
    native_bf16: bool
    memory: int
    is_gpu: bool = True
    unfused: frozenset[tuple[str, torch.dtype]] = frozenset()

    def __str__(self) -> str:
        return self.label if self.label == self.name else f"{self.label} ({self.name})"
