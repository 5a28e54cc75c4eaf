import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from intervale.core.errors import UserError
from intervale.core.records import read_records
from intervale.data.check import Report, check_files
from intervale.data.prompt import TEMPLATES
from intervale.data.tiling import Tiling


class Letters:
    """A tokenizer of one id a character."""

    add_bos = True

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def control(self, token: str) -> int:
        return 2_000_000 + len(token)

    def eats_space(self, token: str) -> bool:
        return False


def item(name: str, question: str = "Q", said: str = "A", images: tuple[str, ...] = ("a.png",), **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "<image>\n" * len(images) + question}, {"role": "assistant", "content": said}]
    return {"id": name, "messages": messages, "images": list(images), **more}


def save(path: Path, *items: Any) -> Path:
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry, ensure_ascii=False).encode() for entry in items]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def found(report: Report) -> list[tuple[str, str]]:
    return [(Path(fault.where).name, fault.kind) for fault in report.faults]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "data"
    home.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (30 + number, 20), (number * 80, 10, 10)).save(home / name)
    Image.new("RGB", (30, 20)).save(tmp_path / "outside.png")
    return home


def test_a_good_file_has_no_faults(folder: Path) -> None:
    path = save(folder / "train.jsonl", item("1"), item("2", images=()), item("3", images=("a.png", "b.png"), choices=["A", "B"], answer=0))
    report = check_files(path)
    assert report.faults == ()
    assert (report.items, report.pictures, report.with_choices, report.tokens) == (3, 2, 1, None)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(item(name)).encode() for name in "12") + b"\r\n\r\n")
    assert check_files(path).faults == ()
    assert len(read_records(path)) == 2


def test_every_fault_is_found_in_one_pass(folder: Path) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-30])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"hello")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    backwards = {"id": "r", "messages": [{"role": "assistant", "content": "A"}], "images": []}
    unanswered = {"id": "u", "messages": [{"role": "user", "content": "Q"}], "images": []}
    path = save(
        folder / "train.jsonl",
        item("1"),
        b'{"messages": [',
        b'{"id": "\xff"}',
        item("2", extra=1),
        item("3", images=("gone.png",)),
        item("4", images=("cut.png", "empty.png")),
        item("5", images=("text.png",)),
        item("6", images=("../outside.png",)),
        item("7", images=("/etc/passwd",)),
        item("8", images=("link.png",)),
        item("9", images=("folder.png",)),
        item("10", images=("pipe.png",)),
        item("11", images=(), question="<image> Q"),
        item("12", said=" \n"),
        backwards,
        unanswered,
        item("1"),
        item("13", choices=["A"], answer=1),
        item("14", choices=["A", " "], answer=0),
        item("15", question="", images=()),
        b"[1]",
        {**item("16", images=("gone.png",)), "mesages": []},
        b'{"id": 1, "id": 2}',
        b'{"id": "\x1b", "messages": NaN}',
    )
    assert found(check_files(path)) == [
        ("train.jsonl:2", "json"),
        ("train.jsonl:3", "json"),
        ("train.jsonl:4", "record"),
        ("train.jsonl:5", "picture"),
        ("train.jsonl:6", "picture"),
        ("train.jsonl:6", "picture"),
        ("train.jsonl:7", "picture"),
        ("train.jsonl:8", "picture-path"),
        ("train.jsonl:9", "picture-path"),
        ("train.jsonl:10", "picture-path"),
        ("train.jsonl:11", "picture"),
        ("train.jsonl:12", "picture"),
        ("train.jsonl:13", "record"),
        ("train.jsonl:14", "empty-answer"),
        ("train.jsonl:15", "record"),
        ("train.jsonl:16", "no-label"),
        ("train.jsonl:17", "duplicate-id"),
        ("train.jsonl:18", "record"),
        ("train.jsonl:19", "empty-choice"),
        ("train.jsonl:20", "empty-question"),
        ("train.jsonl:21", "record"),
        ("train.jsonl:22", "record"),
        ("train.jsonl:22", "picture"),
        ("train.jsonl:23", "json"),
        ("train.jsonl:24", "json"),
    ]


def test_every_fault_says_what_to_do(folder: Path) -> None:
    path = save(folder / "train.jsonl", item("1", images=("gone.png",)), b"{", item("2", images=("../outside.png",)))
    for fault in check_files(path).faults:
        assert fault.fix
        assert not fault.what.startswith(str(path))


def test_a_picture_over_the_limit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_MAX_PIXELS", "100")
    report = check_files(save(folder / "train.jsonl", item("1")))
    assert "30x20 is 600 pixels; the limit is 100" in report.faults[0].what


def test_a_file_without_items_is_a_fault(folder: Path) -> None:
    assert found(check_files(save(folder / "train.jsonl"))) == [("train.jsonl", "empty")]


def test_a_file_that_cannot_be_read_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        check_files(folder / "gone.jsonl")
    path = save(folder / "train.jsonl", item("1"))
    with pytest.raises(UserError, match="compared with itself"):
        check_files(path, against=folder / ".." / "data" / "train.jsonl")


def test_overlap_is_found_by_bytes_by_pixels_and_by_question(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    Image.open(folder / "b.png").save(folder / "again.bmp")
    train = save(folder / "train.jsonl", item("1"), item("2", "P", images=("b.png",)), item("3", "Where is it from?", images=()))
    held_out = save(
        folder / "eval.jsonl",
        item("1", "another", images=("copy.png",)),
        item("2", "another", images=("again.bmp",)),
        item("3", "q ！", images=("copy.png",)),
        item("4", "where is  it from", images=()),
        item("5", "Where is it from?", images=("c.png",)),
    )
    report = check_files(train, held_out)
    assert found(report) == [
        ("eval.jsonl:1", "overlap-picture"),
        ("eval.jsonl:2", "overlap-picture"),
        ("eval.jsonl:3", "overlap-question"),
        ("eval.jsonl:4", "overlap-question"),
    ]
    assert "the same file" in report.faults[0].what
    assert "saved again" in report.faults[1].what
    assert f"{train}:1" in report.faults[2].what
    assert report.faults[2].what.startswith("the same question on the same picture")
    assert found(check_files(train, against=held_out)) == found(report)


def test_items_that_do_not_fit_are_found_with_a_tokenizer(folder: Path) -> None:
    path = save(folder / "train.jsonl", item("1"), item("2", "long " * 100), item("3", images=("a.png", "b.png")))
    sides: dict[str, Any] = {
        "tokenizer": Letters(),
        "template": TEMPLATES["internvl2_5"],
        "tiling": Tiling(max_tiles=1, tokens_per_tile=256),
    }
    free = check_files(path, **sides)
    assert free.tokens is not None
    assert free.faults == ()
    fewest, _, most = free.tokens
    assert most - fewest > 256
    tight = check_files(path, **sides, max_length=fewest)
    assert found(tight) == [("train.jsonl:2", "too-long"), ("train.jsonl:3", "too-long")]
    assert "512 of them for pictures" in tight.faults[1].what
    assert check_files(path, **sides, max_length=most).faults == ()


def test_an_archive_is_told_and_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=r"shard\.tar: an archive, not lines of text"):
        check_files(tmp_path / "shard.tar", None)
