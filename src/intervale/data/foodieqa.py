"""The FoodieQA benchmark's files (Li et al., EMNLP 2024) as records; the answers are worded as the tutorial words them.

Promises: every item is a Sample or a Fault; `answer` stays the index of the right choice; what an item lacks in English is a
fault only where English alone was asked for. Other data sets in this shape may add `split`, `artist` and a licence.json.
Nothing of the benchmark is in this package: only its field names are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.core.records import IMAGE
from intervale.data.formats import Reading, Sample, build, collect

FILES = {
    "sivqa": ("sivqa_tidy.json", "sivqa_filtered_bi.json", "sivqa_filtered.json"),
    "mivqa": ("mivqa_tidy.json", "mivqa_filtered.json"),
    "textqa": ("textqa_tidy.json", "textqa_filtered.json"),
}
LANGUAGES = {"zh": ("zh",), "en": ("en",), "both": ("zh", "en")}
LICENCE = {
    "name": "CC BY-NC-ND 4.0",
    "terms": "evaluation only: the authors do not permit training models or systems on it; research only, no commercial use; "
    "no redistribution of changed versions",
    "url": "https://huggingface.co/datasets/lyan62/FoodieQA",
}
NAMES_THE_DISH = "，图中的菜是"  # the tutorial's answer: the right choice, this, the dish
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION = {"zh": "图", "en": "Option "}
_SUFFIX = {"zh": "", "en": "_en"}
_BRACKETS = str.maketrans({"(": "（", ")": "）"})
NO_ENGLISH = "items without English"
CHOICES_AS_TEXT = "mivqa items whose 'choices' is one text (not used: the pictures are the options)"


def normal_cuisine(raw: str) -> str:
    """A cuisine for grouping: full-width brackets, no white space, Shanghai's two names one (as the authors count them)."""
    name = "".join(raw.split()).translate(_BRACKETS)
    return "上海菜" if name.startswith("上海") else name


def find_source(src: Path, task: str) -> Path:
    """The task's JSON file in `src` (or `src` itself when it is a file). Raises: UserError that names what was looked for."""
    if src.is_file():
        return src
    for name in FILES[task]:
        if (src / name).is_file():
            return src / name
    others = [other for other, names in FILES.items() if other != task and any((src / name).is_file() for name in names)]
    fix = (
        f"there is {' and '.join(others)} data here: say --task {others[0]}"
        if others
        else "name the folder that holds the benchmark's JSON files and images/"
    )
    raise UserError(f"{src}: no {' or '.join(FILES[task])}", fix)


def licence_of(source: Path) -> dict[str, str]:
    """{name, terms, url?} of licence.json beside `source`, the JSON file; without one the benchmark's own. Raises: UserError."""
    own = source.parent / "licence.json"
    if not own.is_file():
        return LICENCE
    facts = read_object(own, "name", "terms")
    for key, value in facts.items():
        if key in LICENCE and not (isinstance(value, str) and value.strip()):
            raise UserError(f"{own}: {key!r} is empty or not a text", 'write {"name": "...", "terms": "...", "url": "..."}')
    return {key: facts[key].strip() for key in LICENCE if key in facts}


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


def _sample(
    item: dict[str, Any],
    where: str,
    number: int,
    root: Path,
    *,
    asked: str,
    said: str,
    names: list[Any],
    choices: list[str],
    answer: int,
    tags: dict[str, str],
    language: str,
) -> Sample:
    name = _id(item, where) + ("-en" if language == "en" else "")
    fields = {"id": name, "choices": choices, "answer": answer, "tags": tags, "split": item.get("split")}
    return build([("user", asked), ("assistant", said)], names, fields, where, number, root)


def _single(item: dict[str, Any], where: str, number: int, root: Path, language: str) -> Sample:
    """sivqa: one picture; in Chinese the answer names the dish too (there is no English name to give)."""
    meta = _meta(item, where)
    dish = _text(item if "food_name" in item else meta, "food_name", where)
    choices = _choices(item, "choices" + _SUFFIX[language], where)
    answer = _answer(item, len(choices), where)
    return _sample(
        item,
        where,
        number,
        root,
        language=language,
        choices=choices,
        answer=answer,
        asked=f"{IMAGE}\n{_text(item, 'question' + _SUFFIX[language], where)}",
        said=choices[answer] + (NAMES_THE_DISH + dish if language == "zh" else ""),
        names=[_text(meta, "food_file", where)],
        tags=_tags(item, dish, _optional(meta.get("food_type")), where),
    )


def _multi(item: dict[str, Any], where: str, number: int, root: Path, language: str, counts: Counter[str]) -> Sample:
    """mivqa: the pictures are the options, lettered; the item's own texts are the choices when it has one a picture."""
    names = item.get("images")
    if not isinstance(names, list) or not 2 <= len(names) <= len(_LETTERS):
        raise UserError(f"{where}: 'images' is not a list of two or more pictures", "give the item its pictures")
    labels = [_OPTION[language] + letter for letter in _LETTERS[: len(names)]]
    own = item.get("choices" + _SUFFIX[language])
    if isinstance(own, str) and own.strip():
        counts[CHOICES_AS_TEXT] += 1
    choices = _choices(item, "choices" + _SUFFIX[language], where) if isinstance(own, list) and own else labels
    if len(choices) != len(names):
        raise UserError(f"{where}: {len(choices)} choices for {len(names)} pictures", "give as many choices as pictures, or none")
    answer = _answer(item, len(choices), where)
    shown = "".join(f"{label}: {IMAGE}\n" for label in labels)
    return _sample(
        item,
        where,
        number,
        root,
        language=language,
        choices=choices,
        answer=answer,
        said=choices[answer],
        names=names,
        asked=shown + _text(item, "question" + _SUFFIX[language], where),
        tags=_tags(item, _optional(item.get("food_name")), _optional(item.get("food_type")), where),
    )


def _words(item: dict[str, Any], where: str, number: int, root: Path, language: str) -> Sample:
    """textqa: no picture."""
    choices = _choices(item, "choices" + _SUFFIX[language], where)
    answer = _answer(item, len(choices), where)
    return _sample(
        item,
        where,
        number,
        root,
        language=language,
        choices=choices,
        answer=answer,
        said=choices[answer],
        names=[],
        asked=_text(item, "question" + _SUFFIX[language], where),
        tags=_tags(item, _text(item, "food_name", where), _optional(item.get("cuisine_type")), where),
    )


def read_foodieqa(src: Path, task: str = "sivqa", language: str = "zh") -> Reading:
    """The items of one task, asked in `language`: zh, en, or both (an English item is one of its own, id + `-en`).

    Raises: UserError when there is no such file or it cannot be read as a whole.
    """
    source = find_source(src, task)
    root = source.parent
    counts: Counter[str] = Counter()

    def adapt(item: dict[str, Any], where: str, number: int) -> list[Sample]:
        samples = []
        for one in LANGUAGES[language]:
            if one == "en" and language == "both" and not (item.get("question_en") and (task == "mivqa" or item.get("choices_en"))):
                counts[NO_ENGLISH] += 1
                continue
            if task == "mivqa":
                samples.append(_multi(item, where, number, root, one, counts))
            else:
                samples.append((_single if task == "sivqa" else _words)(item, where, number, root, one))
        return samples

    return collect(source, adapt, counts)
