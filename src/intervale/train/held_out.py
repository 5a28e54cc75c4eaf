"""The loss on items that are never learned from, now and then during a run.

Promises: of every item, once; a run that is asked to stop does not wait for it, and makes it when it goes on. Cost: a forward pass of
all held-out items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from intervale.data.dataset import load_item
from intervale.train.batches import Batch, collate
from intervale.train.nonfinite import no_held_out_loss
from intervale.train.parallel import of_all, sum_values
from intervale.train.prepare import set_modes
from intervale.train.running import Loop
from intervale.train.step import held_out
from intervale.train.strategy import idle_passes


class _AskedToStopError(Exception):
    """A signal has come."""


def due(loop: Loop) -> bool:
    """Has the present step an evaluation that has not been made?"""
    step, every = loop.progress.step, loop.job.recipe.train.eval_steps
    here = step > 0 and (step == loop.total or (every is not None and step % every == 0))
    return bool(loop.job.held) and here and all(step != scored for scored, _ in loop.scores.seen)


def evaluate(loop: Loop) -> dict[str, Any] | None:
    """A line for metrics.jsonl: the loss on the held-out items, with the adapter as it is now, and the share of right target tokens.

    None when one process alone was asked to stop (several end it together). Raises: UserError when the loss is no number.
    """
    job = loop.job
    set_modes(loop.network, job.recipe, False)
    records = job.held[loop.world.rank :: loop.world.size]
    size, side = job.recipe.train.batch_size, job.side
    if loop.fit.tokens:  # where a step has to do with less at once, so has this
        size = max(1, min(size, loop.fit.tokens // max(1, job.longest)))

    def batches() -> Iterator[Batch]:
        for at in range(0, len(records), size):
            if loop.stop is not None and loop.world.size == 1:
                raise _AskedToStopError
            items = [load_item(record, side.tokenizer, side.template, side.tiling, loop.cache) for record in records[at : at + size]]
            yield collate(items, loop.compute.image_token_id)

    own = -(-len(records) // size)
    (passes,) = of_all(loop.world, [float(own)])
    idle = idle_passes(own, max(passes), loop.strategy, loop.spare)
    try:
        sums = held_out(loop.network, batches(), replace(loop.compute, kept=None), loop.strategy, idle)
    except _AskedToStopError:
        return None
    finally:
        set_modes(loop.network, job.recipe, True)
    loss, correct, targets = sum_values(loop.world, [sums.loss, float(sums.correct), float(sums.targets)])
    if not math.isfinite(loss):
        loop.settle()
        raise no_held_out_loss(loop.progress.step, [record.id for record in records], size, sums.each)
    return {"step": loop.progress.step, "eval_loss": loss / targets, "eval_token_accuracy": correct / targets, "eval_items": len(job.held)}
