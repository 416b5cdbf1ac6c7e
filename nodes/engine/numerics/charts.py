"""Pictures of measurements, drawn with Pillow to be read even when a node shows them small."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..models.trace import FP16_MAX
from .ranges import OUTLIER, BlockRange, Ranges

WIDTH, HEIGHT = 1280, 720
SHARPNESS = 2  # drawn this much larger and scaled down: Pillow does not smooth lines
BACKGROUND, PANEL, INK, FAINT, GRID = "#ffffff", "#f7f8fa", "#1f2933", "#66727f", "#d9dee4"
DANGER = "#d62828"
COLOURS = ("#1f6fb4", "#e07b00", "#2a9d57", "#7b4fb5", "#00909e", "#b5467e")
TEXT, SMALL, TITLE = 22, 19, 30  # font sizes in pixels
MAX_X_TICKS, MAX_Y_TICKS = 14, 10
MARGIN = 40  # pixels left and right of the title

BIG_PANEL = (110, 112, 1250, 475)
SMALL_PANEL = (110, 552, 1250, 660)
Point = tuple[float, float]


class Canvas:
    """A picture of WIDTH x HEIGHT pixels being drawn; coordinates are its pixels, from the top left."""

    def __init__(self, title: str):
        self._image = Image.new("RGB", (WIDTH * SHARPNESS, HEIGHT * SHARPNESS), BACKGROUND)
        self._draw = ImageDraw.Draw(self._image)
        sizes = range(TITLE, SMALL, -1)
        fitting = (size for size in sizes if font(size).getlength(title) <= WIDTH - 2 * MARGIN)
        self.text((MARGIN, 36), title, next(fitting, SMALL))

    def text(
        self,
        at: Point,
        text: str,
        size: int = TEXT,
        colour: str = INK,
        anchor: str = "lm",
        behind: str | None = None,
    ) -> None:
        """anchor: Pillow's, horizontally l, m or r and vertically t, m or b.

        behind: a colour to cover what is there already.
        """
        place = dict(font=font(size * SHARPNESS), anchor=anchor)
        if behind is not None:
            self._draw.rectangle(self._draw.textbbox(_scaled(at), text, **place), fill=behind)
        self._draw.text(_scaled(at), text, fill=colour, **place)

    def rectangle(self, corners: tuple[float, float, float, float], fill: str) -> None:
        self._draw.rectangle((*_scaled(corners[:2]), *_scaled(corners[2:])), fill=fill)

    def line(self, points: Sequence[Point], colour: str, width: float = 1) -> None:
        pixels = round(width * SHARPNESS)
        self._draw.line([_scaled(point) for point in points], fill=colour, width=pixels, joint="curve")

    def cross(self, at: Point, colour: str, size: float = 6) -> None:
        x, y = at
        self.line([(x - size, y - size), (x + size, y + size)], colour, 3)
        self.line([(x - size, y + size), (x + size, y - size)], colour, 3)

    def dot(self, at: Point, colour: str, radius: float = 3.5) -> None:
        x, y = _scaled(at)
        reach = radius * SHARPNESS
        self._draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

    def finished(self) -> Image.Image:
        return self._image.reduce(SHARPNESS)


@dataclass(frozen=True)
class Axes:
    """Where values go: `box` is left, top, right, bottom in pixels; x and y are (lowest, highest)."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> Point:
        """The pixel of a value, at the nearest edge for those outside."""
        left, top, right, bottom = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + min(max(across, 0), 1) * (right - left), bottom - min(max(up, 0), 1) * (bottom - top)

    def draw(self, canvas: Canvas, x_ticks: dict[float, str], y_ticks: dict[float, str]) -> None:
        left, top, right, bottom = self.box
        canvas.rectangle(self.box, PANEL)
        for value, label in y_ticks.items():
            y = self.at(0, value)[1]
            canvas.line([(left, y), (right, y)], GRID)
            canvas.text((left - 10, y), label, SMALL, FAINT, "rm")
        for value, label in x_ticks.items():
            x = self.at(value, 0)[0]
            canvas.line([(x, bottom), (x, bottom + 6)], FAINT)
            canvas.text((x, bottom + 10), label, SMALL, FAINT, "mt")
        canvas.line([(left, top), (left, bottom), (right, bottom)], FAINT)


