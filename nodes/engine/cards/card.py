"""The description of a device from which its precision is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A device and what it can do.

    label: in the nodes, such as "gpu:0". name: such as "Tesla P40". memory: bytes in all. is_gpu: whether it
    is an accelerator, not the CPU. unfused: each (role, dtype of its arithmetic) that has no fused attention
    kernel here, so that attention holds all its scores in memory.
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
