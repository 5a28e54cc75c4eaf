"""Learning rate by step: linear warm-up, then cosine, linear or none. A pure function of the step, so nothing is restored."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """The rate of optimizer step `step` (0 .. total - 1); it falls to 0 after the last one.

    Warm-up takes ceil(warmup_ratio * total) steps and its first step is not 0 (a step of 0 would be wasted).
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))
