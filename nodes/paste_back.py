"""The paste node: the original picture comes back outside of a mask."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .engine.images import pasted, require_image
from .engine.masks import FEATHER, GROW, read_mask
from .load import CATEGORY


class FireRedPasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedPasteBack",
            display_name="FireRed Paste Back",
            category=CATEGORY,
            description="Lay the edit over the original inside of a mask. Outside of it no pixel changes.",
            search_aliases=["inpaint stitch", "composite masked", "uncrop", "restore outside mask"],
            inputs=[
                io.Image.Input("edited", tooltip="Resized to the original if it has another size."),
                io.Image.Input("original", tooltip="If it has alpha, the result has the same alpha."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is what the edit may change; everything without it.",
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=GROW.low,
                    max=GROW.high,
                    optional=True,
                    tooltip="Pixels by which the mask gets wider on every side.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=FEATHER.low,
                    max=FEATHER.high,
                    optional=True,
                    tooltip="Pixels, beyond the grown mask, in which the edit fades into the original.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        edited: torch.Tensor,
        original: torch.Tensor,
        mask: torch.Tensor | None = None,
        grow: int = 8,
        feather: int = 16,
    ) -> io.NodeOutput:
        grow, feather = GROW.require(grow), FEATHER.require(feather)
        pictures = require_image(edited, "edited"), require_image(original, "original")
        masks = None if mask is None else read_mask(mask, "mask")
        return io.NodeOutput(pasted(*pictures, masks, grow, feather))
