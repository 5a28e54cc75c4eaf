"""Which model was scored, and whether it has seen the items before. Reads small JSON files and headers; no weights.

A score on training items shows that the training worked, not that the model is good, so every summary and report says which
one it is: true, false, or null when nothing tells. Cost: milliseconds; where the training file is at hand, `contamination`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import read_json
from intervale.core.records import Record, data_digest, read_records
from intervale.data.corpus import file_digest, reads_whole
from intervale.evaluate.contamination import contamination
from intervale.evaluate.maker import told_by_maker
from intervale.evaluate.seen import in_words
from intervale.model.adapt import BASE, base_folder, checkpoint_fingerprint, checkpoint_of
from intervale.model.source import fingerprint

Tell = Callable[[str], None]
_CARD, _EXPORTED, _RUN = "dataset.json", "intervale.json", "run.json"


def model_identity(folder: Path) -> dict[str, Any]:
    """{fingerprint, checkpoint, checkpoint_fingerprint} of a model, run or checkpoint; the last two None for a plain model.

    The fingerprints look at sizes and at the ends of the weight files, as `model.source.fingerprint` does.
    """
    checkpoint = checkpoint_of(folder)
    return {
        "fingerprint": fingerprint(base_folder(folder)),
        "checkpoint": checkpoint.name if checkpoint else None,
        "checkpoint_fingerprint": checkpoint_fingerprint(checkpoint) if checkpoint else None,
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


def _told_by_card(data: Path) -> bool:
    """Does dataset.json next to DATA make any score on it a score on training items?"""
    if not (data.parent / _CARD).is_file():
        return False
    card = read_json(data.parent / _CARD)
    if not isinstance(card, dict) or not (card.get("all") or card.get("scored_on_training_items")):
        return False
    files = card.get("files")
    return not (isinstance(files, dict) and files and data.name not in files)


def seen_in_training(folder: Path, data: Path, records: Sequence[Record], tell: Tell = lambda _: None) -> dict[str, Any]:
    """Whether a model folder has been trained on the items it is scored on, as plain values; `seen.in_words` says them.

    {verdict: true, false or null when unknown; code: card, digest, items, none, gone, unknown, or one of `maker`; files: what was
    compared; base, with the code none: what the maker of the base model says, or unknown}. A file is {file, digest, items, compared}
    and, where it was compared, the counts of `contamination`. The first finding does not end the search: every training file that is
    still there is compared, but for one whose digest is the data's own.
    """
    trainings = list(_trainings(folder))
    card, digest = _told_by_card(data), data_digest(records)
    files = [_compared(train, digest, records, tell) for train in trainings]
    if card:
        return {"verdict": True, "code": "card", "files": files}
    if any(file["digest"] == digest for file in files):
        return {"verdict": True, "code": "digest", "files": files}
    if any(file.get("exact", 0) + file.get("near", 0) for file in files):
        return {"verdict": True, "code": "items", "files": files}
    by_maker = told_by_maker(base_folder(folder), _bottom(folder), records)
    if all(file["compared"] for file in files) and files:
        return {"verdict": False, "code": "none", "files": files, "base": by_maker or "unknown"}
    if by_maker is not None and not files:
        return {"verdict": False if by_maker == "apart" else None, "code": by_maker, "files": files}
    return {"verdict": None, "code": "gone" if files else "unknown", "files": files}


def _bottom(folder: Path) -> str | None:
    """The fingerprint of the model under every run and export that led to this folder; None when nothing tells."""
    try:
        base: str | None = hashes(folder, {"digest": None})["base"]
    except (UserError, OSError):
        return None
    return base


def _compared(train: dict[str, Any], digest: str, records: Sequence[Record], tell: Tell) -> dict[str, Any]:
    told = {"file": train.get("file"), "digest": train["digest"], "items": train.get("items"), "compared": False}
    if train["digest"] == digest:
        return told
    file = Path(train.get("file") or "")
    try:
        training = read_records(file) if reads_whole([file]) and file.is_file() else []  # millions of items, or an archive: not compared
    except UserError:
        training = []
    if not training or train["digest"] not in (data_digest(training), file_digest(file)):  # read, or indexed
        return told
    found = contamination(records, training, tell)
    return {**told, **found, "items": len(training), "compared": True}


def scored_on_training_items(folder: Path, data: Path, records: Sequence[Record]) -> tuple[bool | None, str]:
    """(true, false or null when unknown; the reason in the user's language) for a model folder and the items it is scored on."""
    told = seen_in_training(folder, data, records)
    return told["verdict"], in_words(told, len(records))


def hashes(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """{base, adapter, merged, data, pictures}: fingerprints of the weights a score is of, and digests of what it was scored on.

    A run or checkpoint: its base and its own tensors. A folder `export` wrote: what it says it was made from, and itself as merged.
    Any other model is its own base.
    """
    identity = model_identity(folder)
    base, adapter, merged = identity["fingerprint"], identity["checkpoint_fingerprint"], None
    if adapter is None and (folder / _EXPORTED).is_file():
        card = read_json(folder / _EXPORTED)
        merged = base
        while isinstance(card, dict):
            base, adapter = (card.get("base") or {}).get("fingerprint"), adapter or card.get("checkpoint_fingerprint")
            card = card.get("before")
    return {"base": base, "adapter": adapter, "merged": merged, "data": data["digest"], "pictures": data.get("pictures")}


def about(folder: Path | None, data: Path, records: Sequence[Record], facts: dict[str, Any], tell: Tell = lambda _: None) -> dict[str, Any]:
    """What every summary says of where its score comes from: {hashes, seeds, scored_on_training_items (and its reason), seen}.

    `folder`: the model's; None for one behind an address, of which nothing is known. `facts`: the data's {digest, pictures}.
    """
    if folder is None:
        own = {"base": None, "adapter": None, "merged": None, "data": facts["digest"], "pictures": facts.get("pictures")}
        seen: dict[str, Any] = {
            "verdict": True if _told_by_card(data) else None,
            "code": "card" if _told_by_card(data) else "endpoint",
            "files": [],
        }
    else:
        own, seen = hashes(folder, facts), seen_in_training(folder, data, records, tell)
    return {
        "hashes": own,
        "seeds": {"training": training_seed(folder) if folder else None, "evaluation": None},  # greedy: nothing is drawn at random
        "scored_on_training_items": seen["verdict"],
        "scored_on_training_items_reason": in_words(seen, len(records)),
        "seen": seen,
    }


def training_seed(folder: Path) -> int | None:
    """The seed of the run that made a run's, checkpoint's or exported folder's weights; None when none is on file."""
    checkpoint = checkpoint_of(folder)
    try:
        if checkpoint is not None:
            told = read_json(checkpoint / "state.json")["identity"]
        else:
            told = read_json(folder / _EXPORTED) if (folder / _EXPORTED).is_file() else {}
        while isinstance(told.get("before"), dict) and "recipe" not in told:
            told = told["before"]
        seed = told["recipe"]["train"]["seed"]
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    return seed if isinstance(seed, int) else None
