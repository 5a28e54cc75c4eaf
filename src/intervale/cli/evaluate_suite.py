"""`intervale evaluate ... --suite foodieqa`: what the options mean, what it will cost, and the table at the end."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intervale.cli.output import emit_json, note, result
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.cli.evaluate import Asked
    from intervale.evaluate.endpoint import EndpointAsker
    from intervale.evaluate.suite import Asker, Settings

OWN_KEY = "INTERVALE_REMOTE_KEY"


@dataclass(frozen=True)
class LocalOptions:
    """Of a model in this process."""

    max_tiles: int | None = None
    device: str | None = None
    precision: str = "auto"
    features: Path | None = None


@dataclass(frozen=True)
class SuiteOptions:
    """The suite's words of the command line, lists still joined by commas."""

    tasks: str = ""
    langs: str = ""
    prompts: str = ""
    modes: str = ""
    rotate: str = "none"
    baselines: str = ""
    fallback: str = "wrong"
    seed: int = 0
    items: Path | None = None
    skip_bad: bool = False
    dry_run: bool = False
    prefix_as: str | None = None


@dataclass(frozen=True)
class EndpointOptions:
    """An endpoint's words of the command line."""

    model_name: str = ""
    api_key_env: str = ""
    concurrency: int = 8
    retries: int = 6
    timeout: float = 120.0
    prices: str = ""
    extra: str = ""


def _given(options: Any) -> list[str]:
    """The options that are not left at their defaults, as they are typed."""
    plain = type(options)()
    return [f"--{field.name.replace('_', '-')}" for field in fields(options) if getattr(options, field.name) != getattr(plain, field.name)]


def refuse_misplaced(
    suite: str | None, base_url: str | None, local: LocalOptions, wanted: SuiteOptions, server: EndpointOptions, prompt: str, mode: str
) -> None:
    """Raise a UserError for an option that this evaluation would pass over in silence."""
    from intervale.core.errors import UserError

    mine = [name for name, value, default in (("--prompt", prompt, "open"), ("--mode", mode, "strict")) if value != default]
    for names, wrong, why in (
        (_given(wanted), suite is None, "belongs to --suite"),
        (mine, suite is not None, "is a data set's; a suite has --prompts and --modes"),
        (_given(server), base_url is None, "belongs to --base-url"),
        (_given(local), base_url is not None, "belongs to a model in this process"),
    ):
        if wrong and names:
            raise UserError(f"{names[0]} {why}", "leave it out, or see `intervale evaluate --help`")


def words(text: str) -> tuple[str, ...]:
    """The entries of a list joined by commas; 'all' and '' are none, which stands for all."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    return () if found == ("all",) else found


def settings_of(options: SuiteOptions, endpoint: bool) -> Settings:
    """The suite's settings. Raises: UserError for a word that is not known."""
    from intervale.evaluate.foodieqa import LANGUAGES
    from intervale.evaluate.suite import Settings, checked
    from intervale.evaluate.suite_score import MODES

    # Not every endpoint gives log-probabilities, so there they are asked for by name only.
    modes = words(options.modes) or (tuple(mode for mode in MODES if mode != "likelihood") if endpoint else MODES)
    return checked(
        Settings(
            languages=words(options.langs) or LANGUAGES,
            modes=tuple(mode for mode in MODES if mode in modes) + tuple(mode for mode in modes if mode not in MODES),
            prompts=words(options.prompts),
            rotate=options.rotate,
            views=("picture", *(view for view in words(options.baselines) if view != "picture")),
            fallback=options.fallback,
            seed=options.seed,
            prefix_as=options.prefix_as or ("user" if endpoint else "assistant"),  # not every server can go on with an answer
        )
    )


def model_and_data(asked: Asked, base_url: str | None) -> tuple[str, Path]:
    """(model, data) of the two words of the command line: an endpoint needs no model, so there the first may be the data."""
    from intervale.core.errors import UserError

    if base_url is not None and asked.data is not None:
        raise UserError(f"with --base-url there is no model folder, but {asked.model} and {asked.data} were given",
                        "write `intervale evaluate DATA --base-url URL --model-name NAME`")  # fmt: skip
    if base_url is None and asked.data is None:
        raise UserError("the data is missing", "write `intervale evaluate MODEL DATA --out DIR`")
    return (asked.model, asked.data) if asked.data is not None else ("", Path(asked.model))


