"""How much memory and time an edit takes on a card, before anything is loaded.

Memory is linear in tokens or pixels, by constants that were measured at the real size with random weights
(docs/measured.md). Time follows from the rates of the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cards.speeds import Speeds
from ..files.checkpoint import Checkpoint
from ..latents import MEGAPIXEL, TOKEN_PIXELS, VAE_SCALE
from ..limits import EXACT, INT8
from ..units import GIB
from .names import EMBEDDING, by_model_name, is_big_matrix, is_held
from .precision import Precision

# What the driver, CUDA's kernels and holes between allocations take of a card. Not measured: a usual figure.
RESERVED_BYTES = GIB // 2

# Memory beside the weights, measured on an H200 (tests/benchmarks/memory.py) and linear from there.
# Numbers that live at once for each token and channel of the model's width, within 2 % of what an H100 needed
# from 5370 to 16634 tokens: 1.04 GiB in FP32 and 0.52 in BF16 at 8442 tokens of 3072.
TRANSFORMER_VECTORS = 10.9
GATHERED_VECTORS = 2  # keys and values of the tokens of all cards
# Where no fused attention kernel runs, torch holds the scores of all heads, before and after the softmax, and
# copies of what it multiplies, all in FP32: 14.5 GiB instead of 1.0 at 8442 tokens, measured in FP32.
SCORE_COPIES, SCORE_VECTORS = 2, 7
# What the encoder needs for a short prompt (in FP32, matrices upcast as they are used), and what each token
# adds: three vectors of the MLP's width and a few of the model's. 9.3 - 8.4 GiB in FP32, 14.6 - 14.4 in BF16.
TEXT_ENCODER_BYTES = {torch.float32: 0.86 * GIB, torch.bfloat16: 0.13 * GIB}
TEXT_ENCODER_TOKEN_VALUES = 75_000
# Bytes a pixel and channel of base_dim, by the size of a number, the convolutions' workspace included. At 96
# channels decoding takes 2.27 GiB a megapixel in FP32 and 1.33 in BF16, encoding 1.89 and 1.14.
DECODE_BYTES = {4: 24.3, 2: 14.2}
ENCODE_BYTES = {4: 20.2, 2: 12.2}
FEATURES = 4  # times base_dim, what attention over the whole picture leaves for each latent
SMALLEST_TILE = 40  # latents a side; see vae.py

# Numbers that a forward reads and writes for each token, channel and layer beside matrix products and
# attention. Fitted to the steps that docs/measured.md has for an H100: the estimate is 1 to 3 % above them in
# FP32 arithmetic; in BF16 it is 10 % above for bf16, 6 % below for int8 and 12 % below for int8-fast. It is
# 17 % below for int8-fast without Triton and 30 % below for int8-bnb, which move more.
MOVED_NUMBERS = 120
# The same in bytes where our kernels run between products: by whether products are of INT8, and by the size
# of a number. Fitted to an H100; rows.cu reads and writes 83, 63, 96 and 48, at 65 to 94 % of a copy's rate.
MOVED_BYTES = {True: {4: 104, 2: 79}, False: {4: 102, 2: 74}}
FORWARDS = 2  # of a step: true CFG

PROMPT_TOKENS = 54  # of a sentence; with one picture that makes the 250 text tokens of the measurements
PICTURE_TOKENS = 196  # a reference adds for the text encoder: 384x384 pixels, 28x28 a token


ESTIMATE_ERROR = 0.03  # of working bytes: what may be less than estimated is not refused
CONV_3D = 5  # dimensions of its weight


@dataclass(frozen=True)
class Edit:
    """What is asked for, with a prompt of a sentence: size in pixels, reference pictures, steps."""

    width: int = 1024
    height: int = 1024
    references: int = 1
    steps: int = 40
    reference_megapixels: float = 1.0

    @property
    def text_tokens(self) -> int:
        return PROMPT_TOKENS + self.references * PICTURE_TOKENS

    @property
    def tokens(self) -> int:
        """What the transformer attends over: output, references and text."""
        reference = int(self.reference_megapixels * MEGAPIXEL) // TOKEN_PIXELS**2
        output = (self.width // TOKEN_PIXELS) * (self.height // TOKEN_PIXELS)
        return output + self.references * reference + self.text_tokens


@dataclass(frozen=True)
class Shape:
    """The transformer's layers, its width (heads times their size) and its heads."""

    layers: int
    width: int
    heads: int = 24

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shape:
        config = checkpoint.component("transformer").config()
        heads, size = config["num_attention_heads"], config["attention_head_dim"]
        return cls(config["num_layers"], heads * size, heads)

    def linear_flops(self, tokens: int) -> float:
        """Of a forward: attention's four matrices are 4 width^2 weights a token and layer, the MLP's 8."""
        return 2.0 * 12 * self.width**2 * self.layers * tokens

    def attention_flops(self, tokens: int) -> float:
        """Of a forward: two products of tokens x tokens x width a layer."""
        return 4.0 * tokens**2 * self.width * self.layers


