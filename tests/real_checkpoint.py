"""A checkpoint of FireRed's real size in a few MB: real headers and configs, and holes for the weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import tiny_checkpoint
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def build(folder: Path) -> Path:
    """Write the checkpoint to `folder` and return it; its weights read as zeros."""
    folder.mkdir(parents=True)
    tiny_checkpoint.write_rest(folder)
    transformer, text_encoder = transformer_on_meta(), text_encoder_on_meta()
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    tiny_checkpoint.save_text_encoder_config(text_encoder.config, folder / "text_encoder")
    write_holes(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer)
    write_holes(folder / "text_encoder" / "model.safetensors", text_encoder)
    write_holes(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    return folder


def transformer_on_meta(layers: int = 60) -> QwenImageTransformer2DModel:
    with torch.device("meta"):
        return QwenImageTransformer2DModel(num_layers=layers)


def text_encoder_on_meta(layers: int = 28) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL-7B's sizes."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            **tiny_checkpoint.rotary([16, 24, 24]),
        ),
        vision_config=dict(
            depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=3584
        ),
        tie_word_embeddings=False,
        **tiny_checkpoint.special_token_ids(),
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters by their names in FireRed's files."""
    for name, parameter in model.named_parameters():
        yield (
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
            parameter,
        )


def write_holes(path: Path, model: torch.nn.Module) -> None:
    """Write a safetensors file of the model's size in BF16, whose data are a hole without disk space."""
    header, offset = {}, 0
    for name, parameter in named_weights(model):
        end = offset + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


if __name__ == "__main__":
    import sys

    print(build(Path(sys.argv[1])))
