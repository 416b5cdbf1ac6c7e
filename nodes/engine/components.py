"""What a loader node hands on: a small frozen description of one component, not the component itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint
from .precision import Card, Precision

GIB = 2**30
# What a component needs beside its weights for an edit at 1 MP with one or two references; memory managers
# keep it free.
WORKING_BYTES = {"transformer": 2 * GIB, "text_encoder": 1 * GIB, "vae": 3 * GIB}


@dataclass(frozen=True)
class ComponentSpec:
    """A component of a checkpoint at a chosen precision on a chosen device; equal specs share one copy in
    memory.

    role: the component's folder in the checkpoint, `transformer`, `text_encoder` or `vae`.
    identity: of that folder's files, so that replaced files are loaded anew.
    """

    role: str
    checkpoint: Checkpoint
    precision: Precision
    device: torch.device
    card: Card
    identity: str

    def __str__(self) -> str:
        return f"{self.role.replace('_', ' ')} {self.precision.name} on {self.card}"

    def nbytes(self) -> int:
        """About how many bytes the weights take once loaded, read off the files' headers."""
        component = self.checkpoint.component(self.role)
        if self.precision.storage is None:
            return sum(shard.stat().st_size for shard in component.shards())
        return component.numel() * self.precision.storage.itemsize


def describe(
    role: str, checkpoint: Checkpoint, precision: Precision, device: torch.device, card: Card
) -> ComponentSpec:
    """Describe a component after checking that its files are all there. Raises CheckpointError."""
    component = checkpoint.component(role)
    component.shards()
    return ComponentSpec(role, checkpoint, precision, device, card, component.identity())
