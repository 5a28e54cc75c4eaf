"""Conversations for nano's pre-training, from the drawings of build_sprites.py. Second step; runs where nano is trained.

    python assets/build_pretrain.py build/nano OUT [--items 200000] [--held 1000] [--seed 0]

writes OUT/train.jsonl, OUT/eval.jsonl (other placings of the same drawings) and OUT/images/. Every picture is placed anew: ground,
size, angle, place, light. Needs NumPy and Pillow. Cost: about 3 ms an item and core.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from compose import place
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from talk import CHAT, conversation

FOOD_SHARE, CHAT_SHARE = 0.22, 0.015
GRID = 3  # cells a side of the warp
SIZE = 112  # nano's own: a larger picture would only be made smaller again
# How often a kind is drawn, against 1: hundreds of people, faces and signs would crowd out the things.
RARER = {
    "person": 0.25,
    "face": 0.4,
    "sign": 0.4,
    "time": 0.4,
    "zodiac sign": 0.5,
    "arrow": 0.5,
    "shape": 0.5,
    "heart": 0.5,
    "hand gesture": 0.6,
    "emotion sign": 0.5,
}
SIDED = ("left", "right", "左", "右", "clock", "arrow", "箭头", "finger", "backhand", "letter", "button", "按钮", "按键", "keycap")


@dataclass(frozen=True)
class Drawings:
    """Every drawing with what may be said of it, and how likely each is among food and among the rest."""

    about: list[dict[str, Any]]
    pictures: list[Image.Image]
    others: dict[str, list[int]]  # code -> all artists' drawings of it
    food: np.ndarray
    rest: np.ndarray
    chance: np.ndarray  # of `rest`


@cache
def drawings(build: Path) -> Drawings:
    """Read everything once; children that are forked afterwards share it."""
    about = [json.loads(line) for line in (build / "sprites.jsonl").read_text(encoding="utf-8").splitlines()]
    with zipfile.ZipFile(build / "sprites.zip") as archive:
        pictures = [Image.open(io.BytesIO(archive.read(entry["file"]))).convert("RGBA") for entry in about]
    others: dict[str, list[int]] = {}
    for number, entry in enumerate(about):
        others.setdefault(entry["code"], []).append(number)
    food = np.array([number for number, entry in enumerate(about) if entry["food"]])
    rest = np.array([number for number, entry in enumerate(about) if not entry["food"]])
    weight = np.array([RARER.get(about[number]["group"][1], 1.0) / len(others[about[number]["code"]]) ** 0.5 for number in rest])
    return Drawings(about, pictures, others, food, rest, weight / weight.sum())


def _matched(colour: Image.Image, alpha: Image.Image, other: Image.Image) -> Image.Image:
    """The colours of another artist's drawing of the same thing: each channel's values in the other's order."""
    ours, theirs = np.asarray(colour).copy(), np.asarray(other)
    here, there = np.asarray(alpha) > 128, theirs[..., 3] > 128
    if here.sum() < 16 or there.sum() < 16:
        return colour
    levels = np.arange(256)
    for channel in range(3):
        mine, other_ = (
            np.cumsum(np.bincount(values, minlength=256)) / len(values)
            for values in (ours[..., channel][here], theirs[..., channel][there])
        )
        table = np.interp(mine, other_, levels).astype(np.uint8)  # the value of the same rank there
        ours[..., channel] = table[ours[..., channel]]
    return Image.fromarray(ours)


def relit(drawing: Image.Image, rng: np.random.Generator, other: Image.Image | None = None) -> Image.Image:
    """The drawing in another light or hand: another artist's colours, saturation, brightness, contrast, hue, flat colours, blur."""
    alpha = drawing.getchannel("A")
    colour = drawing.convert("RGB")
    if other is not None and rng.random() < 0.3:
        colour = _matched(colour, alpha, other)
    if rng.random() < 0.6:
        colour = ImageEnhance.Color(colour).enhance(rng.uniform(0.5, 1.5))
        colour = ImageEnhance.Brightness(colour).enhance(rng.uniform(0.75, 1.25))
        colour = ImageEnhance.Contrast(colour).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.4:
        hue, saturation, value = colour.convert("HSV").split()
        turn = int(rng.integers(-10, 11))
        colour = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    if rng.random() < 0.2:
        colour = ImageOps.posterize(colour, int(rng.integers(2, 4)))
    elif rng.random() < 0.25:  # flat areas of a few colours, as some artists draw
        colour = colour.quantize(int(rng.integers(4, 13)), Image.Quantize.FASTOCTREE).convert("RGB")
    if rng.random() < 0.2:
        colour = colour.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0)))
    if rng.random() < 0.1:  # an outline
        edge = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(5)))
        colour.paste((40, 30, 30), (0, 0), edge)
    colour.putalpha(alpha)
    return colour


