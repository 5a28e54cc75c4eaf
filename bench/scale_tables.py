"""The tables of docs/scale.md from a result of data_scale.py: `python bench/scale_tables.py bench/results/data_scale-....json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PLANNED = 10_000_000
ROW_BYTES, ORDER_BYTES = 44, 8  # of an index (docs/scale.md), of an epoch's order


def tables(found: dict[str, Any]) -> dict[str, str]:
    """What stands at @ROWS@, @COSTS@, @PLAN@ and @LOADS@."""
    rows = [
        f"| {row['items']:,} | {row['file_bytes'] / 2**20:,.0f} MiB | {row['index_s']:.1f} s | {row['index_items_s']:,} | {row['index_peak_gib']:.2f} GiB "
        f"| {row['first_step_s']:.1f} s | {row['train_peak_gib']:.2f} GiB |"
        for row in found["sizes"]
    ]
    costs = found["costs"]
    names = {"records": "items read", "measured": "items measured (tokens, header)", "loaded": "items loaded (decoded, tiled, tokenised)"}
    each = [f"| {text} | {costs[f'jsonl_{key}_s']:,.0f} | {costs[f'tar_{key}_s']:,.0f} |" for key, text in names.items()]
    last = found["sizes"][-1]
    share = PLANNED / last["items"]
    loads = costs["tar_loaded_s"]
    plan = [
        f"- Index: {last['index_s'] * share:,.0f} s on {found['cores']} such cores, {PLANNED * ROW_BYTES / 2**20:,.0f} MiB on the disk, once a file.",
        f"- Order: {costs['order_10m_s']:.1f} s and {PLANNED * ORDER_BYTES / 2**20:,.0f} MiB of memory at the beginning of an epoch.",
        f"- Measuring every item would take {PLANNED / costs['tar_measured_s'] / 3600:.1f} core hours, which is why a sample is measured.",
        f"- Loading: {PLANNED / loads / 3600:.1f} core hours an epoch.",
    ]
    return {
        "ROWS": "\n".join(rows),
        "COSTS": "\n".join(each),
        "PLAN": "\n".join(plan),
        "LOADS": f"{loads:,.0f} items a second and core here.",
    }


if __name__ == "__main__":
    result = json.loads(Path(sys.argv[1]).read_text())
    for name, text in tables(result).items():
        print(f"{name}:\n{text}\n")
