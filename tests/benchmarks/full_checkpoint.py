"""A checkpoint of FireRed's real size with random weights, for benchmarks on a GPU: 41 GB, and 17 GB more
with
`rest`.

Usage: python full_checkpoint.py FOLDER [REST_FOLDER [LAYERS]]    (where the text encoder and VAE go, linked
into FOLDER; LAYERS: how deep the transformer and the text encoder are, for less than the real size)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny_checkpoint
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from engine.cache import CacheWriter
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SHARD_BYTES = 10e9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_transformer(folder: Path, layers: int = 60) -> None:
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=layers)
    model.save_config(folder)
    write_weights(model, folder, "diffusion_pytorch_model", lambda name: name)


def write_text_encoder(folder: Path, layers: int = 28) -> None:
    """Qwen2.5-VL-7B's sizes, and its tensors' names as FireRed stores them."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=3584
        ),
        tie_word_embeddings=False,
        **tiny_checkpoint.special_token_ids(),
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)

    def stored(name: str) -> str:
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    write_weights(model, folder, "model", stored)


def write_weights(model: torch.nn.Module, folder: Path, stem: str, rename) -> None:
    """Random BF16 weights in shards with an index: matrices at std 0.02, norms 1, biases 0."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter
        size += 2 * parameter.numel()
    weight_map = {}
    generator = torch.Generator(DEVICE).manual_seed(0)
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        layout = {rename(name): (torch.bfloat16, tuple(parameter.shape)) for name, parameter in shard.items()}
        writer = CacheWriter(folder / file, layout)
        for name, parameter in shard.items():
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
            if parameter.ndim >= 2:
                values.normal_(0, 0.02, generator=generator)
            else:
                values.fill_(0.0 if name.endswith("bias") else 1.0)
            writer.write(rename(name), values)
        writer.finish()
        weight_map |= dict.fromkeys(layout, file)
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_rest(folder: Path, elsewhere: Path, layers: int = 28) -> None:
    write_text_encoder(elsewhere / "text_encoder", layers)
    vae = AutoencoderKLQwenImage()
    tiny_checkpoint.randomize(vae, 0)
    vae.to(torch.bfloat16).save_pretrained(elsewhere / "vae")
    for name in ("text_encoder", "vae"):
        (folder / name).symlink_to(elsewhere / name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    tiny_checkpoint.write_rest(target)
    depth = [int(sys.argv[3])] if len(sys.argv) > 3 else []
    write_transformer(target / "transformer", *depth)
    if len(sys.argv) > 2:
        write_rest(target, Path(sys.argv[2]), *depth)
