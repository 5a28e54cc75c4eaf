"""An evaluation finds the features that training wrote, writes others only where it is told, and is the straight one when continued."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from intervale.core.config import load_recipe
from intervale.core.files import read_json
from intervale.evaluate import batches as batching
from intervale.evaluate import features as featuring
from intervale.evaluate import run as running
from intervale.evaluate.folder import SUMMARY, read_predictions
from intervale.evaluate.kept_features import FEATURES
from intervale.evaluate.run import evaluate, plan
from intervale.train.loop import train
from intervale.train.recipe import TrainRecipe


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "nowhere"))


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiles of every pass through the tower from now on."""
    seen: list[int] = []
    for name in ("encode_tiles", "tower_tiles"):
        real = getattr(featuring, name)
        monkeypatch.setattr(featuring, name, lambda model, tiles, real=real: seen.append(len(tiles)) or real(model, tiles))
    return seen


def go(model: Path, data: Path, out: Path, told: list[str] | None = None, **options: Any) -> dict[str, Any]:
    job = plan(str(model), data, out, mode="likelihood", device="cpu", **options)
    return evaluate(job, fresh=False, tell=(told if told is not None else []).append)


def sums(out: Path) -> list[float]:
    return [score["sum"] for line in read_predictions(out) for score in line["scores"]]


def trained(folder: Path, tiny: Path, plates: Path, store: Path, *overrides: str, said: list[str] | None = None) -> Path:
    """A run of two steps with its features in `store`."""
    folder.mkdir()
    lines = [
        f"model: {tiny}",
        f"out: {folder / 'run'}",
        f"data: {{train: {plates / 'train.jsonl'}, max_length: 600, features_dir: {store}}}",
        "lora: {rank: 4, alpha: 8, dropout: 0}",
        "train: {max_steps: 2, batch_size: 2, accumulation: 2, learning_rate: 1.0e-3, precision: fp32}",
    ]
    (folder / "r.yaml").write_text("\n".join(lines))
    recipe = load_recipe(folder / "r.yaml", TrainRecipe, overrides)
    train(recipe, "r", resume=False, fresh=False, dry_run=False, tell=(said if said is not None else []).append)
    return folder / "run"


@pytest.mark.parametrize("frozen", [(), ("train.projector=frozen",)], ids=["tower", "projected"])
def test_an_evaluation_of_a_run_reads_what_its_training_wrote(
    frozen: tuple[str, ...], tmp_path: Path, tiny: Path, plates: Path, towers: list[int]
) -> None:
    store = tmp_path / "store"
    model = trained(tmp_path / "train", tiny, plates, store, *frozen)
    entries = sorted(store.rglob("*"))
    told: list[str] = []
    summary = go(model, plates / "train.jsonl", tmp_path / "read", told)
    assert towers == []
    assert summary["features_read"] == len(read_json(tmp_path / "read" / FEATURES)["read"]) == 8
    assert any(f"8 of 8 pictures are read from {store}" in line for line in told)
    held = go(model, plates / "eval.jsonl", tmp_path / "held", told)
    assert held["features_read"] == 0
    assert sum(towers) > 0
    assert sorted(store.rglob("*")) == entries  # nothing is written where no folder was named
    shutil.rmtree(store)
    towers.clear()
    assert go(model, plates / "train.jsonl", tmp_path / "computed")["features_read"] == 0
    assert sum(towers) > 0
    assert sums(tmp_path / "read") == pytest.approx(sums(tmp_path / "computed"), abs=1e-4)


def test_other_tiles_or_a_trained_tower_are_other_features(tmp_path: Path, tiny: Path, plates: Path, towers: list[int]) -> None:
    store = tmp_path / "store"
    model = trained(tmp_path / "train", tiny, plates, store)
    assert go(model, plates / "train.jsonl", tmp_path / "tiles", max_tiles=1, limit=3)["features_read"] == 0
    assert towers
    changed = trained(tmp_path / "vision", tiny, plates, store, "train.vision=lora", "lora.targets=llm+vision")
    told: list[str] = []
    towers.clear()
    assert go(changed, plates / "train.jsonl", tmp_path / "changed", told, features=store)["features_read"] == 0
    assert sum(towers) > 0
    assert any("vision tower was trained" in line for line in told)


def test_a_named_folder_is_written_for_the_next_evaluation_and_for_training(
    tmp_path: Path, tiny: Path, plates: Path, towers: list[int]
) -> None:
    store = tmp_path / "store"
    first = go(tiny, plates / "train.jsonl", tmp_path / "first", features=store)
    assert first["features_read"] == 0
    assert len(list(store.rglob("*.feat"))) == 8
    towers.clear()
    second = go(tiny, plates / "train.jsonl", tmp_path / "second", features=store)
    assert (second["features_read"], towers) == (8, [])
    assert sums(tmp_path / "second") == pytest.approx(sums(tmp_path / "first"), abs=1e-4)
    go(tiny, plates / "train.jsonl", tmp_path / "plain")
    assert sums(tmp_path / "plain") == sums(tmp_path / "first")  # to keep the tower's part changes no bit
    said: list[str] = []
    trained(tmp_path / "run", tiny, plates, store, said=said)
    assert any("8 pictures, 8 of them kept already" in line for line in said)


def stopped(monkeypatch: pytest.MonkeyPatch, lines: int, *given: Any, **options: Any) -> None:
    real = running.append_prediction
    left = [lines]

    def stopping(out: Path, line: dict[str, Any]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(out, line)

    with monkeypatch.context() as patch:
        patch.setattr(running, "append_prediction", stopping)
        with pytest.raises(KeyboardInterrupt):
            go(*given, **options)


@pytest.mark.parametrize("lines", [1, 3, 5])
def test_a_continued_evaluation_reads_what_it_began_with_and_nothing_that_came_later(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    monkeypatch.setattr(batching, "ROWS", 2)
    for name in ("straight", "continued"):
        go(tiny, plates / "train.jsonl", tmp_path / f"fill-{name}", features=tmp_path / f"store-{name}", limit=3)
    straight = go(tiny, plates / "train.jsonl", tmp_path / "straight", features=tmp_path / "store-straight")
    store = tmp_path / "store-continued"
    stopped(monkeypatch, lines, tiny, plates / "train.jsonl", tmp_path / "out", features=store)
    assert len(list(store.rglob("*.feat"))) > 3
    continued = go(tiny, plates / "train.jsonl", tmp_path / "out", features=store)
    assert sums(tmp_path / "out") == sums(tmp_path / "straight")
    assert {key: value for key, value in continued.items() if key != "seconds"} == {
        key: value for key, value in straight.items() if key != "seconds"
    }


def test_features_that_are_gone_when_an_evaluation_goes_on_are_computed_and_told(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "ROWS", 2)
    store = tmp_path / "store"
    straight = go(tiny, plates / "train.jsonl", tmp_path / "fill", features=store)
    stopped(monkeypatch, 2, tiny, plates / "train.jsonl", tmp_path / "out", features=store)
    shutil.rmtree(store)
    told: list[str] = []
    assert go(tiny, plates / "train.jsonl", tmp_path / "out", told, features=store)["accuracy"] == straight["accuracy"]
    assert sum("computed again" in line for line in told) == 6
    assert sums(tmp_path / "out") == pytest.approx(sums(tmp_path / "fill"), abs=1e-4)
    assert (tmp_path / "out" / SUMMARY).is_file()
