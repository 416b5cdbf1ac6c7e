"""A complete FireRed-shaped checkpoint of a few MB with deterministic random weights, written in seconds.

Every test uses it, and the demo as long as there is no other checkpoint.
Usage: python tests/tiny_checkpoint.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2's pre-tokenisation (https://github.com/huggingface/transformers, models/qwen2/tokenization_qwen2.py).
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every word of the prompt template, so that it has 64 tokens as with the real tokenizer, and a few words of
# prompts.
CORPUS = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that "
    "meets the "
    "user's requirements while maintaining consistency with the original input where "
    "appropriate.\nuser\nassistant\n "
    "Picture Add a red hat on the cat make it blue green small large remove"
)
SCHEDULER_CONFIG = dict(  # FireRed-Image-Edit-1.0's scheduler_config.json
    base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, num_train_timesteps=1000,
    shift=1.0,
    shift_terminal=0.02, time_shift_type="exponential", use_dynamic_shifting=True,
)  # fmt: skip
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
PUBLISHED_WORDS = 152064  # of Qwen2.5-VL's vocabulary
PUBLISHED_TOKENS = dict(
    image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653
)
# The matrix's entries stay below FP16's 65504, but its products with a normalised token exceed it.
OVERFLOW_GAIN = 2e5


def build(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    text_width: int = 128,
    joint_attention_dim: int | None = None,
    zero_cond_t: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    overflow_block: int | None = None,
    published_heads: bool = False,
) -> Path:
    """Write the checkpoint to `folder`, which must not exist yet, and return it.

    joint_attention_dim: the width of embeddings that the transformer takes; the text encoder's unless given.
    overflow_block: the number of a transformer block whose img_mlp.net.2 exceeds FP16's range, as in late
    blocks of the real model. published_heads: heads of the published sizes, and the published vocabulary, so
    that its parts can be single files. Its tokenizer is then ComfyUI's, which is not written.
    """
    heads = dict(attention_head_dim=32, num_attention_heads=2, axes_dims_rope=(8, 12, 12))
    if published_heads:
        heads = dict(attention_head_dim=128, num_attention_heads=2, axes_dims_rope=(16, 56, 56))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = {
        "transformer": QwenImageTransformer2DModel(
            num_layers=layers,
            joint_attention_dim=joint_attention_dim or text_width,
            zero_cond_t=zero_cond_t,
            **heads,
        ),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(text_encoder_config(text_width, published_heads)),
        "vae": AutoencoderKLQwenImage(base_dim=8),
    }
    for number, (name, model) in enumerate(parts.items()):
        randomize(model, seed + number)
        if name == "transformer" and overflow_block is not None:
            model.transformer_blocks[overflow_block].img_mlp.net[2].weight.data.mul_(OVERFLOW_GAIN)
        # torch's own `to`: that of diffusers warns of modules to keep in FP32, and this model has none
        torch.nn.Module.to(model, dtype).save_pretrained(partial / name)
    save_text_encoder_config(parts["text_encoder"].config, partial / "text_encoder")
    write_rest(partial)
    partial.rename(folder)
    return folder


def write_rest(folder: Path) -> None:
    """Everything of a checkpoint but its weights: scheduler, tokenizer, processor and index."""
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    tokenizer = train_tokenizer()
    for name in ("tokenizer", "processor"):
        save_tokenizer(tokenizer, folder / name)
    pixels = dict(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    Qwen2VLImageProcessor(**pixels).save_pretrained(folder / "processor")
    Qwen2VLVideoProcessor(**pixels).save_pretrained(folder / "processor")
    (folder / "model_index.json").write_text(json.dumps(model_index(), indent=2), encoding="utf-8")


def model_index() -> dict[str, object]:
    """FireRed-Image-Edit-1.0's model_index.json."""
    return {
        "_class_name": "QwenImageEditPlusPipeline",
        "_diffusers_version": "0.36.0.dev0",
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }


def text_encoder_config(width: int, published_heads: bool = False) -> Qwen2_5_VLConfig:
    head, sections, vision_heads = (128, [16, 24, 24], 80) if published_heads else (64, [8, 12, 12], 16)
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // head,
            num_key_value_heads=1,
            vocab_size=PUBLISHED_WORDS if published_heads else 512,
            rms_norm_eps=1e-6,
            **rotary(sections),
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=2 * vision_heads,
            num_heads=2,
            intermediate_size=64,
            out_hidden_size=width,
            fullatt_block_indexes=[] if published_heads else [1],
        ),
        **(PUBLISHED_TOKENS if published_heads else special_token_ids()),
        tie_word_embeddings=False,
    )


def rotary(sections: list[int]) -> dict[str, object]:
    """The text model's rotary embedding with the keys of transformers 4, which 5 reads too."""
    return dict(
        rope_theta=1e6, rope_scaling=dict(type="default", rope_type="default", mrope_section=sections)
    )


def save_text_encoder_config(config: Qwen2_5_VLConfig, folder: Path) -> None:
    """Write config.json as transformers 4 does: 4.57 does not know the `rope_parameters` that 5 writes."""
    written = json.loads(config.to_json_string()) | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    text = written["text_config"]
    text.pop("architectures", None)
    if rope := text.pop("rope_parameters", None):
        text |= rotary(rope["mrope_section"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")


def special_token_ids() -> dict[str, int]:
    """The numbers of the tokens for pictures and videos in the vocabulary of train_tokenizer()."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"{name}_token_id": name for name in ("vision_start", "vision_end")}
    return {key: SPECIAL_TOKENS.index(f"<|{name}|>") for key, name in names.items()}


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on CORPUS. Qwen's special tokens come first."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=1,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return bpe


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Qwen2Tokenizer as transformers 4 does: 4.57 cannot read what 5's save_pretrained writes."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    special = dict(normalized=False, special=True, lstrip=False, rstrip=False, single_word=False)
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {"content": token, **special} for number, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": 131072,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter from one generator: matrices keep the size of activations, norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and not name.endswith("gamma"):
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.02)
        else:
            parameter.copy_(1 + noise * 0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))
