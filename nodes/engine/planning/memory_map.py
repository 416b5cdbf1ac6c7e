"""A placement as a picture: a bar a card, what lies in it, and what the plan says."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..numerics.charts import font
from ..units import GIB
from .machine import Device
from .places import Place, Placement, occupied, take_turns

WIDTH, MARGIN = 1280, 40  # pixels, as all sizes here
MAX_HEIGHT = 8000  # of the sheet drawn on, cut off below the last line
TITLE, TEXT, LINE = 30, 23, 34
BAR = 58
LEGEND = "Dark: weights. Light: what the largest works with. Grey: free, then driver and other programs."
BACKGROUND, INK, FAINT, FREE, TAKEN = "#ffffff", "#1c2330", "#5d6778", "#e8ecf1", "#b9c1cc"
PROBLEM = "#b3261e"
COLOURS = {"transformer": "#2f6fb4", "text_encoder": "#2e8b62", "vae": "#b3641d"}
WORKSPACE = {"transformer": "#a9c8e8", "text_encoder": "#a8d8c0", "vae": "#eec79f"}


def draw_memory_map(placement: Placement) -> Image.Image:
    """The picture, RGB, WIDTH wide and as high as it takes."""
    sheet = Image.new("RGB", (WIDTH, MAX_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    edit = placement.edit
    pictures = f"{edit.references} reference{'s' * (edit.references != 1)}"
    spread = ", true CFG over two cards" * (placement.mode == "cfg")
    title = f"{edit.width}x{edit.height}, {pictures}, {edit.steps} steps{spread}"
    top = _write(draw, MARGIN, title, TITLE, INK)
    top = _write(draw, top, placement.speed, TEXT, INK) + LINE // 2
    used = [device for device in placement.machine.memories if placement.on(device)]
    devices = list(dict.fromkeys((*placement.machine.automatic, *used)))
    longest = max(max(device.card.memory, _peak(placement.on(device)), 1) for device in devices)
    for device in devices:
        top = _draw_card(draw, top, device, placement.on(device), (WIDTH - 2 * MARGIN) / longest)
    top = _write(draw, top, LEGEND, TEXT, FAINT)
    top += LINE // 2
    for place in placement.places:
        top = _write(draw, top, place.description, TEXT, COLOURS[place.role])
    for problem in placement.problems.values():
        top = _write(draw, top, f"problem: {problem}", TEXT, PROBLEM)
    top += LINE // 2
    for alternative in placement.rejected:
        top = _write(draw, top, f"not {alternative}", TEXT, FAINT)
    return sheet.crop((0, 0, WIDTH, top + MARGIN))


def _peak(places: Sequence[Place]) -> int:
    """Bytes of a memory that are in use at most."""
    alone = max((occupied([place]) for place in places), default=0)
    return alone if take_turns(places) else occupied(places)


def _draw_card(
    draw: ImageDraw.ImageDraw, top: int, device: Device, places: Sequence[Place], scale: float
) -> int:
    """A card's line of text and its bar, one for each component where they take turns; the next top.

    scale: pixels a byte.
    """
    turns, free = take_turns(places), device.usable - _peak(places)
    state = "the components take turns, " * turns
    state += f"{free / GIB:.1f}" if free >= 0 else "does not fit, 0"
    state += f" of {device.card.memory / GIB:.1f} GiB free"
    top = _write(draw, top, str(device.card), TEXT, INK, right=state)
    for row in [[place] for place in places] if turns else [places]:
        _draw_bar(draw, top, device, row, scale)
        top += BAR + 6
    return top + LINE // 2


def _draw_bar(
    draw: ImageDraw.ImageDraw, top: int, device: Device, places: Sequence[Place], scale: float
) -> None:
    """The weights from the left, then the largest workspace, in a bar as long as the card's memory."""
    draw.rectangle((MARGIN, top, MARGIN + device.card.memory * scale, top + BAR), TAKEN)
    draw.rectangle((MARGIN, top, MARGIN + max(device.usable, 0) * scale, top + BAR), FREE)
    segments = [
        (place.weights, COLOURS[place.role], BACKGROUND, f"{place.name} {place.precision.name}")
        for place in places
    ]
    if places:
        working = max(places, key=lambda place: place.workspace)
        segments.append((working.workspace, WORKSPACE[working.role], INK, "work"))
    left, face = float(MARGIN), font(TEXT)
    for size, colour, ink, name in segments:
        right = left + size * scale
        draw.rectangle((left, top, max(right - 2, left + 1), top + BAR), colour)
        for text in (f"{name}  {size / GIB:.1f} GiB", f"{size / GIB:.1f} GiB", f"{size / GIB:.1f}"):
            if face.getlength(text) < right - left - 10:
                draw.text(((left + right) / 2, top + BAR / 2), text, ink, face, anchor="mm")
                break
        left = right


def _write(draw: ImageDraw.ImageDraw, top: int, text: str, size: int, colour: str, right: str = "") -> int:
    """Text wrapped to the picture's width, with `right` at the end of its first line; the next top."""
    face = font(size)
    draw.text((WIDTH - MARGIN, top), right, FAINT, face, anchor="ra")
    line = ""
    for word in text.split():
        if line and face.getlength(f"{line} {word}") > WIDTH - 2 * MARGIN:
            draw.text((MARGIN, top), line, colour, face)
            top, line = top + LINE, f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    draw.text((MARGIN, top), line, colour, face)
    return top + max(LINE, size + 12)
