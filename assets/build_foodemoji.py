"""Build foodemoji, the embedded data set: food and drink drawn by seven artists, asked about in FoodieQA's single-image schema.

    npm install                                     (in this folder; package.json pins every version)
    python assets/build_foodemoji.py OUT            (needs resvg-py, Pillow, NumPy; the package holds the result)

The same sources give the same bytes of sivqa_tidy.json; pictures are lossy WebP, so another libwebp may give other bytes.
Split by artist: artists.TEST are "test", the others "train". Choices: three distractors of the item's own group whose drawings
have the nearest colours, names that contain each other first; the right position is balanced within a question type and side.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from artists import TEST, TRAIN, icon_name, render
from compose import place
from foods import FROM, GROUPS, MADE_WITH, Food, items
from PIL import Image

Pair = tuple[str, str]  # (zh, en)
DRAWN = 256  # pixels a drawing is rendered at before it is placed
VARIANTS = {"train": 2, "test": 1}
WEBP_QUALITY = 82
QUESTIONS: dict[str, Pair] = {
    "name": ("图片里是什么?", "What is in the picture?"),
    "category": ("图片里的东西属于哪一类?", "Which group does it belong to?"),
    "main-ingredient": ("图片里的东西主要含有什么?", "What is it made of or made with?"),
    "cuisine": ("图片里的食物来自哪个国家?", "Which country is this food from?"),
}


def seeded(*what: object) -> np.random.Generator:
    """A generator that depends on what it is for, and on nothing else."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big"))


def colours(food: Food) -> np.ndarray:
    """A coarse colour histogram of the item's first training drawing: what makes two items look alike."""
    artist = next(artist for artist in TRAIN if icon_name(artist, food.code))
    pixels = np.asarray(render(artist, food.code, 48)).reshape(-1, 4)
    seen = pixels[pixels[:, 3] > 128][:, :3] // 64
    counts = np.bincount(seen @ np.array([16, 4, 1]), minlength=64)
    return counts / counts.sum()


def name_choices(food: Food, foods: tuple[Food, ...], looks: dict[str, np.ndarray], rng: np.random.Generator) -> list[Pair]:
    """Three other names of the item's group: first those that contain its name (so that saying one never counts as the other),
    then three drawn from the six that look most alike."""

    def contains(other: Food) -> bool:
        return any(food.name[at] != other.name[at] and food.name[at] in other.name[at] for at in (0, 1))

    same = [other for other in foods if other.group == food.group and other.code != food.code]
    first = [other for other in same if contains(other)]
    rest = sorted((o for o in same if o not in first), key=lambda other: float(np.abs(looks[food.code] - looks[other.code]).sum()))[:6]
    chosen = first[:3] + [rest[i] for i in rng.permutation(len(rest))[: max(0, 3 - len(first))]]
    return [other.name for other in chosen]


def others(right: Pair, pool: list[Pair], rng: np.random.Generator) -> list[Pair]:
    """Three of `pool` that are not the right one, nor contain it."""
    left = [pair for pair in pool if pair != right and not any(a in b or b in a for a, b in zip(pair, right, strict=True))]
    return [left[i] for i in rng.permutation(len(left))[:3]]


def asked(
    food: Food, foods: tuple[Food, ...], looks: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, tuple[Pair, list[Pair]]]:
    """{question type: (right answer, three distractors)}."""
    found = {
        "name": (food.name, name_choices(food, foods, looks, rng)),
        "category": (food.category, others(food.category, [(zh, en) for _, zh, en in GROUPS.values()], rng)),
    }
    if food.made_with:
        found["main-ingredient"] = (food.made_with, others(food.made_with, [row[:2] for row in MADE_WITH], rng))
    if food.origin:
        found["cuisine"] = (food.origin, others(food.origin, [row[:2] for row in FROM], rng))
    return found


def entry(
    kind: str, food: Food, number: int, artist: str, variant: int, file: str, right: Pair, wrong: list[Pair], position: int
) -> dict[str, Any]:
    """One question in FoodieQA's schema, with the side and the artist."""
    choices = [*wrong[:position], right, *wrong[position:]]
    return {
        "question": QUESTIONS[kind][0],
        "choices": [zh for zh, _ in choices],
        "answer": str(position),
        "question_type": kind,
        "food_name": food.name[0],
        "question_id": f"{kind}-{artist}-{food.code}-{variant}",
        "food_meta": {
            "main_ingredient": [food.made_with[0]] if food.made_with else [],
            "id": number,
            "food_name": food.name[0],
            "food_type": food.category[0],
            "food_location": food.origin[0] if food.origin else "",
            "food_file": file,
        },
        "question_en": QUESTIONS[kind][1],
        "choices_en": [en for _, en in choices],
        "split": "test" if artist in TEST else "train",
        "artist": artist,
    }


def build(out: Path) -> None:
    """Write OUT/sivqa_tidy.json and OUT/images/ (what else stands in OUT stays)."""
    foods = items()
    looks = {food.code: colours(food) for food in foods}
    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "images").mkdir(parents=True)
    asked_so_far: dict[tuple[str, str], int] = {}
    lines = []
    for artist in (*TRAIN, *TEST):
        side = "test" if artist in TEST else "train"
        for number, food in enumerate(foods, 1):
            if icon_name(artist, food.code) is None:
                continue
            drawing = render(artist, food.code, DRAWN)
            for variant in range(VARIANTS[side]):
                file = f"images/{artist}-{food.code}-{variant}.webp"
                picture = place(drawing, seeded("picture", artist, food.code, variant)).picture
                picture.save(out / file, quality=WEBP_QUALITY, method=6)
                rng = seeded("choices", artist, food.code, variant)
                for kind, (right, wrong) in asked(food, foods, looks, rng).items():
                    count = asked_so_far.get((kind, side), 0)
                    asked_so_far[kind, side] = count + 1
                    # Every four questions of a kind have the four positions once, in an order of their own.
                    position = int(seeded("position", kind, side, count // 4).permutation(4)[count % 4])
                    lines.append(entry(kind, food, number, artist, variant, file, right, wrong, position))
    (out / "sivqa_tidy.json").write_text(
        "[\n" + ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n]\n", encoding="utf-8"
    )
    sizes = sum(path.stat().st_size for path in (out / "images").iterdir())
    print(f"{len(foods)} items; {asked_so_far}; {len(list((out / 'images').iterdir()))} pictures, {sizes / 1e6:.1f} MB")


if __name__ == "__main__":
    Image.init()
    build(Path(sys.argv[1]))
