"""Everything a run needs before its first step: data measured, folder chosen, network ready. Fails early, and says all.

Nothing is written until the data, the recipe and the model have been found to fit each other.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.files import read_object, set_aside, write_json
from intervale.core.lang import say
from intervale.core.records import Record, data_digest
from intervale.core.runlog import differences, read_metrics, versions
from intervale.data.corpus import Corpus, SourceSpec, open_corpus
from intervale.data.dataset import Size
from intervale.data.images import PictureError
from intervale.data.order import Order
from intervale.model.adapt import checkpoint_of, newest_checkpoint
from intervale.model.decoder import Adapter
from intervale.model.load import TextSide, as_device, load_network, narrow, resolve_model, text_side
from intervale.model.quantize import need_bitsandbytes, quantize_layers
from intervale.model.source import build_network, fingerprint, open_source
from intervale.train.best import scores_of
from intervale.train.measured import Measured, measure_all, measure_corpus
from intervale.train.nonfinite import NONFINITE
from intervale.train.parallel import World
from intervale.train.prepare import Cost, can_fuse, estimate, freeze_and_adapt, fused_lora, precision_of
from intervale.train.recipe import TrainRecipe, run_folder
from intervale.train.sharded import need_deepspeed, set_apart
from intervale.train.tracking import need_trackers

Tell = Callable[[str], None]
# What may differ between a run and its resumption without changing the mathematics of the steps that are left.
_FREE = {
    "out": None,
    "log": None,
    "parallel": ("processes",),  # their number is a part of its own, whoever started them
    "data": ("train", "index", "workers", "eval", "features_dir", "features_gib"),
    "train": (
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "patience",
        "features",
        "checkpointing",
        "pack_tokens",
        "compile",
        "fused_lora",
    ),
}


_WORTH_SHARING = 1.5  # questions a picture


@dataclass(frozen=True)
class Job:
    """A recipe with its data: what is known before the network is loaded."""

    recipe: TrainRecipe
    folder: Path
    base: Path
    side: TextSide
    train: Corpus
    held: Sequence[Record]
    measured: Measured
    tell: Tell
    processes: int = 1

    @property
    def sizes(self) -> list[Size]:
        """The sizes that were measured: of every item, or of a sample of an indexed corpus."""
        return self.measured.sizes

    def order(self, together: bool = False) -> Order:
        """Which items stand in which step."""
        return self.train.order(self.recipe.train.seed, together)

    @property
    def per_step(self) -> int:
        """Samples of a step and a process."""
        return self.recipe.train.batch_size * self.recipe.train.accumulation

    @property
    def a_step(self) -> int:
        """Samples of a step."""
        return self.per_step * self.processes

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self._an_epoch * self.recipe.train.epochs
        return min(steps, self.recipe.train.max_steps or steps)

    @property
    def _an_epoch(self) -> int:
        return -(-len(self.order()) // self.a_step)

    def passing(self, steps: int) -> tuple[float, int]:
        """(epochs, tokens) of so many steps, on average; whole epochs as they were measured."""
        epochs = steps / self._an_epoch
        return epochs, round(self.measured.an_epoch()[0] * epochs)

    @property
    def longest(self) -> int:
        """Tokens of the longest training item."""
        return self.measured.longest

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        recipe = self.recipe.model_dump()
        for section, keys in _FREE.items():
            if keys is None:
                recipe.pop(section)
            for key in keys or ():
                recipe[section].pop(key)
        base = {"name": self.recipe.model, "folder": str(self.base.resolve()), "fingerprint": fingerprint(self.base)}
        return {"base": base, "recipe": recipe, "data": self.train.digest, "processes": self.processes}


def read_job(recipe: TrainRecipe, name: str, tell: Tell, processes: int = 1) -> Job:
    """Read and measure the data for a recipe called `name` and so many processes. Raises: UserError for anything that cannot work."""
    base = resolve_model(recipe.model)
    if recipe.parallel.strategy == "deepspeed":
        need_deepspeed()  # said before minutes of loading
    need_trackers(recipe.log)
    if recipe.lora.quantize != "none":
        need_bitsandbytes()
    if checkpoint_of(base) is not None:
        raise UserError(f"model: {base} is a training run, not a model", f"export it first: intervale export {base} DIR --format hf")
    side = text_side(base)
    side = replace(side, tiling=narrow(side.tiling, recipe.data.min_tiles, recipe.data.max_tiles))
    specs = [SourceSpec(source.path, source.weight) for source in recipe.data.sources()]
    train = open_corpus(specs, recipe.data.index, tell)
    held: Sequence[Record] = open_corpus([SourceSpec(recipe.data.eval)], recipe.data.index, tell) if recipe.data.eval else []
    measured = measure_corpus(train, side, recipe.data.max_length, recipe.data.on_bad_sample == "skip")
    measure_all(held, side, recipe.data.max_length, skip=False)
    return Job(recipe, run_folder(recipe, name), base, side, train, held, measured, tell, processes)


def open_folder(job: Job, resume: bool, fresh: bool) -> str:
    """'new', 'resume' or 'done'. Raises: UserError when the folder holds something and neither was asked for."""
    folder = job.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if resume:
            raise UserError(f"{folder}: there is no run to resume", "leave --resume out to start one, or name the run's folder with --out")
        return "new"
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} exists and is not a training run", "choose another `out`, or remove this folder")
    if fresh:
        aside = set_aside(folder)
        job.tell(say(f"the earlier run is kept as {aside}", f"先前的运行保留在 {aside}"))
        return "new"
    run = read_object(folder / "run.json", "status")
    status = run["status"]
    if status == "done":
        if told := changed_since(run, job):
            raise UserError(
                f"{folder} holds a finished run of another recipe, base or data; what differs: " + "; ".join(told),
                "give another `out` (--out DIR), or --fresh to train again (the old run is kept beside)",
            )
        return "done"
    if resume:
        return "resume"
    raise UserError(
        f"{folder} holds a run that is not finished ({status})", "--resume continues it, --fresh starts over (and keeps the old one aside)"
    )


def changed_since(stored: dict[str, Any], job: Job) -> list[str]:
    """How recipe, data and base differ from what a run's files say; a base that only moved is the same base."""
    now = job.identity()
    now["base"], before = now["base"]["fingerprint"], dict(stored)
    before["base"] = (stored.get("base") or {}).get("fingerprint")
    before["recipe"] = _with_defaults(dict(stored.get("recipe") or {}))
    if isinstance(before.get("data"), str) and job.train.is_named(before["data"]):
        before["data"] = now["data"]
    if "processes" not in stored:  # a run of an earlier version: nobody knows
        del now["processes"]
    return differences({key: before.get(key) for key in now}, now)


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the keys that came after it, which stood at their defaults then."""
    for section, field in TrainRecipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        known = recipe.get(section)
        if isinstance(known, dict):
            free = _FREE.get(section) or ()
            defaults = {key: entry.default for key, entry in inner.items() if not entry.is_required() and key not in free}
            recipe[section] = defaults | {key: value for key, value in known.items() if key not in free}
    return recipe


@contextlib.contextmanager
def guarded(job: Job, world: World, new: bool) -> Iterator[None]:
    """What a failure leaves of the run's folder: nothing if the run was new and its input was at fault, else the status "failed".

    A checkpoint, the metrics of steps that were made, and a step that is kept for study, stay.
    """
    try:
        yield
    except BaseException as error:
        if world.first and job.folder.is_dir():
            untouched = (not read_metrics(job.folder) or isinstance(error, PictureError)) and not (job.folder / NONFINITE).is_dir()
            if new and untouched and newest_checkpoint(job.folder) is None:
                shutil.rmtree(job.folder, ignore_errors=True)
            else:
                with contextlib.suppress(UserError):
                    write_run(job, "failed", scores_of(job.folder).told())
        raise


def write_run(job: Job, status: str, extra: dict[str, Any] | None = None) -> None:
    """RUN/run.json: what this run is and where it stands."""
    value = {
        "kind": "intervale training run",
        "status": status,
        **job.identity(),
        "train": {"file": _file_of(job.recipe), "items": len(job.train), "digest": job.train.digest},
        "eval": {"file": job.recipe.data.eval, "items": len(job.held), "digest": data_digest(job.held)} if job.held else None,
        "features_dir": str(Path(job.recipe.data.features_dir).resolve()) if job.recipe.data.features_dir else None,
        "versions": versions(),
        **(extra or {}),
    }
    write_json(job.folder / "run.json", value)


@dataclass(frozen=True)
class Ready:
    """A network that is set up for a recipe, with the estimate of a step's memory and, on a GPU, its fused LoRA layers."""

    network: InternVLForConditionalGeneration
    dtype: torch.dtype
    cost: Cost
    adapter: Adapter | None = None


