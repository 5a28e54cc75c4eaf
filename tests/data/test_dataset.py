import numpy as np
import pytest

from intervale.data.order import step_items


@pytest.mark.parametrize(("count", "per_step"), [(42, 8), (8, 8), (7, 3), (1, 4)])
def test_an_epoch_shows_every_item_once_and_the_next_in_another_order(count: int, per_step: int) -> None:
    steps = -(-count // per_step)
    epochs = [np.concatenate([step_items(count, per_step, 5, e * steps + s) for s in range(steps)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or not np.array_equal(*epochs)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    assert np.array_equal(step_items(100, 8, 1, 30), step_items(100, 8, 1, 30))
    assert not np.array_equal(step_items(100, 8, 1, 30), step_items(100, 8, 2, 30))


def test_questions_on_one_picture_stand_together_and_each_item_comes_once_an_epoch() -> None:
    together = (0, 1, 0, 2, 1, 0, 2, 3)
    seen = [int(item) for step in range(3) for item in step_items(len(together), 3, 7, step, together)]
    assert sorted(seen) == list(range(len(together)))
    groups = [together[item] for item in seen]
    assert [group for at, group in enumerate(groups) if at == 0 or groups[at - 1] != group] == list(dict.fromkeys(groups))
    assert seen != [int(item) for step in range(3, 6) for item in step_items(len(together), 3, 7, step, together)]
