"""What does sharing a picture's prefill save, and how many items a second does `evaluate` answer against a plain `generate` loop?

python bench/evaluate.py [--preset internvl2-2b] [--device cuda] [--work DIR] [--out FILE] [--tiles 13] [--questions 4] [--pictures 4]
                         [--new 16] [--rounds 5] [--budget 110] [--precision bf16]
python bench/evaluate.py --model nano --device cpu      (a folder, or the embedded model, instead of a preset's random weights)

Two tables, every way in this process, in turns, after a first turn that is not counted; medians of the rounds.

score, answer: the questions on one picture, its features at hand (no way runs the vision tower), by three ways:
  separate  each question's own prefill, then its choices (or its answer) one after another: `engine.decode`
  batched   a row a question in `engine.batch`, as many rows together as `evaluate` allows: nothing of the picture is shared
  shared    one row: the picture once, questions behind it, choices behind those
evaluate: all items of `--pictures` pictures, from the files to the answers, by two ways:
  plain     transformers' `generate`, one item after another: decode, tile, tower, prefill and a step a token, as a script would
  evaluate  what `intervale evaluate` runs

A preset's weights are random; no answer ends before `--new` tokens. `difference` is the largest between the log-probabilities of two ways,
`differ` counts answers that are not the same: none in float32; in bfloat16 rounding decides where two tokens are about equally likely.
On a CPU `from_float64` says how far each way is from the same scoring in float64: a difference of that size is float32's own rounding, which
grows with the log-probability itself (`lowest`).
The last line is JSON, with device and versions; `--out` gets it too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from intervale.core.records import Message, Record, read_records, to_json
from intervale.core.runlog import versions
from intervale.data.images import load_picture, picture_size
from intervale.data.prompt import encode_turns, turns_of
from intervale.data.tiling import cut_tiles
from intervale.engine.api import Sampling
from intervale.engine.batch import generate_batch, score_batch
from intervale.engine.decode import encode_tiles, generate, prefill, score_continuations
from intervale.engine.tree import Prompt
from intervale.evaluate.ask import Protocol, ask, question_of
from intervale.evaluate.batches import ROWS, TOKENS, batches_of
from intervale.evaluate.features import Features
from intervale.evaluate.prompts import continuations, messages_for
from intervale.model.forward import normalise
from intervale.model.load import Model, load_model, resolve_model
from intervale.model.presets import init_model

DISHES = ["川菜", "粤菜", "苏菜", "鲁菜", "湘菜", "浙菜", "徽菜", "闽菜"]
ASKED = ["图中的菜属于哪个菜系?", "图片中的食物通常是什么味道?", "这道菜的主要食材来自哪里?", "图中的食物一般在什么时候吃?"]
Way = Callable[[], Any]


def write_data(folder: Path, pictures: int, questions: int, edge: int, tiles: int) -> Path:
    """Drawn pictures of that many tiles (the thumbnail counted), `questions` items with four choices on each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise, lines = np.random.default_rng(0), []
    across, down = {13: (4, 3), 7: (3, 2), 5: (2, 2), 1: (1, 1)}[tiles]
    for number in range(pictures):
        image = f"images/{number}.png"
        low = noise.integers(0, 255, (9, 9, 3), np.uint8)
        Image.fromarray(low).resize((edge * across, edge * down)).save(folder / image)
        for turn in range(questions):
            choices = tuple(DISHES[(turn + n) % len(DISHES)] for n in range(4))
            asked = Message("user", f"<image>\n{ASKED[turn % len(ASKED)]}{'请仔细看图。' * (turn // len(ASKED))}")
            told = Message("assistant", choices[0] + "，图中的菜是菜")
            lines.append(to_json(Record(f"q{number}-{turn}", (asked, told), (image,), choices, 0)) + "\n")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "data.jsonl"


@dataclass(frozen=True)
class Bench:
    """A loaded model and what it is asked."""

    model: Model
    records: list[Record]
    tiles: list[list[int]]
    new: int

    def prompt(self, record: Record, features: torch.Tensor) -> Prompt:
        turns = turns_of(messages_for(record, "open"), [features.shape[0] * features.shape[1]])
        ids_S = encode_turns(turns, self.model.template, self.model.tokenizer, answer_next=True).ids_S
        return Prompt(ids_S, ((record.images[0], features),))

    def choices(self, record: Record) -> list[list[int]]:
        return continuations(record, "open", self.model.tokenizer, self.model.template, self.model.tokenizer.decode)


