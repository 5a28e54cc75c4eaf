"""A comparison as one HTML file that needs nothing else: no script, no font, no request; for a screen, a phone and paper.

Promises: every text from data or model is escaped (and the page's own policy forbids scripts and requests, should one slip
through); the same comparison of the same pictures gives the same bytes; its items take under 3 MB. Cost: one decode a picture shown.
"""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import language, say
from intervale.evaluate.folder import sees_choices, telling_tags
from intervale.evaluate.report_gallery import gallery_html
from intervale.evaluate.report_style import STYLE
from intervale.evaluate.report_training import training_html

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float) -> str:
    """0.7266 as 72.7%."""
    return f"{share:.1%}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−") + say(" points", " 个百分点")


def p_value(p: float) -> str:
    """p = 0.23, p = 0.012, p = 3·10⁻²⁶: its size can be read, however small it is."""
    if p >= 0.0001:
        return f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
    if p < 1e-300:
        return "p < 10⁻³⁰⁰"
    digit, power = f"{p:.0e}".split("e")
    ten = "10" + str(int(power)).translate(_SUPERSCRIPT)
    return f"p = {ten}" if digit == "1" else f"p = {digit}·{ten}"


def _odds(p: float) -> str:
    """How often two equally good models would differ at least this much, for a reader who has never met a p value."""
    if p < 1e-6:
        return say("less than once in a million tries", "的机会不到百万分之一")
    times = float(f"{1 / p:.2g}")
    return say(f"about once in {times:,.0f} tries", f"的机会约为 {times:,.0f} 分之一")


def in_words(found: dict[str, Any]) -> str:
    """What the paired test says, in a sentence that does not claim more than it may."""
    pairs, p = found["pairs"], found["mcnemar"]["p"]
    fixed, broken = pairs["fixed"], pairs["broken"]
    if fixed + broken == 0:
        return say(
            "No item changed: both models are right and wrong on the same items.", "没有任何变化：两个模型答对和答错的题目完全相同。"
        )
    better = fixed > broken
    told = say(
        f"{fixed} items fixed, {broken} broken ({p_value(p)}, exact McNemar test). ",
        f"改对 {fixed} 条，改错 {broken} 条（{p_value(p)}，McNemar 精确检验）。",
    )
    if p < 0.05:
        return told + say(
            f"If both models were equally good, so uneven a split would come about by chance {_odds(p)}: the second model is {'better' if better else 'worse'} on these items.",
            f"若两个模型同样好，偶然出现如此悬殊比例{_odds(p)}：第二个模型在这些题目上{'更好' if better else '更差'}。",
        )
    return told + say(
        "Chance alone could give such a split; this does not show which model is better. More items would.",
        "偶然也可能造成这样的比例；这不能说明哪个模型更好，需要更多题目。",
    )


def _e(text: Any) -> str:
    return escape(str(text))


def _unbroken(text: str) -> str:
    """Escaped, and without a line's end inside `p = ...` or before a unit."""
    for loose in ("p = ", "p < ", " points", " 个百分点"):
        text = text.replace(loose, loose.replace(" ", "\u00a0"))
    return _e(text)


def _bar(top: float, height: float, score: dict[str, Any], colour: str) -> str:
    """A bar and its interval in a box 100 wide. Strokes keep their width whatever the box is stretched to."""
    low, high = (100 * end for end in score["interval"])
    middle = top + height / 2
    whisker = f'<path d="M{low:.2f} {middle}H{high:.2f}M{low:.2f} {middle - 2}v4M{high:.2f} {middle - 2}v4" stroke="#1b2430" stroke-opacity=".75" fill="none" vector-effect="non-scaling-stroke"/>'
    return f'<rect x="0" y="{top}" width="{100 * score["accuracy"]:.2f}" height="{height}" rx=".4" fill="{colour}"/>{whisker}'


def _bars(before: dict[str, Any], after: dict[str, Any], chance: float | None = None, style: str = "") -> str:
    line = ""
    if chance is not None:
        line = f'<path d="M{100 * chance:.2f} 0V24" stroke="#5d6b7c" stroke-dasharray="3 3" vector-effect="non-scaling-stroke"/>'
    label = say(
        f"before {percent(before['accuracy'])}, after {percent(after['accuracy'])}",
        f"之前 {percent(before['accuracy'])}，之后 {percent(after['accuracy'])}",
    )
    return (
        f'<svg class="bars {style}" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{_e(label)}">'
        f'<rect width="100" height="24" fill="#f4f6f9"/>{_bar(2, 9, before, "#b4bfcd")}{_bar(13, 9, after, "#4aa899")}{line}</svg>'
    )


def _interval(side: dict[str, Any]) -> str:
    low, high = side["interval"]
    return f"{percent(low)} – {percent(high)}"


