"""`intervale check`: every fault of a data set with its line and its fix, and items as the model will see them.

Exit code 1 when anything is wrong. The list, or with --json one document, goes to stdout; everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intervale.cli.output import emit_json, note, result, safe
from intervale.core.errors import UserError
from intervale.core.files import read_json
from intervale.core.lang import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from intervale.data.check import Apart, Line, Report
    from intervale.data.split import Look
    from intervale.data.tiling import Tiling
    from intervale.model.load import TextSide

DEFAULT_MAX_LENGTH = 8192  # tokens; the recipe's default
LISTED = 200  # faults printed; --json has all
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def check(
    data: Annotated[Path, typer.Argument(help="A .jsonl file, or a folder with train.jsonl and eval.jsonl.")],
    model: Annotated[
        str, typer.Option(help="MODEL whose tokenizer, template and tiling count the tokens (its weights are not read).")
    ] = "",
    show: Annotated[int, typer.Option(min=0, help="Print this many items as the model will see them.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help=f"Most tokens an item may have (needs --model; default {DEFAULT_MAX_LENGTH}).")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles a picture is cut into (default: the model's).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    against: Annotated[Path | None, typer.Option(help="Another .jsonl that must share no picture and no question with DATA.")] = None,
    apart: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="A tag no value of which may stand in two of the files (repeatable).")
    ] = None,
) -> None:
    """Find every fault of a data set in one pass; exit 1 when there is one."""
    from intervale.data.check import check_files
    from intervale.data.tiling import Tiling

    side = _text_side(model, max_length)
    tiling = side.tiling if side else Tiling()
    if max_tiles is not None:
        tiling = replace(tiling, max_tiles=max_tiles, min_tiles=min(tiling.min_tiles, max_tiles))
    train, evaluation = data_files(data)
    card = _card(data)
    limit = (max_length or DEFAULT_MAX_LENGTH) if side else None
    report = check_files(
        train,
        evaluation,
        against=against,
        tokenizer=side.tokenizer if side else None,
        template=side.template if side else None,
        tiling=tiling if side else None,
        max_length=limit,
        kept_apart=_kept_apart(card, data) if data.is_dir() else (),
        apart=apart or (),
    )
    coloured = not json_output and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = [shown_item(line, report.looks, side, tiling, coloured) for line in report.lines if line.record][:show]
    trained_on = card.get("scored_on_training_items") is True
    if json_output:
        emit_json(_document(report, limit, shown, trained_on))
    else:
        _print(report, limit, shown, trained_on)
    if report.faults:
        raise typer.Exit(1)


def data_files(data: Path) -> tuple[Path, Path | None]:
    """The file to check, and the held-out file beside it if DATA is a folder that has both. Raises: UserError."""
    if not data.is_dir():
        return data, None
    found = [data / name for name in ("train.jsonl", "eval.jsonl") if (data / name).is_file()]
    if not found:
        raise UserError(
            f"{data}: neither train.jsonl nor eval.jsonl is in it", "name a .jsonl file, or a folder that `intervale prepare` wrote"
        )
    return found[0], found[1] if len(found) > 1 else None


def _text_side(model: str, max_length: int | None) -> TextSide | None:
    if not model:
        if max_length is not None:
            raise UserError("--max-length counts tokens, and there is no model to count them", "add --model MODEL")
        return None
    from intervale.model.load import load_text_side

    return load_text_side(model)


def _card(data: Path) -> dict[str, Any]:
    """The card beside the data; empty when there is none."""
    card = (data if data.is_dir() else data.parent) / "dataset.json"
    facts = read_json(card) if card.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def _kept_apart(card: dict[str, Any], folder: Path) -> list[str]:
    """The tags the card says are kept apart (cards before there were any told it in words). Raises: UserError."""
    split = card.get("split")
    tags = split.get("kept_apart") if isinstance(split, dict) else None
    if tags is None or isinstance(tags, str):
        return []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f"{folder / 'dataset.json'}: 'kept_apart' is not a list of tags", "restore the card, or run `prepare` again")
    return tags


def _document(report: Report, limit: int | None, shown: list[str], trained_on: bool) -> dict[str, Any]:
    tokens = dict(zip(("min", "median", "max"), report.tokens, strict=True)) if report.tokens else None
    return {
        "ok": not report.faults,
        "items": report.items,
        "files": report.files,
        "pictures": report.pictures,
        "with_choices": report.with_choices,
        "tokens": tokens,
        "max_length": limit,
        "scored_on_training_items": trained_on,
        "apart": asdict(report.apart) if report.apart else None,
        "faults": [asdict(fault) for fault in report.faults],
        **({"shown": shown} if shown else {}),
    }


def _print(report: Report, limit: int | None, shown: list[str], trained_on: bool) -> None:
    for text in shown:
        result(text + "\n")
    for fault in report.faults[:LISTED]:
        result(safe(f"{fault.where}: {fault.what}") + f"\n  {say('fix', '办法')}: {safe(fault.fix)}")
    if len(report.faults) > LISTED:
        rest = len(report.faults) - LISTED
        result(say(f"... and {rest} more (--json lists all)", f"……还有 {rest} 处（--json 列出全部）"))
    counts = [
        say(f"{report.items} items", f"{report.items} 条"),
        say(f"{report.pictures} pictures", f"{report.pictures} 张图片"),
        say(f"{report.with_choices} with choices", f"{report.with_choices} 条带选项"),
    ]
    if report.tokens:
        fewest, middle, most = report.tokens
        counts.append(
            say(
                f"{fewest:,} to {most:,} tokens (median {middle:,}; max_length {limit:,})",
                f"{fewest:,} 至 {most:,} 个 token（中位数 {middle:,}；max_length {limit:,}）",
            )
        )
    found = say(f"{len(report.faults)} faults", f"{len(report.faults)} 处问题") if report.faults else say("no faults", "没有问题")
    result(say(f"{found}: {', '.join(counts)}", f"{found}：{'，'.join(counts)}"))
    if report.apart and (told := _told_apart(report.apart)):
        result(safe(say(f"apart: {', '.join(told)}", f"两边不重复：{'，'.join(told)}")))
    if trained_on:
        note(
            say(
                "nothing is held out here: a score on these items is one on training items",
                "这里没有留出评测集：在其上的分数是训练集上的分数",
            )
        )
    if not report.tokens and not report.faults:
        note(say("tokens were not counted: name a model with --model", "未统计 token：请用 --model 指定模型"))


def _told_apart(apart: Apart) -> list[str]:
    """What the files do not share, a phrase each; of a tag how many values each file has."""
    told = [say("pictures (bytes and pixels)", "图片（字节和像素）")] if apart.pictures else []
    if apart.questions:
        told.append(say("questions without a picture", "无图问题"))
    for tag, files in apart.tags.items():
        stems = [Path(file).stem for file in files]
        names = stems if len(set(stems)) == len(stems) else list(files)
        pairs = list(zip(names, files.values(), strict=True))
        (name, count), rest = pairs[0], pairs[1:]
        english = ", ".join([f"{count} value{'s' * (count != 1)} in {name}", *(f"{more} in {other}" for other, more in rest)])
        chinese = "，".join(f"{other} 有 {more} 个值" for other, more in pairs)
        lacking = apart.without[tag]
        english += f"; {lacking} without it" if lacking else ""
        chinese += f"；{lacking} 条没有此标签" if lacking else ""
        told.append(say(f"{tag} ({english})", f"{tag}（{chinese}）"))
    return told


def _spans(line: Line, looks: Sequence[Look], side: TextSide | None, tiling: Tiling) -> tuple[list[tuple[str, bool]], str]:
    """(text, trained?) stretches of an item, and its token counts: from the real ids if there is a tokenizer."""
    from intervale.data.check import prompt_of
    from intervale.data.prompt import IMG_CONTEXT, TEMPLATES, pieces_of, turns_of

    assert line.record is not None
    if side is None:
        turns = turns_of(line.record.messages, [tiling.tokens_of(look.width, look.height) for look in looks])
        pieces = pieces_of(turns, TEMPLATES["internlm2-chat"], bos=True)
        texts = [(piece.text + (f"×{piece.repeat}" if piece.repeat > 1 else ""), piece.train) for piece in pieces]
        return texts, say("template internlm2-chat; token counts need --model", "模板 internlm2-chat；统计 token 需要 --model")
    prompt = prompt_of(line.record, looks, side.tokenizer, side.template, tiling)
    context = side.tokenizer.control(IMG_CONTEXT)
    ids, trained = prompt.ids_S.tolist(), prompt.trained_S.tolist()
    spans, start = [], 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and trained[end] == trained[start] and (ids[end] == context) == (ids[start] == context):
            continue
        count = end - start
        text = (
            f"{IMG_CONTEXT}×{count}" if ids[start] == context else side.tokenizer.backend.decode(ids[start:end], skip_special_tokens=False)
        )
        spans.append((text, trained[start]))
        start = end
    total, targets = len(ids), sum(trained)
    return spans, say(f"{total:,} tokens, {targets} trained", f"{total:,} 个 token，其中 {targets} 个参与训练")


def shown_item(line: Line, looks: dict[Path, Look], side: TextSide | None, tiling: Tiling, coloured: bool) -> str:
    """An item as the model reads it: pictures with their tiles, then the text; what is trained is green, or within 【】."""
    from intervale.data.check import picture_looks
    from intervale.data.tiling import choose_grid

    assert line.record is not None
    seen = picture_looks(line, looks)
    if seen is None:
        return safe(f"── {line.record.id} ({line.where}): " + say("its pictures cannot be read", "图片无法读取"))
    spans, counts = _spans(line, seen, side, tiling)
    lines = [safe(f"── {line.record.id} ({line.where}): {counts}")]
    for (name, _), look in zip(line.pictures, seen, strict=True):
        columns, rows = choose_grid(look.width, look.height, tiling)
        tiles = tiling.tiles_of(look.width, look.height)
        extra = say(" + thumbnail", " + 缩略图") if tiles > columns * rows else ""
        tokens = tiling.tokens_of(look.width, look.height)
        lines.append(
            safe(name)
            + say(
                f": {look.width}x{look.height}, grid {columns}x{rows}{extra} = {tiles} tiles, {tokens:,} tokens",
                f"：{look.width}x{look.height}，网格 {columns}x{rows}{extra} = {tiles} 块，{tokens:,} 个 token",
            )
        )
    text, open_, close = "", *((_GREEN, _PLAIN) if coloured else ("【", "】"))
    inside = False
    for part, trained in spans:
        text += (open_ if trained and not inside else close if inside and not trained else "") + safe(part)
        inside = trained
    return "\n".join([*lines, text + (close if inside else "")])
