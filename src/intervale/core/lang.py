"""One choice, made once: does the user read English or Chinese?

`--lang`, else `INTERVALE_LANG`, else the locale. Texts stand in pairs where they are printed (`say(en, zh)`), so a
translation is never far from its original.
"""

from __future__ import annotations

import os

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


def say(en: str, zh: str) -> str:
    """The text in the user's language."""
    return zh if language() == "zh" else en
