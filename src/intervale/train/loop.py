"""The training loop: steps, progress, held-out loss, saving, stopping. `train` is the whole of `intervale train`.

Promises: metrics.jsonl and loss.png exist from the first step on; Ctrl-C finishes the step, saves and says how to go on; the
order of the data and the dropout masks are functions of the seed and the step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.files import locked, write_atomic
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.core.runlog import append_metrics, forget_after
from intervale.data.dataset import Item, TileCache, load_item
from intervale.data.images import PictureError
from intervale.data.order import deal
from intervale.train import job as jobs
from intervale.train.batches import Batch, Loaded, collate, load_ahead, load_step
from intervale.train.feature_cache import fill, plan_of, told
from intervale.train.job import Job
from intervale.train.nonfinite import keep_step
from intervale.train.optimizer import Optimizers, make_optimizer
from intervale.train.parallel import World, join_world, leave_world, sum_gradients, sum_values, wait
from intervale.train.plot import draw_losses
from intervale.train.prepare import GIB, free_memory, set_modes, used_memory
from intervale.train.recipe import TrainRecipe
from intervale.train.resume import already_skipped, go_on, list_skipped, sweep
from intervale.train.schedule import learning_rate
from intervale.train.state import Progress, save_checkpoint, trainable
from intervale.train.step import Compute, Sums, accumulate, held_out

_PLOT_SECONDS, _TELL_SECONDS = 20.0, 5.0
_TILES_KEPT = 1 << 30  # bytes of decoded tiles
_BAD_SHARE = 0.01  # more unreadable items than this and the data set, not an item, is what is wrong
SIGNAL_EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: 'done', 'stopped' (by a signal: `exit_code`) or 'dry'."""

    status: str
    folder: Path
    step: int
    exit_code: int = 0


@dataclass
class _Loop:
    """What the steps share. One object, so that its parts are named once."""

    job: Job
    world: World
    network: InternVLForConditionalGeneration
    optimizer: Optimizers
    compute: Compute
    cache: TileCache
    known: Mapping[str, tuple[str, int]] | None  # the pictures whose features are kept
    total: int
    progress: Progress
    share: bool = False
    an_epoch: int = 1  # items
    stop: int | None = None
    skipped: set[str] = field(default_factory=set)


def train(
    recipe: TrainRecipe, name: str, *, resume: bool, fresh: bool, dry_run: bool, tell: jobs.Tell, accept_changes: bool = False
) -> Outcome:
    """Run a recipe called `name` to its end or to a signal. Raises: UserError; what was saved before stays.

    `accept_changes` lets `resume` go on although recipe, data or base changed since; what changed is told.
    """
    job = jobs.read_job(recipe, name, tell)
    if not dry_run and not fresh:
        jobs.open_folder(job, resume, fresh)  # refuse before joining other processes or loading anything
    world = join_world(recipe.parallel.strategy, jobs.pick_device())
    if not world.first:
        job = replace(job, tell=lambda text: None)
    try:
        if dry_run:
            return _dry_run(job, world)
        with locked(job.folder) if world.first else nullcontext():
            state = jobs.open_folder(job, resume, fresh) if world.first else "resume" if resume else "new"
            if sum_values(world, [float(state == "done")])[0]:
                job.tell(say(f"{job.folder} is complete already; --fresh trains it again", f"{job.folder} 已经完成；--fresh 重新训练"))
                return Outcome("done", job.folder, job.steps(world.size))
            with jobs.guarded(job, world, state == "new"), _memory(job):
                return _train(job, world, state, accept_changes)
    finally:
        leave_world(world)


