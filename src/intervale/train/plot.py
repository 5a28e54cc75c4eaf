"""The loss curve as a picture, drawn from metrics.jsonl at any time, also after a crash. Cost: a third of a second."""

from __future__ import annotations

import io
from pathlib import Path

from intervale.core.files import write_atomic
from intervale.core.runlog import read_metrics

_SMOOTH = 0.9
_WIDE = 5  # a fall by more than this is drawn on a logarithmic axis, or its end could not be read


def draw_losses(run: Path) -> Path | None:
    """Write RUN/loss.png; None when there is nothing to draw yet."""
    entries = read_metrics(run)
    steps = [(e["step"], e["loss"], e["learning_rate"]) for e in entries if "loss" in e]
    held = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    if not steps:
        return None
    import logging
    import warnings

    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a run may have a Chinese name

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    smooth, value = [], 0.0
    for number, (_, loss, _) in enumerate(steps, 1):
        value = _SMOOTH * value + (1 - _SMOOTH) * loss
        smooth.append(value / (1 - _SMOOTH**number))  # without the start's weight, as Adam corrects its averages
    numbers = [step for step, _, _ in steps]
    axes.plot(numbers, [loss for _, loss, _ in steps], color="#9db8d9", linewidth=1, label="training, each step")
    axes.plot(numbers, smooth, color="#1f4e8c", linewidth=2, label=f"training, smoothed ({_SMOOTH})")
    if held:
        axes.plot([step for step, _ in held], [loss for _, loss in held], color="#c2571a", marker="o", linewidth=2, label="held-out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token")
    if smooth[0] > _WIDE * smooth[-1] > 0:
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(run.name, parse_math=False)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(numbers, [rate for _, _, rate in steps], color="#999999", linewidth=1, linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *rates.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_atomic(run / "loss.png", drawn.getvalue())
    return run / "loss.png"
