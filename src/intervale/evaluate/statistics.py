"""How far a score can be trusted: intervals and a paired test, from counts. Pure functions on integers; scipy where it has them.

All intervals are 95%. A proportion: Wilson's score interval. Two models on the same items: McNemar's exact test, and Newcombe's
square-and-add interval for the difference, which stays honest where a bootstrap does not (no discordant pair at all).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest


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
