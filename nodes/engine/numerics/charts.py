"""A chart of measured activations, drawn with Pillow to be read even when a node shows it small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from ..drawing import ALARM, BACKGROUND, FAINT, INK, MARGIN, TEXT, TITLE, WIDTH, font
from ..models.trace import FP16_MAX
from .ranges import OUTLIER, Ranges

HEIGHT = 720
SHARPNESS = 2  # drawn this much larger and scaled down: Pillow does not smooth lines
BIG_PANEL, SMALL_PANEL = (110, 112, 1090, 490), (110, 572, 1090, 670)  # left, top, right, bottom in pixels
PANEL, GRID = "#f7f8fa", "#d9dee4"
COLOURS = ("#1f6fb4", "#e07b00", "#2a9d57", "#7b4fb5", "#00909e", "#b5467e")
SMALL, CAPTION = 20, -28  # a size of text; where captions are above their panel
MAX_TICKS, MAX_DECADES = 14, 10
SMALLEST = 1e-3  # what is less is drawn there


@dataclass(frozen=True)
class Panel:
    """Axes on a sheet that is SHARPNESS times as large as the picture; the x axis counts blocks.

    box: in pixels of the picture. last: the last block's number. low, high: values at the bottom and the top.
    """

    draw: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    last: int
    low: float
    high: float

    def at(self, block: float, value: float, right: float = 0, down: float = 0) -> tuple[float, float]:
        """The sheet's pixel for a value, or for the nearest one inside the box.

        right, down: pixels of the picture to add.
        """
        x0, y0, x1, y1 = self.box
        up = min(max((value - self.low) / (self.high - self.low), 0), 1)
        x, y = x0 + block / self.last * (x1 - x0) + right, y1 - up * (y1 - y0) + down
        return x * SHARPNESS, y * SHARPNESS

    def draw_axes(self, caption: str, ticks: Sequence[tuple[float, str]]) -> None:
        small, left = font(SMALL * SHARPNESS), MARGIN - self.box[0]
        self.draw.rectangle((*self.at(0, self.high), *self.at(self.last, self.low)), PANEL)
        self.draw.text(self.at(0, self.high, left, CAPTION), caption, FAINT, small, anchor="lm")
        for value, label in ticks:
            self.draw.line((*self.at(0, value), *self.at(self.last, value)), GRID, SHARPNESS)
            self.draw.text(self.at(0, value, -10), label, FAINT, small, anchor="rm")
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if self.last < MAX_TICKS * step)
        self.draw.text(self.at(0, self.low, -10, 16), "block", FAINT, small, anchor="rt")
        for number in range(0, self.last + 1, step):
            self.draw.text(self.at(number, self.low, 0, 16), str(number), FAINT, small, anchor="mt")

    def draw_limit(self, value: float, label: str, colour: str) -> None:
        self.draw.line((*self.at(0, value), *self.at(self.last, value)), colour, 2 * SHARPNESS)
        self.draw.text(self.at(self.last, value, 12), label, colour, font(SMALL * SHARPNESS), anchor="lm")

    def draw_curve(self, values: Sequence[tuple[int, float]], colour: str) -> None:
        """A line through (block, value), and a cross at the top for NaN and infinity."""
        points = [self.at(block, value) for block, value in values if math.isfinite(value)]
        for start, end in pairwise(points):
            self.draw.line((*start, *end), colour, 3 * SHARPNESS)
        for x, y in points:
            self.draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
        for block, value in values:
            if not math.isfinite(value):
                self.draw.text(self.at(block, self.high), "x", colour, font(72), anchor="mm")


def draw_ranges(title: str, ranges: Ranges) -> Image.Image:
    """Each block's largest activation on a log scale against FP16's and INT8's limits, and below it its
    share of outlier columns: a line for each entry of `ranges`, WIDTH x HEIGHT pixels, RGB.

    A cross at the top stands for NaN or infinity.
    """
    sheet = Image.new("RGB", (WIDTH * SHARPNESS, HEIGHT * SHARPNESS), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    blocks = [block for entry in ranges.values() for block in entry]
    last = max(1, *(block.number for block in blocks))
    powers = [_power(value) for value in (OUTLIER, FP16_MAX, *(block.largest for block in blocks))]
    finite = [power for power in powers if math.isfinite(power)]
    low, high = math.floor(min(finite)), math.ceil(max(finite) + 0.15)
    magnitudes, shares = Panel(draw, BIG_PANEL, last, low, high), Panel(draw, SMALL_PANEL, last, 0, 1)
    decades = range(low, high + 1, math.ceil((high - low) / MAX_DECADES))
    numbers = [(power, f"{10.0**power:g}" if power < 6 else f"1e{power}") for power in decades]
    magnitudes.draw_axes("Largest |activation|", numbers)
    shares.draw_axes("Linear layers' input columns that reach 6", [(0, "0 %"), (0.5, "50 %"), (1, "100 %")])
    magnitudes.draw_limit(_power(FP16_MAX), "65504: FP16 limit", ALARM)
    magnitudes.draw_limit(_power(OUTLIER), "6: INT8 outlier", FAINT)
    legend = [(label, COLOURS[number % len(COLOURS)]) for number, label in enumerate(ranges)]
    for (_, colour), entry in zip(legend, ranges.values(), strict=True):
        magnitudes.draw_curve([(block.number, _power(block.largest)) for block in entry], colour)
        shares.draw_curve([(block.number, block.outliers) for block in entry], colour)
    if len(finite) < len(powers):
        legend.append(("x: NaN or infinity", ALARM))
    right = 200.0  # pixels, to the right of the caption
    for label, colour in legend:
        draw.text(magnitudes.at(0, high, right, CAPTION), label, colour, font(TEXT * SHARPNESS), anchor="lm")
        right += font(TEXT).getlength(label) + 30
    size = TITLE * min(1, (WIDTH - 2 * MARGIN) / font(TITLE).getlength(title))
    draw.text((MARGIN * SHARPNESS, 36 * SHARPNESS), title, INK, font(int(size * SHARPNESS)), anchor="lm")
    return sheet.reduce(SHARPNESS)


def _power(value: float) -> float:
    """Of ten; NaN and infinity stay what they are."""
    return math.log10(max(value, SMALLEST))
