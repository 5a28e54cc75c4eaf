"""What the XTuner import passes around: the values taken out of a config, and the recipe with what there is to tell.

A value is taken by its path, and remembered, so that what nobody took can be told; one that was not read is refused there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from intervale.core.errors import UserError
from intervale.core.lang import say
from intervale.core.pyconfig import Found, PyConfig, Reference, Unread
from intervale.train.xtuner_notes import DIFFERENT

Place = tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """One thing to tell: the config's line (0: no line of its own) and the text."""

    line: int
    text: str


@dataclass
class Imported:
    """A recipe (`section.key` -> value, and its line in the config), what there is to tell, and what prepares the data."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    different: list[Note] = field(default_factory=list)
    missing: list[Note] = field(default_factory=list)
    unread: list[Note] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, found: Found | None = None) -> None:
        """Set a key of the recipe, with the line it comes from."""
        self.values[key] = value
        if found is not None:
            self.lines[key] = found.line

    def differs(self, name: str, found: Found | None, **facts: Any) -> None:
        """Tell one of the known differences."""
        english, chinese = DIFFERENT[name]
        self.different.append(Note(found.line if found else 0, say(english.format(**facts), chinese.format(**facts))))

    def lacks(self, found: Found | None, english: str, chinese: str) -> None:
        """Tell what nothing in a recipe stands for."""
        self.missing.append(Note(found.line if found else 0, say(english, chinese)))


class Walk:
    """Takes values out of a config by path and remembers which, so that what is left can be told."""

    def __init__(self, config: PyConfig) -> None:
        self.config = config
        self.taken: set[Place] = set()

    def get(self, *path: str) -> Found | None:
        """The value at a path, or None where there is none. Raises: UserError when it could not be read."""
        found = self.config.values.get(path[0])
        for number, key in enumerate(path[1:], 1):
            self._refuse_unread(found, path[:number])
            found = found.value.get(key) if found is not None and isinstance(found.value, dict) else None
        self._refuse_unread(found, path)
        if found is not None:
            self.taken.add(path)
        return found if found is None or found.value is not None else None

    def _refuse_unread(self, found: Found | None, path: Place) -> None:
        if found is not None and isinstance(found.value, Unread):
            raise UserError(
                f"{self.config.at(found.line)}: {'.'.join(path)} is `{found.value.text}`, which is not read ({found.value.why}): "
                "a config is data here, never executed",
                "write its value there as a plain number, text, list or dict(...)",
            )

    def number(self, *path: str, whole: bool = False, least: float = -math.inf) -> Found | None:
        """A number (or whole number) of at least `least` at a path. Raises: UserError for anything else."""
        found = self.get(*path)
        if found is None:
            return None
        value = found.value
        kind = f"a {'whole ' if whole else ''}number" + (f" of at least {least}" if least > -math.inf else "")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value) or value < least:
            raise UserError(f"{self.config.at(found.line)}: {'.'.join(path)} is {found.plain()!r}, not {kind}", f"write {kind} there")
        return found

    def text(self, *path: str) -> Found | None:
        """A text at a path. Raises: UserError for anything else."""
        found = self.get(*path)
        if found is not None and not isinstance(found.value, str):
            raise UserError(f"{self.config.at(found.line)}: {'.'.join(path)} is {found.plain()!r}, not a text", "write it in quotes")
        return found

    def type_of(self, *path: str) -> str:
        """The last part of a `type` (a name or, in a dumped config, its path as text), or ''."""
        found = self.get(*path, "type")
        if found is None:
            return ""
        return found.value.last if isinstance(found.value, Reference) else str(found.plain()).rsplit(".", 1)[-1]
