"""Every fault of a data set in one pass, each with its line and what to do about it.

Promises: no fault stops the search (of a line that is no record, only its first fault of form is told, and its pictures are
still looked at); nothing is changed. Cost: every distinct picture is decoded once; with a tokenizer, every item is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from intervale.core.errors import UserError, nearest
from intervale.core.files import inside, parse_json
from intervale.core.records import Record, parse_record
from intervale.data.formats import Fault, fault_of
from intervale.data.prompt import Prompt, Template, Tokenizer, encode_turns, turns_of
from intervale.data.split import Look, look_at, question_key, tag_value, tag_values
from intervale.data.stored import ARCHIVES
from intervale.data.tiling import Tiling

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line of a data file: its record (None if it is none), and its pictures by name (None: the path itself is a fault)."""

    where: str
    record: Record | None
    pictures: tuple[tuple[str, Path | None], ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Apart:
    """What several files provably do not share: pictures, questions without a picture, and tags.

    `tags` maps a tag to the number of its values in each file, `without` to the number of items that have none.
    """

    pictures: bool
    questions: bool
    tags: dict[str, dict[str, int]]
    without: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What a data set holds and what is wrong with it.

    `files` maps a file to its number of lines; `tokens` is (fewest, median, most) an item, None without a tokenizer or when
    no item could be counted; `apart` is None where there is one file only; `lines` and `looks` are what was read, for showing it.
    """

    files: dict[str, int]
    pictures: int
    with_choices: int
    tokens: tuple[int, int, int] | None
    faults: tuple[Fault, ...]
    apart: Apart | None
    lines: tuple[Line, ...]
    looks: dict[Path, Look]

    @property
    def items(self) -> int:
        """Lines of all files together."""
        return sum(self.files.values())


def _value(raw: bytes, where: str) -> Any:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line", "save the file as UTF-8") from error
    return parse_json(text, where)


def _pictures(names: Iterable[Any], root: Path, where: str) -> tuple[list[tuple[str, Path | None]], list[Fault]]:
    found: list[tuple[str, Path | None]] = []
    faults = []
    for name in names:
        if not isinstance(name, str):
            continue
        try:
            found.append((name, inside(root, name, where)))
        except UserError as error:
            faults.append(fault_of(error, where, "picture-path"))
            found.append((name, None))
    return found, faults


def _texts(record: Record, where: str) -> list[Fault]:
    """Faults of a record that only its content shows: an answer, a question or a choice without text, nothing to train on."""
    faults = []
    for number, message in enumerate(record.messages, 1):
        if not message.content.strip():
            kind = "empty-answer" if message.role == "assistant" else "empty-question"
            if message.role != "system":
                faults.append(Fault(where, kind, f"message {number} ({message.role}) is empty", "write the text, or remove the item"))
    if not any(message.role == "assistant" for message in record.messages):
        faults.append(
            Fault(where, "no-label", "there is no answer, so nothing would be trained", "add the assistant's turn, or remove the item")
        )
    empty = [str(number) for number, choice in enumerate(record.choices) if not choice.strip()]
    if empty:
        faults.append(Fault(where, "empty-choice", f"choice {', '.join(empty)} is empty", "write the choice, or remove the item"))
    return faults


def read_line(raw: bytes, where: str, root: Path, number: int) -> Line:
    """One line with all that can be said of it alone; `number` counts the lines that are not blank, from 1."""
    record, item = None, None
    faults: list[Fault] = []
    try:
        item = _value(raw, where)
        record = parse_record(item, where, root, number)
        faults += _texts(record, where)
    except UserError as error:
        faults.append(fault_of(error, where, "json" if item is None else "record"))
    names = record.images if record else (item.get("images") if isinstance(item, dict) else None)
    pictures, wrong = _pictures(names if isinstance(names, list | tuple) else (), root, where)
    return Line(where, record, tuple(pictures), (*faults, *wrong))


def read_data(path: Path) -> list[Line]:
    """Every line of a JSONL file that is not blank. Raises: UserError when the file cannot be read at all."""
    if path.is_dir():
        raise UserError(f"{path} is a folder", f"name the file, for example {path / 'train.jsonl'}")
    if path.suffix in ARCHIVES:
        raise UserError(
            f"{path}: an archive, not lines of text", "`intervale train RECIPE --dry-run` reads its index and stops at the first fault"
        )
    try:
        data = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error
    if data.lstrip()[:1] == b"[":
        raise UserError(
            f"{path}: a JSON list, not one item a line",
            f"`intervale prepare llava {path} OUT --image-root DIR` turns a LLaVA file into the one format (or `prepare messages`)",
        )
    lines: list[Line] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            lines.append(read_line(raw, f"{path}:{number}", path.parent, len(lines) + 1))
    return lines


def _repeated(lines: Sequence[Line]) -> list[Fault]:
    seen: dict[str, str] = {}
    faults = []
    for line in lines:
        if line.record is None:
            continue
        first = seen.setdefault(line.record.id, line.where)
        if first != line.where:
            what = f"the id {line.record.id!r} stands already at {first}"
            faults.append(Fault(line.where, "duplicate-id", what, "give every item an id of its own"))
    return faults


def _damaged(lines: Sequence[Line], looks: dict[Path, Look]) -> list[Fault]:
    faults = []
    for line in lines:
        for name, file in line.pictures:
            fault = looks[file].fault if file else None
            if fault:
                faults.append(Fault(line.where, "picture", f"{name}: {fault[0]}", fault[1]))
    return faults


def picture_looks(line: Line, looks: dict[Path, Look]) -> list[Look] | None:
    """The looks of a line's pictures, in order; None when one of them is unusable."""
    found = [looks[file] for _, file in line.pictures if file]
    return None if len(found) < len(line.pictures) or any(look.fault for look in found) else found


def prompt_of(record: Record, looks: Sequence[Look], tokenizer: Tokenizer, template: Template, tiling: Tiling) -> Prompt:
    """The item as the model will read it: ids and loss mask."""
    return encode_turns(turns_of(record.messages, [tiling.tokens_of(look.width, look.height) for look in looks]), template, tokenizer)


def _sizes(
    lines: Sequence[Line], looks: dict[Path, Look], tokenizer: Tokenizer, template: Template, tiling: Tiling, max_length: int | None
) -> tuple[list[int], list[Fault]]:
    """Tokens of every item that can be encoded, and the items that do not fit `max_length` or train nothing."""
    sizes, faults = [], []
    for line in lines:
        seen = picture_looks(line, looks)
        if line.record is None or seen is None:
            continue
        prompt = prompt_of(line.record, seen, tokenizer, template, tiling)
        total = len(prompt.ids_S)
        sizes.append(total)
        if max_length is not None and total > max_length:
            pictures = sum(tiling.tokens_of(look.width, look.height) for look in seen)
            what = f"needs {total:,} tokens ({pictures:,} of them for pictures); max_length is {max_length:,}"
            faults.append(
                Fault(line.where, "too-long", what, "raise max_length, lower max_tiles, or shorten the item; nothing is ever cut")
            )
        answered = any(message.role == "assistant" for message in line.record.messages)
        if answered and not prompt.trained_S.any():
            faults.append(Fault(line.where, "no-label", "no token of it would be trained", "give the item an answer with text"))
    return sizes, faults


def _overlaps(train: Sequence[Line], held_out: Sequence[Line], looks: dict[Path, Look]) -> list[Fault]:
    """Items of `held_out` that share a picture (bytes or pixels), or a question without a picture, with an item of `train`."""
    by_picture: dict[str, tuple[str, str]] = {}
    questions: dict[tuple[str, frozenset[str]], str] = {}

    def question(line: Line) -> tuple[str, frozenset[str]] | None:
        seen = picture_looks(line, looks)
        key = question_key(line.record) if line.record and seen is not None else ""
        return (key, frozenset(look.pixel_sha for look in seen or ())) if key else None

    for line in train:
        for _, file in line.pictures:
            if file and not looks[file].fault:
                by_picture.setdefault(looks[file].pixel_sha, (line.where, looks[file].file_sha))
        asked = question(line)
        if asked:
            questions.setdefault(asked, line.where)
    faults = []
    fix = "keep the item on one side only (`prepare` splits so); a score on it would be a score on training items"
    for line in held_out:
        asked = question(line)
        if asked and asked in questions:
            what = "the same question" + (" on the same picture" if asked[1] else "") + f" is trained on at {questions[asked]}"
            faults.append(Fault(line.where, "overlap-question", what, fix))
            continue
        for name, file in dict(line.pictures).items():
            shared = by_picture.get(looks[file].pixel_sha) if file and not looks[file].fault else None
            if shared and file:
                same = "the same file" if shared[1] == looks[file].file_sha else "the same picture, saved again,"
                faults.append(Fault(line.where, "overlap-picture", f"{name}: {same} is trained on at {shared[0]}", fix))
    return faults


def _records(lines: Sequence[Line]) -> list[Record]:
    return [line.record for line in lines if line.record]


def _refuse_absent(tag: str, data: dict[Path, list[Line]]) -> None:
    """Raise when a tag that was asked for cannot be compared: there is one file only, or no item of a file has it."""
    if len(data) < 2:
        raise UserError(
            f"{next(iter(data))}: one file alone; there is nothing {tag!r} could be apart from",
            "name a folder with train.jsonl and eval.jsonl, or another file with --against",
        )
    for path, lines in data.items():
        records = _records(lines)
        known = sorted({name for record in records for name in record.tags})
        if records and not tag_values(records, tag):
            raise UserError(
                f"{path}: no item has the tag {tag!r}{nearest(tag, known)}", f"its tags are: {', '.join(known) or 'none'}; name one of them"
            )


def _shared_tag(tag: str, train: Sequence[Line], held_out: Sequence[Line], path: Path) -> list[Fault]:
    """One fault a value of `tag` that stands in `held_out` and in `train` too, at the first item that has it."""
    known = tag_values(_records(train), tag)
    having: dict[str, list[Record]] = {}
    for record in _records(held_out):
        having.setdefault(tag_value(record, tag), []).append(record)
    faults = []
    for value in (value for value in having if value in known):
        first = having[value][0]
        what = f"the tag {tag!r} is {first.tags[tag]!r} ({len(having[value])} such in {path.name}), as at {known[value]}"
        faults.append(Fault(first.where, "overlap-tag", what, f"keep all items with one {tag!r} in one file"))
    return faults


def _apart(data: dict[Path, list[Line]], own: Sequence[Path], kept: Sequence[str], asked: Sequence[str]) -> tuple[list[Fault], Apart]:
    """What tags share across files, and which are apart: `kept` (the card's) between the files `own`, `asked` between all."""
    faults: list[Fault] = []
    tags: dict[str, dict[str, int]] = {}
    without: dict[str, int] = {}
    for tag in dict.fromkeys([*asked, *kept]):
        paths = list(data) if tag in asked else list(own)
        values = {str(path): len(tag_values(_records(data[path]), tag)) for path in paths}
        if not any(values.values()) and all(_records(data[path]) for path in paths):
            what = f"no item has the tag {tag!r}, which dataset.json says is kept apart"
            faults.append(Fault(str(paths[-1]), "overlap-tag", what, "run `prepare` again, or correct the card"))
        for position, path in enumerate(paths):
            earlier = [line for before in paths[:position] for line in data[before]]
            faults += (shared := _shared_tag(tag, earlier, data[path], path))
            if shared:
                values = {}
        if values and all(values.values()):
            tags[tag] = values
            without[tag] = sum(not tag_value(record, tag) for path in paths for record in _records(data[path]))
    return faults, Apart(True, True, tags, without)


def _proven(apart: Apart, faults: Sequence[Fault]) -> Apart:
    """Less what the faults leave open: a line that is no record, or a picture that cannot be read, may be anything."""
    kinds = {fault.kind for fault in faults}
    pictures = not kinds & {"json", "record", "picture", "picture-path", "overlap-picture", "overlap-question"}
    read = not kinds & {"json", "record"}
    return Apart(pictures, read and "overlap-question" not in kinds, apart.tags if read else {}, apart.without if read else {})


def check_files(
    train: Path,
    evaluation: Path | None = None,
    *,
    against: Path | None = None,
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
    tiling: Tiling | None = None,
    max_length: int | None = None,
    kept_apart: Sequence[str] = (),
    apart: Sequence[str] = (),
) -> Report:
    """Read a training file, and held-out files it must share nothing with, and report every fault.

    No file may share anything with one named before it: no value of a tag in `apart` either, and between `train` and
    `evaluation` none in `kept_apart`. With `tokenizer`, `template` and `tiling` (all three) every item is encoded and must
    fit `max_length` tokens. Raises: UserError when a file cannot be read at all or is named twice, or lacks a tag of `apart`.
    """
    paths = [path for path in (train, evaluation, against) if path is not None]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"{paths[-1]} would be compared with itself", "name another file")
    data = {path: read_data(path) for path in paths}
    for tag in apart:
        _refuse_absent(tag, data)
    looks = look_at(file for lines in data.values() for line in lines for _, file in line.pictures if file)
    faults: list[Fault] = []
    sizes: list[int] = []
    for path, lines in data.items():
        if not lines:
            faults.append(Fault(str(path), "empty", "no items", "a data set needs at least one line"))
        faults += [fault for line in lines for fault in line.faults] + _repeated(lines) + _damaged(lines, looks)
        if tokenizer and template and tiling:
            counted, wrong = _sizes(lines, looks, tokenizer, template, tiling, max_length)
            sizes += counted
            faults += wrong
    for position, path in enumerate(paths):
        earlier = [line for before in paths[:position] for line in data[before]]
        faults += _overlaps(earlier, data[path], looks)
    shared, proof = _apart(data, paths[:2] if evaluation else (), kept_apart if evaluation else (), apart)
    faults += shared
    every = tuple(line for lines in data.values() for line in lines)
    order = {line.where: number for number, line in enumerate(every)}
    return Report(
        files={str(path): len(lines) for path, lines in data.items()},
        pictures=len(looks),
        with_choices=sum(bool(line.record and line.record.choices) for line in every),
        tokens=(min(sizes), median_low(sizes), max(sizes)) if sizes else None,
        apart=_proven(proof, faults) if len(paths) > 1 else None,
        faults=tuple(sorted(faults, key=lambda fault: order.get(fault.where, -1))),
        lines=every,
        looks=looks,
    )
