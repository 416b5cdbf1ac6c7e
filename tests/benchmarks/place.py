"""Whether an edit stays in its place and keeps its colours: `native` beside rounding and resizing.

Usage: python place.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from engine.cards.card import Card
from engine.files.checkpoint import open_checkpoint
from engine.images import to_image
from engine.latents import MEGAPIXEL
from engine.models import loading, vae
from engine.sampling.conditioning import NEGATIVE, POSITIVE, to_conditioning
from engine.sampling.sampling import prepare_run, read_conditions, sample
from engine.weights.components import ComponentSpec, Replica
from engine.weights.precision import ROLE_PRECISIONS, resolve
from PIL import Image

from launcher.folders import ROOT

CHECKPOINT = open_checkpoint(ROOT / "demo_model" / "FireRed-Demo")
CARD = Card("cpu", "cpu", torch.device("cpu"), native_bf16=False, memory=2**36, is_gpu=False)
CFG, SEED = 4.0, 0
PHOTOS = ROOT / "demo_model" / "training" / "photos"
SIZES = {"taxis": (417, 311), "chelsea": (299, 391), "beach_city": (501, 267), "latte": (353, 349)}
COLUMNS = " | ".join(f"{width}x{height}" for width, height in SIZES.values()) + " |"
RULE = "|---" * (len(SIZES) + 1) + "|"
NOTHING = "Remove the chair"  # which the built-in model does not know
PROMPTS = {"no edit": NOTHING, "an edit": "Make it black and white"}
STEPS = 8
PARTS = 100  # of a pixel, in which a shift is found
FINEST = 0.125  # cycles a pixel that count; a VAE changes what is finer
VAE = "the VAE alone"


def replica(role: str, precision: str) -> Replica:
    resolved = resolve(ROLE_PRECISIONS[role][precision], CARD)
    return Replica(ComponentSpec.of(role, CHECKPOINT, resolved), CARD)


@cache
def models() -> tuple:
    return tuple(loading.load(replica(role, "fp32")) for role in ("text_encoder", "vae", "transformer"))


def photo(name: str) -> Image.Image:
    """The photo's middle, cut to its odd size after it was scaled to cover that."""
    width, height = SIZES[name]
    picture = Image.open(PHOTOS / f"{name}.jpg").convert("RGB")
    factor = max(width / picture.width, height / picture.height)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def native(picture: Image.Image, prompt: str) -> torch.Tensor:
    """The edit at the picture's native size: (h, w, 3), 0 to 1."""
    return edited(picture, prompt, None, (0, 0))[: picture.height, : picture.width]


def rounded(picture: Image.Image, prompt: str) -> torch.Tensor:
    """The edit at the picture's width and height, which are rounded down to 16, resized back."""
    megapixels = picture.width * picture.height / MEGAPIXEL
    return resized_back(edited(picture, prompt, megapixels, picture.size), picture)


def at_a_megapixel(picture: Image.Image, prompt: str) -> torch.Tensor:
    """The edit as the defaults make it, resized back."""
    return resized_back(edited(picture, prompt, 1.0, (0, 0)), picture)


def through_the_vae(picture: Image.Image, _: str) -> torch.Tensor:
    """No edit: the picture encoded and decoded."""
    autoencoder = models()[1]
    whole = vae.decode(autoencoder, vae.encode_reference(autoencoder, picture, None))[0]
    return whole[: picture.height, : picture.width]


WAYS: dict[str, Callable[[Image.Image, str], torch.Tensor]] = {
    "`native`": native,
    "width and height of the picture, resized back": rounded,
    "`megapixels`, the default, resized back": at_a_megapixel,
}


def edited(
    picture: Image.Image, prompt: str, megapixels: float | None, size: tuple[int, int]
) -> torch.Tensor:
    """The whole output. megapixels: of the reference; None for the native size. size: 0 to follow it."""
    encoder, autoencoder, transformer = models()
    references = [vae.encode_reference(autoencoder, picture, megapixels)]
    given = {
        branch: to_conditioning(
            encoder.encode(text, [picture]),
            references,
            picture.size,
            CHECKPOINT.latent_statistics(),
            native=megapixels is None,
        )
        for branch, text in ((POSITIVE, prompt), (NEGATIVE, " "))
    }
    conditions, (width, height) = read_conditions(transformer.replica, given), size
    run = prepare_run(
        transformer.replica,
        conditions,
        steps=STEPS,
        true_cfg_scale=CFG,
        width=width,
        height=height,
        seed=SEED,
    )
    return vae.decode(autoencoder, sample(transformer, run))[0]


