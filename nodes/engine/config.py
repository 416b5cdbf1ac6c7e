"""What a transformer's config.json says of its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

UNSUPPORTED = (
    "guidance_embeds",
    "use_additional_t_cond",
    "use_layer3d_rope",
)  # of other models of the family


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's sizes. Defaults are diffusers' own, for what a config.json leaves out.

    text_width: of the embeddings it takes. channels, out_channels: of a token. axes: how a head's channels
    are divided among picture number, row and column in the rotary embedding. zero_cond_t: whether references
    are modulated as at timestep 0.
    """

    layers: int = 60
    heads: int = 24
    head_size: int = 128
    text_width: int = 3584
    channels: int = 64
    out_channels: int = 64
    axes: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @classmethod
    def of(cls, config: dict[str, Any]) -> TransformerConfig:
        """From a transformer's config.json. Raises CheckpointError for a variant with other layers."""
        for name in UNSUPPORTED:
            if config.get(name):
                raise CheckpointError(
                    f"The transformer's config.json sets {name}: it is another model of the Qwen-Image "
                    "family, which these nodes do not run. Choose FireRed-Image-Edit or Qwen-Image-Edit."
                )
        channels, patch = config.get("in_channels", 64), config.get("patch_size", 2)
        return cls(
            layers=config.get("num_layers", 60),
            heads=config.get("num_attention_heads", 24),
            head_size=config.get("attention_head_dim", 128),
            text_width=config.get("joint_attention_dim", 3584),
            channels=channels,
            out_channels=patch**2 * (config.get("out_channels", 16) or channels),
            axes=tuple(config.get("axes_dims_rope", (16, 56, 56))),
            zero_cond_t=bool(config.get("zero_cond_t")),
        )