@contextmanager
def _memory(job: Job) -> Iterator[None]:
    """A device without enough memory, at the first step or a later one, is told with what to set; what was saved stays."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not gpu and not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            f"{'the GPU' if gpu else 'this machine'}'s memory is not enough for this recipe",
            "halve train.batch_size and double train.accumulation (the same mathematics), set train.checkpointing: on, or lower data.max_tiles; "
            "--resume --accept-changes goes on from the last checkpoint",
        ) from error


def _describe(job: Job, world: World, total: int) -> str:
    tokens, targets = job.measured.an_epoch()
    about = "" if job.measured.exact else say("about ", "约 ")
    share = job.per_step * world.size
    return say(
        f"{len(job.train):,} items, {about}{tokens:,} tokens ({targets:,} of them targets) an epoch; {total} steps of {share} items",
        f"{len(job.train):,} 条数据，每轮{about} {tokens:,} 个 token（其中 {targets:,} 个计入损失）；共 {total} 步，每步 {share} 条",
    )


def _dry_run(job: Job, world: World) -> Outcome:
    network, dtype, cost = jobs.plan_for(job, world)
    total = job.steps(world.size)
    tokens = job.measured.an_epoch()[0] * job.recipe.train.epochs
    longest = job.measured.longest
    lines = [
        _describe(job, world, total),
        f"steps: {total}",
        f"tokens: {tokens:,} in {job.recipe.train.epochs} epochs; the longest item has {longest:,} (data.max_length {job.recipe.data.max_length:,})",
        f"parameters: {cost.parameters:,}, trainable: {cost.trainable:,} ({cost.trainable / cost.parameters:.2%})",
        f"memory, estimated: {cost.total / GIB:.2f} GiB = weights {cost.weights / GIB:.2f} + gradients and optimizer "
        f"{cost.optimizer / GIB:.2f} + activations {cost.activations / GIB:.2f}; free on {world.device}: {free_memory(world.device) / GIB:.1f} GiB",
        f"disk: {cost.checkpoint / GIB:.2f} GiB a checkpoint, {_kept(job, total)} kept",
        f"precision: {str(dtype).removeprefix('torch.')}; features: {told(plan_of(job, network, dtype, world.size))}",
        f"out: {job.folder} (nothing was written)",
    ]
    for line in lines:
        job.tell(line)
    return Outcome("dry", job.folder, 0)


def _kept(job: Job, total: int) -> int:
    saves = -(-total // job.recipe.train.save_steps)
    limit = job.recipe.train.save_total_limit
    return saves if limit < 0 else min(saves, limit)


def _train(job: Job, world: World, state: str, accept_changes: bool) -> Outcome:
    job.tell(say(f"loading {job.base}", f"载入 {job.base}"))
    network, dtype, cost = jobs.load_for(job, world)
    plan = plan_of(job, network, dtype, world.size)
    optimizer = make_optimizer(network, job.recipe)
    total = job.steps(world.size)
    job.tell(_describe(job, world, total))
    job.tell(
        say(
            f"{cost.trainable:,} of {cost.parameters:,} parameters learn, {str(dtype).removeprefix('torch.')} on {world.device}; "
            f"features: {told(plan)}",
            f"训练 {cost.parameters:,} 个参数中的 {cost.trainable:,} 个，{str(dtype).removeprefix('torch.')}，设备 {world.device}",
        )
    )
    if world.first:
        sweep(job.folder)
    progress = go_on(job, network, optimizer, accept_changes) if state == "resume" else Progress()
    share, why_share = jobs.share_prefixes(job)
    if why_share:
        job.tell(why_share)
    kept = fill(job, world, network, dtype, plan)
    compute = Compute(dtype, world.device, job.side.tokenizer.control("<IMG_CONTEXT>"), kept)
    known = kept.known if kept else None
    loop = _Loop(job, world, network, optimizer, compute, _tile_cache(job, world), known, total, progress, share, len(job.order()))
    loop.skipped |= already_skipped(job.folder)
    if world.first:
        jobs.write_run(job, "running")
        forget_after(job.folder, progress.step)
        write_atomic(job.folder / "recipe.json", job.recipe.model_dump_json(indent=2) + "\n")
    wait(world)
    with _signals(loop):
        _steps(loop)
    return _finish(loop)


def _tile_cache(job: Job, world: World) -> TileCache:
    """One cache for all loading threads; loading processes have one each, which together must not take more."""
    each = max(1, job.recipe.data.workers) if world.device.type == "cuda" else 1
    return TileCache(_TILES_KEPT // each)


@contextmanager
def _signals(loop: _Loop) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if loop.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        loop.stop = number
        loop.job.tell(say("stopping after this step ...", "本步结束后停止……"))

    before = {number: signal.signal(number, handle) for number in SIGNAL_EXIT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _list_bad(loop: _Loop, bad: list[tuple[str, UserError]]) -> None:
    """What could not be read stops the run, or (`on_bad_sample: skip`) is listed once in skipped.jsonl while it is a small share."""
    job = loop.job
    for name, error in bad:
        if job.recipe.data.on_bad_sample == "fail" or not isinstance(error, PictureError):
            raise error
        if name not in loop.skipped:
            loop.skipped.add(name)
            list_skipped(job.folder, name, error.what)
        if len(loop.skipped) > max(1, _BAD_SHARE * len(job.train)):
            raise UserError(
                f"{len(loop.skipped)} items cannot be read; the last: {error.what}", "run `intervale check` on the data"
            ) from error


def _steps(loop: _Loop) -> None:
    job, world, recipe = loop.job, loop.world, loop.job.recipe

    order = job.order(loop.share)
    groups = job.train.groups() if loop.share and world.size > 1 else None
    image_token, processes = loop.compute.image_token_id, world.device.type == "cuda"

    def load(record: Record) -> Item:
        side = job.side
        return load_item(record, side.tokenizer, side.template, side.tiling, loop.cache, loop.known, recipe.data.max_length)

    def step(number: int) -> Loaded:
        items = order.step(job.per_step * world.size, number)
        if world.size > 1:  # as many tokens each; those on one picture stay together
            items = deal(items, job.measured.costs(items), world.size, groups[items] if groups is not None else None)[world.rank]
        return load_step(job.train, load, [int(i) for i in items], recipe.train.batch_size, image_token, loop.share)

    last_plot = last_tell = time.monotonic()
    started, done = time.monotonic(), loop.progress.step
    set_modes(loop.network, recipe, True)
    for loaded in load_ahead(step, loop.progress.step, loop.total, recipe.data.workers, processes):
        _list_bad(loop, loaded.bad)
        entry = _one_step(loop, loaded.batches)
        if world.first:
            append_metrics(job.folder, entry)
            now = time.monotonic()
            if now - last_tell > _TELL_SECONDS or loop.progress.step in (done + 1, loop.total):
                _tell_progress(loop, entry, (now - started) / (loop.progress.step - done))
                last_tell = now
            if now - last_plot > _PLOT_SECONDS or loop.progress.step == done + 1:
                draw_losses(job.folder)
                last_plot = time.monotonic()
        stopping = _asked_to_stop(loop)  # asked once a step, so that a signal in between cannot stop without saving
        _after_step(loop, stopping)
        if stopping:
            return


def _asked_to_stop(loop: _Loop) -> bool:
    if loop.world.size > 1:  # all processes stop at the same step, whichever got the signal
        loop.stop = int(sum_values(loop.world, [float(loop.stop or 0)])[0]) or None
    return loop.stop is not None


def _one_step(loop: _Loop, batches: list[Batch]) -> dict[str, Any]:
    recipe, world = loop.job.recipe.train, loop.world
    begun = time.monotonic()
    step = loop.progress.step
    torch.manual_seed((recipe.seed * 1_000_003 + step) * world.size + world.rank)  # dropout: a function of seed and step
    targets = int(sum_values(world, [float(sum(batch.targets for batch in batches))])[0])
    rate = learning_rate(step, loop.total, recipe.learning_rate, recipe.warmup_ratio, recipe.schedule)
    norm = 0.0
    sums = Sums()
    if targets:
        for group in loop.optimizer.param_groups:
            group["lr"] = rate
        loop.optimizer.zero_grad(set_to_none=True)
        sums = accumulate(loop.network, batches, loop.compute, targets)
        parameters = list(trainable(loop.network).values())
        sum_gradients(world, parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_norm or math.inf))
    loss, samples, positions = sum_values(world, [sums.loss, float(sums.samples), float(sums.positions)])
    mean = loss / targets if targets else 0.0
    if not math.isfinite(mean) or not math.isfinite(norm):
        about = {
            "loss": repr(mean),
            "gradient_norm": repr(norm),
            "learning_rate": rate,
            "seed": recipe.seed,
            "precision": str(loop.compute.dtype),
        }
        raise keep_step(loop.job.folder, world.rank, step + 1, batches, sums.each, about)
    if targets:
        loop.optimizer.step()
    seconds = time.monotonic() - begun
    before = loop.progress
    loop.progress = Progress(step + 1, before.samples + int(samples), before.tokens + targets, before.seconds + seconds)
    return {
        "step": step + 1,
        "epoch": round(loop.progress.samples / loop.an_epoch, 4),
        "loss": mean,
        "learning_rate": rate,
        "gradient_norm": norm,
        "samples": int(samples),
        "targets": targets,
        "tokens_per_second": round(positions / seconds, 1),
        "seconds": round(seconds, 4),
        "memory_gib": round(used_memory(world.device), 3),
    }


def _tell_progress(loop: _Loop, entry: dict[str, Any], seconds_a_step: float) -> None:
    left = int((loop.total - entry["step"]) * seconds_a_step)
    loop.job.tell(
        f"step {entry['step']}/{loop.total}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  "
        f"{entry['tokens_per_second']:,.0f} tokens/s  {entry['memory_gib']:.1f} GiB  "
        + say(f"{left // 60}:{left % 60:02d} left", f"剩余 {left // 60}:{left % 60:02d}")
    )


def _after_step(loop: _Loop, stopping: bool) -> None:
    recipe = loop.job.recipe.train
    step = loop.progress.step
    last = step == loop.total or stopping
    if loop.job.held and (step == loop.total or (recipe.eval_steps and step % recipe.eval_steps == 0)):
        _evaluate(loop)
    if loop.world.first and (last or step % recipe.save_steps == 0):
        save(loop)
    wait(loop.world)


def save(loop: _Loop) -> Path:
    """Write the checkpoint of the present step."""
    return save_checkpoint(
        loop.job.folder, loop.network, loop.optimizer, loop.progress, loop.job.identity(), loop.job.recipe.train.save_total_limit
    )


def _evaluate(loop: _Loop) -> None:
    """Loss and share of right target tokens on the held-out items, with the adapter as it is now."""
    job = loop.job
    set_modes(loop.network, job.recipe, False)
    records = job.held[loop.world.rank :: loop.world.size]
    size, side = job.recipe.train.batch_size, job.side

    def batches() -> Iterator[Batch]:
        for at in range(0, len(records), size):
            items = [load_item(record, side.tokenizer, side.template, side.tiling, loop.cache) for record in records[at : at + size]]
            yield collate(items, loop.compute.image_token_id)

    sums = held_out(loop.network, batches(), replace(loop.compute, kept=None))
    set_modes(loop.network, job.recipe, True)
    loss, correct, targets = sum_values(loop.world, [sums.loss, float(sums.correct), float(sums.targets)])
    entry = {"step": loop.progress.step, "eval_loss": loss / targets, "eval_token_accuracy": correct / targets, "eval_items": len(job.held)}
    if loop.world.first:
        append_metrics(job.folder, entry)
        job.tell(
            say(
                f"held-out: loss {entry['eval_loss']:.4f}, {entry['eval_token_accuracy']:.1%} of target tokens right",
                f"留出集：损失 {entry['eval_loss']:.4f}，目标 token 正确率 {entry['eval_token_accuracy']:.1%}",
            )
        )


def _finish(loop: _Loop) -> Outcome:
    job = loop.job
    done = loop.progress.step >= loop.total
    if loop.world.first:
        status = "done" if done else "stopped"
        draw_losses(job.folder)
        jobs.write_run(job, status, {"step": loop.progress.step, "seconds": round(loop.progress.seconds, 1), "skipped": len(loop.skipped)})
    if done:
        for line in jobs.last_words(job):
            job.tell(line)
        return Outcome("done", job.folder, loop.progress.step)
    job.tell(
        say(
            f"saved step {loop.progress.step} of {loop.total}; the same command with --resume continues",
            f"已保存第 {loop.progress.step}/{loop.total} 步；再次运行同一命令并加 --resume 即可继续",
        )
    )
    assert loop.stop is not None
    return Outcome("stopped", job.folder, loop.progress.step, SIGNAL_EXIT.get(signal.Signals(loop.stop), 130))
