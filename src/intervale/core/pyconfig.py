"""A Python configuration file as data: assignments, `dict(...)`, literals, names, arithmetic. Nothing of it is ever executed.

Promises: only the syntax tree is looked at; every value knows its line; what cannot be read is an `Unread` with its line and
source, and a name that an unread statement may change becomes one too, so nothing stale is ever taken for the value.
Cost: one parse of a file of at most 1 MiB; values that would grow without bound are left unread.
"""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import read_text

_MOST_BYTES, _MOST_TEXT, _MOST_ITEMS, _MOST_BITS, _MOST_DEPTH = 1 << 20, 1 << 16, 10_000, 256, 60
_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A name of another module, by its whole path: `torch.optim.AdamW`."""

    path: str

    @property
    def last(self) -> str:
        """Its last part: `AdamW`."""
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Unread:
    """An expression that is more than data, as its source, and why it was not read."""

    text: str
    why: str = "more than data"


@dataclass(frozen=True)
class Found:
    """A value and the line it stands on. Values: None, bool, int, float, str, Reference, Unread, {str: Found}, (Found, ...)."""

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without lines: dicts, lists, strings, numbers; a Reference as its path, an Unread as its source."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, tuple):
            return [entry.plain() for entry in self.value]
        if isinstance(self.value, Reference | Unread):
            return self.value.path if isinstance(self.value, Reference) else self.value.text
        return self.value


@dataclass
class PyConfig:
    """What a file assigns, which names its own values use, and its statements that were not read."""

    where: str
    values: dict[str, Found] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    unread: list[Found] = field(default_factory=list)  # each an Unread

    def at(self, line: int) -> str:
        """`file:line`."""
        return f"{self.where}:{line}"


def read_pyconfig(path: Path) -> PyConfig:
    """A configuration file as data. Raises: UserError when it cannot be read or is not Python, with its line."""
    return parse_pyconfig(read_text(path), str(path))


def parse_pyconfig(text: str, where: str) -> PyConfig:
    """A configuration's text as data; `where` names it in errors. Raises: UserError."""
    if len(text.encode()) > _MOST_BYTES:
        raise UserError(f"{where}: {len(text.encode()):,} bytes are no configuration file", "name the XTuner config itself")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(
            f"{where}:{error.lineno or 1}: not valid Python: {error.msg}", "correct the line, or save the file again"
        ) from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: cannot be parsed ({type(error).__name__})", "name the XTuner config itself") from error
    config = PyConfig(where)
    reader = _Reader(text, config)
    try:
        for statement in tree.body:
            reader.statement(statement)
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be a configuration", "name the XTuner config itself") from error
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Reader:
    """Walks the statements once, in order; `imports` maps a file's names to what they stand for elsewhere."""

    def __init__(self, text: str, config: PyConfig) -> None:
        self._lines = text.splitlines()
        self._config = config
        self._imports: dict[str, str] = {}

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import():
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    self._imports[name] = alias.name if alias.asname else name
            case ast.ImportFrom() if not any(alias.name == "*" for alias in node.names):
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}".lstrip(".")
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.Assign() if all(isinstance(target, ast.Name) for target in node.targets):
                found = self._value(node.value)
                for target in node.targets:
                    assert isinstance(target, ast.Name)
                    self._config.values[target.id] = Found(found.value, node.lineno)
            case ast.AnnAssign(target=ast.Name(id=name)) if node.value is not None:
                self._config.values[name] = Found(self._value(node.value).value, node.lineno)
            case ast.AugAssign(target=ast.Name(id=name)):
                old = self._config.values.get(name, Found(Unread(name, "not assigned before"), node.lineno))
                self._config.values[name] = Found(self._combine(node, node.op, old, self._value(node.value)), node.lineno)
            case _:
                self._unread(node)

    def _unread(self, node: ast.stmt) -> None:
        """List a statement, and no longer trust any name that it (or what it calls) may change."""
        text = self._source(node)
        self._config.unread.append(Found(Unread(text), node.lineno))
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self._config.values and not self._only_read(node, part):
                self._config.values[part.id] = Found(Unread(text, "a statement that is not read may change it"), node.lineno)
            elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self._config.values[part.id] = Found(Unread(text), node.lineno)

    @staticmethod
    def _only_read(node: ast.stmt, name: ast.Name) -> bool:
        """`print(name)` and `assert name` change nothing; for anything else we do not know."""
        if isinstance(node, ast.Assert):
            return True
        call = node.value if isinstance(node, ast.Expr) else None
        return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"

    def _source(self, node: ast.AST) -> str:
        line = self._lines[getattr(node, "lineno", 1) - 1].strip() if isinstance(node, ast.stmt) else ast.unparse(node)
        return line if len(line) <= 100 else line[:97] + "..."

    def _value(self, node: ast.expr, depth: int = 0) -> Found:
        if depth > _MOST_DEPTH:
            return Found(Unread("...", "nested too deeply"), node.lineno)
        match node:
            case ast.Constant(value=int(number)) if number.bit_length() > _MOST_BITS:
                return Found(Unread("a number", "too large"), node.lineno)
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return Found(value, node.lineno)
            case ast.Name(id=name):
                return self._name(name, node)
            case ast.Attribute():
                return Found(self._attribute(node), node.lineno)
            case ast.Dict():
                pairs = list(zip(node.keys, node.values, strict=True))
                return self._mapping(node, [(self._key(key, depth), value) for key, value in pairs], depth)
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return self._mapping(node, [(word.arg, word.value) for word in node.keywords], depth)
            case ast.Call(func=ast.Attribute()) if self._attribute(node.func) == Reference("os.path.join") and not node.keywords:
                return self._joined(node, [self._value(part, depth + 1) for part in node.args])
            case ast.List() | ast.Tuple() | ast.Set():
                return Found(tuple(self._value(part, depth + 1) for part in node.elts), node.lineno)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign):
                inner = self._value(node.operand, depth + 1).value
                if _is_number(inner):
                    return Found(-inner if isinstance(sign, ast.USub) else inner, node.lineno)
            case ast.BinOp():
                left, right = self._value(node.left, depth + 1), self._value(node.right, depth + 1)
                return Found(self._combine(node, node.op, left, right), node.lineno)
            case ast.JoinedStr():
                return self._formatted(node, depth)
        return Found(Unread(self._source(node)), node.lineno)

    def _name(self, name: str, node: ast.AST) -> Found:
        if name in self._config.values:
            self._config.used.add(name)
            return self._config.values[name]
        line = getattr(node, "lineno", 1)
        if name in self._imports:
            return Found(Reference(self._imports[name]), line)
        return Found(Unread(name, "a name that is not assigned in this file"), line)

    def _attribute(self, node: ast.expr) -> Reference | Unread:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self._imports and inner.id not in self._config.values:
            return Reference(".".join([self._imports[inner.id], *reversed(parts)]))
        return Unread(self._source(node))

    def _key(self, node: ast.expr | None, depth: int) -> str | None:
        """A key as text; None stands for `**`; an unreadable key is refused by `_mapping`."""
        if node is None:
            return None
        value = self._value(node, depth + 1).value
        return value if isinstance(value, str) else ""

    def _mapping(self, node: ast.expr, pairs: list[tuple[str | None, ast.expr]], depth: int) -> Found:
        found: dict[str, Found] = {}
        for key, value in pairs:
            entry = self._value(value, depth + 1)
            if key is None and isinstance(entry.value, dict):
                found |= entry.value
            elif not key:
                return Found(Unread(self._source(node), "a dict with a key that cannot be read"), node.lineno)
            else:
                found[key] = entry
        return Found(found, node.lineno)

    def _combine(self, node: ast.AST, sign: ast.operator, left: Found, right: Found) -> Any:
        """The result of `left sign right`, or an Unread."""
        one, two = left.value, right.value
        if isinstance(sign, ast.Add):
            if isinstance(one, str) and isinstance(two, str) and len(one) + len(two) <= _MOST_TEXT:
                return one + two
            if isinstance(one, tuple) and isinstance(two, tuple) and len(one) + len(two) <= _MOST_ITEMS:
                return one + two
        function = _NUMBERS.get(type(sign))
        if function is None or not _is_number(one) or not _is_number(two):
            return Unread(self._source(node))
        if isinstance(sign, ast.Pow) and (abs(two) > _MOST_BITS or abs(one) > 1 << 32):
            return Unread(self._source(node), "a number too large")
        try:
            result = function(one, two)
        except (ArithmeticError, ValueError) as error:
            return Unread(self._source(node), str(error))
        large = isinstance(result, complex) or (isinstance(result, int) and result.bit_length() > _MOST_BITS)
        return Unread(self._source(node), "a number too large") if large else result

    def _joined(self, node: ast.expr, parts: list[Found]) -> Found:
        texts = [part.value for part in parts]
        if not texts or not all(isinstance(text, str) for text in texts):
            return Found(Unread(self._source(node)), node.lineno)
        return Found(posixpath.join(*texts)[:_MOST_TEXT], node.lineno)

    def _formatted(self, node: ast.JoinedStr, depth: int) -> Found:
        text = ""
        for part in node.values:
            plain = isinstance(part, ast.FormattedValue) and part.conversion == -1 and part.format_spec is None
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            value = self._value(inner, depth + 1).value
            if not (plain or isinstance(part, ast.Constant)) or not (isinstance(value, str) or _is_number(value)):
                return Found(Unread(self._source(node)), node.lineno)
            text = (text + str(value))[:_MOST_TEXT]
        return Found(text, node.lineno)
