"""How much faster is the fused AdamW than the default one here? Ratio of median step times, both in this process.

python bench/adamw.py
"""

import json
import statistics
import time

import torch

SHAPES = [(92553, 256)] * 2  # the embedding and the head of `nano` with the InternLM2 vocabulary: 47 M parameters
ROUNDS = 5


def step_seconds(fused: bool) -> float:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
    optimizer.step()
    begun = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begun


if __name__ == "__main__":
    default, fused = (statistics.median(step_seconds(kind) for _ in range(ROUNDS)) for kind in (False, True))
    print(json.dumps({"device": "cpu", "torch": torch.__version__, "default_s": default, "fused_s": fused, "ratio": default / fused}))
