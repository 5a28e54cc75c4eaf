"""`evaluate`: every item asked once, in batches, written as they come, summed up at the end.

Promises: an evaluation that was stopped goes on where it stopped and ends with the summary of a straight run (but for its times);
nothing is mixed that differs in protocol, model or data; no item is skipped. Cost: loading the model, then `ask` a batch; a batch
that was stopped half-way is asked again whole, and only what is missing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from intervale.core.errors import UserError
from intervale.core.files import inside, locked, write_json
from intervale.core.lang import say
from intervale.core.records import Record, data_digest, read_records
from intervale.core.runlog import versions
from intervale.data.images import picture_size
from intervale.data.tiling import Tiling
from intervale.evaluate.ask import Protocol, ask, question_of, refuse_unscorable
from intervale.evaluate.batches import batches_of, work_of
from intervale.evaluate.features import Features
from intervale.evaluate.folder import (
    SUMMARY,
    append_prediction,
    begin,
    in_order,
    open_folder,
    positions,
    read_evaluation,
    read_predictions,
)
from intervale.evaluate.free import HEADLINE, free_numbers
from intervale.evaluate.identity import picture_keys, pictures_digest, refuse_changed
from intervale.evaluate.kept_features import FEATURES, begun_with, kept_features
from intervale.evaluate.provenance import about, model_identity
from intervale.evaluate.statistics import wilson
from intervale.model.load import Model, as_device, as_dtype, load_model, load_text_side, narrow, resolve_model

Tell = Callable[[str], None]
_EVERY = 3.0  # seconds between two lines of progress
PROMPTS, MODES = ("open", "mcq"), ("strict", "likelihood", "official")


@dataclass(frozen=True)
class Plan:
    """A checked evaluation: what will be asked of which model, and where it goes. `tiles`: of each record's pictures; `features`: the
    folder that pictures' features are read from and written to (None: read where training left them, written nowhere)."""

    name: str
    folder: Path
    data: Path
    records: tuple[Record, ...]
    tiles: tuple[tuple[int, ...], ...]
    protocol: Protocol
    tiling: Tiling
    device: str
    dtype: torch.dtype
    out: Path
    pictures: tuple[tuple[str, ...], ...]  # digests of each record's
    features: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one: the content of protocol.json. Names and places may change."""
        return {
            "protocol": asdict(self.protocol),
            "model": {
                **model_identity(self.folder),
                "min_tiles": self.tiling.min_tiles,
                "precision": str(self.dtype).removeprefix("torch."),
            },
            "data": {"items": len(self.records), "digest": data_digest(self.records), "pictures": pictures_digest(self.pictures)},
        }


def refuse_modes(prompt: str, mode: str) -> None:
    """Raise a UserError for a prompt or mode that is not known, or a pair that cannot be scored."""
    if prompt not in PROMPTS or mode not in MODES:
        raise UserError(f"unknown prompt {prompt!r} or mode {mode!r}", f"use one of {', '.join(PROMPTS)} and one of {', '.join(MODES)}")
    if mode == "official" and prompt == "open":
        raise UserError(
            "--mode official looks for a letter, but --prompt open shows none",
            "add --prompt mcq, or use --mode strict or likelihood with the open prompt",
        )


def plan(
    model: str,
    data: Path,
    out: Path,
    *,
    prompt: str = "open",
    mode: str = "strict",
    max_new_tokens: int = 64,
    max_tiles: int | None = None,
    device: str | None = None,
    precision: str = "auto",
    limit: int | None = None,
    features: Path | None = None,
) -> Plan:
    """Check everything that can be checked before the weights are read.

    `limit` takes the first items only; `features` is that of `Plan`. Raises: UserError for data that cannot be scored, a picture that is not there, a wrong setting.
    """
    refuse_modes(prompt, mode)
    records = read_records(data)[:limit]
    free = refuse_unscorable(records, str(data), prompt, mode)
    sizes = picture_sizes(records)
    tiling = narrow(load_text_side(model).tiling, None, max_tiles)
    tiles = tuple(tuple(tiling.tiles_of(*size) for size in own) for own in sizes)
    device = str(as_device(device))
    dtype = as_dtype(precision) if precision != "auto" else torch.bfloat16 if device.startswith("cuda") else torch.float32
    likely = mode == "likelihood"
    headline = "sum" if likely else HEADLINE if free else None
    protocol = Protocol(prompt, mode, None if likely else max_new_tokens, tiling.max_tiles, headline)
    pictures = picture_keys(records)
    return Plan(model, resolve_model(model), data, tuple(records), tiles, protocol, tiling, device, dtype, out, pictures, features)


def picture_sizes(records: Sequence[Record]) -> list[list[tuple[int, int]]]:
    """(width, height) of each record's pictures; a file is opened once. Raises: UserError for one that cannot be used."""
    known: dict[Path, tuple[int, int]] = {}
    sizes = []
    for record in records:
        paths = [inside(record.root, image, record.where) for image in record.images]
        for path, image in zip(paths, record.images, strict=True):
            known[path] = known[path] if path in known else picture_size(path, f"{record.where}: {image}")
        sizes.append([known[path] for path in paths])
    return sizes


