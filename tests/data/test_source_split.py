"""A source that says itself which items are held out: honoured when it keeps pictures apart, refused when it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foodie_fixture import write_emoji, write_foodieqa
from intervale.core.errors import UserError
from intervale.core.records import Record, read_records
from intervale.data.check import check_files
from intervale.data.foodieqa import LICENCE, licence_of, read_foodieqa
from intervale.data.formats import Reading, read_llava, read_messages
from intervale.data.split import tags_apart
from intervale.data.writer import SET_ASIDE, write_dataset

Items = list[dict[str, Any]]


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    write_emoji(tmp_path / "src")
    return tmp_path / "src"


def edit(src: Path, change: Callable[[Items], None]) -> None:
    path = src / "sivqa_tidy.json"
    items = json.loads(path.read_text(encoding="utf-8"))
    change(items)
    path.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")


def write(reading: Reading, out: Path, fraction: float | None = None, **options: Any) -> dict[str, Any]:
    return write_dataset(reading, out, **{"fraction": fraction, "otherwise": 0.2, "seed": 0, "skip_bad": False, "about": {}, **options})


def sides(out: Path) -> tuple[list[Record], list[Record]]:
    return read_records(out / "train.jsonl"), read_records(out / "eval.jsonl")


@pytest.mark.parametrize("language", ["zh", "en", "both"])
def test_the_sources_own_split_is_honoured(emoji: Path, tmp_path: Path, language: str) -> None:
    card = write(read_foodieqa(emoji, language=language), tmp_path / "out")
    train, held_out = sides(tmp_path / "out")
    assert {record.tags["artist"] for record in train} == {"noto", "openmoji"}
    assert {record.tags["artist"] for record in held_out} == {"twemoji"}
    assert (len(train), len(held_out)) == ((16, 8) if language != "both" else (32, 16))
    assert card["split"] == {
        "by": "source",
        "kept_apart": ["artist"],
        "on_both_sides": ["cuisine", "food_name", "question_type"],
        "eval_fraction": 0.3333,
    }
    assert (card["all"], card["scored_on_training_items"], card["seed"]) == (False, False, None)
    assert card["files"]["train.jsonl"]["artist"] == ({"noto": 8, "openmoji": 8} if language != "both" else {"noto": 16, "openmoji": 16})
    assert not any(key in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8") for key in ('"split"', '"side"'))
    if language != "zh":
        assert [record.reference() for record in held_out if record.id == "name-twemoji-0-en"] == ["red apple"]


@pytest.mark.parametrize("word", ["test", "eval", "validation", "val", "dev", "TEST", " Val "])
def test_every_usual_word_for_a_side_is_understood(emoji: Path, word: str) -> None:
    def change(items: Items) -> None:
        for item in items:
            item["split"] = word if item["split"] == "test" else "Train"

    edit(emoji, change)
    reading = read_foodieqa(emoji)
    assert reading.faults == ()
    assert [sample.side for sample in reading.samples] == ["train"] * 16 + ["eval"] * 8


@pytest.mark.parametrize("word", ["testing", "", 3, True, ["test"]])
def test_an_unknown_side_is_a_fault_that_names_item_and_value(emoji: Path, tmp_path: Path, word: Any) -> None:
    edit(emoji, lambda items: items[2].update(split=word))
    with pytest.raises(UserError, match=r"item 3 \(id name-noto-1\): 'split' is ") as caught:
        write(read_foodieqa(emoji), tmp_path / "out")
    assert str(word) in caught.value.what
    assert not (tmp_path / "out").exists()


def test_items_with_and_without_a_side_are_counted(emoji: Path, tmp_path: Path) -> None:
    def change(items: Items) -> None:
        del items[1]["split"], items[5]["split"]
        items[7]["split"] = None

    edit(emoji, change)
    for language in ("zh", "both"):
        with pytest.raises(UserError, match=r"21 items have a 'split' and 3 have none \(first: item 2 \(id kind-noto-0\)\)"):
            write(read_foodieqa(emoji, language=language), tmp_path / "out")
    assert write(read_foodieqa(emoji), tmp_path / "out", 0.0)["all"]


@pytest.mark.parametrize(("word", "said"), [("train", "to train on"), ("test", "held out")])
def test_one_side_alone_is_refused_unless_everything_is_trained_on(emoji: Path, tmp_path: Path, word: str, said: str) -> None:
    edit(emoji, lambda items: [item.update(split=word) for item in items] and None)
    with pytest.raises(UserError, match=f"one side only: all 24 items are {said}") as caught:
        write(read_foodieqa(emoji), tmp_path / "out")
    assert "--all" in caught.value.fix
    assert write(read_foodieqa(emoji), tmp_path / "out", 0.0)["files"]["train.jsonl"]["items"] == 24


def test_all_sets_the_sources_split_aside_and_says_so(emoji: Path, tmp_path: Path) -> None:
    card = write(read_foodieqa(emoji), tmp_path / "out", 0.0)
    assert not (tmp_path / "out" / "eval.jsonl").exists()
    assert (card["all"], card["scored_on_training_items"], card["split"]) == (True, True, None)
    assert card["counts"][SET_ASIDE] == 8


def test_a_fraction_and_a_split_of_the_source_are_not_both_had(emoji: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--eval-fraction 0\.2 would replace") as caught:
        write(read_foodieqa(emoji), tmp_path / "out", 0.2)
    assert "leave --eval-fraction out" in caught.value.fix
    assert not (tmp_path / "out").exists()


def _same_file(src: Path, items: Items) -> None:
    items[16]["food_meta"]["food_file"] = items[0]["food_meta"]["food_file"]


def _same_bytes(src: Path, items: Items) -> None:
    (src / "images" / "twemoji-0.png").write_bytes((src / "images" / "noto-0.png").read_bytes())


def _same_pixels(src: Path, items: Items) -> None:
    Image.open(src / "images" / "noto-0.png").save(src / "images" / "again.bmp")
    items[16]["food_meta"]["food_file"] = "images/again.bmp"


@pytest.mark.parametrize("spoil", [_same_file, _same_bytes, _same_pixels])
def test_a_picture_on_both_sides_of_the_sources_split_is_refused(emoji: Path, tmp_path: Path, spoil: Callable[[Path, Items], None]) -> None:
    edit(emoji, lambda items: spoil(emoji, items))
    with pytest.raises(UserError, match="on both sides") as caught:
        write(read_foodieqa(emoji), tmp_path / "out")
    assert "name-noto-0, kind-noto-0 (train)" in caught.value.what
    assert "name-twemoji-0" in caught.value.what
    assert not (tmp_path / "out").exists()
    assert write(read_foodieqa(emoji), tmp_path / "all", 0.0)["all"]


def test_only_the_first_ids_of_a_torn_group_are_named(emoji: Path, tmp_path: Path) -> None:
    def change(items: Items) -> None:
        for item in items:
            item["food_meta"]["food_file"] = "images/noto-0.png"

    edit(emoji, change)
    with pytest.raises(UserError) as caught:
        write(read_foodieqa(emoji), tmp_path / "out")
    assert "(1 time); nothing" in caught.value.what
    assert "kind-noto-0, name-noto-1 and 13 more (train) and name-twemoji-0" in caught.value.what


def test_a_question_without_a_picture_on_both_sides_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    asked = [("Where is it from?", "train"), ("where is  it from", "dev"), ("And this?", "dev")]
    lines = [
        {"id": str(n), "split": side, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
        for n, (text, side) in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"0 \(train\) and 1 \(held out\)"):
        write(read_messages(path, tmp_path), tmp_path / "out")


def _llava(folder: Path, *words: str | None) -> Reading:
    folder.mkdir()
    items = []
    for number, word in enumerate(words):
        Image.new("RGB", (8 + number, 8)).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
        items.append({"id": str(number), "image": f"{number}.png", "conversations": talk, **({"split": word} if word else {})})
    (folder / "data.json").write_text(json.dumps(items))
    return read_llava(folder / "data.json", folder)


def test_llava_items_may_say_their_side(tmp_path: Path) -> None:
    reading = _llava(tmp_path / "src", "train", "val", "train")
    assert reading.counts == {}
    card = write(reading, tmp_path / "out", otherwise=0.0)
    assert [[record.id for record in side] for side in sides(tmp_path / "out")] == [["0", "2"], ["1"]]
    assert (card["split"]["by"], card["split"]["kept_apart"]) == ("source", [])
    card = write(reading, tmp_path / "all", 0.0)
    assert (card["all"], card["counts"]) == (True, {SET_ASIDE: 1})
    unmarked = _llava(tmp_path / "unmarked", None, None)
    assert write(unmarked, tmp_path / "none", otherwise=0.0)["all"]


def test_a_drawn_split_says_what_it_keeps_apart(tmp_path: Path) -> None:
    write_foodieqa(tmp_path / "src", traps=False)
    split = write(read_foodieqa(tmp_path / "src"), tmp_path / "out")["split"]
    assert (split["by"], split["kept_apart"], split["eval_fraction_asked"]) == ("drawn", ["food_name"], 0.2)
    assert "question_type" in split["on_both_sides"]
    assert "food_name" not in split["on_both_sides"]
    drawn = write(_llava(tmp_path / "llava", *[None] * 6), tmp_path / "plain", 0.5)["split"]
    assert (drawn["by"], drawn["kept_apart"]) == ("drawn", [])


def test_what_a_split_keeps_apart_is_a_trait_that_every_item_has() -> None:
    def records(*tags: dict[str, str]) -> list[Record]:
        return [Record(str(n), (), tags=one, where=f"{sorted(one.items())}:{n}") for n, one in enumerate(tags)]

    train = records({"artist": "A", "number": "1", "kind": "x", "some": "p"}, {"artist": "B", "number": "2", "kind": "y"})
    held_out = records({"artist": "C", "number": "3", "kind": "X ", "some": "q"}, {"artist": "C", "number": "4", "kind": "z", "some": "q"})
    # number: one value an item; some: not on every item; kind: x and "X " are the same.
    assert tags_apart(train, held_out) == (["artist"], ["kind"])


def test_check_finds_a_tag_value_on_both_sides(emoji: Path, tmp_path: Path) -> None:
    write(read_foodieqa(emoji), tmp_path / "out")
    train, held_out = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl"
    report = check_files(train, held_out, kept_apart=["artist"])
    assert report.faults == ()
    assert report.apart is not None
    assert (report.apart.pictures, report.apart.questions) == (True, True)
    assert report.apart.tags == {"artist": {str(train): 2, str(held_out): 1}}
    held_out.write_text(held_out.read_text(encoding="utf-8").replace('"artist": "twemoji"', '"artist": "Noto"', 3), encoding="utf-8")
    report = check_files(train, held_out, kept_apart=["artist"])
    assert [(fault.where, fault.kind) for fault in report.faults] == [(f"{held_out}:1", "overlap-tag")]
    assert f"the tag 'artist' is 'Noto' (3 such in eval.jsonl), as at {train}:1" in report.faults[0].what
    assert report.apart is not None
    assert report.apart.tags == {}
    assert [fault.kind for fault in check_files(train, held_out, apart=["food_name"]).faults] == ["overlap-tag"] * 4
    assert check_files(train, held_out).faults == ()


def test_the_same_question_about_other_pictures_is_no_overlap(emoji: Path, tmp_path: Path) -> None:
    write(read_foodieqa(emoji), tmp_path / "out")
    train, held_out = sides(tmp_path / "out")
    assert {record.question() for record in held_out} <= {record.question() for record in train}
    assert check_files(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl").faults == ()


def test_nothing_is_called_apart_that_could_not_be_read(emoji: Path, tmp_path: Path) -> None:
    write(read_foodieqa(emoji), tmp_path / "out")
    train, held_out = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl"
    (tmp_path / "out" / "images" / "twemoji-0.png").write_bytes(b"")
    apart = check_files(train, held_out, kept_apart=["artist"]).apart
    assert apart is not None
    assert (apart.pictures, apart.questions, list(apart.tags)) == (False, True, ["artist"])
    held_out.write_text(held_out.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    apart = check_files(train, held_out, kept_apart=["artist"]).apart
    assert apart is not None
    assert (apart.pictures, apart.questions, apart.tags) == (False, False, {})
    assert check_files(train).apart is None


def test_a_tag_that_nobody_has_cannot_be_demanded(emoji: Path, tmp_path: Path) -> None:
    write(read_foodieqa(emoji), tmp_path / "out")
    train, held_out = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl"
    with pytest.raises(UserError, match=r"no item has the tag 'artists' \(did you mean 'artist'\?\)") as caught:
        check_files(train, held_out, apart=["artists"])
    assert "artist, cuisine, food_name, question_type" in caught.value.fix
    with pytest.raises(UserError, match="one file alone"):
        check_files(train, apart=["artist"])
    # The card's promise about a tag that is gone is a fault, not an error: the rest of the data is still looked at.
    report = check_files(train, held_out, kept_apart=["gone"])
    assert [(fault.where, fault.kind) for fault in report.faults] == [(str(held_out), "overlap-tag")]


def test_the_cards_tags_are_not_asked_of_another_file(emoji: Path, tmp_path: Path) -> None:
    write(read_foodieqa(emoji), tmp_path / "out")
    train, held_out = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl"
    Image.new("RGB", (5, 5)).save(tmp_path / "other.png")
    messages = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": messages, "images": ["other.png"], "tags": {"artist": "noto"}}) + "\n")
    assert check_files(train, held_out, against=other, kept_apart=["artist"]).faults == ()
    found = check_files(train, held_out, against=other, kept_apart=["artist"], apart=["artist"]).faults
    assert [(fault.where, fault.kind) for fault in found] == [(f"{other}:1", "overlap-tag")]


def test_an_artist_is_a_text(emoji: Path, tmp_path: Path) -> None:
    edit(emoji, lambda items: items[0].update(artist=7))
    with pytest.raises(UserError, match=r"item 1 .*'artist' is not a text"):
        write(read_foodieqa(emoji), tmp_path / "out")


def test_a_licence_beside_the_source_wins(emoji: Path) -> None:
    source = emoji / "sivqa_tidy.json"
    assert licence_of(source) == LICENCE
    own = {"name": "CC BY 4.0", "terms": "name the artists"}
    (emoji / "licence.json").write_text(json.dumps({**own, "comment": 1}))
    assert licence_of(source) == own


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "x"}', '{"name": "x", "terms": " "}', '{"name": 3, "terms": "t"}', "{"])
def test_a_damaged_licence_is_refused(emoji: Path, content: str) -> None:
    (emoji / "licence.json").write_text(content)
    with pytest.raises(UserError, match=r"licence\.json"):
        licence_of(emoji / "sivqa_tidy.json")
