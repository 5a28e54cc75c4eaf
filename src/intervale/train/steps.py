"""The steps of a run: loading, the step itself, its metrics, held-out loss and saving; and what is done when memory ends.

Promises: metrics.jsonl and loss.png exist from the first step on; the order of the data and the dropout masks are functions of the
seed and the step; a step that finds no memory is made again, the same, in smaller packs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from intervale.core.errors import UserError
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.core.runlog import append_metrics
from intervale.data.dataset import Item, TileCache, load_item
from intervale.data.images import PictureError
from intervale.data.order import deal
from intervale.train.batches import Batch, Loaded, Packing, load_ahead, load_step
from intervale.train.held_out import due, evaluate
from intervale.train.job import Job, write_run
from intervale.train.memory import after_first_step, in_words, lower
from intervale.train.moving import moved
from intervale.train.nonfinite import keep_step
from intervale.train.parallel import World, of_all, sum_values, wait
from intervale.train.plot import draw_losses
from intervale.train.prepare import draws_masks, set_modes, used_memory
from intervale.train.resume import SKIPPED, already_skipped, list_skipped
from intervale.train.running import Loop
from intervale.train.saving import beside
from intervale.train.schedule import learning_rate
from intervale.train.state import Progress, save_checkpoint
from intervale.train.step import Sums, accumulate
from intervale.train.strategy import idle_passes

_PLOT_SECONDS, _TELL_SECONDS = 60.0, 5.0
_TILES_KEPT = 1 << 30  # bytes of decoded tiles
_BAD_SHARE = 0.01  # more unreadable items than this and the data set, not an item, is what is wrong
_SHAPES = 64  # lengths an octave beside a GPU, whose attention kernels are set up for every new shape


def tile_cache(job: Job, world: World) -> TileCache:
    """One cache for all loading threads; loading processes have one each, which together must not take more."""
    each = max(1, job.recipe.data.workers) if world.device.type == "cuda" else 1
    return TileCache(_TILES_KEPT // each)


def _list_bad(loop: Loop, bad: list[tuple[str, UserError]]) -> None:
    """What could not be read stops the run, or (`on_bad_sample: skip`) is listed once in skipped.jsonl while it is a small share."""
    job = loop.job
    if bad and loop.world.size > 1:
        loop.skipped |= already_skipped(job.folder)  # what the others have listed meanwhile
    for name, error in bad:
        if job.recipe.data.on_bad_sample == "fail" or not isinstance(error, PictureError):
            raise error
        if name not in loop.skipped:
            loop.skipped.add(name)
            list_skipped(job.folder, name, error.what)
        if len(loop.skipped) > max(1, _BAD_SHARE * len(job.train)):
            raise UserError(
                f"{len(loop.skipped)} of {len(job.train)} items cannot be read, more than the {_BAD_SHARE:.0%} that data.on_bad_sample: skip "
                f"leaves out; the last: {error.what}",
                f"they are listed in {job.folder / SKIPPED}; correct or remove them (`intervale check` finds all)",
            ) from error


def _loader(loop: Loop) -> Iterator[Loaded]:
    """The steps that are left, made ahead, in packs as the memory allows now."""
    job, world, recipe = loop.job, loop.world, loop.job.recipe
    order = job.order(loop.share)
    groups = job.train.groups() if loop.share and world.size > 1 else None
    image_token, beside_gpu = loop.compute.image_token_id, world.device.type == "cuda"
    packing = Packing(
        recipe.train.batch_size, loop.fit.tokens, loop.share, _SHAPES if beside_gpu else 0, draws_masks(loop.network.model.vision_tower)
    )
    cache, known = loop.cache, loop.known
    loop.saver.finish()  # loading processes are forked, and a thread in the middle of a save may hold a lock that they would wait for

    def load(record: Record) -> Item:
        side = job.side
        return load_item(record, side.tokenizer, side.template, side.tiling, cache, known, recipe.data.max_length)

    def step(number: int) -> Loaded:
        items = order.step(job.a_step, number)
        if world.size > 1:  # as many tokens each; those on one picture stay together
            items = deal(items, job.measured.costs(items), world.size, groups[items] if groups is not None else None)[world.rank]
        return load_step(job.train, load, [int(i) for i in items], packing, image_token)

    return load_ahead(step, loop.progress.step, loop.total, recipe.data.workers, beside_gpu)


def run_steps(loop: Loop) -> None:
    """All steps that are left, or those until a signal. Raises: UserError; MemoryError or torch's own when nothing smaller is left."""
    set_modes(loop.network, loop.job.recipe, True)
    report = _Report(loop)
    if due(loop):  # the run was stopped before this step's evaluation, or during it
        score = _score(loop)
        if score is None:
            return
        if score:
            _keep_best(loop)
    while not _run_in_packs(loop, report):  # memory ended: the same step again, in packs of another size
        pass


