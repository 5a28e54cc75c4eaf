"""`intervale train --export`: the run and its model in one command, refused before the training where it could not be written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from intervale.cli.main import app
from intervale.core.errors import OutsideError
from intervale.train.loop import Outcome


def train(recipe: Path, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["--lang", "en", "train", str(recipe), *more])
    return done.exit_code, f"{done.output}{getattr(done.exception, 'what', '')}"


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERVALE_DEVICE", "cpu")
    (tmp_path / "r.yaml").write_text(
        f"model: {tiny}\nout: {tmp_path / 'run'}\ndata: {{train: {plates / 'train.jsonl'}, max_tiles: 2}}\n"
        "lora: {rank: 4, alpha: 16}\ntrain: {max_steps: 2, learning_rate: 5e-3}\n"
    )
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("to", ["hf", "official"])
def test_the_model_is_the_one_that_export_makes_of_the_run(recipe: Path, tmp_path: Path, to: str) -> None:
    code, said = train(recipe, "--export", str(tmp_path / "here"), "--format", to)
    assert code == 0, said
    assert f"{tmp_path / 'here'} ({to})" in said
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "there"), "--format", to])
    assert done.exit_code == 0, done.output
    here, there = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("here", "there"))
    assert here == there
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_folder_that_holds_something_is_refused_before_the_training(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    code, said = train(recipe, "--export", str(tmp_path / "model"))
    assert code != 0
    assert "already exists" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_has_nothing_to_export(recipe: Path, tmp_path: Path) -> None:
    code, said = train(recipe, "--export", str(tmp_path / "model"), "--dry-run")
    assert code != 0
    assert "nothing to export" in said


def test_a_run_that_is_complete_already_is_exported(recipe: Path, tmp_path: Path) -> None:
    assert train(recipe)[0] == 0
    code, said = train(recipe, "--resume", "--export", str(tmp_path / "model"))
    assert code == 0, said
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["run", "run/model", ".", "..", "file", "file/model", "link", "closed/model"])
def test_a_place_that_cannot_be_written_is_told_before_the_training(recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "closed").mkdir(mode=0o500)
    if name.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("root may write everywhere")
    code, said = train(recipe, "--export", str(tmp_path / name))
    assert code != 0
    assert "already exists" in said or "--export" in said
    assert not (tmp_path / "run").exists()


def test_format_alone_is_refused(recipe: Path, tmp_path: Path) -> None:
    code, said = train(recipe, "--format", "official")
    assert code != 0
    assert "--format is about --export" in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_is_not_exported_and_that_is_said(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> Outcome:
        return Outcome("stopped", tmp_path / "run", 1, 130)

    def cut(*_: object, **__: object) -> Outcome:
        raise KeyboardInterrupt

    for end in (stopped, cut):
        monkeypatch.setattr("intervale.train.loop.train", end)
        code, said = train(recipe, "--export", str(tmp_path / "model"))
        assert code == 130
        assert "nothing was exported" in said
        assert not (tmp_path / "model").exists()


def test_an_export_that_fails_leaves_the_run_and_says_so(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OutsideError("the logits differ", "try again")

    monkeypatch.setattr("intervale.export.export.export", broken)
    code, said = train(recipe, "--export", str(tmp_path / "model"))
    assert code != 0
    assert "the logits differ" in said
    assert "is complete: `intervale export` takes it" in said
    assert (tmp_path / "run" / "run.json").is_file()


def test_of_several_processes_the_first_exports(recipe: Path, tmp_path: Path) -> None:
    words = ["--set", "parallel.processes=2", "--set", "parallel.strategy=ddp", "--export", str(tmp_path / "model")]
    done = subprocess.run([sys.executable, "-m", "intervale", "--lang", "en", "train", str(recipe), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensors changed") + done.stdout.count("tensors changed") == 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_sigterm_during_the_export_leaves_the_run_and_says_so(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("intervale.export.export.export", ended)
    code, said = train(recipe, "--export", str(tmp_path / "model"))
    assert code == 143
    assert "nothing was exported" in said
    assert "is complete" in said
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
