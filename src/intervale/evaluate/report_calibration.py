"""The report's section on how sure the models are: a reliability curve each, as inline SVG, and the gap in one number.

Promises: points carry their intervals and their share of the items; a bin of few items is drawn small.
"""

from __future__ import annotations

from html import escape
from math import sqrt
from typing import Any

from intervale.core.lang import say

_COLOUR = {"before": "#7f8ea1", "after": "#2f8f80"}


def _dot(own: dict[str, Any], n: int, colour: str) -> str:
    x, y = 100 * own["confidence"], 100 - 100 * own["accuracy"]
    low, high = (100 - 100 * end for end in own["interval"])
    radius = 1.2 + 5 * sqrt(own["n"] / n)
    told = say(
        f"sure {own['confidence']:.0%}, right {own['accuracy']:.0%}, {own['n']} items",
        f"把握 {own['confidence']:.0%}，答对 {own['accuracy']:.0%}，{own['n']} 题",
    )
    return (
        f'<path d="M{x:.2f} {high:.2f}V{low:.2f}" stroke="{colour}" stroke-opacity=".6" stroke-width=".7"/>'
        f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}" fill="{colour}" fill-opacity=".85"><title>{escape(told)}</title></circle>'
    )


def _plot(side: str, told: dict[str, Any]) -> str:
    colour = _COLOUR[side]
    grid = "".join(f'<path d="M0 {at}H100M{at} 0V100" stroke="#e8ecf1" stroke-width=".5"/>' for at in (25, 50, 75))
    line = "M" + "L".join(f"{100 * own['confidence']:.2f} {100 - 100 * own['accuracy']:.2f}" for own in told["bins"])
    dots = "".join(_dot(own, told["n"], colour) for own in told["bins"])
    ticks = "".join(
        f'<text x="{at}" y="106.5" text-anchor="middle">{at}%</text><text x="-2" y="{100 - at + 1.6}" text-anchor="end">{at}%</text>'
        for at in (0, 50, 100)
    )
    name = say("before", "之前") if side == "before" else say("after", "之后")
    label = say(f"reliability {name}: calibration error {told['ece']:.3f}", f"{name}的可靠性曲线：校准误差 {told['ece']:.3f}")
    return (
        f"<figure><figcaption>{name}<b>ECE {100 * told['ece']:.1f}%</b></figcaption>"
        f'<svg viewBox="-13 -3 118 112" role="img" aria-label="{escape(label)}"><rect width="100" height="100" fill="#fff" stroke="#c9d2dc" stroke-width=".5"/>{grid}'
        f'<path d="M0 100L100 0" stroke="#5d6b7c" stroke-dasharray="2 2" stroke-width=".6"/><path d="{line}" fill="none" stroke="{colour}" stroke-opacity=".45" stroke-width=".8"/>{dots}{ticks}</svg>'
        f"<p>{_words(told)}</p></figure>"
    )


def _words(told: dict[str, Any]) -> str:
    """Too sure, too careful, or about right."""
    sure, right = told["confidence"], told["accuracy"]
    numbers = say(f"sure of {sure:.1%} on average, right in {right:.1%}", f"平均把握 {sure:.1%}，实际答对 {right:.1%}")
    if sure - right > 0.03:
        return numbers + say(": it promises more than it keeps", "：过于自信")
    if right - sure > 0.03:
        return numbers + say(": it is better than it believes", "：过于谨慎")
    return numbers + say(": about as sure as it may be", "：把握与实际大致相符")


def calibration_html(*comparisons: dict[str, Any] | None) -> str:
    """The section of the first comparison that holds likelihoods; nothing where none does."""
    both = next((told["calibration"] for told in comparisons if told and told.get("calibration")), None)
    if both is None:
        return ""
    intro = say(
        "When a model gives its choice a probability of 80%, is it right 8 times in 10? On the dashed line it is; below it, it is too sure. "
        "Large dots are many items, thin lines 95% intervals. ECE: the mean distance from the line.",
        "当模型给出的概率是 80% 时，十次里是否答对八次？落在虚线上即是；在虚线下方说明过于自信。圆点越大题目越多，细线为 95% 区间。ECE：与虚线的平均距离。",
    )
    axes = say(
        "across: the model's probability for its choice; up: the share that is right", "横轴：模型对所选答案的概率；纵轴：答对的比例"
    )
    plots = "".join(_plot(side, both[side]) for side in ("before", "after"))
    return f'<section><h2>{say("How sure the models are", "模型有多大把握")}</h2><p class="soft">{intro}</p><div class="reliability">{plots}</div><p class="soft">{axes}</p></section>'
