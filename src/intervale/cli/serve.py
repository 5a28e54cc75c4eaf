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
    from intervale.serve.app import Page

_OFFICIAL_TILES = 12  # what a picture may be cut into where the engine is another's

# The options, in the order --help shows them.
_Model = Annotated[str, typer.Argument(help="A model folder, a training run, or a hub id; with --engine remote: a model's name there.")]
_Base = Annotated[
    str | None, typer.Option(help="A second model beside it, to compare. A training run brings its own base along by itself.")
]
_Adapter = Annotated[str | None, typer.Option(help="A training run on MODEL: both answer, from one copy of the weights.")]
_Engine = Annotated[
    Literal["local", "remote", "lmdeploy", "vllm"],
    typer.Option(
        help="local: in this process; remote: another OpenAI-compatible server; lmdeploy, vllm: started here, from their own environment."
    ),
]
_BaseUrl = Annotated[
    str | None, typer.Option(help="remote: its address, like http://127.0.0.1:23333/v1; its key is taken from INTERVALE_REMOTE_KEY.")
]
_EnginePython = Annotated[str | None, typer.Option(help="lmdeploy, vllm: the Python of their environment (default: found on PATH).")]
_Tp = Annotated[int, typer.Option(min=1, help="lmdeploy, vllm: graphics cards that share the model.")]
_MemoryShare = Annotated[float, typer.Option(min=0.05, max=0.95, help="lmdeploy, vllm: the share of the cards' memory they take.")]
_Host = Annotated[str, typer.Option(help="Where to listen. Anything but this machine needs an API key.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")]
_KeyFile = Annotated[Path | None, typer.Option(help="One API key a line; INTERVALE_API_KEYS (with commas) adds to them.")]
_AllowHost = Annotated[list[str] | None, typer.Option(help="A further name this server answers to (behind a proxy). Repeatable.")]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Listen to the network without a key.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda when there is one).")]
_Precision = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
_MaxTiles = Annotated[
    int | None, typer.Option(min=1, help="Tiles a picture (default: the model's; at most 4 on a CPU for 448-pixel tiles).")
]
_NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer anybody may ask for.")]
_Queue = Annotated[int, typer.Option(min=1, help="Requests that may wait; more are sent away with 429.")]
_Cache = Annotated[int, typer.Option(min=0, help="local: MiB for conversations that may go on and for pictures seen.")]
_Report = Annotated[Path | None, typer.Option(help="A report.html of `intervale compare`, shown on the page.")]
_NoPage = Annotated[bool, typer.Option("--no-page", help="The API alone; saves the seconds that the page takes to start.")]
_Share = Annotated[
    bool, typer.Option("--share", help="A public link through Gradio's relay as well. Needs an API key: it is the password.")
]
_Remote = Annotated[bool, typer.Option("--remote-images", help="Fetch pictures from public web addresses too.")]


def serve(
    model: _Model,
    base: _Base = None,
    adapter: _Adapter = None,
    engine: _Engine = "local",
    base_url: _BaseUrl = None,
    engine_python: _EnginePython = None,
    tp: _Tp = 1,
    memory_share: _MemoryShare = 0.5,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key_file: _KeyFile = None,
    allow_host: _AllowHost = None,
    insecure: _Insecure = False,
    device: _Device = None,
    precision: _Precision = "auto",
    max_tiles: _MaxTiles = None,
    max_new_tokens: _NewTokens = 4096,
    queue: _Queue = 128,
    cache_mib: _Cache = 1536,
    remote_images: _Remote = False,
    report: _Report = None,
    no_page: _NoPage = False,
    share: _Share = False,
) -> None:
    """Answer over HTTP: a page and OpenAI's API on one port, for this machine unless told otherwise."""
    from intervale.data.images import max_pixels
    from intervale.serve.app import Serving, create_app, door_rules, open_port, run
    from intervale.serve.door import read_keys
    from intervale.serve.limits import Limits
    from intervale.serve.media import MediaLimits

    keys = read_keys(api_key_file, os.environ.get("INTERVALE_API_KEYS", ""))
    limits = Limits(new_tokens=max_new_tokens, default_new_tokens=min(512, max_new_tokens))
    media = MediaLimits(remote=remote_images, picture_pixels=max_pixels())
    serving = Serving(door_rules(host, keys, tuple(allow_host or ()), limits, insecure=insecure, shared=share), media)
    _refuse_strays(engine, base_url=base_url, engine_python=engine_python, adapter=adapter, base=base, device=device, max_tiles=max_tiles)
    shown_report = _read_report(report, no_page)
    sock = open_port(host, port)
    if engine == "remote":
        desk = _remote(model, base, base_url, queue)
    elif engine == "local":
        desk = _local(model, base, adapter, device, precision, max_tiles, queue, cache_mib)
    else:
        desk = _launched(engine, model, engine_python, tp, memory_share, queue)
    try:
        page = None if no_page else _page(engine, model, adapter, base, max_tiles, shown_report)
        run(create_app(desk, serving, page), sock, lambda: _ready(desk, host, sock.getsockname()[1], page is not None, share))
    finally:
        desk.close()