def evaluate(job: Plan, *, fresh: bool, tell: Tell) -> dict[str, Any]:
    """Ask what is not answered yet, write DIR/summary.json, return it. A finished folder is only read.

    Ctrl-C leaves every line that was written; the same call continues.
    """
    with locked(job.out):
        return _evaluate(job, fresh, tell)


def _evaluate(job: Plan, fresh: bool, tell: Tell) -> dict[str, Any]:
    identity = job.identity()
    state = open_folder(job.out, identity, fresh, tell)
    if state == "done":
        tell(say(f"{job.out}: already evaluated; --fresh would start over", f"{job.out}：已评测过；--fresh 可重新开始"))
        return read_evaluation(job.out)[0]
    done = {line["id"]: line for line in read_predictions(job.out)}
    if done:
        tell(say(f"continuing: {len(done)} of {len(job.records)} items are done", f"继续：{len(job.records)} 条中已完成 {len(done)} 条"))
    if len(done) < len(job.records):
        model = load_model(job.folder, dtype=job.dtype, device=job.device, max_tiles=job.protocol.max_tiles)
        _ask_rest(job, model, identity, state, done, tell)
    refuse_changed(job.records, job.pictures)
    # Read back, so that a straight run and a continued one sum up the very same numbers.
    lines = in_order(job.out, [record.id for record in job.records])
    summary = summarise(lines) | _about(job, identity, tell)
    write_json(job.out / SUMMARY, summary)
    return summary


def _ask_rest(job: Plan, model: Model, identity: dict[str, Any], state: str, done: dict[str, dict[str, Any]], tell: Tell) -> None:
    """Ask every batch that is not all on file, and write the lines that are missing."""
    keys = {record.id: list(own) for record, own in zip(job.records, job.pictures, strict=True)}
    batches = batches_of([question_of(model, record, own, job.protocol) for record, own in zip(job.records, job.tiles, strict=True)])
    kept = kept_features(model, job.records, job.features, begun_with(job.out, len(done)), tell)
    features = Features(model, batches, kept, tell)
    progress = _Progress([[(question.record.id, work_of(batch) / len(batch)) for question in batch] for batch in batches], done, tell)
    try:
        for number, batch in enumerate(batches):
            if all(question.record.id in done for question in batch):
                continue
            lines = ask(model, features, number, job.protocol)
            if state == "new":
                begin(job.out, identity)  # only now: a model or picture that fails at once leaves no folder behind
                state = "resume"
            if kept is not None and not (job.out / FEATURES).exists():
                write_json(job.out / FEATURES, kept.told())
            for line in lines:
                if line["id"] not in done:
                    append_prediction(job.out, line | {"pictures": keys[line["id"]]})
                    progress.step(line)
    except KeyboardInterrupt:
        tell(say(f"stopped after {progress.done} of {len(job.records)} items; the same command continues",
                 f"已停止：完成 {progress.done} / {len(job.records)} 条；再次运行同一命令即可继续"))  # fmt: skip
        raise


