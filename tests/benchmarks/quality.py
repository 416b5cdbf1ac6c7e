"""What each way to compute costs the picture: PSNR and SSIM against FP32, on edits of the built-in model.

Usage: python quality.py [PAGE]    (PAGE: where to write the table as a page, with a contact sheet beside it)

A new way to compute is a new row in ROWS.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import place
import torch
import torch.nn.functional as F
from diffusers import QwenImageEditPlusPipeline
from engine.cuda.attention import rounded_attention
from engine.limits import INT8
from engine.models import loading, vae
from engine.models.transformer import Attend, attend
from engine.sampling import workers
from engine.sampling.conditioning import NEGATIVE, POSITIVE, to_conditioning
from engine.sampling.options import DEFAULT_OPTIONS, SamplingOptions, StepCacheOptions
from engine.sampling.sampling import prepare_run, read_conditions, sample
from engine.weights.formats import Int8FastLinear
from engine.weights.formats.int8_paths import integer_paths
from engine.weights.precision import ROLE_PRECISIONS
from PIL import Image, ImageDraw, ImageFont
from place import CFG, CHECKPOINT, SEED, replica

from launcher.folders import ROOT

PHOTO = ROOT / "workflows" / "input" / "firered_cat.jpg"
PROMPTS = (
    "Add a red hat on the cat",
    "Make it black and white",
    "Turn day into night",
    "Make it a pencil drawing",
)
WIDTH, HEIGHT, STEPS, MEGAPIXELS = 640, 416, 20, 0.25
SHEET = ("fp32", "int8", "int8-fast", "nf4")


@dataclass(frozen=True)
class Way:
    """A way to compute an edit. The default is FP32, all steps, decoded whole."""

    transformer: str = "fp32"
    text_encoder: str = "fp32"
    vae: str = "fp32"
    tiling: str = "whole"
    options: SamplingOptions = DEFAULT_OPTIONS


def _roles(name: str, *roles: str) -> tuple[str, Way]:
    return f"{name}: {' and '.join(role.replace('_', ' ') for role in roles)}", Way(
        **dict.fromkeys(roles, name)
    )


ROUNDED = SamplingOptions(attention=INT8)


def _attention_on(device: torch.device, kind: str) -> Attend:
    """On a CPU there are no kernels for INT8 attention: this is what they compute."""
    return rounded_attention if kind == INT8 else attend


workers.attention_on = _attention_on


def _cached(threshold: float) -> SamplingOptions:
    return SamplingOptions(step_cache=StepCacheOptions(threshold, start=0.1))


ROWS = dict(
    [
        ("fp32 again", Way()),
        *(_roles(name, "transformer") for name in ROLE_PRECISIONS["transformer"] if name != "fp32"),
        *(_roles(name, "text_encoder") for name in ROLE_PRECISIONS["text_encoder"] if name != "fp32"),
        *(_roles(name, "vae") for name in ROLE_PRECISIONS["vae"] if name != "fp32"),
        ("attention int8", Way(options=ROUNDED)),
        ("int8-fast and attention int8", Way(transformer="int8-fast", options=ROUNDED)),
        ("decoded in tiles", Way(tiling="tiled")),
        *(
            (f"step cache, threshold {threshold}", Way(options=_cached(threshold)))
            for threshold in (0.03, 0.05, 0.1, 0.2)
        ),
        ("guidance in the first half", Way(options=SamplingOptions(guidance_to=0.5))),
        ("guidance in the second half", Way(options=SamplingOptions(guidance_from=0.5))),
    ]
)


def edit(way: Way) -> list[torch.Tensor]:
    """The edits that way, (3, h, w) each, 0 to 1."""
    picture = Image.open(PHOTO).convert("RGB")
    encoder = loading.load(replica("text_encoder", way.text_encoder))
    autoencoder = loading.load(replica("vae", way.vae))
    where = replica("transformer", way.transformer)
    transformer = loading.load(where)
    for layer in transformer.model.modules():
        if isinstance(layer, Int8FastLinear):  # a CPU that finds FP32 products faster would take them
            shape = layer.in_features, layer.rotation
            layer.path = integer_paths(layer.weight.device, layer.compute, *shape)[-1]
    references = [vae.encode_reference(autoencoder, picture, MEGAPIXELS)]
    negative = encoder.encode(" ", [picture])
    edited = []
    for prompt in PROMPTS:
        embeds = {POSITIVE: encoder.encode(prompt, [picture]), NEGATIVE: negative}
        given = {branch: to_conditioning(e, references, picture.size) for branch, e in embeds.items()}
        conditions = read_conditions(where, given)
        run = prepare_run(
            where,
            conditions,
            steps=STEPS,
            true_cfg_scale=CFG,
            width=WIDTH,
            height=HEIGHT,
            seed=SEED,
            options=way.options,
        )
        pixels = vae.decode(autoencoder, sample(transformer, run), way.tiling)
        edited.append(pixels[0].movedim(-1, 0))
    return edited


def edit_with_diffusers() -> list[torch.Tensor]:
    """The same by diffusers' own pipeline: its transformer keeps the modulation that ours has folded."""
    pipe = QwenImageEditPlusPipeline.from_pretrained(CHECKPOINT.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def add_token_types(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == module.config.image_token_id).int()
        return args, kwargs

    # https://github.com/huggingface/diffusers/issues/14194
    pipe.text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    module.VAE_IMAGE_SIZE = int(MEGAPIXELS * 1024 * 1024)
    edited = []
    for prompt in PROMPTS:
        (pixels,) = pipe(
            image=[Image.open(PHOTO).convert("RGB")], prompt=prompt, negative_prompt=" ",
            true_cfg_scale=CFG, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED), output_type="pt",
        ).images  # fmt: skip
        edited.append(pixels.float())
    return edited


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Decibels between two pictures with values 0 to 1; equal ones give 150."""
    return float(-10 * torch.log10((one - other).square().mean().clamp_min(1e-15)))


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity of two pictures (3, h, w): Gaussian windows of 11 pixels, sigma 1.5.

    https://ieeexplore.ieee.org/document/1284395
    """
    offsets = torch.arange(11) - 5.0
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = torch.outer(line, line).expand(3, 1, 11, 11)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x[None], window, groups=3)

    mean_one, mean_other = mean(one), mean(other)
    variances = mean(one * one) - mean_one**2 + mean(other * other) - mean_other**2
    covariance = mean(one * other) - mean_one * mean_other
    small, less = 0.01**2, 0.03**2
    similar = (2 * mean_one * mean_other + small) * (2 * covariance + less)
    return float((similar / ((mean_one**2 + mean_other**2 + small) * (variances + less))).mean())


