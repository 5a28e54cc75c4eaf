"""The command line: `intervale COMMAND`. One file a command; each imports what is heavy inside its function.

Exit codes: 0 done, 1 the user's input is wrong, 2 usage, 3 an outside part failed, 130/143 stopped by Ctrl-C/SIGTERM.
`intervale --help` imports neither torch nor transformers (a test holds it to that).
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from intervale import __version__
from intervale.cli import prepare
from intervale.cli.chat import chat
from intervale.cli.check import check
from intervale.cli.compare import compare
from intervale.cli.convert import convert
from intervale.cli.doctor import doctor
from intervale.cli.evaluate import evaluate
from intervale.cli.export import export
from intervale.cli.import_checkpoint import import_checkpoint
from intervale.cli.import_xtuner import import_xtuner
from intervale.cli.info import info
from intervale.cli.init import init
from intervale.cli.output import note
from intervale.cli.quickstart import quickstart
from intervale.cli.serve import serve
from intervale.cli.train import train
from intervale.core.errors import UserError
from intervale.core.lang import say, set_language
from intervale.train.launch import leave_at_once, started_outside

_OBJECTS = 50_000  # new ones between two looks of the garbage collector

app = typer.Typer(
    name="intervale",
    help="From your pictures and questions to a tuned, proven, served InternVL model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(prepare.app, name="prepare")
for command in (check, train, evaluate, compare, export, chat, serve, init, convert, info, import_xtuner, import_checkpoint, doctor):
    app.command()(command)
app.command()(quickstart)


def _version(shown: bool) -> None:
    if shown:
        print(f"intervale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    lang: Annotated[str, typer.Option(help="Language of the messages: en or zh (default: INTERVALE_LANG, else the locale).")] = "",
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    if lang and lang not in ("en", "zh"):
        raise typer.BadParameter("use en or zh", param_hint="--lang")
    set_language(lang or None)


def main() -> None:
    """Run one command and end with its exit code."""
    # Imports and torch's compiler make millions of objects that stay: looking them through every 700 took an eighth of the imports' time.
    gc.set_threshold(_OBJECTS)
    try:
        _run()
    except SystemExit as end:
        if not started_outside() and not _holds_gpu():
            raise
        if end.code is not None and not isinstance(end.code, int):
            note(str(end.code))
        leave_at_once(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)


def _holds_gpu() -> bool:
    """Is a GPU in use? Then taking the interpreter apart also gives back its memory and what is pinned, page by page: seconds for nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _run() -> None:
    """Run one command; a UserError becomes two lines on stderr and its exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show Chinese shows its code points
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        note(f"{say('error', '错误')}: {error.what}\n  {say('fix', '办法')}: {error.fix}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        note(say("stopped", "已停止"))
        sys.exit(130)
