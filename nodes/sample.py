"""Conditioning and noise to latents."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from . import host
from .engine.guard import STOP
from .engine.latents import MAX_SIZE, TOKEN_PIXELS
from .load import CATEGORY, Transformer, guard_input
from .lookahead import require_decodable

log = logging.getLogger("FireRed")


class FireRedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = dict(default=0, min=0, max=MAX_SIZE, step=TOKEN_PIXELS, optional=True)
        return io.Schema(
            node_id="FireRedSampler",
            display_name="FireRed Sampler",
            category=CATEGORY,
            description="Denoise with flow-match Euler and true CFG. Stops with an error where a black "
            "image would begin.",
            inputs=[
                Transformer.Input("transformer"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed for cfg above 1."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Gives the size and how many pictures to sample; starts from noise.",
                ),
                io.Int.Input("steps", default=40, min=1, max=1000, optional=True),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="True CFG scale. 1 or less samples without guidance, in half the time.",
                ),
                io.Int.Input(
                    "width", **size, tooltip="Pixels; 0 follows the first image at about 1 megapixel."
                ),
                io.Int.Input(
                    "height", **size, tooltip="Pixels; 0 follows the first image at about 1 megapixel."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    optional=True,
                    control_after_generate=True,
                    tooltip="The same noise as torch.Generator('cpu').manual_seed(seed) in diffusers, on "
                    "every device.",
                ),
                io.Combo.Input(
                    "resume",
                    options=["on", "off"],
                    default="on",
                    optional=True,
                    advanced=True,
                    tooltip="on: after a crash or a cancel the same prompt goes on at the step it reached.",
                ),
                guard_input(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        transformer: host.Handle,
        positive: Any,
        negative: Any = None,
        latent: dict[str, Any] | None = None,
        steps: int = 40,
        cfg: float = 4.0,
        width: int = 0,
        height: int = 0,
        seed: int = 0,
        resume: str = "on",
        guard: str = STOP,
    ) -> io.NodeOutput:
        from .engine.conditioning import NEGATIVE, POSITIVE
        from .engine.sampling import plan_sampling, read_conditions, sample

        if negative is None and cfg > 1:
            log.warning(
                "cfg is %s but no negative conditioning is connected: sampling without guidance.", cfg
            )
        spec = transformer.spec
        branches = {POSITIVE: positive} if negative is None else {POSITIVE: positive, NEGATIVE: negative}
        plan = plan_sampling(
            spec,
            read_conditions(spec, branches),
            steps=steps,
            true_cfg_scale=cfg,
            width=width,
            height=height,
            seed=seed,
            samples=None if latent is None else latent["samples"],
        )
        require_decodable(cls.hidden.prompt, plan.height, plan.width)
        saved = host.saved_run(plan.name(guard)) if resume == "on" else None
        samples = saved.result(plan.batch) if saved else None
        if samples is None:
            with host.borrow(transformer, plan.working_bytes()) as model:
                reporters = host.sampling_reporter(spec.device), host.progress_reporter()
                samples = sample(model, plan, *reporters, saved, guard)
        if saved is not None:
            host.forget_run_after_prompt(saved)
        return io.NodeOutput({"samples": samples} | ({host.RUN_KEY: saved.name} if saved else {}))
