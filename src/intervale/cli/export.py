"""`intervale export RUN_OR_MODEL DST --format hf|official`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from intervale.cli.output import emit_json, note, result
from intervale.core.lang import say


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A training run, a checkpoint, a model folder, or a hub id.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    to: Annotated[
        Literal["hf", "official"], typer.Option("--format", help="hf: transformers, vLLM, LMDeploy; official: OpenGVLab's own names.")
    ],
    dtype: Annotated[
        str, typer.Option(metavar="source|float32|bfloat16|float16", help="source keeps each tensor's stored type.")
    ] = "source",
    best: Annotated[bool, typer.Option("--best", help="Of a run: the checkpoint with the lowest held-out loss, not the last.")] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="A report's folder for the model card; may stand several times (default: those of these weights that the run noted)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Merge what was trained, write it, reload it, and compare logits before saying done."""
    from intervale.evaluate.model_card import read_report
    from intervale.model.load import resolve_model

    reports = [read_report(place) for place in report or []]  # before the work: a wrong name is told at once
    folder = resolve_model(source)
    if best:
        from intervale.train.best import best_checkpoint

        folder = best_checkpoint(folder)
        note(say(f"the best checkpoint is {folder.name}", f"最好的检查点是 {folder.name}"))
    export_and_tell(folder, dst, to, dtype, reports, as_json)


def export_and_tell(folder: Path, dst: Path, to: str, dtype: str, reports: list[dict[str, Any]], as_json: bool) -> None:
    """Export with its model card, and say what was proven."""
    from intervale.export.export import export as run
    from intervale.model.load import as_dtype

    proof = run(folder, dst, to, dtype=None if dtype == "source" else as_dtype(dtype), tell=note)
    _card(folder, dst, reports)
    if as_json:
        emit_json({"folder": str(dst), "format": to, **asdict(proof)})
        return
    result(
        say(
            f"done: {dst} ({to}); {proof.changed_tensors} tensors changed; reloaded logits differ by {proof.reload_difference:.2g} at most, "
            f"from the adapter model by {proof.rounding_difference:.2g} (largest logit {proof.largest_logit:.3g}), "
            f"{proof.same_top_token:.1%} of the most likely tokens are the same",
            f"完成：{dst}（{to}）；改动 {proof.changed_tensors} 个张量；重新载入后 logits 最大差 {proof.reload_difference:.2g}，"
            f"与适配器模型最大差 {proof.rounding_difference:.2g}（最大 logit {proof.largest_logit:.3g}），最可能 token 一致率 {proof.same_top_token:.1%}",
        )
    )


def _card(source: Path, dst: Path, reports: list[dict[str, Any]]) -> None:
    """README.md from the reports that were named, else from those the run noted; none without any."""
    from intervale.evaluate.model_card import reports_of, write_card

    if reports := reports or reports_of(source, dst):
        card = write_card(dst, reports)
        note(
            say(f"model card: {card}, from {len(reports)} report{'s' * (len(reports) != 1)}", f"模型卡：{card}，来自 {len(reports)} 份报告")
        )
