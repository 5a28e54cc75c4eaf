"""The FoodieQA protocol: which prompts there are, and how one of them asks an item. Pure functions on a file of prompts; no weights.

Promises: a prompt's words are those of `assets/foodieqa/prompts.yaml`, and nothing else is added; turned options are the same options
in another order, and `order` says which stands where. Cost: a few text replacements an asking.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.config import parse_yaml
from intervale.core.embedded import ASSETS
from intervale.core.errors import UserError, nearest
from intervale.core.files import read_text
from intervale.core.records import IMAGE, Message, Record
from intervale.data.foodie_items import LETTERS, Item, labels

TASKS, LANGUAGES = ("sivqa", "mivqa", "textqa"), ("zh", "en")
# What the model gets to see beside the question: the picture; nothing; the picture and the dish's name; the name alone.
VIEWS = ("picture", "blind", "food-name", "name-only")
PROMPTS = ASSETS / "foodieqa" / "prompts.yaml"
_MARK = re.compile(r"\{(question|choices|pictures|picture|letter|choice)\}")


@dataclass(frozen=True)
class PromptText:
    """One prompt: `prefix` is what the answer is forced to begin with ('': the user's text ends where the letter belongs)."""

    user: str
    prefix: str = ""
    system: str = ""
    each: str = "{picture}"
    replace: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Asking:
    """One item asked once. `record` holds the conversation (its last assistant turn is the forced prefix) and the options as shown.

    `order[k]` is the item's own index of the option shown at place k; `plain` is the item as the source has it. `key` names the asking
    in the answers' file.
    """

    task: str
    language: str
    view: str
    prompt: str
    turn: str
    record: Record
    order: tuple[int, ...]
    plain: Record

    @property
    def key(self) -> str:
        """Such as sivqa/zh/picture/0/as-is/vqa-1."""
        return f"{'/'.join(self.combination)}/{self.plain.id}"

    @property
    def combination(self) -> tuple[str, str, str, str, str]:
        """What all items of a score are asked alike by: task, language, view, prompt, turn."""
        return self.task, self.language, self.view, self.prompt, self.turn


@functools.cache
def _file() -> dict[str, Any]:
    found = parse_yaml(read_text(PROMPTS), str(PROMPTS))
    assert isinstance(found, dict)
    return found


def prompts_digest() -> str:
    """A short name for exactly these prompts: sha256 of the file, 16 hex digits."""
    return hashlib.sha256(PROMPTS.read_bytes()).hexdigest()[:16]


def languages_of(task: str) -> tuple[str, ...]:
    """The languages in which the protocol asks a task."""
    return tuple(language for language in LANGUAGES if language in _file()[task])


def prompts_of(task: str, language: str) -> tuple[str, ...]:
    """The names of the protocol's prompts; the file may hold further ones, which are asked by name only."""
    return tuple(_file()[task][language]["all"])


def prompt_text(task: str, language: str, name: str) -> PromptText:
    """One prompt. Raises: UserError when there is none of that name."""
    entries: Mapping[str, Any] = _file()[task][language]
    if name == "all" or name not in entries:
        known = [other for other in entries if other != "all"]
        raise UserError(f"there is no prompt {name!r} for {task} in {language}{nearest(name, known)}", f"use some of {', '.join(known)}")
    entry = dict(entries[name])
    return PromptText(**entry | {"replace": tuple((entry.get("replace") or {}).items())})


def food_name_words(language: str) -> str:
    """The words of a question that the dish's name takes the place of; '' where the protocol has none."""
    return str(_file()["food_name"].get(language, ""))


def view_applies(view: str, task: str, language: str, item: Item) -> bool:
    """Can this item be asked in this view? Text questions have no picture to hide; only some questions have a place for the name."""
    if view == "picture":
        return True
    if view == "blind":
        return task != "textqa"
    words = food_name_words(language)
    return task == "sivqa" and bool(words and item.dish) and words in item.question


def _fill(text: str, values: Mapping[str, str]) -> str:
    """The placeholders' values put in at once, so that braces in a question stay what they are."""
    return _MARK.sub(lambda found: values.get(found[1], found[0]), text)


AS_IS, SEEDED = "as-is", "seeded"  # names of turns; the others are turn1, turn2, ...


def turned(count: int, steps: int) -> tuple[int, ...]:
    """The order of `count` options after that many steps: place k shows option (k + steps) mod count."""
    return tuple((place + steps) % count for place in range(count))


def steps_of(turn: str, seed: int, name: str, count: int) -> int:
    """How far a turn by this name turns the item `name` with `count` options.

    `seeded` is drawn from seed and id alone (sha256), so that all prompts and models see the same order.
    """
    if turn == SEEDED:
        return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") % count
    return 0 if turn == AS_IS else int(turn.removeprefix("turn"))


def ask_item(
    item: Item, plain: Record, task: str, language: str, view: str, prompt: str, turn: str, *, seed: int = 0, prefix_as: str = "assistant"
) -> Asking:
    """The item asked by one prompt in one view and one order of its options. `plain` is its record, options and pictures in order.

    `prefix_as` user: what the answer is forced to begin with ends the question instead, for models that cannot be forced.

    Raises: UserError for an unknown prompt, or a mivqa item without four pictures (the prompts speak of four).
    """
    text = prompt_text(task, language, prompt)
    order = turned(len(plain.choices), steps_of(turn, seed, item.id, len(plain.choices)))
    if task == "mivqa" and len(order) != 4:
        raise UserError(f"{item.where}: {len(order)} pictures, but the protocol's prompts speak of four", "leave the item out")
    question = item.question.replace(food_name_words(language), item.dish) if view in ("food-name", "name-only") else item.question
    for old, new in text.replace:
        question = question.replace(old, new)
    mark = f"{IMAGE}\n" if view in ("picture", "food-name") else ""
    images = tuple(plain.images[place] for place in order) if task == "mivqa" else plain.images
    pictures = "".join(_fill(text.each, {"picture": mark, "letter": LETTERS[place]}) for place in range(len(images)))
    shown = tuple(labels(4, language)) if task == "mivqa" else tuple(plain.choices[place] for place in order)
    line = str(_file()["choice_line"])
    choices = "".join(_fill(line, {"letter": LETTERS[place], "choice": choice}) for place, choice in enumerate(shown))
    user = _fill(text.user, {"question": question, "choices": choices, "pictures": pictures})
    if text.prefix and prefix_as == "user":
        user = f"{user.rstrip()}\n{text.prefix}"
    forced = [Message("assistant", text.prefix)] if text.prefix and prefix_as == "assistant" else []
    messages = [*([Message("system", text.system)] if text.system else []), Message("user", user), *forced]
    assert plain.answer is not None
    record = Record(
        id=item.id,
        messages=tuple(messages),
        images=images if mark else (),
        choices=shown,
        answer=order.index(plain.answer),
        tags=item.tags,
        where=item.where,
        root=plain.root,
    )
    return Asking(task, language, view, prompt, turn, record, order, plain)


def plain_record(item: Item, task: str, language: str, root: Path, images: Sequence[str]) -> Record:
    """The item as a bare question with its options in the source's order: what predictions, comparisons and provenance show."""
    options = tuple(labels(len(images), language)) if task == "mivqa" else item.choices
    marks = f"{IMAGE}\n" * len(images)
    asked = Message("user", marks + item.question)
    return Record(item.id, (asked,), tuple(images), options, item.answer, item.tags, item.where, root)
