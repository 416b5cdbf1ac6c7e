"""Qwen-Image's transformer. It computes what diffusers' QwenImageTransformer2DModel computes.

Its weights have diffusers' names, and the tests compare the results. Everything that depends on the timestep
alone is an argument of the forward, see modulation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn import Linear, Module, ModuleDict, ModuleList

from ..cuda.rows import EPS, Rows, gelu
from ..cuda.rows import Modulation as RowModulation
from ..latents import LATENT_CHANNELS, PATCH
from ..weights.components import Replica
from .between import (
    Activations,
    HeadsOf,
    Result,
    activated,
    add_gated,
    joined_heads,
    normed_for,
    prepared,
    token_count,
)
from .config import TransformerConfig
from .modulation import Modulation, StepModulation

ROTARY_BASE = 10_000
TOKEN_CHANNELS = LATENT_CHANNELS * PATCH**2
FP16_MAX = torch.finfo(torch.float16).max
IMAGE, TEXT = 0, 1  # the two streams, in the modulation's order

Rotary = tuple[torch.Tensor, torch.Tensor]
# Query, key and value (1, heads, tokens, head size), and a mask (1, 1, 1, tokens) or None, to the result.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention by the kernel that torch chooses for the card. Shapes as in Attend."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attention_mask(text: torch.Tensor | None, image_tokens: int) -> torch.Tensor | None:
    """The mask (1, 1, 1, tokens) of text (1, T) bool, False for tokens to ignore, and of all the image's."""
    if text is None:
        return None
    return torch.cat([text, text.new_ones(1, image_tokens)], dim=1)[:, None, None]


