import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run_command
from foodie_fixture import write_foodieqa
from intervale.cli.check import data_files
from intervale.core.errors import UserError
from intervale.core.lang import set_language


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_LANG", "en")
    set_language(None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_foodieqa(tmp_path / "src", traps=False)
    return tmp_path / "src"


def test_prepare_then_check_finds_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "eval.jsonl: " in said.out
    assert "held out" in said.out
    assert said.err.count("CC BY-NC-ND 4.0") == 1
    assert run_command(monkeypatch, "check", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "no faults: 24 items, 12 pictures, 24 with choices\n" in said.out
    assert "apart: pictures (bytes and pixels), questions without a picture, food_name (10 values in train, 2 in eval)" in said.out


def test_all_says_that_a_score_would_be_on_training_items(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out", "--all") == 0
    assert "a score on training items" in capsys.readouterr().out
    assert run_command(monkeypatch, "check", tmp_path / "out") == 0
    assert "is one on training items" in capsys.readouterr().err


def test_the_messages_speak_chinese(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "--lang", "zh", "prepare", "foodieqa", source, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "留出" in said.out
    assert "仅供评测" in said.err
    assert run_command(monkeypatch, "--lang", "zh", "check", tmp_path / "out") == 0
    assert "没有问题：24 条" in capsys.readouterr().out


def test_faults_end_with_exit_code_1_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_foodieqa(tmp_path / "src", traps=True)
    assert run_command(monkeypatch, "prepare", "foodieqa", tmp_path / "src", tmp_path / "out") == 1
    assert "3 faulty items; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_command(monkeypatch, "prepare", "foodieqa", tmp_path / "src", tmp_path / "out", "--skip-bad") == 0
    assert "left out 3 faulty items" in capsys.readouterr().out


def test_an_output_that_exists_is_never_touched(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_a_fraction_that_is_none_is_a_usage_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: str) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out", "--eval-fraction", fraction) == 2


def test_what_a_drawn_split_keeps_apart_is_told_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dishes only where items name theirs."""
    items = []
    for seed, name in enumerate(("one", "two")):
        noise = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), np.uint8)
        Image.fromarray(noise).resize((90, 90)).save(tmp_path / f"{name}.png")
        talk = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
        items.append({"image": f"{name}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(items))
    words = ["--eval-fraction", "0.5"]
    for apart, given in (
        ("no picture, no dish and no question", ["foodieqa", source, tmp_path / "named", *words]),
        ("no picture and no question", ["llava", tmp_path / "data.json", tmp_path / "plain", "--image-root", tmp_path, *words]),
    ):
        assert run_command(monkeypatch, "prepare", *given) == 0
        assert f": {apart} without a picture is on both sides (" in capsys.readouterr().out


def test_llava_and_messages_are_prepared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "sivqa_llava.json").write_text(json.dumps([{"id": 1, "image": "alpha.png", "conversations": talk}]))
    root = source / "images"
    assert run_command(monkeypatch, "prepare", "llava", tmp_path / "sivqa_llava.json", tmp_path / "one", "--image-root", root) == 0
    assert (
        run_command(
            monkeypatch, "prepare", "messages", tmp_path / "one" / "train.jsonl", tmp_path / "two", "--image-root", tmp_path / "one"
        )
        == 0
    )
    assert (tmp_path / "one" / "train.jsonl").read_text() == (tmp_path / "two" / "train.jsonl").read_text()
    assert run_command(monkeypatch, "check", tmp_path / "two") == 0
    assert (
        run_command(monkeypatch, "prepare", "llava", tmp_path / "sivqa_llava.json", tmp_path / "three", "--image-root", tmp_path / "gone")
        == 1
    )


def test_json_is_one_document_and_faults_exit_1(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out", "--all") == 0
    path = tmp_path / "out" / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    capsys.readouterr()
    assert run_command(monkeypatch, "check", path, "--json", "--show", "1") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["items"], document["pictures"], document["tokens"], document["ok"]) == (25, 12, None, False)
    assert [(fault["where"], fault["kind"]) for fault in document["faults"]] == [(f"{path}:25", "json")]
    assert len(document["shown"]) == 1
    assert run_command(monkeypatch, "check", path) == 1
    said = capsys.readouterr().out
    assert f"{path}:25: not valid JSON" in said
    assert "1 faults" in said


def test_show_marks_what_is_trained(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out", "--all") == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "check", tmp_path / "out", "--show", "1", "--max-tiles", "6") == 0
    said = capsys.readouterr().out
    assert "96x64, grid 3x2 + thumbnail = 7 tiles, 1,792 tokens" in said
    assert "<img><IMG_CONTEXT>×1792</img>\n图片中的食物" in said
    assert "【川菜（四川，重庆），图中的菜是红烧鱼<|im_end|>】" in said
    assert "\x1b" not in said


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "\x1b[2Jhidden"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": messages, "id": "\x1b[31mred"}) + "\n" for _ in range(2)))
    assert run_command(monkeypatch, "check", path, "--show", "1") == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[2Jhidden" in said


def test_a_length_without_a_model_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "check", source, "--max-length", "10") == 1
    assert "--model" in capsys.readouterr().err


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither train\.jsonl nor eval\.jsonl"):
        data_files(tmp_path)


def test_a_model_counts_the_tokens_and_shows_its_own_ids(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from intervale.data.prompt import TEMPLATES
    from intervale.data.tiling import Tiling
    from intervale.model import load
    from intervale.model.tokenizer import VISION_SPECIALS, Tokenizer, byte_level

    specials = dict(enumerate(("<s>", "</s>", "<|im_start|>", "<|im_end|>", *VISION_SPECIALS)))
    side = load.TextSide(
        Tokenizer(byte_level(512, specials), True, "drawn"), TEMPLATES["internlm2-chat"], Tiling(max_tiles=1, tokens_per_tile=4)
    )
    monkeypatch.setattr(load, "load_text_side", lambda name: side)
    assert run_command(monkeypatch, "prepare", "foodieqa", source, tmp_path / "out", "--all") == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "check", tmp_path / "out", "--model", "m", "--show", "1") == 0
    said = capsys.readouterr().out
    assert "<s><|im_start|>system" in said
    assert "<img><IMG_CONTEXT>×4</img>\n图片中的食物" in said
    assert "【川菜（四川，重庆），图中的菜是红烧鱼<|im_end|>】" in said
    assert "max_length 8,192" in said
    assert run_command(monkeypatch, "check", tmp_path / "out", "--model", "m", "--max-length", "20", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert {fault["kind"] for fault in document["faults"]} == {"too-long"}
    assert document["tokens"]["min"] > 20