def contact_sheet(columns: dict[str, list[torch.Tensor]]) -> Image.Image:
    """A row for each prompt: the photo, then what each way made of it."""
    cell, title = 256, 24
    photo = Image.open(PHOTO).convert("RGB").resize((cell, cell))
    sheet = Image.new("RGB", (cell * (len(columns) + 1), (cell + title) * len(PROMPTS) + title), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, name in enumerate(["original", *columns]):
        draw.text((number * cell + 6, 3), name, "black", font)
    for row, prompt in enumerate(PROMPTS):
        top = title + row * (cell + title)
        draw.text((6, top + 3), prompt, "black", font)
        sheet.paste(photo, (0, top + title))
        for number, pictures in enumerate(columns.values(), start=1):
            pixels = (pictures[row].movedim(0, -1) * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels).resize((cell, cell)), (number * cell, top + title))
    return sheet


def table(report: Callable[[str], None]) -> dict[str, list[torch.Tensor]]:
    """Report the rows as they come; returns the pictures of the contact sheet."""
    exact, shown = edit(Way()), {}
    shown["fp32"] = exact
    report("| what is not FP32 | PSNR mean | PSNR worst | SSIM mean | SSIM worst | seconds |")
    report("|---|---|---|---|---|---|")
    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        name: (lambda way=way: edit(way)) for name, way in ROWS.items()
    }
    for name, run in {"diffusers' pipeline, FP32": edit_with_diffusers, **ways}.items():
        started = time.perf_counter()
        pictures = run()
        seconds = time.perf_counter() - started
        values = [[measure(*pair) for pair in zip(pictures, exact, strict=True)] for measure in (psnr, ssim)]
        (psnrs, ssims) = values
        report(
            f"| {name} | {sum(psnrs) / len(psnrs):.1f} | {min(psnrs):.1f} "
            f"| {sum(ssims) / len(ssims):.4f} | {min(ssims):.4f} | {seconds:.0f} |"
        )
        way = ROWS.get(name)
        if way and way.transformer in SHEET and way == Way(transformer=way.transformer):
            shown[way.transformer] = pictures
    return shown


PAGE = """# What a precision costs the picture

Made by `python3 run.py bench quality docs/quality.md`, with torch {torch} on {machine}.
Four edits of one photo by the built-in model FireRed-Demo, {width}x{height}, {steps} steps, cfg {cfg:g},
seed {seed}. Each is compared with the same edit in FP32 with all steps. PSNR is in dB, higher is better.
Above 40 the eye sees no difference. SSIM is 1 for equal pictures.

![original, fp32, int8, int8-fast, nf4](quality.jpg)

{table}

The first row compares the folded modulation, our transformer and our loop with diffusers' own pipeline.

What this page cannot show: the real model's activations reach 2e7, those of this small one do not. Whether a
precision overflows, or meets outliers that it rounds badly, is judged on your own weights by the node
FireRed Numerics. A model this small also has fewer layers in which errors add up.

## Place and colour

How far an edit lies from the photo it was made of, in pixels: the shift that phase correlation finds, of the
whole picture and of the quarter that moved most. Four photos of odd sizes, in FP32, {place_steps} steps,
cfg {cfg:g}. "No edit" is an instruction that the built-in model does not know; the edit is "{edit}".

{place}

`native` (the input `size` of FireRed Encode Prompt) leaves the picture where the VAE alone puts it. An output
whose size is only near the reference's (here by 16 pixels on one side) lies 9 to 11 pixels away: the model
counts positions from the middle of each picture. It is also stretched when it is resized back. The photo
whose two sizes happen to be equal stays in its place. The default keeps the place too, since
reference and output are then of one size. But it resizes the picture twice, and computes about 1 megapixel
whatever the picture has.

The change of colour where no edit is asked for:

{colour}

The first row is what the VAE makes of it, and the model makes the rest. These nodes add nothing: the first
row of the first table is our whole edit beside diffusers'. Core's SaveImage cuts off fractions, which makes
every picture darker by up to one step.
"""


def main() -> None:
    tables: list[list[str]] = []

    def report(line: str) -> None:
        print(line, flush=True)
        tables[-1].append(line)

    with torch.inference_mode():
        tables.append([])
        shown = table(report)
        for more in (place.place_table, place.colour_table):
            tables.append([])
            more(report)
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        settings = dict(width=WIDTH, height=HEIGHT, steps=STEPS, cfg=CFG, seed=SEED, torch=torch.__version__)
        settings |= dict(place_steps=place.STEPS, edit=place.PROMPTS["an edit"])
        machine = f"a CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
        rows = dict(zip(("table", "place", "colour"), map("\n".join, tables), strict=True))
        page.write_text(PAGE.format(machine=machine, **rows, **settings), encoding="utf-8")
        contact_sheet(shown).save(page.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
