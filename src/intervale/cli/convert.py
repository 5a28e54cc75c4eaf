"""`intervale convert SRC DST --to hf|official`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intervale.cli.output import result
from intervale.core.lang import say


def convert(
    src: Annotated[str, typer.Argument(help="A model folder in either format, or a hub id.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    to: Annotated[Literal["hf", "official"], typer.Option(help="The format to write.")],
    image_token_id: Annotated[
        int | None, typer.Option(min=0, help="The id of <IMG_CONTEXT>, for a folder without tokenizer files.")
    ] = None,
) -> None:
    """Rewrite a model in the other format, tensor by tensor: total, strict, and exact both ways."""
    from intervale.model.convert import convert as run
    from intervale.model.load import resolve_model

    run(resolve_model(src), dst, to, image_token_id=image_token_id)
    result(say(f"wrote {dst} in the {to} format", f"已写入 {dst}（{to} 格式）"))
