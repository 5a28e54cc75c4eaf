"""`intervale evaluate MODEL DATA --out DIR`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from intervale.cli.output import emit_json, note, result
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.cli.evaluate_suite import EndpointOptions, LocalOptions

_MODEL = Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id. Left out with --base-url.")]
_DATA = Annotated[
    Path | None,
    typer.Argument(help="A JSONL file (items with choices and an answer, or open answers); with --suite the benchmark's folder."),
]
_OUT = Annotated[Path, typer.Option(help="Folder for answers and summaries; the same command continues what was stopped.")]
_PROMPT = Annotated[Literal["open", "mcq"], typer.Option(help="open: the bare question, as trained; mcq: with lettered options.")]
_MODE = Annotated[
    Literal["strict", "likelihood", "official"],
    typer.Option(help="strict: the greedy answer must name one choice; likelihood: the most likely choice; official: first letter (mcq)."),
]
_LONGEST = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
_TILES = Annotated[int | None, typer.Option(min=1, help="Tiles a picture (default: the model's, or what the run trained with).")]
_DEVICE = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda when there is one).")]
_PRECISION = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
_FEATURES = Annotated[
    Path | None, typer.Option(help="A folder of pictures' features to read and to write (default: read where training left them).")
]
_LIMIT = Annotated[int | None, typer.Option(min=1, help="Only the first N items (of a suite: of each task).")]
_FRESH = Annotated[bool, typer.Option("--fresh", help="Start over; an earlier evaluation is kept beside as NAME.old-1.")]
_JSON = Annotated[bool, typer.Option("--json", help="One JSON document (the summary) on stdout.")]
_NAME = Annotated[
    Literal["foodieqa"] | None, typer.Option("--suite", help="A benchmark's whole protocol: every prompt, mode and language.")
]
_TASKS = Annotated[str, typer.Option(help="Suite: some of sivqa,mivqa,textqa (default: all that are there).")]
_LANGS = Annotated[str, typer.Option(help="Suite: zh, en (default: both).")]
_PROMPTS = Annotated[str, typer.Option(help="Suite: names of prompts, such as 0,2 (default: all of the protocol).")]
_MODES = Annotated[str, typer.Option(help="Suite: some of strict,official,likelihood (default: all; at an endpoint the first two).")]
_ROTATE = Annotated[
    Literal["none", "seeded", "all"],
    typer.Option(help="Suite: options as they are, in an order drawn for each item (--seed), or in every cyclic order."),
]
_BASELINES = Annotated[str, typer.Option(help="Suite: also some of blind,food-name,name-only (default: none).")]
_FALLBACK = Annotated[
    Literal["wrong", "a", "random"],
    typer.Option(help="Suite: what official makes of an answer without a letter (random: drawn by --seed)."),
]
_SEED = Annotated[int, typer.Option(help="Suite: of --rotate seeded and --fallback random.")]
_ITEMS = Annotated[Path | None, typer.Option(help="Suite: ask only the items whose id is in this prepared JSONL file.")]
_SKIP = Annotated[bool, typer.Option("--skip-bad", help="Suite: leave faulty items out, listed and counted.")]
_DRY = Annotated[bool, typer.Option("--dry-run", help="Suite: only say what it will cost.")]
_URL = Annotated[str | None, typer.Option(help="Ask an OpenAI-compatible server instead, like http://127.0.0.1:8000/v1.")]
_THERE = Annotated[str, typer.Option(help="Endpoint: the model's name there.")]
_KEY = Annotated[str, typer.Option(help="Endpoint: the environment variable with its key (default: INTERVALE_REMOTE_KEY, if it is set).")]
_MANY = Annotated[int, typer.Option(min=1, max=256, help="Endpoint: requests open at a time.")]
_RETRIES = Annotated[int, typer.Option(min=0, max=100, help="Endpoint: how often a request is tried again.")]
_TIMEOUT = Annotated[float, typer.Option(min=0.1, help="Endpoint: seconds to wait for an answer.")]
_PRICES = Annotated[str, typer.Option(help="Endpoint: price of a million prompt and new tokens, such as 2.5,10.")]
_PREFIX = Annotated[
    Literal["assistant", "user"] | None,
    typer.Option(help="Suite: the words that an answer is forced to begin with begin it, or end the question (default at an endpoint)."),
]
_EXTRA = Annotated[str, typer.Option(help="Endpoint: JSON that goes into every request; null takes a key out.")]


@dataclass(frozen=True)
class Asked:
    """What every evaluation is told: `model` is the data where there is an endpoint and no `data`."""

    model: str
    data: Path | None
    out: Path
    prompt: str
    mode: str
    max_new_tokens: int
    limit: int | None
    fresh: bool


def evaluate(
    model: _MODEL,
    out: _OUT,
    data: _DATA = None,
    prompt: _PROMPT = "open",
    mode: _MODE = "strict",
    max_new_tokens: _LONGEST = 64,
    max_tiles: _TILES = None,
    device: _DEVICE = None,
    precision: _PRECISION = "auto",
    features: _FEATURES = None,
    limit: _LIMIT = None,
    fresh: _FRESH = False,
    json_: _JSON = False,
    suite: _NAME = None,
    tasks: _TASKS = "",
    langs: _LANGS = "",
    prompts: _PROMPTS = "",
    modes: _MODES = "",
    rotate: _ROTATE = "none",
    baselines: _BASELINES = "",
    fallback: _FALLBACK = "wrong",
    seed: _SEED = 0,
    items: _ITEMS = None,
    skip_bad: _SKIP = False,
    dry_run: _DRY = False,
    prefix_as: _PREFIX = None,
    base_url: _URL = None,
    model_name: _THERE = "",
    api_key_env: _KEY = "",
    concurrency: _MANY = 8,
    retries: _RETRIES = 6,
    timeout: _TIMEOUT = 120.0,
    prices: _PRICES = "",
    extra: _EXTRA = "",
) -> None:
    """Score a model on questions, with choices or open: accuracy with its interval, per tag, every answer on file."""
    from intervale.cli import evaluate_suite as suites

    local = suites.LocalOptions(max_tiles, device, precision, features)
    wanted = suites.SuiteOptions(tasks, langs, prompts, modes, rotate, baselines, fallback, seed, items, skip_bad, dry_run, prefix_as)
    server = suites.EndpointOptions(model_name, api_key_env, concurrency, retries, timeout, prices, extra)
    asked = Asked(model, data, out, prompt, mode, max_new_tokens, limit, fresh)
    suites.refuse_misplaced(suite, base_url, local, wanted, server, prompt, mode)
    if suite:
        suites.run(asked, local, wanted, server, base_url, json_)
    else:
        _one(asked, local, server, base_url, json_)


def _one(asked: Asked, local: LocalOptions, server: EndpointOptions, base_url: str | None, as_json: bool) -> None:
    """A data set asked one way."""
    from intervale.cli.evaluate_suite import endpoint_asker, model_and_data, used_line

    name, data = model_and_data(asked, base_url)
    if base_url is None:
        from intervale.evaluate.run import evaluate as run
        from intervale.evaluate.run import plan

        job = plan(
            name, data, asked.out, prompt=asked.prompt, mode=asked.mode, max_new_tokens=asked.max_new_tokens, max_tiles=local.max_tiles,
            device=local.device, precision=local.precision, limit=asked.limit, features=local.features,
        )  # fmt: skip
        summary = run(job, fresh=asked.fresh, tell=note)
    else:
        from intervale.evaluate.endpoint_run import evaluate_endpoint, plan_endpoint

        asker = endpoint_asker(base_url, server, asked.max_new_tokens, text=True, letters=False)
        there = plan_endpoint(asker, data, asked.out, prompt=asked.prompt, mode=asked.mode, limit=asked.limit)
        summary = evaluate_endpoint(there, fresh=asked.fresh, tell=note)
    if as_json:
        return emit_json(summary)
    for line in shown(summary, sys.stdout.isatty()):
        result(line)
    if "used" in summary:
        result(used_line(summary["used"]))
    result(say(f"written to {asked.out}", f"已写入 {asked.out}"))


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
    from intervale.evaluate.report_facts import kept_back
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
    if kept := kept_back(summary):
        lines.append(say("counted as wrong: ", "计为错误：") + "; ".join(kept))
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