def _run_in_packs(loop: Loop, report: _Report) -> bool:
    """Steps until the end, a signal or the end of memory; False for the latter."""
    for loaded in moved(_loader(loop), loop.compute):
        _list_bad(loop, loaded.bad)
        first = loop.progress.step == report.done
        made = _one_step(loop, loaded.batches)
        if made is None:
            return False
        entry, stop = made
        report.step(entry)
        again = first and _refitted(loop, max((batch.tokens for batch in loaded.batches), default=0))  # before a save takes memory
        stopping = _after_step(loop, stop or (loop.stop is not None and loop.world.size == 1))
        if stopping or loop.progress.step >= loop.total:
            return True
        if again:
            return False
    return True


def _refitted(loop: Loop, tokens: int) -> bool:
    """After the first step: has what it took led to another plan for packs that are larger than its own?"""
    fit = after_first_step(loop.fit, loop.world.device, loop.job.longest, tokens)
    if loop.world.size > 1 or fit == loop.fit:
        return False
    loop.refit(fit)
    told = in_words(fit, loop.job.recipe)
    loop.job.tell(say(f"memory, measured in the first step: {told}", f"第一步实测的内存：{told}"))
    return loop.progress.step < loop.total


class _Report:
    """What a step leaves: a line of metrics, now and then a line of text and the plot."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self.done = loop, loop.progress.step
        self._started = self._plotted = self._told = time.monotonic()

    def step(self, entry: dict[str, Any]) -> None:
        """Write the entry of the step that was made."""
        loop, now = self._loop, time.monotonic()
        if not loop.world.first:
            return
        note(loop, entry)
        first = loop.progress.step == self.done + 1
        if first:
            loop.job.tell(say(f"first step after {now - loop.begun:.1f} s", f"{now - loop.begun:.1f} 秒后完成第一步"))
        if "loss" in entry and (now - self._told > _TELL_SECONDS or first or loop.progress.step == loop.total):
            _tell_progress(loop, entry, (now - self._started) / (loop.progress.step - self.done))
            self._told = now
        if now - self._plotted > _PLOT_SECONDS or first:
            draw_losses(loop.job.folder)
            self._plotted = time.monotonic()


def _gradients(loop: Loop, batches: list[Batch], targets: int, idle: list[Batch]) -> Sums | None:
    """The sums of the step, gradients added up; None when memory ended here or in another process and the plan is a smaller one now."""
    fault: BaseException | None = None
    sums, saving = Sums(), loop.saver.busy
    try:
        sums = _accumulated(loop, batches, targets, idle)
    except torch.OutOfMemoryError as error:
        if loop.strategy.uniform:  # others wait in the middle of a pass and cannot be asked: this process ends, and its launcher ends them
            raise
        fault = error.with_traceback(None)  # whose frames hold the step's tensors
    if loop.strategy.uniform:
        return sums
    faults, savers = sum_values(loop.world, [float(fault is not None), float(saving)])
    if not faults:
        return sums
    if savers:
        loop.saver.finish()  # its copies may be what was missing
    fit = loop.fit if savers else lower(loop.fit, loop.job.recipe, loop.job.longest)
    if fit is None:
        raise fault or torch.OutOfMemoryError("another process has no memory left")
    loop.optimizer.zero_grad(set_to_none=True)
    loop.refit(fit)
    gc.collect()
    if loop.world.device.type == "cuda":
        torch.cuda.empty_cache()
    told = say("the memory of a save that has ended", "保存结束后的内存") if savers else in_words(fit, loop.job.recipe)
    loop.job.tell(say(f"memory ended; the same step again with {told}", f"内存不足；改用{told}，重做这一步"))
    return None


def _accumulated(loop: Loop, batches: list[Batch], targets: int, idle: list[Batch]) -> Sums:
    """Add the step's gradients up. Layers that cannot be compiled on this machine are walked as they are, unless the recipe insists."""
    try:
        return accumulate(loop.network, batches, loop.compute, targets, loop.strategy, idle)
    except TorchDynamoException as error:
        why = " ".join(str(error).split())[:300]
        if loop.job.recipe.train.compile == "on" or loop.strategy.uniform:
            raise UserError(f"the layers cannot be compiled here: {why}", "set train.compile: off") from error
        loop.job.tell(say(f"the layers cannot be compiled here ({why}); they are not", f"此处无法编译各层（{why}），改为不编译"))
    loop.compute = replace(loop.compute, walk=replace(loop.compute.walk, compiled=False))
    loop.optimizer.zero_grad(set_to_none=True)
    _seed(loop)
    return accumulate(loop.network, batches, loop.compute, targets, loop.strategy, idle)


