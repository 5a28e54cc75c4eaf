"""`intervale quickstart`: the whole journey on what is in the package, `nano` and `foodemoji`; no network, no GPU, a few minutes.

Promises: every step is the command a user would call (recipe.yaml and the folders are theirs to look into); a stopped one goes on
where it stopped, a finished one only says what it found. Cost: about 1 GiB of memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intervale.cli.output import note, result, safe
from intervale.core.errors import UserError
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.train.recipe import TrainRecipe

MARK = "quickstart.json"
_KIND = "intervale quickstart"
MODES = ("strict", "likelihood")
_SHOWN = 6


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything; the same command continues or repeats what it found.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another order of the data and other fresh LoRA matrices.")] = 42,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; an earlier one is kept beside as NAME.old-1.")] = False,
    then_serve: Annotated[
        bool, typer.Option("--serve", help="Then open a page with the tuned model, its base and the report, until Ctrl-C.")
    ] = False,
) -> None:
    """See it work: score the embedded model on food drawings, tune it, score it again on artists it never saw, write a report."""
    from intervale.core.files import locked

    with locked(out), _saying_how_to_go_on():
        found = _open(out, seed, fresh)
        if found.get("status") != "done":
            found = _journey(out, seed)
    for line in _told(out, found):
        result(safe(line))
    if then_serve:
        from intervale.cli.serve import serve

        serve(str(out / "run"), report=out / "report.html")


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note(say("\nstopped; the same command goes on from here", "\n已停止；再次运行同一命令即可继续"))
        sys.exit(130)


def _journey(out: Path, seed: int) -> dict[str, Any]:
    """Every step that is not done yet; what the mark then says. `seconds` are those of this call."""
    begun = time.monotonic()
    for left in (*out.glob(".data.*.partial"), *out.glob(".tuned.*.partial")):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    recipe = _prepare(out, seed)
    _evaluate(recipe.model, recipe, out, "before")
    _train(recipe, out)
    _export(out)
    _evaluate(str(out / "tuned"), recipe, out, "after")
    found = _compare(out) | {"kind": _KIND, "status": "done", "seed": seed}
    found |= {"seconds": round(time.monotonic() - begun, 1), "peak_gib": round(_peak(), 2)}
    _mark(out, found)
    return found


def _open(out: Path, seed: int, fresh: bool) -> dict[str, Any]:
    """What an earlier quickstart in `out` left; marks the folder as ours before anything else is written."""
    from intervale.core.files import disk_errors, read_object, set_aside

    with disk_errors(out):
        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    begin: dict[str, Any] = {"kind": _KIND, "status": "running", "seed": seed}
    if not empty:
        if not (out / MARK).is_file():
            raise UserError(f"{out} exists and is not a quickstart", "choose another folder with --out, or remove it")
        if not fresh:
            found = read_object(out / MARK, "kind", "status", "seed")
            if found["kind"] != _KIND:
                raise UserError(f"{out / MARK} is not a quickstart's", "choose another folder with --out")
            if found["seed"] != seed:
                raise UserError(f"{out} was made with seed {found['seed']}, not {seed}", "give another --out, or --fresh to start over")
            whole = all((out / name).exists() for name in ("report.html", "tuned", "run", "data"))
            return found if whole else begin  # what was removed is made again
        aside = set_aside(out)
        note(say(f"the earlier one is kept as {aside}", f"先前的结果保留在 {aside}"))
    _mark(out, begin)
    return begin


def _mark(out: Path, value: dict[str, Any]) -> None:
    from intervale.core.files import write_json

    write_json(out / MARK, value)


def _step(number: int, english: str, chinese: str) -> None:
    note(f"\n[{number}/6] " + say(english, chinese))


def _prepare(out: Path, seed: int) -> TrainRecipe:
    """The data folder, and the recipe as OUT/recipe.yaml; both only once."""
    import yaml

    from intervale.cli.prepare import foodieqa
    from intervale.core.config import load_recipe
    from intervale.core.embedded import ASSETS
    from intervale.core.files import write_atomic
    from intervale.train.recipe import TrainRecipe

    _step(1, "the data: food drawn by seven artists, two of them only for testing", "数据：七位画师画的食物，其中两位只用于测试")
    if not (out / "data").is_dir():
        foodieqa(Path(_own("foodemoji")), out / "data", question_language="both", eval_fraction=None)
    paths = [f"{key}={json.dumps(str(out / place))}" for key, place in _PLACES]
    if (out / "recipe.yaml").is_file():
        return load_recipe(out / "recipe.yaml", TrainRecipe, paths)
    recipe = load_recipe(ASSETS / "quickstart.yaml", TrainRecipe, [*paths, f"train.seed={seed}", f"model={json.dumps(_own('nano'))}"])
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True))
    return recipe


def _own(name: str) -> str:
    """What the package calls `name`, whatever lies in the user's folder under that name."""
    from intervale.core.embedded import ASSETS, embedded

    return name if embedded(name) else str(ASSETS / name)


