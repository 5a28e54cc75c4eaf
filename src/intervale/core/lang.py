"""One choice, made once: does the user read English or Chinese?

`--lang`, else `INTERVALE_LANG`, else the locale. Texts stand in pairs where they are printed (`say(en, zh)`), so a
translation is never far from its original.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_chosen: str | None = None


def set_language(code: str | None) -> None:
    """Choose 'en' or 'zh' for this process; None returns to the environment's choice."""
    global _chosen
    _chosen = code


def language() -> str:
    """'zh' or 'en'."""
    if _chosen:
        return _chosen
    for name in ("INTERVALE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@contextmanager
def in_language(code: str) -> Iterator[None]:
    """For as long as the block runs, 'en' or 'zh'. Of the whole process, so not for several threads."""
    global _chosen
    before, _chosen = _chosen, code
    try:
        yield
    finally:
        _chosen = before


def say(en: str, zh: str) -> str:
    """The text in the user's language."""
    return zh if language() == "zh" else en