def warped(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Parts of the drawing larger, smaller or elsewhere, as another hand would have it: a grid whose inner points are moved."""
    points = np.linspace(0, 1, GRID + 1)
    across, down = np.meshgrid(points * drawing.width, points * drawing.height)
    reach = 0.25 / GRID
    across[1:-1, 1:-1] += rng.uniform(-reach, reach, (GRID - 1, GRID - 1)) * drawing.width
    down[1:-1, 1:-1] += rng.uniform(-reach, reach, (GRID - 1, GRID - 1)) * drawing.height
    edges_x, edges_y = (np.round(points * side).astype(int) for side in drawing.size)
    mesh = []
    for row in range(GRID):
        for column in range(GRID):
            box = tuple(map(int, (edges_x[column], edges_y[row], edges_x[column + 1], edges_y[row + 1])))
            corners = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((box, tuple(float(axis[corner]) for corner in corners for axis in (across, down))))
    return drawing.transform(drawing.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def bent(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A little wider, warped, sheared, or with a corner missing."""
    if rng.random() < 0.4:
        drawing = warped(drawing, rng)
    if rng.random() < 0.4:
        drawing = drawing.resize((max(8, round(drawing.width * rng.uniform(0.75, 1.3))), drawing.height))
    if rng.random() < 0.3:
        lean = rng.uniform(-0.2, 0.2)
        drawing = drawing.transform(
            drawing.size, Image.Transform.AFFINE, (1, lean, -lean * drawing.height / 2, 0, 1, 0), Image.Resampling.BILINEAR
        )
    if rng.random() < 0.15:
        wide, high = (int(side * rng.uniform(0.15, 0.35)) for side in drawing.size)
        left, top = int(rng.integers(0, drawing.width - wide)), int(rng.integers(0, drawing.height - high))
        drawing = drawing.copy()
        drawing.paste((0, 0, 0, 0), (left, top, left + wide, top + high))
    return drawing


def item(build: Path, seed: int, number: int) -> tuple[list[dict[str, str]], Image.Image | None]:
    """(messages, picture or None for small talk) of item `number`: a function of seed and number alone."""
    rng = np.random.default_rng([seed, number])
    if rng.random() < CHAT_SHARE:
        question, answer = CHAT[int(rng.integers(len(CHAT)))]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None
    all_ = drawings(build)
    chosen = int(rng.choice(all_.food)) if rng.random() < FOOD_SHARE else int(rng.choice(all_.rest, p=all_.chance))
    about = all_.about[chosen]
    other = all_.about[int(rng.choice(all_.rest))]
    same = all_.pictures[int(rng.choice(all_.others[about["code"]]))]
    mirror = about["food"] or not any(word in text for word in SIDED for text in about["name"])
    placed = place(bent(relit(all_.pictures[chosen], rng, same), rng), rng, size=SIZE, turn=30, mirror=mirror)
    messages = []
    for turn, (question, answer) in enumerate(conversation(about, placed, other, rng)):
        messages += [{"role": "user", "content": ("" if turn else "<image>\n") + question}, {"role": "assistant", "content": answer}]
    return messages, placed.picture


def _chunk(build: Path, out: Path, seed: int, numbers: range) -> list[str]:
    lines = []
    for number in numbers:
        messages, picture = item(build, seed, number)
        record: dict[str, Any] = {"messages": messages, "images": [], "id": str(number)}
        if picture is not None:
            file = f"images/{number // 5000:03d}/{number}.jpg"
            record["images"] = [file]
            picture.save(out / file, quality=90)
        lines.append(json.dumps(record, ensure_ascii=False))
    return lines


def build_data(build: Path, out: Path, items: int, held: int, seed: int) -> None:
    """Write `items` conversations to train on and `held` to watch the loss on."""
    total = items + held
    for folder in range(total // 5000 + 1):
        (out / f"images/{folder:03d}").mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + 1000, total)) for start in range(0, total, 1000)]
    drawings(build)
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        many = [build] * len(parts), [out] * len(parts), [seed] * len(parts), parts
        lines = [line for part in pool.map(_chunk, *many) for line in part]
    (out / "train.jsonl").write_text("\n".join(lines[:items]) + "\n", encoding="utf-8")
    (out / "eval.jsonl").write_text("\n".join(lines[items:]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--held", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    build_data(asked.build, asked.out, asked.items, asked.held, asked.seed)
    print(f"{asked.items} + {asked.held} items in {asked.out}")


if __name__ == "__main__":
    main()