def endpoint_asker(base_url: str, options: EndpointOptions, max_new_tokens: int, *, text: bool, letters: bool) -> EndpointAsker:
    """The asker of an endpoint. Raises: UserError for an address, a key, prices or extras that cannot be used."""
    from intervale.core.errors import UserError
    from intervale.engine.upstream import web_address
    from intervale.engine.whole import Server
    from intervale.evaluate.endpoint import EndpointAsker, parse_extra

    key = os.environ.get(options.api_key_env or OWN_KEY, "")
    if options.api_key_env and not key:
        raise UserError(f"the environment variable {options.api_key_env} is not set", "set it to the endpoint's key")
    if not options.model_name:
        raise UserError("the endpoint's model has no name", "add --model-name, the name that the server lists under /v1/models")
    try:
        prices = [float(price) for price in options.prices.split(",")] if options.prices else []
    except ValueError:
        prices = [0.0]
    if len(prices) not in (0, 2) or any(not 0 <= price < float("inf") for price in prices):
        raise UserError(
            f"--prices {options.prices!r} are not two numbers", "give the price of a million prompt and of a million new tokens: 2.5,10"
        )
    _plain(base_url)
    server = Server(
        web_address(base_url), options.model_name, key, concurrency=options.concurrency, retries=options.retries, seconds=options.timeout,
        extra=parse_extra(options.extra),
    )  # fmt: skip
    return EndpointAsker(server, max_new_tokens, text, letters, (prices[0], prices[1]) if prices else None)


def _plain(base_url: str) -> None:
    """Raise a UserError for an address that holds more than a place to ask: it stands in every summary and report."""
    from urllib.parse import urlsplit

    from intervale.core.errors import UserError

    try:
        parts = urlsplit(base_url)
        more = "a name or password" if parts.username or parts.password else "a query" if parts.query or parts.fragment else ""
    except ValueError:  # no address at all: told by whoever reads it
        return
    if more:
        raise UserError(
            f"--base-url holds more than an address: {more}",
            f"write {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}, and name the variable that holds the key with --api-key-env",
        )


def run(asked: Asked, local: LocalOptions, options: SuiteOptions, server: EndpointOptions, base_url: str | None, as_json: bool) -> None:
    """Say what the suite will cost, run it (unless it is only to be told), print the tables."""
    from intervale.cli.prepare import tell_terms
    from intervale.core.errors import UserError, nearest
    from intervale.data.foodieqa import licence_of
    from intervale.evaluate.foodieqa import TASKS
    from intervale.evaluate.suite import askings_of, cost, run_suite
    from intervale.evaluate.suite_data import read_suite

    tasks = words(options.tasks)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}{nearest(task, TASKS)}", f"use some of {', '.join(TASKS)}")
    name, data = model_and_data(asked, base_url)
    settings = settings_of(options, base_url is not None)
    asker: Asker
    if base_url is not None:
        asker = endpoint_asker(base_url, server, asked.max_new_tokens, text=settings.text, letters=settings.letters)
    else:
        from intervale.evaluate.suite_local import local_asker

        asker = local_asker(
            name, max_new_tokens=asked.max_new_tokens, max_tiles=local.max_tiles, device=local.device, precision=local.precision,
            text=settings.text, letters=settings.letters, features=local.features,
        )  # fmt: skip
    found = read_suite(data, tasks, settings.languages, only=options.items, limit=asked.limit, skip_bad=options.skip_bad)
    tell_terms(licence_of(found.parts[0].source), str(data))
    lines = cost(found, askings_of(found, settings), asker, settings)
    for line in lines:
        (result if options.dry_run and not as_json else note)(line)
    if options.dry_run:
        return emit_json({"cost": lines}) if as_json else None
    suite = run_suite(found, settings, asker, asked.out, fresh=asked.fresh, tell=note)
    if as_json:
        return emit_json(suite)
    for line in shown(suite, sys.stdout.isatty()):
        result(line)
    result(say(f"written to {asked.out}", f"已写入 {asked.out}"))


def shown(suite: dict[str, Any], coloured: bool) -> list[str]:
    """The tables for a terminal: every prompt, their mean and maximum, what was left out, the warning in red.

    Of the options' orders only the first stands in the table; what all of them say together follows.
    """
    lines = _table([row for row in suite["tables"] if row["turn"] in ("as-is", "seeded")])
    lines += [_orders(row) for row in suite["rotations"]]
    for part in suite["left_out"]:
        if part["left_out"]:
            kinds = ", ".join(sorted({entry["kind"] for entry in part["left_out"]}))
            lines.append(say(f"{part['task']} {part['language']}: {len(part['left_out'])} of {part['in_file']} items left out ({kinds}), see suite.json",
                             f"{part['task']} {part['language']}：{part['in_file']} 条中跳过 {len(part['left_out'])} 条（{kinds}），见 suite.json"))  # fmt: skip
    used = suite["used"]
    lines.append(used_line(used))
    if any(row["scored_on_training_items"] for row in suite["combinations"]):
        text = say("SCORED ON TRAINING ITEMS: this shows that training worked, not how good the model is",
                   "在训练数据上评分：这只说明训练有效，不代表模型水平")  # fmt: skip
        lines.append(("\x1b[1;31m" + text + "\x1b[0m") if coloured else text)
    return lines


