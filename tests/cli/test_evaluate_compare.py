"""The two commands: clean JSON on stdout, the rest on stderr, a report where it was said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from intervale.cli.compare import compare
from intervale.cli.evaluate import evaluate
from intervale.core.errors import UserError
from intervale.core.lang import set_language
from intervale.core.records import Message, Record, to_json
from intervale.model.presets import init_model

app = typer.Typer()
app.command()(evaluate)
app.command()(compare)


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models and four items."""
    folder = tmp_path_factory.mktemp("journey")
    for seed in (0, 1):
        init_model(folder / f"m{seed}", "tiny", seed=seed)
    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for n in range(4):
            turns = (Message("user", "<image>\nWhich \x1b[2Jcolour?"), Message("assistant", "red"))
            file.write(to_json(Record(str(n), turns, ("a.png",), ("red", "blue", "green"), n % 3, {"kind": "colour"})) + "\n")
    return folder


def call(*args: object) -> tuple[str, str]:
    found = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    return found.stdout, found.stderr


def test_the_journey_from_two_evaluations_to_a_report(home: Path) -> None:
    for n in (0, 1):
        out, err = call(
            "evaluate", home / f"m{n}", home / "data.jsonl", "--out", home / f"e{n}", "--mode", "likelihood", "--device", "cpu", "--json"
        )
        summary = json.loads(out)
        assert summary == json.loads((home / f"e{n}" / "summary.json").read_text())
        assert "4/4" in err
    out, _ = call("compare", home / "e0", home / "e1")
    report = home / "compare-e0-e1" / "report.html"
    assert str(report) in out
    assert report.read_text().startswith("<!doctype html>")
    out, _ = call("compare", home / "e0", home / "e1", "--out", home / "cmp", "--json")
    assert json.loads(out) == json.loads((home / "cmp" / "report.json").read_text())


def test_a_third_evaluation_stands_beside_and_a_card_needs_an_export(home: Path) -> None:
    for n in (0, 1):
        call("evaluate", home / f"m{n}", home / "data.jsonl", "--out", home / f"s{n}", "--max-new-tokens", 2, "--device", "cpu")
    out, _ = call("compare", home / "s0", home / "s1", "--beside", home / "s0", "--out", home / "three")
    assert "AFTER minus this" in out
    assert len(json.loads((home / "three" / "report.json").read_text())["others"]) == 1
    found = CliRunner().invoke(app, ["compare", str(home / "s0"), str(home / "s1"), "--card", "--out", str(home / "four")])
    assert isinstance(found.exception, UserError)
    assert "not a folder that `intervale export` wrote" in found.exception.what


def test_open_answers_are_scored_and_told(home: Path) -> None:
    turns = (Message("user", "<image>\nWhich colour?"), Message("assistant", "red"))
    lines = [to_json(Record(str(n), turns, ("a.png",))) for n in range(3)]
    (home / "open.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out, _ = call("evaluate", home / "m0", home / "open.jsonl", "--out", home / "o0", "--max-new-tokens", 3, "--device", "cpu")
    for told in ("right answer contained", "word for word", "character F1", "ROUGE-L", "empty answers"):
        assert told in out


def test_the_screen_tells_accuracy_tags_and_what_is_not_known(home: Path) -> None:
    out, _ = call("evaluate", home / "m0", home / "data.jsonl", "--out", home / "shown", "--max-new-tokens", 2, "--device", "cpu")
    assert out.startswith("accuracy")
    assert "kind:" in out
    assert "not known" in out
    again, err = call("evaluate", home / "m0", home / "data.jsonl", "--out", home / "shown", "--max-new-tokens", 2, "--device", "cpu")
    assert again == out
    assert "already evaluated" in err


def test_a_score_on_training_items_is_said_plainly(home: Path) -> None:
    card = home / "dataset.json"
    card.write_text('{"all": true, "files": {"data.jsonl": {}}}')
    try:
        out, _ = call("evaluate", home / "m0", home / "data.jsonl", "--out", home / "seen", "--max-new-tokens", 1, "--device", "cpu")
    finally:
        card.unlink()
    assert "SCORED ON TRAINING ITEMS" in out
    assert "\x1b" not in out


def test_official_with_the_open_prompt_is_an_error_with_a_way_out(home: Path) -> None:
    args = ["evaluate", str(home / "m0"), str(home / "data.jsonl"), "--out", str(home / "no"), "--mode", "official"]
    found = CliRunner().invoke(app, args)
    assert isinstance(found.exception, UserError)
    assert not (home / "no").exists()


def test_comparing_and_the_help_need_no_torch() -> None:
    code = "import sys, intervale.cli.evaluate, intervale.cli.compare, intervale.evaluate.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
