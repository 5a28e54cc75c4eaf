"""How far a score can be trusted: intervals, paired tests, many groups at once, and what n items can show. Scipy where it has them.

All intervals are 95%. A proportion: Wilson's score interval. Two models on the same items: McNemar's exact test, and Newcombe's
square-and-add interval for the difference, which stays honest where a bootstrap does not (no discordant pair at all). Questions on
one picture are not independent of each other: the bootstrap draws whole pictures. Cost: the bootstrap a second for 10,000 items.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, bootstrap

RESAMPLES, BOOTSTRAP_SEED = 9_999, 0
_ALPHA, _POWER = 0.05, 0.8


@dataclass(frozen=True)
class Pairs:
    """Items by how the two models did: right both times, wrong then right, right then wrong, wrong both times."""

    both_right: int
    fixed: int
    broken: int
    both_wrong: int

    @property
    def n(self) -> int:
        """All items."""
        return self.both_right + self.fixed + self.broken + self.both_wrong


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval (low, high) of correct / n; (0, 1) for no items, of which nothing is known."""
    if n == 0:
        return 0.0, 1.0
    found = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided p: how often chance alone would share fixed + broken items at least this unevenly."""
    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def _correlation(pairs: Pairs) -> float:
    """Newcombe's phi: the pairs' correlation, a positive one made smaller by n/2 (his continuity correction)."""
    a, b, c, d = pairs.both_right, pairs.broken, pairs.fixed, pairs.both_wrong
    below = (a + b) * (c + d) * (a + c) * (b + d)
    above: float = a * d - b * c
    if above > 0:
        above = max(above - pairs.n / 2, 0.0)
    return above / sqrt(below) if below else 0.0


def paired_difference(pairs: Pairs) -> tuple[float, float, float]:
    """(difference, low, high) of the accuracies after - before.

    Source: Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10; recommended by Fagerland, Lydersen and Laake 2014.
    """
    n = pairs.n
    if n == 0:
        return 0.0, -1.0, 1.0
    before, after = pairs.both_right + pairs.broken, pairs.both_right + pairs.fixed
    p, q = after / n, before / n
    (p_low, p_high), (q_low, q_high) = wilson(after, n), wilson(before, n)
    phi = _correlation(pairs)

    def reach(one: float, other: float) -> float:
        return sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    difference = (pairs.fixed - pairs.broken) / n
    return difference, difference - reach(p - p_low, q_high - q), difference + reach(p_high - p, q - q_low)


def bootstrap_difference(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable], seed: int = BOOTSTRAP_SEED
) -> tuple[float, float] | None:
    """95% percentile interval of mean(after) - mean(before), drawing whole groups (all questions on a picture) with replacement.

    Any score per item will do (right or wrong, an F1). None for fewer than two groups, of which no draw differs. The same `seed`
    gives the same interval. Source: Efron 1979; clusters: Field and Welsh 2007, JRSS B 69:369.
    """
    places = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    if len(places) < 2:
        return None
    where = [places[group] for group in groups]
    change = np.bincount(where, weights=np.subtract(after, before, dtype=float))
    size = np.bincount(where).astype(float)

    def mean(change_G: np.ndarray, size_G: np.ndarray, axis: int) -> Any:
        return change_G.sum(axis) / size_G.sum(axis)

    draws = {"n_resamples": RESAMPLES, "batch": max(1, 2_000_000 // len(places)), "rng": np.random.default_rng(seed)}
    found = bootstrap((change, size), mean, paired=True, vectorized=True, method="percentile", **draws).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: below 0.05 means found although that many were looked at.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65 (scipy has only the false discovery rate).
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def mcnemar_power(n: int, changed: float, share_fixed: float, alpha: float = _ALPHA) -> float:
    """How often the exact test finds p <= alpha on n items of which a share `changed` comes out differently, `share_fixed` of it fixed.

    Exact: summed over every number of discordant items. Source: Schork and Williams 1980; the unconditional power of G*Power.
    """
    discordant = np.arange(n + 1)
    likely = binom.pmf(discordant, n, changed)
    discordant, likely = discordant[likely > 1e-12], likely[likely > 1e-12]
    # The most items on the smaller side that still give p <= alpha; -1 where no split does.
    worst = binom.ppf(alpha / 2, discordant, 0.5)
    worst = np.where(binom.cdf(worst, discordant, 0.5) > alpha / 2, worst - 1, worst)
    found = binom.cdf(worst, discordant, share_fixed) + binom.sf(discordant - worst - 1, discordant, share_fixed)
    return float((likely * np.where(worst >= 0, found, 0.0)).sum())


def detectable(n: int, changed: float) -> float | None:
    """The least true difference that n items show with p <= 0.05 four times in five, when a share `changed` of them comes out differently.

    Where even a change all in one direction is too small for that, more than `changed` has to change. None: n items never show one.
    """

    def lacking(net: float) -> float:
        share = max(changed, net)
        return mcnemar_power(n, share, (1 + net / share) / 2) - _POWER

    if n == 0 or lacking(1.0) < 0:
        return None
    return float(brentq(lacking, 1e-6, 1.0, xtol=1e-4))


def above_chance(correct: int, n: int, chance: float) -> float:
    """Exact one-sided p: how often a model that guesses one time in 1 / chance gets at least this many right."""
    return float(binomtest(correct, n, chance, alternative="greater").pvalue) if n else 1.0


def mcnemar_bounds(first: int, second: int, n: int) -> tuple[float, float]:
    """(least, largest) McNemar p that two totals of n right allow, when who was right on which item is not known.

    Least: the weaker model is right on none that the stronger misses. Largest: they overlap as little as n allows.
    """
    net, apart = abs(first - second), min(first, second, n - max(first, second))
    return mcnemar(net, 0), mcnemar(net + apart, apart)
