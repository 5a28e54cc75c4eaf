"""`intervale prepare`: a benchmark's or another tool's data as a folder of train.jsonl, eval.jsonl, images/ and dataset.json.

Results go to stdout, the terms of a source to stderr. What is heavy is imported inside the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from intervale import __version__
from intervale.cli.output import note, result, safe
from intervale.core.lang import say

if TYPE_CHECKING:
    from intervale.data.formats import Reading

app = typer.Typer(help="Turn a data set into the one JSONL format.", no_args_is_help=True)

_OUT = Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")]
_ROOT = Annotated[Path, typer.Option(help="The folder the picture paths start from; nothing outside it is read.")]
_SEED = Annotated[int, typer.Option(help="Another seed holds out other items; the same one always the same.")]
_HOLD_OUT = Annotated[
    float | None,
    typer.Option(
        help="Share of the items to hold out, in whole groups that share no picture; 0: none (default: the items' 'split', else 0)."
    ),
]
_SHARE = 0.2  # of FoodieQA's items is held out when nobody says anything
_SKIP = Annotated[
    bool, typer.Option("--skip-bad", help="Leave faulty items out and list them in skipped.jsonl; otherwise one fault stops everything.")
]


@app.command()
def foodieqa(
    src: Annotated[
        Path, typer.Argument(help="A folder with sivqa_tidy.json (or mivqa, textqa) and images/; or foodemoji, the embedded one.")
    ],
    out: _OUT,
    task: Annotated[
        Literal["sivqa", "mivqa", "textqa"], typer.Option(help="One picture, four pictures as options, or text only.")
    ] = "sivqa",
    everything: Annotated[
        bool, typer.Option("--all", help="Train on every item, as the tutorial does; a score on them is a score on training items.")
    ] = False,
    seed: _SEED = 0,
    eval_fraction: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the items to hold out, in whole groups that share no picture and no dish (default: the items' 'split', else {_SHARE})."
        ),
    ] = None,
    question_language: Annotated[Literal["zh", "en", "both"], typer.Option(help="Which of the benchmark's two texts to ask.")] = "zh",
    skip_bad: _SKIP = False,
) -> None:
    """FoodieQA's files (Chinese food, multiple choice), answers worded as in the InternVL2 tutorial."""
    from intervale.core.embedded import embedded
    from intervale.data.foodieqa import find_source, licence_of, read_foodieqa

    if not everything and eval_fraction is not None and not 0 < eval_fraction < 1:
        raise typer.BadParameter("use a number between 0 and 1, or --all to hold nothing out", param_hint="--eval-fraction")
    own = embedded(src)
    source = find_source(own or src, task)
    licence = licence_of(source)
    tell_terms(licence, str(src))
    about = {
        "made_by": _made_by("foodieqa"),
        "source": str(src) if own else str(source),  # where the package lies is no part of what the data are
        "task": task,
        "question_language": question_language,
        "licence": licence,
    }
    reading = read_foodieqa(source, task, question_language)
    _write(reading, out, 0.0 if everything else eval_fraction, _SHARE, seed, skip_bad, about)


@app.command()
def llava(
    file: Annotated[
        Path, typer.Argument(help="A JSON list or JSON-lines file of LLaVA conversations, such as the tutorial's sivqa_llava.json.")
    ],
    out: _OUT,
    image_root: _ROOT,
    eval_fraction: _HOLD_OUT = None,
    seed: _SEED = 0,
    skip_bad: _SKIP = False,
) -> None:
    """LLaVA conversations: {"image": path, list or absent, "conversations": [{"from", "value"}]}."""
    from intervale.data.formats import read_llava

    _convert(read_llava, "llava", file, out, image_root, eval_fraction, seed, skip_bad)


@app.command()
def messages(
    file: Annotated[
        Path, typer.Argument(help="JSON lines (or a JSON list) with 'messages': ms-swift's with 'images', or OpenAI content parts.")
    ],
    out: _OUT,
    image_root: _ROOT,
    eval_fraction: _HOLD_OUT = None,
    seed: _SEED = 0,
    skip_bad: _SKIP = False,
) -> None:
    """ms-swift messages with images, or OpenAI messages whose parts name local pictures."""
    from intervale.data.formats import read_messages

    _convert(read_messages, "messages", file, out, image_root, eval_fraction, seed, skip_bad)


def _made_by(command: str) -> str:
    return f"intervale {__version__} prepare {command}"


