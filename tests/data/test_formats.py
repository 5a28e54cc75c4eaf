import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from intervale.core.errors import UserError
from intervale.core.records import read_records
from intervale.data.formats import Reading, pictures_first, read_llava, read_messages
from intervale.data.writer import write_dataset

OUT = {"fraction": 0.0, "seed": 0, "skip_bad": False, "about": {}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        Image.new("RGB", (8 + number, 8), (number * 80, 0, 0)).save(folder / name)
    return folder


def llava(root: Path, *items: Any, lines: bool = False) -> Reading:
    path = root.parent / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, items)) if lines else json.dumps(items), encoding="utf-8")
    return read_llava(path, root)


def messages(root: Path, *items: Any) -> Reading:
    path = root.parent / "data.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return read_messages(path, root)


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def contents(reading: Reading) -> list[list[str]]:
    assert reading.faults == ()
    return [[message.content for message in sample.record.messages] for sample in reading.samples]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Q\n<image>", "<image>\nQ"),
        ("<image>\nQ", "<image>\nQ"),
        ("<image>Q<image>", "<image>\n<image>\nQ"),
        ("<image>\n\n<image>", "<image>\n<image>"),
        ("Image-1: <image>\nImage-2: <image>\nQ", "Image-1: <image>\nImage-2: <image>\nQ"),
        ("See <image> here", "See <image> here"),
        (" plain ", " plain "),
    ],
)
def test_pictures_come_first_unless_the_text_refers_to_them(text: str, wanted: str) -> None:
    assert pictures_first(text) == wanted


def test_the_tutorials_file_reads(root: Path) -> None:
    reading = llava(root, {"id": 0, "image": "a.png", "conversations": talk("Q\n<image>", "A")})
    assert contents(reading) == [["<image>\nQ", "A"]]
    assert reading.samples[0].record.images == ("images/a.png",)
    assert reading.samples[0].record.id == "0"


def test_llava_variants_read(root: Path) -> None:
    reading = llava(
        root,
        {"image": ["a.png", "sub/c.png"], "conversations": talk("<image><image>Q", "A", "more", "B")},
        {"conversations": talk("hello", "hi")},
        {"image": None, "conversations": talk("hello", "hi")},
        {"image": str(root / "b.png"), "conversations": [{"role": "system", "content": "S"}, *talk("no mark", "A")]},
        lines=True,
    )
    assert contents(reading) == [
        ["<image>\n<image>\nQ", "A", "more", "B"],
        ["hello", "hi"],
        ["hello", "hi"],
        ["S", "<image>\nno mark", "A"],
    ]
    assert [sample.record.images for sample in reading.samples] == [("images/a.png", "images/sub/c.png"), (), (), ("images/b.png",)]


def test_every_faulty_llava_item_is_named(root: Path) -> None:
    good = {"image": "a.png", "conversations": talk("Q", "A")}
    reading = llava(
        root,
        {**good, "image": ["a.png", "b.png"], "conversations": talk("<image>", "A")},
        {**good, "image": "../a.png"},
        {**good, "image": "http://host/a.png"},
        {**good, "image": "/etc/passwd"},
        {**good, "conversations": talk("Q")},
        {**good, "conversations": talk("Q", " ")},
        {**good, "conversations": [{"from": "humn", "value": "Q"}]},
        {**good, "conversations": talk("Q", "A <image>")},
        {**good, "conversations": [*talk("Q", "A"), {"from": "gpt", "value": "A"}]},
        {**good, "video": "v.mp4"},
        {**good, "id": "x"},
        {**good, "id": "x"},
        "text",
        good,
    )
    said = [fault.what for fault in reading.faults]
    parts = [
        "1 <image> marks but 2 images", "out of", "is not a file", "not below", "there is no answer", "an answer is empty", "did you mean 'human'",
        "outside a user turn", "where 'user' must speak", "'video' is not supported", "'x' stands already", "must be a JSON object",
    ]  # fmt: skip
    assert len(said) == len(parts)
    for part, what in zip(parts, said, strict=True):
        assert part in what
    assert [sample.record.id for sample in reading.samples] == ["x", "14"]
    assert all(fault.where.startswith(str(root.parent / "data.json")) for fault in reading.faults)


