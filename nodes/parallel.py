"""Several cards on one image."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .engine.sampling.layout import AUTO, MODES
from .load import CATEGORY, Transformer


class FireRedParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedParallel",
            display_name="FireRed Parallel",
            category=CATEGORY,
            search_aliases=["multi GPU", "MultiGPU", "several cards"],
            description="Let several cards compute one image together. With one card it changes nothing.",
            inputs=[
                Transformer.Input("transformer"),
                io.String.Input(
                    "devices",
                    default="auto",
                    optional=True,
                    tooltip="auto: every card that helps. Or a list such as gpu:0, gpu:3, of which the "
                    "first one leads. Cards that this machine lacks are left out.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=AUTO,
                    optional=True,
                    tooltip="cfg: each of two cards computes a branch of guidance. sequence: each computes a "
                    "part of the image. cfg+sequence: both. layers: each holds a part of a model that is too "
                    "big for one.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def execute(cls, transformer: host.Handle, devices: str = AUTO, mode: str = AUTO) -> io.NodeOutput:
        return io.NodeOutput(host.share(host.require_handle(transformer, "transformer"), devices, mode))
