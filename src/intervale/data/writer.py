"""A data set folder from samples: train.jsonl, eval.jsonl, images/, and dataset.json, its card. Complete or absent.

Promises: every picture is decoded once before anything is written; all faults are told together; picture files are copied
byte by byte; the same input and seed give the same files; no picture is on both sides, whoever divided them. Cost: one decode
and one copy a picture.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import need_space, refuse_existing, sha256_file, staged_folder, write_atomic, write_json
from intervale.core.records import data_digest, to_json
from intervale.data.formats import Fault, Reading, Sample
from intervale.data.split import Look, divide, groups_of, look_at, tag_value, tags_apart, ties_of

LISTED = 20  # faults shown in one error
_NAMED = 3  # groups, and ids of each side, that are named where the source's split is refused
_COUNTED = ("question_type", "cuisine", "artist")
SET_ASIDE = "items that the source holds out, now in train.jsonl"


def _usable(reading: Reading, looks: dict[Path, Look]) -> tuple[list[Sample], list[Fault]]:
    """The samples whose pictures all decode, and every fault of the reading and of the pictures."""
    good, faults = [], list(reading.faults)
    for sample in reading.samples:
        bad = [(name, looks[file].fault) for name, file in zip(sample.record.images, sample.files, strict=True) if looks[file].fault]
        faults += [Fault(sample.record.where, "picture", f"{name}: {fault[0]}", fault[1]) for name, fault in bad if fault]
        if not bad:
            good.append(sample)
    return good, faults


def refuse_faults(faults: Sequence[Fault], source: Path) -> None:
    """Raise one UserError that lists the faults (the first 20) and counts them all."""
    places = len({fault.where for fault in faults})
    faults = sorted(faults, key=lambda fault: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", fault.where)])
    lines = [f"  {fault.where.removeprefix(f'{source}: ')}: {fault.what} -> {fault.fix}" for fault in faults[:LISTED]]
    more = [f"  ... and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
    raise UserError(
        "\n".join([f"{source}: {places} faulty item{'s' * (places != 1)}; nothing was written", *lines, *more]),
        "correct them, or leave them out with --skip-bad (each is then listed in skipped.jsonl)",
    )


def _places(samples: Sequence[Sample]) -> dict[str, Path]:
    """Name under the output folder -> source file. Raises: UserError when two files want one name."""
    places: dict[str, Path] = {}
    for sample in samples:
        for name, file in zip(sample.record.images, sample.files, strict=True):
            if places.setdefault(name, file) != file:
                raise UserError(
                    f"{sample.record.where}: {file} and {places[name]} would both become {name}",
                    "rename one of the pictures, or the folder 'images' below the image folder",
                )
    return places


def _part_facts(path: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "items": len(samples),
        "pictures": len({name for sample in samples for name in sample.record.images}),
        "sha256": sha256_file(path),
        "data_digest": data_digest(sample.record for sample in samples),
    }
    for tag in _COUNTED:
        counts = Counter(sample.record.tags[tag] for sample in samples if tag in sample.record.tags)
        if counts:
            facts[tag] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    return facts


def _drawn(samples: list[Sample], looks: dict[Path, Look], fraction: float, seed: int) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """The samples of each file and how they were divided: whole tied groups, in an order drawn from the seed."""
    ties = [ties_of(sample.record, [looks[file] for file in sample.files]) for sample in samples]
    division = divide([sample.record.id for sample in samples], ties, fraction, seed)
    train, held_out = [samples[i] for i in division.train], [samples[i] for i in division.held_out]
    facts = {
        "by": "drawn",
        "kept_apart": ["food_name"] if any(tag_value(sample.record, "food_name") for sample in samples) else [],
        "on_both_sides": tags_apart([s.record for s in train], [s.record for s in held_out])[1],
        "eval_fraction_asked": fraction,
        "eval_fraction": round(len(held_out) / len(samples), 4),
        "tied_groups": division.groups,
        "largest_group": division.largest,
    }
    return {"train.jsonl": train, "eval.jsonl": held_out}, facts


def _refuse_torn(samples: list[Sample], looks: dict[Path, Look], source: Path) -> None:
    """Raise when a picture, or a question without one, stands on both sides of the source's own split."""
    ties = [ties_of(sample.record, [looks[file] for file in sample.files], dishes=False) for sample in samples]
    torn = [group for group in groups_of(ties) if len({samples[i].side for i in group}) > 1]
    if not torn:
        return
    lines = []
    for group in torn[:_NAMED]:
        sides = []
        for side, name in (("train", "train"), ("eval", "held out")):
            ids = [samples[i].record.id for i in group if samples[i].side == side]
            sides.append(f"{', '.join(ids[:_NAMED])}{f' and {len(ids) - _NAMED} more' * (len(ids) > _NAMED)} ({name})")
        lines.append("  " + " and ".join(sides))
    more = [f"  ... and {len(torn) - _NAMED} more"] if len(torn) > _NAMED else []
    what = f"{source}: its own split has the same picture, or the same question without a picture, on both sides"
    raise UserError(
        "\n".join([f"{what} ({len(torn)} time{'s' * (len(torn) != 1)}); nothing was written", *lines, *more]),
        "correct 'split' so that these items are on one side, or remove the key from every item to have a split drawn",
    )


