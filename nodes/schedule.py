"""The steps of sampling: their noise levels, which of them are guided, and what they may change."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .engine.sampling.options import DENOISE, DIFFERENTIAL, GUIDANCE_FROM, GUIDANCE_TO, SHIFT
from .load import CATEGORY, Transformer


class FireRedSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedSchedule",
            display_name="FireRed Schedule",
            category=CATEGORY,
            search_aliases=["ModelSamplingAuraFlow", "shift", "sigmas"],
            description="Set the noise levels of the steps, in which of them guidance is computed, and how "
            "much of a given latent they change.",
            inputs=[
                Transformer.Input("transformer"),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=SHIFT.low,
                    max=SHIFT.high,
                    step=0.01,
                    optional=True,
                    tooltip="0: the checkpoint's own, which depends on the size. Lightning LoRAs want 3.",
                ),
                io.Float.Input(
                    "guidance_from",
                    default=0.0,
                    min=GUIDANCE_FROM.low,
                    max=GUIDANCE_FROM.high,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the steps, 0 to 1, before which only the positive branch is computed.",
                ),
                io.Float.Input(
                    "guidance_to",
                    default=1.0,
                    min=GUIDANCE_TO.low,
                    max=GUIDANCE_TO.high,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the steps, 0 to 1, after which only the positive branch is computed.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=DENOISE.low,
                    max=DENOISE.high,
                    step=0.01,
                    optional=True,
                    tooltip="Below 1, sampling starts from the sampler's latent with less noise, as KSampler "
                    "does. 0 changes nothing.",
                ),
                io.Float.Input(
                    "differential",
                    default=0.0,
                    min=DIFFERENTIAL.low,
                    max=DIFFERENTIAL.high,
                    step=0.01,
                    optional=True,
                    tooltip="What the grey of a noise mask means. 0: blended in every step, as in KSampler. "
                    "1: changed in the last steps only, as in DifferentialDiffusion.",
                ),
            ],
            outputs=[Transformer.Output("transformer", display_name="transformer")],
        )

    @classmethod
    def execute(
        cls,
        transformer: host.Handle,
        shift: float = 0.0,
        guidance_from: float = 0.0,
        guidance_to: float = 1.0,
        denoise: float = 1.0,
        differential: float = 0.0,
    ) -> io.NodeOutput:
        handle = host.require_handle(transformer, "transformer")
        return io.NodeOutput(
            handle.with_options(
                shift=SHIFT.require(shift),
                guidance_from=GUIDANCE_FROM.require(guidance_from),
                guidance_to=GUIDANCE_TO.require(guidance_to),
                denoise=DENOISE.require(denoise),
                differential=DIFFERENTIAL.require(differential),
            )
        )
