"""Packed attention is attention on each row alone: plain, shared and within a sliding window."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from intervale.model.attention import layout_of, packed_attention

HEADS, GROUPS, WIDTH = 4, 2, 8
# (branch of each token, its position): two shared rows and a plain one, of different lengths.
ROWS = [
    ([0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 3, 4, 5]),
    ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
    ([0, 1, 2, 3], [0, 1, 1, 1]),
]


def attend_one_by_one(query_HD: torch.Tensor, keys_THD: torch.Tensor, values_THD: torch.Tensor) -> torch.Tensor:
    """One query over the keys it may see: the definition, without any mask."""
    weights_HT = torch.softmax(torch.einsum("hd,thd->ht", query_HD, keys_THD) / WIDTH**0.5, -1)
    return torch.einsum("ht,thd->hd", weights_HT, values_THD)


@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_a_token_sees_its_own_branch_and_the_beginning_and_nothing_else(window: int | None, shared: bool) -> None:
    rows = ROWS if shared else [([1] * len(branch), list(range(len(branch)))) for branch, _ in ROWS]
    lengths = [len(branch) for branch, _ in rows]
    branch_T = torch.tensor([b for branch, _ in rows for b in branch])
    positions_T = torch.tensor([p for _, positions in rows for p in positions])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(branch_T), WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS))
    layout = layout_of(lengths, positions_T, branch_T, shared).to(torch.device("cpu"))
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    options = {} if window is None else {"sliding_window": window}
    got_THD = packed_attention(module, query, key, value, None, layout=layout, scaling=WIDTH**-0.5, dropout=0.0, **options)[0][0]

    keys_THD, values_THD = (states[0].transpose(0, 1).repeat_interleave(HEADS // GROUPS, 1) for states in (key, value))
    for start, length in zip([0, *itertools.accumulate(lengths[:-1])], lengths, strict=True):
        for t in range(start, start + length):
            seen = [
                k
                for k in range(start, t + 1)
                if branch_T[k] in (0, branch_T[t]) and (window is None or positions_T[t] - positions_T[k] < window)
            ]
            wanted_HD = attend_one_by_one(query[0, :, t], keys_THD[seen], values_THD[seen])
            assert torch.allclose(got_THD[t], wanted_HD, atol=1e-6), t
