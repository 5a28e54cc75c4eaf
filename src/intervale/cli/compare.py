"""`intervale compare BEFORE AFTER [--out DIR]`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from intervale.cli.output import emit_json, result
from intervale.core.lang import say


def compare(
    before: Annotated[Path, typer.Argument(help="The folder of an evaluation, for example of the base model.")],
    after: Annotated[Path, typer.Argument(help="The folder of another on the same items, for example of the tuned model.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json (default: compare-BEFORE-AFTER beside AFTER).")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="The folder of one more evaluation of the same items, of any model or endpoint; may stand several times."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write README.md, the model card, into AFTER's folder (one that `export` wrote).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Pair two evaluations: fixed, broken, exact McNemar test, the difference with its interval, and a report to show."""
    from intervale.evaluate.compare import REPORT_HTML, write_report
    from intervale.evaluate.compare import compare as run
    from intervale.evaluate.report import in_words, percent, points

    found = run(before, after, beside or [])
    first, second = Path(os.path.abspath(before)), Path(os.path.abspath(after))
    folder = out or second.parent / f"compare-{first.name}-{second.name}"
    write_report(found, folder)
    written = _card(found) if card else None
    if json_:
        emit_json(found)
        return
    pairs, difference = found["pairs"], found["difference"]
    low, high = difference["interval"]
    result(f"{percent(found['before']['accuracy'])} -> {percent(found['after']['accuracy'])}  "
           f"{points(difference['value'])}  [{points(low)}, {points(high)}]  n={found['n']}")  # fmt: skip
    result(say(f"fixed {pairs['fixed']}, broken {pairs['broken']}, both right {pairs['both_right']}, both wrong {pairs['both_wrong']}",
               f"改对 {pairs['fixed']}，改错 {pairs['broken']}，都对 {pairs['both_right']}，都错 {pairs['both_wrong']}"))  # fmt: skip
    result(in_words(found))
    for own in found["others"]:
        against = own["against"]
        low, high = against["interval"]
        result(say(f"{own['model']['name']}: {percent(own['accuracy'])}; AFTER minus this {points(against['difference'])} [{points(low)}, {points(high)}]  p = {against['p_holm']:.2g} (Holm)",
                   f"{own['model']['name']}：{percent(own['accuracy'])}；AFTER 减去它 {points(against['difference'])} [{points(low)}, {points(high)}]  p = {against['p_holm']:.2g}（Holm）"))  # fmt: skip
    if found["scored_on_training_items"]:
        result(say("SCORED ON TRAINING ITEMS: this shows that training worked, not how good the model is",
                   "在训练数据上评分：这只说明训练有效，不代表模型水平"))  # fmt: skip
    if written:
        result(say(f"model card: {written}", f"模型卡：{written}"))
    result(say(f"report: {folder / REPORT_HTML}", f"报告：{folder / REPORT_HTML}"))


def _card(found: dict[str, Any]) -> Path:
    from intervale.evaluate.model_card import write_card

    return write_card(Path(found["after"]["model"]["folder"]), [found])
