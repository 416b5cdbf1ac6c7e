"""What the pictures of plans and of measurements share: their width, their colours and Pillow's own font."""

from __future__ import annotations

import functools

from PIL import ImageFont

WIDTH, MARGIN = 1280, 40  # pixels, as all sizes here
TITLE, TEXT = 30, 23  # sizes of text that can be read where a node shows the picture half as wide
BACKGROUND, INK, FAINT, ALARM = "#ffffff", "#1c2330", "#5d6778", "#c62828"


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow, so that every machine draws the same."""
    return ImageFont.load_default(size)
