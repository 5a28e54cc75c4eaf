"""`intervale import-xtuner CONFIG.py OUT.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intervale.cli.output import note, result, safe
from intervale.core.errors import UserError
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.train.xtuner import Imported


def import_xtuner(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.py", help="An XTuner config of an InternVL fine-tune; read as data, never executed.")
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT.yaml", help="The recipe to write (default: to stdout).")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The same as OUT.yaml.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder the data will be prepared into (default: data/NAME).")] = None,
) -> None:
    """Turn an XTuner config into a recipe; says what differs, what has no counterpart and what was not read."""
    if out is not None and output is not None:
        raise UserError("OUT.yaml is given twice", "give it once")
    target = out or output
    from intervale.core.files import refuse_existing, write_atomic
    from intervale.core.pyconfig import read_pyconfig
    from intervale.train.xtuner import import_config, to_yaml

    if target is not None:
        refuse_existing(target)
    imported = import_config(read_pyconfig(config), data or Path("data") / config.stem)
    text = to_yaml(imported)
    if target is None:
        result(text.rstrip("\n"))
    else:
        write_atomic(target, text)
        result(say(f"wrote {target} ({len(imported.values)} values)", f"已写入 {target}（{len(imported.values)} 个值）"))
    for line in _report(imported):
        (note if target is None else result)(safe(line))


def _report(imported: Imported) -> list[str]:
    titles = (
        (imported.different, "where the defaults differ:", "默认行为的不同："),
        (imported.missing, "what has no counterpart:", "没有对应的内容："),
        (imported.unread, "what was not read, and is NOT in the recipe:", "未读取、因而不在配方中的内容："),
    )
    lines = []
    for notes, english, chinese in titles:
        if notes:
            lines.append(say(english, chinese))
            lines += [f"  {imported.where}{f':{entry.line}' if entry.line else ''}: {entry.text}" for entry in notes]
    lines.append(say("next:", "接下来："))
    return lines + [f"  {command}" for command in imported.prepare]