def draw_ranges(title: str, ranges: Ranges) -> Image.Image:
    """Each block's largest activation on a log scale against FP16's and INT8's limits, and below it its
    share of outlier columns: a line for each entry of `ranges`, WIDTH x HEIGHT pixels, RGB.

    A cross at the top stands for NaN or infinity.
    """
    canvas = Canvas(title)
    blocks = [block for entry in ranges.values() for block in entry]
    last = max(max(block.number for block in blocks), 1)
    lowest, highest = _decades([block.largest for block in blocks])
    numbers = {float(number): str(number) for number in _block_ticks(last)}
    magnitudes = Axes(BIG_PANEL, (0, last), (lowest, highest))
    step = math.ceil((highest - lowest) / MAX_Y_TICKS)
    magnitudes.draw(canvas, numbers, {float(d): _decade(d) for d in range(lowest, highest + 1, step)})
    shares = Axes(SMALL_PANEL, (0, last), (0, 1))
    shares.draw(canvas, numbers, {0.0: "0 %", 0.5: "50 %", 1.0: "100 %"})
    _draw_limit(canvas, magnitudes, FP16_MAX, DANGER, 3)
    _draw_limit(canvas, magnitudes, OUTLIER, FAINT, 1.5)
    for colour, entry in zip(_colours(len(ranges)), ranges.values(), strict=True):
        _draw_line(canvas, magnitudes, entry, colour, lambda block: math.log10(max(block.largest, 1e-30)))
        _draw_line(canvas, shares, entry, colour, lambda block: block.outliers)
    _draw_captions(canvas, magnitudes)
    if not all(math.isfinite(block.largest) for block in blocks):
        at = (BIG_PANEL[0] + 12, BIG_PANEL[1] + 8)
        canvas.text(at, "x: NaN or infinity", SMALL, DANGER, "lt", PANEL)
    _draw_legend(canvas, list(ranges))
    return canvas.finished()


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that every machine draws the same. size: pixels."""
    return ImageFont.load_default(size)


def _draw_limit(canvas: Canvas, axes: Axes, value: float, colour: str, width: float) -> None:
    left, _, right, _ = axes.box
    y = axes.at(0, math.log10(value))[1]
    canvas.line([(left, y), (right, y)], colour, width)


def _draw_line(
    canvas: Canvas,
    axes: Axes,
    blocks: Sequence[BlockRange],
    colour: str,
    value: Callable[[BlockRange], float],
) -> None:
    points = []
    for block in blocks:
        height = value(block)
        if math.isfinite(height):
            points.append(axes.at(block.number, height))
        else:
            canvas.cross(axes.at(block.number, axes.y[1]), colour)
    if len(points) > 1:
        canvas.line(points, colour, 3)
    for point in points:
        canvas.dot(point, colour)


def _draw_captions(canvas: Canvas, magnitudes: Axes) -> None:
    canvas.text((MARGIN, 82), "Largest |activation|", SMALL, FAINT)
    canvas.text((MARGIN, 530), "Linear layers' input columns that reach 6", SMALL, FAINT)
    canvas.text(((SMALL_PANEL[0] + SMALL_PANEL[2]) / 2, 704), "Block", SMALL, FAINT, "mm")
    left, right = BIG_PANEL[0] + 12, BIG_PANEL[2] - 12
    above, below = (magnitudes.at(0, math.log10(limit))[1] for limit in (FP16_MAX, OUTLIER))
    canvas.text((left, above - 6), "FP16 limit 65504", SMALL, DANGER, "lb", PANEL)
    canvas.text((right, below + 6), "INT8 outlier threshold 6", SMALL, FAINT, "rt", PANEL)


def _draw_legend(canvas: Canvas, labels: Sequence[str]) -> None:
    """Right-aligned above the big panel."""
    x = float(BIG_PANEL[2])
    for label, colour in reversed(list(zip(labels, _colours(len(labels)), strict=True))):
        canvas.text((x, 82), label, TEXT, INK, "rm")
        x -= font(TEXT).getlength(label) + 12
        canvas.line([(x - 34, 82), (x, 82)], colour, 5)
        x -= 34 + 30


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten between which all finite values and both limits lie."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    low, high = min([*finite, OUTLIER]), max([*finite, FP16_MAX])
    return max(math.floor(math.log10(low)), -3), math.ceil(math.log10(high) + 0.15)


def _decade(power: int) -> str:
    """A power of ten as people write it: 0.1, 1, 1k, 10M; beyond that 1e12."""
    if not -3 <= power < 12:
        return f"1e{power}"
    if power < 0:
        return f"{10**power:g}"
    thousands, rest = divmod(power, 3)
    return f"{10**rest}{('', 'k', 'M', 'G')[thousands]}"


def _block_ticks(last: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50) if last / step <= MAX_X_TICKS or step == 50)
    return list(range(0, last + 1, step))


def _scaled(point: Sequence[float]) -> Point:
    return point[0] * SHARPNESS, point[1] * SHARPNESS
