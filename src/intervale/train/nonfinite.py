"""A step whose loss or gradient is no number: the run stops, its weights untouched, and the step's batches are kept for study.

    RUN/nonfinite/step-00000012/   about.json (items, loss of each micro-batch), batch-0.safetensors ... (ids, targets, tiles)

A process of several adds its rank to the folder's name. Cost: the bytes of one step's tiles.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from intervale.core.errors import UserError
from intervale.core.files import staged_folder, write_json
from intervale.train.batches import Batch

NONFINITE = "nonfinite"
_TENSORS = ("ids_1T", "positions_1T", "labelled_N", "targets_N", "tiles_PHWC")


def keep_step(run: Path, rank: int, step: int, batches: Sequence[Batch], losses: Sequence[float], about: dict[str, Any]) -> UserError:
    """Write step `step` (from 1) of this process, and return the error that stops the run. `losses`: the sum of each micro-batch."""
    folder = run / NONFINITE / (f"step-{step:08d}" + (f"-rank{rank}" if rank else ""))
    told = [
        {
            "file": f"batch-{number}.safetensors",
            "items": list(batch.ids),
            "targets": batch.targets,
            "loss": repr(loss / max(1, batch.targets)),  # as text: JSON has no NaN
        }
        for number, (batch, loss) in enumerate(zip(batches, losses, strict=True))
    ]
    kept = f"its batches are kept in {folder}"
    try:
        if folder.is_dir():
            shutil.rmtree(folder)  # the same step met again after --resume
        with staged_folder(folder) as aside:
            for number, batch in enumerate(batches):
                save_file({name: getattr(batch, name).cpu().contiguous() for name in _TENSORS}, aside / f"batch-{number}.safetensors")
            write_json(aside / "about.json", {"step": step, "rank": rank, **about, "batches": told})
    except UserError as error:
        kept = f"its batches could not be kept: {error.what}"  # what stops the run is told all the same
    bad = next((batch.ids for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)), ())
    where = f"; the items {', '.join(bad)} gave it" if bad else ""
    return UserError(
        f"step {step}: the loss is {about['loss']} and the gradient norm {about['gradient_norm']}{where}; "
        f"the weights were not changed by this step, and {kept}",
        "look at these items; lower train.learning_rate, or use train.precision: fp32 (--resume --accept-changes goes on from the last checkpoint)",
    )


def no_held_out_loss(step: int, names: Sequence[str], size: int, losses: Sequence[float]) -> UserError:
    """What stops a run whose held-out loss is no number: its weights are of no use, so this step is not saved. `losses`: the sum of each
    `size` of the items `names`."""
    bad = [name for at, loss in enumerate(losses) if not math.isfinite(loss) for name in names[at * size : (at + 1) * size]]
    shown = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
    which = f"all of its {len(names)} items" if len(bad) == len(names) else f"its items {shown}"
    return UserError(
        f"step {step}: the held-out loss is no number" + (f" on {which}" if bad else "") + "; the weights of this step are not saved",
        "lower train.learning_rate, or use train.precision: fp32 (--resume --accept-changes goes on from the last checkpoint)",
    )
