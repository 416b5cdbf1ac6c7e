"""The loader nodes choose a checkpoint, a precision and a device. The weights load at their first use."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .engine.limits import ATTENTION, AUTO
from .engine.models.guard import GUARDS, STOP
from .engine.weights.precision import MATH, ROLE_PRECISIONS

CATEGORY = "FireRed"
Transformer = io.Custom("FIRERED_TRANSFORMER")
TextEncoder = io.Custom("FIRERED_TEXT_ENCODER")
VAE = io.Custom("FIRERED_VAE")


class _Loader(io.ComfyNode):
    """What the three loaders share: the check and the fingerprint of the checkpoint."""

    @classmethod
    def validate_inputs(cls, checkpoint: Any = None) -> bool | str:
        return host.validate_checkpoint(checkpoint, cls.ROLE)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: Any = None, **_: Any) -> str:
        return host.checkpoint_fingerprint(checkpoint, cls.ROLE)


def _inputs(role: str) -> list[io.Input]:
    component = {"vae": "VAE"}.get(role, role.replace("_", " "))
    return [
        io.Combo.Input(
            "checkpoint",
            options=host.checkpoint_names(role),
            tooltip="A FireRed or Qwen-Image-Edit folder in models/diffusers (the one with "
            f"model_index.json), or a file of its {component} in models/{host.FILE_FOLDERS[role]}.",
        ),
        io.Combo.Input(
            "precision",
            options=["auto", *ROLE_PRECISIONS[role]],
            default="auto",
            optional=True,
            tooltip=f"How the {component} is stored and computed. auto: the best that fits the device.",
        ),
        io.Combo.Input(
            "device",
            options=host.device_labels(),
            default="auto",
            optional=True,
            tooltip=f"Where the {component} runs. A device this machine lacks falls back to auto.",
        ),
    ]


def guard_input() -> io.Input:
    """The `guard` input, the same for every node that computes."""
    return io.Combo.Input(
        "guard",
        options=list(GUARDS),
        default=STOP,
        optional=True,
        advanced=True,
        tooltip="For NaN or infinity in a result. stop: end with an error that names the module. warn: log "
        "it and go on. off: do not check.",
    )


class FireRedLoadTransformer(_Loader):
    ROLE = "transformer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedLoadTransformer",
            display_name="FireRed Load Transformer",
            category=CATEGORY,
            search_aliases=["load diffusion model", "UNet loader", "Qwen-Image-Edit", "GGUF loader"],
            description="Choose the diffusion transformer, its precision and its device. Loads at first use.",
            inputs=[
                *_inputs(cls.ROLE),
                io.Combo.Input(
                    "math",
                    options=["auto", *MATH],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Force the arithmetic; the weights are stored as before. fp32 on a modern card "
                    "computes what a P40 would.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION.options),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="int8: faster on cards without tensor cores, and rounds. auto: exact, until "
                    "FireRed Numerics found that int8 costs no more than int8-fast does.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        precision: str = "auto",
        device: str = "auto",
        math: str = "auto",
        attention: str = AUTO,
    ) -> io.NodeOutput:
        return io.NodeOutput(host.open_component(cls.ROLE, checkpoint, precision, device, math, attention))

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: Any = None, precision: Any = "auto", attention: Any = AUTO, **_: Any
    ) -> str:
        files = host.checkpoint_fingerprint(checkpoint, cls.ROLE)
        return f"{files} {host.attention_fingerprint(checkpoint, precision, attention)}"


class FireRedLoadTextEncoder(_Loader):
    ROLE = "text_encoder"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedLoadTextEncoder",
            display_name="FireRed Load Text Encoder",
            category=CATEGORY,
            search_aliases=["load CLIP", "CLIP loader", "Qwen2.5-VL"],
            description="Choose the Qwen2.5-VL text encoder's precision and device. Loads at first use.",
            inputs=_inputs(cls.ROLE),
            outputs=[TextEncoder.Output("text_encoder", display_name="text_encoder")],
        )

    @classmethod
    def execute(cls, checkpoint: str, precision: str = "auto", device: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(host.open_component(cls.ROLE, checkpoint, precision, device))


class FireRedLoadVAE(_Loader):
    ROLE = "vae"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedLoadVAE",
            display_name="FireRed Load VAE",
            category=CATEGORY,
            search_aliases=["VAE loader"],
            description="Choose the VAE's precision and device. Loads at first use.",
            inputs=_inputs(cls.ROLE),
            outputs=[VAE.Output("vae", display_name="vae")],
        )

    @classmethod
    def execute(cls, checkpoint: str, precision: str = "auto", device: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(host.open_component(cls.ROLE, checkpoint, precision, device))
