"""Two answers side by side, and what differs between them marked.

Promises: what models say is text, never markup of the page. Cost: the marks are made once, when both have ended; where one was
stopped, what it had not said yet is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from intervale.serve.ui_talk import Side, numbers
from intervale.serve.ui_words import error_text, pick

# A Chinese character is a word here; letters and digits go together.
_WORD = re.compile(r"[A-Za-z0-9_]+|\s+|.", re.DOTALL)
_MOST = 4000  # words of an answer that are compared: the time grows with their product


def marked(one: str, two: str) -> tuple[str, str]:
    """Both texts as HTML; where they differ, <mark>."""
    first, second = _WORD.findall(one), _WORD.findall(two)
    if max(len(first), len(second)) > _MOST:
        return escape(one), escape(two)
    left, right = [], []
    for kind, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        before, after = escape("".join(first[a:b])), escape("".join(second[c:d]))
        left.append(before if kind == "equal" or not before else f"<mark>{before}</mark>")
        right.append(after if kind == "equal" or not after else f"<mark>{after}</mark>")
    return "".join(left), "".join(right)


def panels(names: Sequence[str], sides: Sequence[Side] | None, language: str, stopped: bool = False) -> str:
    """The panels as HTML; `sides` None before the first question."""
    if sides is None:
        hint = pick(language, "The answer appears here.", "回答会显示在这里。")
        return _frame([_panel(name, f'<span class="iv-dim">{hint}</span>', "") for name in names])
    texts = [escape(side.text) for side in sides]
    if all(side.over for side in sides) and len(sides) == 2 and all(side.text for side in sides):
        texts = list(marked(sides[0].text, sides[1].text))
    cards = []
    for name, side, text in zip(names, sides, texts, strict=True):
        if side.fault is not None:
            text += f'<p class="iv-error">{escape(error_text(language, side.fault.code, side.fault.message))}</p>'
        elif not side.over and not stopped:
            text += '<span class="iv-caret"></span>'
        cards.append(_panel(name, text, numbers(side, language)))
    return _frame(cards)


def verdict(sides: Sequence[Side], language: str) -> str:
    """One line about both, once they have ended well."""
    if len(sides) != 2 or any(side.fault is not None or not side.finish for side in sides):
        return ""
    same = sides[0].text.strip() == sides[1].text.strip()
    return pick(language, "both say the same", "两个回答相同") if same else pick(language, "what differs is marked", "不同之处已标出")


def _frame(cards: list[str]) -> str:
    return f'<div class="iv-panels">{"".join(cards)}</div>'


def _panel(name: str, text: str, foot: str) -> str:
    return f'<section><h3>{escape(name)}</h3><div class="iv-answer">{text}</div><footer>{foot}</footer></section>'
