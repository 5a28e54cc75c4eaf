"""The model card of an exported folder, README.md, made from the reports on its weights. No torch here.

Promises: a report goes into a card only if it is of these very weights (base and adapter, or the merged folder itself, by fingerprint);
what was scored on training items says so first; a README.md that is not ours is never overwritten. The front matter is
huggingface_hub's own, so a hub shows the numbers too. Cost: reading the reports' JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import parse_json, read_object, read_text, write_atomic
from intervale.core.lang import say
from intervale.evaluate.labels import is_open, mode_name, prompt_name, protocol_words, tag_name, value_name
from intervale.evaluate.report_training import training_facts
from intervale.evaluate.seen import reason_of
from intervale.evaluate.training_card import find_run

CARD, REPORTS = "README.md", "reports.jsonl"
_MARK = "<!-- made by intervale from its reports; remove this line to keep your changes -->"
_STANDS = r" \*"  # a star that Markdown shows
_BASE_CARD = "README.base.md"
_EXPORTED, _KIND = "intervale.json", "intervale comparison"


def note_report(found: dict[str, Any], report: Path) -> None:
    """Keep the place of a report.json in the run whose weights AFTER are (RUN/reports.jsonl), for the export's card.

    A run that is not there, or cannot be written to, keeps none: the report itself is complete without.
    """
    run = find_run(found["after"].get("model") or {})
    if run is None:
        return
    file = run[0] / REPORTS
    try:
        told = _noted(run[0])
        if (place := str(report.resolve())) not in told:
            write_atomic(file, "".join(json.dumps({"report": name}, ensure_ascii=False) + "\n" for name in [*told, place]))
    except (UserError, OSError):
        return


def _noted(run: Path) -> list[str]:
    file = run / REPORTS
    if not file.is_file():
        return []
    lines = [parse_json(line, str(file)) for line in read_text(file).splitlines() if line.strip()]
    return [line["report"] for line in lines if isinstance(line, dict) and isinstance(line.get("report"), str)]


def read_report(place: Path) -> dict[str, Any]:
    """A comparison's report.json (the file, or the folder it lies in). Raises: UserError when it is none."""
    file = place / "report.json" if place.is_dir() else place
    found = read_object(file, "kind", "before", "after", "pairs", "protocol")
    if found["kind"] != _KIND or "hashes" not in found["after"]:
        raise UserError(f"{file}: not a report that `intervale compare` of this version wrote", "compare the two evaluations again")
    return found


def _exported(folder: Path) -> dict[str, Any]:
    if not (folder / _EXPORTED).is_file():
        raise UserError(f"{folder}: not a folder that `intervale export` wrote (no {_EXPORTED})", "name the exported folder")
    return read_object(folder / _EXPORTED, "base", "format")


def is_of(found: dict[str, Any], told: dict[str, Any], merged: str) -> bool:
    """Are AFTER's weights those of an exported folder that says `told` of itself and has the fingerprint `merged`?"""
    hashes = found["after"]["hashes"]
    if hashes.get("merged") == merged:
        return True
    adapter = told.get("checkpoint_fingerprint")
    return adapter is not None and hashes.get("adapter") == adapter and hashes.get("base") == told["base"].get("fingerprint")


def reports_of(run: Path, folder: Path) -> list[dict[str, Any]]:
    """The reports that RUN noted and that are of the weights exported to `folder`; gone and other ones are left out. Newest last."""
    from intervale.model.source import fingerprint

    told, merged, found = _exported(folder), fingerprint(folder), []
    home = run if (run / "run.json").is_file() else run.parent.parent
    for place in _noted(home):
        try:
            report = read_report(Path(place))
        except UserError:
            continue
        if is_of(report, told, merged):
            found.append(report)
    return found


def write_card(folder: Path, reports: Sequence[dict[str, Any]]) -> Path:
    """Write README.md into an exported folder; its path.

    Raises: UserError when the folder is no export, a report is of other weights, there is no report, or a README.md of another's stands there.
    """
    from intervale.model.source import fingerprint

    told, merged = _exported(folder), fingerprint(folder)
    if not reports:
        raise UserError(f"{folder}: no report to make a model card from", "compare two evaluations first, then name the report's folder")
    for report in reports:
        if not is_of(report, told, merged):
            raise UserError(
                f"{folder}: the report is of other weights ({report['after']['model']['name']})", "name a report whose AFTER is this model"
            )
    path = folder / CARD
    if path.is_file() and _MARK not in read_text(path):
        raise UserError(f"{path} is not a card that intervale wrote", "move it away, then try again")
    write_atomic(path, card_text(folder, told, reports, merged))
    return path