def test_unknown_keys_are_counted(root: Path) -> None:
    reading = llava(root, {"conversations": talk("Q", "A"), "length": 7}, {"conversations": talk("Q", "A"), "length": 8})
    assert reading.counts == {"ignored key 'length'": 2}


def test_a_bad_line_does_not_hide_the_others(root: Path) -> None:
    path = root.parent / "data.jsonl"
    path.write_text('{"conversations": \n' + json.dumps({"conversations": talk("Q", "A")}) + "\n{]\n", encoding="utf-8")
    reading = read_llava(path, root)
    assert [fault.where for fault in reading.faults] == [f"{path}:1", f"{path}:3"]
    assert len(reading.samples) == 1


def test_a_meta_file_is_refused(root: Path) -> None:
    path = root.parent / "meta.json"
    path.write_text(json.dumps({"set": {"root": "x", "annotation": "y.jsonl"}}), encoding="utf-8")
    with pytest.raises(UserError, match="not a list of items"):
        read_llava(path, root)


def test_messages_with_images_read(root: Path) -> None:
    turns = [{"role": "user", "content": "Q<image>"}, {"role": "assistant", "content": "A"}]
    reading = messages(root, {"messages": turns, "images": ["a.png"]}, {"messages": turns, "images": [{"path": "b.png", "bytes": None}]})
    assert contents(reading) == [["<image>\nQ", "A"]] * 2
    assert reading.samples[1].files == ((root / "b.png").resolve(),)


def test_openai_parts_read_in_their_order(root: Path) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "sub/c.png", "detail": "high"}},
        {"type": "image", "image": (root / "a.png").as_uri()},
        {"type": "text", "text": "Which?"},
    ]
    reading = messages(
        root, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]}
    )
    assert contents(reading) == [["<image>\n<image>\nWhich?", "A"]]
    assert reading.samples[0].record.images == ("images/sub/c.png", "images/a.png")
    bare = [{"type": "text", "text": "Q"}, {"type": "image"}]
    answered = [{"role": "user", "content": bare}, {"role": "assistant", "content": "A"}]
    assert contents(messages(root, {"messages": answered, "images": ["b.png"]})) == [["<image>\nQ", "A"]]


def test_openai_parts_that_are_no_local_picture_are_faults(root: Path) -> None:
    def asked(part: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]}

    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    reading = messages(root, asked(data), asked({"type": "input_audio"}), asked({"type": "image"}))
    said = [fault.what for fault in reading.faults]
    for part, what in zip(("is not a file", "'input_audio' is not supported", "must be a path"), said, strict=True):
        assert part in what


def test_our_own_record_passes_through_unchanged(root: Path, tmp_path: Path) -> None:
    source = {
        "messages": [{"role": "user", "content": "图A: <image>\n图B: <image>\nQ"}, {"role": "assistant", "content": "图B"}],
        "images": ["a.png", "b.png"], "id": "one", "choices": ["图A", "图B"], "answer": 1, "tags": {"question_type": "t"},
    }  # fmt: skip
    write_dataset(messages(root, source), tmp_path / "first", **OUT)
    write_dataset(read_messages(tmp_path / "first" / "train.jsonl", tmp_path / "first"), tmp_path / "second", **OUT)
    first, second = ((tmp_path / name / "train.jsonl").read_text(encoding="utf-8") for name in ("first", "second"))
    assert first == second
    assert json.loads(first) == {**source, "images": ["images/a.png", "images/b.png"]}
    assert read_records(tmp_path / "second" / "train.jsonl")[0].answer == 1


def test_two_pictures_never_become_one(root: Path, tmp_path: Path) -> None:
    (root / "images").mkdir()
    Image.new("RGB", (9, 9)).save(root / "images" / "a.png")
    reading = llava(root, {"image": ["a.png", "images/a.png"], "conversations": talk("Q", "A")})
    with pytest.raises(UserError, match=r"would both become images/a\.png"):
        write_dataset(reading, tmp_path / "out", **OUT)
    assert not (tmp_path / "out").exists()
