"""`intervale train RECIPE.yaml`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from intervale.cli.output import note
from intervale.core.errors import UserError
from intervale.core.lang import say


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe (docs/recipe.md has every key; recipes/ has some to start from).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set train.epochs=3. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: `out` of the recipe, else runs/NAME).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; an earlier run is kept beside as NAME.old-1.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="With --resume: go on although recipe, data or base changed; lists what did.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, tokens, trainable parameters and memory; write nothing.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DST", help="When the run is done, export it there too; DST must not exist yet.")
    ] = None,
    to: Annotated[
        Literal["hf", "official"] | None, typer.Option("--format", help="Of --export, as for `intervale export` (default: hf).")
    ] = None,
) -> None:
    """Tune a model: LoRA or full, on a CPU, a GPU, or several (parallel.processes, or torchrun)."""
    _agree(resume, fresh, accept_changes, dry_run, export, to)
    from intervale.core.config import load_recipe
    from intervale.train.recipe import TrainRecipe, run_folder

    overrides = list(set_ or [])
    if out is not None:
        overrides.append(f"out={str(out)!r}")
    checked = load_recipe(recipe, TrainRecipe, overrides)
    from intervale.train.launch import PYTHON, end_with_parent, launch, started_outside

    if export is not None:
        _fits_export(export, run_folder(checked, recipe.stem))
    if (count := checked.parallel.processes or 1) > 1 and not started_outside() and not dry_run:
        sys.exit(launch(count, [*PYTHON, "-m", "intervale", *sys.argv[1:]]))
    end_with_parent()
    if os.environ.get("RANK", "0") != "0":
        export = None  # of several processes the first exports, and says so
    from intervale.train.loop import train as run

    try:
        outcome = run(checked, recipe.stem, resume=resume, fresh=fresh, dry_run=dry_run, tell=note, accept_changes=accept_changes)
    except KeyboardInterrupt:
        note(
            say(
                "stopped; what was saved before stays (nothing, if no step was made)",
                "已停止；之前保存的内容仍在（若尚未训练任何一步，则没有）",
            )
        )
        _none_exported(export)
        sys.exit(130)
    if outcome.exit_code:
        _none_exported(export)
        sys.exit(outcome.exit_code)
    if export is not None:
        _export(outcome.folder, export, to or "hf")


def _agree(resume: bool, fresh: bool, accept_changes: bool, dry_run: bool, export: Path | None, to: str | None) -> None:
    """Raise a UserError for options that do not go together."""
    if resume and fresh:
        raise UserError("--resume and --fresh contradict each other", "give one of them")
    if export is None and to is not None:
        raise UserError("--format is about --export", "give it together with --export DST")
    if export is not None and dry_run:
        raise UserError("--dry-run writes nothing, so there is nothing to export", "leave --export out")
    if accept_changes and not resume:
        raise UserError("--accept-changes is about resuming", "give it together with --resume")


def _fits_export(dst: Path, run: Path) -> None:
    """Raise a UserError for a folder that could not be written: told before the hours of training, not after."""
    from intervale.core.files import refuse_existing

    refuse_existing(dst)
    place, taken = dst.resolve(), run.resolve()
    if place == taken or place in taken.parents or taken in place.parents:
        raise UserError(f"--export {dst}: the run itself lies in {run}", f"name a folder beside it, like {run}-model")
    there = next(one for one in (place, *place.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK) or place.is_mount():
        raise UserError(f"--export {dst}: no folder can be made there", "choose another place, or change its permissions")


def _none_exported(dst: Path | None) -> None:
    if dst is not None:
        note(say(f"nothing was exported to {dst}: the run is not complete", f"未导出到 {dst}：训练尚未完成"))


def _export(run: Path, dst: Path, to: str) -> None:
    """In the process that trained: what it held on the GPU is given back first, and what is imported need not be again."""
    import torch

    from intervale.cli.export import export_and_tell

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # what is half written is removed, and the rest said
    try:
        export_and_tell(run, dst, to, "source", [], False)
    except BaseException:
        note(
            say(
                f"nothing was exported to {dst}; the run in {run} is complete: `intervale export` takes it",
                f"未导出到 {dst}；{run} 中的训练已完成，可用 `intervale export` 导出",
            )
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
