"""An index finds what reading finds: the same items, the same faults, and is made again when the file changed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_plates
from intervale.core.errors import UserError
from intervale.core.records import Message, Record, read_records, to_json
from intervale.data import index as indexing
from intervale.data.index import open_index, row_values

GOOD = {"messages": [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": "酸"}], "images": ["a.png"]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks shorter than a line, so that every border of a line is met."""
    monkeypatch.setattr(indexing, "_CHUNK", 50)


def test_an_indexed_item_is_the_item_that_is_read(tmp_path: Path) -> None:
    path = draw_plates(tmp_path, 9)
    text = path.read_bytes().replace(b"\n", b"\r\n\n", 3)
    path.write_bytes(b"\xef\xbb\xbf" + text.rstrip())  # a byte-order mark, Windows line ends, blank lines, no end of line
    records = read_records(path)
    found = open_index(path, tmp_path / "cache")
    assert [found.read(number) for number in range(len(found))] == records
    assert [int(row["images"]) for row in found.rows] == [1] * 9
    assert [int(row["text"]) for row in found.rows] == [sum(len(m.content.encode()) for m in r.messages) for r in records]
    assert [int(row["answer"]) for row in found.rows] == [len(record.messages[1].content.encode()) for record in records]


def test_items_without_an_id_are_numbered_on_from_the_files_before(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(GOOD)] * 3))
    found = open_index(tmp_path / "d.jsonl", tmp_path / "cache")
    assert [found.read(number, 5).id for number in range(3)] == ["6", "7", "8"]


def test_the_digest_of_what_prepare_wrote_is_that_of_its_records(tmp_path: Path) -> None:
    from intervale.core.records import data_digest

    path = draw_plates(tmp_path, 4)
    assert open_index(path, tmp_path / "cache").digest == data_digest(read_records(path))


def _with(**changed: object) -> bytes:
    return json.dumps(GOOD | changed, ensure_ascii=False).encode()


FAULTS = [
    b"{",
    b'{"messages": 1}',
    b"[1]",
    b"\xff\xfe",
    _with(images=[]),
    _with(images=[1]),
    _with(other=1),
    _with(messages=[]),
    _with(messages=[{"role": "assistant", "content": "a"}], images=[]),
    _with(messages=[{"role": "user", "content": "a", "x": 1}], images=[]),
    _with(messages=[{"role": "system", "content": "<image>"}, {"role": "user", "content": "b"}]),
    _with(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}]),
    _with(choices=["a"], answer=1),
    _with(tags=[1]),
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
]


@pytest.mark.parametrize("line", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_told_with_its_line_as_reading_tells_it(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([_with(), b"", _with(), line, _with()]))
    with pytest.raises(UserError) as read:
        read_records(tmp_path / "d.jsonl")
    with pytest.raises(UserError) as scanned:
        open_index(tmp_path / "d.jsonl", tmp_path / "cache")
    assert str(tmp_path / "d.jsonl:4") in scanned.value.what
    if line != b"\xff\xfe":  # reading tells the byte, too
        assert scanned.value.what == read.value.what
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_unusual_but_right_lines_are_indexed_like_usual_ones() -> None:
    plain = row_values(_with(id="7"))
    assert row_values(_with(id=7)) == plain
    assert row_values(_with(id="7", choices=["酸", "b"], answer=0, tags={"a": "1e999"})) == plain
    system = [{"role": "system", "content": "s"}, *GOOD["messages"]]  # type: ignore[misc]
    assert row_values(_with(messages=system, id="7")) == (plain[0] + 1, *plain[1:])


def test_two_items_with_one_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([_with(id="x"), _with(id="y"), _with(id="x")]))
    with pytest.raises(UserError, match=r"d\.jsonl:3: the id 'x' stands already at .*d\.jsonl:1"):
        open_index(tmp_path / "d.jsonl", tmp_path / "cache")


def test_an_index_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(_with(id="1"))
    open_index(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_build", lambda *values: pytest.fail("made again"))
        assert open_index(path, tmp_path / "cache").read(0).id == "1"
    path.write_bytes(_with(id="2"))
    os.utime(path, ns=(1, 1))
    assert open_index(path, tmp_path / "cache").read(0).id == "2"
    (folder,) = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    (folder / "items.bin").write_bytes(b"half")  # damaged: made again, too
    assert open_index(path, tmp_path / "cache").read(0).id == "2"


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no items"):
        open_index(tmp_path / "d.jsonl", tmp_path / "cache")
    with pytest.raises(UserError, match="cannot be read"):
        open_index(tmp_path / "e.jsonl", tmp_path / "cache")


def test_scanning_over_several_cores_gives_the_rows_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [to_json(Record(f"n{n}", (Message("user", "?" * (n % 40)), Message("assistant", "a")))) for n in range(300)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    alone = np.array(open_index(tmp_path / "d.jsonl", tmp_path / "one").rows)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert np.array_equal(open_index(tmp_path / "d.jsonl", tmp_path / "two").rows, alone)
    assert [int(row["line"]) for row in alone] == list(range(1, 301))
