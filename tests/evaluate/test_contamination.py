"""What training has taught is found under another name, size or quality, and nothing else is."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from conftest import SHARED
from intervale.core.records import Message, Record
from intervale.data.images import load_picture
from intervale.evaluate.contamination import alike, contamination, families, look_of


def drawn(path: Path, seed: int, size: tuple[int, int] = (240, 180), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (240, 180), "white")
    pen = ImageDraw.Draw(picture)
    for n in range(4):
        left, top = (seed * 37 + n * 53) % 160, (seed * 61 + n * 29) % 110
        pen.ellipse([left, top, left + 40 + 9 * n, top + 50], fill=colour, outline="black")
    picture.resize(size).save(path)
    return path


def item(root: Path, name: str, image: str | None, question: str = "What is it?") -> Record:
    mark = "<image>\n" if image else ""
    return Record(
        name, (Message("user", mark + question), Message("assistant", "x")), (image,) if image else (), where=f"d.jsonl:{name}", root=root
    )


def counts(records: list[Record], training: list[Record]) -> dict[str, int]:
    found = contamination(records, training)
    return {key: found[key] for key in ("exact", "near", "picture", "question") if found[key]}


def test_the_same_question_about_the_same_bytes_is_exact_whatever_the_file_is_called(tmp_path: Path) -> None:
    drawn(tmp_path / "t" / "a.png", 1)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "other.png").write_bytes((tmp_path / "t" / "a.png").read_bytes())
    training = [item(tmp_path / "t", "7", "a.png", "What is it?")]
    assert counts([item(tmp_path / "e", "1", "other.png", "  WHAT is it ？")], training) == {"exact": 1}
    assert counts([item(tmp_path / "e", "1", "other.png", "How hot?")], training) == {"picture": 1}
    found = contamination([item(tmp_path / "e", "1", "other.png")], training)
    assert found["examples"] == [{"id": "1", "how": "exact", "training": "d.jsonl:7"}]


@pytest.mark.parametrize("change", ["jpeg", "half", "darker", "webp", "another compression"])
def test_a_copy_in_other_bytes_looks_the_same(tmp_path: Path, change: str) -> None:
    drawn(tmp_path / "t" / "a.png", 3)
    picture = Image.open(tmp_path / "t" / "a.png").convert("RGB")
    (tmp_path / "e").mkdir()
    name = {"jpeg": "a.jpg", "webp": "a.webp"}.get(change, "b.png")
    if change == "half":
        picture = picture.resize((120, 90))
    if change == "darker":
        picture = picture.point(lambda level: round(level * 0.85))
    picture.save(tmp_path / "e" / name, **({"quality": 40} if change in ("jpeg", "webp") else {"compress_level": 1}))
    assert counts([item(tmp_path / "e", "1", name)], [item(tmp_path / "t", "1", "a.png")]) == {"near": 1}


def test_other_pictures_are_not_the_same_nor_is_another_colour_of_one_drawing(tmp_path: Path) -> None:
    drawn(tmp_path / "t" / "a.png", 1)
    drawn(tmp_path / "e" / "b.png", 2)
    drawn(tmp_path / "e" / "green.png", 1, colour="green")
    training = [item(tmp_path / "t", "1", "a.png")]
    assert counts([item(tmp_path / "e", "1", "b.png"), item(tmp_path / "e", "2", "green.png")], training) == {"question": 2}


def test_a_copy_of_one_of_several_copies_is_found_whichever_was_asked_about(tmp_path: Path) -> None:
    """Augmented copies in training: the question was asked about the second one only."""
    drawn(tmp_path / "t" / "a.png", 1)
    picture = Image.open(tmp_path / "t" / "a.png").convert("RGB")
    picture.resize((200, 150)).save(tmp_path / "t" / "b.png")
    (tmp_path / "e").mkdir()
    picture.save(tmp_path / "e" / "c.jpg", quality=60)
    training = [item(tmp_path / "t", "1", "a.png", "How hot?"), item(tmp_path / "t", "2", "b.png", "What is it?")]
    assert counts([item(tmp_path / "e", "1", "c.jpg", "What is it?")], training) == {"near": 1}


def test_the_same_pictures_as_options_in_another_order_are_the_same_item(tmp_path: Path) -> None:
    for n in range(3):
        drawn(tmp_path / f"{n}.png", n)

    def options(name: str, *numbers: int) -> Record:
        turns = (Message("user", "<image><image>\nWhich is sour?"), Message("assistant", "A"))
        return Record(name, turns, tuple(f"{n}.png" for n in numbers), where=f"d:{name}", root=tmp_path)

    assert counts([options("1", 1, 0)], [options("1", 0, 1)]) == {"exact": 1}
    assert counts([options("1", 1, 2)], [options("1", 0, 1)]) == {"picture": 1}


def receipt(path: Path, seed: int) -> Path:
    """A shop's receipt: one layout, other goods and sums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    picture = Image.new("RGB", (400, 600), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((120, 20), "SHOP MARKET", fill="black")
    for row in range(18):
        pen.text((20, 80 + 22 * row), draw.choice(["Milk", "Bread", "Apples", "Tea", "Rice", "Soap"]), fill="black")
        pen.text((320, 80 + 22 * row), f"{draw.uniform(0, 30):.2f}", fill="black")
    pen.text((300, 500), f"{draw.uniform(0, 300):.2f}", fill="black")
    picture.save(path)
    return path


