"""Training pairs made on the GPU, a whole batch in one call: views of photographs, and their edits.

Every edit has a strength: real pairs are not all alike either. Without guidance the model gives an average
strength, and guidance, which goes towards what the instruction makes likelier, gives a full one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from instructions import (
    ANY,
    COLD,
    COLOURS,
    GREY,
    HAT,
    KINDS,
    MIRROR,
    NIGHT,
    NOTHING,
    PALETTE,
    PENCIL,
    WARM,
)
from photos import CANVAS, LEVELS, PhotoBank
from PIL import Image, ImageDraw, ImageFilter

# How often each kind is asked for. A second picture comes with some batches, and the palette only with it.
SHARES = {
    HAT: 0.42, GREY: 0.08, WARM: 0.08, COLD: 0.08, NIGHT: 0.09, PENCIL: 0.09, MIRROR: 0.05, NOTHING: 0.11,
}  # fmt: skip
PALETTE_SHARE = 0.5
ANY_SHARE = 0.12  # of prompts dropped: the target is edited all the same
WEAKEST = 0.35  # of an edit's strengths; a hat under HAT_STRENGTH is left out
HAT_STRENGTH = 0.40
HEADS_FOR_HATS, HEADS_FOR_OTHERS = 0.78, 0.35  # shares of views with a head: hats need one, some get none
LUMA = (0.30, 0.59, 0.11)
KIND = {kind: number for number, kind in enumerate(KINDS)}

# The sprite of a hat: SPRITE pixels a side, the brim's middle and width in it.
SPRITE, BRIM_X, BRIM_Y, BRIM_WIDTH = 256, 128, 190, 220


@dataclass(frozen=True)
class Views:
    """pixels (B, 3, h, w) in 0..1; heads (B, 4): x, y, brim width in pixels and radians, width 0 for none."""

    pixels: torch.Tensor
    heads: torch.Tensor


@dataclass(frozen=True)
class Pairs:
    """references: one or two of (B, 3, h, w); target (B, 3, h, w); all in 0..1."""

    references: list[torch.Tensor]
    target: torch.Tensor


class EditMaker:
    """Makes training pairs from a bank of photographs, on its device, from torch's random numbers."""

    def __init__(self, bank: PhotoBank):
        self.bank = bank
        self.device = bank.sizes.device
        self.sprite = draw_hat().to(self.device)
        self.colours = torch.tensor(list(COLOURS.values()), device=self.device)
        self.with_heads = bank.numbers(lambda photo: photo.head)
        self.cut_outs = bank.numbers(lambda photo: photo.outline)
        self.scenes = bank.numbers(lambda photo: not photo.head)
        self.hatless = bank.numbers(lambda photo: not photo.head and photo.hatless)

    def pairs(
        self,
        kinds: torch.Tensor,
        colours: torch.Tensor,
        size: tuple[int, int],
        reference_size: tuple[int, int] | None = None,
        second_picture: bool = False,
    ) -> Pairs:
        """kinds, colours: (B,), numbers of KINDS and COLOURS. size: the targets' height and width."""
        kinds, colours = self._choose_for_any(kinds, colours, second_picture)
        source = self.source_views(kinds, size)
        second = self.views(self._pick(self.scenes, len(kinds)), size) if second_picture else None
        palette = second.pixels if second else source.pixels
        strength = torch.empty(len(kinds), device=self.device).uniform_(WEAKEST, 1)
        target = self.edit(source, kinds, colours, strength, palette)
        references = [source.pixels] + ([second.pixels] if second else [])
        if reference_size is not None and reference_size != size:
            references = [resize(pixels, reference_size) for pixels in references]
        return Pairs(references, target)

    def source_views(self, kinds: torch.Tensor, size: tuple[int, int]) -> Views:
        """Views to edit. Most of those that get a hat show a head; the others are to be left alone."""
        batch = len(kinds)
        chance = torch.rand(batch, device=self.device)
        is_hat = kinds == KIND[HAT]
        has_head = chance < torch.where(is_hat, HEADS_FOR_HATS, HEADS_FOR_OTHERS)
        pasted = has_head & (torch.rand(batch, device=self.device) < 0.5)
        plain = torch.where(is_hat, self._pick(self.hatless, batch), self._pick(self.scenes, batch))
        whole = has_head & ~pasted
        numbers = torch.where(whole, self._pick(self.with_heads, batch), plain)
        views = self.views(numbers, size, whole)
        return self._paste(views, self._pick(self.cut_outs, batch), pasted)

    def views(
        self, numbers: torch.Tensor, size: tuple[int, int], framed: torch.Tensor | None = None
    ) -> Views:
        """Random crops of photographs. framed: (B,) bool, where the head is to be in the picture."""
        (height, width), batch = size, len(numbers)
        sizes, heads = self.bank.sizes[numbers], self.bank.heads[numbers]
        cover = torch.maximum(width / sizes[:, 0], height / sizes[:, 1])
        scale = cover * torch.exp(self._uniform(batch, 0.02, 1.1))
        middle = sizes * self._uniform((batch, 2), 0, 1)
        if framed is not None:
            wanted = self._uniform(batch, 0.18, 0.62) * min(size) / heads[:, 2].clamp_min(1)
            scale = torch.where(framed, torch.maximum(cover * 1.01, wanted), scale)
            offset = torch.randn(batch, 2, device=self.device) * 0.16
            offset[:, 1] += 0.12
            window = torch.tensor([width, height], device=self.device) / scale[:, None]
            middle = torch.where(framed[:, None], heads[:, :2] + offset * window, middle)
        half = torch.tensor([width, height], device=self.device) / scale[:, None] / 2
        middle = torch.minimum(torch.maximum(middle, half), torch.maximum(sizes - half, half))
        turn = torch.randn(batch, device=self.device) * math.radians(3.5)
        matrix = self._matrix(scale, turn)
        centre = torch.tensor([width / 2, height / 2], device=self.device)
        offset = centre - (matrix @ middle[..., None])[..., 0]
        pixels = jitter(self._sample(numbers, matrix, offset, size)[:, :3], 1.0)
        return Views(pixels, moved_heads(heads, matrix, offset))

    def edit(
        self,
        source: Views,
        kinds: torch.Tensor,
        colours: torch.Tensor,
        strength: torch.Tensor,
        palette: torch.Tensor,
    ) -> torch.Tensor:
        """What the instructions make of the views: (B, 3, h, w). palette: whose colours to take."""
        pixels = source.pixels
        full = {
            GREY: grey(pixels),
            WARM: tint(pixels, (1.18, 1.02, 0.74)),
            COLD: tint(pixels, (0.76, 0.97, 1.22)),
            NIGHT: night(pixels),
            PENCIL: pencil(pixels),
            PALETTE: recoloured(pixels, palette),
        }
        result = pixels
        for kind, edited in full.items():
            weight = torch.where(kinds == KIND[kind], strength, 0)[:, None, None, None]
            result = torch.lerp(result, edited, weight)
        mirrored = (kinds == KIND[MIRROR]) & (strength > HAT_STRENGTH)
        result = torch.where(mirrored[:, None, None, None], pixels.flip(-1), result)
        worn = (kinds == KIND[HAT]) & (strength > HAT_STRENGTH) & (source.heads[:, 2] > 0)
        hatted = self.put_on_hats(source, self._dulled(colours, strength))
        return torch.where(worn[:, None, None, None], hatted, result).clamp(0, 1)

    def put_on_hats(self, source: Views, colours: torch.Tensor) -> torch.Tensor:
        """The views with a hat on every head. colours: (B, 3)."""
        pixels, heads = source.pixels, source.heads
        height, width = pixels.shape[-2:]
        unit = heads[:, 2].clamp_min(1) / BRIM_WIDTH  # pixels of the picture a pixel of the sprite
        cos, sin = torch.cos(heads[:, 3]) / unit, torch.sin(heads[:, 3]) / unit
        columns, rows = pixel_centres((height, width), self.device)
        x, y = columns - heads[:, 0, None, None], rows - heads[:, 1, None, None]
        u = cos[:, None, None] * x + sin[:, None, None] * y + BRIM_X
        v = -sin[:, None, None] * x + cos[:, None, None] * y + BRIM_Y
        grid = torch.stack([u, v], -1) * (2 / SPRITE) - 1
        sprite = F.grid_sample(self.sprite.expand(len(pixels), -1, -1, -1), grid, align_corners=False)
        shade, alpha, shadow = sprite.split(1, 1)
        light = 0.75 + 0.5 * pixels.mean((1, 2, 3), keepdim=True)
        hat = (colours[:, :, None, None] * shade * light).clamp(0, 1)
        return torch.lerp(pixels * (1 - 0.4 * shadow), hat, alpha)

    def _dulled(self, colours: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """A hat's colours (B, 3): the less strength, the nearer to grey."""
        full = self.colours[colours.clamp_max(len(self.colours) - 1)]
        dull = full.mean(1, keepdim=True) * 0.6 + 0.2
        return torch.lerp(dull, full, (strength[:, None] + 0.25).clamp_max(1))

    def _paste(self, views: Views, numbers: torch.Tensor, pasted: torch.Tensor) -> Views:
        """Views with somebody's cut-out in them where `pasted`."""
        height, width = views.pixels.shape[-2:]
        batch, heads = len(numbers), self.bank.heads[numbers]
        scale = self._uniform(batch, 0.14, 0.46) * min(height, width) / heads[:, 2]
        matrix = self._matrix(scale, torch.randn(batch, device=self.device) * math.radians(7))
        across, down = self._uniform(batch, 0.2, 0.8), self._uniform(batch, 0.22, 0.7)
        place = torch.stack([across * width, down * height], 1)
        offset = place - (matrix @ heads[:, :2, None])[..., 0]
        sampled = self._sample(numbers, matrix, offset, (height, width), padding="zeros")
        mask = sampled[:, 3:] * pasted[:, None, None, None]
        pixels = torch.lerp(views.pixels, jitter(sampled[:, :3], 2.0), mask)
        moved = moved_heads(heads, matrix, offset)
        return Views(pixels, torch.where(pasted[:, None], moved, views.heads))

    def _sample(
        self,
        numbers: torch.Tensor,
        matrix: torch.Tensor,
        offset: torch.Tensor,
        size: tuple[int, int],
        padding: str = "reflection",
    ) -> torch.Tensor:
        """(B, 4, h, w): photographs mapped to the view's pixels by matrix (B, 2, 2) and offset (B, 2)."""
        columns, rows = pixel_centres(size, self.device)
        (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(-2))
        determinant = a * d - b * c
        x, y = columns - offset[:, 0, None, None], rows - offset[:, 1, None, None]
        a, b, c, d = (entry[:, None, None] / determinant[:, None, None] for entry in (a, b, c, d))
        source = torch.stack([d * x - b * y, a * y - c * x], -1)
        sizes = self.bank.sizes[numbers][:, None, None]
        grid = source * (2 / sizes) - 1
        scale = (determinant.abs() * sizes.flatten(1).prod(1)).sqrt() / CANVAS
        level = (-torch.log2(scale)).round().clamp(0, LEVELS - 1)
        result = 0
        for number, pictures in enumerate(self.bank.levels):
            part = F.grid_sample(pictures[numbers], grid, padding_mode=padding, align_corners=False)
            result = result + part * (level == number)[:, None, None, None]
        return result

    def _matrix(self, scale: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """(B, 2, 2): scaled, turned, half of them mirrored, a little stretched."""
        flip = torch.where(torch.rand_like(scale) < 0.5, -1.0, 1.0)
        stretch = torch.exp(torch.randn_like(scale) * 0.05)
        cos, sin = torch.cos(turn) * scale, torch.sin(turn) * scale
        across, down = flip * stretch, 1 / stretch
        return torch.stack([cos * across, -sin * down, sin * across, cos * down], -1).unflatten(-1, (2, 2))

    def _choose_for_any(
        self, kinds: torch.Tensor, colours: torch.Tensor, second_picture: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shares = kind_shares(second_picture).to(self.device)
        drawn = torch.multinomial(shares, len(kinds), replacement=True)
        is_any = kinds == KIND[ANY]
        colour = torch.randint(len(self.colours), (len(kinds),), device=self.device)
        return torch.where(is_any, drawn, kinds), torch.where(is_any, colour, colours)

    def _pick(self, numbers: torch.Tensor, batch: int) -> torch.Tensor:
        return numbers[torch.randint(len(numbers), (batch,), device=self.device)]

    def _uniform(self, shape: int | tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, device=self.device) * (high - low) + low


def kind_shares(second_picture: bool) -> torch.Tensor:
    """How likely each of KINDS is, apart from ANY."""
    shares = dict(SHARES)
    if second_picture:
        shares = {kind: share * (1 - PALETTE_SHARE) for kind, share in SHARES.items()}
        shares[PALETTE] = PALETTE_SHARE
    return torch.tensor([shares.get(kind, 0.0) for kind in KINDS])


def pixel_centres(size: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x (1, w) and y (h, 1) of pixels' centres."""
    height, width = size
    columns, rows = (torch.arange(side, device=device) + 0.5 for side in (width, height))
    return columns[None], rows[:, None]


def moved_heads(heads: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """heads (B, 4) of photographs, in degrees, as those of views, in radians."""
    place = (matrix @ heads[:, :2, None])[..., 0] + offset
    angle = torch.deg2rad(heads[:, 3])
    along = (matrix @ torch.stack([torch.cos(angle), torch.sin(angle)], 1)[..., None])[..., 0]
    along = along * torch.sign(along[:, :1])  # a mirrored hat stands on its brim too
    width = heads[:, 2] * along.norm(dim=1)
    return torch.stack([place[:, 0], place[:, 1], width, torch.atan2(along[:, 1], along[:, 0])], 1)


def jitter(pixels: torch.Tensor, amount: float) -> torch.Tensor:
    """Colours, light and contrast changed at random, a picture at a time."""

    def normal(spread: float, channels: int = 1) -> torch.Tensor:
        shape = (len(pixels), channels, 1, 1)
        return torch.randn(shape, device=pixels.device).clamp(-2, 2) * spread * amount

    gained = (pixels * torch.exp(normal(0.06, 3) + normal(0.1))).clamp(1e-4, 1) ** torch.exp(normal(0.12))
    mean, luma = gained.mean((2, 3), keepdim=True), grey(gained)
    contrasted = torch.lerp(mean, gained, torch.exp(normal(0.08)))
    return torch.lerp(luma, contrasted, torch.exp(normal(0.15))).clamp(0, 1)


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def grey(pixels: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMA, device=pixels.device, dtype=pixels.dtype)[:, None, None]
    return (pixels * weights).sum(1, keepdim=True).expand_as(pixels)


def tint(pixels: torch.Tensor, gains: tuple[float, float, float]) -> torch.Tensor:
    return (pixels * torch.tensor(gains, device=pixels.device)[:, None, None]).clamp(0, 1)


def night(pixels: torch.Tensor) -> torch.Tensor:
    return tint(torch.lerp(pixels, grey(pixels), 0.45), (0.36, 0.46, 0.80)) ** 1.25


def pencil(pixels: torch.Tensor) -> torch.Tensor:
    """Each pixel against the light around it, as when a negative is laid over a blurred print."""
    luma = grey(pixels)[:, :1]
    around = luma
    for _ in range(2):
        around = F.avg_pool2d(F.pad(around, (4,) * 4, mode="reflect"), 9, 1)
    lines = ((luma + 0.06) / (around + 0.06)).clamp(0, 1)
    return (lines.pow(2.2) * (0.75 + 0.25 * luma)).expand_as(pixels)


def recoloured(pixels: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """Pictures with the mean and the spread of each of another's colour channels."""
    mean, spread = pixels.mean((2, 3), keepdim=True), pixels.std((2, 3), keepdim=True) + 0.02
    wanted, wanted_spread = palette.mean((2, 3), keepdim=True), palette.std((2, 3), keepdim=True) + 0.02
    return ((pixels - mean) * (wanted_spread / spread).clamp(0.5, 1.8) + wanted).clamp(0, 1)


def draw_hat() -> torch.Tensor:
    """A hat with a brim and a band, (1, 3, SPRITE, SPRITE): shade, opacity, and the shadow under it."""
    fine = 4  # times finer while drawing
    shade, opacity = (Image.new("L", (SPRITE * fine,) * 2) for _ in range(2))

    def shape(kind: str, corners: tuple[int, ...], tone: int, only_shade: bool = False) -> None:
        scaled = [corner * fine for corner in corners]
        getattr(ImageDraw.Draw(shade), kind)(scaled, fill=tone)
        if not only_shade:
            getattr(ImageDraw.Draw(opacity), kind)(scaled, fill=255)

    brim, band, crown, top = 165, 95, 215, 230
    shape("ellipse", (18, 162, 238, 218), brim)
    shape("ellipse", (64, 164, 192, 206), band)
    shape("polygon", (64, 184, 66, 150, 190, 150, 192, 184), band)
    shape("polygon", (66, 160, 72, 106, 184, 106, 190, 160), crown)
    shape("ellipse", (66, 144, 190, 174), crown)
    shape("ellipse", (72, 80, 184, 130), top)
    shape("ellipse", (90, 86, 166, 110), 195, only_shade=True)
    smooth = [
        layer.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.8))
        for layer in (shade, opacity)
    ]
    shadow = (
        smooth[1]
        .transform((SPRITE, SPRITE), Image.Transform.AFFINE, (1, 0, 0, 0, 1, -14))
        .filter(ImageFilter.GaussianBlur(6))
    )
    layers = [
        torch.frombuffer(bytearray(layer.tobytes()), dtype=torch.uint8).view(SPRITE, SPRITE).float() / 255
        for layer in (*smooth, shadow)
    ]
    across = torch.linspace(-1, 1, SPRITE)
    layers[0] = layers[0] * (1.25 - 0.4 * (across + 0.3).clamp(-1, 1) ** 2)
    return torch.stack(layers)[None]