def _seed(loop: Loop) -> None:
    """Dropout: a function of seed, step and process."""
    torch.manual_seed((loop.job.recipe.train.seed * 1_000_003 + loop.progress.step) * loop.world.size + loop.world.rank)


def _one_step(loop: Loop, batches: list[Batch]) -> tuple[dict[str, Any], bool] | None:
    """Make a step; its entry for the metrics and whether the run was asked to stop, or None when it must be made again with what is
    planned now. That question goes with the losses, once a step: the GPUs are idle while the hosts exchange numbers after a step."""
    recipe, world = loop.job.recipe.train, loop.world
    begun = time.monotonic()
    step = loop.progress.step
    _seed(loop)
    targets_of, passes_of = of_all(world, [float(sum(batch.targets for batch in batches)), float(len(batches))])
    targets = int(sum(targets_of))
    rate = learning_rate(step, loop.total, recipe.learning_rate, recipe.warmup_ratio, recipe.schedule)
    norm = 0.0
    sums: Sums | None = Sums()
    if targets:
        for group in loop.optimizer.param_groups:
            group["lr"] = rate
        loop.optimizer.zero_grad(set_to_none=True)
        sums = _gradients(loop, batches, targets, idle_passes(len(batches), max(passes_of), loop.strategy, loop.spare))
        if sums is None:
            return None
        norm = loop.strategy.clip(recipe.max_norm)
    assert sums is not None
    *counted, stops = of_all(world, [sums.loss, float(sums.samples), float(sums.positions), float(loop.stop or 0)])
    loss, samples, positions = (sum(each) for each in counted)
    mean = loss / targets if targets else 0.0
    if not math.isfinite(mean) or not math.isfinite(norm):
        about = {
            "loss": repr(mean),
            "gradient_norm": repr(norm),
            "learning_rate": rate,
            "seed": recipe.seed,
            "precision": str(loop.compute.dtype),
        }
        loop.settle()
        raise keep_step(loop.job.folder, world.rank, step + 1, batches, sums.each, about)
    if targets:
        loop.strategy.step()
    seconds = time.monotonic() - begun
    before = loop.progress
    loop.progress = Progress(step + 1, before.samples + int(samples), before.tokens + targets, before.seconds + seconds)
    numbers = {"loss": mean, "learning_rate": rate, "gradient_norm": norm} if targets else {}  # nothing to learn from gives no loss
    agreed = int(max(stops))  # all processes stop at the same step, whichever got the signal; one that came later counts at the next step
    if agreed:
        loop.stop = agreed
    return _entry(loop, numbers, (int(samples), targets, int(positions)), seconds), bool(agreed)


