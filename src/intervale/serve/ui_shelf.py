"""The shelf: example pictures by category, from the data set in the package (the artists that training may see).

Promises: only these files are handed out, by number. Cost: reading one JSON file of 1.6 MB at start-up; a picture is 2 kB.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from intervale.core.embedded import ASSETS
from intervale.serve.ui_words import pick

A_CATEGORY = 6  # pictures of each


@dataclass(frozen=True)
class Example:
    """One picture: its file, its name and category in English and Chinese."""

    path: Path
    name: tuple[str, str]
    category: tuple[str, str]


def load_shelf(folder: Path = ASSETS / "foodemoji") -> tuple[Example, ...]:
    """A few pictures of each category, different things by different artists; empty where the data set is not installed."""
    try:
        items = json.loads((folder / "sivqa_tidy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    names: dict[str, tuple[str, str]] = {}
    found: list[Example] = []
    taken: set[tuple[str, str]] = set()
    count: Counter[str] = Counter()
    for item in items:  # the name stands before the category of the same picture
        if item["split"] == "train":  # the embedded models learn from those: what is shown here is new to them
            continue
        right, file = int(item["answer"]), item["food_meta"]["food_file"]
        if item["question_type"] == "name":
            names[file] = (item["choices_en"][right], item["choices"][right])
        elif item["question_type"] == "category" and file in names:
            category = (item["choices_en"][right], item["choices"][right])
            if (category[1], names[file][1]) in taken or count[category[1]] >= A_CATEGORY or (folder / file).is_symlink():
                continue
            taken.add((category[1], names[file][1]))
            count[category[1]] += 1
            found.append(Example(folder / file, names[file], category))
    return tuple(sorted(found, key=lambda one: one.category[0].lower()))


def shelf_html(shelf: tuple[Example, ...], language: str) -> str:
    """The shelf as buttons; `data-at` is the number of a picture."""
    rows: dict[str, list[str]] = {}
    for at, one in enumerate(shelf):
        name, category = escape(pick(language, *one.name)), escape(pick(language, *one.category))
        button = f'<button type="button" data-at="{at}" title="{name}"><img src="/shelf/{at}" alt="{name}" loading="lazy"></button>'
        rows.setdefault(category, []).append(button)
    return "".join(f'<div class="iv-row"><h4>{title}</h4><div>{"".join(row)}</div></div>' for title, row in rows.items())