def _by(told: dict[str, Any], beside: dict[str, Any]) -> str:
    """How a comparison scored, in words, and where else it differs from the one it stands beside."""
    mode, prompt = told["protocol"]["mode"], told["protocol"]["prompt"]
    names = {
        "likelihood": say("By likelihood", "按似然评分"),
        "strict": say("By strict answers", "按严格作答评分"),
        "official": say("By the benchmark's own rule", "按基准官方规则评分"),
    }
    more = [say(f"prompt {prompt}", f"提问方式 {prompt}")] if prompt != beside["protocol"]["prompt"] else []
    more += [say(f"{told['n']} items", f"{told['n']} 题")] if told["n"] != beside["n"] else []
    return names.get(mode, mode) + (say(f" ({', '.join(more)})", f"（{'，'.join(more)}）") if more else "")


def _also(extra: dict[str, Any] | None, found: dict[str, Any]) -> str:
    if extra is None:
        return ""
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in extra["difference"]["interval"])
    told = (
        f"{percent(extra['before']['accuracy'])} → {percent(extra['after']['accuracy'])}{say(', ', '，')}"
        f"{points(extra['difference']['value'])} [{low}, {high}]{say(', McNemar ', '，McNemar ')}{p_value(extra['mcnemar']['p'])}"
    )
    return f'<p class="also"><strong>{_e(_by(extra, found))}{say(": ", "：")}</strong>{_unbroken(told)}</p>'


def _headline(found: dict[str, Any], extra: dict[str, Any] | None) -> str:
    before, after, difference = found["before"], found["after"], found["difference"]
    low, high = difference["interval"]
    # Colour only what the data shows.
    shade = "up" if low > 0 else "down" if high < 0 else ""

    def number(name: str, side: dict[str, Any]) -> str:
        counts = say(f"{side['correct']:,} of {side['n']:,} right", f"{side['n']:,} 题答对 {side['correct']:,} 题")
        return f'<div class="number"><span class="soft">{name}</span><b>{percent(side["accuracy"])}</b><span class="soft">{counts}<br>{_interval(side)}</span></div>'

    value, _, unit = points(difference["value"]).partition(" ")
    change = (
        f'<div class="number change"><span class="soft">{say("difference", "差值")}</span><b class="{shade}">{value} <small>{unit}</small></b>'
        f'<span class="soft">{say("95% interval", "95% 区间")}<br>{points(low).partition(" ")[0]} {say("to", "至")} {points(high)}</span></div>'
    )
    legend = [
        f'<span class="key"></span>{say("before", "之前")}',
        f'<span class="key a"></span>{say("after", "之后")}',
        say("thin lines: 95% intervals", "细线：95% 区间"),
    ]
    chance = found["chance"] if sees_choices(found["protocol"]) else None
    if chance is not None:
        legend.append(say(f"dashed: chance, {percent(chance)}", f"虚线：随机水平 {percent(chance)}"))
    spans = "".join(f"<span>{part}</span>" for part in legend)
    return (
        f'<section><div class="hero">{number(say("before", "之前"), before)}<div class="arrow">→</div>{number(say("after", "之后"), after)}{change}</div>'
        f'{_bars(before, after, chance, "wide")}<div class="scale"><span>0%</span><span>50%</span><span>100%</span></div>'
        f'<div class="legend soft">{spans}</div><p class="words">{_unbroken(in_words(found))}</p>{_also(extra, found)}</section>'
    )


def _table(pairs: dict[str, int]) -> str:
    right, wrong = say("right after", "之后答对"), say("wrong after", "之后答错")
    return (
        f"<section><h2>{say('Item by item', '逐题对照')}</h2><table class='pairs'><tr><th></th><th>{right}</th><th>{wrong}</th></tr>"
        f"<tr><th>{say('right before', '之前答对')}</th><td><b>{pairs['both_right']}</b>{say('both right', '都对')}</td><td class='bad'><b>{pairs['broken']}</b>{say('broken', '改错')}</td></tr>"
        f"<tr><th>{say('wrong before', '之前答错')}</th><td class='good'><b>{pairs['fixed']}</b>{say('fixed', '改对')}</td><td><b>{pairs['both_wrong']}</b>{say('both wrong', '都错')}</td></tr></table></section>"
    )


def _per_tag(found: dict[str, Any]) -> str:
    parts = []
    for tag in telling_tags(found["tags"], found["n"]):
        rows = []
        for value, both in found["tags"][tag].items():
            before, after = both["before"], both["after"]
            rows.append(
                f'<div class="row"><div class="label">{_e(value)} <small>n={after["n"]}</small></div>{_bars(before, after)}'
                f'<div class="value">{percent(before["accuracy"])} → {percent(after["accuracy"])}</div></div>'
            )
        parts.append(f"<div class='whole'><h3>{_e(tag)}</h3><div>{''.join(rows)}</div></div>")
    if not parts:
        return ""
    few = say("A group of few items has a wide interval: read the thin lines before the bars.", "题目少的组区间很宽：先看细线，再看色条。")
    return f'<section class="long"><h2>{say("By group", "分组结果")}</h2><p class="soft">{few}</p>{"".join(parts)}</section>'


