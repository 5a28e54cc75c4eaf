"""Work spread over processes is the work done here."""

import os

from intervale.core.errors import UserError
from intervale.core.spread import spread


def test_spread_work_gives_the_same_results_in_the_same_order() -> None:
    items = list(range(5_003))
    assert spread(lambda item: item * item, items, few=0) == [item * item for item in items]


def test_many_items_leave_this_process_and_few_do_not() -> None:
    assert set(spread(lambda _: os.getpid(), range(10), few=10)) == {os.getpid()}
    if len(os.sched_getaffinity(0)) > 1:
        assert os.getpid() not in spread(lambda _: os.getpid(), range(10), few=5)


def test_an_error_of_ours_comes_back_as_it_was() -> None:
    found = spread(lambda item: UserError(f"item {item}", "mend it"), range(3), few=0)
    assert [(error.what, error.fix) for error in found] == [(f"item {n}", "mend it") for n in range(3)]
