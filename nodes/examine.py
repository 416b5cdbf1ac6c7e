"""The numerics node: how large activations get inside the models, as charts and text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image

from . import host
from .engine.images import require_image, to_image, to_pil
from .engine.latents import TOKEN_PIXELS, WIDTH, LatentInput, read_latent
from .engine.limits import SEED, STEPS, require_text
from .engine.numerics.attention import AttentionVerdict, can_compare
from .engine.numerics.charts import draw_ranges
from .engine.numerics.ranges import Ranges, report
from .engine.weights.components import Replica
from .load import CATEGORY, TextEncoder, Transformer


class FireRedNumerics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size: dict[str, Any] = dict(
            default=0, min=WIDTH.low, max=WIDTH.high, step=TOKEN_PIXELS, optional=True
        )
        size["tooltip"] = "Pixels; 0 follows the first image at about 1 megapixel."
        return io.Schema(
            node_id="FireRedNumerics",
            display_name="FireRed Numerics",
            category=CATEGORY,
            search_aliases=["black image", "NaN", "overflow", "activation range"],
            description="Measure how large activations get in every block, against the limits of FP16 and "
            "INT8, and say which precisions hold them.",
            is_output_node=True,
            inputs=[
                Transformer.Input("transformer"),
                io.Conditioning.Input("positive"),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A sampled latent, looked at with each step's noise. Without it, noise alone.",
                ),
                TextEncoder.Input(
                    "text_encoder", optional=True, tooltip="Measured too, on the prompt and the images below."
                ),
                io.Image.Input("images", optional=True, tooltip="For the text encoder's vision tower."),
                io.Int.Input("steps", default=40, min=STEPS.low, max=STEPS.high, optional=True),
                io.String.Input(
                    "look_at",
                    default="1, 20, 40",
                    optional=True,
                    tooltip="The steps to look at, one forward each. A step past the last means the last.",
                ),
                io.String.Input(
                    "prompt", default="", optional=True, multiline=True, tooltip="For the text encoder."
                ),
                io.Int.Input("width", **size),
                io.Int.Input("height", **size),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=SEED.low,
                    max=SEED.high,
                    optional=True,
                    control_after_generate=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.String.Output("text", display_name="text"),
            ],
        )

    @classmethod
    def execute(
        cls,
        transformer: host.Handle,
        positive: Any,
        latent: dict[str, Any] | None = None,
        text_encoder: host.Handle | None = None,
        images: torch.Tensor | None = None,
        steps: int = 40,
        look_at: str = "1, 20, 40",
        prompt: str = "",
        width: int = 0,
        height: int = 0,
        seed: int = 0,
    ) -> io.NodeOutput:
        host.require_handle(transformer, "transformer")
        pictures = [] if images is None else to_pil([require_image(images, "images")])
        prompt, given = require_text(prompt, "The prompt"), None if latent is None else read_latent(latent)
        if text_encoder is not None:
            host.require_handle(text_encoder, "text_encoder")
        size = width, height
        replica, ranges, attention = _measure_transformer(
            transformer, positive, given, steps, look_at, size, seed
        )
        measured = [(replica, ranges)]
        if text_encoder is not None:
            measured.append(_measure_text_encoder(text_encoder, prompt, pictures))
        charts = [draw_ranges(f"Activation ranges: {replica}", ranges) for replica, ranges in measured]
        texts = [report(replica, ranges) for replica, ranges in measured]
        texts[0] += f"\n{attention}" if attention else ""
        text = "\n\n".join(texts)
        return io.NodeOutput(to_image(charts), text, ui=ui.PreviewText(text))


def _measure_transformer(
    transformer: host.Handle,
    positive: Any,
    given: LatentInput | None,
    steps: int,
    look_at: str,
    size: tuple[int, int],
    seed: int,
) -> tuple[Replica, Ranges, AttentionVerdict | None]:
    from .engine.numerics.measure import compare_attention, measure_transformer, parse_steps
    from .engine.sampling.conditioning import POSITIVE
    from .engine.sampling.sampling import prepare_run, read_conditions

    transformer = transformer.alone(transformer.replica.card)
    replica = transformer.replica
    looked_at, (width, height) = parse_steps(look_at, steps), size
    samples = None if given is None else given.samples
    run = prepare_run(
        replica,
        read_conditions(replica, {POSITIVE: positive}),
        steps=steps,
        true_cfg_scale=1.0,
        width=width,
        height=height,
        seed=seed,
        samples=samples,
        draws=None if given is None else given.draws,
        options=replace(transformer.options, denoise=1.0),
    )
    run.require_room(host.room(replica))
    with host.borrow(transformer, run.working_bytes()) as model:
        ranges = measure_transformer(model, run, looked_at, samples, host.progress_reporter("measuring"))
        if not can_compare(replica):
            return replica, ranges, None
        reporter = host.progress_reporter("comparing attention")
        verdict = compare_attention(model, run, looked_at, samples, reporter)
    host.keep_attention_verdict(replica, verdict)
    return replica, ranges, verdict


def _measure_text_encoder(
    text_encoder: host.Handle, prompt: str, pictures: list[Image.Image]
) -> tuple[Replica, Ranges]:
    from .engine.numerics.measure import measure_text_encoder

    with host.borrow(text_encoder) as encoder:
        return text_encoder.replica, measure_text_encoder(encoder, prompt, pictures)
