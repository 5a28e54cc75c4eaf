"""Two Triton kernels for LoRA beside frozen linear layers: x A^T with dropout, and the way back through it.

Promises: up to three layers that read the same x are served at once, each with a mask of its own; dropout without a mask in memory
(whether an element is kept is a hash of the layer's draw, the row and the column, so the way back sees the same mask); what is frozen
is multiplied by cuBLAS, not here. Cost: one read of x each way. CUDA only.
Legend: T tokens, K inputs, R rank, G layers, S parts of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

_ROWS, _COLUMNS, _STAGES = 64, 64, 3  # the fastest of a sweep on an H100 (bench/lora_kernels.py)
_BACK_ROWS, _BACK_COLUMNS, _BACK_STAGES, _PROGRAMS = 64, 64, 3, 264


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
def _dropped(x, draw_ptr, rows, columns, threshold):
    """x, with 0 where it is dropped: with probability threshold / 2^32."""
    row = _mixed(rows.to(tl.uint32) + tl.load(draw_ptr).to(tl.uint32))
    kept = _mixed(row[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B1)[None, :]) >= threshold
    return tl.where(kept, x, 0.0)


# One build serves all packs: without these words Triton builds anew, a second each, where the tokens are a multiple of 16, and for every
# other place of the draws. Neither says how x is read.
_built_once = triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["draw_ptr"])


@_built_once
def _down_kernel(
    x_ptr, a_ptr, wide_ptr, h_ptr, draw_ptr, tokens, x_stride, wide_stride, threshold, share,
    K: tl.constexpr, R: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None]
    rows_64 = rows.to(tl.int64)[:, None]
    ranks = tl.arange(0, R)
    first = tl.zeros((ROWS, R), dtype=tl.float32)
    second = tl.zeros((ROWS, R), dtype=tl.float32)
    third = tl.zeros((ROWS, R), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + rows_64 * x_stride + columns[None, :], mask=inside, other=0.0)
        if WIDE:
            tl.store(wide_ptr + rows_64 * wide_stride + columns[None, :], x, mask=inside)
        a_places = a_ptr + ranks[None, :] * K + columns[:, None]
        first = tl.dot(_dropped(x, draw_ptr, rows, columns, threshold), tl.load(a_places), first)
        if G > 1:
            second = tl.dot(_dropped(x, draw_ptr + 1, rows, columns, threshold), tl.load(a_places + R * K), second)
        if G > 2:
            third = tl.dot(_dropped(x, draw_ptr + 2, rows, columns, threshold), tl.load(a_places + 2 * R * K), third)
    for layer in tl.static_range(G):
        total = first if layer == 0 else (second if layer == 1 else third)
        h = (total * share).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows_64 * (G * R) + layer * R + ranks[None, :], h, mask=inside)
        if WIDE:
            tl.store(wide_ptr + rows_64 * wide_stride + K + layer * R + ranks[None, :], h, mask=inside)


@triton.jit
def _back_step(x, dh_places, a, draw_ptr, rows, inside, columns, threshold, total, dx, DROP: tl.constexpr, INPUT: tl.constexpr):
    """One layer's part: (`total` of dA with this tile, `dx` with what comes through A)."""
    dh = tl.load(dh_places, mask=inside, other=0.0)
    if DROP:
        x = _dropped(x, draw_ptr, rows, columns, threshold)
    total = tl.dot(tl.trans(dh), x, total)
    if INPUT:
        through = tl.dot(dh, a)
        if DROP:
            through = _dropped(through, draw_ptr, rows, columns, threshold)
        dx += through
    return total, dx


