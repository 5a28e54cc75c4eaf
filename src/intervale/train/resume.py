"""Where a run goes on: the newest checkpoint that verifies, after what a crash left has been cleared away.

Promises: what was skipped is told with its reason; a changed recipe, data or base is refused field by field, or told when it
was asked for. The order of the data and all random numbers follow from seed and step, so nothing is replayed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from intervale.core.errors import UserError
from intervale.core.files import disk_errors, read_object
from intervale.core.lang import say
from intervale.model.adapt import CHECKPOINTS
from intervale.train.job import Job, changed_since
from intervale.train.state import STATE, Progress, choose_checkpoint, restore_weights, stored_moments

SKIPPED = "skipped.jsonl"


def sweep(run: Path) -> None:
    """Remove what a killed process had not finished: half-built checkpoints and files beside their targets. Hold the run's lock."""
    for place in (run, run / CHECKPOINTS):
        for left in place.glob(".*.partial"):
            with disk_errors(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def already_skipped(run: Path) -> set[str]:
    """The ids of the items that the run has listed as unreadable so far."""
    path = run / SKIPPED
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError):
            continue  # half a line: the item will be met again
    return found


def list_skipped(run: Path, name: str, why: str) -> None:
    """Add an unreadable item to RUN/skipped.jsonl. Raises: UserError on a full disk."""
    path = run / SKIPPED
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"id": name, "why": why}, ensure_ascii=False) + "\n")


def go_on(job: Job, network: torch.nn.Module, accept_changes: bool) -> tuple[Progress, dict[str, dict[str, torch.Tensor]]]:
    """Restore the weights of the newest checkpoint that verifies; returns where it stands and its moments (none, at step 0, when none does).

    The network must still be whole. Raises: UserError listing what changed since (unless `accept_changes`), or when the tensors do not fit.
    """
    chosen, skipped = choose_checkpoint(job.folder)
    for line in skipped:
        job.tell(say(f"skipped {line}", f"跳过 {line}"))
    if chosen is None:
        job.tell(say("no checkpoint to resume from: starting at step 0", "没有可恢复的检查点：从第 0 步开始"))
        return Progress(), {}
    changed = changed_since(read_object(chosen / STATE, "identity")["identity"], job)
    if changed and not accept_changes:
        raise UserError(
            f"{job.folder}: this is not the run that was started: " + "; ".join(changed),
            "undo the changes, go on with them (--resume --accept-changes), or use --fresh to start over (the old run is kept)",
        )
    for line in changed:
        job.tell(say(f"changed since, as accepted: {line}", f"已接受的改动：{line}"))
    progress = restore_weights(chosen, network)
    job.tell(say(f"resuming from {chosen} (step {progress.step})", f"从 {chosen} 恢复（第 {progress.step} 步）"))
    return progress, stored_moments(chosen, network)
