"""LoRA at the price of its arithmetic on a GPU: PEFT's layers keep their parameters and their files, only their training pass changes.

Promises: the same function and, with dropout, the same distribution as PEFT's layers, each with a mask of its own. Layers that read the
same x (query, key and value; gate and up) are one product: their frozen matrices and their B stand in one buffer,

    [ Wq  Bq  0   0  ]
    [ Wk  0   Bk  0  ]
    [ Wv  0   0   Bv ],   and [x | hq | hk | hv] with h = scale * dropout(x) A^T is its other side,

and one product with that buffer gives all their gradients on the way back. Cost: bfloat16 copies of A and B, made anew for every step,
and the products with 0 (with InternVL2-2B, rank 128 and 3,400 tokens 6% of a step's multiplications, counted). Legend: T tokens, K inputs, N outputs, R rank, G layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.library import triton_op
from torch.nn import functional

from intervale.model.lora_kernels import back, build, down

_MOST_RANKS = 384  # of layers that are served at once: what a multiprocessor's registers hold


@triton_op("intervale::lora_linear", mutates_args={})
def _linear(
    x_TK: torch.Tensor,
    seconds: Sequence[torch.Tensor],
    firsts: Sequence[torch.Tensor],
    wide_NKR: torch.Tensor,
    small_GRK: torch.Tensor,
    bias_N: torch.Tensor | None,
    draws_G: torch.Tensor,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`y_TN`, `h_TGR`). `firsts` (A) and `seconds` (B) are the parameters, there for their gradients; their values come from the copies."""
    inputs, outputs = x_TK.shape[1], wide_NKR.shape[0]
    h_TGR, wide_TKR = down(x_TK, small_GRK, draws_G, dropout, scale, wide=outputs >= inputs)
    if wide_TKR is not None:
        return functional.linear(wide_TKR, wide_NKR, bias_N), h_TGR
    return torch.addmm(functional.linear(x_TK, wide_NKR[:, :inputs], bias_N), h_TGR, wide_NKR[:, inputs:].t()), h_TGR


@triton_op("intervale::lora_linear_back", mutates_args={})
def _linear_back(
    grad_TN: torch.Tensor,
    x_TK: torch.Tensor,
    h_TGR: torch.Tensor,
    wide_NKR: torch.Tensor,
    small_GRK: torch.Tensor,
    draws_G: torch.Tensor,
    dropout: float,
    scale: float,
    want_input: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`dx_TK`, empty if it is not wanted, `da_GRK` in float32, `db_NGR`: of each layer's outputs with every layer's h)."""
    inputs = x_TK.shape[1]
    if want_input:
        wide_TKR = grad_TN @ wide_NKR
        dx_TK, da_GRK = back(x_TK, small_GRK, wide_TKR[:, :inputs], wide_TKR[:, inputs:], draws_G, dropout, scale)
    else:
        dx_TK, da_GRK = back(x_TK, small_GRK, None, grad_TN @ wide_NKR[:, inputs:], draws_G, dropout, scale)
    return dx_TK, da_GRK, grad_TN.t() @ h_TGR


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TK, seconds, _, wide_NKR, small_GRK, _, draws_G, ctx.dropout, ctx.scale = inputs
    ctx.outputs = [len(second) for second in seconds]
    ctx.save_for_backward(x_TK, output[1], wide_NKR, small_GRK, draws_G)


def _grads(ctx: Any, grad_TN: torch.Tensor, unused: Any) -> tuple[Any, ...]:
    x_TK, h_TGR, wide_NKR, small_GRK, draws_G = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    dx, da, db = torch.ops.intervale.lora_linear_back(
        grad_TN.contiguous(), x_TK, h_TGR, wide_NKR, small_GRK, draws_G, ctx.dropout, ctx.scale, wanted
    )
    rank = len(small_GRK) // len(ctx.outputs)
    blocks = enumerate(db.split(ctx.outputs))
    seconds = [rows[:, at * rank : (at + 1) * rank].float() for at, rows in blocks]
    return dx if wanted else None, seconds, list(da.split(rank)), None, None, None, None, None, None


_linear.register_autograd(_grads, setup_context=_keep)


class Together(torch.nn.Module):
    """LoRA layers that read the same x, as one. It holds their frozen matrices; the parameters stay theirs."""

    wide_NKR: torch.Tensor
    small_GRK: torch.Tensor
    draws_G: torch.Tensor
    bias_N: torch.Tensor | None

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        first = layers[0].base_layer.weight
        inputs, rank = first.shape[1], layers[0].r["default"]
        self.outputs = [layer.base_layer.weight.shape[0] for layer in layers]
        self.dropout = float(getattr(layers[0].lora_dropout["default"], "p", 0.0))
        self.scale = float(layers[0].scaling["default"])
        wide_NKR = first.new_zeros(sum(self.outputs), inputs + len(layers) * rank)
        for layer, rows_NKR in zip(layers, wide_NKR.split(self.outputs), strict=True):
            rows_NKR[:, :inputs] = layer.base_layer.weight.data
            layer.base_layer.weight.data = rows_NKR[:, :inputs]  # the frozen matrix lives in the buffer from now on
        biases = [layer.base_layer.bias for layer in layers]
        self.register_buffer("wide_NKR", wide_NKR, persistent=False)
        self.register_buffer("small_GRK", first.new_zeros(len(layers) * rank, inputs), persistent=False)
        self.register_buffer("draws_G", torch.zeros(len(layers), dtype=torch.int64, device=first.device), persistent=False)
        self.register_buffer("bias_N", None if biases[0] is None else torch.cat([bias.data for bias in biases]), persistent=False)
        self.firsts = [layer.lora_A["default"].weight for layer in layers]
        self.seconds = [layer.lora_B["default"].weight for layer in layers]

    def copies(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(where the products read it, the parameter) of every A and B. The parameter itself: DeepSpeed gives it another memory."""
        rank, inputs = len(self.firsts[0]), self.firsts[0].shape[1]
        for at, rows_NKR in enumerate(self.wide_NKR.split(self.outputs)):
            yield self.small_GRK[at * rank : (at + 1) * rank], self.firsts[at]
            yield rows_NKR[:, inputs + at * rank : inputs + (at + 1) * rank], self.seconds[at]

    def sizes(self) -> tuple[Any, ...]:
        """What its kernels are built for, as `lora_kernels.build` takes it."""
        layers, inputs = len(self.outputs), self.small_GRK.shape[1]
        return inputs, len(self.firsts[0]), layers, sum(self.outputs) >= inputs, self.dropout, self.scale, self.wide_NKR.dtype

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every layer's output for x of any leading shape."""
        y_TN, _ = torch.ops.intervale.lora_linear(
            x.flatten(0, -2).to(self.wide_NKR.dtype),
            self.seconds,
            self.firsts,
            self.wide_NKR,
            self.small_GRK,
            self.bias_N,
            self.draws_G,
            self.dropout,
            self.scale,
        )
        return tuple(y_TN.view(*x.shape[:-1], -1).split(self.outputs, dim=-1))