class _Progress:
    """Lines on how far it is, at most one in `_EVERY` seconds. The time left goes by positions to compute, not by items: the longest come first."""

    def __init__(self, batches: Sequence[Sequence[tuple[str, float]]], done: Mapping[str, dict[str, Any]], tell: Tell) -> None:
        self._work = {name: work for batch in batches for name, work in batch}
        self.total, self.done, self.correct = len(self._work), len(done), sum(line["correct"] for line in done.values())
        self._left = self._before = sum(work for name, work in self._work.items() if name not in done)
        self._began = self._told = time.monotonic()
        self._fresh, self._tell = 0, tell

    def step(self, line: dict[str, Any]) -> None:
        self.done, self._fresh = self.done + 1, self._fresh + 1
        self.correct += line["correct"]
        self._left -= self._work[line["id"]]
        now = time.monotonic()
        if now - self._told < _EVERY and self.done < self.total:
            return
        self._told = now
        spent = max(now - self._began, 1e-9)
        seconds = round(spent * max(self._left, 0) / max(self._before - self._left, 1e-9))
        left, pace, share = f"{seconds // 60}:{seconds % 60:02d}", self._fresh / spent, self.correct / self.done
        rate = f"{pace:,.0f}" if pace >= 10 else f"{pace:.2g}"
        self._tell(say(f"{self.done}/{self.total}  right so far {share:.1%}  {rate} items/s  ETA {left}",
                       f"{self.done}/{self.total}  目前正确率 {share:.1%}  {rate} 条/秒  剩余 {left}"))  # fmt: skip


def score(lines: Sequence[dict[str, Any]], parsed: str = "parsed") -> dict[str, Any]:
    """{n, correct, accuracy, interval} of predictions, by their `parsed` (or `parsed_mean`) choice; open answers have their own verdict."""
    correct = sum(line[parsed] == line["answer"] if line["choices"] else line["correct"] for line in lines)
    return {"n": len(lines), "correct": correct, "accuracy": correct / len(lines), "interval": list(wilson(correct, len(lines)))}


def per_tag(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{tag: {value: score}}, in order of first appearance."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        for tag, value in line["tags"].items():
            groups.setdefault(tag, {}).setdefault(value, []).append(line)
    return {tag: {value: score(items) for value, items in values.items()} for tag, values in groups.items()}


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of summary.json: a function of the predictions alone."""
    most = max(len(line["choices"]) for line in lines)
    likely = lines[0]["mode"] == "likelihood"
    found: dict[str, Any] = {"kind": "intervale evaluation", **score(lines)}
    spent = {"tokens": sum(line["tokens"] for line in lines), "seconds": round(sum(line["seconds"] for line in lines), 2)}
    if not most:
        return found | free_numbers(lines) | {"chance": None, "tags": per_tag(lines), **spent}
    if likely:
        found |= {"headline": "sum", "accuracies": {"sum": score(lines), "mean": score(lines, "parsed_mean")}}
        found |= {"unparsed": 0, "ties": sum(line["parsed"] is None for line in lines)}
    else:
        found |= {"unparsed": sum(line["parsed"] is None for line in lines), "cut_off": sum(line["finish"] == "length" for line in lines)}
    return found | {
        "chance": sum(1 / len(line["choices"]) for line in lines) / len(lines),
        "tags": per_tag(lines),
        "predicted_positions": positions([line["parsed"] for line in lines], most),
        "right_positions": positions([line["answer"] for line in lines], most),
        **spent,
    }


def _about(job: Plan, identity: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """What was scored, on what, with what."""
    return {
        "protocol": identity["protocol"],
        "model": {"name": job.name, "folder": str(job.folder.resolve()), **identity["model"], "device": job.device},
        "data": {"file": str(job.data.resolve()), **identity["data"]},
        "features_read": len(begun_with(job.out, len(job.records)) or ()),
        **about(job.folder, job.data, job.records, identity["data"], tell),
        "versions": versions(),
    }