def _licence(folder: Path) -> str | None:
    """The licence the base's own card names, which `export` kept aside: what is derived from its weights is under it too."""
    from huggingface_hub import ModelCard

    if not (folder / _BASE_CARD).is_file():
        return None
    try:
        found = ModelCard(read_text(folder / _BASE_CARD), ignore_metadata_errors=True).data.get("license")
    except Exception:  # a card that is not one names no licence
        return None
    return found if isinstance(found, str) else None


def _front(name: str, reports: Sequence[dict[str, Any]], licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=Path(side["data"]["file"]).parent.name or "data",
            dataset_name=_data_name(side),
            metric_type="accuracy",
            metric_name=f"{report['protocol']['prompt']}, {report['protocol']['mode']}",
            metric_value=round(side["accuracy"], 6),
        )
        for report in reports
        for side in [report["after"]]
    ]
    base = str(reports[-1]["before"]["model"]["name"])
    hub = base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).exists()
    card = ModelCardData(
        model_name=name,
        base_model=base if hub else None,
        license=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["intervale", "internvl"],
        eval_results=results,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _data_name(side: dict[str, Any]) -> str:
    file = Path(side["data"]["file"])
    return f"{file.parent.name}/{file.name}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _score(side: dict[str, Any]) -> str:
    low, high = side["interval"]
    return f"{side['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def _row(report: dict[str, Any]) -> str:
    low, high = report["difference"]["interval"]
    how = f"{prompt_name(report['protocol']['prompt'])}{say(', ', '，')}{mode_name(report['protocol'])}"
    p = report["mcnemar"]["p"]
    cells = (
        _data_name(report["after"]), how, report["n"], _score(report["before"]), _score(report["after"]),
        f"{_signed(report['difference']['value'])} [{_signed(low)}, {_signed(high)}]", f"{p:.2g}", f"{report['pairs']['fixed']} / {report['pairs']['broken']}",
    )  # fmt: skip
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _colon() -> str:
    return say(": ", "：")


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *rows])


def _groups(report: dict[str, Any]) -> str:
    rows = []
    for tag in report["holm"]["tags"]:
        for value, group in report["tags"][tag].items():
            cells = (
                tag_name(tag), value_name(tag, value), group["after"]["n"], f"{group['before']['accuracy']:.1%}",
                _score(group["after"]), f"{_signed(group['difference']['value'])}{_STANDS if group['p_holm'] < 0.05 else ''}",
            )  # fmt: skip
            rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    if not rows:
        return ""
    names = [say("tag", "标签"), say("group", "组"), "n", say("before", "之前"), say("after [95%]", "之后 [95%]"), say("points", "百分点")]
    note = say(
        f"\\* p < 0.05 by McNemar's exact test after Holm's correction for {report['holm']['family']} groups.",
        f"\\* 经 Holm 校正（{report['holm']['family']} 组）后 McNemar 精确检验 p < 0.05。",
    )
    return f"\n### {say('By group', '分组结果')}\n\n{_table(names, rows)}\n\n{note}\n"


def _warning(reports: Sequence[dict[str, Any]]) -> str:
    why = next(
        (reason_of(report[side]) for report in reports for side in ("after", "before") if report[side]["scored_on_training_items"]), None
    )
    if why is None:
        return ""
    told = say(
        "Scored on training items: this shows that the training worked, not how good the model is.",
        "在训练数据上评分：只说明训练有效，不代表模型水平。",
    )
    return f"> **{told}** {_cell(why)}\n\n"


