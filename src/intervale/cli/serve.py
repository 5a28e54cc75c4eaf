"""`intervale serve MODEL`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from intervale.cli.output import note, result
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.engine.api import Desk


def serve(
    model: Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id; with --engine remote: a model's name there.")],
    base: Annotated[
        str | None, typer.Option(help="A second model beside it, to compare. A training run brings its own base along by itself.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A training run on MODEL: both answer, from one copy of the weights.")] = None,
    engine: Annotated[
        Literal["local", "remote"], typer.Option(help="local: in this process; remote: another OpenAI-compatible server.")
    ] = "local",
    base_url: Annotated[
        str | None, typer.Option(help="The other server, like http://127.0.0.1:23333/v1; its key is taken from INTERVALE_REMOTE_KEY.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen. Anything but this machine needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="One API key a line; INTERVALE_API_KEYS (with commas) adds to them.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name this server answers to (behind a proxy). Repeatable.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen to the network without a key.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda when there is one).")] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Tiles a picture (default: the model's; at most 4 on a CPU for 448-pixel tiles).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer anybody may ask for.")] = 4096,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are sent away with 429.")] = 128,
    remote_images: Annotated[bool, typer.Option("--remote-images", help="Fetch pictures from public web addresses too.")] = False,
) -> None:
    """Answer over HTTP: OpenAI's API on one port, for this machine unless told otherwise."""
    from intervale.serve.app import Serving, create_app, door_rules, open_port, run
    from intervale.serve.door import read_keys
    from intervale.serve.limits import Limits
    from intervale.serve.media import MediaLimits

    keys = read_keys(api_key_file, os.environ.get("INTERVALE_API_KEYS", ""))
    limits = Limits(new_tokens=max_new_tokens, default_new_tokens=min(512, max_new_tokens))
    serving = Serving(door_rules(host, keys, tuple(allow_host or ()), limits, insecure=insecure), MediaLimits(remote=remote_images))
    sock = open_port(host, port)
    if engine == "remote":
        desk = _remote(model, base, base_url, queue)
    else:
        desk = _local(model, base, adapter, base_url, device, precision, max_tiles, queue)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{sock.getsockname()[1]}"

    def ready() -> None:
        names = ", ".join(desk.models)
        result(
            say(
                f"serving {names} at {address}  (API: {address}/v1; Ctrl-C ends)",
                f"{names} 已就绪：{address}（API：{address}/v1；Ctrl-C 结束）",
            )
        )

    try:
        run(create_app(desk, serving), sock, ready)
    finally:
        desk.close()


def _local(
    model: str,
    base: str | None,
    adapter: str | None,
    base_url: str | None,
    device: str | None,
    precision: str,
    max_tiles: int | None,
    queue: int,
) -> Desk:
    from intervale.core.errors import UserError
    from intervale.engine.desks import CPU_TILES, default_tiles, local_desk

    if base_url is not None:
        raise UserError("--base-url without --engine remote", "add --engine remote, or leave --base-url out")
    if max_tiles is None and (max_tiles := default_tiles(adapter or model, device)) is not None:
        note(
            say(
                f"on the CPU a picture is cut into at most {CPU_TILES} tiles; --max-tiles changes that",
                f"CPU 上每张图最多切 {CPU_TILES} 块；可用 --max-tiles 修改",
            )
        )
    dtype = None if precision == "auto" else precision
    return local_desk(model, base, adapter, device=device, dtype=dtype, max_tiles=max_tiles, waiting=queue)


def _remote(model: str, base: str | None, base_url: str | None, queue: int) -> Desk:
    from intervale.core.errors import UserError
    from intervale.engine.remote import RemoteEngine

    if base_url is None:
        raise UserError("--engine remote needs --base-url", "give the other server's address, like http://127.0.0.1:23333/v1")
    models = (model,) if base is None else (model, base)
    return RemoteEngine(base_url, models, os.environ.get("INTERVALE_REMOTE_KEY", ""), room=queue)
