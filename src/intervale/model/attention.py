"""Attention over a micro-batch whose rows are packed: every other layer sees no padding, attention sees the rows side by side.

Promises: a token attends exactly to the earlier tokens of its own item (and, in a shared row, to the common beginning), on every
device: the rows are padded for scaled-dot-product attention alone, and the padding is masked or never asked. Cost: one gather of
queries, keys and values and one of the result a layer. Legend: B rows, L longest row, T tokens of all rows, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, InternVLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "intervale_packed"


@dataclass(frozen=True)
class Layout:
    """Where each token stands. `index_BL`: the token at each place of the padded rows (0 at padding); `place_T`: the place of each
    token in the flattened rows; `branch_BL` None when no row is shared; `mask_B1LL` what may be seen, None for plain causal."""

    index_BL: torch.Tensor
    place_T: torch.Tensor
    branch_BL: torch.Tensor | None
    positions_BL: torch.Tensor
    mask_B1LL: torch.Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        """The layout on a device, with the mask of shared rows, which is made there."""
        index, place, positions = (t.to(device, non_blocking=True) for t in (self.index_BL, self.place_T, self.positions_BL))
        branch = None if self.branch_BL is None else self.branch_BL.to(device, non_blocking=True)
        moved = replace(self, index_BL=index, place_T=place, branch_BL=branch, positions_BL=positions)
        return moved if branch is None else replace(moved, mask_B1LL=_visible(branch))


def _visible(branch_BL: torch.Tensor) -> torch.Tensor:
    """`mask_B1LL`: earlier tokens of the common beginning and of the own branch. Padding stands at the end and is seen by itself alone."""
    length = branch_BL.shape[1]
    earlier_LL = torch.ones(length, length, dtype=torch.bool, device=branch_BL.device).tril()
    keys, queries = branch_BL[:, None, :], branch_BL[:, :, None]
    return (earlier_LL & ((keys == 0) | (keys == queries)))[:, None]


def layout_of(lengths: Sequence[int], positions_T: torch.Tensor, branch_T: torch.Tensor, shared: bool) -> Layout:
    """The layout of rows of these lengths, one after another in the pack."""
    longest = max(lengths)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    offsets_L = torch.arange(longest)
    inside_BL = offsets_L < torch.tensor(lengths)[:, None]
    index_BL = torch.where(inside_BL, starts[:, None] + offsets_L, 0)
    # Padding gets a branch of its own, so that a masked softmax over it is never empty.
    branch_BL = torch.where(inside_BL, branch_T[index_BL], -1) if shared else None
    return Layout(index_BL, inside_BL.flatten().nonzero()[:, 0], branch_BL, positions_T[index_BL])


def _windowed(layout: Layout, window: int) -> torch.Tensor | None:
    """The mask with a sliding window (Phi3): a token sees the last `window` positions, its own included."""
    if layout.index_BL.shape[1] <= window:
        return layout.mask_B1LL
    near = (layout.positions_BL[:, :, None] - layout.positions_BL[:, None, :] < window)[:, None]
    length = near.shape[-1]
    mask = layout.mask_B1LL
    causal = torch.ones(length, length, dtype=torch.bool, device=near.device).tril() if mask is None else mask
    return causal & near


class _SideBySide(torch.autograd.Function):
    """Tokens of the pack to padded rows. A token has one place, so the way back is a gather too; torch's own gradient of a gather
    adds up, one after another, what the padding's copies of token 0 would give: on an H100 that was most of a step (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, states_TX: torch.Tensor, index_N: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_T)
        return states_TX[index_N]

    @staticmethod
    def backward(ctx: Any, gradient_NX: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient_NX[ctx.saved_tensors[0]], None, None


class _Packed(torch.autograd.Function):
    """Padded rows back to the tokens of the pack; nothing flows into padding."""

    @staticmethod
    def forward(ctx: Any, padded_NX: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_T)
        ctx.places = len(padded_NX)
        return padded_NX[place_T]

    @staticmethod
    def backward(ctx: Any, gradient_TX: torch.Tensor) -> tuple[torch.Tensor, None]:
        padded_NX = gradient_TX.new_zeros(ctx.places, *gradient_TX.shape[1:])
        return padded_NX.index_copy_(0, ctx.saved_tensors[0], gradient_TX), None


def packed_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Without a `layout` (generation, another caller) it is transformers' own sdpa."""
    if layout is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    assert attention_mask is None, "a pack has no mask of its own"
    rows, longest = layout.index_BL.shape
    flat = layout.index_BL.flatten()

    def side_by_side(states_1HTD: torch.Tensor) -> torch.Tensor:
        heads, width = states_1HTD.shape[1], states_1HTD.shape[3]
        padded: torch.Tensor = _SideBySide.apply(states_1HTD[0].transpose(0, 1), flat, layout.place_T)
        return padded.view(rows, longest, heads, width).transpose(1, 2)

    window = kwargs.pop("sliding_window", None)
    mask = layout.mask_B1LL if window is None else _windowed(layout, window)
    kwargs |= {"is_causal": mask is None}
    seen_BLHD, _ = sdpa_attention_forward(
        module, side_by_side(query_BHTD), side_by_side(key_BHTD), side_by_side(value_BHTD), mask, **kwargs
    )
    seen_1THD: torch.Tensor = _Packed.apply(seen_BLHD.flatten(0, 1), layout.place_T)
    return seen_1THD[None], None


def use_packed_attention(network: InternVLForConditionalGeneration) -> None:
    """Let the language model take packs: `layout=` goes with every call that is one."""
    AttentionInterface.register(NAME, packed_attention)
    network.model.language_model.set_attn_implementation(NAME)
