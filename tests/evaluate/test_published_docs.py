"""The tables of published results in the docs are what the benchmark script prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import intervale

ROOT = Path(__file__).parents[2]


def test_the_docs_hold_every_line_that_the_script_prints() -> None:
    paths = os.pathsep.join([str(Path(intervale.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench" / "foodieqa_published.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}).stdout
    lines = [line for line in printed.splitlines() if line]
    assert len(lines) > 45
    told = (ROOT / "docs" / "evaluate.md").read_text()
    assert [line for line in lines if line not in told] == []
