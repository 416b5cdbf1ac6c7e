"""Rotations of input channels in blocks, so that a heavy channel does not set the scale of all.

A normalised Hadamard matrix H rotates each block on both sides of a product, which stays the same:
(x H) (W H)^T = x W^T (https://huggingface.co/papers/2404.00456). Every H here is symmetric, so a second
rotation undoes the first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Their Kronecker powers are Hadamard matrices: Sylvester's, and the regular one of ComfyUI's ConvRot files.
FACTORS = {
    "sylvester": ((1.0, 1.0), (1.0, -1.0)),
    "convrot": ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Rotation:
    """kind: a name of FACTORS. block: how many channels rotate together, a power of the factor's side."""

    kind: str
    block: int

    @property
    def exists(self) -> bool:
        """Whether there is such a matrix."""
        side, size = len(FACTORS[self.kind]), 1
        while size < self.block:
            size *= side
        return size == self.block > 1

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the last dimension; a second time undoes it. A size that is no multiple stays as it is."""
        if x.shape[-1] % self.block:
            return x
        return (x.reshape(-1, self.block) @ self.matrix(x.device, x.dtype)).reshape(x.shape)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - rotations are few, and frozen
    def matrix(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The normalised Hadamard matrix (block, block). It is its own inverse."""
        factor, matrix = torch.tensor(FACTORS[self.kind]), torch.ones(1, 1)
        while len(matrix) < self.block:
            matrix = torch.kron(matrix, factor)
        return (matrix / self.block**0.5).to(device, dtype)


OURS = Rotation("sylvester", 64)
CONVROT_BLOCK = 256  # channels, in files that do not say


def rotated(x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """x, rotated if there is a rotation."""
    return x if rotation is None else rotation.of(x)
