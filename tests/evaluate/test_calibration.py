"""Calibration is what the predictions say, bin by bin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from evaluation_fixture import line
from intervale.evaluate.calibration import bets, calibration


def bet(name: str, sure: float, correct: bool) -> dict[str, Any]:
    """Two choices; the model puts `sure` on the one it takes."""
    scores = [{"sum": math.log(sure) - 7, "mean": -1.0, "tokens": 2}, {"sum": math.log(1 - sure) - 7, "mean": -1.0, "tokens": 2}]
    return line(name, correct, mode="likelihood", scores=scores)


def test_the_error_is_the_weighted_gap_of_the_bins_by_hand() -> None:
    # 0.6-0.7: four at 0.65, two right: gap 0.15. 0.9-1.0: six at 0.95, three right: gap 0.45. (4 x 0.15 + 6 x 0.45) / 10 = 0.33
    lines = [bet(f"a{n}", 0.65, n < 2) for n in range(4)] + [bet(f"b{n}", 0.95, n < 3) for n in range(6)]
    found = calibration(lines)
    assert found is not None
    assert found["ece"] == pytest.approx(0.33)
    assert [(own["low"], own["n"], round(own["confidence"], 6), own["accuracy"]) for own in found["bins"]] == [
        (0.6, 4, 0.65, 0.5),
        (0.9, 6, 0.95, 0.5),
    ]
    assert (found["confidence"], found["accuracy"]) == (pytest.approx(0.83), 0.5)


def test_a_model_that_is_right_as_often_as_it_says_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    lines = [bet(f"q{n}", sure, rng.random() < sure) for n, sure in enumerate(rng.uniform(0.5, 0.999, 4000))]
    found = calibration(lines)
    assert found is not None
    assert found["ece"] < 0.03
    assert all(own["interval"][0] - 0.02 < own["confidence"] < own["interval"][1] + 0.02 for own in found["bins"])


def test_certainty_stays_in_the_last_bin_and_far_log_probabilities_do_not_overflow() -> None:
    sure = line("q", True, scores=[{"sum": -5.0}, {"sum": -5000.0}])
    found = calibration([sure])
    assert found is not None
    assert [(own["high"], own["n"]) for own in found["bins"]] == [(1.0, 1)]
    assert found["ece"] == 0.0


def test_without_likelihoods_there_is_none() -> None:
    assert calibration([line("q", True)]) is None
    assert calibration([]) is None
    assert bets(line("q", True, scores=[])) is None