def fits(weights: float, working: float, room: float) -> bool:
    """Whether weights and what they work with go into `room` bytes. The one rule for all who ask."""
    return weights + working * (1 - ESTIMATE_ERROR) <= room


def weight_bytes(
    role: str, checkpoint: Checkpoint, precision: Precision, held: Sequence[int] | None = None
) -> int:
    """About how many bytes a component's weights take once loaded, read off its files' headers.

    precision: resolved for its card. held: of a part of the transformer, its blocks.
    """
    total, layer = 0.0, precision.layer
    for name, stored in by_model_name(role, checkpoint.component(role).stored()).items():
        if not is_held(name, held):
            continue
        shape, numel = stored.shape, torch.Size(stored.shape).numel()
        if role == "vae" and len(shape) == CONV_3D:
            # for single frames one time tap is kept, and nothing across time (vae.keep_single_frames)
            numel = 0 if "time_conv" in name else numel // shape[2]
        if len(shape) != 2 or not name.endswith(".weight"):
            total += numel * precision.math.itemsize
        elif layer is not None and is_big_matrix(role, name):
            total += numel * layer.weight_bytes
        elif precision.storage is not None:
            total += numel * precision.storage.itemsize
        elif precision.keeps(stored.encoding) and name != EMBEDDING:
            total += stored.nbytes
        else:
            total += numel * stored.decoded_dtype.itemsize
    return int(total)


