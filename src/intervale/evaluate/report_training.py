"""The part of a report on how the model was trained: its key numbers, and the loss curve as inline SVG.

Promises: lines stretch with the page, letters and dots do not, so the curve reads on a phone and on paper; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from intervale.core.lang import say

_WIDE = 5  # a fall by more than this is drawn on a logarithmic axis, or its end could not be read (as in the run's loss.png)
_MOST_TICKS = 6
_TARGETS = {
    "llm": ("language model", "语言模型"),
    "llm+head": ("language model and its head", "语言模型和输出层"),
    "vision": ("vision tower", "视觉编码器"),
    "llm+vision": ("language model and vision tower", "语言模型和视觉编码器"),
}
# The plot's share of the picture's height: above it room for the highest label, below it for the steps.
_TOP, _BOTTOM = 5.0, 88.0
Scale = Callable[[float], float]


def _ticks(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`."""
    span = high - low
    if span <= 0:
        return [low]
    power: float = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= _MOST_TICKS:
            return found
    return found[:: -(-len(found) // _MOST_TICKS)]


def _axis(values: Sequence[float], logarithmic: bool) -> tuple[Scale, list[float]]:
    """(loss -> place in percent from the top of the picture, the losses worth a label)."""
    high = max(values)
    if logarithmic:
        low = min(value for value in values if value > 0)
        span = math.log10(high / low) or 1.0
        return lambda loss: _TOP + (_BOTTOM - _TOP) * min(math.log10(high / max(loss, low)) / span, 1.0), _log_ticks(low, high)
    high = high or 1.0
    return lambda loss: _BOTTOM - (_BOTTOM - _TOP) * loss / high, _ticks(0, high)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    """A line through places in percent. Inside a box that is stretched; the stroke keeps its width."""
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round" vector-effect="non-scaling-stroke"/>'


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else _plain(value)


def _plain(value: float) -> str:
    """0.5, and 3e-5 as a recipe has it."""
    return f"{value:g}".replace("e-0", "e-")


def _logarithmic(curve: dict[str, Any]) -> bool:
    first, last = curve["loss"][0][2], curve["loss"][-1][2]
    return bool(first > _WIDE * last > 0)


def _curve(curve: dict[str, Any], mark: int | None) -> str:
    losses, held = curve["loss"], curve["held_out"]
    last = max([losses[-1][0], *(step for step, _ in held)])
    raw, smooth = [loss for _, loss, _ in losses], [value for _, _, value in losses]
    place, marks = _axis([*raw, *smooth, *(loss for _, loss in held)], _logarithmic(curve))

    def across(step: float) -> float:
        return 100 * step / last if last else 0.0

    grid = "".join(f'<path d="M0 {place(tick):.2f}H100" stroke="#e1e6ec" vector-effect="non-scaling-stroke"/>' for tick in marks)
    lines = _line([(across(step), place(loss)) for step, loss, _ in losses], "#c3d3e6", 1)
    lines += _line([(across(step), place(value)) for step, _, value in losses], "#2a5d9c", 2.2)
    if mark is not None:
        lines += f'<path d="M{across(mark):.2f} {_TOP}V{_BOTTOM}" stroke="#5a6878" stroke-width="1.5" stroke-dasharray="4 4" vector-effect="non-scaling-stroke"/>'
    if len(held) > 1:
        lines += _line([(across(step), place(loss)) for step, loss in held], "#c2571a", 1.6)
    # A row of dots closer than their own width would hide the line they stand on.
    dots = "".join(
        f'<circle cx="{across(step):.2f}%" cy="{place(loss):.2f}%" r="3.6" fill="#c2571a" stroke="#fff" stroke-width="1.2"/>'
        for step, loss in (held if len(held) <= 40 else [held[-1]])
    )
    steps = "".join(
        f'<text x="{across(tick):.2f}%" y="97%" text-anchor="{"start" if tick == 0 else "end" if across(tick) > 94 else "middle"}">{_label(tick)}</text>'
        for tick in _ticks(0, last, 5)
    )
    heights = "".join(f'<text x="88%" y="{place(tick):.2f}%" dy="4" text-anchor="end">{_label(tick)}</text>' for tick in marks)
    told = say(f"training loss from {smooth[0]:.3g} to {smooth[-1]:.3g}", f"训练损失从 {smooth[0]:.3g} 到 {smooth[-1]:.3g}")
    return (
        f'<div class="curve"><svg aria-hidden="true">{heights}</svg><svg role="img" aria-label="{escape(told)}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">{grid}{lines}</svg>{dots}{steps}</svg></div>'
    )


def _legend(curve: dict[str, Any], mark: int | None) -> str:
    parts = [
        f'<span><span class="key train"></span>{say("training loss, smoothed", "训练损失（平滑）")}</span>',
        f'<span><span class="key raw"></span>{say("each step", "每一步")}</span>',
    ]
    if curve["held_out"]:
        parts.append(f'<span><span class="key held"></span>{say("loss on held-out items", "留出题目的损失")}</span>')
    if mark is not None:
        parts.append(
            f'<span><span class="key mark"></span>{say(f"the scored weights: step {mark:,}", f"被评测的权重：第 {mark:,} 步")}</span>'
        )
    scale = say(", logarithmic", "，对数刻度") if _logarithmic(curve) else ""
    axes = say(f"vertical: loss per target token{scale}; horizontal: optimizer step", f"纵轴：每个目标 token 的损失{scale}；横轴：优化步数")
    parts.append(f"<span>{axes}</span>")
    return f'<div class="legend soft">{"".join(parts)}</div>'


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min 30 s, 3 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return say(f"{hours} h {minutes:02d} min", f"{hours} 小时 {minutes} 分")
    return say(f"{minutes} min {rest} s", f"{minutes} 分 {rest} 秒") if minutes else say(f"{rest} s", f"{rest} 秒")


def _learns(card: dict[str, Any]) -> str:
    parts = {"llm": say("language model", "语言模型"), "projector": say("projector", "投影层"), "vision": say("vision tower", "视觉编码器")}
    ways = {"lora": "LoRA", "full": say("all weights", "全部权重"), "frozen": say("frozen", "冻结")}
    told = [f"{name}{say(': ', '：')}{ways.get(str(card['learns'].get(part)), '?')}" for part, name in parts.items()]
    return say("; ", "；").join(told)


def training_facts(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, what else there is to say) of everything that is known."""
    lora, curve = card["lora"], card["curve"]
    schedules = {"cosine": say("cosine", "余弦衰减"), "linear": say("linear", "线性衰减"), "constant": say("constant", "恒定")}
    rows: list[tuple[str, Any, str]] = [
        (say("base model", "基础模型"), card["base"], ""),
        (say("what learns", "训练哪些部分"), _learns(card), ""),
    ]
    if lora:
        rank, alpha, dropout, targets = (lora.get(name, "?") for name in ("rank", "alpha", "dropout", "targets"))
        alpha, dropout = (str(value).removesuffix(".0") for value in (alpha, dropout))
        size = say(f"rank {rank}, alpha {alpha}", f"秩 {rank}，alpha {alpha}")
        on = say(*_TARGETS[targets]) if targets in _TARGETS else str(targets)
        rows.append(("LoRA", size, say(f"on the {on}, dropout {dropout}", f"作用于{on}，随机失活 {dropout}")))
    if card["items"]:
        held = card["held_out_items"]
        told = say(f"and {held:,} held out", f"另留出 {held:,} 条") if held else say("none held out", "未留出")
        rows.append((say("training items", "训练条目"), f"{card['items']:,}", told))
    if card["steps"]:
        epochs = f"{card['epochs']:.3g}" if card["epochs"] else ""
        each = say(f"{card['batch']} items a step", f"每步 {card['batch']} 条") if card["batch"] else ""
        passes = say(f" ({epochs} epoch{'' if epochs == '1' else 's'})", f"（{epochs} 轮）") if epochs else ""
        rows.append((say("steps", "步数"), f"{card['steps']:,}{passes}", each))
    if card["learning_rate"]:
        rows.append((say("learning rate", "学习率"), _plain(card["learning_rate"]), schedules.get(str(card["schedule"]), "")))
    rows.append((say("seed", "随机种子"), card["seed"], ""))
    if card["seconds"]:
        rows.append((say("training time", "训练用时"), duration(card["seconds"]), ""))
    if curve and len(curve["held_out"]) > 1:
        held_out = curve["held_out"]
        best, step = min((loss, step) for step, loss in held_out)
        lowest = say(f"lowest {best:.3g}, at step {step:,}", f"最低 {best:.3g}，在第 {step:,} 步")
        rows.append((say("held-out loss", "留出集损失"), f"{held_out[0][1]:.3g} → {held_out[-1][1]:.3g}", lowest))
    return [(name, str(value), more) for name, value, more in rows if value is not None]


def training_html(card: dict[str, Any] | None) -> str:
    """The section of a `training_card`; nothing for None."""
    if card is None:
        return ""
    mark = card["step_scored"] if card["step_scored"] and card["steps"] and card["step_scored"] < card["steps"] else None
    curve = f'<div class="whole">{_curve(card["curve"], mark)}{_legend(card["curve"], mark)}</div>' if card["curve"] else ""
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in training_facts(card)
    )
    return f'<section class="long"><h2>{say("How it was trained", "训练过程")}</h2>{curve}<dl class="card-facts">{facts}</dl></section>'
