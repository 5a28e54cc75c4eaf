"""Recipes: YAML files checked against a pydantic model, with `--set a.b=c` on top.

Promises: an unknown key is refused with the nearest name, a wrong value with its place and what is allowed; a value is never
coerced silently (quotes around a number are an error). The same file and the same overrides give the same recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from intervale.core.errors import UserError, nearest
from intervale.core.files import read_text

Recipe = TypeVar("Recipe", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-5 as a number and on/off/yes/no as text (YAML 1.1 has both otherwise), and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's own attribute)
        first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[1] not in ("bool", "int", "float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    text = str(node.value)
    try:
        return float(text.replace("_", "").replace(".nan", "nan").replace(".inf", "inf"))
    except ValueError:
        return text


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("!exponent", _number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# No sexagesimal 1:30, no octal 010, no dates: a recipe's numbers are written as numbers.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("!exponent", re.compile(r"^[-+]?(\d[\d_]*\.\d*|\.\d+|\.(nan|inf))$", re.IGNORECASE), list("-+.0123456789"))
_EXPONENT = re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """YAML to plain values. Raises: UserError with the line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise UserError(
            f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}", "correct the line (mind spaces and colons)"
        ) from error


def load_recipe(path: Path, model: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises: UserError listing every fault at once."""
    raw = parse_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines", "start from a file in recipes/")
    for override in overrides:
        _set(raw, override)
    try:
        return model.model_validate(raw, strict=True)
    except ValidationError as error:
        faults = _explained(error.errors(), model)
        raise UserError(f"{path}: " + "\n       ".join(faults), "docs/recipe.md lists every key with its values") from error


def _set(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"--set {override!r} has no '='", "write --set train.epochs=3")
    value = parse_yaml(text, f"--set {name}") if text else None
    place = raw
    *outer, last = name.strip().split(".")
    for part in outer:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {name}: {part!r} is not a section", "docs/recipe.md lists every key")
        place = inner
    place[last] = value


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if not isinstance(part, int):  # an item of a list has the fields of every other
            field = getattr(current, "model_fields", {}).get(part)
            current = next(iter(_models_in(field.annotation)), None) if field else None
    return list(getattr(current, "model_fields", {}))


def _models_in(kind: Any) -> list[Any]:
    """The sections that a key may hold: itself, or those in a list or a choice."""
    return [kind] if hasattr(kind, "model_fields") else [found for inner in get_args(kind) for found in _models_in(inner)]


_KINDS = ("str", "bool", "int", "float")


def _place(entry: Any) -> tuple[Any, ...]:
    """Where a fault is, without the names that pydantic gives to the kinds of value that a key may have."""
    own = entry["loc"][-1:] if entry["type"] == "extra_forbidden" else ()  # the user's word, whatever it is
    outer = entry["loc"][: len(entry["loc"]) - len(own)]
    return (*(part for part in outer if isinstance(part, int) or (part.isidentifier() and part not in _KINDS)), *own)


def _explained(entries: Any, model: type[BaseModel]) -> list[str]:
    """A line a fault; what each kind of value of one key says becomes one line, or none where one kind was right and its inside is not."""
    at: dict[tuple[Any, ...], list[Any]] = {}
    for entry in entries:
        at.setdefault(_place(entry), []).append(entry)
    inner = {place[:length] for place in at for length in range(1, len(place))}
    return [_explain(found, place, model) for place, found in at.items() if place not in inner]


def _explain(found: list[Any], location: tuple[Any, ...], model: type[BaseModel]) -> str:
    entry, name = found[0], ".".join(str(part) for part in location)
    if entry["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        every = known or list(model.model_fields)
        elsewhere = [
            f"{section}.{field}" for section in model.model_fields for field in _fields_at(model, (section,)) if field == location[-1]
        ]
        hint = (
            f" (did you mean {elsewhere[0]!r}?)"
            if elsewhere and not nearest(str(location[-1]), every)
            else nearest(str(location[-1]), every)
        )
        return f"unknown key {name!r}{hint}"
    if entry["type"] == "missing":
        return f"{name} is missing"
    if entry["type"] == "value_error":  # our own words
        return (f"{name}: " if name else "") + str(entry["ctx"]["error"])
    told = [other["msg"][0].lower() + other["msg"][1:] for other in found]
    told[1:] = [text.removeprefix("input should be ") for text in told[1:]]
    return f"{name}: {', or '.join(told)} (it is {entry['input']!r})"
