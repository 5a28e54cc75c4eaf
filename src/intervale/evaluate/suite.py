"""`evaluate --suite foodieqa`: every item by every prompt that was asked for, in every view and order, read in every mode.

Promises: what it will cost is said before the weights are read; every answer is on file before the next batch, so a suite killed
at any item goes on and ends with the summaries of a straight one (but for its times); what was left out is listed; each
combination is a finished evaluation of its own, for `compare`. Cost: an asking is one prompt and its answer, whatever the modes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from intervale.core.errors import UserError, nearest
from intervale.core.files import inside, locked, write_json
from intervale.core.lang import say
from intervale.core.records import data_digest
from intervale.evaluate.foodieqa import (
    AS_IS,
    LANGUAGES,
    SEEDED,
    TASKS,
    VIEWS,
    Asking,
    ask_item,
    prompt_text,
    prompts_digest,
    prompts_of,
    view_applies,
)
from intervale.evaluate.identity import pictures_digest, refuse_changed
from intervale.evaluate.suite_data import Part, SuiteData
from intervale.evaluate.suite_folder import append_answer, begin_suite, open_suite, read_answers, write_suite
from intervale.evaluate.suite_progress import Progress
from intervale.evaluate.suite_score import FALLBACKS, MODES, needs_text

Tell = Callable[[str], None]
ROTATIONS, PREFIXES = ("none", "seeded", "all"), ("assistant", "user")


@dataclass(frozen=True)
class Settings:
    """What is asked for. `prompts` empty: all of the protocol's; `views` beside the picture's; `fallback` is the official mode's.

    `prefix_as`: the words that an answer is forced to begin with begin it (assistant), or end the question (user).
    """

    languages: tuple[str, ...] = LANGUAGES
    modes: tuple[str, ...] = MODES
    prompts: tuple[str, ...] = ()
    rotate: str = "none"
    views: tuple[str, ...] = ("picture",)
    fallback: str = "wrong"
    seed: int = 0
    prefix_as: str = "assistant"

    @property
    def text(self) -> bool:
        """Is an answer to be generated?"""
        return needs_text(self.modes)

    @property
    def letters(self) -> bool:
        """Are the letters to be scored?"""
        return "likelihood" in self.modes


@dataclass(frozen=True)
class Answers:
    """Answers as they come together, `key` first, and files of the asker's own that belong into the folder from the first answer on."""

    stream: Generator[list[dict[str, Any]], None, None]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class Asker(Protocol):
    """Whoever answers: a model in this process, or an endpoint."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one."""
        ...

    def about(self) -> dict[str, Any]:
        """The model, for summaries."""
        ...

    def protocol(self) -> dict[str, Any]:
        """How it is asked, as far as that is the asker's."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where the model lies; None for one behind an address, of which nothing is known."""
        ...

    def tiles_of(self, size: tuple[int, int]) -> int | None:
        """Tiles of a picture; None where that is not known."""
        ...

    def answers(self, askings: Sequence[Asking], sizes: dict[Path, tuple[int, int]], done: set[str], out: Path, tell: Tell) -> Answers:
        """Answers for all that is not in `done` (and perhaps for some that are); ready to answer when it returns. `out` is only read."""
        ...

    def price(self, prompt_tokens: int, tokens: int) -> float | None:
        """What so many tokens cost; None where that is not known."""
        ...


def checked(settings: Settings) -> Settings:
    """The settings. Raises: UserError for a word that is not known, or a fallback that nothing uses."""
    known = {"languages": LANGUAGES, "modes": MODES, "views": VIEWS}
    for name, words in known.items():
        for word in getattr(settings, name):
            if word not in words:
                raise UserError(f"unknown {name[:-1]} {word!r}{nearest(word, words)}", f"use some of {', '.join(words)}")
    single = (
        ("rotation", settings.rotate, ROTATIONS),
        ("fallback", settings.fallback, FALLBACKS),
        ("prefix", settings.prefix_as, PREFIXES),
    )
    for name, word, words in single:
        if word not in words:
            raise UserError(f"unknown {name} {word!r}{nearest(word, words)}", f"use one of {', '.join(words)}")
    if not settings.modes or not settings.languages or not settings.views:
        raise UserError("nothing is asked for", "name at least one mode, language and view")
    return settings


