"""`intervale chat MODEL [-i IMAGE ...] ["question"]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intervale.cli.output import note
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.engine.api import ChatTurn, Engine, Sampling

_COMMANDS = ("/image", "/clear", "/exit", "/quit")


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id; with --base-url: a model's name there.")],
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
    base_url: Annotated[
        str | None, typer.Option(help="Ask an OpenAI-compatible server, like http://127.0.0.1:8000/v1; its key: INTERVALE_REMOTE_KEY.")
    ] = None,
) -> None:
    """Ask a model about pictures; the answer appears as it is made."""
    from intervale.data.images import load_picture
    from intervale.engine.api import Sampling

    pictures = [load_picture(path) for path in image or []]
    engine = _engine(model, device, max_tiles, base_url)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if question is not None:
        _ask(engine, [], question, pictures, sampling)
        return
    _converse(engine, pictures, sampling)


def _engine(model: str, device: str | None, max_tiles: int | None, base_url: str | None) -> Engine:
    """The model in this process, or the server at `base_url`."""
    from intervale.core.errors import UserError

    if base_url is not None:
        from intervale.engine.remote import RemoteEngine

        if device is not None or max_tiles is not None:
            raise UserError("--device and --max-tiles belong to a model in this process", "leave them out with --base-url")
        return RemoteEngine(base_url, (model,), os.environ.get("INTERVALE_REMOTE_KEY", ""))
    from intervale.engine.desks import CPU_TILES, default_tiles
    from intervale.engine.local import LocalEngine
    from intervale.model.load import load_model

    if max_tiles is None and (max_tiles := default_tiles(model, device)) is not None:
        note(
            say(
                f"on the CPU a picture is cut into at most {CPU_TILES} tiles; --max-tiles changes that",
                f"CPU 上每张图最多切 {CPU_TILES} 块；可用 --max-tiles 修改",
            )
        )
    return LocalEngine(load_model(model, device=device, max_tiles=max_tiles))


def _ask(engine: Engine, turns: list[ChatTurn], question: str, pictures: list, sampling: Sampling) -> list[ChatTurn]:
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


def _converse(engine: Engine, pictures: list, sampling: Sampling) -> None:
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