def rotary_embedding(
    config: TransformerConfig, grids: Sequence[tuple[int, int]], text_tokens: int, device: torch.device
) -> Rotary:
    """Rotations for the image's and the text's tokens, complex64, each (tokens, head size / 2).

    grids: rows and columns of tokens, of the denoised picture and then of each reference. Positions count
    from the middle of each picture. The text's positions come after the largest of them.
    """
    parts = []
    for number, (rows, columns) in enumerate(grids):
        row, column = (torch.arange(side) - (side - side // 2) for side in (rows, columns))
        parts.append(torch.cartesian_prod(torch.tensor([number]), row, column))
    start = max(max(rows // 2, columns // 2) for rows, columns in grids)
    text = (start + torch.arange(text_tokens)).unsqueeze(1).expand(-1, len(config.axes))
    return _rotations(torch.cat(parts), config.axes).to(device), _rotations(text, config.axes).to(device)


def _rotations(positions: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Positions (tokens, axes) to rotations (tokens, half the sum of axes), complex64."""
    angles = []
    for axis, channels in enumerate(axes):
        frequencies = 1.0 / torch.pow(ROTARY_BASE, torch.arange(0, channels, 2).float() / channels)
        angles.append(torch.outer(positions[:, axis], frequencies))
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


class RMSNorm(Module):
    """Root mean square norm over the last dimension (https://huggingface.co/papers/1910.07467)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


class Attention(Module):
    """Attention of both streams' tokens to the tokens of both."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, size = config.width, config.head_size
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (RMSNorm(size) for _ in range(4))
        self.to_out = ModuleList([Linear(width, width)])
        self.to_add_out = Linear(width, width)
        self.head_size = size

    def keys_and_values(
        self, image: Activations, text: Activations, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, T + I, heads, head size) of these tokens, as forward takes them."""
        key = joined_heads(
            HeadsOf(self.add_k_proj(text), self.norm_added_k, rotary[TEXT]),
            HeadsOf(self.to_k(image), self.norm_k, rotary[IMAGE]),
            self.head_size,
        )
        value = joined_heads(HeadsOf(self.add_v_proj(text)), HeadsOf(self.to_v(image)), self.head_size)
        return key, value

    def forward(
        self,
        image: Activations,
        text: Activations,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary: Rotary,
        mask: torch.Tensor | None,
        attend: Attend,
    ) -> tuple[Result, Result]:
        """The changes of image (1, I, width) and text (1, T, width), which are normed and modulated.

        key, value: of all tokens to attend to, (1, tokens, heads, head size).
        """
        text_tokens = token_count(text)
        query = joined_heads(
            HeadsOf(self.add_q_proj(text), self.norm_added_q, rotary[TEXT]),
            HeadsOf(self.to_q(image), self.norm_q, rotary[IMAGE]),
            self.head_size,
        )
        attended = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        attended = attended.transpose(1, 2).flatten(2)
        out, add_out = self.to_out[0], self.to_add_out
        for_image, for_text = attended[:, text_tokens:], attended[:, :text_tokens]
        return out(prepared(for_image, out)), add_out(prepared(for_text, add_out))


class GELU(Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(self.proj(x))


class FeedForward(Module):
    def __init__(self, width: int):
        super().__init__()
        # The middle module takes the number of diffusers' dropout, so that the names agree.
        self.net = ModuleList([GELU(width, 4 * width), Module(), Linear(4 * width, width)])

    @property
    def first(self) -> Module:
        """The layer that reads the input."""
        layer = self.net[0].proj
        assert isinstance(layer, Module)
        return layer

    def forward(self, x: Activations) -> Result:
        """x and the result: (1, tokens, width)."""
        if isinstance(x, Rows):
            return self.net[2](activated(self.first(x), self.net[2]))
        return self.net[2](self.net[0](x))


class Attending(NamedTuple):
    """A block's work before its attention: its normed and modulated streams, and their keys and values."""

    image: Activations
    text: Activations
    key: torch.Tensor
    value: torch.Tensor


class Block(Module):
    """Attention over both streams, then an MLP for each."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attn = Attention(config)
        self.img_mlp, self.txt_mlp = FeedForward(config.width), FeedForward(config.width)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        targets: int,
        rotary: Rotary,
        mask: torch.Tensor | None = None,
        attend: Attend = attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """image (1, I, width) and text (1, T, width) after this block.

        modulation: (rows, 2, 6 * width), one layer of StepModulation.blocks. targets: how many tokens of the
        image are denoised. They come first and use the first row; references use the last.
        """
        begun = self.begin(image, text, modulation, targets, rotary)
        image, text = self.attention(image, text, begun, modulation, targets, rotary, mask, attend)
        del begun
        return self.feed_forward(image, text, modulation, targets)

    def begin(
        self, image: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, targets: int, rotary: Rotary
    ) -> Attending:
        """The first part of the forward. Cards that share the tokens exchange its keys and values."""
        for_image, for_text = _modulations(modulation, targets)
        attn = self.attn
        image_in = normed_for([attn.to_q, attn.to_k, attn.to_v], image, for_image, 0)
        text_in = normed_for([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], text, for_text, 0)
        return Attending(image_in, text_in, *attn.keys_and_values(image_in, text_in, rotary))

    def attention(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        begun: Attending,
        modulation: torch.Tensor,
        targets: int,
        rotary: Rotary,
        mask: torch.Tensor | None = None,
        attend: Attend = attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second part. begun: its keys and values may be those of more tokens."""
        for_image, for_text = _modulations(modulation, targets)
        image_change, text_change = self.attn(*begun, rotary, mask, attend)
        return add_gated(image, image_change, for_image, 2), add_gated(text, text_change, for_text, 2)

    def feed_forward(
        self, image: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, targets: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last part."""
        for_image, for_text = _modulations(modulation, targets)
        image = _add_mlp(self.img_mlp, image, for_image)
        text = _add_mlp(self.txt_mlp, text, for_text)
        if image.dtype == torch.float16:  # as diffusers does; the guard reports it
            image, text = image.clip(-FP16_MAX, FP16_MAX), text.clip(-FP16_MAX, FP16_MAX)
        return image, text


class QwenImageTransformer(Module):
    """The whole model without the layers that depend on the timestep alone: see StepModulation.

    held: the blocks that it has, by their numbers; all of them by default.
    """

    def __init__(self, config: TransformerConfig, held: Sequence[int] | None = None):
        super().__init__()
        self.config = config
        self.img_in, self.txt_in = (
            Linear(TOKEN_CHANNELS, config.width),
            Linear(config.text_width, config.width),
        )
        self.txt_norm = RMSNorm(config.text_width)
        numbers = range(config.layers) if held is None else held
        self.transformer_blocks = ModuleDict({str(number): Block(config) for number in numbers})
        self.proj_out = Linear(config.width, TOKEN_CHANNELS)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: StepModulation,
        rotary: Rotary,
        targets: int,
        mask: torch.Tensor | None = None,
        attend: Attend = attend,
    ) -> torch.Tensor:
        """The velocity (1, targets, 64) predicted for the first `targets` tokens.

        image: (1, I, 64), the denoised tokens, then those of the references. text: (1, T, text_width).
        rotary: from rotary_embedding. mask: from attention_mask.
        """
        image, text = self.enter(image, text)
        for number in range(self.config.layers):
            image, text = self.block(number)(
                image, text, modulation.blocks[:, number], targets, rotary, mask, attend
            )
        return self.leave(image, modulation, targets)

    def enter(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams before the first block: (1, I, width) and (1, T, width)."""
        return self.img_in(image), self.txt_in(self.txt_norm(text))

    def block(self, number: int) -> Block:
        block = self.transformer_blocks[str(number)]
        assert isinstance(block, Block)
        return block

    def stops(self) -> list[Module]:
        """The modules before which a forward may be stopped, see progress.before_each_block."""
        return [self.block(int(number)).attn for number in self.transformer_blocks]

    def leave(self, image: torch.Tensor, modulation: StepModulation, targets: int) -> torch.Tensor:
        """The velocity from the image's stream after the last block."""
        scale, shift = modulation.out.chunk(2)
        normed = F.layer_norm(image[:, :targets], (image.shape[-1],), eps=EPS)
        return self.proj_out(torch.addcmul(shift, normed, 1 + scale))


@dataclass(frozen=True)
class Transformer:
    """A loaded transformer. arithmetic: the names of the kernels that its layers chose by a test."""

    replica: Replica
    model: QwenImageTransformer
    modulation: Modulation
    arithmetic: str


def _modulations(modulation: torch.Tensor, targets: int) -> tuple[RowModulation, RowModulation]:
    """Of the image's and the text's stream: modulation (rows, 2, 6 * width) of one block."""
    return RowModulation(modulation[:, IMAGE], targets), RowModulation(modulation[:1, TEXT], 0)


def _add_mlp(mlp: FeedForward, x: torch.Tensor, modulation: RowModulation) -> torch.Tensor:
    return add_gated(x, mlp(normed_for([mlp.first], x, modulation, 3)), modulation, 5)
