"""Latents to pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .load import CATEGORY, VAE

TILINGS = ["auto", "whole", "tiled"]


class FireRedDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedDecode",
            display_name="FireRed Decode",
            category=CATEGORY,
            description="Decode a latent on the VAE's own device.",
            inputs=[
                VAE.Input("vae"),
                io.Latent.Input("latent"),
                io.Combo.Input(
                    "tiling",
                    options=TILINGS,
                    default="auto",
                    optional=True,
                    tooltip="auto: whole where it fits in memory, else in tiles, without seams.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(cls, vae: host.Handle, latent: dict[str, Any], tiling: str = "auto") -> io.NodeOutput:
        from .engine.vae import decode

        with host.borrow(vae) as autoencoder:
            free = host.free_memory(vae.spec.device)
            image = decode(autoencoder, vae.spec, latent["samples"], tiling, free)
        host.forget_run(latent)
        return io.NodeOutput(image)
