"""The decode node: latents to pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .engine.latents import REPORT, latent_samples, native_size, require_latents
from .engine.limits import TILING
from .engine.models.guard import GUARD, STOP
from .load import CATEGORY, VAE, guard_input


class FireRedDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedDecode",
            display_name="FireRed Decode",
            category=CATEGORY,
            search_aliases=["VAE decode", "latent to image"],
            description="Decode a latent on the VAE's own device. A native size is restored.",
            inputs=[
                VAE.Input("vae"),
                io.Latent.Input("latent"),
                io.Combo.Input(
                    "tiling",
                    options=list(TILING.options),
                    default="auto",
                    optional=True,
                    tooltip="auto: whole if it fits into memory, else in tiles without seams.",
                ),
                guard_input(),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, vae: host.Handle, latent: dict[str, Any], tiling: str = "auto", guard: str = STOP
    ) -> io.NodeOutput:
        from .engine.models.vae import decode, decoding_bytes, require_room_to_decode

        tiling, guard = TILING.require(tiling), GUARD.require(guard)
        host.require_handle(vae, "vae")
        what = "The latent to decode"
        samples = require_latents(latent_samples(latent, what), what)
        *_, height, width = samples.shape
        require_room_to_decode(vae.replica, height, width, tiling, host.room(vae.replica))
        with host.borrow(vae, decoding_bytes(vae.replica, height, width, tiling)) as loaded:
            free = host.free_memory(vae.replica.device)
            image = decode(loaded, samples, tiling, free, guard)
        host.forget_run(latent)
        if isinstance(report := latent.get(REPORT), str):  # of a sampler that ran in an earlier prompt
            host.write_into_png(cls.hidden.extra_pnginfo, report)
        if size := native_size(latent, height, width):
            image = image[:, : size[1], : size[0]].contiguous()
        return io.NodeOutput(image)
