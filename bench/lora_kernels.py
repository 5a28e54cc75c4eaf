"""Which block sizes make the fused LoRA kernels fastest on this GPU?

python bench/lora_kernels.py [--tokens 13568] [--rank 128] [--dropout 0.05]

Every size of a small grid, for matrices of 2,048 and 8,192 inputs; the last line is JSON with the fastest of each.
"""

import argparse
import itertools
import json

import torch
from triton.testing import do_bench

from intervale.model import lora_kernels


def times(inputs: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{kernel: {block sizes: microseconds}}."""
    x, wide = (torch.randn(given.tokens, width, device="cuda", dtype=torch.bfloat16) for width in (inputs, inputs + given.rank))
    a, draw = torch.randn(given.rank, inputs, device="cuda", dtype=torch.bfloat16), torch.tensor([5], device="cuda")
    found: dict[str, dict[str, float]] = {"down": {}, "back": {}}
    for rows, columns, stages in itertools.product((32, 64, 128), (64, 128), (2, 3)):
        if rows * columns > 8192:
            continue
        name = f"{rows} x {columns}, {stages} stages"
        lora_kernels._ROWS, lora_kernels._COLUMNS, lora_kernels._STAGES = rows, columns, stages
        lora_kernels._BACK_ROWS, lora_kernels._BACK_COLUMNS, lora_kernels._BACK_STAGES = rows, columns, stages
        found["down"][name] = 1e3 * do_bench(lambda: lora_kernels.down(x, a, draw, given.dropout, 2.0, inputs < 4096), warmup=5, rep=20)
        found["back"][name] = 1e3 * do_bench(
            lambda: lora_kernels.back(x, a, wide[:, :inputs], wide[:, inputs:], draw, given.dropout, 2.0), warmup=5, rep=20
        )
    return found


def main() -> None:
    """Print every time and, last, the fastest as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=13568)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.05)
    given = parser.parse_args()
    best = {}
    for inputs in (2048, 8192):
        for kernel, sizes in times(inputs, given).items():
            for name, microseconds in sorted(sizes.items(), key=lambda one: one[1]):
                print(f"{kernel:4} {inputs:5} inputs  {name:20} {microseconds:7.1f} us")
            best[f"{kernel} {inputs}"] = min(sizes.items(), key=lambda one: one[1])
    print(json.dumps({"bench": "lora_kernels", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "fastest": best}))


if __name__ == "__main__":
    main()
