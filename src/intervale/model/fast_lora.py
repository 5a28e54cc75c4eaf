"""LoRA at the price of its arithmetic on a GPU: PEFT's layers keep their parameters and their files, only their training pass changes.

Promises: the same function and, with dropout, the same distribution as PEFT's layer, every layer with a mask of its own. The frozen
matrix and B stand side by side in one buffer, [W | scale B], so that one product [x | dropout(x) A^T] [W | scale B]^T gives the
layer's output and one gives both gradients on the way back. Cost: bfloat16 copies of A and B, made anew for every step.
Legend: T tokens, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.library import triton_op
from torch.nn import functional

from intervale.model.lora_kernels import back, down


@triton_op("intervale::lora_linear", mutates_args={})
def _linear(
    x_TK: torch.Tensor,
    first_RK: torch.Tensor,
    second_NR: torch.Tensor,
    wide_NKR: torch.Tensor,
    small_RK: torch.Tensor,
    bias_N: torch.Tensor | None,
    draw_1: torch.Tensor,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`y_TN`, `h_TR`). `first_RK` and `second_NR` are the parameters, there for their gradients; their values come from the copies."""
    inputs, outputs = x_TK.shape[1], wide_NKR.shape[0]
    h_TR, wide_TKR = down(x_TK, small_RK, draw_1, dropout, wide=outputs >= inputs)
    if wide_TKR is not None:
        return functional.linear(wide_TKR, wide_NKR, bias_N), h_TR
    return torch.addmm(functional.linear(x_TK, wide_NKR[:, :inputs], bias_N), h_TR, wide_NKR[:, inputs:].t()), h_TR


@triton_op("intervale::lora_linear_back", mutates_args={})
def _linear_back(
    grad_TN: torch.Tensor,
    x_TK: torch.Tensor,
    h_TR: torch.Tensor,
    wide_NKR: torch.Tensor,
    small_RK: torch.Tensor,
    draw_1: torch.Tensor,
    dropout: float,
    scale: float,
    want_input: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`dx_TK`, empty if it is not wanted, `da_RK`, `db_NR`), the latter two in float32."""
    inputs = x_TK.shape[1]
    if want_input:
        wide_TKR = grad_TN @ wide_NKR
        dx_TK, da_RK = back(x_TK, small_RK, wide_TKR[:, :inputs], wide_TKR[:, inputs:], draw_1, dropout)
    else:
        dx_TK, da_RK = back(x_TK, small_RK, None, grad_TN @ wide_NKR[:, inputs:], draw_1, dropout)
    return dx_TK, da_RK, (grad_TN.t() @ h_TR).float() * scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TK, _, _, wide_NKR, small_RK, _, draw_1, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(x_TK, output[1], wide_NKR, small_RK, draw_1)


def _grads(ctx: Any, grad_TN: torch.Tensor, unused: Any) -> tuple[Any, ...]:
    x_TK, h_TR, wide_NKR, small_RK, draw_1 = ctx.saved_tensors
    dx, da, db = torch.ops.intervale.lora_linear_back(
        grad_TN.contiguous(), x_TK, h_TR, wide_NKR, small_RK, draw_1, ctx.dropout, ctx.scale, ctx.needs_input_grad[0]
    )
    return dx if ctx.needs_input_grad[0] else None, da, db, None, None, None, None, None, None


_linear.register_autograd(_grads, setup_context=_keep)


class FastLoraLinear(Linear):
    """PEFT's layer with the fast pass while it trains; in every other state it is PEFT's own."""

    wide_NKR: torch.Tensor
    small_RK: torch.Tensor
    draw_1: torch.Tensor
    fast_dropout: float
    fast_scale: float

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's."""
        if not self.training or not torch.is_grad_enabled():
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        y_TN, _ = torch.ops.intervale.lora_linear(
            x.flatten(0, -2).to(self.wide_NKR.dtype),
            self.lora_A["default"].weight,
            self.lora_B["default"].weight,
            self.wide_NKR,
            self.small_RK,
            self.base_layer.bias,
            self.draw_1,
            self.fast_dropout,
            self.fast_scale,
        )
        return y_TN.view(*x.shape[:-1], -1)


class FastLora:
    """A network's fast layers: `refresh` after every change of the parameters, `draw` for every micro-batch's dropout masks."""

    def __init__(self, layers: list[FastLoraLinear], device: torch.device) -> None:
        self._draws_L = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self._first, self._second, self._small, self._slots, self._scales = [], [], [], [], []
        for layer, draw_1 in zip(layers, self._draws_L.split(1), strict=True):
            layer.register_buffer("draw_1", draw_1, persistent=False)
            self._first.append(layer.lora_A["default"].weight)
            self._second.append(layer.lora_B["default"].weight)
            self._small.append(layer.small_RK)
            self._slots.append(layer.wide_NKR[:, layer.in_features :])
            self._scales.append(layer.fast_scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters' values to where the products read them."""
        torch._foreach_copy_(self._small, [p.detach() for p in self._first])
        torch._foreach_copy_(self._slots, torch._foreach_mul([p.detach() for p in self._second], self._scales))

    def draw(self) -> None:
        """New masks, from torch's generator of the device."""
        self._draws_L.random_(0, 2**31)


def make_fast(network: torch.nn.Module) -> FastLora | None:
    """Let the LoRA layers that the kernels can serve take the fast pass, in place; None when there is none."""
    found = [_made_fast(module) for module in network.modules() if type(module) is Linear and _fits(module)]
    return FastLora(found, found[0].wide_NKR.device) if found else None


def _made_fast(layer: Any) -> FastLoraLinear:
    weight, rank = layer.base_layer.weight, layer.r["default"]
    outputs, inputs = weight.shape
    wide_NKR = weight.new_empty(outputs, inputs + rank)
    wide_NKR[:, :inputs] = weight.data
    weight.data = wide_NKR[:, :inputs]  # the frozen matrix lives in the buffer from now on
    layer.__class__ = FastLoraLinear
    layer.register_buffer("wide_NKR", wide_NKR, persistent=False)
    layer.register_buffer("small_RK", weight.new_empty(rank, inputs), persistent=False)
    layer.fast_dropout = float(getattr(layer.lora_dropout["default"], "p", 0.0))
    layer.fast_scale = float(layer.scaling["default"])
    fast: FastLoraLinear = layer
    return fast


def _fits(layer: Any) -> bool:
    """One plain adapter on a bfloat16 matrix on a GPU, whose sizes the kernels' blocks divide."""
    if list(layer.lora_A) != ["default"] or layer.lora_variant or layer.lora_bias["default"] or layer.merged:
        return False
    weight, rank = layer.base_layer.weight, layer.r["default"]
    sizes = 16 <= rank <= 256 and rank & (rank - 1) == 0 and weight.shape[1] % 128 == 0
    return weight.is_cuda and weight.dtype == torch.bfloat16 and not weight.requires_grad and sizes
