"""An item of FoodieQA's files as plain facts: what is asked, its options, its pictures, which option is right.

Promises: everything an item says is checked and named by its place; blanks around texts go, the wording stays; pictures are paths of
the source below its folder, not opened here. How the facts are worded as a conversation is another's (`data.foodieqa` for training,
the benchmark's prompts for its own protocol). Nothing of the benchmark is in this package: only its field names are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from intervale.core.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ENGLISH = "items without English"
CHOICES_AS_TEXT = "mivqa items whose 'choices' is one text (not used: the pictures are the options)"
_OPTION = {"zh": "图", "en": "Option "}
_SUFFIX = {"zh": "", "en": "_en"}
_BRACKETS = str.maketrans({"(": "（", ")": "）"})


@dataclass(frozen=True)
class Item:
    """One item in one language. `names` are its pictures' paths as the source writes them; in mivqa they are the options.

    `choices` of mivqa are the item's own texts where it has one a picture, else the pictures' labels. `dish` may be ''.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    names: tuple[Any, ...]
    dish: str
    tags: dict[str, str]
    where: str


def normal_cuisine(raw: str) -> str:
    """A cuisine for grouping: full-width brackets, no white space, Shanghai's two names one (as the authors count them)."""
    name = "".join(raw.split()).translate(_BRACKETS)
    return "上海菜" if name.startswith("上海") else name


def labels(count: int, language: str) -> list[str]:
    """What the first `count` pictures of a mivqa item are called: 图A, 图B ... or Option A, Option B ..."""
    return [_OPTION[language] + letter for letter in LETTERS[:count]]


def has_english(item: dict[str, Any], task: str) -> bool:
    """Does the item have a question in English, and choices where the choices are texts?"""
    return bool(item.get("question_en") and (task == "mivqa" or item.get("choices_en")))


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} is {'missing' if value is None else 'empty or not a text'}", f"give the item its {key!r}")
    return value.strip()


def _optional(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _id(item: dict[str, Any], where: str) -> str:
    for key in ("question_id", "qid"):
        value = item.get(key)
        if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise UserError(f"{where}: no 'question_id' (or 'qid')", "give the item an id")


def _choices(item: dict[str, Any], key: str, where: str) -> list[str]:
    raw = item.get(key)
    if not isinstance(raw, list) or len(raw) < 2:
        raise UserError(
            f"{where}: {key!r} is {'missing' if raw is None else 'not a list of two or more texts'}", f"give the item its {key!r}"
        )
    for number, choice in enumerate(raw):
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(f"{where}: {key} {number} is empty or not a text", "write the choice, or remove the item")
    return [choice.strip() for choice in raw]


def _answer(item: dict[str, Any], choices: int, where: str) -> int:
    raw = item.get("answer")
    text = "" if isinstance(raw, bool) else str(raw).strip()
    if not (text.isascii() and text.isdigit()) or int(text) >= choices:
        raise UserError(f"{where}: 'answer' is {raw!r}, but there are {choices} choices", "give the index of the right choice, from 0")
    return int(text)


def _meta(item: dict[str, Any], where: str) -> dict[str, Any]:
    meta = item.get("food_meta")
    if not isinstance(meta, dict):
        raise UserError(f"{where}: 'food_meta' is missing", "take the item from the benchmark's file as it is")
    return meta


def _tags(item: dict[str, Any], dish: str, cuisine: str, where: str) -> dict[str, str]:
    artist = item.get("artist")
    if artist is not None and not isinstance(artist, str):
        raise UserError(f"{where}: 'artist' is not a text", "write the name in quotes, or remove the key")
    tags = {
        "question_type": _optional(item.get("question_type")),
        "cuisine": normal_cuisine(cuisine),
        "food_name": dish,
        "group": _optional(item.get("ann_group")),
        "artist": _optional(artist),
    }
    return {key: value for key, value in tags.items() if value}


def read_item(item: dict[str, Any], task: str, language: str, where: str, counts: Counter[str]) -> Item:
    """The facts of a decoded item of `task` in `language`. Raises: UserError naming `where` and the key that is wrong."""
    return {"sivqa": _single, "mivqa": _multi, "textqa": _words}[task](item, language, where, counts)


def _single(item: dict[str, Any], language: str, where: str, counts: Counter[str]) -> Item:
    """sivqa: one picture."""
    meta = _meta(item, where)
    dish = _text(item if "food_name" in item else meta, "food_name", where)
    choices = _choices(item, "choices" + _SUFFIX[language], where)
    answer = _answer(item, len(choices), where)
    question, name = _text(item, "question" + _SUFFIX[language], where), _text(meta, "food_file", where)
    tags = _tags(item, dish, _optional(meta.get("food_type")), where)
    return Item(_id(item, where), question, tuple(choices), answer, (name,), dish, tags, where)


def _multi(item: dict[str, Any], language: str, where: str, counts: Counter[str]) -> Item:
    """mivqa: the pictures are the options, lettered; the item's own texts are the choices when it has one a picture."""
    names = item.get("images")
    if not isinstance(names, list) or not 2 <= len(names) <= len(LETTERS):
        raise UserError(f"{where}: 'images' is not a list of two or more pictures", "give the item its pictures")
    own = item.get("choices" + _SUFFIX[language])
    if isinstance(own, str) and own.strip():
        counts[CHOICES_AS_TEXT] += 1
    told = isinstance(own, list) and own
    choices = _choices(item, "choices" + _SUFFIX[language], where) if told else labels(len(names), language)
    if len(choices) != len(names):
        raise UserError(f"{where}: {len(choices)} choices for {len(names)} pictures", "give as many choices as pictures, or none")
    answer = _answer(item, len(choices), where)
    question, dish = _text(item, "question" + _SUFFIX[language], where), _optional(item.get("food_name"))
    tags = _tags(item, dish, _optional(item.get("food_type")), where)
    return Item(_id(item, where), question, tuple(choices), answer, tuple(names), dish, tags, where)


def _words(item: dict[str, Any], language: str, where: str, counts: Counter[str]) -> Item:
    """textqa: no picture."""
    choices = _choices(item, "choices" + _SUFFIX[language], where)
    answer = _answer(item, len(choices), where)
    question, dish = _text(item, "question" + _SUFFIX[language], where), _text(item, "food_name", where)
    tags = _tags(item, dish, _optional(item.get("cuisine_type")), where)
    return Item(_id(item, where), question, tuple(choices), answer, (), dish, tags, where)
