"""Attention over a micro-batch whose rows are packed: every group of rows is a plain batch to it, without a copy.

Promises: a token attends exactly to the earlier tokens of its own item (and, in a shared row, to the common beginning), on every
device, in torch's own scaled-dot-product attention. Cost: one causal call a group of rows, and one masked call for its branches.
On Hopper torch's cuDNN kernels are preferred: a step took 244 ms with them, 274 ms with variable-length flash attention
(docs/log.md). Legend: B rows of a group, L tokens of a row, R rows of all groups, T tokens of all rows, H heads, D head width,
Q tokens of a row's branches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, InternVLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from intervale.data.packing import Group

NAME = "intervale_packed"
_FASTEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Single = tuple[int, int, int, torch.Tensor | None]  # rows, common tokens, tokens in branches, and what those may see


@dataclass(frozen=True)
class Layout:
    """Where each token stands. `begins_R`: how many of a row's common tokens are its own; `positions_T` only serve a sliding window.
    `masks` has an entry for every group: what its branches may see, None where there are none."""

    groups: tuple[Group, ...]
    begins_R: torch.Tensor
    positions_T: torch.Tensor
    masks: tuple[torch.Tensor | None, ...] = ()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of the layout."""
        yield from (self.begins_R, self.positions_T)
        yield from (mask for mask in self.masks if mask is not None)

    def single(self, window: int | None) -> Single | None:
        """The pack as plain numbers, which compiled code takes as they come, when it is one group that a sliding window does not cut."""
        (first, *more) = self.groups
        if more or (window is not None and first.length > window):
            return None
        return first.rows, first.common, first.length - first.common, self.masks[0] if self.masks else None

    def to(self, device: torch.device) -> Layout:
        """The layout on a device, with the masks, which are made there."""
        if self.masks and self.begins_R.device.type == device.type:
            return self
        begins, positions = (t.to(device, non_blocking=True) for t in (self.begins_R, self.positions_T))
        each = begins.split([group.rows for group in self.groups])
        masks = tuple(_branch_mask(group, own) if group.branches else None for group, own in zip(self.groups, each, strict=True))
        return replace(self, begins_R=begins, positions_T=positions, masks=masks)


def layout_of(groups: Sequence[Group], begins: Sequence[int], positions_T: torch.Tensor) -> Layout:
    """The layout of `data.packing.Rows`."""
    return Layout(tuple(groups), torch.tensor(begins), positions_T)


def _branch_mask(group: Group, begins_B: torch.Tensor) -> torch.Tensor:
    """`mask_B1QL`: a branch's token sees the row's own common tokens, and in its branch itself and what is before it."""
    device, count = begins_B.device, group.branches * group.branch
    place_Q = torch.arange(count, device=device)
    number_Q = place_Q // group.branch
    own_QQ = (number_Q[:, None] == number_Q) & (place_Q[:, None] >= place_Q)
    begin_BC = torch.arange(group.common, device=device) < begins_B[:, None]
    seen = (begin_BC[:, None].expand(-1, count, -1), own_QQ.expand(group.rows, -1, -1))
    return torch.cat(seen, dim=2)[:, None]


def _near(positions_BL: torch.Tensor, queries: slice, window: int) -> torch.Tensor:
    """`mask_B1QL` of a sliding window: a token sees the last `window` positions, its own included."""
    return (positions_BL[:, queries, None] - positions_BL[:, None, :] < window)[:, None]


def preferred(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """torch's attention kernels in the order of their speed."""
    found: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if device.type == "cuda":
        found = sdpa_kernel(_FASTEST_FIRST, set_priority=True)
    return found


def _attend(module: torch.nn.Module, rows: tuple[torch.Tensor, ...], mask: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
    """`seen_BLHD` of `rows` (query, key, value, each BHLD)."""
    seen_BLHD: torch.Tensor
    seen_BLHD, _ = sdpa_attention_forward(module, *rows, mask, is_causal=mask is None, **options)
    return seen_BLHD


def _side_by_side(states_1HTD: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """`states_BHLD`, a view."""
    return states_1HTD[0].unflatten(1, (rows, length)).transpose(0, 1)


def _attend_rows(
    module: torch.nn.Module,
    rows: tuple[torch.Tensor, ...],
    common: int,
    causal: torch.Tensor | None,
    mask_B1QL: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """`seen_BLHD` of one group: its common tokens causally (or by the mask `causal`), its branches by `mask_B1QL` if it has any."""
    query, key, value = rows
    if mask_B1QL is None:
        return _attend(module, rows, causal, options)
    begin = _attend(module, (query[:, :, :common], key[:, :, :common], value[:, :, :common]), causal, options)
    return torch.cat([begin, _attend(module, (query[:, :, common:], key, value), mask_B1QL, options)], dim=1)


def _windowed(
    group: Group, mask_B1QL: torch.Tensor | None, positions_BL: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(mask of the common tokens, mask of the branches) with a sliding window."""
    common = group.common
    earlier = torch.ones(common, common, dtype=torch.bool, device=positions_BL.device).tril()
    causal = earlier & _near(positions_BL[:, :common], slice(None), window)
    return causal, None if mask_B1QL is None else mask_B1QL & _near(positions_BL, slice(common, None), window)


@torch.compiler.disable
def _attend_pack(
    module: torch.nn.Module, states: tuple[torch.Tensor, ...], layout: Layout, window: int | None, options: Any
) -> torch.Tensor:
    """`seen_1THD` of a pack; its shapes change from pack to pack, so it stays out of compiled code."""
    masks = layout.masks or (None,) * len(layout.groups)
    seen, at = [], 0
    for group, mask in zip(layout.groups, masks, strict=True):
        here = slice(at, at + group.rows * group.length)
        rows = tuple(_side_by_side(one_1HTD[:, :, here], group.rows, group.length) for one_1HTD in states)
        causal = None
        if window is not None and group.length > window:
            causal, mask = _windowed(group, mask, layout.positions_T[here].view(group.rows, group.length), window)
        with preferred(rows[0].device):
            seen.append(_attend_rows(module, rows, group.common, causal, mask, options).flatten(0, 1))
        at = here.stop
    return (seen[0] if len(seen) == 1 else torch.cat(seen))[None]


def packed_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | Single | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Without a `layout` (generation, another caller) it is transformers' own sdpa."""
    if layout is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    assert attention_mask is None, "a pack has no mask of its own"
    window = kwargs.pop("sliding_window", None)
    if isinstance(layout, tuple):  # whoever compiles this has set what `preferred` sets
        count, common, rest, mask = layout
        rows = tuple(_side_by_side(states, count, common + rest) for states in (query_BHTD, key_BHTD, value_BHTD))
        with contextlib.nullcontext() if torch.compiler.is_compiling() else preferred(query_BHTD.device):
            return _attend_rows(module, rows, common, None, mask, kwargs).flatten(0, 1)[None], None
    return _attend_pack(module, (query_BHTD, key_BHTD, value_BHTD), layout, window, kwargs), None


def use_packed_attention(network: InternVLForConditionalGeneration) -> None:
    """Let the language model take packs: `layout=` goes with every call that is one."""
    AttentionInterface.register(NAME, packed_attention)
    network.model.language_model.set_attn_implementation(NAME)
