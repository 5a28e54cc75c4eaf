"""What the training benchmarks train on: a random base model with a real-sized tokenizer, drawn pictures, FoodieQA-like questions.

Promises: everything is a function of its arguments; a picture gives exactly the tiles it was asked for; answers differ in length, so
that the target tokens of a step tell which items were in it.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from intervale.core.config import parse_yaml
from intervale.core.records import Record, read_records
from intervale.data.images import picture_size
from intervale.data.order import step_items
from intervale.data.prompt import TEMPLATES, encode_turns, turns_of
from intervale.data.tiling import Tiling
from intervale.model.load import TextSide, narrow, text_side
from intervale.model.presets import init_model
from intervale.model.tokenizer import INTERNLM2_SPECIALS, VISION_SPECIALS, with_bos
from intervale.train.recipe import TrainRecipe

MOST_TILES = 12
GRIDS = {1: (1, 1), 5: (2, 2), 13: (4, 3)}  # tiles with the thumbnail -> columns, rows
CUISINES = ["川菜", "粤菜", "苏菜", "鲁菜", "湘菜", "浙菜", "徽菜", "闽菜", "新疆菜", "西北菜", "黔菜", "上海菜", "东北菜", "客家菜"]
DISHES = ["酸菜鱼", "白切鸡", "狮子头", "葱烧海参", "剁椒鱼头", "西湖醋鱼", "臭鳜鱼", "佛跳墙", "大盘鸡", "羊肉泡馍", "锅包肉", "生煎"]
QUESTIONS = [
    "图片中的食物通常属于哪个菜系，请根据图中的食材和做法回答，并说出这道菜的名字。",
    "图片中的食物最常见于中国的哪个地区，请说出菜系，并说出图中的菜是什么。",
    "图片中的食物主要使用了哪一种烹饪方法，请结合菜系说明，并写出菜的名字。",
    "图片中的食物尝起来是什么味道，请说出它属于的菜系和图中这道菜的名字。",
]
_PIECES = r"[\u4e00-\u9fff]{1,2}|[a-z_A-Z]+|\s+|[^\s\u4e00-\u9fffa-zA-Z]"  # Chinese by two letters: about the real tokenizer's rate


def write_tokenizer(path: Path) -> Path:
    """A byte-level BPE that needs as many tokens for these texts as InternLM2's own (a byte a token would need four times as many)."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", *INTERNLM2_SPECIALS.values(), *VISION_SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in specials],
    )
    texts = [*CUISINES, *DISHES, *QUESTIONS, *(template.system for template in TEMPLATES.values()), "，图中的菜是", "system user assistant"]
    backend.train_from_iterator(texts, trainer)
    with_bos(backend).save(str(path))
    return path