_PLACES = (("out", "run"), ("data.train", "data/train.jsonl"), ("data.eval", "data/eval.jsonl"))


def _evaluate(model: str, recipe: TrainRecipe, out: Path, name: str) -> None:
    """The greedy answer must name the right choice (strict), and the most likely choice, each into a folder of its own."""
    from intervale.evaluate.run import evaluate, plan

    if name == "before":
        _step(2, "the score before: the model as it is", "训练前的成绩：原始模型")
    else:
        _step(5, "the score after: the exported model, the same questions", "训练后的成绩：导出的模型，同样的题目")
    assert recipe.data.eval is not None
    for mode in MODES:
        job = plan(model, Path(recipe.data.eval), out / f"{name}-{mode}", mode=mode, max_new_tokens=24, max_tiles=recipe.data.max_tiles)
        summary = evaluate(job, fresh=False, tell=note)
        note(f"  {mode}: {summary['accuracy']:.1%}  [{summary['interval'][0]:.1%}, {summary['interval'][1]:.1%}]  n={summary['n']}")


def _train(recipe: TrainRecipe, out: Path) -> None:
    from intervale.train.loop import train

    _step(3, "tuning: LoRA on the language model, on the other five artists' drawings", "训练：在另外五位画师的图上做 LoRA")
    begun = (out / "run" / "run.json").is_file()
    outcome = train(recipe, "quickstart", resume=begun, fresh=False, dry_run=False, tell=_brief)
    if outcome.exit_code:
        note(say("stopped and saved; the same command goes on from here", "已停止并保存；再次运行同一命令即可继续"))
        sys.exit(outcome.exit_code)


def _brief(text: str) -> None:
    """Progress of the training without its hints for the next command: quickstart gives its own."""
    if not text.startswith("  intervale ") and "--resume" not in text:
        note("  " + text)


def _export(out: Path) -> None:
    from intervale.core.files import read_object, set_aside
    from intervale.export.export import export

    _step(4, "export: merged into one plain model folder, reloaded and compared", "导出：合并成一个普通的模型目录，重新载入并比较")
    run = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))
    if (out / "tuned").is_dir():
        made = read_object(out / "tuned" / "intervale.json")
        if made.get("data") == run["data"] and made.get("recipe", {}).get("train") == run["recipe"]["train"]:
            return
        set_aside(out / "tuned")  # of another run
    export(out / "run", out / "tuned", "hf", dtype=None, tell=lambda text: note("  " + text))


