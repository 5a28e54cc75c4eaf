"""Round a model's matrices to fewer bits, still stored as bfloat16: the file compresses better, in the repository and in the wheel.

    python assets/round_weights.py IN.safetensors OUT.safetensors --bits 4

A bfloat16 has 7 bits behind its leading one; `--bits` of them stay (to nearest, ties to even). Vectors stay as they are. Needs torch.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_HELD = 7  # bfloat16's stored mantissa bits


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """The tensor in bfloat16 with `bits` mantissa bits."""
    raw = tensor.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    drop = _HELD - bits
    half = (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return (((raw + half) >> drop) << drop).to(torch.int16).view(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=range(1, _HELD))
    asked = parser.parse_args()
    with safe_open(asked.source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    kept = {name: rounded(tensor, asked.bits) if tensor.dim() >= 2 else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(kept, asked.target, metadata)
    data = asked.target.read_bytes()
    print(f"{asked.target}: {len(data):,} bytes, {len(zlib.compress(data)):,} compressed")


if __name__ == "__main__":
    main()
