"""A checkpoint's VAE in the form that core loads: one file, with core's names for the tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

CORE_VAE = "qwen_image_vae.safetensors"


def write(work: Path, checkpoint: str) -> None:
    """Put the VAE of one of the work folder's checkpoints into models/vae."""
    tensors = load_file(work / f"models/diffusers/{checkpoint}/vae/diffusion_pytorch_model.safetensors")
    folder = work / "models" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({core_names()[name]: tensor.float() for name, tensor in tensors.items()}, folder / CORE_VAE)


@cache
def core_names() -> dict[str, str]:
    """Core's name for every tensor of the VAE: diffusers converts every name that core can have."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    residual = [
        f"residual.{part}" for part in ("0.gamma", "2.weight", "2.bias", "3.gamma", "6.weight", "6.bias")
    ]
    others = [
        f"{part}.{kind}" for part in ("shortcut", "resample.1", "time_conv") for kind in ("weight", "bias")
    ]
    attention = ["norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"]
    candidates = [f"{part}.{kind}" for part in ("conv1", "conv2") for kind in ("weight", "bias")]
    for half, blocks in (("encoder", "downsamples"), ("decoder", "upsamples")):
        candidates += [f"{half}.conv1.{kind}" for kind in ("weight", "bias")]
        candidates += [f"{half}.head.{part}" for part in ("0.gamma", "2.weight", "2.bias")]
        candidates += [f"{half}.middle.{block}.{part}" for block in (0, 2) for part in residual]
        candidates += [f"{half}.middle.1.{part}" for part in attention]
        candidates += [
            f"{half}.{blocks}.{block}.{part}" for block in range(15) for part in (*residual, *others)
        ]
    return {new: old for old in candidates for new in convert_wan_vae_to_diffusers({old: None})}
