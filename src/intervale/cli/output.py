"""What a command says, and where: results on stdout, everything else on stderr, so that `--json` is one clean document."""

from __future__ import annotations

import json
import sys
from typing import Any


def note(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result(text: str) -> None:
    """A line of the answer, on stdout."""
    print(text, flush=True)


def emit_json(value: Any) -> None:
    """The one JSON document of a `--json` command."""
    print(json.dumps(value, ensure_ascii=False, indent=2), flush=True)


def safe(text: str) -> str:
    """Text of a data file for a terminal: its control characters become visible instead of acting."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
