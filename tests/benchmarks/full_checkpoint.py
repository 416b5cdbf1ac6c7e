"""Write a checkpoint of FireRed's real size with random weights, for benchmarks on a GPU: 41 GB.

Usage: python full_checkpoint.py FOLDER [REST_FOLDER [LAYERS]]
REST_FOLDER: where to write the text encoder and the VAE, 17 GB more; they are linked into FOLDER.
LAYERS: the depth of the transformer and the text encoder, if less than the real one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import real_checkpoint
import tiny_checkpoint
import torch
from diffusers import AutoencoderKLQwenImage
from engine.files.cache import CacheWriter

from launcher.folders import link_folder

SHARD_BYTES = 10e9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_transformer(folder: Path, layers: int = 60) -> None:
    model = real_checkpoint.transformer_on_meta(layers)
    model.save_config(folder)
    write_weights(model, folder, "diffusion_pytorch_model")


def write_text_encoder(folder: Path, layers: int = 28) -> None:
    model = real_checkpoint.text_encoder_on_meta(layers)
    tiny_checkpoint.save_text_encoder_config(model.config, folder)
    write_weights(model, folder, "model")


def write_weights(model: torch.nn.Module, folder: Path, stem: str) -> None:
    """Random BF16 weights in shards with an index: matrices at std 0.02, norms 1, biases 0."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in real_checkpoint.named_weights(model):
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter
        size += 2 * parameter.numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(shard, folder / file, seed=number)
        weight_map |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_tensors(parameters: dict[str, torch.Tensor], path: Path, seed: int = 0) -> None:
    """Write one file of random weights with these shapes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    layout = {name: (torch.bfloat16, tuple(parameter.shape)) for name, parameter in parameters.items()}
    writer = CacheWriter(path, layout)
    for name, parameter in parameters.items():
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
        if parameter.ndim >= 2:
            values.normal_(0, 0.02, generator=generator)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        writer.write(name, values)
    writer.finish()


def write_rest(folder: Path, elsewhere: Path, layers: int = 28) -> None:
    write_text_encoder(elsewhere / "text_encoder", layers)
    vae = AutoencoderKLQwenImage()
    tiny_checkpoint.randomize(vae, 0)
    vae.to(torch.bfloat16).save_pretrained(elsewhere / "vae")
    for name in ("text_encoder", "vae"):
        link_folder(folder / name, elsewhere / name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    tiny_checkpoint.write_rest(target)
    depth = [int(sys.argv[3])] if len(sys.argv) > 3 else []
    write_transformer(target / "transformer", *depth)
    if len(sys.argv) > 2:
        write_rest(target, Path(sys.argv[2]), *depth)
