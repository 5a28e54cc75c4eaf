"""Does a model know when it is right? Its probability for the choice it finds most likely, held against how often that is the right one.

Promises: a function of the predictions alone. The probability is the softmax over an item's choices of their log-probabilities: how the
model would bet if one of them had to be the answer. Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import binned_statistic

from intervale.evaluate.statistics import wilson

BINS = 10


def bets(line: dict[str, Any]) -> np.ndarray | None:
    """The probability of each choice (they add up to 1); None for a line without likelihoods."""
    scores = line.get("scores")
    if not isinstance(scores, list) or not scores or not all(isinstance(score, dict) and "sum" in score for score in scores):
        return None
    return np.asarray(softmax([score["sum"] for score in scores]))


def calibration(lines: Sequence[dict[str, Any]], bins: int = BINS) -> dict[str, Any] | None:
    """{n, ece, confidence, accuracy, bins: [{low, high, n, confidence, accuracy, interval}]}; None where likelihoods were not asked for.

    `ece`: the expected calibration error, the mean over items of |confidence - accuracy| of their bin, of `bins` equally wide ones.
    Empty bins are left out. Source: Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks.
    """
    told = [bets(line) for line in lines]
    sure = np.array([own.max() for own in told if own is not None])
    if not lines or len(sure) < len(lines):
        return None
    right = np.array([bool(line["correct"]) for line in lines], dtype=float)
    edges = np.linspace(0.0, 1.0, bins + 1)
    (confidence, accuracy), _, where = binned_statistic(sure, [sure, right], "mean", bins=edges)
    counts = np.bincount(where - 1, minlength=bins)
    found = []
    for place in np.flatnonzero(counts):
        n, share = int(counts[place]), float(accuracy[place])
        low, high = float(edges[place]), float(edges[place + 1])
        own = {"low": round(low, 6), "high": round(high, 6), "n": n, "confidence": float(confidence[place]), "accuracy": share}
        found.append({**own, "interval": list(wilson(round(share * n), n))})
    error = sum(counts[place] * abs(confidence[place] - accuracy[place]) for place in np.flatnonzero(counts)) / len(lines)
    return {"n": len(lines), "ece": float(error), "confidence": float(sure.mean()), "accuracy": float(right.mean()), "bins": found}
