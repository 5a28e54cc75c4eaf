"""A training run from its recipe to its end: `train` is the whole of `intervale train`.

Promises: nothing is written before everything fits; Ctrl-C finishes the step, saves and says how to go on. Cost: the run's; the
steps themselves are in `train.steps`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.files import locked, write_atomic
from intervale.core.lang import say
from intervale.core.runlog import forget_after
from intervale.model.decoder import Walk
from intervale.train import job as jobs
from intervale.train.ahead import made_ahead
from intervale.train.best import scores_of
from intervale.train.feature_cache import KeptFeatures, fill, plan_of, told
from intervale.train.held_out import due
from intervale.train.job import Job
from intervale.train.memory import at_once, first_fit, in_words, what_to_set
from intervale.train.optimizer import make_optimizer
from intervale.train.parallel import World, hearing_of_others, join_world, left_together, started, sum_values, wait
from intervale.train.plot import draw_losses
from intervale.train.prepare import GIB, free_memory, need_compiler, of_each, worth_compiling
from intervale.train.recipe import TrainRecipe
from intervale.train.resume import already_skipped, go_on, sweep
from intervale.train.running import Loop
from intervale.train.saving import Saver
from intervale.train.sharded import Fsdp, Zero
from intervale.train.state import Progress
from intervale.train.step import Compute
from intervale.train.steps import run_steps, tile_cache
from intervale.train.strategy import Plain, spare_batch
from intervale.train.tracking import Trackers

SIGNAL_EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: 'done', 'stopped' (by a signal: `exit_code`) or 'dry'."""

    status: str
    folder: Path
    step: int
    exit_code: int = 0


def train(
    recipe: TrainRecipe, name: str, *, resume: bool, fresh: bool, dry_run: bool, tell: jobs.Tell, accept_changes: bool = False
) -> Outcome:
    """Run a recipe called `name` to its end or to a signal. Raises: UserError; what was saved before stays.

    `accept_changes` lets `resume` go on although recipe, data or base changed since; what changed is told.
    """
    begun = time.monotonic()
    job = jobs.read_job(recipe, name, tell, started() or (dry_run and recipe.parallel.processes) or 1)
    if not dry_run and not fresh:
        jobs.open_folder(job, resume, fresh)  # refuse before joining other processes or loading anything
    world = join_world(recipe.parallel.strategy, jobs.pick_device())
    if not world.first:
        job = replace(job, tell=lambda text: None)
    with left_together(world), hearing_of_others(world):
        need_compiler(recipe, world.device)
        if dry_run:
            return _dry_run(job, world)
        with locked(job.folder) if world.first else nullcontext():
            state = jobs.open_folder(job, resume, fresh) if world.first else "resume" if resume else "new"
            if sum_values(world, [float(state == "done")])[0]:
                job.tell(say(f"{job.folder} is complete already; --fresh trains it again", f"{job.folder} 已经完成；--fresh 重新训练"))
                return Outcome("done", job.folder, job.steps())
            with jobs.guarded(job, world, state == "new"), _memory(job, world):
                return _train(job, world, state, accept_changes, begun)


