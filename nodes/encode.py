"""The encode node: prompt and pictures to conditioning."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from . import host
from .engine.cards.transfer import copy_to
from .engine.errors import InputError
from .engine.images import require_image, to_pil, warn_of_many_pictures
from .engine.latents import MEGAPIXEL, NATIVE_SIZE, empty_latents, grid_size, require_size
from .engine.limits import MAX_PICTURES, MEGAPIXELS, NATIVE, REFERENCE_MEGAPIXELS, SIZE, require_text
from .engine.models.guard import GUARD, STOP
from .engine.notices import first_time
from .engine.sampling.conditioning import to_conditioning
from .engine.sampling.encoded_cache import embedding_name, load_or_encode, reference_name
from .engine.weights.estimates import Edit
from .engine.weights.room import working_bytes
from .load import CATEGORY, VAE, TextEncoder, guard_input

log = logging.getLogger("FireRed")

CPU = torch.device("cpu")
TRAINED_AREA = 2 * MEGAPIXEL  # pixels; well above what the model was trained on
PROMPT_NAMES = ("The prompt", "The negative prompt")  # in errors


class FireRedEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FireRedEncodePrompt",
            display_name="FireRed Encode Prompt",
            category=CATEGORY,
            search_aliases=["CLIP text encode", "text encode Qwen image edit", "edit instruction"],
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
                    min=REFERENCE_MEGAPIXELS.low,
                    max=REFERENCE_MEGAPIXELS.high,
                    step=0.05,
                    optional=True,
                    tooltip="Size of each reference latent; 1.0 is 1024x1024. Smaller is faster and less "
                    "faithful.",
                ),
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("image"), prefix="image", min=1, max=MAX_PICTURES
                    ),
                    tooltip="The pictures, in the order a prompt counts them (Picture 1, Picture 2). A "
                    "batch counts as several.",
                ),
                guard_input(),
                io.Combo.Input(
                    "size",
                    options=list(SIZE.options),
                    default=MEGAPIXELS,
                    optional=True,
                    tooltip="megapixels: pictures are resized to reference_megapixels, the output is about 1 "
                    "megapixel. native: the first picture keeps its size, and the output has exactly its "
                    "size and place.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive"),
                io.Conditioning.Output("negative", display_name="negative"),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="The first picture, for the sampler: to start from, or to change in a part.",
                ),
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
        size: str = MEGAPIXELS,
        **unknown: Any,
    ) -> io.NodeOutput:
        _require_known(unknown)
        host.require_handle(text_encoder, "text_encoder")
        megapixels = REFERENCE_MEGAPIXELS.require(reference_megapixels)
        if not require_text(prompt, PROMPT_NAMES[0]).strip():
            raise InputError("The prompt is empty. Write what to change in the picture.")
        prompts = prompt, require_text(negative_prompt, PROMPT_NAMES[1])
        pictures = _pictures(images)
        guard, native = GUARD.require(guard), SIZE.require(size) == NATIVE
        first = pictures[0].size
        if native:
            _require_native_size(first)
        if vae is not None:
            host.require_handle(vae, "vae")
        embeds = _encode_prompts(text_encoder, prompts, pictures, guard)  # first: it may refuse a prompt
        references, statistics = [], None
        if vae is not None:
            sizes = [None if native and picture.size == first else megapixels for picture in pictures]
            references = _encode_references(vae, pictures, sizes, guard)
            statistics = vae.replica.spec.checkpoint.latent_statistics()
        latent: dict[str, Any] = {NATIVE_SIZE: first} if native else {}
        latent["samples"] = references[0] if references else empty_latents(first, native)
        return io.NodeOutput(
            *(to_conditioning(each, references, first, statistics, native) for each in embeds), latent
        )


def _require_known(unknown: dict[str, Any]) -> None:
    """Raise InputError for a link to an input that the node does not have: ComfyUI passes it on unchecked."""
    for name in unknown:
        last = f"images.image{MAX_PICTURES - 1}"
        raise InputError(
            f"FireRedEncodePrompt has no input {name}. Its pictures are images.image0 to {last}: "
            f"{MAX_PICTURES} in all. Take the link out, or update these nodes if the graph is newer."
        )


def _pictures(images: Any) -> list[Image.Image]:
    """The pictures of all connected inputs, in order. Raises InputError where there is none."""
    given = [
        require_image(image, f"images.{name}") for name, image in (images or {}).items() if image is not None
    ]
    pictures = to_pil(given)
    if not pictures:
        raise InputError("There is no picture to edit. Connect at least one image.")
    warn_of_many_pictures(len(pictures))
    return pictures


def _require_native_size(size: tuple[int, int]) -> None:
    """Raise InputError for a first picture that is too large to keep its size. Log where it is a risk."""
    width, height = grid_size(*size)
    require_size(
        width, height, "Scale the picture down with ImageScaleToTotalPixels, or set size to megapixels."
    )
    if width * height > TRAINED_AREA and first_time("native size", size):
        log.warning(
            "the picture is edited at its native size, %dx%d; the model was trained at about 1 megapixel, "
            "and may repeat things in larger ones",
            *size,
        )


def _encode_references(
    vae: host.Handle, pictures: list, sizes: list[float | None], guard: str
) -> list[torch.Tensor]:
    """The reference latent of each picture. sizes: for each, the megapixels of vae.encode_reference."""
    pairs = list(zip(pictures, sizes, strict=True))
    areas = [size or math.prod(grid_size(*picture.size)) / MEGAPIXEL for picture, size in pairs]

    def encode(missing: list[int]) -> Iterator[torch.Tensor]:
        from .engine.models.vae import encode_reference

        working = max(working_bytes(vae.replica, Edit(reference_megapixels=area)) for area in areas)
        with host.borrow(vae, working) as loaded:
            for index in missing:
                yield copy_to(encode_reference(loaded, *pairs[index], guard), CPU)

    names = [reference_name(vae.replica, *pair) for pair in pairs]
    return load_or_encode(host.disk_cache(), names, encode)


def _encode_prompts(
    text_encoder: host.Handle, prompts: tuple[str, str], pictures: list, guard: str
) -> list[torch.Tensor]:

    def encode(missing: list[int]) -> Iterator[torch.Tensor]:
        working = working_bytes(text_encoder.replica, Edit(references=len(pictures)))
        with host.borrow(text_encoder, working) as encoder:
            for index in missing:
                encoder.require_prompt(prompts[index], PROMPT_NAMES[index])
            for index in missing:
                yield copy_to(encoder.encode(prompts[index], pictures, PROMPT_NAMES[index], guard), CPU)

    names = [embedding_name(text_encoder.replica, prompt, pictures) for prompt in prompts]
    return load_or_encode(host.disk_cache(), names, encode)
