"""`intervale import-checkpoint iter_640.pth OUT --base MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intervale.cli.output import note, result
from intervale.core.lang import say


def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(metavar="ITER.pth", help="A checkpoint of an XTuner InternVL run; read in a sandbox, tensors only.")
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; it must not exist yet.")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="The model it was trained from (default: what its config names).")] = "",
    config: Annotated[Path | None, typer.Option(help="Its XTuner config, for lora_alpha (default: the one inside the file).")] = None,
    alpha: Annotated[float | None, typer.Option(min=0.0, help="lora_alpha, where no config tells.")] = None,
) -> None:
    """Turn an XTuner .pth into an adapter and projector that `export`, `evaluate` and `chat` take."""
    from intervale.model.load import resolve_model
    from intervale.train.xtuner_checkpoint import import_checkpoint as run

    done = run(file, resolve_model(base) if base else None, out, alpha=alpha, config=config, tell=note)
    result(
        say(
            f"wrote {out}: LoRA of rank {done.rank}, alpha {done.alpha:g} on {done.lora_layers} layers, {done.trained} trained tensors, "
            f"on {done.base} (XTuner's iteration {done.iteration})",
            f"已写入 {out}：LoRA 秩 {done.rank}，alpha {done.alpha:g}，{done.lora_layers} 层；{done.trained} 个训练过的张量；"
            f"基座 {done.base}（XTuner 第 {done.iteration} 次迭代）",
        )
    )
    result(f"  intervale export {out} DIR --format official")
