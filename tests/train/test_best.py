"""The best checkpoint by held-out loss is kept, named and exported; a run whose loss no longer falls stops early."""

import json
from pathlib import Path

import pytest
from test_loop import losses, run, write_recipe

from conftest import run_command
from intervale.core.errors import UserError
from intervale.core.runlog import read_metrics
from intervale.train import steps
from intervale.train.best import Scores, best_checkpoint, scores_of
from intervale.train.running import Loop


def scripted(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    """Held-out losses by step."""

    def evaluate(loop: Loop) -> dict[str, float]:
        step = loop.progress.step
        return {"step": step, "eval_loss": scores[step], "eval_token_accuracy": 0.5, "eval_items": 4}

    monkeypatch.setattr(steps, "evaluate", evaluate)


FALLS_THEN_RISES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 1.2, 6: 1.1}


def test_the_lowest_score_is_the_best_and_the_earlier_of_two_equal() -> None:
    scores = Scores()
    assert [scores.add(step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0))] == [True, True, False]
    assert (scores.name, scores.since_best) == ("step-00000002", 1)


def test_the_best_checkpoint_outlives_rotation_and_is_named_and_exported(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, FALLS_THEN_RISES)
    path = write_recipe(tmp_path, tiny, plates, epochs=3, eval_steps=1, save_steps=1, save_total_limit=1)
    assert run(path).step == 6
    folder = tmp_path / "run"
    assert sorted(place.name for place in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
    told = json.loads((folder / "run.json").read_text())
    assert told["best"] == {"step": 2, "eval_loss": 1.0, "checkpoint": "step-00000002"}
    assert told["stopped_early"] is False
    assert best_checkpoint(folder) == folder / "checkpoints" / "step-00000002"
    assert run_command(monkeypatch, "export", folder, tmp_path / "model", "--format", "hf", "--best") == 0
    assert "step-00000002" in capsys.readouterr().err
    assert "step-00000002" in (tmp_path / "model" / "intervale.json").read_text()


def test_a_loss_that_no_longer_falls_stops_the_run_as_complete(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, FALLS_THEN_RISES)
    path = write_recipe(tmp_path, tiny, plates, epochs=3, eval_steps=1, patience=2)
    said: list[str] = []
    outcome = run(path, said=said)
    folder = tmp_path / "run"
    assert (outcome.status, outcome.step, len(losses(folder))) == ("done", 4, 4)
    assert any("stopping early" in line for line in said)
    told = json.loads((folder / "run.json").read_text())
    assert (told["status"], told["step"], told["stopped_early"], told["best"]["step"]) == ("done", 4, True, 2)
    assert (folder / "checkpoints" / "step-00000002").is_dir()
    assert run(path).status == "done"  # complete: nothing is trained again


def test_a_resumed_run_knows_the_scores_of_before(tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, FALLS_THEN_RISES)
    path = write_recipe(tmp_path, tiny, plates, epochs=3, eval_steps=1, save_steps=1)
    folder = tmp_path / "run"
    run(path, "train.max_steps=3")
    assert scores_of(folder).best == (2, 1.0)
    (folder / "run.json").write_text('{"status": "stopped"}')
    from intervale.core.config import load_recipe
    from intervale.train.loop import train
    from intervale.train.recipe import TrainRecipe

    recipe = load_recipe(path, TrainRecipe, ["train.patience=2"])
    outcome = train(recipe, "r", resume=True, fresh=False, dry_run=False, tell=lambda text: None, accept_changes=True)
    assert outcome.step == 4  # one score before, one after
    assert [entry["step"] for entry in read_metrics(folder) if "eval_loss" in entry] == [1, 2, 3, 4]


def test_best_without_a_score_or_a_run_says_so(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    run(path, "data.eval=null")
    with pytest.raises(UserError, match="no checkpoint has a held-out score"):
        best_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match="is not a training run"):
        best_checkpoint(tiny)
    with pytest.raises(UserError, match="patience counts held-out evaluations"):
        run(path, "train.patience=2")
