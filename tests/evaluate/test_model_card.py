"""A model card tells what a report on these very weights says, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from evaluation_fixture import folder, outcomes
from intervale.core.errors import UserError
from intervale.core.files import write_json
from intervale.core.lang import set_language
from intervale.evaluate.compare import compare, write_report
from intervale.evaluate.model_card import CARD, REPORTS, read_report, reports_of, write_card


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


@pytest.fixture
def exported(tiny: Path, tmp_path: Path) -> Path:
    place = tmp_path / "tuned"
    shutil.copytree(tiny, place)
    told = {"format": "official", "base": {"folder": "/gone", "fingerprint": "b" * 16}, "checkpoint_fingerprint": "c" * 16, "step": 420}
    recipe = {"train": {"llm": "lora", "projector": "full", "vision": "frozen", "seed": 42, "epochs": 3}, "lora": {"rank": 64}}
    write_json(place / "intervale.json", told | {"recipe": recipe, "train": {"items": 5340}})
    return place


def hashes(**changes: Any) -> dict[str, Any]:
    return {"hashes": {"base": "b" * 16, "adapter": "c" * 16, "merged": None, "data": "d", "pictures": "p"} | changes}


def report(tmp_path: Path, name: str = "r", after: dict[str, Any] | None = None, **changes: Any) -> Path:
    own = {"data": {"file": str(tmp_path / "set" / "eval.jsonl"), "items": 40, "digest": "d"}}
    before = folder(tmp_path / f"{name}-a", outcomes("0" * 30 + "1" * 10), **own, **hashes(adapter=None))
    tuned = folder(tmp_path / f"{name}-b", outcomes("1" * 25 + "0" * 5 + "1" * 10), **own, **(after or hashes()), **changes)
    write_report(compare(before, tuned), tmp_path / name)
    return tmp_path / name


def test_the_card_holds_the_reports_numbers_and_a_hub_can_read_them(exported: Path, tmp_path: Path) -> None:
    card = write_card(exported, [read_report(report(tmp_path))])
    told = ModelCard.load(card)
    result = told.data.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.875, "set/eval.jsonl")
    assert told.data.pipeline_tag == "image-text-to-text"
    text = card.read_text()
    for part in (
        "| 40 | 25.0% [",
        "| 87.5% [",
        "+62.5 [",
        "25 / 0",
        "seed: 42",
        "llm: lora",
        "5,340",
        "`" + "c" * 16 + "`",
        "intervale chat tuned",
        r"+62.5 \*",
    ):
        assert part in text, part
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == "tuned"


def test_a_score_on_training_items_is_said_first(exported: Path, tmp_path: Path) -> None:
    seen = {"verdict": True, "code": "digest", "files": []}
    text = write_card(exported, [read_report(report(tmp_path, scored_on_training_items=True, seen=seen))]).read_text()
    assert text.index("Scored on training items") < text.index("87.5%")


def test_a_report_on_other_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    for n, other in enumerate((hashes(adapter="x"), hashes(base="x"), hashes(adapter=None, merged="x"))):
        with pytest.raises(UserError, match="of other weights"):
            write_card(exported, [read_report(report(tmp_path, f"r{n}", other))])
    assert not (exported / CARD).exists()


def test_a_folders_own_evaluation_counts_by_its_fingerprint(exported: Path, tmp_path: Path) -> None:
    from intervale.model.source import fingerprint

    assert write_card(exported, [read_report(report(tmp_path, after=hashes(adapter=None, merged=fingerprint(exported))))]).is_file()


def test_anothers_readme_is_kept_and_ours_is_replaced(exported: Path, tmp_path: Path) -> None:
    told = read_report(report(tmp_path))
    (exported / CARD).write_text("my own words")
    with pytest.raises(UserError, match="not a card that intervale wrote"):
        write_card(exported, [told])
    (exported / CARD).unlink()
    set_language("zh")
    first = write_card(exported, [told]).read_text()
    assert "改对 / 改错" in first
    set_language("en")
    assert write_card(exported, [told]).read_text() != first


def test_the_bases_licence_goes_along(exported: Path, tmp_path: Path) -> None:
    told = read_report(report(tmp_path))
    (exported / "README.base.md").write_text("---\nlicense: mit\n---\n# base\n")
    card = write_card(exported, [told])
    assert ModelCard.load(card).data.license == "mit"
    assert "(README.base.md)" in card.read_text()
    for odd in ("no front matter", "---\nlicense: [\n---\n"):
        (exported / "README.base.md").write_text(odd)
        assert ModelCard.load(write_card(exported, [told])).data.license is None


def test_what_is_no_export_or_no_report_is_refused(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="not a folder that `intervale export` wrote"):
        write_card(tmp_path, [{}])
    with pytest.raises(UserError, match="no report"):
        write_card(exported, [])
    (tmp_path / "report.json").write_text(json.dumps({"kind": "other", "before": {}, "after": {}, "pairs": {}, "protocol": {}}))
    with pytest.raises(UserError, match="not a report"):
        read_report(tmp_path)


def test_a_run_remembers_the_reports_on_its_weights(exported: Path, tmp_path: Path) -> None:
    from test_report import make_run, model_of

    run = make_run(tmp_path / "run", fingerprint="base")
    place = report(tmp_path, model=model_of(run))
    report(tmp_path, "other", hashes(adapter="x"), model=model_of(run))
    noted = [json.loads(line)["report"] for line in (run / REPORTS).read_text().splitlines()]
    assert noted == [str(place / "report.json"), str(tmp_path / "other" / "report.json")]
    assert [found["n"] for found in reports_of(run, exported)] == [40]
    shutil.rmtree(place)
    assert reports_of(run, exported) == []