@_built_once
def _back_kernel(
    x_ptr, a_ptr, frozen_ptr, dh_ptr, dx_ptr, parts_ptr, draw_ptr, tokens, x_stride, frozen_stride, dh_stride, threshold, share,
    K: tl.constexpr, R: tl.constexpr, G: tl.constexpr, DROP: tl.constexpr, INPUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    a_places = a_ptr + ranks[:, None] * K + columns[None, :]
    first_a = tl.load(a_places)
    second_a = tl.load(a_places + R * K) if G > 1 else first_a
    third_a = tl.load(a_places + 2 * R * K) if G > 2 else first_a
    first = tl.zeros((R, COLUMNS), dtype=tl.float32)
    second = tl.zeros((R, COLUMNS), dtype=tl.float32)
    third = tl.zeros((R, COLUMNS), dtype=tl.float32)
    each = tl.cdiv(tl.cdiv(tokens, tl.num_programs(1)), ROWS) * ROWS
    begin = tl.program_id(1) * each
    for start in range(begin, tl.minimum(begin + each, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None]
        rows_64 = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows_64 * x_stride + columns[None, :], mask=inside, other=0.0)
        dh = dh_ptr + rows_64 * dh_stride + ranks[None, :]
        dx = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        first, dx = _back_step(x, dh, first_a, draw_ptr, rows, inside, columns, threshold, first, dx, DROP, INPUT)
        if G > 1:
            second, dx = _back_step(x, dh + R, second_a, draw_ptr + 1, rows, inside, columns, threshold, second, dx, DROP, INPUT)
        if G > 2:
            third, dx = _back_step(x, dh + 2 * R, third_a, draw_ptr + 2, rows, inside, columns, threshold, third, dx, DROP, INPUT)
        if INPUT:
            frozen = tl.load(frozen_ptr + rows_64 * frozen_stride + columns[None, :], mask=inside, other=0.0)
            dx = dx * share + frozen.to(tl.float32)
            tl.store(dx_ptr + rows_64 * K + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    parts = parts_ptr + tl.program_id(1) * G * R * K + ranks[:, None] * K + columns[None, :]
    tl.store(parts, first * share)
    if G > 1:
        tl.store(parts + R * K, second * share)
    if G > 2:
        tl.store(parts + 2 * R * K, third * share)


def _threshold(dropout: float) -> int:
    return min(int(dropout * 2**32), 2**32 - 1)


def _warps(r: int) -> int:
    return 8 if r >= 128 else 4


def build(k: int, r: int, layers: int, wide: bool, dropout: float, scale: float, dtype: torch.dtype) -> None:
    """Build the kernels of `layers` layers of these sizes for the current GPU, without running them: `down` and `back` find them built.

    Cost: about a second, most of it without the interpreter lock. The way back is built as where the gradient of x is wanted.
    """
    both, tokens, share = layers * r, _ROWS, scale / (1 - dropout)
    sizes = {"K": k, "R": r, "G": layers}
    if dropout:
        _down_kernel.warmup(
            dtype, dtype, dtype, dtype, torch.int64, tokens, k, k + both if wide else both, _threshold(dropout), share,
            WIDE=wide, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_warps(r), num_stages=_STAGES, grid=(1,), **sizes,
        )  # fmt: skip
    _back_kernel.warmup(
        dtype, dtype, dtype, dtype, dtype, torch.float32, torch.int64, tokens, k, k + both, k + both, _threshold(dropout), share,
        DROP=dropout > 0, INPUT=True, ROWS=_BACK_ROWS, COLUMNS=_BACK_COLUMNS, num_warps=8, num_stages=_BACK_STAGES, grid=(1,), **sizes,
    )  # fmt: skip


def down(
    x_TK: torch.Tensor, a_GRK: torch.Tensor, draws_G: torch.Tensor, dropout: float, scale: float, wide: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(`h_TGR` = scale * dropout(x) A^T of every layer, side by side, and with `wide` the matrix [x | h], which saves a pass over the
    outputs). `a_GRK` has the layers' A one below the other; `draws_G` decides the masks."""
    (tokens, k), layers = x_TK.shape, draws_G.shape[0]
    both, r = len(a_GRK), len(a_GRK) // layers
    if not dropout:  # cuBLAS; a kernel that stores what it also multiplies as it is gave wrong sums (Triton 3.6, docs/log.md)
        h_TGR = (x_TK @ a_GRK.t()) * scale
        return h_TGR, torch.cat((x_TK, h_TGR), 1) if wide else None
    h_TGR = torch.empty(tokens, both, device=x_TK.device, dtype=x_TK.dtype)
    wide_TKGR = torch.empty(tokens, k + both, device=x_TK.device, dtype=x_TK.dtype) if wide else h_TGR
    wrap_triton(_down_kernel)[(triton.cdiv(tokens, _ROWS),)](
        x_TK, a_GRK, wide_TKGR, h_TGR, draws_G, tokens, x_TK.stride(0), wide_TKGR.stride(0), _threshold(dropout), scale / (1 - dropout),
        K=k, R=r, G=layers, WIDE=wide, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_warps(r), num_stages=_STAGES,
    )  # fmt: skip
    return h_TGR, wide_TKGR if wide else None


def back(
    x_TK: torch.Tensor,
    a_GRK: torch.Tensor,
    frozen_TK: torch.Tensor | None,
    dh_TGR: torch.Tensor,
    draws_G: torch.Tensor,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`dx_TK`, `da_GRK` in float32). `dh_TGR` is the gradient of h, `frozen_TK` that of x through the frozen matrices, to which the
    parts through A are added; without it `dx_TK` is empty. Nothing is changed in place: a compiler would copy it first."""
    (tokens, k), layers = x_TK.shape, draws_G.shape[0]
    both, r = len(a_GRK), len(a_GRK) // layers
    wanted = frozen_TK is not None
    dx_TK = torch.empty(tokens if wanted else 0, k, device=x_TK.device, dtype=x_TK.dtype)
    parts_SRK = torch.empty(max(1, _PROGRAMS // (k // _BACK_COLUMNS)), both, k, device=x_TK.device, dtype=torch.float32)
    frozen = dh_TGR if frozen_TK is None else frozen_TK
    wrap_triton(_back_kernel)[(k // _BACK_COLUMNS, parts_SRK.shape[0])](
        x_TK, a_GRK, frozen, dh_TGR, dx_TK, parts_SRK, draws_G, tokens, x_TK.stride(0), frozen.stride(0), dh_TGR.stride(0),
        _threshold(dropout), scale / (1 - dropout),
        K=k, R=r, G=layers, DROP=dropout > 0, INPUT=wanted, ROWS=_BACK_ROWS, COLUMNS=_BACK_COLUMNS, num_warps=8, num_stages=_BACK_STAGES,
    )  # fmt: skip
    return dx_TK, parts_SRK.sum(0)