class FastLoraLinear(Linear):
    """PEFT's layer with the fast pass while it trains; in every other state it is PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's."""
        if not self.training or not torch.is_grad_enabled():
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        (y,) = self.together(x)
        return y


class FastLora:
    """A network's fast layers: `refresh` after every change of the parameters, `draw` for every micro-batch's dropout masks."""

    def __init__(self, found: Sequence[Together]) -> None:
        copies = [copy for together in found for copy in together.copies()]
        # Those of A lie as their parameters do, and torch copies all such at once; one that does not makes it copy one by one.
        self._copies = [[copy for copy in copies if copy[0].is_contiguous() is alike] for alike in (True, False)]
        self._draws = torch.zeros(sum(len(one.outputs) for one in found), dtype=torch.int64, device=found[0].draws_G.device)
        for together, own in zip(found, self._draws.split([len(one.outputs) for one in found]), strict=True):
            together.draws_G = own
        self._sizes = {together.sizes() for together in found}

    def builds(self) -> list[Callable[[], None]]:
        """What builds its kernels ahead of the first pass, for the current GPU; each may run in a thread or a process of its own."""
        return [partial(build, *sizes) for sizes in self._sizes]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters' values to where the products read them."""
        for copies in self._copies:
            if copies:
                torch._foreach_copy_([place for place, _ in copies], [parameter for _, parameter in copies])

    def draw(self) -> None:
        """New masks, from torch's generator of the device."""
        self._draws.random_(0, 2**31)


def make_fast(network: torch.nn.Module, walked: torch.nn.Module | None = None) -> FastLora | None:
    """Let the LoRA layers that the kernels can serve take the fast pass, in place; None when there is none.

    Query, key and value of an attention and gate and up of an MLP get a `together` on their parent, which `model.decoder` calls, in
    `walked` (the language model; None: everywhere); every other layer has one of its own.
    """
    found: list[Together] = []
    for parent in list((walked or network).modules()):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(layer) is Linear and _fits(layer) for layer in layers) and _alike(layers):
                found.append(Together(layers))
                parent.together = found[-1]
                for layer in layers:
                    layer.served = True  # not once more below
    for layer in list(network.modules()):
        if type(layer) is Linear and _fits(layer) and not hasattr(layer, "served"):
            found.append(Together([layer]))
            layer.together = found[-1]
            layer.__class__ = FastLoraLinear
    return FastLora(found) if found else None


def _fits(layer: Any) -> bool:
    """One plain adapter on a bfloat16 matrix on a GPU, whose sizes the kernels' blocks divide."""
    if list(layer.lora_A) != ["default"] or layer.lora_variant or layer.lora_bias["default"] or layer.merged:
        return False
    weight, rank = layer.base_layer.weight, layer.r["default"]
    sizes = 16 <= rank <= 256 and rank & (rank - 1) == 0 and weight.shape[1] % 128 == 0
    return weight.is_cuda and weight.dtype == torch.bfloat16 and not weight.requires_grad and sizes


def _alike(layers: Sequence[Any]) -> bool:
    """The same inputs, rank, scale and dropout, biases everywhere or nowhere, and few enough ranks."""
    told = {
        (
            layer.base_layer.weight.shape[1],
            layer.r["default"],
            layer.scaling["default"],
            getattr(layer.lora_dropout["default"], "p", 0.0),
            layer.base_layer.bias is None,
        )
        for layer in layers
    }
    return len(told) == 1 and len(layers) * layers[0].r["default"] <= _MOST_RANKS
