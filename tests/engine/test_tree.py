"""A tree of prompts holds every token once, and a node sees its own way alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from intervale.engine.tree import Prompt, Seen, Tree, common_length

PICTURE = 9


def pictured(key: str, value: float, tiles: int = 2, tokens: int = 2) -> tuple[str, torch.Tensor]:
    return key, value + torch.arange(tiles * tokens * 3.0).reshape(tiles, tokens, 3)


def prompt(ids: list[int], *pictures: tuple[str, torch.Tensor]) -> Prompt:
    return Prompt(np.array(ids), pictures)


def test_equal_positions_of_equal_pictures_have_equal_numbers_and_their_features_come_back_in_place() -> None:
    seen = Seen(PICTURE)
    a, b = pictured("a", 100), pictured("b", 200, tiles=1)
    first = seen.numbers_of(prompt([1, *[9] * 4, 2, *[9] * 2, 3], a, b))
    other = seen.numbers_of(prompt([1, *[9] * 2, 2, *[9] * 4, 3], b, a))
    assert first.tolist() == [1, -1, -2, -3, -4, 2, -5, -6, 3]
    assert other.tolist() == [1, -5, -6, 2, -1, -2, -3, -4, 3]
    ids, features = seen.embedded_as(np.stack([first[2:5], other[0:3]]))
    assert ids.tolist() == [[9, 9, 9], [1, 9, 9]]
    assert features is not None
    assert features[0].tolist() == [*a[1].flatten(0, 1)[1:4].tolist(), *b[1].flatten(0, 1)[:2].tolist()]
    assert seen.embedded_as(np.array([1, 2]))[1] is None


def test_a_prompt_without_a_features_for_each_of_its_picture_tokens_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 picture tokens but 4 features"):
        Seen(PICTURE).numbers_of(prompt([1, 9, 9, 9], pictured("a", 0)))


def test_the_common_length_is_that_of_all() -> None:
    assert common_length([np.array([1, 2, 3])]) == 3
    assert common_length([np.array([1, 2, 3]), np.array([1, 2])]) == 2
    assert common_length([np.array([1, 2, 3]), np.array([1, 2, 3, 4]), np.array([1, 5, 3])]) == 1
    assert common_length([np.array([1]), np.array([2])]) == 0


def test_a_tree_has_every_token_once_and_a_node_sees_its_own_way() -> None:
    tree = Tree(trunk=10)
    assert tree.grow(0, [5, 6, 7]) == [1, 2, 3]
    assert tree.grow(0, [5, 8]) == [1, 4]
    assert tree.grow(2, [7, 7]) == [3, 5]
    assert tree.grow(0, []) == []
    assert tree.numbers == [0, 5, 6, 7, 8, 7]
    assert tree.depths == [0, 1, 2, 3, 2, 4]
    assert [np.flatnonzero(row).tolist() for row in tree.seen()] == [[], [0], [0, 1], [0, 1, 2], [0, 3], [0, 1, 2, 4]]