def _file_of(recipe: TrainRecipe) -> str:
    """The one file that was learned from, or the sources as the recipe names them."""
    sources = recipe.data.sources()
    return str(Path(sources[0].path).resolve()) if len(sources) == 1 else ", ".join(source.path for source in sources)


def shards_layers(recipe: TrainRecipe, world: World) -> bool:
    """Are the layers' parameters in parts, each whole only while it computes?"""
    strategy = recipe.parallel.strategy
    return world.size > 1 and (strategy == "fsdp" or (strategy == "deepspeed" and recipe.parallel.zero_stage == 3))


def load_for(job: Job, world: World) -> Ready:
    """The network, frozen and adapted as the recipe says; its weights go from the files to the device in the type they compute in."""
    dtype = precision_of(job.recipe.train.precision, world.device)
    parted = shards_layers(job.recipe, world)  # what is dealt out by layers stays off the device as a whole
    small = job.recipe.lora.quantize != "none"
    device = torch.device("cpu") if parted or small else world.device
    network = load_network(job.base, dtype=dtype, device=device, image_token_id=job.side.tokenizer.control("<IMG_CONTEXT>"))
    if small:
        quantize_layers(network, dtype, world.device)
    freeze_and_adapt(network, job.recipe)
    adapter = None if parted else fused_lora(network, job.recipe)
    cost = estimate(network, job.recipe, dtype, adapter is not None)
    if world.size > 1 and job.recipe.parallel.strategy in ("fsdp", "deepspeed"):
        set_apart(network, world.device)
    return Ready(network, dtype, cost, adapter)


