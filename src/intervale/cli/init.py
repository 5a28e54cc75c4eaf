"""`intervale init DST --preset NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intervale.cli.output import result
from intervale.core.lang import say


def init(
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    preset: Annotated[str, typer.Option(metavar="tiny|nano|internvl2-1b|internvl2-2b", help="The shapes.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.model or tokenizer.json (default: one token a byte).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same weights.")] = 0,
) -> None:
    """Write a randomly initialised model in the official format: for tests, benchmarks and pre-training."""
    from intervale.model.presets import init_model

    count = init_model(dst, preset, tokenizer, seed)
    result(say(f"wrote {dst}: {preset}, {count:,} random parameters", f"已写入 {dst}：{preset}，{count:,} 个随机参数"))
