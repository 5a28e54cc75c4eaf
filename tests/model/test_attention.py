"""Packed attention is attention on each row alone: plain, shared, filled up, and within a sliding window."""

from types import SimpleNamespace

import pytest
import torch

from intervale.data.packing import Group
from intervale.model.attention import layout_of, packed_attention

HEADS, GROUPS, WIDTH = 4, 2, 8
# Two shared rows of one shape, the second filled up in its beginning; a plain group; a plain row.
SHAPES = (Group(2, 4, 2, 3), Group(2, 5), Group(1, 2))
BEGINS = (4, 2, 5, 3, 2)


def tokens_of(shapes: tuple[Group, ...]) -> list[tuple[int, int, int, bool]]:
    """(row, branch, position, is it the row's own) of every token of the pack."""
    told, row = [], 0
    for group in shapes:
        for _ in range(group.rows):
            told += [(row, 0, at, at < BEGINS[row]) for at in range(group.common)]
            told += [(row, 1 + branch, BEGINS[row] + at, True) for branch in range(group.branches) for at in range(group.branch)]
            row += 1
    return told


def attend_one_by_one(query_HD: torch.Tensor, keys_THD: torch.Tensor, values_THD: torch.Tensor) -> torch.Tensor:
    """One query over the keys it may see: the definition, without any mask."""
    weights_HT = torch.softmax(torch.einsum("hd,thd->ht", query_HD, keys_THD) / WIDTH**0.5, -1)
    return torch.einsum("ht,thd->hd", weights_HT, values_THD)


@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[1:]], ids=["shared", "plain"])
def test_a_token_sees_its_own_branch_and_the_beginning_and_nothing_else(window: int | None, shapes: tuple[Group, ...]) -> None:
    told = tokens_of(shapes)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(told), WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS))
    begins = BEGINS[: sum(group.rows for group in shapes)]
    layout = layout_of(shapes, begins, torch.tensor([position for _, _, position, _ in told])).to(torch.device("cpu"))
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    options = {} if window is None else {"sliding_window": window}
    got_THD = packed_attention(module, query, key, value, None, layout=layout, scaling=WIDTH**-0.5, dropout=0.0, **options)[0][0]

    keys_THD, values_THD = (states[0].transpose(0, 1).repeat_interleave(HEADS // GROUPS, 1) for states in (key, value))
    for t, (row, branch, position, own) in enumerate(told):
        if not own:  # nobody sees it, so what it sees does not matter
            continue
        seen = [
            k
            for k, (other, its_branch, its_position, its_own) in enumerate(told[: t + 1])
            if other == row and its_own and its_branch in (0, branch) and (window is None or position - its_position < window)
        ]
        wanted_HD = attend_one_by_one(query[0, :, t], keys_THD[seen], values_THD[seen])
        assert torch.allclose(got_THD[t], wanted_HD, atol=1e-6), t


def test_what_fills_a_row_up_is_seen_by_nobody() -> None:
    told = tokens_of(SHAPES)
    layout = layout_of(SHAPES, BEGINS, torch.tensor([position for _, _, position, _ in told])).to(torch.device("cpu"))
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    query, key, value = (torch.randn(1, heads, len(told), WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    own = torch.tensor([place for place, (_, _, _, is_own) in enumerate(told) if is_own])
    filled = torch.tensor([place for place, (_, _, _, is_own) in enumerate(told) if not is_own])
    packed_attention(module, query, key, value, None, layout=layout, scaling=1.0, dropout=0.0)[0][0, own].sum().backward()
    for states in (query, key, value):
        assert states.grad is not None
        assert not states.grad[:, :, filled].any()
        assert states.grad[:, :, own].any()
