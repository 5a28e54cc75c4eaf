"""The two ways a command fails on purpose. Everything else is a bug of ours.

`UserError`: the input is wrong (exit code 1). `OutsideError`: a part that is not ours failed (exit code 3). Both say what is
wrong and what to do about it; the command line prints exactly that and no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong: `what` names it (file, line, value), `fix` says what to do."""

    exit_code = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (self.what, self.fix)  # so that it can come from another process


class OutsideError(UserError):
    """A part outside intervale failed: a hub, a server, a missing optional package."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
