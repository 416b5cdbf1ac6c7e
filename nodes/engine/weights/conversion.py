"""Write a transformer as one INT8 file in ComfyUI's own form, which its core loads too: ConvRot.

Only the matrices of the blocks are quantised. The modulation is among them, because core computes it at each
step; the cache of our own loader has no need of it and is a third smaller.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..arithmetic import exact_fp32
from ..errors import CheckpointError, InputError
from ..files.cache import CacheWriter
from ..files.checkpoint import Component
from ..files.encodings import Stored
from ..files.rotations import CONVROT_BLOCK, Rotation, rotated
from ..files.single import TIMESTEP_ZERO
from ..files.stored import INT8_FORMAT, LAYER_CONFIG
from ..progress import OnProgress, ignore_progress
from .formats.int8_math import quantize_rows
from .names import is_big_matrix

CONVROT = Rotation("convrot", CONVROT_BLOCK)


@torch.inference_mode()
@exact_fp32()
def write_int8(
    transformer: Component,
    target: Path,
    device: torch.device,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Quantise the transformer on the device, tensor by tensor, into a new file.

    target: gets its name when the file is complete. Raises InputError for one that exists or has another
    suffix, CheckpointError for a source that changed meanwhile, OSError for a disk that is full.
    """
    if target.suffix != ".safetensors" or target.exists():
        raise InputError(
            f"{target} {'exists' if target.exists() else 'must end in .safetensors'}. Rename it."
        )
    before, found, marker = transformer.identity(), transformer.stored(), torch.zeros(())
    layout = {part: kind for name, each in found.items() for part, kind in _layout(name, each).items()}
    is_zero_cond_t = bool(transformer.config().get("zero_cond_t"))
    if is_zero_cond_t:
        layout[TIMESTEP_ZERO] = marker.dtype, tuple(marker.shape)
    writer = CacheWriter(target, layout)
    done, total = 0, sum(each.nbytes for each in found.values())
    try:
        for name, in_host in transformer.tensors(reuse_buffers_for=device):
            tensor = in_host.to(device).decode()
            for part, written in _converted(name, found[name], tensor).items():
                writer.write(part, written)
            done += found[name].nbytes
            on_progress(done, total)
        if is_zero_cond_t:
            writer.write(TIMESTEP_ZERO, marker)
        if transformer.identity() != before:
            raise CheckpointError(f"{transformer.path} changed while it was converted. Start again.")
        writer.finish()
    finally:
        writer.abandon()
    if not target.is_file():
        raise OSError(f"{target} was not written; the log says why.")


def _layout(name: str, stored: Stored) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if not _is_quantised(name, stored):
        return {name: (torch.bfloat16, stored.shape)}
    layer, config = name.removesuffix(".weight"), _config(stored)
    return {
        name: (torch.int8, stored.shape),
        f"{layer}.weight_scale": (torch.float32, (stored.shape[0], 1)),
        f"{layer}.{LAYER_CONFIG}": (torch.uint8, tuple(config.shape)),
    }


def _converted(name: str, stored: Stored, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not _is_quantised(name, stored):
        return {name: tensor.to(torch.bfloat16)}
    codes, scale = quantize_rows(rotated(tensor.float(), _rotation(stored)))
    layer = name.removesuffix(".weight")
    return {name: codes, f"{layer}.weight_scale": scale, f"{layer}.{LAYER_CONFIG}": _config(stored)}


def _is_quantised(name: str, stored: Stored) -> bool:
    return is_big_matrix("transformer", name) and len(stored.shape) == 2


def _rotation(stored: Stored) -> Rotation | None:
    return None if stored.shape[1] % CONVROT_BLOCK else CONVROT


def _config(stored: Stored) -> torch.Tensor:
    """ComfyUI's description of the layer: JSON as bytes."""
    config: dict[str, object] = {"format": INT8_FORMAT}
    if _rotation(stored):
        config |= {"convrot": True, "convrot_groupsize": CONVROT_BLOCK}
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
