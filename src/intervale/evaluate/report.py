"""A comparison as one HTML file that needs nothing else: no script, no font, no request; for a screen, a phone and paper.

Promises: every text from data or model is escaped (and the page's own policy forbids scripts and requests, should one slip
through); the same comparison of the same pictures gives the same bytes; its items take under 3 MB. Cost: one decode a picture shown.
"""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import language, say
from intervale.evaluate.folder import sees_choices
from intervale.evaluate.labels import is_open, mode_name, prompt_name
from intervale.evaluate.report_calibration import calibration_html
from intervale.evaluate.report_facts import facts_html
from intervale.evaluate.report_gallery import gallery_html
from intervale.evaluate.report_groups import bars, graded_html, groups_html
from intervale.evaluate.report_others import others_html
from intervale.evaluate.report_published import published_html
from intervale.evaluate.report_style import STYLE
from intervale.evaluate.report_training import training_html
from intervale.evaluate.seen import reason_of

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
        "Chance alone could give such a split; this does not show which model is better.",
        "偶然也可能造成这样的比例；这不能说明哪个模型更好。",
    ) + _power(found)  # fmt: skip


def _power(found: dict[str, Any]) -> str:
    """What these items could have shown at all."""
    n, least = found["n"], found["power"]["detectable"]
    if least is None:
        return say(f" {n} items are too few to show any difference.", f"{n} 道题太少，任何差异都看不出来。")
    return say(
        f" {n} items of which {percent(found['power']['changed'])} changed show a difference of {points(least).removeprefix('+')} four times in five; a smaller one needs more items.",
        f"{n} 道题、其中 {percent(found['power']['changed'])} 有变化时，{points(least).removeprefix('+')}的差异五次中能看出四次；更小的差异需要更多题目。",
    )


def _e(text: Any) -> str:
    return escape(str(text))


def _unbroken(text: str) -> str:
    """Escaped, and without a line's end inside `p = ...` or before a unit."""
    for loose in ("p = ", "p < ", " points", " 个百分点"):
        text = text.replace(loose, loose.replace(" ", "\u00a0"))
    return _e(text)


def _interval(side: dict[str, Any]) -> str:
    low, high = side["interval"]
    return f"{percent(low)} – {percent(high)}"


def _by(told: dict[str, Any], beside: dict[str, Any]) -> str:
    """How a comparison scored, in words, and where else it differs from the one it stands beside."""
    mode = mode_name(told["protocol"])
    more = [prompt_name(told["protocol"]["prompt"])] if told["protocol"]["prompt"] != beside["protocol"]["prompt"] else []
    more += [say(f"{told['n']} items", f"{told['n']} 题")] if told["n"] != beside["n"] else []
    return say(f"By {mode}", f"按{mode}评分") + (say(f" ({', '.join(more)})", f"（{'，'.join(more)}）") if more else "")


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
    name = say("right answer contained: ", "包含正确答案：") if is_open(found["protocol"]) else ""
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
        f'<section><div class="hero">{number(name + say("before", "之前"), before)}<div class="arrow">→</div>{number(name + say("after", "之后"), after)}{change}</div>'
        f'{bars(before, after, chance, "wide")}<div class="scale"><span>0%</span><span>50%</span><span>100%</span></div>'
        f'<div class="legend soft">{spans}</div><p class="words">{_unbroken(in_words(found))}</p>{_clusters(found)}{_also(extra, found)}</section>'
    )


def _clusters(found: dict[str, Any]) -> str:
    """The interval that draws whole pictures, where several questions share one."""
    drawn = found["difference"]["bootstrap"]
    unchanged = found["pairs"]["fixed"] + found["pairs"]["broken"] == 0  # every draw is 0 then, which says nothing
    if drawn["interval"] is None or drawn["groups"] >= found["n"] or unchanged:
        return ""
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in drawn["interval"])
    told = say(
        f"The {found['n']:,} items stand on {drawn['groups']:,} pictures, and questions on one picture go right or wrong together: drawing whole pictures gives {low} to {high} points.",
        f"{found['n']:,} 道题来自 {drawn['groups']:,} 张图片，同一张图的问题往往同对同错：按整张图片重抽样，区间为 {low} 至 {high} 个百分点。",
    )
    return f'<p class="soft">{_unbroken(told)}</p>'


def _table(pairs: dict[str, int]) -> str:
    right, wrong = say("right after", "之后答对"), say("wrong after", "之后答错")
    return (
        f"<section><h2>{say('Item by item', '逐题对照')}</h2><table class='pairs'><tr><th></th><th>{right}</th><th>{wrong}</th></tr>"
        f"<tr><th>{say('right before', '之前答对')}</th><td><b>{pairs['both_right']}</b>{say('both right', '都对')}</td><td class='bad'><b>{pairs['broken']}</b>{say('broken', '改错')}</td></tr>"
        f"<tr><th>{say('wrong before', '之前答错')}</th><td class='good'><b>{pairs['fixed']}</b>{say('fixed', '改对')}</td><td><b>{pairs['both_wrong']}</b>{say('both wrong', '都错')}</td></tr></table></section>"
    )


def _banner(*told: dict[str, Any]) -> str:
    sides = [found[side] for found in told for side in ("after", "before")]
    why = next((reason_of(side) for side in sides if side["scored_on_training_items"]), None)
    if why is None:
        return _note(sides)
    strong = say("Scored on training items.", "在训练数据上评分。")
    text = say(
        "This shows that the training worked, not how good the model is on anything new.", "这只说明训练有效，不代表模型在新数据上的水平。"
    )
    return f'<div class="banner" role="alert"><strong>{strong}</strong>{text}<br><span class="soft">{_e(why)}</span></div>'


def _note(sides: list[dict[str, Any]]) -> str:
    """Where no item is a training item, but its picture was in training with another question."""
    files = [file for side in sides for file in (side.get("seen") or {}).get("files", [])]
    if not any(file.get("picture") for file in files):
        return ""
    why = next(reason_of(side) for side in sides if any(file.get("picture") for file in (side.get("seen") or {}).get("files", [])))
    strong = say("Some pictures were in training.", "部分图片出现在训练数据中。")
    return f'<div class="note"><strong>{strong}</strong> <span class="soft">{_e(why)}</span></div>'


def report_html(found: dict[str, Any], extra: dict[str, Any] | None = None) -> str:
    """The page of a comparison (`evaluate.compare.compare`), in the user's language; `extra` is a second one, told in a row.

    Reads the pictures of the items it shows.
    """
    title = say("Before and after", "训练前后对比")
    asked = found["protocol"]
    how = f"{prompt_name(asked['prompt'])}{say(', ', '，')}{mode_name(asked)}"
    under = say(f"{found['n']:,} items, {how}", f"{found['n']:,} 题，{how}")
    models = f"{found['before']['model']['name']} → {found['after']['model']['name']}"
    body = "".join([
        _banner(found, *([extra] if extra else [])),
        _headline(found, extra),
        _table(found["pairs"]),
        graded_html(found),
        groups_html(found),
        others_html(found),
        published_html(found),
        calibration_html(found, extra),
        training_html(found["training"]),
        gallery_html(found),
        facts_html(found),
    ])  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if language() == "zh" else "en"}"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} · intervale</title><style>{STYLE}</style></head>'
        f'<body><main><h1>{title}</h1><div class="soft under">{_e(under)}<br>{_e(models)}</div>{body}</main></body></html>\n'
    )
