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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from compose import place
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from talk import CHAT, conversation, look

FOOD_SHARE, CHAT_SHARE = 0.3, 0.02
SIZE = 112  # nano's own: a larger picture would only be made smaller again


@cache
def _sprites(build: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (build / "sprites.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def _archive(build: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(build / "sprites.zip")


def relit(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The drawing in another light or hand: saturation, brightness, contrast, a little hue, flat colours, blur."""
    alpha = drawing.getchannel("A")
    colour = drawing.convert("RGB")
    if rng.random() < 0.5:
        colour = ImageEnhance.Color(colour).enhance(rng.uniform(0.6, 1.4))
        colour = ImageEnhance.Brightness(colour).enhance(rng.uniform(0.8, 1.2))
        colour = ImageEnhance.Contrast(colour).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.3:
        hue, saturation, value = colour.convert("HSV").split()
        turn = int(rng.integers(-8, 9))
        colour = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    if rng.random() < 0.2:
        colour = ImageOps.posterize(colour, int(rng.integers(2, 4)))
    if rng.random() < 0.15:
        colour = colour.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.15:
        colour = colour.filter(ImageFilter.ModeFilter(5))  # flat patches, as another hand would draw them
    colour.putalpha(alpha)
    return colour


def squeezed(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A little wider or taller."""
    factor = rng.uniform(0.85, 1.18)
    return drawing.resize((max(8, round(drawing.width * factor)), drawing.height)) if rng.random() < 0.4 else drawing


def item(build: Path, seed: int, number: int) -> tuple[list[dict[str, str]], Image.Image | None]:
    """(messages, picture or None for small talk) of item `number`: a function of seed and number alone."""
    rng = np.random.default_rng([seed, number])
    if rng.random() < CHAT_SHARE:
        question, answer = CHAT[int(rng.integers(len(CHAT)))]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None
    sprites = _sprites(build)
    food = rng.random() < FOOD_SHARE
    while (about := sprites[int(rng.integers(len(sprites)))])["food"] != food:
        pass
    other = sprites[int(rng.integers(len(sprites)))]
    drawing = Image.open(io.BytesIO(_archive(build).read(about["file"]))).convert("RGBA")
    placed = place(squeezed(relit(drawing, rng), rng), rng, size=SIZE, turn=20, mirror=about["food"] and rng.random() < 0.5)
    messages = []
    for turn, (question, answer) in enumerate(conversation(about, look(placed), other, rng)):
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
    with ProcessPoolExecutor() as pool:
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