def plan_for(job: Job, world: World) -> Ready:
    """As `load_for` without reading a weight: the parameters stay on the meta device."""
    dtype = precision_of(job.recipe.train.precision, world.device)
    network = build_network(open_source(job.base, job.side.tokenizer.control("<IMG_CONTEXT>")).config)
    freeze_and_adapt(network, job.recipe)
    fused = job.recipe.train.fused_lora != "off" and can_fuse(world.device)
    return Ready(network, dtype, estimate(network, job.recipe, dtype, fused))


def share_prefixes(job: Job) -> tuple[bool, str]:
    """(do questions on one picture share its tokens?, a line for the log or ''). The step's mathematics are the same without dropout."""
    wanted = job.recipe.train.share_prefix
    drops = bool(job.recipe.lora_targets()) and job.recipe.lora.dropout > 0
    if wanted == "off" or (wanted == "auto" and drops):
        return False, ""
    each = len(job.train) / (int(job.train.groups().max()) + 1)
    if wanted == "auto" and each < _WORTH_SHARING:
        return False, ""
    told = say(
        f"{each:.1f} questions a picture: they share its tokens and stand in the same step",
        f"每张图片 {each:.1f} 个问题：共用图片的 token，并在同一步训练",
    )
    if drops:
        told += say(
            "; with LoRA dropout they also share its mask there, which is not the step without sharing",
            "；有 LoRA dropout 时共用部分的掩码也相同，与不共用时的步不同",
        )
    return True, told


def pick_device() -> str:
    """The device a run takes: INTERVALE_DEVICE, else CUDA when there is one, else the CPU."""
    return str(as_device(None))


def _word(text: str | Path | None) -> str:
    """A word of a command as a shell reads it."""
    return shlex.quote(str(text))


def last_words(job: Job) -> list[str]:
    """What a finished run says: where it lies, whether it was better before its end, and how to score it against its base."""
    lines = [say(f"done: {job.folder} (loss.png shows the curve)", f"完成：{job.folder}（曲线见 loss.png）")]
    held = [(entry["eval_loss"], entry["step"]) for entry in read_metrics(job.folder) if "eval_loss" in entry]
    if held and held[-1][0] > 1.01 * min(held)[0]:
        best, step = min(held)
        lines.append(
            say(
                f"the held-out loss was lowest at step {step} ({best:.4f}); it is {held[-1][0]:.4f} now: fewer epochs may serve you better",
                f"留出集损失在第 {step} 步最低（{best:.4f}），现在为 {held[-1][0]:.4f}：减少轮数可能更好",
            )
        )
    if job.held and any(record.choices for record in job.held):
        tiles = f" --max-tiles {job.side.tiling.max_tiles}" if job.recipe.data.max_tiles else ""
        before, after = (Path(f"{job.folder}-{name}") for name in ("before", "after"))  # another run's stay what they are
        for model, out in ((job.recipe.model, before), (job.folder, after)):
            lines.append(f"  intervale evaluate {_word(model)} {_word(job.recipe.data.eval)} --out {_word(out)} --mode likelihood{tiles}")
        lines.append(f"  intervale compare {_word(before)} {_word(after)}")
    return lines
