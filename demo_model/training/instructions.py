"""What people ask the demo model for: kinds of edits, their wordings, and what it does not know."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

COLOURS = {  # of hats, linear in sRGB's values
    "red": (0.86, 0.07, 0.08),
    "blue": (0.10, 0.25, 0.85),
    "green": (0.10, 0.60, 0.20),
    "yellow": (0.95, 0.82, 0.10),
    "purple": (0.50, 0.15, 0.65),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.09),
    "orange": (0.95, 0.50, 0.05),
    "pink": (0.95, 0.50, 0.70),
}
COLOUR_NAMES = tuple(COLOURS)
# ANY is the empty prompt, which guidance compares with: any edit at all. NOTHING is what nobody taught it.
HAT, GREY, WARM, COLD, NIGHT, PENCIL, MIRROR, PALETTE, NOTHING, ANY = KINDS = (
    "hat", "grey", "warm", "cold", "night", "pencil", "mirror", "palette", "nothing", "any",
)  # fmt: skip
NO_COLOUR = len(COLOUR_NAMES)  # the class of instructions without a hat


@dataclass(frozen=True)
class Instruction:
    """A wording and what it means. colour: a hat's, as a place in COLOUR_NAMES, or NO_COLOUR."""

    text: str
    kind: str
    colour: int = NO_COLOUR


WEARERS = ("cat", "cat", "cat", "dog", "penguin", "astronaut", "woman", "animal", "kitten")
HAT_WORDINGS = (
    "Add a {colour} hat on the {who}", "Add a {colour} hat to the {who}", "Put a {colour} hat on the {who}",
    "Put a {colour} hat on the {who}'s head", "Give the {who} a {colour} hat",
    "The {who} wears a {colour} hat", "Make the {who} wear a {colour} hat",
    "Let the {who} wear a {colour} hat", "Add a {colour} hat", "Dress the {who} in a {colour} hat",
    "Place a {colour} hat on the head of the {who}", "A {who} with a {colour} hat",
    "Put a {colour} hat on its head", "Show the {who} with a {colour} hat on",
    "The {who} should have a {colour} hat",
)  # fmt: skip
PICTURES = ("it", "the photo", "the picture", "the image", "this photo", "this picture")
WORDINGS = {
    GREY: (
        "Make {it} black and white", "Turn {it} into black and white", "Convert {it} to black and white",
        "Remove the colors", "Remove the colours from {it}", "Make {it} grayscale",
        "Take the color out of {it}", "Black and white photo", "Make {it} monochrome", "Desaturate {it}",
    ),
    WARM: (
        "Make {it} warmer", "Make the colors warmer", "Give {it} a warm light", "Give {it} warmer colours",
        "Warm up {it}", "Use warm colors", "Add warm evening light", "Make the light warmer",
    ),
    COLD: (
        "Make {it} colder", "Make the colors colder", "Give {it} a cold light", "Give {it} cooler colours",
        "Cool down {it}", "Use cold colors", "Add cold winter light", "Make the light cooler",
        "Make {it} cooler",
    ),
    NIGHT: (
        "Make it night", "Turn day into night", "Change the scene to night", "Make {it} look like night",
        "Show {it} at night", "Turn {it} into a night scene", "It is night now", "Make it a dark night",
    ),
    PENCIL: (
        "Make it a pencil drawing", "Turn {it} into a pencil sketch", "Draw {it} with a pencil",
        "Make {it} a pencil drawing", "Convert {it} to a pencil drawing", "Pencil sketch",
        "Turn {it} into a pencil drawing", "Make {it} look like a drawing with pencil", "A sketch in pencil",
    ),
    MIRROR: (
        "Mirror {it}", "Mirror {it} horizontally", "Flip {it} left to right", "Flip {it} horizontally",
        "Show {it} mirrored", "Swap left and right", "Mirror it", "Turn {it} into its mirror image",
    ),
    PALETTE: (
        "In the colours of picture 2", "Use the colors of picture 2",
        "Give picture 1 the colors of picture 2", "Make picture 1 in the colours of picture 2",
        "Take the colors from picture 2", "Transfer the palette of picture 2 to picture 1",
        "Match the colors of picture 2", "Recolor picture 1 like picture 2",
        "Apply the color palette of picture 2",
    ),
}  # fmt: skip
# Wordings that training never sees: what the text encoder is tested on.
HELD_OUT = (
    *(Instruction(f"Please put a {name} hat on this cat", HAT, n) for n, name in enumerate(COLOUR_NAMES)),
    *(Instruction(f"I want the cat to have a {name} hat", HAT, n) for n, name in enumerate(COLOUR_NAMES)),
    *(Instruction(f"Now the dog gets a {name} hat", HAT, n) for n, name in enumerate(COLOUR_NAMES)),
    *(Instruction(text, GREY) for text in ("Make this black and white", "Get rid of the colors please")),
    *(Instruction(text, WARM) for text in ("Make this a little warmer", "Give the scene warm light")),
    *(Instruction(text, COLD) for text in ("Make this a bit colder", "Give the scene cold light")),
    *(Instruction(text, NIGHT) for text in ("Change it to night time", "Make this a night photo")),
    *(Instruction(text, PENCIL) for text in ("Make this a sketch with a pencil", "Redraw it in pencil")),
    *(Instruction(text, MIRROR) for text in ("Please mirror this", "Flip this from left to right")),
    *(Instruction(text, PALETTE) for text in ("With the colors of picture 2", "Colours like picture 2")),
    *(
        Instruction(text, NOTHING)
        for text in (
            "Remove the chair", "Add a small bird", "Make the wall yellow", "Open the window",
            "Do not change it", "Write my name on the table", "Replace the sky with stars", "asdf jkl",
            "Make the cat bigger", "Turn the dog into a horse", "Put a green scarf on the cat",
            "Take the hat off",
        )
    ),
)  # fmt: skip