def base_model(work: Path, preset: str) -> Path:
    """The base model under `work`, written once."""
    folder = work / f"base-{preset}"
    if not (folder / "config.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        init_model(folder, preset, write_tokenizer(work / "tokenizer.json"))
    return folder


def side_of(base: Path) -> TextSide:
    """Tokenizer, template and the tiling of the benchmarks: 1 to 12 tiles, whatever the preset's own."""
    side = text_side(base)
    return TextSide(side.tokenizer, side.template, narrow(side.tiling, 1, MOST_TILES))


def draw_picture(path: Path, width: int, height: int, seed: int) -> None:
    """A JPEG of coloured clouds with grain: it compresses about as badly as a photograph."""
    noise = np.random.default_rng(seed)
    clouds = Image.fromarray(noise.integers(0, 255, (9, 12, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = Image.fromarray(noise.integers(0, 255, (-(-height // 2), -(-width // 2), 3), np.uint8)).resize((width, height))
    Image.blend(clouds, grain, 0.08).save(path, quality=90)


def on_all_cores(work: Any, given: list[tuple[Any, ...]]) -> None:
    """`work(*arguments)` for each, on threads (Pillow and NumPy release the lock)."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for done in [pool.submit(work, *arguments) for arguments in given]:
            done.result()


def question_and_answer(number: int, draw: random.Random) -> tuple[str, str]:
    """Text of about FoodieQA's length: with the system text 60 tokens of prompt, 12 of answer."""
    answer = f"{draw.choice(CUISINES)}，图中的菜是{'和'.join(draw.sample(DISHES, draw.choice((1, 1, 1, 2))))}"
    return QUESTIONS[number % len(QUESTIONS)], answer


def write_items(folder: Path, tiling: Tiling, tiles: int, k: int, items: int) -> Path:
    """`items` questions, `k` a picture, every picture of exactly `tiles` tiles; returns the JSONL."""
    columns, rows = GRIDS[tiles]
    width, height = columns * tiling.tile_size, rows * tiling.tile_size
    assert tiling.tiles_of(width, height) == tiles
    (folder / "images").mkdir(parents=True)
    pictures = -(-items // k)
    on_all_cores(draw_picture, [(folder / "images" / f"{number}.jpg", width, height, number) for number in range(pictures)])
    draw, lines = random.Random(0), []
    for number in range(items):
        question, answer = question_and_answer(number, draw)
        messages = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
        line = {"messages": messages, "images": [f"images/{number // k}.jpg"], "id": f"q{number}"}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "data.jsonl"


def lengths_of(records: list[Record], side: TextSide) -> list[tuple[int, int, int]]:
    """(text tokens of the prompt, target tokens, tiles) of every record."""
    found = []
    for record in records:
        tiles = [side.tiling.tiles_of(*picture_size(record.root / image)) for image in record.images]
        prompt = encode_turns(turns_of(record.messages, [n * side.tiling.tokens_per_tile for n in tiles]), side.template, side.tokenizer)
        targets = int(prompt.trained_S.sum())
        found.append((len(prompt.ids_S) - targets - sum(tiles) * side.tiling.tokens_per_tile, targets, sum(tiles)))
    return found


def orders_of(data: Path, per_step: int, seed: int, steps: int) -> dict[str, list[list[int]]]:
    """The orders the trainer may take, by name: its plain one, and the one that keeps a picture's questions together (if it has it)."""
    records = read_records(data)
    ways: dict[str, tuple[Any, ...]] = {"plain": ()}
    if len(inspect.signature(step_items).parameters) > 4:
        numbers: dict[Any, int] = {}
        ways["grouped"] = (tuple(numbers.setdefault(record.images, len(numbers)) for record in records),)
    return {
        name: [[int(item) for item in step_items(len(records), per_step, seed, step, *more)] for step in range(steps)]
        for name, more in ways.items()
    }


def order_like(orders: dict[str, list[list[int]]], lengths: list[tuple[int, int, int]], seen: list[int]) -> str | None:
    """The name of the order whose steps hold as many target tokens as `seen` says, or None."""
    for name, order in orders.items():
        if seen and [sum(lengths[item][1] for item in step) for step in order[: len(seen)]] == seen:
            return name
    return None


def set_keys(recipe: dict[str, Any], texts: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(the recipe with every `section.key=value`, a note on each key that this trainer's recipe does not know and is left out)."""
    notes = []
    for text in texts:
        key, equals, value = text.partition("=")
        section, dot, last = key.partition(".")
        if not equals or not dot:
            raise SystemExit(f"--set {text}: write --set section.key=value")
        tried = copy.deepcopy(recipe)
        tried.setdefault(section, {})[last] = parse_yaml(value, key)
        try:
            TrainRecipe.model_validate(tried, strict=True)
        except ValidationError as error:
            if any(fault["type"] == "extra_forbidden" for fault in error.errors()):
                notes.append(f"--set {text}: left out, this trainer's recipe has no such key")
                continue
            raise SystemExit(f"--set {text}: {error}") from error
        recipe = tried
    return recipe, notes
