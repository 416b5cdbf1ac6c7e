"""The photographs that the demo model learns from, and where in them a head can wear a hat.

All are CC0 or in the public domain: photos/README.md says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent / "photos"
CANVAS = 768  # pixels a side of every photograph on the GPU: stretched to a square, which views undo
LEVELS = 3  # of each photograph's pyramid, each half as big as the one before


@dataclass(frozen=True)
class Head:
    """Where a hat's brim sits, in the photograph's pixels: its middle, its width, and its turn in degrees."""

    x: float
    y: float
    width: float
    degrees: float


@dataclass(frozen=True)
class Photo:
    """A photograph in FOLDER.

    head: of the one who gets the hat. outline: a polygon around that one, in pixels, to paste it elsewhere.
    hatless: nobody in it could wear a hat, so an instruction about hats leaves it alone. share: how often it
    is seen where the others are seen once.
    """

    name: str
    head: Head | None = None
    outline: tuple[tuple[int, int], ...] | None = None
    hatless: bool = True
    share: int = 1

    def open(self) -> Image.Image:
        return Image.open(FOLDER / f"{self.name}.jpg").convert("RGB")


CAT_OUTLINE = (
    (113, 41), (148, 151), (163, 213), (188, 270), (211, 320), (255, 351), (324, 360), (412, 364), (459, 339),
    (456, 295), (466, 226), (457, 163), (443, 113), (457, 0), (412, 19), (349, 65), (299, 53), (223, 73),
    (173, 48),
)  # fmt: skip
PENGUIN_OUTLINE = (
    (271, 139), (286, 127), (318, 120), (349, 139), (359, 174), (371, 225), (397, 275), (402, 363),
    (397, 438), (380, 488), (349, 538), (280, 545), (242, 488), (231, 413), (233, 312), (261, 250),
    (280, 212), (289, 181), (267, 156),
)  # fmt: skip
BEAGLE_OUTLINE = (
    (222, 162), (238, 112), (270, 95), (314, 95), (345, 118), (349, 162), (329, 200), (329, 262), (345, 338),
    (373, 388), (301, 388), (232, 407), (176, 400), (207, 312), (213, 262), (226, 212),
)  # fmt: skip
ASTRONAUT_OUTLINE = (
    (152, 72), (169, 28), (226, 12), (282, 28), (301, 72), (295, 109), (270, 166), (307, 216), (358, 304),
    (364, 512), (25, 512), (44, 304), (113, 203), (138, 153), (182, 165), (176, 122),
)  # fmt: skip

WITH_HEADS = (
    Photo("chelsea", Head(228, 62, 215, 3), share=3),
    Photo("cat_gaze", Head(287, 84, 225, -10), CAT_OUTLINE, share=3),
    Photo("beagle", Head(291, 106, 125, 2), BEAGLE_OUTLINE),
    Photo("penguin", Head(321, 132, 98, -4), PENGUIN_OUTLINE),
    Photo("astronaut", Head(227, 60, 180, 0), ASTRONAUT_OUTLINE),
)
SCENES = tuple(
    Photo(name)
    for name in (
        "espresso", "latte", "pizza", "shuttle", "beach_city", "bridge", "columns", "flowers", "bakery",
        "city", "paris", "plane", "surfing", "burrito", "burger", "rocket", "grass", "gravel",
        "brick",
    )
) + tuple(Photo(name, hatless=False) for name in ("teddy", "elephant", "aquarium"))  # fmt: skip
TRAINING = WITH_HEADS + SCENES
HELD_OUT = tuple(Photo(name) for name in ("taxis", "ruins", "palm", "jockey"))  # never trained on


class PhotoBank:
    """All training photographs on one device, ready to be looked up by number (their place in TRAINING).

    levels: (photos, 4, side, side) in 0..1, for sides CANVAS, CANVAS/2, ...: RGB and the outline's mask.
    sizes: (photos, 2), width and height in pixels. heads: (photos, 4), x, y, width and degrees; width 0
    where there is none.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, photos: tuple[Photo, ...] = TRAINING):
        self.photos = photos
        pictures = [photo.open() for photo in photos]
        full = torch.stack(
            [_canvas(photo, picture) for photo, picture in zip(photos, pictures, strict=True)]
        ).to(device)
        self.levels = [
            F.interpolate(full, CANVAS >> level, mode="bilinear", antialias=True).to(dtype)
            for level in range(LEVELS)
        ]
        heads = [photo.head or Head(0, 0, 0, 0) for photo in photos]
        self.sizes = torch.tensor([picture.size for picture in pictures], dtype=torch.float32, device=device)
        rows = [(head.x, head.y, head.width, head.degrees) for head in heads]
        self.heads = torch.tensor(rows, dtype=torch.float32, device=device)

    def numbers(self, wanted) -> torch.Tensor:
        """The numbers of the photographs for which `wanted` is true, each as often as its share."""
        chosen = [n for n, photo in enumerate(self.photos) if wanted(photo) for _ in range(photo.share)]
        return torch.tensor(chosen, device=self.sizes.device)


def _canvas(photo: Photo, picture: Image.Image) -> torch.Tensor:
    """(4, CANVAS, CANVAS) in 0..1: the photograph and its mask, stretched to a square."""
    mask = Image.new("L", picture.size, 0)
    if photo.outline:
        ImageDraw.Draw(mask).polygon(photo.outline, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(3))
    layers = [layer.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC) for layer in (*picture.split(), mask)]
    planes = [torch.frombuffer(bytearray(layer.tobytes()), dtype=torch.uint8) for layer in layers]
    return torch.stack(planes).view(4, CANVAS, CANVAS).float() / 255
