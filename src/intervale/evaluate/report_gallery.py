"""The items of a comparison as cards with their pictures: fixed, broken, and examples of what stayed as it was.

Promises: every text is escaped, a picture that cannot be shown says why in its place, and the part's size is bounded whatever the data
(cards, bytes of a picture, letters of a text, bytes of a list); what was left out is counted and stands in report.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from intervale.core.lang import say
from intervale.evaluate.labels import is_open
from intervale.evaluate.thumbnails import Thumbnail, thumbnail
from intervale.evaluate.training_card import thin

MOST_CARDS = 120
_EXAMPLES = {"both_wrong": 8, "both_right": 6}
_BROKEN_KEPT = 40  # cards kept for broken items when there are more fixed ones than fit: what got worse is what a reader must see
_OPEN = 18  # cards of a list that are unfolded: what follows must be found without scrolling past a hundred pictures
_MOST_PICTURES = 4
_SIZES = {False: (160, 6 * 1024), True: (120, 3 * 1024)}  # (longer side, bytes) of an item's only picture, and of one among others
_LONGEST = 300  # letters of a question or an answer
_LIST_BYTES = 240_000  # of the text list under the cards
Item = dict[str, Any]
Draw = Callable[[str, bool], Thumbnail]  # (a picture's path, whether it stands among others)


def shares(found: dict[str, Any]) -> dict[str, int]:
    """How many cards each list gets: {fixed, broken, both_wrong, both_right}, at most `MOST_CARDS` together."""
    left = MOST_CARDS - sum(_EXAMPLES.values())
    fixed, broken = len(found["fixed"]), len(found["broken"])
    shown = min(fixed, left - min(broken, _BROKEN_KEPT))
    return {"fixed": shown, "broken": min(broken, left - shown), **{name: min(most, len(found[name])) for name, most in _EXAMPLES.items()}}


def picture_root(found: dict[str, Any]) -> Path | None:
    """The folder the items' pictures are relative to, as far as it still is there."""
    places = (Path(found[side]["data"]["file"]).parent for side in ("after", "before") if found[side].get("data", {}).get("file"))
    return next((place for place in places if place.is_dir()), None)


def _clip(text: str) -> str:
    if len(text) <= _LONGEST:
        return escape(text)
    rest = len(text) - _LONGEST
    more = say(f"{rest:,} more characters in report.json", f"其余 {rest:,} 字见 report.json")
    return f"{escape(text[:_LONGEST])} … <small>({more})</small>"


def answer_of(item: Item, side: str) -> str:
    """What the model said, with the choice it was read as where the words alone (a letter) do not tell."""
    words, choice = item[side].strip(), item.get(f"{side}_choice")
    if not words:
        return say("(nothing)", "（空）")
    return f"{words} ({choice})" if choice and choice not in words else words


def _shot(picture: Thumbnail) -> str:
    if picture.uri:
        name = escape(picture.name[-120:])
        return f'<img src="{picture.uri}" width="{picture.width}" height="{picture.height}" alt="{name}" title="{name}">'
    return f'<div class="gone" title="{escape(picture.name[-120:])}"><strong>{say("no picture", "无图片")}</strong><span>{escape(picture.why[:120])}</span></div>'


def _shots(item: Item, draw: Draw | None) -> tuple[str, bool]:
    """(the pictures of a card, whether they are several)."""
    names = item.get("images") or []
    if not names or draw is None:
        return "", False
    several = len(names) > 1
    body = "".join(_shot(draw(name, several)) for name in names[:_MOST_PICTURES])
    if rest := len(names) - _MOST_PICTURES:
        body += f'<span class="soft">{say(f"and {rest} more pictures", f"另有 {rest} 张图片")}</span>' if rest > 0 else ""
    return f'<div class="shots">{body}</div>', several


def _card(item: Item, draw: Draw | None, marks: tuple[str, str]) -> str:
    shots, several = _shots(item, draw)
    rows = "".join(
        f'<dt>{name}</dt><dd class="{mark}">{_clip(text)}</dd>'
        for name, mark, text in (
            (say("before", "之前"), marks[0], answer_of(item, "before")),
            (say("after", "之后"), marks[1], answer_of(item, "after")),
            (say("correct", "正确答案"), "", item["right"]),
        )
    )
    graded = f'<p class="id">F1 {item["f1"][0]:.2f} → {item["f1"][1]:.2f}</p>' if "f1" in item else ""
    return (
        f'<li class="card{" strip" if several else ""}">{shots}<div class="told"><p class="question">{_clip(item["question"])}</p>'
        f'<dl class="answers">{rows}</dl>{graded}<p class="id">{_clip(item["id"])}</p></div></li>'
    )