def resized_back(pixels: torch.Tensor, picture: Image.Image) -> torch.Tensor:
    """What Load Image's size takes: Lanczos."""
    whole = Image.fromarray((pixels * 255).round().byte().numpy())
    return to_image([whole.resize(picture.size, Image.Resampling.LANCZOS)])[0]


def shift(one: np.ndarray, other: np.ndarray) -> float:
    """How many pixels lie between two grey pictures: phase correlation, found to 1/PARTS of a pixel.

    https://doi.org/10.1364/OL.33.000156: the correlation is evaluated finely around its coarse peak only.
    """
    window = np.outer(np.hanning(one.shape[0]), np.hanning(one.shape[1]))
    spectra = [np.fft.fft2((picture - picture.mean()) * window) for picture in (one, other)]
    cross = spectra[0] * spectra[1].conj()
    cross /= np.maximum(np.abs(cross), 1e-12 * np.abs(cross).max())
    rows, columns = (np.fft.fftfreq(side) for side in one.shape)
    cross *= np.hypot(rows[:, None], columns[None]) < FINEST
    coarse = np.unravel_index(np.fft.ifft2(cross).real.argmax(), one.shape)
    middle = [(index + side // 2) % side - side // 2 for index, side in zip(coarse, one.shape, strict=True)]
    down, across = (start + np.arange(-PARTS, PARTS + 1) / PARTS for start in middle)
    turned = [np.exp(2j * np.pi * np.outer(*pair)) for pair in ((down, rows), (columns, across))]
    row, column = np.unravel_index((turned[0] @ cross @ turned[1]).real.argmax(), (len(down), len(across)))
    return float(np.hypot(down[row], across[column]))


def parts(picture: np.ndarray) -> Iterator[np.ndarray]:
    """The picture's four quarters."""
    for half in np.array_split(picture, 2, axis=0):
        yield from np.array_split(half, 2, axis=1)


def drift(one: torch.Tensor, other: torch.Tensor) -> str:
    """The shift of the whole picture, and that of its worst quarter, in pixels."""
    grey = [picture.mean(-1).double().numpy() for picture in (one, other)]
    worst = max(shift(*pair) for pair in zip(*map(parts, grey), strict=True))
    return f"{shift(*grey):.2f}, {worst:.2f}"


@cache
def original(name: str) -> torch.Tensor:
    return to_image([photo(name)])[0]


@cache
def made(way: str, name: str, prompt: str) -> torch.Tensor:
    """What a way makes of a photo, of the photo's size."""
    return ({VAE: through_the_vae} | WAYS)[way](photo(name), prompt)


def place_table(report: Callable[[str], None]) -> None:
    """How far each way moves the picture: a row for each way and prompt, a column for each photo."""
    report("| pixels: whole, worst quarter | " + COLUMNS)
    report(RULE)
    rows = {f"{way}, {what}": (way, prompt) for what, prompt in PROMPTS.items() for way in WAYS}
    for title, row in {VAE: (VAE, NOTHING), **rows}.items():
        cells = [drift(original(name), made(row[0], name, row[1])) for name in SIZES]
        report(f"| {title} | {' | '.join(cells)} |")


def colour_table(report: Callable[[str], None]) -> None:
    """How much brighter each channel gets where no edit is asked for, in steps of 255."""
    report(
        "| steps of 255: mean (red, green, blue) | "
        + " | ".join(f"{w}x{h}" for w, h in SIZES.values())
        + " |"
    )
    report("|---" * (len(SIZES) + 1) + "|")
    for way in (VAE, *WAYS):
        cells = []
        for name in SIZES:
            change = (made(way, name, NOTHING) - original(name)).mean((0, 1)) * 255
            cells.append(f"{change.mean():+.2f} ({', '.join(f'{channel:+.2f}' for channel in change)})")
        report(f"| {way} | {' | '.join(cells)} |")


def main() -> None:
    started = time.perf_counter()
    with torch.inference_mode():
        place_table(print)
        colour_table(print)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