def _evaluation(reports: Sequence[dict[str, Any]]) -> str:
    names = [
        say("data", "数据"), say("asked and scored", "提问与评分"), "n", say("before [95%]", "之前 [95%]"), say("after [95%]", "之后 [95%]"),
        say("points [95%]", "百分点 [95%]"), "p", say("fixed / broken", "改对 / 改错"),
    ]  # fmt: skip
    last = reports[-1]
    before, seen = _cell(last["before"]["model"]["name"]), _cell(reason_of(last["after"]))
    parts = [f"## {say('Evaluation', '评测')}\n\n{_warning(reports)}{_table(names, [_row(report) for report in reports])}\n"]
    methods = say(
        f"Intervals: Wilson; of the difference: Newcombe, paired. p: McNemar's exact test. Before: {before} on the same items.",
        f"区间：Wilson；差值：配对 Newcombe。p：McNemar 精确检验。“之前”：{before} 在相同题目上的成绩。",
    )
    parts.append(f"\n{methods} {say('Seen in training', '是否训练数据')}{_colon()}{seen}{say('.', '。')}\n")
    if is_open(last["protocol"]) and last.get("graded"):
        told = "; ".join(f"{name} {own['before']:.3f} → {own['after']:.3f}" for name, own in last["graded"].items())
        parts.append(f"\n{say('On average', '平均')}{_colon()}{told}\n")
    calibrated = next((report["calibration"]["after"] for report in reports if report.get("calibration")), None)
    if calibrated:
        parts.append(
            f"\n{say('Expected calibration error of its likelihoods', '似然的期望校准误差')}{_colon()}{100 * calibrated['ece']:.1f}% (n = {calibrated['n']})\n"
        )
    return "".join([*parts, _groups(reports[0])])


def _training(told: dict[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    """What the run's own card says; where the run is gone, what the export kept of its recipe."""
    card = next((report["training"] for report in reversed(reports) if report.get("training")), None)
    step, items = told.get("step"), (told.get("train") or {}).get("items")
    if card is not None:
        rows = [(name, value + (say("; ", "；") + more if more else "")) for name, value, more in training_facts(card)]
    else:
        recipe = (told.get("recipe") or {}).get("train", {})
        rows = [(key, str(recipe[key])) for key in ("llm", "projector", "vision", "learning_rate", "seed") if key in recipe]
        rows += [(say("training items", "训练条目"), f"{items:,}")] if isinstance(items, int) else []
    rows += [(say("step of the weights", "权重所在步数"), f"{step:,}")] if isinstance(step, int) else []
    return f"\n## {say('Training', '训练')}\n\n{_points(rows)}"


def _points(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"- {name}{_colon()}{_cell(value)}\n" for name, value in rows)


def _identity(reports: Sequence[dict[str, Any]], merged: str) -> str:
    """Hashes, protocols and software. `merged` is told only of the very folder that was scored: another export's bytes differ."""
    last = reports[-1]["after"]
    names = {
        "base": say("base", "基础权重"), "adapter": say("adapter", "适配器"), "merged": say("merged", "合并后"), "data": say("evaluation data", "评测数据"),
        "pictures": say("pictures", "图片"),
    }  # fmt: skip
    own = {key: value for key, value in last["hashes"].items() if value and (key != "merged" or value == merged)}
    rows = [(title, f"`{own[key]}`") for key, title in names.items() if key in own]
    rows += [(say("asked", "提问与评分"), told) for told in dict.fromkeys(protocol_words(report["protocol"]) for report in reports)]
    software = ", ".join(f"{name} {last['versions'][name]}" for name in ("intervale", "torch", "transformers") if name in last["versions"])
    return f"\n## {say('What exactly was scored', '评测对象')}\n\n{_points([*rows, (say('software', '软件'), software)])}"


def card_text(folder: Path, told: dict[str, Any], reports: Sequence[dict[str, Any]], merged: str) -> str:
    """The whole README.md of `told` (its intervale.json) and reports, the first of which gives the groups."""
    name = folder.resolve().name
    every = [entry for report in reports for entry in (report, report.get("also")) if entry]
    intro = say(
        "An InternVL model, tuned, merged and scored with intervale. The table below is made from its report.",
        "用 intervale 微调、合并并评测的 InternVL 模型。下表由其评测报告生成。",
    )
    use = f"\n## {say('Use', '使用')}\n\n```bash\nintervale chat {name} -i picture.jpg\nintervale serve {name}\n```\n"
    body = "".join([_evaluation(every), _training(told, every), use, _identity(every, merged)])
    if (folder / _BASE_CARD).is_file():
        intro += say(f" The base model's own card is [{_BASE_CARD}]({_BASE_CARD}).", f"基础模型自己的说明见 [{_BASE_CARD}]({_BASE_CARD})。")
    return f"{_front(name, every, _licence(folder))}\n# {name}\n\n{intro}\n\n{body}\n{_MARK}\n"
