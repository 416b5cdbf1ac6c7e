"""What fits where and how long it takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from . import host
from .engine.images import to_image
from .engine.latents import MAX_SIZE, MIN_SIZE, TOKEN_PIXELS
from .engine.limits import REFERENCES, STEPS, Whole
from .engine.planning.memory_map import draw_memory_map
from .engine.planning.plan import Plan
from .engine.planning.planner import ROLES
from .engine.weights.estimates import Edit
from .load import CATEGORY

WIDTH, HEIGHT = (Whole(side, MIN_SIZE, MAX_SIZE) for side in ("width", "height"))
DeviceLabel = io.Custom("STRING,COMBO")  # to be shown as text, and to be linked to a loader's `device`


class FireRedHardwarePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = dict(default=1024, min=WIDTH.low, max=WIDTH.high, step=TOKEN_PIXELS, optional=True)
        return io.Schema(
            node_id="FireRedHardwarePlan",
            display_name="FireRed Hardware Plan",
            category=CATEGORY,
            search_aliases=["VRAM", "memory map", "out of memory", "how long"],
            description="What the loaders' auto chooses on this machine, and how long an edit takes. "
            "Loads nothing.",
            inputs=[
                io.Int.Input("width", **size, tooltip="Of the picture to make, in pixels."),
                io.Int.Input("height", **size, tooltip="Of the picture to make, in pixels."),
                io.Int.Input(
                    "references",
                    default=1,
                    min=REFERENCES.low,
                    max=REFERENCES.high,
                    optional=True,
                    tooltip="How many pictures the edit starts from, at 1 megapixel each.",
                ),
                io.Int.Input("steps", default=40, min=STEPS.low, max=STEPS.high, optional=True),
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoint_names("transformer"),
                    optional=True,
                    tooltip="Without one, the first there is.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.String.Output("text", display_name="text"),
                *(DeviceLabel.Output(f"{role}_device", display_name=f"{role}_device") for role in ROLES),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: Any = None) -> bool | str:
        return host.validate_checkpoint(checkpoint, "transformer")

    @classmethod
    def fingerprint_inputs(cls, checkpoint: Any = None, **_: Any) -> str:
        return host.checkpoint_fingerprint(checkpoint, "transformer", ROLES)

    @classmethod
    def execute(
        cls,
        width: int = 1024,
        height: int = 1024,
        references: int = 1,
        steps: int = 40,
        checkpoint: str | None = None,
    ) -> io.NodeOutput:
        size = WIDTH.require(width), HEIGHT.require(height)
        edit = Edit(*size, REFERENCES.require(references), STEPS.require(steps))
        found = host.get_checkpoint(checkpoint or host.checkpoint_names("transformer")[0], "transformer")
        plan = host.hardware_plan(found, edit, measure_cpu=True)
        placed = {there.role: there.device.card.label for there in plan.placements}
        devices = [placed.get(role, "auto") for role in ROLES]
        plan = replace(plan, cluster=host.cluster_line(plan))
        text = "\n".join([str(plan), *_differences(plan, host.hardware_plan(found))])
        return io.NodeOutput(to_image([draw_memory_map(plan)]), text, *devices)


def _differences(plan: Plan, loaders: Plan) -> Iterator[str]:
    """What to set by hand: a loader's auto does not know the size, and plans for a usual edit."""
    for there, usual in zip(plan.placements, loaders.placements, strict=False):
        if str(there) != str(usual):
            yield f"a loader's auto takes {usual}, for a usual edit: set {there.precision.name} for this one"