def together(prompts: Sequence[Prompt]) -> list[list[list[Prompt]]]:
    """A row a prompt, in the batches that the limits of `evaluate` allow."""
    many = max(1, min(ROWS, TOKENS // max(len(prompt.ids_S) for prompt in prompts)))
    return [[[prompt] for prompt in prompts[n : n + many]] for n in range(0, len(prompts), many)]


def scoring(bench: Bench, prompts: Sequence[Prompt], choices: Sequence[list[list[int]]]) -> dict[str, Way]:
    """The ways to score choices; each returns the log-probabilities of all tokens in one list."""
    model = bench.model

    def flat(scored: Any) -> list[float]:
        return [value for own in scored for ids in own for value in ids]

    def separate() -> list[float]:
        return flat(
            score_continuations(model, prefill(model, p.ids_S, p.pictures[0][1]), own) for p, own in zip(prompts, choices, strict=True)
        )

    def batched() -> list[float]:
        left = list(choices)
        return flat(own for rows in together(prompts) for own in score_batch(model, rows, [left.pop(0) for _ in rows]))

    return {"separate": separate, "batched": batched, "shared": lambda: flat(score_batch(model, [prompts], choices))}


def answering(bench: Bench, prompts: Sequence[Prompt]) -> dict[str, Way]:
    """The ways to answer; each returns the tokens of every answer."""
    model, new = bench.model, bench.new
    sampling = Sampling(max_new_tokens=new)
    return {
        "separate": lambda: [list(generate(model, prefill(model, p.ids_S, p.pictures[0][1]), sampling)) for p in prompts],
        "batched": lambda: [own for rows in together(prompts) for own in generate_batch(model, rows, new)],
        "shared": lambda: generate_batch(model, [prompts], new),
    }


def evaluating(bench: Bench) -> dict[str, Way]:
    """A plain loop and what `evaluate` does, from the pictures' files on; each returns {item: answer}."""
    model, network = bench.model, bench.model.network

    def plain() -> dict[str, str]:
        found = {}
        for record in bench.records:
            tiles = cut_tiles(load_picture(record.root / record.images[0]), model.tiling)
            turns = turns_of(messages_for(record, "open"), [len(tiles) * model.tiling.tokens_per_tile])
            ids_BS = torch.from_numpy(encode_turns(turns, model.template, model.tokenizer, answer_next=True).ids_S)[None].to(model.device)
            pixels = normalise(torch.from_numpy(tiles).to(model.device), network.dtype)
            with torch.inference_mode():
                made = network.generate(
                    input_ids=ids_BS, pixel_values=pixels, attention_mask=torch.ones_like(ids_BS), max_new_tokens=bench.new,
                    min_new_tokens=bench.new, do_sample=False, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            found[record.id] = model.tokenizer.decode(made[0, -bench.new :].tolist())
        return found

    def evaluate() -> dict[str, str]:
        protocol = Protocol("open", "strict", bench.new, model.tiling.max_tiles, None)
        batches = batches_of([question_of(model, record, own, protocol) for record, own in zip(bench.records, bench.tiles, strict=True)])
        features = Features(model, batches)
        return {line["id"]: line["raw"] for number in range(len(batches)) for line in ask(model, features, number, protocol)}

    return {"plain": plain, "evaluate": evaluate}


def timed(ways: dict[str, Way], rounds: int, until: float) -> tuple[dict[str, float], dict[str, Any]]:
    """(median seconds, what was found) of every way; a round runs all in turn, and none begins after `until`."""
    found = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()  # every way ends in Python's own numbers, so the device has finished
            seconds[name].append(time.perf_counter() - begun)
        if time.monotonic() > until:
            break
    return {name: statistics.median(own) for name, own in seconds.items()}, found


def row(name: str, seconds: dict[str, float], items: int, against: str, told: dict[str, Any]) -> dict[str, Any]:
    """Print a line of the table; the same for the JSON."""
    best = seconds[against]
    ratios = {way: round(own / best, 2) for way, own in seconds.items() if way != against}
    speeds = {way: round(items / own, 2) for way, own in seconds.items()}
    words = "  ".join(f"{way} {speed:9.2f}" for way, speed in speeds.items())
    print(f"{name:9} {words}   {', '.join(f'{ratio:.2f}x {way}' for way, ratio in ratios.items())}   {told}", flush=True)
    return {
        "items_s": speeds,
        "milliseconds": {way: round(1e3 * own, 2) for way, own in seconds.items()},
        f"{against}_faster_than": ratios,
        **told,
    }


def from_float64(bench: Bench, prompts: Sequence[Prompt], choices: Sequence[list[list[int]]], found: dict[str, Any]) -> dict[str, float]:
    """The largest distance of each way's log-probabilities from those of the same network and features in float64."""
    wide = [Prompt(own.ids_S, tuple((name, features.double()) for name, features in own.pictures)) for own in prompts]
    bench.model.network.double()
    exact = scoring(bench, wide, choices)["separate"]()
    bench.model.network.float()
    return {way: float(f"{max(abs(a - b) for a, b in zip(own, exact, strict=True)):.2g}") for way, own in found.items()}


def measure(bench: Bench, questions: int, rounds: int, until: float) -> dict[str, Any]:
    """Both tables."""
    model, first = bench.model, bench.records[:questions]
    features = encode_tiles(model, cut_tiles(load_picture(first[0].root / first[0].images[0]), model.tiling))
    prompts, choices = [bench.prompt(record, features) for record in first], [bench.choices(record) for record in first]
    print(
        f"{len(features)} tiles, prompts of {[len(p.ids_S) for p in prompts]} tokens, choices of {[[len(c) for c in own] for own in choices]}"
    )
    print("items/s:")
    seconds, found = timed(scoring(bench, prompts, choices), rounds, until)
    difference = max(abs(a - b) for a, b in zip(found["separate"], found["shared"], strict=True))
    told: dict[str, Any] = {"tiles": len(features), "prompt_tokens": [len(p.ids_S) for p in prompts]}
    facts: dict[str, Any] = {"difference": float(f"{difference:.2g}"), "lowest": round(min(found["separate"]), 1)}
    if model.device.type == "cpu" and model.network.dtype == torch.float32:
        facts["from_float64"] = from_float64(bench, prompts, choices, found)
    told["score"] = row("score", seconds, questions, "shared", facts)
    seconds, found = timed(answering(bench, prompts), rounds, until)
    differ = sum(a != b for a, b in zip(found["separate"], found["shared"], strict=True))
    told["answer"] = row("answer", seconds, questions, "shared", {"differ": differ})
    seconds, found = timed(evaluating(bench), min(rounds, 3), until)
    differ = sum(found["plain"][name] != answer for name, answer in found["evaluate"].items())
    told["evaluate"] = row("evaluate", seconds, len(bench.records), "evaluate", {"differ": differ, "of": len(bench.records)})
    return told


def main() -> None:
    begun = time.monotonic()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", default="internvl2-2b")
    options.add_argument("--model", help="instead of a preset: a model's folder, or nano, the embedded one")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--precision", choices=("bf16", "fp32"))
    for name, default in (("tiles", 13), ("questions", 4), ("pictures", 4), ("new", 16), ("rounds", 5), ("budget", 110)):
        options.add_argument(f"--{name}", default=default, type=int)
    options.add_argument("--work", type=Path, help="a folder to work in and to keep the model in (default: a temporary one)")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    cuda = given.device.startswith("cuda")
    dtype = torch.bfloat16 if (given.precision or ("bf16" if cuda else "fp32")) == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        folder = resolve_model(given.model) if given.model else work / f"model-{given.preset}"
        if not folder.exists():
            init_model(folder, given.preset)
        model = load_model(folder, dtype=dtype, device=given.device, max_tiles=max(1, given.tiles - 1))
        Model.stop_ids = (-1,)  # type: ignore[assignment,misc]  # random weights would stop at random
        data = write_data(work / f"data-{folder.name}", given.pictures, given.questions, model.tiling.tile_size, given.tiles)
        records = read_records(data)
        tiles = [[model.tiling.tiles_of(*picture_size(record.root / image)) for image in record.images] for record in records]
        print(f"{folder.name} loaded after {time.monotonic() - begun:.0f} s", flush=True)
        told: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}
        told |= {
            "model": given.model or given.preset,
            "precision": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "new": given.new,
        }
        told |= {"questions": given.questions, "pictures": given.pictures, "rounds": given.rounds}
        told |= measure(Bench(model, records, tiles, given.new), given.questions, given.rounds, begun + 0.8 * given.budget)
    told["seconds"] = round(time.monotonic() - begun, 1)
    if given.out:
        given.out.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told, ensure_ascii=False))


if __name__ == "__main__":
    main()
