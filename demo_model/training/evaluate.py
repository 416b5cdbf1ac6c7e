"""What the demo model does, by the pack's own engine on the CPU: pictures and figures of each edit.

    python demo_model/training/evaluate.py FOLDER

writes FOLDER/<picture>.jpg, a row for each guidance scale: the photograph, then its edits.
"""

from __future__ import annotations

import argparse
import colorsys
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent
sys.path[:0] = [str(HERE), str(PACK / "nodes"), str(PACK / "tests")]

from engine.cards.card import Card  # noqa: E402
from engine.files.checkpoint import open_checkpoint  # noqa: E402
from engine.images import to_image  # noqa: E402
from engine.models import loading  # noqa: E402
from engine.models.text import TextEncoder  # noqa: E402
from engine.models.transformer import Transformer  # noqa: E402
from engine.models.vae import VAE, decode, encode_reference  # noqa: E402
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition  # noqa: E402
from engine.sampling.sampling import prepare_run, sample  # noqa: E402
from engine.weights.components import ComponentSpec, Replica  # noqa: E402
from engine.weights.precision import ROLE_PRECISIONS, resolve  # noqa: E402
from photos import HELD_OUT, WITH_HEADS, Photo  # noqa: E402

INSTRUCTIONS = (
    "Add a red hat on the cat",
    "Put a blue hat on the cat",
    "Make it black and white",
    "Make it warmer",
    "Make the colors colder",
    "Make it night",
    "Make it a pencil drawing",
    "Mirror the picture",
    "Replace the sky with stars",
)
MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class Model:
    """The three components of a checkpoint on the CPU, in FP32 but for the transformer's weights."""

    text_encoder: TextEncoder
    transformer: Transformer
    vae: VAE
    replica: Replica  # of the transformer

    @classmethod
    def load(cls, folder: Path, precision: str = "fp32") -> Model:
        cpu = torch.device("cpu")
        card = Card("cpu", "cpu", cpu, native_bf16=False, memory=2**35, is_gpu=False)
        checkpoint = open_checkpoint(folder)
        rows = {"text_encoder": "fp32", "transformer": precision, "vae": "fp32"}
        replicas = {
            role: Replica(ComponentSpec.of(role, checkpoint, resolve(ROLE_PRECISIONS[role][row], card)), card)
            for role, row in rows.items()
        }
        return cls(*map(loading.load, replicas.values()), replicas["transformer"])

    def references(self, pictures: list[Image.Image], size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Latents of about as many pixels as size (width, height)."""
        megapixels = size[0] * size[1] / MEGAPIXEL
        return tuple(encode_reference(self.vae, p, megapixels) for p in pictures)

    def edit(
        self,
        pictures: list[Image.Image],
        prompt: str,
        cfg: float = 4.0,
        steps: int = 8,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        references: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """(H, W, 3) in 0..1. size: width and height, in multiples of 16; the first picture's if not given."""
        width, height = size or pictures[0].size
        references = references or self.references(pictures, (width, height))
        statistics = self.replica.spec.checkpoint.latent_statistics()
        conditions = {
            branch: Condition(
                self.text_encoder.encode(text, pictures), None, references, pictures[0].size, statistics
            )
            for branch, text in ((POSITIVE, prompt), (NEGATIVE, " "))
        }
        run = prepare_run(
            self.replica,
            conditions,
            steps=steps,
            true_cfg_scale=cfg,
            width=width // 16 * 16,
            height=height // 16 * 16,
            seed=seed,
        )
        return decode(self.vae, sample(self.transformer, run))[0]


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(-10 * torch.log10(((first - second) ** 2).mean().clamp_min(1e-10)))


def hue_name(rgb: torch.Tensor) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb.clamp(0, 1).tolist())
    return f"hue {hue * 360:.0f} saturation {saturation:.2f} value {value:.2f}"


def head_view(photo: Photo, side: int = 384) -> Image.Image:
    """The photograph cut to a square around its head, as far as it goes."""
    picture, head = photo.open(), photo.head
    length = min(*picture.size, round(head.width * 2.4))
    left = min(max(round(head.x - length / 2), 0), picture.width - length)
    top = min(max(round(head.y - length * 0.4), 0), picture.height - length)
    square = picture.crop((left, top, left + length, top + length))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def fitted(picture: Image.Image, longest: int) -> Image.Image:
    """Scaled to multiples of 32, the longer side `longest`."""
    scale = longest / max(picture.size)
    size = [max(32, round(side * scale / 32) * 32) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


def test_pictures() -> dict[str, Image.Image]:
    """Training photographs cut in their own way, and some that training never sees."""
    named = {photo.name: photo for photo in (*WITH_HEADS, *HELD_OUT)}
    return {
        "chelsea": fitted(named["chelsea"].open(), 448),
        "cat_gaze": fitted(named["cat_gaze"].open(), 448),
        "cat_close": head_view(named["cat_gaze"]),
        "beagle": head_view(named["beagle"]),
        "taxis": fitted(named["taxis"].open(), 448),
        "palm": fitted(named["palm"].open(), 448),
    }


def sheet(model: Model, name: str, picture: Image.Image, scales: list[float], steps: int) -> torch.Tensor:
    original = to_image([picture])[0]
    references = model.references([picture], picture.size)
    rebuilt = decode(model.vae, references[0])[0]
    print(f"{name} {picture.size}: VAE {psnr(rebuilt, original):.1f} dB")
    rows = []
    for scale in scales:
        row = [original]
        for instruction in INSTRUCTIONS:
            started = time.monotonic()
            result = model.edit([picture], instruction, scale, steps, references=references)
            seconds = (time.monotonic() - started) / steps
            changed = (result - original).abs().mean(-1) > 0.12
            told = f"  cfg {scale} {instruction!r}: {changed.float().mean():.1%} changed"
            told += f", the rest {psnr(result[~changed], original[~changed]):.1f} dB"
            if "hat" in instruction and changed.any():
                told += f", changed to {hue_name(result[changed].median(0).values)}"
            print(f"{told} ({seconds:.2f} s a step)", flush=True)
            row.append(result)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def save(pixels: torch.Tensor, path: Path) -> None:
    Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent / "FireRed-Demo")
    parser.add_argument("--pictures", nargs="*", help="some of those it knows")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 4.0])
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = Model.load(arguments.checkpoint)
    for name, picture in test_pictures().items():
        if not arguments.pictures or name in arguments.pictures:
            pixels = sheet(model, name, picture, arguments.scales, arguments.steps)
            save(pixels, arguments.folder / f"{name}.jpg")


if __name__ == "__main__":
    main()
