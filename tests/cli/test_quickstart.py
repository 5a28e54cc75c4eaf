"""The quickstart keeps its promises on a small part of its data; nano is what its card says."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from intervale.cli import quickstart as module
from intervale.cli.main import app
from intervale.core.embedded import ASSETS
from intervale.model.load import load_model
from intervale.train.recipe import TrainRecipe

NANO = ASSETS / "nano"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing on 64 training items, 48 questions and four steps."""
    whole = module._prepare

    def part(out: Path, seed: int) -> TrainRecipe:
        recipe = whole(out, seed)
        for name, count in (("train", 64), ("eval", 48)):
            path = out / "data" / f"{name}.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 4})})

    monkeypatch.setattr(module, "_prepare", part)


def run(out: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["--lang", "en", "quickstart", "--out", str(out), *more])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def test_quickstart_scores_tunes_exports_scores_again_and_only_tells_the_second_time(small: None, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    first = run(out)
    assert "-> " in first
    assert "McNemar p" in first
    assert f"intervale chat {out / 'tuned'}" in first
    mark = json.loads((out / "quickstart.json").read_text())
    assert mark["status"] == "done"
    assert mark["n"] == 48
    assert (out / "report.html").stat().st_size > 10_000
    assert load_model(out / "tuned").tiling.max_tiles == 1
    assert "| 48 |" in (out / "tuned" / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run(out)
    assert again.splitlines()[-12:] == first.splitlines()[-12:]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_stopped_quickstart_goes_on_where_it_stopped(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quick"

    def broken(out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_export", broken)
        assert CliRunner().invoke(app, ["quickstart", "--out", str(out)]).exit_code != 0
    trained = (out / "run" / "run.json").stat().st_mtime_ns
    run(out)
    assert (out / "run" / "run.json").stat().st_mtime_ns == trained


def test_another_folder_or_seed_is_refused_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    done = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_nano_is_what_its_card_says() -> None:
    weights = NANO / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a mapping)
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    sizes = [1] * len(shapes)
    for at, shape in enumerate(shapes):
        for side in shape:
            sizes[at] *= side
    assert sum(sizes) <= 8_000_000
    model = load_model("nano")
    assert model.tiling.tile_size == 112
    assert model.tiling.tokens_per_tile == 16
    assert model.tiling.max_tiles == 1
    assert model.template.name == "internlm2-chat"
    assert (NANO / "README.md").is_file()
    assert (NANO / "NOTICE").is_file()