def _compare(out: Path) -> dict[str, Any]:
    """Write report.html and report.json; what the mark keeps of them."""
    from intervale.evaluate.compare import compare, write_report
    from intervale.evaluate.model_card import write_card

    _step(6, "the report", "报告")
    strict, likelihood = (compare(out / f"before-{mode}", out / f"after-{mode}") for mode in MODES)
    write_report(strict, out, likelihood)
    write_card(out / "tuned", [strict | {"also": likelihood}])
    kept = ("n", "pairs", "difference", "mcnemar", "scored_on_training_items")
    sides = {
        name: {mode: told[name]["accuracy"] for mode, told in zip(MODES, (strict, likelihood), strict=True)} for name in ("before", "after")
    }
    examples = _examples(strict)
    return {key: strict[key] for key in kept} | {"accuracy": sides, "examples": examples}


def _examples(found: dict[str, Any]) -> list[dict[str, str]]:
    """A few items, evenly over what was fixed, and one of what is still wrong: each picture once."""
    keys = ("question", "right", "before", "after")
    fixed, wrong = found["fixed"], found["both_wrong"] + found["broken"]
    chosen = [fixed[at * len(fixed) // (_SHOWN - 1)] for at in range(_SHOWN - 1)] if len(fixed) >= _SHOWN else fixed
    return [{key: str(item[key]) for key in keys} | {"picture": item["images"][0]} for item in [*chosen, *wrong[:1]]]


def _peak() -> float:
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20


def _next(out: Path, examples: list[dict[str, str]]) -> list[str]:
    tuned, recipe, mine = (quote(str(out / name)) for name in ("tuned", "recipe.yaml", "mine"))
    chat = [f"  intervale chat {tuned} -i {quote(str(out / 'data' / examples[0]['picture']))}"] if examples else []
    return [*chat, f"  intervale train {recipe} --out {mine} --set train.learning_rate=1e-3"]


def _on_what(found: dict[str, Any]) -> str:
    count = found["n"]
    if found.get("scored_on_training_items"):
        return say(f"WARNING: scored on training items, {count} questions:", f"警告：在训练数据上评测，共 {count} 题：")
    return say(f"on drawings of two artists it never trained on, {count} questions:", f"在两位从未训练过的画师的图上，共 {count} 题：")


def _told(out: Path, found: dict[str, Any]) -> list[str]:
    """What a finished quickstart says: the number, some answers, and where to go from here."""
    before, after = found["accuracy"]["before"], found["accuracy"]["after"]
    pairs, (low, high) = found["pairs"], found["difference"]["interval"]
    lines = [""]
    for item in found["examples"]:
        lines += [
            f"{out / 'data' / item['picture']}",
            f"  {item['question']}  ({say('right', '正确')}: {item['right']})",
            f"    {say('before', '训练前')}: {item['before'] or '-'}",
            f"    {say('after', '训练后')}:  {item['after'] or '-'}",
        ]
    lines += [
        "",
        _on_what(found),
        f"{before['strict']:.1%} -> {after['strict']:.1%}  {100 * found['difference']['value']:+.1f} {say('points', '个百分点')}  "
        f"[{100 * low:+.1f}, {100 * high:+.1f}]  McNemar p = {found['mcnemar']['p']:.2g}",
        say(f"fixed {pairs['fixed']}, broken {pairs['broken']}, both right {pairs['both_right']}, both wrong {pairs['both_wrong']}",
            f"改对 {pairs['fixed']}，改错 {pairs['broken']}，都对 {pairs['both_right']}，都错 {pairs['both_wrong']}"),
        say(f"by likelihood: {before['likelihood']:.1%} -> {after['likelihood']:.1%}; seed {found['seed']}, {found['seconds']:.0f} s, {found['peak_gib']:.1f} GiB",
            f"按似然：{before['likelihood']:.1%} -> {after['likelihood']:.1%}；种子 {found['seed']}，{found['seconds']:.0f} 秒，{found['peak_gib']:.1f} GiB"),
        "",
        say(f"open {out / 'report.html'}", f"请打开 {out / 'report.html'}"),
        say("next:", "接下来："),
        *_next(out, found["examples"]),
        f"  intervale quickstart --out {quote(str(out))} --serve",
    ]  # fmt: skip
    return lines
