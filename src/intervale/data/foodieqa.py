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
from intervale.data.foodie_items import NO_ENGLISH, Item, has_english, labels, read_item
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


def sample_of(item: Item, task: str, language: str, split: Any, number: int, root: Path) -> Sample:
    """The item as the tutorial words it: in Chinese a single picture's answer names the dish too (there is no English name to give);
    four pictures are the options, lettered. Raises: UserError for a picture that is not below `root`, or a stray `<image>`."""
    said = item.choices[item.answer]
    if task == "sivqa":
        asked = f"{IMAGE}\n{item.question}"
        said += NAMES_THE_DISH + item.dish if language == "zh" else ""
    else:
        asked = "".join(f"{label}: {IMAGE}\n" for label in labels(len(item.names), language)) + item.question
    name = item.id + ("-en" if language == "en" else "")
    fields = {"id": name, "choices": list(item.choices), "answer": item.answer, "tags": item.tags, "split": split}
    return build([("user", asked), ("assistant", said)], list(item.names), fields, item.where, number, root)


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
            if one == "en" and language == "both" and not has_english(item, task):
                counts[NO_ENGLISH] += 1
                continue
            samples.append(sample_of(read_item(item, task, one, where, counts), task, one, item.get("split"), number, root))
        return samples

    return collect(source, adapt, counts)