def _facts(found: dict[str, Any]) -> str:
    before, after = found["before"], found["after"]
    rows = [
        (say("model", "模型"), before["model"]["name"], after["model"]["name"]),
        (say("base weights", "基础权重"), before["model"]["fingerprint"], after["model"]["fingerprint"]),
        (say("checkpoint", "检查点"), *(_checkpoint(side["model"]) for side in (before, after))),
        (say("precision, device", "精度、设备"), *(f"{side['model']['precision']}, {side['model']['device']}" for side in (before, after))),
        (say("data", "数据"), *(f"{side['data']['file']} ({side['data']['digest']})" for side in (before, after))),
        (say("not recognised or tied", "未识别或并列"), *(side.get("unparsed", 0) + side.get("ties", 0) for side in (before, after))),
        (say("seen in training", "是否训练数据"), *(_seen(side) for side in (before, after))),
        (say("software", "软件"), *(", ".join(f"{name} {side['versions'][name]}" for name in ("intervale", "torch", "transformers")) for side in (before, after))),
    ]  # fmt: skip
    asked = "; ".join(f"{key} {value}" for key, value in found["protocol"].items() if value is not None)
    names = (say("before", "之前"), say("after", "之后"))

    def cells(one: Any, two: Any) -> str:
        if one == two:
            return f'<td colspan="2">{_e(one)}</td>'
        return "".join(f'<td data-side="{side}">{_e(value)}</td>' for side, value in zip(names, (one, two), strict=True))

    body = "".join(f"<tr><th>{name}</th>{cells(one, two)}</tr>" for name, one, two in rows)
    methods = f"{found['mcnemar']['method']}; {found['difference']['method']}; {say('accuracies: Wilson 95%', '准确率：Wilson 95%')}"
    return (
        f"<section><h2>{say('What was compared', '比较对象')}</h2><table class='facts'><thead><tr><th></th><th>{names[0]}</th><th>{names[1]}</th></tr></thead>"
        f"<tbody>{body}</tbody></table><p class='soft'>{say('protocol', '协议')}: {_e(asked)}</p><p class='soft'>{say('statistics', '统计')}: {_e(methods)}</p></section>"
    )


def _checkpoint(model: dict[str, Any]) -> str:
    return f"{model['checkpoint']} ({model['checkpoint_fingerprint']})" if model["checkpoint"] else "–"


def _seen(side: dict[str, Any]) -> str:
    answer = {True: say("yes", "是"), False: say("no", "否"), None: say("not known", "未知")}[side["scored_on_training_items"]]
    return f"{answer}: {side['scored_on_training_items_reason']}"


def _banner(*told: dict[str, Any]) -> str:
    sides = [found[side] for found in told for side in ("after", "before")]
    why = next((side["scored_on_training_items_reason"] for side in sides if side["scored_on_training_items"]), None)
    if why is None:
        return ""
    strong = say("Scored on training items.", "在训练数据上评分。")
    text = say(
        "This shows that the training worked, not how good the model is on anything new.", "这只说明训练有效，不代表模型在新数据上的水平。"
    )
    return f'<div class="banner" role="alert"><strong>{strong}</strong>{text}<br><span class="soft">{_e(why)}</span></div>'


def report_html(found: dict[str, Any], extra: dict[str, Any] | None = None) -> str:
    """The page of a comparison (`evaluate.compare.compare`), in the user's language; `extra` is a second one, told in a row.

    Reads the pictures of the items it shows.
    """
    title = say("Before and after", "训练前后对比")
    asked = found["protocol"]
    under = say(f"{found['n']:,} items, prompt {asked['prompt']}, mode {asked['mode']}",
                f"{found['n']:,} 题，提问方式 {asked['prompt']}，评分方式 {asked['mode']}")  # fmt: skip
    models = f"{found['before']['model']['name']} → {found['after']['model']['name']}"
    body = "".join([
        _banner(found, *([extra] if extra else [])),
        _headline(found, extra),
        _table(found["pairs"]),
        _per_tag(found),
        training_html(found["training"]),
        gallery_html(found),
        _facts(found),
    ])  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if language() == "zh" else "en"}"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} · intervale</title><style>{STYLE}</style></head>'
        f'<body><main><h1>{title}</h1><div class="soft under">{_e(under)}<br>{_e(models)}</div>{body}</main></body></html>\n'
    )