def chosen_prompts(part: Part, settings: Settings) -> list[str]:
    """The prompts to ask a part by: those named that it has, else all of the protocol's."""
    if not settings.prompts:
        return list(prompts_of(part.task, part.language))
    found = []
    for name in settings.prompts:
        try:
            prompt_text(part.task, part.language, name)
        except UserError:
            continue
        found.append(name)
    return found


def askings_of(data: SuiteData, settings: Settings) -> list[Asking]:
    """Everything to ask, an item's askings beside each other (they share its pictures), items in the file's order.

    Raises: UserError for a prompt that no part has, or when nothing is left to ask.
    """
    for name in settings.prompts:
        if not any(name in chosen_prompts(part, settings) for part in data.parts):
            part = data.parts[0]
            prompt_text(part.task, part.language, name)  # tells which there are
    found: list[Asking] = []
    for task in TASKS:
        parts = [part for part in data.parts if part.task == task]
        by_item: dict[str, list[Asking]] = {}
        for part in parts:
            prompts = chosen_prompts(part, settings)
            for item, plain in part.items:
                own = by_item.setdefault(item.id, [])
                views = [view for view in settings.views if view_applies(view, task, part.language, item)]
                for turn in _turns(settings.rotate, len(plain.choices)):
                    own += [
                        ask_item(item, plain, task, part.language, view, prompt, turn, seed=settings.seed, prefix_as=settings.prefix_as)
                        for view in views
                        for prompt in prompts
                    ]
        found += [asking for own in by_item.values() for asking in own]
    if not found:
        raise UserError("no item can be asked this way", "choose other --tasks, --langs, --prompts or --baselines")
    return found


def _turns(rotate: str, count: int) -> list[str]:
    if rotate == "seeded":
        return [SEEDED]
    return [AS_IS, *(f"turn{steps}" for steps in range(1, count))] if rotate == "all" else [AS_IS]


def cost(data: SuiteData, askings: Sequence[Asking], asker: Asker, settings: Settings) -> list[str]:
    """What it will take, a line a task and language, then in all: items, prompts, orders, askings, pictures, tiles."""
    lines = []
    for part in data.parts:
        own = [asking for asking in askings if (asking.task, asking.language) == (part.task, part.language)]
        prompts, turns, views = ({getattr(asking, name) for asking in own} for name in ("prompt", "turn", "view"))
        many = " x ".join(
            f"{len(found)} {name}{'s' * (len(found) != 1)}" for found, name in ((prompts, "prompt"), (turns, "order"), (views, "view"))
        )
        viele = f"{len(prompts)} 个提示 x {len(turns)} 种选项顺序 x {len(views)} 种呈现"
        left = f"; left out: {len(part.left_out)} of {part.in_file}" if part.left_out else ""
        weg = f"；跳过 {part.in_file} 条中的 {len(part.left_out)} 条" if part.left_out else ""
        lines.append(say(f"{part.task} {part.language}: {len(part.items)} items, {many} = {len(own)} askings{left}",
                         f"{part.task} {part.language}：{len(part.items)} 条，{viele} = {len(own)} 次提问{weg}"))  # fmt: skip
    shown = [data.sizes[path] for path in _pictures(askings)]
    tiles = [asker.tiles_of(size) for size in shown]
    known = sum(count for count in tiles if count is not None)
    times = sum(len(asking.record.images) for asking in askings)
    cut = say(f" ({known} tiles)", f"（{known} 个图块）") if None not in tiles else say(f", sent {times} times", f"，共发送 {times} 次")
    ways = [say("one answer each", "每次一个回答")] * settings.text + [say("the letters scored", "字母打分")] * settings.letters
    lines.append(say(f"in all {len(askings)} askings ({', '.join(ways)}), {len(shown)} different pictures{cut}; "
                     "the time is told after the first few",
                     f"共 {len(askings)} 次提问（{'，'.join(ways)}），{len(shown)} 张不同的图片{cut}；前几次之后给出预计时间"))  # fmt: skip
    return lines


