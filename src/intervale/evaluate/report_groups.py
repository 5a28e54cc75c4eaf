"""The report's sections on groups: bars before and after for each value of a tag, and what stands when one looks at so many.

Promises: only what stands after Holm's correction is coloured and named; every group shows its n and its intervals.
"""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import say
from intervale.evaluate.labels import tag_name, value_name

BEFORE, AFTER = "#b4bfcd", "#4aa899"
_KEPT = 8  # groups of one tag that stay together on paper
_WIDE = 0.2  # a difference that a reader would call large; the sentence below names it


def _bar(top: float, height: float, score: dict[str, Any], colour: str) -> str:
    """A bar and its interval in a box 100 wide. Strokes keep their width whatever the box is stretched to."""
    low, high = (100 * end for end in score["interval"])
    middle = top + height / 2
    whisker = f'<path d="M{low:.2f} {middle}H{high:.2f}M{low:.2f} {middle - 2}v4M{high:.2f} {middle - 2}v4" stroke="#1b2430" stroke-opacity=".75" fill="none" vector-effect="non-scaling-stroke"/>'
    return f'<rect x="0" y="{top}" width="{100 * score["accuracy"]:.2f}" height="{height}" rx=".4" fill="{colour}"/>{whisker}'


def bars(before: dict[str, Any], after: dict[str, Any], chance: float | None = None, style: str = "") -> str:
    """Two bars with their intervals, and a dashed line at chance."""
    line = ""
    if chance is not None:
        line = f'<path d="M{100 * chance:.2f} 0V24" stroke="#5d6b7c" stroke-dasharray="3 3" vector-effect="non-scaling-stroke"/>'
    label = say(
        f"before {before['accuracy']:.1%}, after {after['accuracy']:.1%}", f"之前 {before['accuracy']:.1%}，之后 {after['accuracy']:.1%}"
    )
    return (
        f'<svg class="bars {style}" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect width="100" height="24" fill="#f4f6f9"/>{_bar(2, 9, before, BEFORE)}{_bar(13, 9, after, AFTER)}{line}</svg>'
    )


def _row(tag: str, value: str, group: dict[str, Any]) -> str:
    before, after = group["before"], group["after"]
    stands = group["p_holm"] < 0.05
    shade = ("up" if group["fixed"] > group["broken"] else "down") if stands else ""
    change = f"{100 * group['difference']['value']:+.1f}".replace("-", "−")
    return (
        f'<div class="row"><div class="label">{escape(value_name(tag, value))} <small>n={after["n"]}</small></div>{bars(before, after)}'
        f'<div class="value">{before["accuracy"]:.1%} → {after["accuracy"]:.1%}<small class="{shade}">{change}{" *" if stands else ""}</small></div></div>'
    )


def _reading(found: dict[str, Any]) -> str:
    """What may be concluded from so many groups, in words."""
    family, stands = found["holm"]["family"], found["holm"]["found"]
    how = say(
        f"exact McNemar test, Holm's correction for looking at {family} groups, p < 0.05",
        f"McNemar 精确检验，对同时查看 {family} 组作 Holm 校正，p < 0.05",
    )
    if stands:
        told = say(
            f"{stands} of {family} groups changed by more than chance explains, marked * ({how}).",
            f"{family} 组中有 {stands} 组的变化超出偶然，以 * 标出（{how}）。",
        )
    else:
        told = say(f"No group changed by more than chance explains ({how}).", f"没有一组的变化超出偶然（{how}）。")
    small = [
        group for tag in found["holm"]["tags"] for group in found["tags"][tag].values()
        if group["p_holm"] >= 0.05 and (group["detectable"] is None or group["detectable"] > _WIDE)
    ]  # fmt: skip
    if small:
        told += say(
            f" {len(small)} of the groups without a mark are so small that even a difference of 20 points would often stay hidden: there, no mark proves nothing.",
            f"未标出的组中有 {len(small)} 组题目太少，即使相差 20 个百分点也常常看不出来：没有标记不等于没有变化。",
        )
    return told


def groups_html(found: dict[str, Any]) -> str:
    """The section of bars; nothing where no tag tells anything."""
    parts = []
    for tag in found["holm"]["tags"]:
        rows = "".join(_row(tag, value, group) for value, group in found["tags"][tag].items())
        kept = "whole" if len(found["tags"][tag]) <= _KEPT else "parted"  # a long list may go over a page's edge
        parts.append(f"<div class='{kept}'><h3>{escape(tag_name(tag))}</h3><div>{rows}</div></div>")
    if not parts:
        return ""
    return f'<section class="long"><h2>{say("By group", "分组结果")}</h2><p class="soft">{_reading(found)}</p>{"".join(parts)}</section>'


def graded_html(found: dict[str, Any]) -> str:
    """The section of open answers' measures; nothing for questions with choices."""
    graded = found.get("graded")
    if not graded:
        return ""
    names = {"f1": say("character F1", "字符 F1"), "rouge_l": "ROUGE-L"}
    yes_no = {"contained": say("right answer contained", "包含正确答案"), "exact": say("word for word", "逐字相同")}
    heads = ("", say("before", "之前"), say("after", "之后"), say("difference", "差值"))
    rows = []
    for name, title in yes_no.items():
        one, two = (found[side]["accuracies"][name] for side in ("before", "after"))
        rows.append((title, f"{one['accuracy']:.1%}", f"{two['accuracy']:.1%}", f"{100 * (two['accuracy'] - one['accuracy']):+.1f}"))
    for name, title in names.items():
        own = graded[name]
        ends = "" if own["interval"] is None else f" [{own['interval'][0]:+.3f}, {own['interval'][1]:+.3f}]"
        rows.append((title, f"{own['before']:.3f}", f"{own['after']:.3f}", f"{own['difference']:+.3f}{ends}"))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell.replace('-', '−')}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    note = say(
        "These measures compare words, not meanings: read the answers below. In brackets: 95%, by drawing whole pictures.",
        "这些指标比较的是文字而不是含义：请阅读下面的回答。方括号内为 95% 区间（按整张图片重抽样）。",
    )
    return f'<section><h2>{say("Open answers", "开放作答")}</h2><table class="measures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p class="soft">{note}</p></section>'
