"""The transformer's sizes, from its config.json, and the error about a config that describes no model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..files.checkpoint import Component


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's sizes.

    text_width: of the text embeddings. axes: the channels of a head that the rotary embedding gives to the
    picture's number, the row and the column. zero_cond_t: whether references are modulated at timestep 0.
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
        """Read the config that Component.config returns: checked, and with diffusers' defaults."""
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_size=config["attention_head_dim"],
            text_width=config["joint_attention_dim"],
            axes=tuple(config.get("axes_dims_rope", cls.axes)),
            zero_cond_t=bool(config.get("zero_cond_t")),
        )


@contextlib.contextmanager
def config_errors(component: Component) -> Iterator[None]:
    """Turn a library's error about a config into a CheckpointError that names the config.json."""
    try:
        yield
    except Exception as error:  # the libraries raise many types
        raise CheckpointError(
            f"{component.path}: its configuration does not describe a model that can be built ({error}). "
            "Download this file again."
        ) from error
