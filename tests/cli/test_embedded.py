"""The embedded data set and model by their names, and what prepare and check say of a source's own split."""

import json
from pathlib import Path

import pytest

from conftest import run_command
from foodie_fixture import write_emoji
from intervale.core import embedded as room
from intervale.core.embedded import embedded
from intervale.core.errors import UserError

LICENCE = {"name": "CC BY 4.0", "terms": "name the artists", "url": "https://example.org/notice"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, and a package with a stand-in for the data set."""
    write_emoji(tmp_path / "assets" / "foodemoji")
    (tmp_path / "assets" / "foodemoji" / "licence.json").write_text(json.dumps(LICENCE))
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(room, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_the_embedded_data_set_is_prepared_by_its_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out", "--question-language", "both") == 0
    said = capsys.readouterr()
    assert "held out 33.3% (the source's own split): no picture and no artist is on both sides; dishes are\n" in said.out
    assert "terms of foodemoji (CC BY 4.0, https://example.org/notice): name the artists" in said.err
    assert "FoodieQA" not in said.err + said.out
    card = json.loads((home / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert (card["licence"], card["source"]) == (LICENCE, "foodemoji")
    assert run_command(monkeypatch, "check", "out") == 0
    said = capsys.readouterr()
    assert "apart: pictures (bytes and pixels), questions without a picture, artist (2 values in train, 1 in eval)\n" in said.out


def test_the_split_is_told_in_chinese_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--lang", "zh", "prepare", "foodieqa", "foodemoji", "out") == 0
    said = capsys.readouterr()
    assert "留出 33.3%（数据自带的划分）：两边没有相同的图片、画师；菜品两边都有\n" in said.out
    assert "foodemoji 的许可（CC BY 4.0，https://example.org/notice）：name the artists" in said.err
    assert run_command(monkeypatch, "--lang", "zh", "check", "out") == 0
    assert "两边不重复：图片（字节和像素），无图问题，artist（train 有 2 个值，eval 有 1 个值）" in capsys.readouterr().out


def test_a_fraction_beside_the_sources_split_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out", "--eval-fraction", "0.2") == 1
    assert "leave --eval-fraction out" in capsys.readouterr().err
    assert not (home / "out").exists()


def test_all_trains_on_the_held_out_items_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out", "--all") == 0
    said = capsys.readouterr().out
    assert "a score on training items" in said
    assert "items that the source holds out, now in train.jsonl: 8" in said


def test_check_holds_a_folder_to_its_card(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out") == 0
    path = home / "out" / "eval.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("twemoji", "noto").replace("images/noto", "images/twemoji"), encoding="utf-8")
    capsys.readouterr()
    assert run_command(monkeypatch, "check", "out", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [(fault["where"], fault["kind"]) for fault in document["faults"]] == [("out/eval.jsonl:1", "overlap-tag")]
    assert document["apart"] == {"pictures": True, "questions": True, "tags": {}, "without": {}}


def test_check_can_be_asked_to_keep_a_tag_apart(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out") == 0
    (home / "out" / "dataset.json").unlink()
    capsys.readouterr()
    assert run_command(monkeypatch, "check", "out", "--apart", "artist", "--json") == 0
    tags = json.loads(capsys.readouterr().out)["apart"]["tags"]
    assert tags == {"artist": {"out/train.jsonl": 2, "out/eval.jsonl": 1}}
    assert run_command(monkeypatch, "check", "out", "--apart", "artist", "--apart", "food_name") == 1
    said = capsys.readouterr().out
    assert "out/eval.jsonl:1: the tag 'food_name' is '苹果'" in said
    assert "artist (2 values" in said
    assert run_command(monkeypatch, "check", "out", "--apart", "painter") == 1
    assert "no item has the tag 'painter'" in capsys.readouterr().err
    assert run_command(monkeypatch, "check", "out/train.jsonl", "--apart", "artist") == 1
    assert "one file alone" in capsys.readouterr().err


def test_an_older_card_told_it_in_words_and_a_damaged_one_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out") == 0
    card = home / "out" / "dataset.json"
    card.write_text(json.dumps({"split": {"kept_apart": "pictures (bytes and pixels), dishes"}}))
    assert run_command(monkeypatch, "check", "out") == 0
    card.write_text(json.dumps({"split": {"kept_apart": [1]}}))
    assert run_command(monkeypatch, "check", "out") == 1
    assert "'kept_apart' is not a list of tags" in capsys.readouterr().err


def test_a_path_of_the_users_own_wins(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedded("foodemoji") == room.ASSETS / "foodemoji"
    assert embedded("other") is None
    (home / "foodemoji").mkdir()
    assert embedded("foodemoji") is None
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out") == 1
    assert "foodemoji: no sivqa_tidy.json" in capsys.readouterr().err


def test_the_embedded_model_is_named_nano(home: Path) -> None:
    from intervale.model.load import resolve_model

    with pytest.raises(UserError, match="nano: no such folder"):
        resolve_model("nano")
    (room.ASSETS / "nano").mkdir()
    assert resolve_model("nano") == room.ASSETS / "nano"
    (home / "nano").mkdir()
    assert resolve_model("nano") == Path("nano")


def test_without_the_asset_a_name_is_only_a_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(room, "ASSETS", room.ASSETS / "gone")
    assert run_command(monkeypatch, "prepare", "foodieqa", "foodemoji", "out") == 1
    assert "foodemoji: no sivqa_tidy.json" in capsys.readouterr().err


def test_llava_honours_a_split_unless_a_fraction_is_given(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    items = [{"image": f"{artist}-0.png", "conversations": talk, "split": side} for artist, side in (("noto", "train"), ("twemoji", "val"))]
    (home / "data.json").write_text(json.dumps(items))
    words = ["--image-root", room.ASSETS / "foodemoji" / "images"]
    assert run_command(monkeypatch, "prepare", "llava", "data.json", "own", *words) == 0
    assert "held out 50.0% (the source's own split): no picture is on both sides\n" in capsys.readouterr().out
    assert run_command(monkeypatch, "prepare", "llava", "data.json", "none", *words, "--eval-fraction", "0") == 0
    assert not (home / "none" / "eval.jsonl").exists()
    assert run_command(monkeypatch, "prepare", "llava", "data.json", "drawn", *words, "--eval-fraction", "0.5") == 1
