"""Skipping steps whose predictions are predictable."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .engine.sampling.options import END, START, THRESHOLD, StepCacheOptions
from .load import CATEGORY, Transformer


class FireRedStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedStepCache",
            display_name="FireRed Step Cache",
            category=CATEGORY,
            search_aliases=["TeaCache", "EasyCache", "speed up"],
            description="Skip steps whose predictions follow from those before. Faster, but not exact.",
            inputs=[
                Transformer.Input("transformer"),
                io.Float.Input(
                    "threshold",
                    default=0.05,
                    min=THRESHOLD.low,
                    max=THRESHOLD.high,
                    step=0.01,
                    optional=True,
                    tooltip="How far predictions may drift unseen. Of 40 steps, 0.05 skips about half and "
                    "0.1 two thirds; 0 skips none.",
                ),
                io.Float.Input(
                    "start",
                    default=0.1,
                    min=START.low,
                    max=START.high,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the steps, 0 to 1, before which every step is computed.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=END.low,
                    max=END.high,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the steps, 0 to 1, after which every step is computed.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def execute(
        cls, transformer: host.Handle, threshold: float = 0.05, start: float = 0.1, end: float = 1.0
    ) -> io.NodeOutput:
        handle = host.require_handle(transformer, "transformer")
        options = StepCacheOptions(THRESHOLD.require(threshold), START.require(start), END.require(end))
        return io.NodeOutput(handle.with_options(step_cache=options))
