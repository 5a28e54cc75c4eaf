"""A run's numbers reach the trackers as they stand in metrics.jsonl, and a tracker that fails never costs the run."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from test_loop import losses, run, write_recipe

from intervale.core.errors import OutsideError, UserError
from intervale.core.runlog import read_metrics


class Fake(types.ModuleType):
    """wandb and swanlab as far as they are used: every call is noted."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.fails_at: int | None = None

    def init(self, **options: Any) -> "Fake":
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_gets_every_number_once_and_is_closed(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    run(write_recipe(tmp_path, tiny, plates), f"log.{name}=plates")
    assert [values["train/loss"] for _, values in fake.logged if "train/loss" in values] == losses(tmp_path / "run")
    held = [entry for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert [(step, values["eval/loss"]) for step, values in fake.logged if "eval/loss" in values] == [
        (entry["step"], entry["eval_loss"]) for entry in held
    ]
    (started,) = fake.started
    assert (started["project"], fake.finished) == ("plates", 1)
    assert started["config"]["recipe"]["lora"]["rank"] == 4


def test_a_service_that_fails_is_told_once_and_the_run_goes_on(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake("wandb")
    fake.fails_at = 2
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said: list[str] = []
    assert run(write_recipe(tmp_path, tiny, plates), "log.wandb=true", said=said).status == "done"
    assert [line for line in said if "stopped listening" in line] == [
        "wandb stopped listening (the network is gone); metrics.jsonl goes on"
    ]
    assert [step for step, _ in fake.logged] == [1]
    assert fake.started[0]["project"] == "intervale"


def test_one_that_does_not_start_is_told_before_the_first_step(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake("swanlab")

    def init(**options: Any) -> None:
        raise RuntimeError("no API key")

    fake.init = init  # type: ignore[method-assign, assignment]
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    with pytest.raises(OutsideError, match=r"log\.swanlab does not start: no API key"):
        run(write_recipe(tmp_path, tiny, plates), "log.swanlab=true")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab"])
def test_one_that_is_not_installed_is_told_with_its_extra(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} is not installed") as caught:
        run(write_recipe(tmp_path, tiny, plates), f"log.{name}=true")
    assert f"intervale[{name}]" in caught.value.fix


def test_tensorboard_reads_the_losses_back_after_a_resume(tmp_path: Path, tiny: Path, plates: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write_recipe(tmp_path, tiny, plates, save_steps=2)
    run(path, "log.tensorboard=true")
    folder = tmp_path / "run"
    for file in (folder / "checkpoints" / "step-00000004").iterdir():
        file.unlink()
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"status": "running"}))
    run(path, "log.tensorboard=true", resume=True)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [found[step] for step in sorted(found)] == pytest.approx(losses(folder), rel=1e-6)
    assert len(events.Scalars("train/loss")) == 4
