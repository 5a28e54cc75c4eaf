import json
from pathlib import Path

import pytest

from intervale.core.errors import UserError
from intervale.core.records import parse_record, read_records, to_json

GOOD = {
    "messages": [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}],
    "images": ["a.jpg"],
    "id": "1",
    "choices": ["a", "b"],
    "answer": 0,
    "tags": {"k": "v"},
}


def test_round_trip_keeps_every_field() -> None:
    record = parse_record(GOOD, "f:1", Path())
    assert json.loads(to_json(record)) == GOOD
    assert record.question() == "q"
    assert record.reference() == "a"
    assert len(record.prompt()) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image": ["a.jpg"]}, "did you mean 'images'"),
        ({"messages": []}, "non-empty"),
        ({"messages": [{"role": "human", "content": "q"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "'user' must speak"),
        ({"images": []}, "1 <image> marks but 0 images"),
        ({"images": "a.jpg"}, "list of paths"),
        ({"answer": 2}, "there are 2 choices"),
        ({"answer": "0"}, "there are 2 choices"),
        ({"answer": True}, "there are 2 choices"),
        ({"choices": "ab"}, "list of texts"),
        ({"tags": ["a"]}, "object"),
        ({"choices": ["\ud800", "b"]}, "surrogate"),
    ],
)
def test_each_fault_is_named(change: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=f"f:1.*{why}"):
        parse_record(GOOD | change, "f:1", Path())


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    line = json.dumps(GOOD)
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n")
    with pytest.raises(UserError, match=r"d\.jsonl:3.*already at .*d\.jsonl:1"):
        read_records(tmp_path / "d.jsonl")


def test_bom_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_records(tmp_path / "d.jsonl")[0].id == "1"
