"""`intervale evaluate MODEL DATA --out DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from intervale.cli.output import emit_json, note, result
from intervale.core.lang import say


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id.")],
    data: Annotated[
        Path, typer.Argument(help="A JSONL file; its items have choices and an answer, or all of them only the assistant's answer.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for predictions.jsonl and summary.json; the same command continues what was stopped.")],
    prompt: Annotated[
        Literal["open", "mcq"], typer.Option(help="open: the bare question, as trained; mcq: with lettered options.")
    ] = "open",
    mode: Annotated[
        Literal["strict", "likelihood", "official"],
        typer.Option(
            help="strict: the greedy answer must name one choice; likelihood: the most likely choice; official: first letter (mcq)."
        ),
    ] = "strict",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Tiles a picture (default: the model's, or what the run trained with).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda when there is one).")] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N items.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; an earlier evaluation is kept beside as NAME.old-1.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document (the summary) on stdout.")] = False,
) -> None:
    """Score a model on questions, with choices or open: accuracy with its interval, per tag, every answer on file."""
    from intervale.evaluate.run import evaluate as run
    from intervale.evaluate.run import plan

    job = plan(
        model,
        data,
        out,
        prompt=prompt,
        mode=mode,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        device=device,
        precision=precision,
        limit=limit,
    )
    summary = run(job, fresh=fresh, tell=note)
    if json_:
        emit_json(summary)
        return
    for line in shown(summary, sys.stdout.isatty()):
        result(line)
    result(say(f"written to {out}", f"已写入 {out}"))


def _row(name: str, score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{name}  {score['accuracy']:6.1%}  [{low:.1%}, {high:.1%}]  {score['correct']}/{score['n']}"


def _open_answers(summary: dict[str, Any]) -> list[str]:
    means = summary["means"]
    return [
        _row(say("  word for word", "  逐字相同"), summary["accuracies"]["exact"]) + say("  (headline: contained)", "  （主指标：包含）"),
        say(f"  on average: character F1 {means['f1']:.3f}, ROUGE-L {means['rouge_l']:.3f}",
            f"  平均：字符 F1 {means['f1']:.3f}，ROUGE-L {means['rouge_l']:.3f}"),
        say(f"empty answers: {summary['empty']}; answers cut at the token limit: {summary['cut_off']}",
            f"空回答：{summary['empty']}；达到长度上限的回答：{summary['cut_off']}"),
    ]  # fmt: skip


def shown(summary: dict[str, Any], coloured: bool) -> list[str]:
    """The summary for a terminal: accuracy, what was not recognised, a table per tag, and the warning in red."""
    from intervale.evaluate.folder import sees_choices, telling_tags
    from intervale.evaluate.seen import reason_of

    chance = say(f"  (chance {summary['chance']:.1%})", f"  （随机 {summary['chance']:.1%}）") if sees_choices(summary["protocol"]) else ""
    name = say("right answer contained", "包含正确答案") if "means" in summary else say("accuracy", "准确率")
    lines = [_row(name, summary) + chance]
    if "means" in summary:
        lines += _open_answers(summary)
    elif "accuracies" in summary:
        mean = summary["accuracies"]["mean"]
        lines.append(_row(say("  by the per-token mean", "  按每个 token 的平均"), mean) + say("  (headline: sum)", "  （主指标：总和）"))
        lines.append(say(f"ties, counted as wrong: {summary['ties']}", f"并列（计为错误）：{summary['ties']}"))
    else:
        unparsed, cut = summary["unparsed"], summary["cut_off"]
        lines.append(say(f"no choice recognised, counted as wrong: {unparsed}; answers cut at the token limit: {cut}",
                         f"未识别出选项（计为错误）：{unparsed}；达到长度上限的回答：{cut}"))  # fmt: skip
    if summary["protocol"]["mode"] == "official":
        lines.append(say("the official scorer draws a random letter for those, so its number cannot be reproduced",
                         "官方评分对这些回答随机取字母，因此其分数不可复现"))  # fmt: skip
    telling = telling_tags(summary["tags"], summary["n"])
    for tag, values in summary["tags"].items():
        if tag not in telling:
            lines.append(say(f"{tag}: {len(values)} values, see summary.json", f"{tag}：{len(values)} 个取值，见 summary.json"))
            continue
        lines.append(f"{tag}:")
        lines += [_row(f"  {_padded(value, max(map(_width, values)))}", score) for value, score in values.items()]
    if summary["scored_on_training_items"]:
        text = say("SCORED ON TRAINING ITEMS: this shows that training worked, not how good the model is",
                   "在训练数据上评分：这只说明训练有效，不代表模型水平")  # fmt: skip
        lines.append(("\x1b[1;31m" + text + "\x1b[0m") if coloured else text)
        lines.append(f"  {reason_of(summary)}")
    elif summary["scored_on_training_items"] is None:
        lines.append(say("whether these are training items is not known: ", "不清楚这些是否为训练数据：") + reason_of(summary))
    return ["".join(char for char in line if char.isprintable() or char == "\x1b") for line in lines]


def _width(text: str) -> int:
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