def used_line(used: dict[str, Any]) -> str:
    """Tokens, of how many answers they are not known, and the price where it is."""
    untold = say(f" (not told for {used['untold']} answers)", f"（{used['untold']} 个回答未给出）") if used["untold"] else ""
    price = say(f", price {used['price']:.4f}", f"，费用 {used['price']:.4f}") if used["price"] is not None else ""
    return say(f"{used['askings']} askings, {used['prompt_tokens']:,} prompt tokens, {used['tokens']:,} new tokens{untold}{price}",
               f"{used['askings']} 次提问，{used['prompt_tokens']:,} 个输入 token，{used['tokens']:,} 个输出 token{untold}{price}")  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Columns: what was asked, n, each prompt, mean, maximum, chance; under a row what its scores hide."""
    most = max(len(row["prompts"]) for row in rows)
    names = [" ".join([row["task"], row["language"], row["mode"], *([row["view"]] if row["view"] != "picture" else [])]) for row in rows]
    width, scores = max(map(len, names)), max(12 * most, len("accuracy by prompt"))
    head = say(
        f"{'n':>5}  {'accuracy by prompt':<{scores}}    mean  maximum     chance",
        f"{'n':>5}  {'各提示的准确率':<{scores - 7}}    平均  最高        随机",
    )
    lines = [" " * width + head]
    for name, row in zip(names, rows, strict=True):
        cells = "".join(f"{prompt + ': ' + format(score['accuracy'], '.1%'):<12}" for prompt, score in row["prompts"].items())
        best = f"{row['max']:.1%} ({row['max_prompt']})"
        lines.append(f"{name:<{width}}{row['n']:>5}  {cells:<{scores}}  {row['mean']:>6.1%}  {best:<11} {row['chance']:.1%}")
        lines += [f"    {told}" for told in _hidden(row)]
    if not all(row["complete"] for row in rows):
        lines.append(say("not all prompts of the protocol were asked: a maximum over some is no published number",
                         "没有问完协议的全部提示：部分提示中的最高值不能与已发表的数字相比"))  # fmt: skip
    return lines


def _orders(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    name = " ".join([row["task"], row["language"], row["mode"], *([row["view"]] if row["view"] != "picture" else [])])
    share = f"{row['all_right_share']:.1%} [{low:.1%}, {high:.1%}]"
    return say(f"{name}, prompt {row['prompt']}: right in every order {share}; one order {row['min']:.1%} to {row['max']:.1%}, mean {row['mean']:.1%}",
               f"{name}，提示 {row['prompt']}：所有顺序都答对 {share}；单个顺序 {row['min']:.1%} 至 {row['max']:.1%}，平均 {row['mean']:.1%}")  # fmt: skip


def _hidden(row: dict[str, Any]) -> list[str]:
    """What a row's scores hide: answers that were not read, cut, refused, or filled by the official scorer's fallback; ties."""
    words = {
        "unparsed": ("without a choice", "未识别出选项"), "cut_off": ("cut at the limit", "达到长度上限"), "ties": ("ties", "并列"),
        "refused": ("refused", "被拒绝"), "unseen": ("without a letter among the likeliest tokens", "最可能的 token 中没有选项字母"),
    }  # fmt: skip
    told = [say(f"{row[key]} {en}", f"{row[key]} 个{zh}") for key, (en, zh) in words.items() if row.get(key)]
    fall = row.get("fallback", {"used": 0, "policy": "wrong"})
    if fall["used"] and fall["policy"] != "wrong":
        told.append(say(f"the fallback ({fall['policy']}) made {fall['right']} of {fall['used']} right",
                        f"回退策略（{fall['policy']}）使 {fall['used']} 个中的 {fall['right']} 个判对"))  # fmt: skip
    answers = sum(score["n"] for score in row["prompts"].values())
    return [say(f"of {answers} answers: ", f"{answers} 个回答中：") + ", ".join(told)] if told else []
