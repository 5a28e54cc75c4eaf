"""How much faster does `evaluate` ask in batches than one item at a time? Both ways in this process, and their answers compared.

python bench/evaluate.py [--items 64] [--new 32] [--rounds 3] [--device cpu] [--preset nano]

The model is a random `nano`: answers run to `--new` tokens, none stops early. Pictures are drawn, in six sizes, four questions each.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from intervale.core.records import Message, Record, read_records, to_json
from intervale.data.images import load_picture, picture_size
from intervale.data.prompt import encode_turns, turns_of
from intervale.data.tiling import cut_tiles
from intervale.engine.api import Sampling
from intervale.engine.decode import encode_tiles, generate, prefill, score_continuations
from intervale.evaluate.ask import Protocol, ask, question_of
from intervale.evaluate.batches import batches_of
from intervale.evaluate.features import Features
from intervale.evaluate.prompts import continuations, messages_for
from intervale.model.load import Model, load_model
from intervale.model.presets import init_model

SIZES = [(448, 448), (640, 480), (480, 640), (1280, 720), (500, 1500), (900, 300)]
DISHES = ["川菜", "粤菜", "苏菜", "鲁菜", "湘菜", "浙菜", "徽菜", "闽菜"]


def write_data(folder: Path, items: int) -> Path:
    draw, noise = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = []
    for number in range(items):
        image = f"images/{number // 4}.png"
        if number % 4 == 0:
            low = noise.integers(0, 255, (9, 9, 3), np.uint8)
            Image.fromarray(low).resize(SIZES[number // 4 % len(SIZES)]).save(folder / image)
        choices = tuple(draw.sample(DISHES, 4))
        asked = Message("user", f"<image>\n{'请仔细看图。' * (number % 3)}图中的菜属于哪个菜系?")
        lines.append(
            to_json(Record(f"q{number}", (asked, Message("assistant", choices[0] + "，图中的菜是菜")), (image,), choices, 0)) + "\n"
        )
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "data.jsonl"


def one_by_one(model: Model, records: list[Record], protocol: Protocol, _tiles: list[list[int]]) -> dict[str, list]:
    """The way before batches: each item's prefill, then its own steps; the last picture's features are kept."""
    found, held = {}, (None, None)
    for record in records:
        path = record.root / record.images[0]
        if held[0] != path:
            held = path, encode_tiles(model, cut_tiles(load_picture(path), model.tiling))
        features = held[1]
        turns = turns_of(messages_for(record, protocol.prompt), [features.shape[0] * features.shape[1]])
        start = prefill(model, encode_turns(turns, model.template, model.tokenizer, answer_next=True).ids_S, features)
        if protocol.mode == "likelihood":
            asked = continuations(record, protocol.prompt, model.tokenizer, model.template, model.tokenizer.decode)
            found[record.id] = [sum(values) for values in score_continuations(model, start, asked)]
        else:
            ids = list(generate(model, start, Sampling(max_new_tokens=protocol.max_new_tokens)))
            found[record.id] = [model.tokenizer.decode(ids)]
    return found


def in_batches(model: Model, records: list[Record], protocol: Protocol, tiles: list[list[int]]) -> dict[str, list]:
    """What `evaluate` does, from the pictures' headers on (which `plan` has always read)."""
    batches = batches_of([question_of(model, record, own, protocol) for record, own in zip(records, tiles, strict=True)])
    features = Features(model, batches)
    lines = [line for number in range(len(batches)) for line in ask(model, features, number, protocol)]
    return {line["id"]: [score["sum"] for score in line["scores"]] if "scores" in line else [line["raw"]] for line in lines}


def differing(mine: dict[str, list], its: dict[str, list]) -> int:
    """Items whose answer is another text, or whose scores differ by more than rounding."""
    assert mine.keys() == its.keys()
    pairs = [(mine[name], its[name]) for name in its]
    return sum(a != b if isinstance(a[0], str) else max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-3 for a, b in pairs)


def seconds_of(way, *given) -> tuple[float, dict[str, list]]:  # type: ignore[no-untyped-def]
    begun = time.perf_counter()
    found = way(*given)  # every way ends in lists of Python numbers, so the device has finished
    return time.perf_counter() - begun, found


def main() -> None:
    options = argparse.ArgumentParser()
    for name, default in (("items", 64), ("new", 32), ("rounds", 3), ("device", "cpu"), ("preset", "nano")):
        options.add_argument(f"--{name}", default=default, type=type(default))
    given = options.parse_args()
    told: dict[str, object] = {"device": given.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    told |= {"preset": given.preset, "items": given.items, "new": given.new}
    if given.device == "cuda":
        told["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        init_model(Path(folder) / "model", given.preset)
        model = load_model(Path(folder) / "model", device=given.device)
        Model.stop_ids = (-1,)  # type: ignore[assignment,misc]  # random weights would stop at random
        records = read_records(write_data(Path(folder), given.items))
        tiles = [[model.tiling.tiles_of(*picture_size(record.root / image)) for image in record.images] for record in records]
        print(f"{'mode':12} {'one by one':>12} {'batches':>12} {'ratio':>7} {'differ':>7}   (items/s)")
        for mode in ("strict", "likelihood"):
            protocol = Protocol("open", mode, given.new if mode == "strict" else None, model.tiling.max_tiles, None)
            warm = records[:8]
            one_by_one(model, warm, protocol, tiles[:8]), in_batches(model, warm, protocol, tiles[:8])
            runs = [[seconds_of(way, model, records, protocol, tiles) for way in (one_by_one, in_batches)] for _ in range(given.rounds)]
            old, new = (given.items / statistics.median(run[side][0] for run in runs) for side in (0, 1))
            differ = differing(runs[0][0][1], runs[0][1][1])
            print(f"{mode:12} {old:12.2f} {new:12.2f} {new / old:6.1f}x {differ:7}")
            told[mode] = {
                "one_by_one_items_s": round(old, 3),
                "batches_items_s": round(new, 3),
                "ratio": round(new / old, 2),
                "differ": differ,
            }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