def workspace_bytes(
    role: str,
    checkpoint: Checkpoint,
    precision: Precision,
    edit: Edit,
    tiled: bool = False,
    fused: bool = True,
) -> int:
    """Bytes a component needs beside its weights while it works.

    precision: resolved for its card. tiled: whether the VAE decodes in tiles. fused: whether attention runs
    without holding its scores.
    """
    math = precision.math
    if role == "transformer":
        return transformer_bytes(checkpoint, precision, edit.tokens, fused)
    if role == "text_encoder":
        fixed = TEXT_ENCODER_BYTES.get(math, TEXT_ENCODER_BYTES[torch.float32])
        beside = int(fixed) + TEXT_ENCODER_TOKEN_VALUES * edit.text_tokens * math.itemsize
        heads, width = _text_encoder_heads(checkpoint)
        return beside + (0 if fused else score_bytes(heads, width, edit.text_tokens))
    height, width = edit.height // VAE_SCALE, edit.width // VAE_SCALE
    tile = SMALLEST_TILE if tiled else max(height, width)
    decoding = decode_bytes(checkpoint, math, height, width, tile, fused)
    pixels = edit.reference_megapixels * MEGAPIXEL if edit.references else 0
    channels = _vae_channels(checkpoint)
    encoding = pixels * channels * ENCODE_BYTES[math.itemsize]
    scores = 0 if fused else score_bytes(1, FEATURES * channels, int(pixels) // VAE_SCALE**2)
    return int(max(decoding, encoding, scores))


def transformer_bytes(
    checkpoint: Checkpoint,
    precision: Precision,
    tokens: int,
    fused: bool = True,
    cards: int = 1,
    adapted: bool = False,
) -> int:
    """Bytes a forward over so many tokens needs beside the weights. precision: resolved for its card.

    cards: over how many the tokens are split. Each holds the keys and values of all of them. adapted: whether
    there is a LoRA; its factors are not counted.
    """
    shape = Shape.of(checkpoint)
    scores = 0 if fused else score_bytes(shape.heads, shape.width, tokens) // cards
    products = precision.layer.product_bytes if precision.layer else 0.0
    if precision.layer and adapted:
        products += precision.layer.added_numbers * precision.math.itemsize
    channel = max(TRANSFORMER_VECTORS * precision.math.itemsize, products) / cards
    gathered = GATHERED_VECTORS * precision.math.itemsize if cards > 1 else 0
    return int((channel + gathered) * shape.width * tokens) + scores


def shared_bytes(checkpoint: Checkpoint, precision: Precision, tokens: int, cards: int) -> int:
    """Bytes of keys and values that each of the cards gets from the others in a forward."""
    shape = Shape.of(checkpoint)
    others = GATHERED_VECTORS * precision.math.itemsize * tokens * (cards - 1) / cards
    return int(others * shape.width * shape.layers)


def score_bytes(heads: int, width: int, tokens: int) -> int:
    """Bytes that attention over so many tokens takes where no fused kernel runs. width: of all heads."""
    return (SCORE_COPIES * heads * tokens**2 + SCORE_VECTORS * width * tokens) * torch.float32.itemsize


def decode_bytes(
    checkpoint: Checkpoint, math: torch.dtype, height: int, width: int, tile: int, fused: bool = True
) -> int:
    """Bytes that decoding latents of that size in tiles of `tile` latents needs beside the weights.

    Attention over the whole picture comes before the tiles, so that no tile makes it smaller.
    """
    channels = _vae_channels(checkpoint)
    pixels = min(height, tile) * min(width, tile) * VAE_SCALE**2
    features = height * width * FEATURES * channels * math.itemsize  # of the whole picture, beside any tile
    scores = 0 if fused else score_bytes(1, FEATURES * channels, height * width)
    return max(int(pixels * channels * DECODE_BYTES[math.itemsize]), scores) + features


def _text_encoder_heads(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many heads the language model has, and their width together; by default Qwen2.5-VL-7B's."""
    config = checkpoint.component("text_encoder").config()
    config = config.get("text_config") or config
    return config.get("num_attention_heads", 28), config.get("hidden_size", 3584)


def _vae_channels(checkpoint: Checkpoint) -> int:
    return checkpoint.component("vae").config()["base_dim"]


def forward_seconds(
    speeds: Speeds | None, shape: Shape, tokens: int, precision: Precision, attention: str = EXACT
) -> float | None:
    """Seconds one forward of the transformer takes, or None where the card's speed at it is not known.

    It is the sum of matrix products, attention, and what only moves numbers through memory.
    precision: resolved for the card. attention: EXACT or INT8.
    """
    if speeds is None:
        return None
    products, attention_rate = {
        torch.float32: (speeds.fp32, speeds.fp32_attention),
        torch.bfloat16: (speeds.bf16, speeds.bf16_attention),
        torch.float16: (speeds.fp16, speeds.bf16_attention or speeds.fp32_attention),
    }[precision.math]
    if precision.integer_products:
        products = speeds.int8 or products
    if attention == INT8:
        attention_rate = speeds.int8_attention
    if not (products and attention_rate and speeds.bandwidth):
        return None
    moved: float = MOVED_NUMBERS * precision.math.itemsize
    if speeds.row_kernels and not precision.fp16_inside and precision.math != torch.float16:
        moved = MOVED_BYTES[precision.integer_products][precision.math.itemsize]
    moved_bytes = moved * tokens * shape.width * shape.layers
    computing = shape.linear_flops(tokens) / products + shape.attention_flops(tokens) / attention_rate
    return computing / 1e12 + moved_bytes / (speeds.bandwidth * 1e9)


def step_seconds(
    speeds: Speeds | None, shape: Shape, edit: Edit, precision: Precision, attention: str = EXACT
) -> float | None:
    """Seconds a step with guidance takes on one card: two forwards. As forward_seconds."""
    seconds = forward_seconds(speeds, shape, edit.tokens, precision, attention)
    return None if seconds is None else FORWARDS * seconds
