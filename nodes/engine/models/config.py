"""What a transformer's config.json says of its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's sizes.

    text_width: of the embeddings it takes. axes: how a head's channels are divided among picture number, row
    and column in the rotary embedding. zero_cond_t: whether references are modulated as at timestep 0.
    """

    layers: int
    heads: int
    head_size: int
    text_width: int
    axes: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @classmethod
    def of(cls, config: dict[str, Any]) -> TransformerConfig:
        """From a transformer's config as Component.config gives it, checked and with diffusers' defaults."""
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_size=config["attention_head_dim"],
            text_width=config["joint_attention_dim"],
            axes=tuple(config.get("axes_dims_rope", cls.axes)),
            zero_cond_t=bool(config.get("zero_cond_t")),
        )
