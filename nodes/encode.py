"""Prompt and pictures to conditioning."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from comfy_api.latest import io

from . import host
from .engine.components import working_bytes
from .engine.conditioning import to_conditioning
from .engine.errors import InputError
from .engine.estimates import Edit
from .engine.guard import STOP, require_finite
from .engine.images import to_pil
from .engine.recall import embedding_name, recall, reference_name
from .engine.trace import find_culprit
from .engine.transfer import cross
from .load import CATEGORY, VAE, TextEncoder, guard_input

MAX_IMAGES = 10
CPU = torch.device("cpu")


class FireRedEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedEncodePrompt",
            display_name="FireRed Encode Prompt",
            category=CATEGORY,
            description="Encode what to change, and the pictures to change, for the FireRed sampler (or "
            "core's).",
            inputs=[
                TextEncoder.Input("text_encoder"),
                VAE.Input(
                    "vae",
                    optional=True,
                    tooltip="Adds the pictures as reference latents, made on its device.",
                ),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What to change."),
                io.String.Input(
                    "negative_prompt",
                    default=" ",
                    optional=True,
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to steer away from. Even empty it makes guidance work.",
                ),
                io.Float.Input(
                    "reference_megapixels",
                    default=1.0,
                    min=0.01,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    tooltip="Size of each reference latent; 1.0 is 1024x1024. Smaller is faster and less "
                    "faithful.",
                ),
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("image"), prefix="image", min=1, max=MAX_IMAGES
                    ),
                    tooltip="The pictures, in the order a prompt counts them (Picture 1, Picture 2). A "
                    "batch is several.",
                ),
                guard_input(),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive"),
                io.Conditioning.Output("negative", display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        text_encoder: host.Handle,
        prompt: str,
        images: io.Autogrow.Type,
        vae: host.Handle | None = None,
        negative_prompt: str = " ",
        reference_megapixels: float = 1.0,
        guard: str = STOP,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise InputError("The prompt is empty. Write what to change in the picture.")
        pictures = to_pil(image for image in images.values() if image is not None)
        if not pictures:
            raise InputError("There is no picture to edit. Connect at least one image.")
        references = _encode_references(vae, pictures, reference_megapixels, guard) if vae is not None else []
        embeds = _encode_prompts(text_encoder, (prompt, negative_prompt), pictures, guard)
        return io.NodeOutput(*(to_conditioning(encoded, references, pictures[0].size) for encoded in embeds))


def _encode_references(vae: host.Handle, pictures: list, megapixels: float, guard: str) -> list[torch.Tensor]:
    def encode(missing: list[int]) -> Iterator[torch.Tensor]:
        from .engine.vae import encode_reference

        working = working_bytes(vae.spec, Edit(reference_megapixels=megapixels))
        with host.borrow(vae, working) as autoencoder:
            for index in missing:
                yield cross(encode_reference(autoencoder, vae.spec, pictures[index], megapixels, guard), CPU)

    names = [reference_name(vae.spec, picture, megapixels) for picture in pictures]
    return recall(host.disk_cache(), names, encode)


def _encode_prompts(
    text_encoder: host.Handle, prompts: tuple[str, str], pictures: list, guard: str
) -> list[torch.Tensor]:
    def encode(missing: list[int]) -> Iterator[torch.Tensor]:
        working = working_bytes(text_encoder.spec, Edit(references=len(pictures)))
        with host.borrow(text_encoder, working) as encoder:
            for index in missing:
                encode_one = functools.partial(encoder.encode, prompts[index], pictures)
                trace = functools.partial(find_culprit, encoder.model, encode_one)
                what = f"The {('positive', 'negative')[index]} prompt's embedding"
                yield cross(require_finite(encode_one(), what, text_encoder.spec, trace, guard), CPU)

    names = [embedding_name(text_encoder.spec, prompt, pictures) for prompt in prompts]
    return recall(host.disk_cache(), names, encode)
