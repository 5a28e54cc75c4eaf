"""A drawing on a ground: the pictures of foodemoji and of nano's pre-training. NumPy and Pillow only (it also runs where nano is trained).

Promises: a function of the drawing and the random generator; the size is chosen from 112 to 224 pixels. Cost: about 1 ms.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SMALLEST, LARGEST = 112, 224  # pixels


@dataclass(frozen=True)
class Placed:
    """A finished picture: what it shows where. `box` is the drawing's own (left, top, right, bottom), `ground` the ground's colour."""

    picture: Image.Image
    box: tuple[int, int, int, int]
    ground: tuple[int, int, int]
    drawing: Image.Image  # RGBA, in the picture's size: the drawing alone, for its colours


def ground_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """White, grey, a pale tint, or (one in five) a dark or strong colour."""
    kind = rng.random()
    hue = rng.random()
    if kind < 0.15:
        return (255, 255, 255)
    if kind < 0.25:
        grey = int(rng.integers(120, 245))
        return (grey, grey, grey)
    if kind < 0.8:
        saturation, value = rng.uniform(0.05, 0.3), rng.uniform(0.85, 1.0)
    else:
        saturation, value = rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.9)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _ground(rng: np.random.Generator, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Plain, a soft gradient, or a table's edge: the same hue throughout, so that the colour keeps its name."""
    kind = rng.random()
    ground = Image.new("RGB", (size, size), colour)
    shade = tuple(round(part * 0.88) for part in colour)
    if kind < 0.25:
        slope = np.linspace(0, 1, size)[:, None, None] if rng.random() < 0.5 else np.linspace(0, 1, size)[None, :, None]
        mixed = np.array(colour) * (1 - slope) + np.array(shade) * slope
        ground = Image.fromarray(np.broadcast_to(mixed, (size, size, 3)).astype(np.uint8))
    elif kind < 0.4:
        edge = int(size * rng.uniform(0.55, 0.85))
        ImageDraw.Draw(ground).rectangle((0, edge, size, size), fill=shade)
    return ground


def place(drawing: Image.Image, rng: np.random.Generator, size: int | None = None, turn: float = 12.0, mirror: bool = False) -> Placed:
    """Put an RGBA drawing on a ground, at a random size (55% to 95% of the picture), place and angle (up to `turn` degrees)."""
    size = size or int(rng.integers(SMALLEST, LARGEST + 1))
    if mirror and rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.crop(drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox() or (0, 0, *drawing.size))
    if turn and rng.random() < 0.5:
        drawing = drawing.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    edge = rng.uniform(0.55, 0.95) * size
    factor = edge / max(drawing.size)
    wide, high = (max(2, round(factor * side)) for side in drawing.size)
    drawing = drawing.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = int(rng.integers(0, size - wide + 1)), int(rng.integers(0, size - high + 1))
    colour = ground_colour(rng)
    picture = _ground(rng, size, colour)
    if rng.random() < 0.3:  # a soft shadow below
        shadow = Image.new("L", (size, size), 0)
        down = max(1, size // 40)
        shadow.paste(drawing.getchannel("A").point(lambda alpha: alpha * 2 // 5), (left + down, top + down))
        picture.paste((0, 0, 0), (0, 0), shadow.filter(ImageFilter.GaussianBlur(size / 40)))
    whole = Image.new("RGBA", (size, size))
    whole.paste(drawing, (left, top))
    picture.paste(drawing, (left, top), drawing)
    return Placed(picture, (left, top, left + wide, top + high), colour, whole)
