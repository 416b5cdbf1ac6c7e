"""How much memory and time an edit takes on a card, before anything is loaded.

The constants come from runs of a real-size transformer with random weights: the README's "Measured" (an H200)
and, for the parts of a forward, an H100. Memory is linear in tokens or pixels, time follows the FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cards.speeds import Speeds
from ..files.checkpoint import Checkpoint
from ..files.tensors import stored_bytes
from ..latents import MEGAPIXEL, TOKEN_PIXELS, VAE_SCALE
from ..units import GIB
from .names import is_big_matrix, model_name
from .precision import Precision

# What the driver, CUDA's kernels and holes between allocations take of a card. Not measured: a usual figure.
RESERVED_BYTES = GIB // 2

# Memory beside the weights, measured on an H200 (tests/benchmarks/memory.py) and linear from there.
# Numbers that live at once for each token and channel of the model's width, within 2 % of what an H100 needed
# from 5370 to 16634 tokens: 1.04 GiB in FP32 and 0.52 in BF16 at 8442 tokens of 3072.
TRANSFORMER_VECTORS = 10.9
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

# Time that is neither matrix products nor attention, in seconds a forward of MEASURED_VALUES on the H100, by
# (precision, dtype of its arithmetic). It is bound by memory, so it scales with tokens and with bandwidth.
MEASURED_VALUES = 8442 * 3072 * 60  # tokens, width, layers
MEASURED_BANDWIDTH = 3000.0  # GB/s that a copy reaches on an H100 SXM, nine tenths of its 3350
H100_FP32 = 52.7  # TFLOPS, of the same run
OVERHEAD_SECONDS = {
    ("fp32", torch.float32): 0.21,
    ("int8", torch.float32): 0.30,
    ("nf4", torch.float32): 0.16,
    ("int8-bnb", torch.float32): 0.44,
    ("int8-fast", torch.float32): 0.54,  # plain torch around the product, as where Triton does not run
    ("bf16", torch.bfloat16): 0.14,
    ("int8", torch.bfloat16): 0.19,
    ("int8-fast", torch.bfloat16): 0.19,
}
FUSED_INT8_SECONDS = 0.23  # int8-fast in FP32 with Triton: 1.55 s a forward, 1.32 of them products, attention

PROMPT_TOKENS = 54  # of a sentence; with one picture that makes the 250 text tokens of the measurements
PICTURE_TOKENS = 196  # a reference adds for the text encoder: 384x384 pixels, 28x28 a token


ESTIMATE_ERROR = 0.03  # of working bytes: what may be less than estimated is not refused
CONV_3D = 5  # dimensions of its weight


@dataclass(frozen=True)
class Edit:
    """What is asked for: size in pixels, reference pictures and their size, the prompt, steps.

    guided: whether true CFG makes a step two forwards.
    """

    width: int = 1024
    height: int = 1024
    references: int = 1
    steps: int = 40
    reference_megapixels: float = 1.0
    prompt_tokens: int = PROMPT_TOKENS
    guided: bool = True

    @property
    def text_tokens(self) -> int:
        return self.prompt_tokens + self.references * PICTURE_TOKENS

    @property
    def tokens(self) -> int:
        """What the transformer attends over: output, references and text."""
        reference = int(self.reference_megapixels * MEGAPIXEL) // TOKEN_PIXELS**2
        output = (self.width // TOKEN_PIXELS) * (self.height // TOKEN_PIXELS)
        return output + self.references * reference + self.text_tokens

    @property
    def forwards(self) -> int:
        return 2 if self.guided else 1


@dataclass(frozen=True)
class Shape:
    """The transformer's: layers, width (heads times their size), and heads."""

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


def weight_bytes(role: str, checkpoint: Checkpoint, precision: Precision) -> int:
    """About how many bytes a component's weights take once loaded, read off its files' headers.

    precision: resolved for its card.
    """
    total, layer = 0.0, precision.layer
    for stored, info in checkpoint.component(role).stored().items():
        name = model_name(role, stored)
        if name is None:
            continue
        numel = torch.Size(info["shape"]).numel()
        if role == "vae" and len(info["shape"]) == CONV_3D:
            # for single frames one time tap is kept, and nothing across time (layers.keep_single_frames)
            numel = 0 if "time_conv" in name else numel // info["shape"][2]
        if len(info["shape"]) != 2 or not name.endswith(".weight"):
            total += numel * precision.math.itemsize
        elif layer is not None and is_big_matrix(role, name):
            total += numel * layer.weight_bytes
        else:
            storage = precision.storage
            total += numel * storage.itemsize if storage else stored_bytes(info)
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


def transformer_bytes(checkpoint: Checkpoint, precision: Precision, tokens: int, fused: bool = True) -> int:
    """Bytes a forward over so many tokens needs beside the weights. precision: resolved for its card."""
    shape = Shape.of(checkpoint)
    scores = 0 if fused else score_bytes(shape.heads, shape.width, tokens)
    products = precision.layer.product_bytes if precision.layer else 0.0
    channel = max(TRANSFORMER_VECTORS * precision.math.itemsize, products)
    return int(channel * shape.width * tokens) + scores


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


def forward_seconds(speeds: Speeds, shape: Shape, tokens: int, precision: Precision) -> float | None:
    """Seconds one forward of the transformer takes, or None where the card's speed at it is not known.

    precision: resolved for the card, so that its arithmetic is decided.
    """
    products, attention = _rates(speeds, precision)
    if not products or not attention:
        return None
    busy = shape.linear_flops(tokens) / products + shape.attention_flops(tokens) / attention
    return busy / 1e12 + _overhead_seconds(speeds, shape, tokens, precision)


def step_seconds(
    speeds: tuple[Speeds, ...], shape: Shape, edit: Edit, precision: Precision, layout: str = "none"
) -> float | None:
    """Seconds a step takes: all its forwards on the first card, or with layout `cfg` one on each of two.

    Two cards measured 0.501 of one, so the exchange of latents costs nothing here.
    """
    forwards = [forward_seconds(card, shape, edit.tokens, precision) for card in speeds[: edit.forwards]]
    known = [seconds for seconds in forwards if seconds is not None]
    if len(known) < len(forwards):
        return None
    return max(known) if layout == "cfg" and len(known) > 1 else edit.forwards * known[0]


def _rates(speeds: Speeds, precision: Precision) -> tuple[float | None, float | None]:
    """TFLOPS of the matrix products and of attention."""
    if precision.compute is torch.bfloat16:
        products, attention = speeds.bf16, speeds.bf16_attention
    elif precision.compute is torch.float16:
        products, attention = speeds.fp16, speeds.bf16_attention or speeds.fp32_attention
    else:
        products, attention = speeds.fp32, speeds.fp32_attention
    if precision.name in ("int8-fast", "int8-bnb"):
        products = speeds.int8 or products
    return products, attention


def _overhead_seconds(speeds: Speeds, shape: Shape, tokens: int, precision: Precision) -> float:
    bandwidth = speeds.bandwidth or MEASURED_BANDWIDTH * speeds.fp32 / H100_FP32
    math = torch.float32 if precision.compute is torch.float32 else torch.bfloat16
    usual = OVERHEAD_SECONDS["bf16" if math is torch.bfloat16 else "fp32", math]
    seconds = OVERHEAD_SECONDS.get((precision.name, math), usual)
    if precision.name == "int8-fast" and math is torch.float32 and speeds.bf16:
        seconds = FUSED_INT8_SECONDS  # Triton runs on all cards that have BF16
    return seconds * (tokens * shape.width * shape.layers / MEASURED_VALUES) * MEASURED_BANDWIDTH / bandwidth
