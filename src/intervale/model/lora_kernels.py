"""Two Triton kernels for LoRA beside a frozen linear layer: x A^T with dropout, and the way back through it.

Promises: dropout without a mask in memory (whether an element is kept is a hash of the layer's draw, the row and the column, so the way
back sees the same mask); what is frozen is multiplied by cuBLAS, not here. Cost: one read of x each way. CUDA only.
Legend: T tokens, K inputs, R rank, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

_ROWS, _COLUMNS, _STAGES = 64, 64, 3  # the fastest of a sweep on an H100 (bench/lora_kernels.py)
_BACK_ROWS, _BACK_COLUMNS, _BACK_STAGES, _PROGRAMS = 64, 64, 3, 264  # two waves of an H100's 132 multiprocessors


@triton.jit
def _mixed(x):
    """A 32-bit finaliser of two multiplications: every input bit moves about half of the output's."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _kept(draw, rows, columns, threshold):
    """Is the element kept? With probability 1 - threshold / 2^32."""
    row = _mixed(rows.to(tl.uint32) + draw)
    return _mixed(row[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B1)[None, :]) >= threshold


@triton.jit
def _down_kernel(
    x_ptr, a_ptr, wide_ptr, h_ptr, draw_ptr, tokens, x_stride, wide_stride, threshold, share,
    K: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None]
    rows_64 = rows.to(tl.int64)[:, None]
    ranks = tl.arange(0, R)
    draw = tl.load(draw_ptr).to(tl.uint32)
    total = tl.zeros((ROWS, R), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + rows_64 * x_stride + columns[None, :], mask=inside, other=0.0)
        if WIDE:
            tl.store(wide_ptr + rows_64 * wide_stride + columns[None, :], x, mask=inside)
        x = tl.where(_kept(draw, rows, columns, threshold), x, 0.0)
        a = tl.load(a_ptr + ranks[None, :] * K + columns[:, None])
        total = tl.dot(x, a, total)
    h = (total * share).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows_64 * R + ranks[None, :], h, mask=inside)
    if WIDE:
        tl.store(wide_ptr + rows_64 * wide_stride + K + ranks[None, :], h, mask=inside)


@triton.jit
def _back_kernel(
    x_ptr, a_ptr, frozen_ptr, dh_ptr, dx_ptr, parts_ptr, draw_ptr, tokens, x_stride, frozen_stride, dh_stride, threshold, share,
    K: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, INPUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    draw = tl.load(draw_ptr).to(tl.uint32)
    a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :])
    total = tl.zeros((R, COLUMNS), dtype=tl.float32)
    each = tl.cdiv(tl.cdiv(tokens, tl.num_programs(1)), ROWS) * ROWS
    first = tl.program_id(1) * each
    for start in range(first, tl.minimum(first + each, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None]
        rows_64 = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows_64 * x_stride + columns[None, :], mask=inside, other=0.0)
        dh = tl.load(dh_ptr + rows_64 * dh_stride + ranks[None, :], mask=inside, other=0.0)
        if DROP:
            kept = _kept(draw, rows, columns, threshold)
            x = tl.where(kept, x, 0.0)
        total = tl.dot(tl.trans(dh), x, total)
        if INPUT:
            dx = tl.dot(dh, a) * share
            if DROP:
                dx = tl.where(kept, dx, 0.0)
            dx += tl.load(frozen_ptr + rows_64 * frozen_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows_64 * K + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(parts_ptr + tl.program_id(1) * R * K + ranks[:, None] * K + columns[None, :], total * share)


def _drop(dropout: float) -> tuple[int, float]:
    """(threshold of the hash, what the kept are multiplied with)."""
    return min(int(dropout * 2**32), 2**32 - 1), 1.0 / (1.0 - dropout)


def down(
    x_TK: torch.Tensor, a_RK: torch.Tensor, draw_1: torch.Tensor, dropout: float, wide: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(`h_TR` = dropout(x) A^T, and with `wide` the matrix [x | h] of K + R columns, which saves a pass over the outputs)."""
    (tokens, k), r = x_TK.shape, len(a_RK)
    if not dropout:  # cuBLAS; the kernel below, which would store what it also multiplies, gave wrong sums here (Triton 3.6, docs/log.md)
        h_TR = x_TK @ a_RK.t()
        return h_TR, torch.cat((x_TK, h_TR), 1) if wide else None
    h_TR = torch.empty(tokens, r, device=x_TK.device, dtype=x_TK.dtype)
    wide_TKR = torch.empty(tokens, k + r, device=x_TK.device, dtype=x_TK.dtype) if wide else h_TR
    threshold, share = _drop(dropout)
    wrap_triton(_down_kernel)[(triton.cdiv(tokens, _ROWS),)](
        x_TK, a_RK, wide_TKR, h_TR, draw_1, tokens, x_TK.stride(0), wide_TKR.stride(0), threshold, share,
        K=k, R=r, WIDE=wide, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8 if r >= 128 else 4, num_stages=_STAGES,
    )  # fmt: skip
    return h_TR, wide_TKR if wide else None


def back(
    x_TK: torch.Tensor, a_RK: torch.Tensor, frozen_TK: torch.Tensor | None, dh_TR: torch.Tensor, draw_1: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`dx_TK`, `da_RK` in float32). `dh_TR` is the gradient of h, `frozen_TK` that of x through the frozen matrix, to which the part
    through A is added; without it `dx_TK` is empty. Nothing is changed in place: a compiler would copy it first."""
    (tokens, k), r = x_TK.shape, len(a_RK)
    wanted = frozen_TK is not None
    dx_TK = torch.empty(tokens if wanted else 0, k, device=x_TK.device, dtype=x_TK.dtype)
    parts_SRK = torch.empty(max(1, _PROGRAMS // (k // _BACK_COLUMNS)), r, k, device=x_TK.device, dtype=torch.float32)
    threshold, share = _drop(dropout)
    frozen = dh_TR if frozen_TK is None else frozen_TK
    wrap_triton(_back_kernel)[(k // _BACK_COLUMNS, parts_SRK.shape[0])](
        x_TK, a_RK, frozen, dh_TR, dx_TK, parts_SRK, draw_1, tokens, x_TK.stride(0), frozen.stride(0), dh_TR.stride(0), threshold, share,
        K=k, R=r, DROP=dropout > 0, INPUT=wanted, ROWS=_BACK_ROWS, COLUMNS=_BACK_COLUMNS, num_warps=8, num_stages=_BACK_STAGES,
    )  # fmt: skip
    return dx_TK, parts_SRK.sum(0)
