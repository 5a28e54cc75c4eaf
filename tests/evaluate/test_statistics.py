"""The statistics give the published numbers, and stay honest at the edges."""

from __future__ import annotations

import numpy as np
import pytest

from intervale.evaluate.statistics import Pairs, mcnemar, paired_difference, wilson


def test_wilson_gives_the_published_interval_of_186_of_256() -> None:
    low, high = wilson(186, 256)  # GPT-4o on FoodieQA sivqa, 72.66%
    assert (round(low, 4), round(high, 4)) == (0.6689, 0.7775)


def test_wilson_gives_newcombes_worked_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score, without continuity correction).
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (correct, n), interval in published.items():
        assert tuple(round(end, 4) for end in wilson(correct, n)) == interval


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [(10, 1, 0.0117), (1, 10, 0.0117), (27, 13, 0.0385), (26, 14, 0.0807), (5, 5, 1.0), (0, 0, 1.0), (6, 0, 0.03125)],
)
def test_mcnemar_is_the_exact_binomial_p(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p, abs=5e-5)


def test_paired_difference_gives_the_published_interval_of_fagerlands_example() -> None:
    # Fagerland, Lydersen, Laake 2014 (airway reactivity, a, b, c, d = 1, 1, 7, 12); R's ratesci prints -0.507, -0.286, -0.0256
    # for "first minus second", so here the signs turn.
    difference, low, high = paired_difference(Pairs(both_right=1, broken=1, fixed=7, both_wrong=12))
    assert (round(low, 4), round(difference, 3), round(high, 3)) == (0.0256, 0.286, 0.507)


def test_paired_difference_turns_its_sign_with_the_order() -> None:
    _, low, high = paired_difference(Pairs(30, 9, 4, 13))
    assert paired_difference(Pairs(30, 4, 9, 13))[1:] == pytest.approx((-high, -low))


def test_paired_difference_of_equal_models_is_not_certain() -> None:
    difference, low, high = paired_difference(Pairs(30, 0, 0, 0))
    assert difference == 0
    assert low == pytest.approx(-0.1135, abs=1e-4)
    assert high == pytest.approx(0.1135, abs=1e-4)


def test_paired_difference_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    shares = [0.35, 0.25, 0.15, 0.25]  # both, fixed, broken, neither: the true difference is 0.10
    draws = rng.multinomial(80, shares, size=1500)
    hits = sum(low <= 0.10 <= high for _, low, high in (paired_difference(Pairs(*map(int, draw))) for draw in draws))
    assert 0.93 < hits / len(draws) < 0.98