def _work(asking: Asking, data: SuiteData, asker: Asker) -> float:
    """How long an asking takes, in about 256 tokens: its words, and its pictures' tiles."""
    sizes = [data.sizes[inside(asking.record.root, image, asking.record.where)] for image in asking.record.images]
    return 1.0 + sum(asker.tiles_of(size) or 1 for size in sizes)


def _pictures(askings: Sequence[Asking]) -> list[Path]:
    """The different pictures that are shown."""
    return list(
        dict.fromkeys(inside(asking.record.root, image, asking.record.where) for asking in askings for image in asking.record.images)
    )


def identity_of(data: SuiteData, askings: Sequence[Asking], asker: Asker, settings: Settings) -> dict[str, Any]:
    """What must be equal for two runs to be one: the content of the suite's protocol.json."""
    files: dict[str, Any] = {}
    for part in data.parts:
        plains, pictures = part.plains, pictures_digest([data.keys[plain.images] for plain in part.plains])
        files[f"{part.task}-{part.language}"] = {"items": len(plains), "digest": data_digest(plains), "pictures": pictures}
    return {
        "suite": "foodieqa",
        "prompts_digest": prompts_digest(),
        "settings": {**{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}, **asker.protocol()},
        "askings": len(askings),
        "model": asker.identity(),
        "data": files,
    }


def run_suite(
    data: SuiteData,
    settings: Settings,
    asker: Asker,
    out: Path,
    *,
    fresh: bool = False,
    tell: Tell,
    on_answer: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Ask what is not answered yet, write every combination's folder and suite.json, return the latter.

    `on_answer` is called after each answer that was written. Ctrl-C leaves every answer that was written; the same call continues.
    """
    askings = askings_of(data, settings)
    identity = identity_of(data, askings, asker, settings)
    with locked(out):
        state, finished = open_suite(out, identity, fresh, tell)
        if finished is not None:
            return finished
        done = {answer["key"]: answer for answer in read_answers(out)}
        if done:
            tell(say(f"continuing: {len(done)} of {len(askings)} askings are done", f"继续：{len(askings)} 次提问中已完成 {len(done)} 次"))
        if len(done) < len(askings):
            _ask_rest(askings, data, asker, identity, out, state, set(done), tell, on_answer)
        for part in data.parts:
            refuse_changed(part.plains, [data.keys[plain.images] for plain in part.plains])
        return write_suite(out, data, settings, asker, identity, askings, tell)


def _ask_rest(
    askings: Sequence[Asking], data: SuiteData, asker: Asker, identity: dict[str, Any], out: Path, state: str, done: set[str], tell: Tell,
    on_answer: Callable[[], None] | None,
) -> None:  # fmt: skip
    wanted = {asking.key for asking in askings}
    try:
        answers = asker.answers(askings, data.sizes, set(done), out, tell)
        left = {asking.key: _work(asking, data, asker) for asking in askings if asking.key not in done}
        progress = Progress(len(askings), left, tell, None if asker.price(1, 1) is None else lambda p, n: asker.price(p, n) or 0.0)
        with closing(answers.stream):
            for together in answers.stream:
                if state == "new":
                    begin_suite(out, identity)  # only now: a model that fails at once leaves no folder behind
                    state = "resume"
                for name, content in answers.files.items():
                    if not (out / name).exists():
                        write_json(out / name, content)
                new = [answer for answer in together if answer["key"] not in done]
                for answer in new:
                    assert answer["key"] in wanted
                    append_answer(out, answer)
                    done.add(answer["key"])
                    if on_answer:
                        on_answer()
                progress.step(new)
    except (KeyboardInterrupt, UserError):
        if done:
            tell(say(f"stopped after {len(done)} of {len(askings)} askings; the same command continues",
                     f"已停止：完成 {len(done)} / {len(askings)} 次提问；再次运行同一命令即可继续"))  # fmt: skip
        raise
    assert wanted <= done, "an asker answers everything or raises"
