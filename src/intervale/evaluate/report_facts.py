"""The report's last section: what exactly was compared, by hashes, seeds and versions, and how the numbers were computed."""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import say
from intervale.evaluate.labels import is_open, protocol_words
from intervale.evaluate.seen import reason_of

_NONE = "–"


def seen_words(side: dict[str, Any]) -> str:
    """Yes, no or not known, and why."""
    answer = {True: say("yes", "是"), False: say("no", "否"), None: say("not known", "未知")}[side["scored_on_training_items"]]
    return f"{answer}{say(': ', '：')}{reason_of(side)}"


def _hash(side: dict[str, Any], name: str) -> str:
    return str((side.get("hashes") or {}).get(name) or _NONE)


def _adapter(side: dict[str, Any]) -> str:
    model = side["model"]
    own = (side.get("hashes") or {}).get("adapter") or model.get("checkpoint_fingerprint")
    return " ".join([*([model["checkpoint"]] if model.get("checkpoint") else []), *([f"({own})"] if own else [])]) or _NONE


def _where(model: dict[str, Any]) -> str:
    """Precision and device; of a model behind an address neither is known."""
    return ", ".join(str(model[key]) for key in ("precision", "device") if model.get(key)) or _NONE


def _pictures(side: dict[str, Any]) -> str:
    return str((side.get("data") or {}).get("pictures") or say("not on file", "没有记录"))


def kept_back(side: dict[str, Any]) -> list[str]:
    """What a server did not give, which a score counts as wrong, in words; empty for a model of our own."""
    told = []
    if side.get("unseen"):
        told.append(
            say(
                f"{side['unseen']} without a letter among the server's likeliest tokens",
                f"{side['unseen']} 条在服务器给出的最可能 token 中没有选项字母",
            )
        )
    if side.get("refused"):
        told.append(say(f"{side['refused']} refused by the server", f"{side['refused']} 条被服务器拒绝"))
    return told


def _odd(side: dict[str, Any], free: bool) -> str:
    more = "".join(f"; {told}" for told in kept_back(side))
    if free:
        return say(f"{side.get('empty', 0)} empty", f"空回答 {side.get('empty', 0)}") + more
    return str(side.get("unparsed", 0) + side.get("ties", 0)) + more


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    sides = found["before"], found["after"]
    free = is_open(found["protocol"])

    def row(name: str, *values: str) -> tuple[str, str, str]:
        return name, values[0], values[1]

    software = ("intervale", "torch", "transformers")
    return [
        row(say("model", "模型"), *(str(side["model"]["name"]) for side in sides)),
        row(
            say("base weights", "基础权重"),
            *(str((side.get("hashes") or {}).get("base") or side["model"].get("fingerprint") or _NONE) for side in sides),
        ),
        row(say("adapter", "适配器"), *(_adapter(side) for side in sides)),
        row(say("merged weights", "合并后的权重"), *(_hash(side, "merged") for side in sides)),
        row(say("precision, device", "精度、设备"), *(_where(side["model"]) for side in sides)),
        row(say("data", "数据"), *(f"{side['data']['file']} ({side['data']['digest']})" for side in sides)),
        row(say("pictures", "图片"), *(_pictures(side) for side in sides)),
        row(
            say("answers not recognised, or ties", "未识别或并列") if not free else say("answers", "回答"),
            *(_odd(side, free) for side in sides),
        ),
        row(say("seen in training", "是否训练数据"), *(seen_words(side) for side in sides)),
        row(say("seed of the training", "训练随机种子"), *(_seed(side) for side in sides)),
        row(say("software", "软件"), *(", ".join(f"{name} {side['versions'][name]}" for name in software) for side in sides)),
    ]


def _seed(side: dict[str, Any]) -> str:
    seed = (side.get("seeds") or {}).get("training")
    return _NONE if seed is None else str(seed)


def _methods(found: dict[str, Any]) -> str:
    drawn = found["difference"]["bootstrap"]
    parts = [
        say("accuracies: Wilson, 95%", "准确率：Wilson 区间，95%"),
        say("difference: Newcombe's method 10 for paired shares, 95%", "差值：配对比例的 Newcombe 方法 10，95%"),
        say("p: McNemar's exact test, two-sided", "p：McNemar 精确检验，双侧"),
        say(f"drawing whole pictures: bootstrap, {drawn['resamples']:,} draws, seed {drawn['seed']}",
            f"按整张图片重抽样：自助法，{drawn['resamples']:,} 次，种子 {drawn['seed']}"),
    ]  # fmt: skip
    least = found["power"]["detectable"]
    if least is not None:
        parts.append(
            say(
                f"least difference found four times in five: {100 * least:.1f} points",
                f"五次能看出四次的最小差异：{100 * least:.1f} 个百分点",
            )
        )
    return say("; ", "；").join(parts)


def facts_html(found: dict[str, Any]) -> str:
    """The section."""
    names = (say("before", "之前"), say("after", "之后"))

    def cells(one: str, two: str) -> str:
        if one == two:
            return f'<td colspan="2">{escape(one)}</td>'
        return "".join(f'<td data-side="{side}">{escape(value)}</td>' for side, value in zip(names, (one, two), strict=True))

    body = "".join(f"<tr><th>{name}</th>{cells(one, two)}</tr>" for name, one, two in _rows(found))
    return (
        f"<section><h2>{say('What was compared', '比较对象')}</h2><table class='facts'><thead><tr><th></th><th>{names[0]}</th><th>{names[1]}</th></tr></thead>"
        f"<tbody>{body}</tbody></table><p class='soft'>{say('asked', '提问与评分')}{say(': ', '：')}{escape(protocol_words(found['protocol']))}</p>"
        f"<p class='soft'>{say('statistics', '统计')}{say(': ', '：')}{escape(_methods(found))}</p></section>"
    )
