"""Which model was scored, and whether it has seen the items before. Reads small JSON files and headers; no weights.

A score on training items shows that the training worked, not that the model is good, so every summary and report says which
one it is: true, false, or null when nothing tells. Cost: milliseconds; where the training file is at hand, a hash of the
pictures that could be the same (equal size in bytes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import inside, read_json, sha256_file
from intervale.core.lang import say
from intervale.core.records import Record, data_digest
from intervale.data.corpus import Corpus, SourceSpec, open_corpus
from intervale.model.adapt import ADAPTER, BASE, TRAINED, base_folder, checkpoint_of
from intervale.model.source import add_ends, fingerprint

_CARD, _EXPORTED, _RUN = "dataset.json", "intervale.json", "run.json"


def model_identity(folder: Path) -> dict[str, Any]:
    """{fingerprint, checkpoint, checkpoint_fingerprint} of a model, run or checkpoint; the last two None for a plain model.

    The fingerprints look at sizes and at the ends of the weight files, as `model.source.fingerprint` does.
    """
    checkpoint = checkpoint_of(folder)
    own = None
    if checkpoint is not None:
        digest = hashlib.sha256()
        for name in (ADAPTER, TRAINED, "adapter_config.json"):
            if (checkpoint / name).is_file():
                add_ends(checkpoint / name, digest)
        own = digest.hexdigest()[:16]
    return {
        "fingerprint": fingerprint(base_folder(folder)),
        "checkpoint": checkpoint.name if checkpoint else None,
        "checkpoint_fingerprint": own,
    }


def _trainings(folder: Path) -> Iterator[dict[str, Any]]:
    """What this model and those under it were trained on: {digest, file?}, as far as their folders tell."""
    told: list[Any] = []
    checkpoint = checkpoint_of(folder)
    if checkpoint is not None:
        run = next((place / _RUN for place in (folder, checkpoint.parent.parent) if (place / _RUN).is_file()), None)
        if run is not None:
            told.append(read_json(run))
        elif (checkpoint / "state.json").is_file():  # a checkpoint that was copied out of its run
            told.append(read_json(checkpoint / "state.json").get("identity"))
        base = Path(read_json(checkpoint / BASE)["folder"])
    else:
        base = folder
    if (base / _EXPORTED).is_file():
        told.append(read_json(base / _EXPORTED))
    while told:
        entry = told.pop()
        if isinstance(entry, dict):
            train = entry.get("train")
            if isinstance(train, dict) and "digest" in train:
                yield train
            elif isinstance(entry.get("data"), str):
                yield {"digest": entry["data"]}
            told.append(entry.get("before"))


def _pictures(record: Record, wanted: dict[int, list[Path]]) -> tuple[str, ...] | None:
    """Digests of a record's pictures; None when one of them has a size that no other has, or cannot be read."""
    names = []
    for image in record.images:
        try:
            path = inside(record.root, image, record.where)
            size = path.stat().st_size
        except (UserError, OSError):
            return None
        if size not in wanted:
            return None
        names.append(sha256_file(path))
    return tuple(names)


def shared_items(records: Sequence[Record], training: Sequence[Record]) -> int:
    """How many of `records` stand in `training` too: the same question about pictures with the same bytes."""

    def sizes(items: Sequence[Record]) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = {}
        for record in items:
            for image in record.images:
                path = record.root / image
                if path.is_file():
                    found.setdefault(path.stat().st_size, []).append(path)
        return found

    asked = {record.question() for record in records}
    alike = [record for record in training if record.question() in asked]
    here, there = sizes(records), sizes(alike)
    seen = set()
    for record in alike:
        if (names := _pictures(record, here)) is not None:
            seen.add((record.question(), names))
    return sum((record.question(), _pictures(record, there)) in seen for record in records)


def _told_by_card(data: Path) -> str | None:
    """Why dataset.json next to DATA makes any score on it a score on training items; None when it does not."""
    if not (data.parent / _CARD).is_file():
        return None
    card = read_json(data.parent / _CARD)
    if not isinstance(card, dict) or not (card.get("all") or card.get("scored_on_training_items")):
        return None
    files = card.get("files")
    if isinstance(files, dict) and files and data.name not in files:
        return None
    return say(
        "nothing was held out of this data set (dataset.json: prepared with --all)", "该数据集没有留出评测集（dataset.json：用 --all 准备）"
    )


def _training_items(file: Path) -> Corpus | None:
    """The items of a run's training file, a large one or an archive by its index; None where it is not there, or no longer right."""
    try:
        return open_corpus([SourceSpec(str(file))], "auto", lambda text: None) if file.is_file() else None
    except UserError:
        return None


def scored_on_training_items(folder: Path, data: Path, records: Sequence[Record]) -> tuple[bool | None, str]:
    """(true, false or null when unknown; the reason in words) for a model folder and the items it is scored on."""
    if why := _told_by_card(data):
        return True, why
    trainings = list(_trainings(folder))
    if not trainings:
        return None, say("the model's folder does not say what it was trained on", "模型目录没有说明它用什么数据训练过")
    checked = 0
    for train in trainings:
        if train["digest"] == data_digest(records):
            return True, say("these are the items the model was trained on (same digest)", "这些就是该模型的训练数据（摘要相同）")
        file = Path(train.get("file") or "")
        training = _training_items(file)
        if training is None or training.digest != train["digest"]:
            continue
        checked += 1
        if shared := shared_items(records, training):
            return True, say(
                f"{shared} of {len(records)} items are training items ({file})", f"{len(records)} 条中有 {shared} 条是训练数据（{file}）"
            )
    if checked < len(trainings):
        return None, say("other data than the model's training file, which is not there (or changed) to compare item by item",
                         "与模型的训练文件不同，但该文件已不在（或已改变），无法逐条比较")  # fmt: skip
    return False, say(
        "no item is one of the model's training items (question and pictures compared)", "没有一条是该模型的训练数据（比较了问题和图片）"
    )