def _own(samples: list[Sample], looks: dict[Path, Look], source: Path) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """The samples of each file as the source's own split has them, once it is found to keep pictures apart."""
    train, held_out = ([sample for sample in samples if sample.side == side] for side in ("train", "eval"))
    if not train or not held_out:
        raise UserError(
            f"{source}: its own split has one side only: all {len(samples)} items are {'to train on' if train else 'held out'}",
            "mark items of the other side with 'split', or keep everything for training (--all, or --eval-fraction 0)",
        )
    _refuse_torn(samples, looks, source)
    apart, shared = tags_apart([s.record for s in train], [s.record for s in held_out])
    facts = {"by": "source", "kept_apart": apart, "on_both_sides": shared, "eval_fraction": round(len(held_out) / len(samples), 4)}
    return {"train.jsonl": train, "eval.jsonl": held_out}, facts


def _parts(
    samples: list[Sample], looks: dict[Path, Look], fraction: float | None, otherwise: float, seed: int, source: Path
) -> tuple[dict[str, list[Sample]], dict[str, Any] | None]:
    """The samples of each file, and how they were divided (None: they were not). Raises: UserError for a split that is none."""
    if fraction == 0:
        return {"train.jsonl": samples}, None
    without = {sample.record.where: None for sample in samples if sample.side is None}
    marked = len({sample.record.where for sample in samples}) - len(without)
    if marked and without:
        raise UserError(
            f"{source}: {marked} items have a 'split' and {len(without)} have none (first: {next(iter(without)).removeprefix(f'{source}: ')})",
            "give every item its 'split', or remove the key from every item to have a split drawn",
        )
    if marked and fraction is not None:
        raise UserError(
            f"{source}: the items have a split of their own ('split'), which --eval-fraction {fraction:g} would replace",
            "leave --eval-fraction out to keep the source's split, or remove the key from every item to have one drawn",
        )
    if marked:
        return _own(samples, looks, source)
    share = otherwise if fraction is None else fraction
    return _drawn(samples, looks, share, seed) if share else ({"train.jsonl": samples}, None)


def write_dataset(
    reading: Reading, out: Path, *, fraction: float | None, seed: int, skip_bad: bool, about: dict[str, Any], otherwise: float = 0.0
) -> dict[str, Any]:
    """Write the samples to the new folder `out` and return its card (`about` and what was counted).

    `fraction` of the items (0..1) is held out in eval.jsonl; 0 writes train.jsonl alone, and the card says that any score on
    these items is one on training items; None takes the source's own split, or `otherwise` as the fraction where it has none.
    Raises: UserError for faults (unless `skip_bad`), an impossible division, no item left, an existing `out`, a full disk;
    nothing is written then.
    """
    refuse_existing(out)
    looks = look_at(file for sample in reading.samples for file in sample.files)
    samples, faults = _usable(reading, looks)
    if faults and not skip_bad:
        refuse_faults(faults, reading.source)
    if not samples:
        raise UserError(
            f"{reading.source}: no usable item is left of {len({fault.where for fault in faults})}",
            "run without --skip-bad to see the faults",
        )
    parts, split = _parts(samples, looks, fraction, otherwise, seed, reading.source)
    set_aside = 0 if split else sum(sample.side == "eval" for sample in samples)
    places = _places(samples)
    need_space(out, sum(looks[file].size for file in places.values()))
    with staged_folder(out) as folder:
        for name, file in places.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for name, part in parts.items():
            write_atomic(folder / name, "".join(to_json(sample.record) + "\n" for sample in part))
        if faults:
            write_atomic(folder / "skipped.jsonl", "".join(json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults))
        card = {
            **about,
            "source_sha256": sha256_file(reading.source),
            "seed": None if split and split["by"] == "source" else seed,
            "all": split is None,
            "scored_on_training_items": split is None,
            "split": split,
            "files": {name: _part_facts(folder / name, part) for name, part in parts.items()},
            "skipped": len({fault.where for fault in faults}),
            "counts": {**reading.counts, **({SET_ASIDE: set_aside} if set_aside else {})},
        }
        write_json(folder / "dataset.json", card)
    return card
