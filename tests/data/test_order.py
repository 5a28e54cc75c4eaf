"""The order of the data is a function of seed and step, keeps blocks and weights, and deals tokens out evenly."""

from collections import Counter

import numpy as np
import pytest

from intervale.data.order import Order, Part, deal


def epoch_of(order: Order, per_step: int, number: int) -> list[int]:
    steps = -(-len(order) // per_step)
    return [int(item) for step in range(number * steps, (number + 1) * steps) for item in order.step(per_step, step)]


def test_a_mix_shows_each_source_by_its_weight_and_leaves_nothing_out_for_good() -> None:
    order = Order([Part(6, 12), Part(10, 5)], 3)  # weights 2 and 1/2
    first, second = epoch_of(order, 4, 0), epoch_of(order, 4, 1)
    assert Counter(item for item in first if item < 6) == dict.fromkeys(range(6), 2)
    halves = [[item for item in epoch if item >= 6] for epoch in (first, second)]
    assert sorted(halves[0] + halves[1]) == list(range(6, 16))
    assert first != second
    assert epoch_of(Order([Part(6, 12), Part(10, 5)], 3), 4, 1) == second  # asked for alone, it is the same
    assert epoch_of(Order([Part(6, 12), Part(10, 5)], 4), 4, 1) != second


def test_a_source_alone_is_ordered_as_it_always_was() -> None:
    found = [int(item) for item in Order([Part(5, 5)], 42).epoch(0)]
    assert found == [int(n) for n in np.random.Generator(np.random.Philox(key=[42, 0])).permutation(5)]


def test_blocks_are_read_one_window_after_another() -> None:
    sizes = (5, 3, 4, 6, 2)
    order = Order([Part(20, 20, sizes, 2)], 9)
    block = np.repeat(range(5), sizes)
    for number in (0, 1):
        seen = epoch_of(order, 3, number)
        assert sorted(seen) == list(range(20))
        met = list(dict.fromkeys(int(block[item]) for item in seen))
        windows = [met[at : at + 2] for at in (0, 2, 4)]
        last = {name: max(place for place, item in enumerate(seen) if block[item] == name) for name in range(5)}
        assert max(last[name] for name in windows[0]) < min(place for place, item in enumerate(seen) if block[item] in windows[1])
        assert len(met) == 5
    assert epoch_of(order, 3, 0) != epoch_of(order, 3, 1)


def test_groups_follow_each_other_as_first_met() -> None:
    together = np.array([4, 1, 4, 2, 1, 4])
    plain, kept = Order([Part(6, 6)], 8).epoch(0), Order([Part(6, 6)], 8, together).epoch(0)
    expected = [item for group in dict.fromkeys(together[plain]) for item in plain if together[item] == group]
    assert list(kept) == expected


@pytest.mark.parametrize("processes", [2, 3])
def test_dealing_gives_as_many_items_each_and_even_tokens(processes: int) -> None:
    random = np.random.Generator(np.random.Philox(key=1))
    costs = random.integers(100, 4000, 24).astype(float)
    items = random.permutation(24)
    shares = deal(items, costs, processes)
    assert sorted(np.concatenate(shares)) == list(range(24))
    assert {len(share) for share in shares} == {24 // processes}
    by_item = dict(zip(items, costs, strict=True))
    loads = [sum(by_item[item] for item in share) for share in shares]
    cut = [sum(by_item[item] for item in share) for share in np.array_split(items, processes)]
    assert max(loads) - min(loads) < 0.25 * (max(cut) - min(cut))


def test_dealing_keeps_groups_where_places_allow_and_always_the_same() -> None:
    items, costs = np.arange(9), np.ones(9)
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3])
    shares = deal(items, costs, 2, groups)
    assert sorted(len(share) for share in shares) == [4, 5]
    split = [group for group in range(4) if len({number for number, share in enumerate(shares) if (groups[share] == group).any()}) > 1]
    assert len(split) <= 1
    assert all(np.array_equal(one, other) for one, other in zip(shares, deal(items, costs, 2, groups), strict=True))
    assert all(list(share) == sorted(share) for share in shares)
