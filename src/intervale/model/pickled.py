"""Tensors of a pickled file, read where it can do no harm: another process, tensors only, limited in memory and time.

A pickle is a program. This process never opens one: `pickled_child.py` does, isolated (no environment, no intervale), with
torch's `weights_only` unpickler, and hands back safetensors. Cost: a start of Python and torch, and one copy of the tensors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import MIB, need_space, read_object
from intervale.model import pickled_child

_MEMORY = 512 * MIB  # beside the file's own bytes: torch's buffers and the objects that name the tensors
_COPIES = 4  # of the file's bytes: as read, as cloned, as written, and some to spare
_SECONDS, _BYTES_A_SECOND = 60, 20 * MIB  # a slow disk reads more than this
_FIX = "take the file from whoever trained it, as XTuner wrote it (iter_N.pth); do not open it elsewhere"


@dataclass(frozen=True)
class Pickled:
    """What came out: the tensors' file, and of the checkpoint's own facts cfg (text), iter, epoch, seed where it had them."""

    tensors: Path
    facts: dict[str, Any]


def read_pickled(path: Path, out: Path, *, memory: int | None = None, seconds: int | None = None) -> Pickled:
    """Read `path` in the sandbox into the empty folder `out`. `memory` bytes and `seconds` replace limits that follow from its size.

    Raises: UserError for a missing, hostile, damaged or foreign file, and when a limit was reached.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: DeepSpeed's own form of a checkpoint",
            "name the mp_rank_00_model_states.pt in it (ZeRO-1 and -2), or let XTuner write one file first (pth_to_hf, zero_to_fp32)",
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file", "name the .pth file that XTuner wrote")
    size = path.stat().st_size
    need_space(out, 2 * size)
    memory, seconds = memory or _COPIES * size + _MEMORY, seconds or _SECONDS + size // _BYTES_A_SECOND
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    command = [sys.executable, "-I", pickled_child.__file__, str(path.resolve()), str(out.resolve()), str(memory), str(seconds)]
    try:
        done = subprocess.run(
            command,
            cwd=out,
            env=keep | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(out)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds + _SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{path}: reading it took longer than {seconds} s and was stopped", _FIX) from error
    if done.returncode != 0:
        raise UserError(f"{path}: {_why(done, seconds)}", _FIX)
    return Pickled(out / "tensors.safetensors", read_object(out / "meta.json"))


def _why(done: subprocess.CompletedProcess[bytes], seconds: int) -> str:
    if done.returncode == -signal.SIGXCPU or done.returncode == -signal.SIGKILL:
        return f"reading it was stopped (more than {seconds} s of processor time, or too much memory)"
    try:
        return str(json.loads(done.stdout.decode().strip().splitlines()[-1])["what"])[:500]
    except (ValueError, IndexError, KeyError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"it could not be read ({last[0][:200] if last else f'exit code {done.returncode}'})"
