"""`intervale doctor`: what this machine can do, what is missing, how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from intervale.cli.output import emit_json, result
from intervale.core.lang import say

GIB = 1 << 30
_LOW_DISK = 20 * GIB  # a 2B model, its export and a few checkpoints


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Report Python, torch, GPU, engines, disk, and what to do about what is missing."""
    found = examine()
    if as_json:
        emit_json(found)
        return
    for name, entry in found["facts"].items():
        result(f"{name:>14}  {entry}")
    for line in found["advice"]:
        result(f"  - {line}")
    if not found["advice"]:
        result(say("nothing is missing", "一切就绪"))


def examine() -> dict[str, Any]:
    """{'facts': {...}, 'advice': [...]} of this machine."""
    import torch

    from intervale.core.runlog import versions

    advice: list[str] = []
    facts: dict[str, Any] = dict(versions())
    facts["cpu"] = f"{os.cpu_count()} cores, {platform.machine()}, bfloat16 {'fast' if _fast_bf16() else 'slow'}"
    facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
    facts["gpu"] = _gpu(torch, advice)
    facts["disk"] = _disk(advice)
    facts["hub"] = f"{os.environ.get('HF_ENDPOINT', 'huggingface.co')}{' (offline)' if os.environ.get('HF_HUB_OFFLINE') else ''}"
    facts |= _engines(advice)
    return {"facts": facts, "advice": advice}


def _fast_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") or "amx_bf16" in Path("/proc/cpuinfo").read_text(
            encoding="utf-8"
        )
    except OSError:
        return False


def _gpu(torch: Any, advice: list[str]) -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in names)
    if shutil.which("nvidia-smi"):
        advice.append(
            say(
                f"there is an NVIDIA driver, but this torch ({torch.__version__}) cannot use it: pip install --force-reinstall torch, matching its CUDA",
                f"有 NVIDIA 驱动，但当前 torch（{torch.__version__}）无法使用：请安装与 CUDA 匹配的 torch",
            )
        )
    else:
        advice.append(
            say(
                "no GPU: small models train here in minutes, InternVL2-2B answers slowly and needs a GPU to train",
                "没有 GPU：小模型可在此训练，InternVL2-2B 训练需要 GPU",
            )
        )
    return "none"


def _disk(advice: list[str]) -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < _LOW_DISK:
        advice.append(
            say(
                f"{free / GIB:.0f} GiB free here; a 2B run with exports takes about 20",
                f"此处剩余 {free / GIB:.0f} GiB；2B 训练与导出约需 20 GiB",
            )
        )
    return f"{free / GIB:.1f} GiB free in {Path.cwd()}"


def _engines(advice: list[str]) -> dict[str, str]:
    """The serving engines within reach; each lives in its own environment, because their pins conflict with ours."""
    facts = {"engine local": "transformers, in this environment"}
    for name in ("lmdeploy", "vllm"):
        here = importlib.util.find_spec(name) is not None
        command = shutil.which(name)
        facts[f"engine {name}"] = "in this environment" if here else command or "not found"
        if not here and not command:
            advice.append(
                say(
                    f"{name} (faster serving on GPUs) is not on PATH: {Path(sys.executable).name} -m venv ~/.{name} && ~/.{name}/bin/pip install {name}; serve --engine-python ~/.{name}/bin/python finds it",
                    f"未找到 {name}（GPU 上更快的推理）：{Path(sys.executable).name} -m venv ~/.{name} && ~/.{name}/bin/pip install {name}；用 serve --engine-python ~/.{name}/bin/python 指定",
                )
            )
    return facts
