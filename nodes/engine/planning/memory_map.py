"""A plan as a picture: a bar for each card, what lies in it, and what the plan says."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..drawing import ALARM, BACKGROUND, FAINT, INK, MARGIN, TEXT, TITLE, WIDTH, font
from ..units import GIB
from .machine import Device
from .plan import Placement, Plan, peak_bytes, take_turns

MAX_HEIGHT = 8000  # of the sheet drawn on, cut off below the last line
LINE, BAR, GAP = 34, 58, 17
LINE_LENGTH = 100  # characters of TEXT that fit the width
LEGEND = "Dark: weights. Light: what the largest works with. Grey: free, then driver and other programs."
FREE, TAKEN = "#e8ecf1", "#b9c1cc"
COLOURS = {"transformer": "#2f6fb4", "text_encoder": "#2e8b62", "vae": "#b3641d"}
WORKSPACE = {"transformer": "#a9c8e8", "text_encoder": "#a8d8c0", "vae": "#eec79f"}


def draw_memory_map(plan: Plan) -> Image.Image:
    """The picture, RGB, WIDTH wide and as high as it takes."""
    sheet = Image.new("RGB", (WIDTH, MAX_HEIGHT), BACKGROUND)
    draw, edit = ImageDraw.Draw(sheet), plan.edit
    references = f"{edit.references} reference{'s' * (edit.references != 1)}"
    title = f"{edit.width}x{edit.height}, {references}, {edit.steps} steps"
    draw.text((MARGIN, MARGIN), title, INK, font(TITLE))
    top = _write(draw, MARGIN + TITLE + 12, [(plan.speed, INK)])
    bars = {
        device: plan.on(device)
        for device in plan.machine.memories
        if device in plan.machine.automatic or plan.on(device)
    }
    longest = max(max(device.card.memory, peak_bytes(there), 1) for device, there in bars.items())
    for device, there in bars.items():
        top = _draw_card(draw, top, device, there, pixels=(WIDTH - 2 * MARGIN) / longest)
    chosen = [(there.description, COLOURS[there.role]) for there in plan.placements]
    chosen += [(plan.shared_line, COLOURS["transformer"])] if plan.shared_line else []
    chosen += [(plan.cluster, COLOURS["transformer"])] if plan.cluster else []
    chosen += [(f"problem: {problem}", ALARM) for problem in plan.problems.values()]
    rejected = [(f"not {alternative}", FAINT) for alternative in plan.rejected]
    for lines in ([(LEGEND, FAINT)], chosen, rejected):
        top = _write(draw, top, lines)
    return sheet.crop((0, 0, WIDTH, top - GAP + MARGIN))


def _write(draw: ImageDraw.ImageDraw, top: int, lines: Sequence[tuple[str, str]]) -> int:
    """Lines of text with their colours, wrapped to the picture's width; returns where the next may start."""
    for text, colour in lines:
        for line in textwrap.wrap(text, LINE_LENGTH, subsequent_indent="    ", break_on_hyphens=False):
            draw.text((MARGIN, top), line, colour, font(TEXT))
            top += LINE
    return top + GAP


def _draw_card(
    draw: ImageDraw.ImageDraw, top: int, device: Device, placements: Sequence[Placement], pixels: float
) -> int:
    """The card's name, what stays free, and its bar, or a bar for each component where they take turns.

    pixels: of a byte. Returns where the next card may start.
    """
    turns, free = take_turns(placements), (device.usable - peak_bytes(placements)) / GIB
    state = f"{free:.1f}" if free >= 0 else "does not fit, 0"
    state = "the components take turns, " * turns + f"{state} of {device.card.memory / GIB:.1f} GiB free"
    draw.text((WIDTH - MARGIN, top), state, FAINT, font(TEXT), anchor="ra")
    top = _write(draw, top, [(str(device.card), INK)]) - GAP
    for together in [[there] for there in placements] if turns else [placements]:
        for size, colour in ((device.card.memory, TAKEN), (max(device.usable, 0), FREE)):
            draw.rectangle((MARGIN, top, MARGIN + size * pixels, top + BAR), colour)
        left = float(MARGIN)
        for size, colour, ink, name in _parts(together):
            width, gib = size * pixels, f"{size / GIB:.1f}"
            draw.rectangle((left, top, left + max(width - 2, 1), top + BAR), colour)
            texts = (f"{name}  {gib} GiB", f"{gib} GiB", gib)
            text = next((text for text in texts if font(TEXT).getlength(text) < width - 10), "")
            draw.text((left + width / 2, top + BAR / 2), text, ink, font(TEXT), anchor="mm")
            left += width
        top += BAR + 6
    return top + GAP


def _parts(placements: Sequence[Placement]) -> list[tuple[int, str, str, str]]:
    """What lies in a bar, as bytes, colour, ink and name: the weights, then the largest workspace."""
    parts = [
        (there.weights, COLOURS[there.role], BACKGROUND, f"{there.name} {there.precision.name}")
        for there in placements
    ]
    if placements:
        largest = max(placements, key=lambda there: there.workspace)
        parts.append((largest.workspace, WORKSPACE[largest.role], INK, "work"))
    return parts