def _ready(desk: Desk, host: str, port: int, page: bool, shared: bool) -> None:
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names, what, was = ", ".join(desk.models), "page and " if page else "", "网页；" if page else ""
    result(
        say(
            f"serving {names} at {address}  ({what}API: {address}/v1; Ctrl-C ends)",
            f"{names} 已就绪：{address}（{was}API：{address}/v1；Ctrl-C 结束）",
        )
    )
    if shared:
        from intervale.serve.share import share

        share(
            port,
            lambda link: result(say(f"shared at {link} (the API key is the password)", f"公开链接：{link}（API 密钥即密码）")),
            lambda error: note(f"{error.what}; {error.fix}"),
        )


def _read_report(report: Path | None, no_page: bool) -> dict[str, bytes] | None:
    """The report by language: itself, and the one beside it that `intervale compare` wrote in the other language."""
    from intervale.core.errors import UserError

    if report is None:
        return None
    if no_page:
        raise UserError("--report with --no-page", "leave one of them out")
    try:
        own = report.read_bytes()
        language, other = ("zh", "en") if b'lang="zh' in own[:300] else ("en", "zh")
        beside = report.with_name(f"{report.stem}.{other}{report.suffix}")
        return {language: own, other: beside.read_bytes() if beside.is_file() else own}
    except OSError as error:
        raise UserError(f"{report}: the report cannot be read", "give the report.html that `intervale compare` wrote") from error


def _page(engine: str, model: str, adapter: str | None, base: str | None, max_tiles: int | None, report: dict[str, bytes] | None) -> Page:
    """The page, with what it says about this server. Paths are shortened to names: visitors need not know the disk."""
    from intervale.engine.desks import default_tiles, name_of, short_path
    from intervale.model.adapt import checkpoint_of
    from intervale.model.load import load_text_side, resolve_model
    from intervale.serve.ui import mount_page
    from intervale.serve.ui_about import Facts

    tiles, run = max_tiles or _OFFICIAL_TILES, adapter
    if engine != "remote":
        run = adapter or (model if checkpoint_of(resolve_model(model)) is not None else None)
    if engine == "local" and max_tiles is None:
        tiles = default_tiles(run or model, None) or load_text_side(run or model).tiling.max_tiles
    words = ["intervale", "serve", short_path(model)]
    for option, value in (("--base", base), ("--adapter", adapter)):
        words += [option, short_path(value)] if value else []
    words += [] if engine == "local" else ["--engine", engine]
    facts = Facts(engine, name_of(run) if run else "", " ".join(words), tiles, report)
    return lambda app: mount_page(app, facts)


def _refuse_strays(engine: str, **given: object) -> None:
    """Options that the chosen engine has no use for are refused, not ignored."""
    from intervale.core.errors import UserError

    uses = {
        "local": ("adapter", "base", "device", "max_tiles"),
        "remote": ("base_url", "base"),
        "lmdeploy": ("engine_python",),
        "vllm": ("engine_python",),
    }
    for name, value in given.items():
        if value is not None and name not in uses[engine]:
            option = name.replace("_", "-")
            home = " or ".join(other for other, names in uses.items() if name in names)
            raise UserError(f"--{option} without --engine {home}", f"leave --{option} out, or choose that engine")
    if engine == "remote" and given["base_url"] is None:
        raise UserError("--engine remote needs --base-url", "give the other server's address, like http://127.0.0.1:23333/v1")


def _local(
    model: str, base: str | None, adapter: str | None, device: str | None, precision: str, max_tiles: int | None, queue: int, cache_mib: int
) -> Desk:
    from intervale.engine.desks import CPU_TILES, default_tiles, local_desk

    if max_tiles is None and (max_tiles := default_tiles(adapter or model, device)) is not None:
        note(
            say(
                f"on the CPU a picture is cut into at most {CPU_TILES} tiles; --max-tiles changes that",
                f"CPU 上每张图最多切 {CPU_TILES} 块；可用 --max-tiles 修改",
            )
        )
    dtype = None if precision == "auto" else precision
    return local_desk(model, base, adapter, device=device, dtype=dtype, max_tiles=max_tiles, waiting=queue, cache_bytes=cache_mib << 20)


def _remote(model: str, base: str | None, base_url: str | None, queue: int) -> Desk:
    from intervale.engine.remote import RemoteEngine

    assert base_url is not None, "_refuse_strays saw to it"
    models = (model,) if base is None else (model, base)
    return RemoteEngine(base_url, models, os.environ.get("INTERVALE_REMOTE_KEY", ""), room=queue)


def _launched(engine: str, model: str, python: str | None, tp: int, memory_share: float, queue: int) -> Desk:
    from intervale.core.errors import UserError
    from intervale.engine.desks import name_of
    from intervale.engine.launch import Launched, Options, Plan, find_python, lmdeploy_plan, vllm_plan
    from intervale.model.adapt import checkpoint_of
    from intervale.model.load import resolve_model

    folder = resolve_model(model)
    if checkpoint_of(folder) is not None:
        raise UserError(f"{model}: {engine} serves plain model folders, not training runs", f"intervale export {model} DST --format hf")
    found = find_python(engine, python)
    options = Options(tensor_parallel=tp, memory_share=memory_share)
    name, plan = name_of(model), lmdeploy_plan if engine == "lmdeploy" else vllm_plan

    def planned(port: int, key: str, room: Path) -> Plan:
        return plan(found, folder.resolve(), name, port, key, options, room)

    desk = Launched(planned, name, room=queue)
    note(say(f"{desk.plan.why}; its log: {desk.log}", f"{desk.plan.why}；日志：{desk.log}"))
    try:
        desk.wait_ready()
    except BaseException:
        desk.close()
        raise
    return desk
