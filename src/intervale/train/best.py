"""The held-out scores of a run: which checkpoint is the best, and when to stop because none is better any more.

Promises: the lowest held-out loss is the best; its checkpoint is written at that step and outlives rotation; a resumed run knows the
scores of before (metrics.jsonl). Cost: a checkpoint whenever a score is the lowest so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.core.runlog import read_metrics
from intervale.model.adapt import CHECKPOINTS


@dataclass
class Scores:
    """(step, held-out loss) of every evaluation so far; a tie keeps the earlier."""

    seen: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest loss."""
        return min(self.seen, key=lambda score: (score[1], score[0])) if self.seen else None

    @property
    def name(self) -> str | None:
        """The best step's checkpoint."""
        return f"step-{self.best[0]:08d}" if self.best else None

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        return sum(step > self.best[0] for step, _ in self.seen) if self.best else 0

    def add(self, step: int, loss: float) -> bool:
        """Note a score; is it the best so far?"""
        self.seen = [score for score in self.seen if score[0] != step] + [(step, loss)]
        return self.best == (step, loss)

    def told(self) -> dict[str, Any]:
        """For run.json; empty without a score."""
        return {"best": {"step": self.best[0], "eval_loss": self.best[1], "checkpoint": self.name}} if self.best else {}


def scores_of(run: Path) -> Scores:
    """What metrics.jsonl holds."""
    return Scores([(entry["step"], entry["eval_loss"]) for entry in read_metrics(run) if "eval_loss" in entry])


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the lowest held-out loss of a run. Raises: UserError when there is none."""
    if not (run / "run.json").is_file():
        raise UserError(
            f"{run} is not a training run, so none of its checkpoints is the best", "leave --best out, or name the run's folder"
        )
    best = read_object(run / "run.json", "status").get("best")
    folder = run / CHECKPOINTS / str(best["checkpoint"]) if isinstance(best, dict) and "checkpoint" in best else None
    if folder is None or not folder.is_dir():
        raise UserError(f"{run}: no checkpoint has a held-out score", "train with data.eval and train.eval_steps, or leave --best out")
    return folder