def test_receipts_of_one_layout_are_different_pictures_but_a_copy_of_one_is_found(tmp_path: Path) -> None:
    """A report that called these training items would accuse every model that was tuned on documents."""
    question = "What is the total?"
    training = [item(tmp_path / "t", str(n), receipt(tmp_path / "t" / f"{n}.png", n).name, question) for n in range(20)]
    fresh = [item(tmp_path / "e", str(n), receipt(tmp_path / "e" / f"{n}.png", 100 + n).name, question) for n in range(20)]
    assert counts(fresh, training) == {"question": 20}
    Image.open(tmp_path / "t" / "3.png").resize((300, 450)).save(tmp_path / "e" / "copy.jpg", quality=60)
    assert counts([item(tmp_path / "e", "c", "copy.jpg", question)], training) == {"near": 1}


def test_a_thousand_copies_are_one_family(tmp_path: Path) -> None:
    look = look_of(load_picture(drawn(tmp_path / "a.png", 1)))
    other = look_of(load_picture(drawn(tmp_path / "b.png", 2)))
    assert look is not None
    assert other is not None
    labels = families([look, other] * 1000)
    assert len(set(labels[::2])) == len(set(labels[1::2])) == 1
    assert labels[0] != labels[1]
    assert len(families([])) == 0


def test_plain_surfaces_are_told_apart_by_their_bytes_alone(tmp_path: Path) -> None:
    for name, level in (("a", 200), ("b", 204)):
        Image.new("RGB", (64, 64), (level, level, level)).save(tmp_path / f"{name}.png")
    assert look_of(load_picture(tmp_path / "a.png")) is None
    assert counts([item(tmp_path, "1", "b.png")], [item(tmp_path, "1", "a.png")]) == {"question": 1}


def test_a_text_question_is_seen_when_its_words_are(tmp_path: Path) -> None:
    training = [item(tmp_path, "1", None, "川菜的主要味道是？")]
    assert counts([item(tmp_path, "1", None, "川菜的主要味道是?")], training) == {"exact": 1}
    assert counts([item(tmp_path, "1", None, "苏菜的主要味道是?")], training) == {}


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    drawn(tmp_path / "a.png", 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    found = contamination([item(tmp_path, "1", "a.png")], [item(tmp_path, "1", "cut.png"), item(tmp_path, "2", "gone.png")])
    assert (found["unreadable"], found["exact"], found["near"]) == (2, 0, 0)


def test_beyond_the_limit_the_look_is_not_compared_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(tmp_path / "a.png", 1)
    Image.open(tmp_path / "a.png").save(tmp_path / "a.webp")
    monkeypatch.setattr("intervale.evaluate.contamination.MOST_DECODED", 1)
    found = contamination([item(tmp_path, "1", "a.webp")], [item(tmp_path, "1", "a.png")])
    assert (found["looks"], found["near"]) == (False, 0)


@pytest.mark.slow
def test_real_photographs_are_found_again_and_never_taken_for_each_other(tmp_path: Path) -> None:
    photographs = sorted((SHARED / "data" / "foodie_photos").rglob("*.jp*g"))
    if not photographs:
        pytest.skip("../shared/data is not here")
    looks = [look_of(load_picture(path)) for path in photographs]
    rough = [look_of(load_picture(path, rough=256)) for path in photographs]
    small = []
    for number, path in enumerate(photographs):
        load_picture(path).resize((256, 192)).save(tmp_path / f"{number}.jpg", quality=40)
        small.append(look_of(load_picture(tmp_path / f"{number}.jpg")))
    assert all(looks)
    assert alike(rough, looks) == [[n] for n in range(len(looks))]  # type: ignore[arg-type]
    assert alike(small, looks) == [[n] for n in range(len(looks))]  # type: ignore[arg-type]
    for one, other in itertools.combinations(looks, 2):
        assert alike([one], [other]) == [[]]  # type: ignore[list-item]