@contextmanager
def _memory(job: Job, world: World) -> Iterator[None]:
    """A device without enough memory, at the first step or a later one, is told with what to set; what was saved stays."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not gpu and not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        climbed = gpu and (world.size == 1 or job.recipe.parallel.strategy == "ddp")
        raise UserError(
            f"{'the GPU' if gpu else 'this machine'}'s memory is not enough for this recipe",
            f"{what_to_set(job.recipe, gpu, climbed)}; --resume --accept-changes goes on from the last checkpoint",
        ) from error


def _describe(job: Job, total: int) -> str:
    tokens, targets = job.measured.an_epoch()
    about = "" if job.measured.exact else say("about ", "约 ")
    count, shown, share = len(job.train), len(job.order()), job.a_step
    mixed = say(f" ({shown:,} an epoch)", f"（每轮 {shown:,} 条）") if shown != count else ""
    return say(
        f"{count:,} items{mixed}, {about}{tokens:,} tokens ({targets:,} of them targets) an epoch; {total} steps of {share} items",
        f"{count:,} 条数据{mixed}，每轮{about} {tokens:,} 个 token（其中 {targets:,} 个计入损失）；共 {total} 步，每步 {share} 条",
    )


def _dry_run(job: Job, world: World) -> Outcome:
    ready = jobs.plan_for(job, world)
    network, dtype, cost = ready.network, ready.dtype, of_each(ready.cost, job.recipe, job.processes)
    total = job.steps()
    epochs, tokens = job.passing(total)
    longest = job.measured.longest
    room = free_memory(world.device)
    fit = first_fit(job.recipe, world.device, longest, room - cost.weights - cost.optimizer, cost.kept, cost.recomputed)
    held = at_once(fit, job.recipe, longest, job.per_step) * (cost.recomputed if fit.recompute else cost.kept)
    whole = cost.weights + cost.optimizer + held
    number, limit, share = f"{round(epochs, 2):g}", job.recipe.data.max_length, cost.trainable / cost.parameters
    total_gib, weights, states, activations, checkpoint, free = (
        f"{amount / GIB:.2f} GiB" for amount in (whole, cost.weights, cost.optimizer, held, cost.checkpoint, room)
    )
    packs, name, features = in_words(fit, job.recipe), str(dtype).removeprefix("torch."), told(plan_of(job, network, dtype, job.processes))
    each = ("", "")
    if job.processes > 1:
        strategy = job.recipe.parallel.strategy
        each = (f" for each of {job.processes} processes ({strategy})", f"，{job.processes} 个进程（{strategy}）中的每个")
    lines = [
        _describe(job, total),
        say(f"steps: {total}", f"步数：{total}"),
        say(
            f"tokens: {tokens:,} in {number} epoch{'s' * (epochs != 1)}; the longest item has {longest:,} (data.max_length {limit:,})",
            f"token：{number} 轮共 {tokens:,} 个；最长的一条有 {longest:,} 个（data.max_length {limit:,}）",
        ),
        say(
            f"parameters: {cost.parameters:,}, trainable: {cost.trainable:,} ({share:.2%})",
            f"参数：{cost.parameters:,} 个，其中训练 {cost.trainable:,} 个（{share:.2%}）",
        ),
        say(
            f"memory, estimated{each[0]}: {total_gib} = weights {weights} + gradients and optimizer {states} + activations {activations} ({packs}); "
            f"free on {world.device}: {free}",
            f"内存（估计{each[1]}）：{total_gib} = 权重 {weights} + 梯度和优化器 {states} + 激活 {activations}（{packs}）；{world.device} 空闲 {free}",
        ),
        say(f"disk: {checkpoint} a checkpoint, {_kept(job, total)} kept", f"磁盘：每个检查点 {checkpoint}，保留 {_kept(job, total)} 个"),
        say(f"precision: {name}; features: {features}", f"精度：{name}；图像特征：{features}"),
        say(f"out: {job.folder} (nothing was written)", f"输出：{job.folder}（未写入任何内容）"),
    ]
    for line in lines:
        job.tell(line)
    return Outcome("dry", job.folder, 0)


def _kept(job: Job, total: int) -> int:
    saves = -(-total // job.recipe.train.save_steps)
    limit = job.recipe.train.save_total_limit
    return saves if limit < 0 else min(saves, limit)


def _train(job: Job, world: World, state: str, accept_changes: bool, begun: float) -> Outcome:
    job.tell(say(f"loading {job.base}", f"载入 {job.base}"))
    ready = jobs.load_for(job, world)
    network, dtype, cost = ready.network, ready.dtype, ready.cost
    plan = plan_of(job, network, dtype, world.size)
    total = job.steps()
    job.tell(_describe(job, total))
    job.tell(
        say(
            f"{cost.trainable:,} of {cost.parameters:,} parameters learn, {str(dtype).removeprefix('torch.')} on {world.device}; "
            f"features: {told(plan)}",
            f"训练 {cost.parameters:,} 个参数中的 {cost.trainable:,} 个，{str(dtype).removeprefix('torch.')}，设备 {world.device}；"
            f"图像特征：{told(plan)}",
        )
    )
    if world.first:
        sweep(job.folder)
    progress, moments = go_on(job, network, accept_changes) if state == "resume" else (Progress(), {})
    share, why_share = jobs.share_prefixes(job)
    if why_share:
        job.tell(why_share)
    walk = _walk(job, world, ready, progress)
    with made_ahead(walk, world.device):
        kept = fill(job, world, network, dtype, plan)
    loop = _loop_of(job, world, ready, kept, progress, walk)
    loop.strategy.restore_moments(moments)
    loop.total, loop.share, loop.begun, loop.an_epoch = total, share, begun, len(job.order())
    loop.skipped |= already_skipped(job.folder)
    if world.first:
        forget_after(job.folder, progress.step)
        jobs.write_run(job, "running", scores_of(job.folder).told())
        write_atomic(job.folder / "recipe.json", job.recipe.model_dump_json(indent=2) + "\n")
    wait(world)
    loop.scores = scores_of(job.folder)
    if world.first:
        loop.trackers = Trackers(job.recipe.log, job.folder, job.identity(), progress.step, job.tell)
    try:
        with _signals(loop), loop.saver:
            run_steps(loop)
    finally:
        if loop.trackers is not None:
            loop.trackers.close()
    return _finish(loop)


def _walk(job: Job, world: World, ready: jobs.Ready, progress: Progress) -> Walk:
    """Whether layers are compiled, and how LoRA goes."""
    tokens = job.passing(job.steps() - progress.step)[1] // world.size  # those that this process has left
    parted, small = jobs.shards_layers(job.recipe, world), job.recipe.lora.quantize != "none"
    compiled = worth_compiling(job.recipe, world.device, ready.cost.parameters, tokens) and not parted and not small
    return Walk(compiled=compiled, adapter=ready.adapter, whole=parted)


def _loop_of(job: Job, world: World, ready: jobs.Ready, kept: KeptFeatures | None, progress: Progress, walk: Walk) -> Loop:
    """What the steps need, with the plan for the memory; it and how layers are walked are told."""
    recipe, cost, device = job.recipe, of_each(ready.cost, job.recipe, world.size), world.device
    compute = Compute(ready.dtype, device, job.side.tokenizer.control("<IMG_CONTEXT>"), kept, walk)
    strategy = _strategy(ready.network, recipe, world, compute)
    loop = Loop(
        job,
        world,
        ready.network,
        strategy.optimizer,
        strategy,
        compute,
        tile_cache(job, world),
        kept.known if kept else None,
        job.steps(),
        progress,
        saver=Saver(job.tell),
    )
    room = free_memory(device) - cost.optimizer  # the weights are there already
    loop.refit(first_fit(recipe, device, job.longest, room, cost.kept, cost.recomputed))
    lora = say(", LoRA fused", "，LoRA 已融合") if ready.adapter else ""
    layers = say(", layers compiled (the first step takes a while)", "，编译各层（第一步会较久）") if walk.compiled else ""
    job.tell(say("a step: ", "每步：") + in_words(loop.fit, recipe) + lora + layers)
    return loop


def _strategy(network: InternVLForConditionalGeneration, recipe: TrainRecipe, world: World, compute: Compute) -> Plain | Fsdp | Zero:
    """Who makes the passes; one process alone has nothing to share."""
    if world.size > 1 and recipe.parallel.strategy == "fsdp":
        return Fsdp(network, recipe, world)
    if world.size > 1 and recipe.parallel.strategy == "deepspeed":
        return Zero(network, recipe, world, spare_batch(), compute)
    return Plain(network, make_optimizer(network, recipe), world)


@contextmanager
def _signals(loop: Loop) -> Iterator[None]:
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


def _finish(loop: Loop) -> Outcome:
    job = loop.job
    done = loop.progress.step >= loop.total and not due(loop)
    if loop.world.first:
        status = "done" if done else "stopped"
        draw_losses(job.folder)
        facts = {"step": loop.progress.step, "seconds": round(loop.progress.seconds, 1), "skipped": len(already_skipped(job.folder))}
        jobs.write_run(job, status, facts | {"stopped_early": loop.total < job.steps()} | loop.scores.told())
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