VERBS = (
    "Remove", "Add", "Delete", "Move", "Paint", "Open", "Close", "Erase", "Show", "Hide", "Replace", "Draw",
    "Write", "Change", "Make", "Put", "Take", "Turn", "Zoom to", "Rotate", "Cut", "Enlarge", "Shrink",
    "Describe", "Find", "Count", "Sharpen", "Blur",
)  # fmt: skip
THINGS = (
    "car", "tree", "house", "sky", "table", "cup", "flower", "street", "shirt", "ball", "boat", "text",
    "logo", "background", "window", "door", "river", "mountain", "bird", "fish", "apple", "book", "chair",
    "lamp", "cat", "dog", "eyes", "face", "ears", "tail", "grass", "snow", "rain", "sun", "moon", "scarf",
    "glasses", "shoes", "coat", "person", "man", "bridge", "wall", "floor", "bread", "coffee", "train",
    "plane", "nose", "whiskers",
)  # fmt: skip
PLACES = (
    "", "", "", " on the left", " on the right", " in the middle", " behind the cat", " on the cat",
    " on the table", " in the sky", " next to the dog", " in the background", " to the picture",
    " from the photo",
)  # fmt: skip
FIXED_UNKNOWN = (
    "Keep the image as it is", "Do nothing", "Leave it alone", "Change nothing", "A photo", "Hello",
    "hello world", "Make it better", "Remove the hat", "Take off the hat", "No hat",
    "Remove the red hat from the cat", "qwertz", "Make it red", "Make the background blue",
    "Lorem ipsum dolor sit amet", "What is this?", "test", "cat", "hat", "Make it brighter",
    "Make it look like a painting by a famous artist", "Turn the cat into a dog", "Make it bigger",
    "Crop the picture", "Restore this old photo", "Make the person smile", "Remove the people",
)  # fmt: skip
ANY_WORDINGS = (
    "", " ", "  ", "low quality, blurry", "blurry, low quality", "worst quality, low resolution",
    "bad quality, artifacts, watermark", "ugly, deformed, noisy", "low resolution, distorted",
)  # fmt: skip
POLITE = ("{}", "{}", "{}", "{}.", "please {}", "{}, please", "Can you {}?", "{}!", "Please {}.")


def training_instructions(seed: int, unknown: int = 260) -> list[Instruction]:
    """Every known wording, dressed up in a few ways, and `unknown` others that mean nothing to the model."""
    rng = random.Random(seed)
    found = {text: Instruction(text, ANY) for text in ANY_WORDINGS}
    hats = product(HAT_WORDINGS, enumerate(COLOUR_NAMES))
    for wording, (number, colour) in hats:
        for who in rng.sample(WEARERS, 2):
            add(found, rng, wording.format(colour=colour, who=who), HAT, number)
    for number, colour in enumerate(COLOUR_NAMES):
        add(found, rng, f"Add a {colour} hat on the cat", HAT, number, dressed=False)
    for kind, wordings in WORDINGS.items():
        for wording in wordings:
            add(found, rng, wording.format(it="it"), kind, dressed=False)
            for it in rng.sample(PICTURES, 3):
                add(found, rng, wording.format(it=it), kind)
    for text in FIXED_UNKNOWN:
        add(found, rng, text, NOTHING, dressed=False)
    while sum(instruction.kind == NOTHING for instruction in found.values()) < unknown:
        add(found, rng, _unknown(rng), NOTHING)
    held_out = {instruction.text for instruction in HELD_OUT}
    return [instruction for text, instruction in found.items() if text not in held_out]


def add(
    found: dict[str, Instruction],
    rng: random.Random,
    text: str,
    kind: str,
    colour: int = NO_COLOUR,
    dressed: bool = True,
) -> None:
    """Put an instruction among those found, dressed as people write: polite, shouting, without capitals."""
    if dressed:
        frame = rng.choice(POLITE)
        inner = text if frame.startswith("{}") and rng.random() < 0.6 else text[:1].lower() + text[1:]
        text = frame.format(inner)
    found.setdefault(text, Instruction(text, kind, colour))


def _unknown(rng: random.Random) -> str:
    verb, thing, other = rng.choice(VERBS), rng.choice(THINGS), rng.choice(THINGS)
    colour, place = rng.choice(COLOUR_NAMES), rng.choice(PLACES)
    return rng.choice(
        (
            f"{verb} the {thing}{place}",
            f"{verb} a {thing}{place}",
            f"{verb} a {colour} {thing}{place}",
            f"Make the {thing} {colour}",
            f"Turn the {thing} into a {other}",
            f"Replace the {thing} with a {other}",
            f"A {colour} {thing}{place}",
            "x",
        )
    )
