"""`intervale chat MODEL [-i IMAGE ...] ["question"]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intervale.cli.output import note
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.engine.api import ChatTurn, Sampling
    from intervale.engine.local import LocalEngine

_COMMANDS = ("/image", "/clear", "/exit", "/quit")
_CPU_TILES = 4  # a 448-pixel tile takes about 4 s on two cores


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id.")],
    question: Annotated[str | None, typer.Argument(help="Asked once; without it the chat is interactive.")] = None,
    image: Annotated[list[Path] | None, typer.Option("-i", "--image", help="A picture to talk about. Repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among the most likely tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same answer.")] = None,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Tiles a picture (default: the model's; at most 4 on a CPU for 448-pixel tiles).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda when there is one).")] = None,
) -> None:
    """Ask a model about pictures; the answer appears as it is made."""
    from intervale.data.images import load_picture
    from intervale.engine.api import Sampling
    from intervale.engine.local import LocalEngine
    from intervale.model.load import as_device, load_model, load_text_side

    pictures = [load_picture(path) for path in image or []]
    tiling = load_text_side(model).tiling
    if max_tiles is None and as_device(device).type == "cpu" and tiling.tile_size >= 448 and tiling.max_tiles > _CPU_TILES:
        max_tiles = _CPU_TILES
        note(
            say(
                f"on the CPU a picture is cut into at most {_CPU_TILES} tiles; --max-tiles changes that",
                f"CPU 上每张图最多切 {_CPU_TILES} 块；可用 --max-tiles 修改",
            )
        )
    engine = LocalEngine(load_model(model, device=device, max_tiles=max_tiles))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if question is not None:
        _ask(engine, [], question, pictures, sampling)
        return
    _converse(engine, pictures, sampling)


def _ask(engine: LocalEngine, turns: list[ChatTurn], question: str, pictures: list, sampling: Sampling) -> list[ChatTurn]:
    """Stream one answer to stdout; returns the conversation with it."""
    from intervale.engine.api import ChatTurn, Request

    # The official form: every picture, a line break after each, then the question.
    parts = [part for picture in pictures for part in (picture, "\n")] + [question]
    asked = [*turns, ChatTurn("user", tuple(parts))]
    text, finish = "", ""
    for delta in engine.stream(Request(tuple(asked), sampling)):
        text += delta.text
        finish = delta.finish
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if finish == "length":
        note(say("(cut at the token limit; --max-new-tokens raises it)", "（已达长度上限；可用 --max-new-tokens 提高）"))
    return [*asked, ChatTurn("assistant", (text,))]


def _converse(engine: LocalEngine, pictures: list, sampling: Sampling) -> None:
    from intervale.core.errors import UserError
    from intervale.data.images import load_picture

    note(
        say(
            "type a question; /image PATH adds a picture to it, /clear starts over, /exit or Ctrl-D ends",
            "输入问题；/image 路径 添加图片，/clear 重新开始，/exit 或 Ctrl-D 结束",
        )
    )
    turns: list[ChatTurn] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line.startswith("/") and line.split()[0] not in _COMMANDS:
            note(say(f"commands: {', '.join(_COMMANDS)}", f"可用命令：{'、'.join(_COMMANDS)}"))
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            turns, pictures = [], []
            continue
        try:
            if line.startswith("/image "):
                pictures.append(load_picture(Path(line.removeprefix("/image ").strip()).expanduser()))
                note(say(f"{len(pictures)} picture(s) go with the next question", f"{len(pictures)} 张图片将随下一个问题发送"))
            elif line:
                turns = _ask(engine, turns, line, pictures, sampling)
                pictures = []
        except UserError as error:  # one bad picture or question does not end the conversation
            note(str(error))
        except KeyboardInterrupt:
            note(say("(stopped)", "（已停止）"))
