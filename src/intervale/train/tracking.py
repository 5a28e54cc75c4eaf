"""The run's numbers in TensorBoard, W&B and SwanLab, behind one section of the recipe: `log: {tensorboard: true, wandb: PROJECT}`.

Promises: metrics.jsonl stays the record, these are copies; what is not installed or does not start is told before the first step; a
service that fails later costs its copy, never the run. Only the first process speaks. Cost: a call a step and tracker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from intervale.core.errors import OutsideError, UserError
from intervale.core.lang import say
from intervale.train.recipe import Log

_TRAIN = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_gib", "epoch")
_EVAL = {"eval_loss": "eval/loss", "eval_token_accuracy": "eval/token_accuracy"}


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class _TensorBoard:
    def __init__(self, run: Path, project: str, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _id(run: Path) -> str:
    """The same for a run and its resumption."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]


class _Wandb:
    def __init__(self, run: Path, project: str, config: Mapping[str, Any], step: int) -> None:
        import wandb

        self._run: Any = wandb.init(project=project, name=run.name, id=_id(run), resume="allow", dir=str(run), config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    def __init__(self, run: Path, project: str, config: Mapping[str, Any], step: int) -> None:
        import swanlab

        self._package: Any = swanlab
        folder = str(run / "swanlab")
        swanlab.init(project=project, experiment_name=run.name, id=_id(run), resume="allow", logdir=folder, config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


_TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "swanlab": _SwanLab,
}


def wanted(log: Log) -> dict[str, str]:
    """{tracker: project} of a recipe's section; a project that is not named is "intervale"."""
    return {name: value if isinstance(value, str) else "intervale" for name in _TRACKERS if (value := getattr(log, name))}


def need_trackers(log: Log) -> None:
    """Raise a UserError for one that is not installed."""
    for name in wanted(log):
        if find_spec(name) is None:
            raise UserError(f"log.{name} is set, but {name} is not installed", f"pip install 'intervale[{name}]', or leave log.{name} out")


class Trackers:
    """All trackers of a run, or none."""

    def __init__(self, log: Log, run: Path, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._open: dict[str, Tracker] = {}
        for name, project in wanted(log).items():
            try:
                self._open[name] = _TRACKERS[name](run, project, config, step)
            except Exception as error:
                raise OutsideError(f"log.{name} does not start: {str(error)[:300]}", f"log in to it, or leave log.{name} out") from error

    def log(self, entry: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, under the names train/... and eval/..."""
        values = {f"train/{key}": float(entry[key]) for key in _TRAIN if key in entry and "loss" in entry}
        values |= {name: float(entry[key]) for key, name in _EVAL.items() if key in entry}
        for name in list(self._open):
            self._try(name, lambda tracker: tracker.log(int(entry["step"]), values))

    def close(self) -> None:
        """Send what is left; a second call does nothing."""
        for name in list(self._open):
            self._try(name, lambda tracker: tracker.close())
        self._open.clear()

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._open[name])
        except Exception as error:  # any fault of a service that only watches
            del self._open[name]
            self._tell(
                say(
                    f"{name} stopped listening ({str(error)[:200]}); metrics.jsonl goes on",
                    f"{name} 停止记录（{str(error)[:200]}）；metrics.jsonl 继续",
                )
            )
