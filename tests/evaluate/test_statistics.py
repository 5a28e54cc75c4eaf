"""The statistics give the published numbers, and stay honest at the edges."""

from __future__ import annotations

import numpy as np
import pytest

from intervale.evaluate.statistics import (
    Pairs,
    above_chance,
    bootstrap_difference,
    detectable,
    holm,
    mcnemar,
    mcnemar_bounds,
    mcnemar_power,
    paired_difference,
    wilson,
)


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


def test_holm_gives_the_adjusted_values_of_rs_p_adjust() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # p.adjust(c(...), "holm")
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_power_gives_the_worked_example_of_gpower() -> None:
    # G*Power 3.1 manual, "Proportions: inequality, two dependent groups (McNemar)", after O'Brien 2002: odds ratio 0.25, 40% discordant,
    # N = 50, one-sided alpha 0.05: power 0.839343. Two-sided at 0.10 is that and, 15 times in a million, the wrong side.
    assert mcnemar_power(50, 0.40, 0.8, alpha=0.10) == pytest.approx(0.839343, abs=2e-5)


def test_power_is_how_often_the_test_finds_it() -> None:
    rng = np.random.default_rng(3)
    draws = rng.multinomial(120, [0.12, 0.04, 0.84], size=4000)
    found = np.mean([mcnemar(int(fixed), int(broken)) <= 0.05 for fixed, broken, _ in draws])
    assert mcnemar_power(120, 0.16, 0.75) == pytest.approx(found, abs=0.02)


def test_without_a_difference_the_exact_test_finds_one_less_than_once_in_20() -> None:
    assert 0.01 < mcnemar_power(200, 0.3, 0.5) <= 0.05


@pytest.mark.parametrize(("n", "changed"), [(20, 0.1), (256, 0.16), (896, 0.5)])
def test_the_detectable_difference_has_80_percent_power_and_shrinks_with_n(n: int, changed: float) -> None:
    net = detectable(n, changed)
    assert net is not None
    share = max(changed, net)
    assert mcnemar_power(n, share, (1 + net / share) / 2) == pytest.approx(0.8, abs=0.005)
    more = detectable(4 * n, changed)
    assert more is not None
    assert more < 0.75 * net


def test_five_items_show_no_difference_and_six_only_if_all_change() -> None:
    assert detectable(5, 0.5) is None  # 5:0 is p = 0.0625
    assert detectable(0, 0.5) is None
    net = detectable(6, 0.5)
    assert net is not None
    assert net > 0.9


def test_the_bootstrap_of_independent_items_agrees_with_the_normal_interval_and_with_itself() -> None:
    before, after = [1.0] * 120 + [0.0] * 80, [1.0] * 100 + [0.0] * 20 + [1.0] * 40 + [0.0] * 40
    found = bootstrap_difference(before, after, range(200), seed=5)
    change = np.subtract(after, before)
    half = 1.96 * change.std() / np.sqrt(200)
    assert found == pytest.approx((change.mean() - half, change.mean() + half), abs=0.012)
    assert found == bootstrap_difference(before, after, range(200), seed=5)
    graded = np.random.default_rng(0).random(200)  # an F1, say: right and wrong alone have too few ends to differ in
    assert bootstrap_difference(before, graded, range(200), seed=5) != bootstrap_difference(before, graded, range(200), seed=6)


def test_questions_that_share_a_picture_widen_the_interval() -> None:
    before, after = [0.0, 0.0, 0.0, 0.0] * 25, ([1.0] * 4 + [0.0] * 4 * 2) * 8 + [0.0] * 4
    alone = bootstrap_difference(before, after, range(100))
    together = bootstrap_difference(before, after, [n // 4 for n in range(100)])
    assert alone is not None
    assert together is not None
    assert together[1] - together[0] == pytest.approx(2 * (alone[1] - alone[0]), rel=0.1)  # four alike count as one: sqrt(4)
    assert bootstrap_difference(before, after, ["one"] * 100) is None


def test_better_than_guessing_is_an_exact_binomial_p() -> None:
    assert above_chance(4, 4, 0.25) == pytest.approx(0.25**4)
    assert above_chance(0, 4, 0.25) == 1.0


def test_totals_alone_bound_the_paired_p() -> None:
    # GPT-4o and GPT-4V on FoodieQA sivqa zh: 186 and 163 of 256. By hand: 2 / 2^23, and 93 against 70.
    least, largest = mcnemar_bounds(186, 163, 256)
    assert least == pytest.approx(2 / 2**23)
    assert largest == pytest.approx(mcnemar(93, 70))
    assert mcnemar_bounds(163, 186, 256) == (least, largest)
    assert mcnemar_bounds(5, 5, 10) == (1.0, 1.0)