def _rest(items: Sequence[Item], marks: tuple[str, str]) -> str:
    """The items without a card, as a folded table of text as long as it may be."""
    if not items:
        return ""
    names = (say("question", "问题"), say("before", "之前"), say("after", "之后"), say("correct", "正确答案"))
    rows: list[str] = []
    size = 0
    for item in items:
        cells = zip(names[1:], (*marks, ""), (answer_of(item, "before"), answer_of(item, "after"), item["right"]), strict=True)
        told = "".join(
            f'<td data-side="{name}" class="{mark}">{_clip(text)}</td>' if mark else f'<td data-side="{name}">{_clip(text)}</td>'
            for name, mark, text in cells
        )
        row = f"<tr><td>{_clip(item['question'])}</td>{told}</tr>"
        size += len(row.encode())
        if size > _LIST_BYTES:
            break
        rows.append(row)
    left = len(items) - len(rows)
    more = f'<p class="soft">{say(f"{left:,} more in report.json", f"其余 {left:,} 条见 report.json")}</p>' if left else ""
    head = "".join(f"<th>{name}</th>" for name in names)
    title = say(f"Show the other {len(rows):,} as text", f"以文字查看其余 {len(rows):,} 条")
    return f'<details><summary>{title}</summary><table class="list"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></details>{more}'


def _section(title: str, items: Sequence[Item], shown: int, draw: Draw | None, marks: tuple[str, str], listed: bool) -> str:
    head = f"<h2>{title} ({len(items):,})</h2>"
    if not items:
        return f'<section>{head}<p class="soft">{say("none", "无")}</p></section>'
    places = thin(range(len(items)), shown) if shown > 1 else list(range(shown))
    cards = [_card(items[place], draw, marks) for place in places]
    unfolded = _OPEN if len(cards) > _OPEN + _OPEN // 3 else len(cards)
    body = f'<ul class="cards">{"".join(cards[:unfolded])}</ul>'
    if folded := cards[unfolded:]:
        body += f'<details><summary>{say(f"Show {len(folded)} more cards", f"再看 {len(folded)} 张卡片")}</summary><ul class="cards">{"".join(folded)}</ul></details>'
    note = ""
    if shown < len(items):
        where = "" if listed else say("; all are in report.json", "；全部见 report.json")
        told = say(
            f"{shown} of {len(items):,} as cards, picked evenly over the data",
            f"以卡片展示 {len(items):,} 条中的 {shown} 条，按数据顺序均匀抽取",
        )
        note = f'<p class="soft">{told}{where}</p>'
    chosen = set(places)
    rest = _rest([item for place, item in enumerate(items) if place not in chosen], marks) if listed else ""
    style = "long" if listed else "short"  # a short one stays on one page of paper
    return f'<section class="{style}">{head}{note}{body}{rest}</section>'


def gallery_html(found: dict[str, Any]) -> str:
    """The sections of items. Reads the pictures it shows."""
    root, counts = picture_root(found), shares(found)
    # Several questions about one picture decode it once. The cache ends with the page: a file may change between two reports.
    draw = None if root is None else cache(lambda name, several: thumbnail(root, name, *_SIZES[several]))
    parts = [
        _section(title, found[name], counts[name], draw, marks, name in ("fixed", "broken") or is_open(found["protocol"]))
        for name, title, marks in (
            ("fixed", say("Fixed", "改对的题目"), ("bad", "good")),
            ("broken", say("Broken", "改错的题目"), ("good", "bad")),
            ("both_wrong", say("Still wrong", "仍然答错"), ("bad", "bad")),
            ("both_right", say("Right both times", "两次都答对"), ("good", "good")),
        )
        if found[name] or name in ("fixed", "broken")
    ]
    if root is None and any(item.get("images") for name in counts for item in found[name]):
        told = say("The pictures are not shown: the data's folder is not there any more", "未显示图片：数据目录已不存在")
        parts.insert(0, f'<section><p class="soft">{told} ({escape(found["after"]["data"]["file"])})</p></section>')
    return "".join(parts)
