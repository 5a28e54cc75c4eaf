"""A comparison as one HTML file that needs nothing else: no script, no font, no request; for a screen, a phone and paper.

Promises: every text from data or model is escaped (and the page's own policy forbids scripts and requests, should one slip
through); the same comparison gives the same bytes. Cost: some kilobytes and a line an item fixed or broken.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from intervale.core.lang import language, say
from intervale.evaluate.folder import telling_tags

_MOST_LISTED = 500  # items a list; report.json has all of them

_STYLE = """
:root { --ink: #1b2430; --soft: #5d6b7c; --line: #e1e6ec; --paper: #fff; --ground: #f4f6f9;
        --before: #b4bfcd; --after: #4aa899; --good: #17705f; --bad: #b3412f; --warn: #b42318; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
       "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.75rem 1rem 3rem; }
h1 { font-size: 1.35rem; margin: 0 0 .1rem; } h2 { font-size: 1.05rem; margin: 0 0 .9rem; } h3 { font-size: .88rem; margin: 1.2rem 0 .5rem; color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem 1.3rem; margin-top: 1rem; break-inside: avoid; }
section.long { break-inside: auto; }
.soft { color: var(--soft); font-size: .88rem; } p { margin: .4rem 0; }
.banner { background: #fdecea; border: 1px solid #f3b9b3; border-left: 6px solid var(--warn); color: #7c1a12; border-radius: 10px;
          padding: .8rem 1.1rem; margin-top: 1rem; } .banner strong { display: block; }
.hero { display: flex; flex-wrap: wrap; align-items: stretch; gap: 1rem 2.2rem; }
.number b { display: block; font-size: 2.7rem; line-height: 1.15; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.arrow { font-size: 1.9rem; color: var(--soft); align-self: center; }
.change { margin-left: auto; text-align: right; } .change b.up { color: var(--good); } .change b.down { color: var(--bad); }
.words { font-size: 1.02rem; margin-top: 1rem; }
.row { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr 9.5rem; gap: .15rem .9rem; align-items: center; padding: .42rem 0; border-top: 1px solid var(--line); }
.row:first-of-type { border-top: 0; } .row .value { font-size: .85rem; text-align: right; font-variant-numeric: tabular-nums; }
.label { overflow-wrap: anywhere; } .label small { color: var(--soft); }
svg { display: block; width: 100%; height: 1.9rem; } svg.wide { height: 3.4rem; margin-top: 1rem; }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin: 0 .35rem -.05rem 0; } .key.b { background: var(--before); } .key.a { background: var(--after); margin-left: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .55rem .7rem; text-align: center; } th { font-weight: 600; background: #f8fafc; font-size: .88rem; }
td b { font-size: 1.35rem; display: block; line-height: 1.2; } td.good { background: #e8f4f1; color: var(--good); } td.bad { background: #fbeceb; color: var(--bad); }
.items { list-style: none; padding: 0; margin: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 0 2rem; }
.items li { border-top: 1px solid var(--line); padding: .7rem 0; break-inside: avoid; min-width: 0; } .items .question { font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .3rem 0 0; } dt { color: var(--soft); font-size: .88rem; } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
dd.good { color: var(--good); } dd.bad { color: var(--bad); } .id { color: var(--soft); font-weight: 400; font-size: .8rem; }
.facts td { text-align: left; overflow-wrap: anywhere; font-size: .88rem; } .facts th { text-align: left; }
@media (max-width: 40rem) { .change { margin-left: 0; text-align: left; } .number b { font-size: 2.1rem; } .arrow { font-size: 1.4rem; } .hero { gap: .6rem 1.2rem; }
  .row { grid-template-columns: 1fr auto; } .row svg { grid-column: 1 / -1; grid-row: 2; } .facts, .facts tbody, .facts tr { display: block; } .facts th, .facts td { display: block; border-top: 0; } .facts thead { display: none; } section { padding: 1rem; } }
@media print { body { background: #fff; font-size: 11pt; } section { border-color: #bbb; } main { max-width: none; padding: 0; } svg, td, .banner, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def percent(share: float) -> str:
    """0.7266 as 72.7%."""
    return f"{share:.1%}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−") + say(" points", " 个百分点")


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}" if value < 0.1 else f"p = {value:.2f}"


def in_words(found: dict[str, Any]) -> str:
    """What the paired test says, in a sentence that does not claim more than it may."""
    pairs, p = found["pairs"], found["mcnemar"]["p"]
    fixed, broken = pairs["fixed"], pairs["broken"]
    if fixed + broken == 0:
        return say("No item changed: both models are right on the same items.", "没有任何变化：两个模型答对的题目完全相同。")
    better = fixed > broken
    told = say(
        f"{fixed} items fixed, {broken} broken ({_p(p)}, exact McNemar test). ",
        f"改对 {fixed} 条，改错 {broken} 条（{_p(p)}，McNemar 精确检验）。",
    )
    if p < 0.05:
        return told + say(
            f"A split this uneven would rarely come from chance alone; the second model is {'better' if better else 'worse'} on these items.",
            f"如此悬殊的比例很难只用偶然解释；第二个模型在这些题目上{'更好' if better else '更差'}。",
        )
    return told + say(
        "Chance alone could give such a split; this does not show which model is better. More items would.",
        "偶然也可能造成这样的比例；这不能说明哪个模型更好，需要更多题目。",
    )


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)


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
        f'<svg class="{style}" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{_e(label)}">'
        f'<rect width="100" height="24" fill="#f4f6f9"/>{_bar(2, 9, before, "#b4bfcd")}{_bar(13, 9, after, "#4aa899")}{line}</svg>'
    )


def _interval(side: dict[str, Any]) -> str:
    low, high = side["interval"]
    return f"{percent(low)} – {percent(high)}"


def _headline(found: dict[str, Any]) -> str:
    before, after, difference = found["before"], found["after"], found["difference"]
    low, high = difference["interval"]
    # Colour only what the data shows.
    shade = "up" if low > 0 else "down" if high < 0 else ""

    def number(name: str, side: dict[str, Any], style: str) -> str:
        counts = say(f"{side['correct']} of {side['n']} right", f"{side['n']} 题答对 {side['correct']} 题")
        return f'<div class="number {style}"><span class="soft">{name}</span><b>{percent(side["accuracy"])}</b><span class="soft">{_interval(side)}<br>{counts}</span></div>'

    change = (
        f'<div class="number change"><span class="soft">{say("difference", "差值")}</span><b class="{shade}">{points(difference["value"])}</b>'
        f'<span class="soft">{points(low)} {say("to", "至")} {points(high)}</span></div>'
    )
    legend = f'<span class="key b"></span>{say("before", "之前")}<span class="key a"></span>{say("after", "之后")}'
    return (
        f'<section><div class="hero">{number(say("before", "之前"), before, "")}<div class="arrow">→</div>{number(say("after", "之后"), after, "now")}{change}</div>'
        f'{_bars(before, after, found["chance"], "wide")}<div class="scale"><span>0%</span><span>50%</span><span>100%</span></div>'
        f'<p class="words">{_e(in_words(found))}</p>'
        f'<p class="soft">{legend} · {say("thin lines: 95% intervals; dashed: chance", "细线：95% 区间；虚线：随机水平")} {percent(found["chance"])}</p></section>'
    )


def _table(pairs: dict[str, int]) -> str:
    right, wrong = say("right after", "之后答对"), say("wrong after", "之后答错")
    return (
        f"<section><h2>{say('Item by item', '逐题对照')}</h2><table><tr><th></th><th>{right}</th><th>{wrong}</th></tr>"
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
        parts.append(f"<h3>{_e(tag)}</h3><div>{''.join(rows)}</div>")
    if not parts:
        return ""
    few = say("A group of few items has a wide interval: read the thin lines before the bars.", "题目少的组区间很宽：先看细线，再看色条。")
    return f'<section class="long"><h2>{say("By group", "分组结果")}</h2><p class="soft">{few}</p>{"".join(parts)}</section>'


def _list(title: str, items: Sequence[dict[str, Any]], good: bool) -> str:
    shown = []
    nothing = say("(nothing recognised)", "（无）")
    for item in items[:_MOST_LISTED]:
        shown.append(
            f'<li><div class="question">{_e(item["question"])} <span class="id">{_e(item["id"])}</span></div><dl>'
            f"<dt>{say('before', '之前')}</dt><dd class='{'bad' if good else 'good'}'>{_e(item['before'] or nothing)}</dd>"
            f"<dt>{say('after', '之后')}</dt><dd class='{'good' if good else 'bad'}'>{_e(item['after'] or nothing)}</dd>"
            f"<dt>{say('right answer', '正确答案')}</dt><dd>{_e(item['right'])}</dd></dl></li>"
        )
    rest = len(items) - len(shown)
    more = f'<p class="soft">{say(f"{rest} more in report.json", f"其余 {rest} 条见 report.json")}</p>' if rest else ""
    body = f'<ul class="items">{"".join(shown)}</ul>{more}' if items else f'<p class="soft">{say("none", "无")}</p>'
    return f'<section class="long"><h2>{title} ({len(items)})</h2>{body}</section>'


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
    body = "".join(f"<tr><th>{name}</th><td>{_e(one)}</td><td>{_e(two)}</td></tr>" for name, one, two in rows)
    methods = f"{found['mcnemar']['method']}; {found['difference']['method']}; {say('accuracies: Wilson 95%', '准确率：Wilson 95%')}"
    return (
        f"<section><h2>{say('What was compared', '比较对象')}</h2><table class='facts'><thead><tr><th></th><th>{say('before', '之前')}</th><th>{say('after', '之后')}</th></tr></thead>"
        f"<tbody>{body}</tbody></table><p class='soft'>{say('protocol', '协议')}: {_e(asked)}</p><p class='soft'>{say('statistics', '统计')}: {_e(methods)}</p></section>"
    )


def _checkpoint(model: dict[str, Any]) -> str:
    return f"{model['checkpoint']} ({model['checkpoint_fingerprint']})" if model["checkpoint"] else "–"


def _seen(side: dict[str, Any]) -> str:
    answer = {True: say("yes", "是"), False: say("no", "否"), None: say("not known", "未知")}[side["scored_on_training_items"]]
    return f"{answer}: {side['scored_on_training_items_reason']}"


def _banner(found: dict[str, Any]) -> str:
    if not found["scored_on_training_items"]:
        return ""
    why = next(side["scored_on_training_items_reason"] for side in (found["after"], found["before"]) if side["scored_on_training_items"])
    strong = say("Scored on training items.", "在训练数据上评分。")
    text = say(
        "This shows that the training worked, not how good the model is on anything new.", "这只说明训练有效，不代表模型在新数据上的水平。"
    )
    return f'<div class="banner" role="alert"><strong>{strong}</strong>{text}<br><span class="soft">{_e(why)}</span></div>'


def report_html(found: dict[str, Any]) -> str:
    """The page of a comparison (`evaluate.compare.compare`), in the user's language."""
    title = say("Before and after", "训练前后对比")
    under = say(f"{found['n']} items, prompt {found['protocol']['prompt']}, mode {found['protocol']['mode']}",
                f"{found['n']} 题，提问方式 {found['protocol']['prompt']}，评分方式 {found['protocol']['mode']}")  # fmt: skip
    body = "".join([
        _banner(found),
        _headline(found),
        _table(found["pairs"]),
        _per_tag(found),
        _list(say("Fixed", "改对的题目"), found["fixed"], good=True),
        _list(say("Broken", "改错的题目"), found["broken"], good=False),
        _facts(found),
    ])  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if language() == "zh" else "en"}"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} · intervale</title><style>{_STYLE}</style></head>'
        f'<body><main><h1>{title}</h1><div class="soft">{_e(under)}</div>{body}</main></body></html>\n'
    )
