"""LoRAs over a transformer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .engine.sampling.options import STRENGTH
from .engine.weights.adapters import Adapter
from .load import CATEGORY, Transformer


class FireRedLoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedLoadLoRA",
            display_name="FireRed Load LoRA",
            category=CATEGORY,
            search_aliases=["LoRA loader", "Lightning LoRA"],
            description="Lay a LoRA over the transformer, at any precision. Several can follow each other.",
            inputs=[
                Transformer.Input("transformer"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=STRENGTH.low,
                    max=STRENGTH.high,
                    step=0.01,
                    optional=True,
                    tooltip="1 is as trained, 0 is without. Changing it loads nothing again.",
                ),
                io.Combo.Input(
                    "lora",
                    options=host.lora_names(),
                    optional=True,  # as strength is: the page would show required inputs before it
                    tooltip="A .safetensors file in models/loras, made for Qwen-Image-Edit or FireRed.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: Any = None, **_: Any) -> str:
        return host.lora_fingerprint(lora)

    @classmethod
    def execute(
        cls, transformer: host.Handle, strength: float = 1.0, lora: str | None = None
    ) -> io.NodeOutput:
        handle, strength = host.require_handle(transformer, "transformer"), STRENGTH.require(strength)
        adapter = Adapter(host.get_lora(lora, handle.replica.spec.checkpoint), strength)
        return io.NodeOutput(handle.with_options(adapters=(*handle.options.adapters, adapter)))
