import numpy as np
import pytest

from intervale.data.dataset import step_items


@pytest.mark.parametrize(("count", "per_step"), [(42, 8), (8, 8), (7, 3), (1, 4)])
def test_an_epoch_shows_every_item_once_and_the_next_in_another_order(count: int, per_step: int) -> None:
    steps = -(-count // per_step)
    epochs = [np.concatenate([step_items(count, per_step, 5, e * steps + s) for s in range(steps)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or not np.array_equal(*epochs)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    assert np.array_equal(step_items(100, 8, 1, 30), step_items(100, 8, 1, 30))
    assert not np.array_equal(step_items(100, 8, 1, 30), step_items(100, 8, 2, 30))