def tell_terms(licence: dict[str, str], name: str) -> None:
    """The terms of what is read, on stderr."""
    from intervale.data.foodieqa import LICENCE

    if licence == LICENCE:
        return note(
            say(
                f"FoodieQA's terms ({LICENCE['name']}, {LICENCE['url']}): evaluation only, research only.\n"
                "Its authors do not permit training on it, commercial use, or passing on changed versions. Whether you may is yours to settle.",
                f"FoodieQA 的许可（{LICENCE['name']}，{LICENCE['url']}）：仅供评测，仅供研究。\n"
                "作者不允许用它训练、商用或分发修改后的版本；您能否使用，请自行确认。",
            )
        )
    called = [licence["name"], licence["url"]] if "url" in licence else [licence["name"]]
    note(
        safe(say(f"terms of {name} ({', '.join(called)}): {licence['terms']}", f"{name} 的许可（{'，'.join(called)}）：{licence['terms']}"))
    )


def _convert(
    read: Callable[[Path, Path], Reading], name: str, file: Path, out: Path, root: Path, fraction: float | None, seed: int, skip_bad: bool
) -> None:
    from intervale.core.errors import UserError

    if fraction is not None and not 0 <= fraction < 1:
        raise typer.BadParameter("use a number from 0 up to (not including) 1", param_hint="--eval-fraction")
    if not root.is_dir():
        raise UserError(f"--image-root {root}: no such folder", "name the folder the picture paths start from")
    _write(read(file, root), out, fraction, 0.0, seed, skip_bad, {"made_by": _made_by(name), "source": str(file), "task": name})


def _write(reading: Reading, out: Path, fraction: float | None, otherwise: float, seed: int, skip_bad: bool, about: dict[str, Any]) -> None:
    """Write the folder and say what is in it."""
    from intervale.data.writer import write_dataset

    card = write_dataset(reading, out, fraction=fraction, otherwise=otherwise, seed=seed, skip_bad=skip_bad, about=about)
    for name, facts in card["files"].items():
        items, pictures = facts["items"], facts["pictures"]
        result(say(f"{out / name}: {items} items, {pictures} pictures", f"{out / name}：{items} 条，{pictures} 张图片"))
    split = card["split"]
    if split is None:
        result(
            say(
                "nothing was held out: any score on these items is a score on training items (dataset.json says so)",
                "没有留出评测集：在这些数据上得到的分数都是训练集上的分数（dataset.json 中已注明）",
            )
        )
    elif split["by"] == "source":
        without_picture = any(not sample.record.images for sample in reading.samples)
        result(safe(_own_split(split, without_picture)))
    else:
        share, asked = split["eval_fraction"], split["eval_fraction_asked"]
        dishes = (", no dish", "、菜品") if split["kept_apart"] else ("", "")
        result(
            say(
                f"held out {share:.1%} (asked: {asked:.1%}), seed {seed}: no picture{dishes[0]} and no question without a picture is on both sides "
                f"({split['tied_groups']} groups, the largest of {split['largest_group']} items)",
                f"留出 {share:.1%}（要求 {asked:.1%}），种子 {seed}：两边没有相同的图片{dishes[1]}或无图问题"
                f"（共 {split['tied_groups']} 组，最大一组 {split['largest_group']} 条）",
            )
        )
    if card["skipped"]:
        skipped = card["skipped"]
        result(say(f"left out {skipped} faulty items: {out / 'skipped.jsonl'}", f"跳过 {skipped} 条有问题的数据：{out / 'skipped.jsonl'}"))
    for name, count in card["counts"].items():
        result(f"{name}: {count}")


def _own_split(split: dict[str, Any], without_picture: bool) -> str:
    """What the source's own split keeps apart, and that it does not keep dishes apart where it does not."""
    english = {"artist": "artist", "food_name": "dish"}
    chinese = {"artist": "画师", "food_name": "菜品"}
    apart = split["kept_apart"]
    things = ["picture", *(english.get(tag, tag) for tag in apart), *(["question without a picture"] if without_picture else [])]
    named = " and ".join([", ".join(f"no {thing}" for thing in things[:-1]), f"no {things[-1]}"] if things[1:] else [f"no {things[0]}"])
    zh = "、".join(["图片", *(chinese.get(tag, tag) for tag in apart), *(["无图问题"] if without_picture else [])])
    dishes = "food_name" in split["on_both_sides"]
    share = split["eval_fraction"]
    return say(
        f"held out {share:.1%} (the source's own split): {named} is on both sides" + ("; dishes are" if dishes else ""),
        f"留出 {share:.1%}（数据自带的划分）：两边没有相同的{zh}" + ("；菜品两边都有" if dishes else ""),
    )