def _entry(loop: Loop, numbers: dict[str, float], counts: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl. `counts`: samples, targets, positions. The epoch is the place in the data, unreadable items included."""
    samples, targets, positions = counts
    steps = -(-loop.an_epoch // loop.job.a_step)
    epoch, place = divmod(loop.progress.step, steps)
    return {
        "step": loop.progress.step,
        "epoch": round(epoch + place * loop.job.a_step / loop.an_epoch, 4),
        **numbers,
        "samples": samples,
        "targets": targets,
        "tokens_per_second": round(positions / seconds, 1),
        "seconds": round(seconds, 4),
        "memory_gib": round(used_memory(loop.world.device), 3),
    }


def _tell_progress(loop: Loop, entry: dict[str, Any], seconds_a_step: float) -> None:
    left = int((loop.total - entry["step"]) * seconds_a_step)
    loop.job.tell(
        say(
            f"step {entry['step']}/{loop.total}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  {entry['memory_gib']:.1f} GiB  {left // 60}:{left % 60:02d} left",
            f"第 {entry['step']}/{loop.total} 步  轮次 {entry['epoch']:.2f}  损失 {entry['loss']:.4f}  学习率 {entry['learning_rate']:.2e}  "
            f"{entry['tokens_per_second']:,.0f} token/秒  {entry['memory_gib']:.1f} GiB  剩余 {left // 60}:{left % 60:02d}",
        )
    )


def note(loop: Loop, entry: dict[str, Any]) -> None:
    """An entry to metrics.jsonl, and to whatever else listens."""
    append_metrics(loop.job.folder, entry)
    if loop.trackers is not None:
        loop.trackers.log(entry)


def _after_step(loop: Loop, stopping: bool) -> bool:
    """Evaluate and save where it is time; is the run to stop? One that is stops with this step saved: its evaluation is made when it goes on."""
    recipe = loop.job.recipe.train
    best = False
    loop.saver.check()
    evaluated = due(loop) and not stopping
    if evaluated:
        score = _score(loop)
        best, stopping = bool(score), score is None
    saved = best or stopping or loop.progress.step == loop.total or loop.progress.step % recipe.save_steps == 0
    if best:
        _keep_best(loop)
    elif saved:
        save(loop)
    if stopping or loop.progress.step >= loop.total:
        loop.saver.finish()  # here, where the others wait: when one has left, its launcher ends them
    if evaluated or saved:  # what the first does alone
        wait(loop.world)
    return stopping


def _score(loop: Loop) -> bool | None:
    """Evaluate: is this step the best so far? None when the run was asked to stop meanwhile."""
    try:
        entry = evaluate(loop)
    except PictureError:
        if loop.world.size == 1:  # several would have to agree; the steps that were made are not the picture's fault
            save(loop)
        raise
    if entry is None:
        return None
    if loop.world.first:
        note(loop, entry)
        loop.job.tell(
            say(
                f"held-out: loss {entry['eval_loss']:.4f}, {entry['eval_token_accuracy']:.1%} of target tokens right",
                f"留出集：损失 {entry['eval_loss']:.4f}，目标 token 正确率 {entry['eval_token_accuracy']:.1%}",
            )
        )
    best = loop.scores.add(loop.progress.step, float(entry["eval_loss"]))
    patience = loop.job.recipe.train.patience
    if patience and loop.scores.since_best >= patience and loop.progress.step < loop.total:
        _end_early(loop)
    return best


def _keep_best(loop: Loop) -> None:
    save(loop)
    if loop.world.first:
        loop.saver.finish()  # run.json names it
        write_run(loop.job, "running", loop.scores.told())


def _end_early(loop: Loop) -> None:
    """The run is complete with this step; all processes have the same scores."""
    loop.total = loop.progress.step
    assert loop.scores.best is not None
    step, loss = loop.scores.best
    count = loop.scores.since_best
    loop.job.tell(
        say(
            f"the held-out loss was lowest at step {step} ({loss:.4f}) and has not fallen in {count} evaluations: stopping early; "
            "`intervale export RUN DIR --best` takes that step",
            f"留出集损失在第 {step} 步最低（{loss:.4f}），此后 {count} 次评估没有下降：提前停止；`intervale export RUN DIR --best` 使用该步",
        )
    )


def save(loop: Loop) -> None:
    """Write the checkpoint of the present step: every process gives its parts, the first writes, while the steps go on if it has copies."""
    loop.saver.finish()  # whose copies are dropped before there are new ones
    tensors = loop.strategy.tensors()
    if not loop.world.first:
        return
    job, keep = loop.job, loop.job.recipe.train.save_total_limit
    given = (job.folder, loop.network, loop.optimizer, loop.progress, job.identity(), keep, tensors, loop.scores.name)
    loop.saver.begin(beside(loop.world.device, partial(save_checkpoint, *given)))
    if tensors.live:
        loop.saver.finish()
