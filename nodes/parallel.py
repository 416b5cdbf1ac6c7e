"""Several cards on one image, or a cluster's on many."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .engine.sampling.layout import AUTO, MODE
from .load import CATEGORY, Transformer


class FireRedParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedParallel",
            display_name="FireRed Parallel",
            category=CATEGORY,
            search_aliases=["multi GPU", "MultiGPU", "several cards", "Ray", "cluster"],
            description="Let several cards compute one image together, or the cards of several machines a "
            "picture each. With one card it changes nothing.",
            inputs=[
                Transformer.Input("transformer"),
                io.String.Input(
                    "devices",
                    default="auto",
                    optional=True,
                    tooltip="auto: every card that helps. Or a list such as gpu:0, gpu:3, of which the "
                    "first one leads. Cards that this machine lacks are left out. ray: every card of a Ray "
                    "cluster, ray:2 two of them.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODE.options),
                    default=AUTO,
                    optional=True,
                    tooltip="cfg: each of two cards computes a branch of guidance. sequence: each computes a "
                    "part of the image. cfg+sequence: both. layers: each holds a part of a model that is too "
                    "big for one. pictures: each card of a cluster samples a picture of a batch; cfg works "
                    "there too.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def execute(cls, transformer: host.Handle, devices: str = AUTO, mode: str = AUTO) -> io.NodeOutput:
        return io.NodeOutput(host.share(host.require_handle(transformer, "transformer"), devices, mode))
