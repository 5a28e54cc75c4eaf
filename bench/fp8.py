"""Would a frozen base in fp8 make a training step faster? The products of one decoder layer, bfloat16 against fp8, in turns.

python bench/fp8.py [--tokens 13568] [--rank 128] [--step-ms N] [--out FILE]

InternVL2-2B's shapes. bfloat16: [x | h] [W | B]^T and, on the way back, g [W | B], as `model.fast_lora` makes them. fp8: x and g are
scaled row by row and rounded to e4m3 (one compiled pass, shared by layers that read the same x), W likewise once, before the clock
starts; LoRA's B stays bfloat16 and is a product of its own. `--step-ms`: a whole step of that many tokens, for the share it would save.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from triton.testing import do_bench

LAYERS = 24
# name: (inputs, outputs, does it read an x that was rounded for the one before?)
MATRICES = {
    "q": (2048, 2048, False),
    "k": (2048, 1024, True),
    "v": (2048, 1024, True),
    "o": (2048, 2048, False),
    "gate": (2048, 8192, False),
    "up": (2048, 8192, True),
    "down": (8192, 2048, False),
}
FP8, MOST = torch.float8_e4m3fn, 448.0


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows in fp8, a scale a row)."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / MOST
    return (rows.float() / scale).to(FP8), scale


def _ms(function: Callable[[], object]) -> float:
    found: float = do_bench(function, warmup=10, rep=40)
    return found


def case(inputs: int, outputs: int, given: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the products of one matrix, both ways, and the relative error of the fp8 output."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    tokens, rank = given.tokens, given.rank
    x, g, h = draw(tokens, inputs), draw(tokens, outputs), draw(tokens, rank)
    wide = draw(outputs, inputs + rank) * inputs**-0.5
    w, b = wide[:, :inputs].contiguous(), wide[:, inputs:].contiguous()
    xh = torch.cat((x, h), 1)
    (w8, w_scale), (wt8, wt_scale) = _rounded(w), _rounded(w.t().contiguous())
    rounded = torch.compile(_rounded, dynamic=True)
    (x8, x_scale), (g8, g_scale) = rounded(x), rounded(g)

    def there() -> torch.Tensor:
        y = torch._scaled_mm(x8, w8.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.addmm_(h, b.t())

    def back() -> tuple[torch.Tensor, torch.Tensor]:
        return torch._scaled_mm(g8, wt8.t(), g_scale, wt_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True), g @ b

    exact = x.float() @ w.float().t() + h.float() @ b.float().t()
    return {
        "bf16 forward": _ms(lambda: xh @ wide.t()),
        "bf16 backward": _ms(lambda: g @ wide),
        "fp8 forward": _ms(there),
        "fp8 backward": _ms(back),
        "round x": _ms(lambda: rounded(x)),
        "round g": _ms(lambda: rounded(g)),
        "error": float((there().float() - exact).norm() / exact.norm()),
    }


def main() -> None:
    """Print a table, the sums of a step, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=13568)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--step-ms", type=float)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, bf16, fp8 = {}, 0.0, 0.0
    for name, (inputs, outputs, again) in MATRICES.items():
        row = rows[name] = case(inputs, outputs, given)
        bf16 += row["bf16 forward"] + row["bf16 backward"]
        fp8 += row["fp8 forward"] + row["fp8 backward"] + row["round g"] + (0.0 if again else row["round x"])
        print(f"{name:5}" + "".join(f"  {key} {value:7.3f}" for key, value in row.items()), flush=True)
    result = {"bench": "fp8", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": given.tokens, "matrices": rows}
    result |= {"bf16_ms": LAYERS * bf16, "fp8_ms": LAYERS * fp8, "saved_ms": LAYERS * (bf16 - fp8)}
    print(f"the products of {LAYERS} layers: bf16 {result['bf16_ms']:.1f} ms, fp8 {result['fp8_ms']:.1f} ms")
    if given.step_ms:
        result |= {"step_ms": given.step_ms, "speedup": given.step_ms / (given.step_ms - result["saved_ms"])}
        print(f"of a step of {given.step_ms} ms: {result['speedup']:.3f} times as fast")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
