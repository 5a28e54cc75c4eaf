"""The suite by a model in this process: every mode runs, counts add up, and a killed suite ends as a straight one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import run_command
from evaluation_fixture import after, contents, timeless
from foodie_fixture import write_foodieqa
from intervale.core.errors import UserError
from intervale.core.records import data_digest, read_records
from intervale.data.foodieqa import read_foodieqa
from intervale.data.writer import write_dataset
from intervale.evaluate import batches
from intervale.evaluate.compare import compare
from intervale.evaluate.folder import read_evaluation
from intervale.evaluate.suite import Settings, run_suite
from intervale.evaluate.suite_data import NO_ENGLISH, read_suite
from intervale.evaluate.suite_local import letter_ids, local_asker, prompt_ids
from intervale.evaluate.suite_score import MODES
from intervale.model.load import load_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def foodie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foodie") / "src"
    write_foodieqa(folder, traps=True)
    return folder


def go(model: str, folder: Path, out: Path, settings: Settings, **more: Any) -> dict[str, Any]:
    run_options = {key: more.pop(key) for key in list(more) if key in ("on_answer", "fresh")}
    tell = more.pop("told", []).append
    asker = local_asker(
        model, max_new_tokens=more.pop("new", 4), max_tiles=more.pop("max_tiles", None), device="cpu", precision="auto",
        text=settings.text, letters=settings.letters,
    )  # fmt: skip
    data = read_suite(folder, more.pop("tasks", ()), settings.languages, **({"skip_bad": True} | more))
    return run_suite(data, settings, asker, out, tell=tell, **run_options)


def add_up(out: Path, suite: dict[str, Any]) -> None:
    """Every number of the suite is that of the lines on file, and the items are all there."""
    parts = {(part["task"], part["language"]): part for part in suite["left_out"]}
    for part in parts.values():
        assert part["asked"] + len(part["left_out"]) + part["not_chosen"] == part["in_file"]
    for row in suite["combinations"]:
        summary, lines = read_evaluation(out / row["folder"])
        if row["view"] == "picture" and row["turn"] in ("as-is", "seeded"):
            assert len(lines) == parts[row["task"], row["language"]]["asked"]
        assert (row["n"], row["correct"]) == (len(lines), sum(line["correct"] for line in lines)) == (summary["n"], summary["correct"])
        assert sum(summary["predicted_positions"].values()) == sum(summary["right_positions"].values()) == row["n"]
        for value in summary["tags"].values():
            assert sum(score["correct"] for score in value.values()) <= row["correct"]
        for line in lines:
            assert line["correct"] == (line["parsed"] == line["answer"])
            assert line["parsed"] is None or line["choices"][line["parsed"]]
    for table in suite["tables"]:
        shares = [score["accuracy"] for score in table["prompts"].values()]
        assert (table["mean"], table["max"]) == (pytest.approx(sum(shares) / len(shares)), max(shares))
        assert table["prompts"][table["max_prompt"]]["accuracy"] == table["max"]


@pytest.mark.slow
def test_all_modes_run_on_nano_with_every_trap_and_the_counts_add_up(foodie: Path, tmp_path: Path) -> None:
    settings = Settings(fallback="a", views=("picture", "blind", "food-name"))
    told: list[str] = []
    suite = go("nano", foodie, tmp_path / "out", settings, told=told)
    add_up(tmp_path / "out", suite)
    kinds = {(part["task"], part["language"]): sorted(fault["kind"] for fault in part["left_out"]) for part in suite["left_out"]}
    assert kinds["sivqa", "zh"] == ["item", "item", "picture"]
    assert kinds["sivqa", "en"] == ["item", "item", NO_ENGLISH, "picture"]
    assert kinds["mivqa", "en"] == [NO_ENGLISH]
    counts = {(row["task"], row["language"], row["view"]): row["n"] for row in suite["combinations"]}
    assert counts["sivqa", "zh", "picture"] == counts["sivqa", "zh", "blind"] == 21
    assert counts["sivqa", "zh", "food-name"] == 17  # the others' words have no place for the dish's name
    assert counts["mivqa", "en", "blind"] == 11
    assert ("textqa", "zh", "blind") not in counts
    assert ("sivqa", "en", "food-name") not in counts  # there is no English name to put in
    assert all(row["complete"] for row in suite["tables"])
    assert {row["mode"] for row in suite["tables"]} == set(MODES)
    assert suite["askings"] == suite["used"]["askings"] == len((tmp_path / "out" / "answers.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_the_real_photographs_are_asked_in_all_modes(shared: Path, tmp_path: Path) -> None:
    suite = go("nano", shared / "data" / "foodie_photos", tmp_path / "out", Settings(prompts=("0", "2"), rotate="seeded"))
    add_up(tmp_path / "out", suite)
    assert {row["n"] for row in suite["combinations"]} == {42}
    assert len(suite["combinations"]) == 2 * 2 * 3
    assert {row["task"] for row in suite["combinations"]} == {"sivqa"}


def test_killed_at_any_item_and_resumed_the_summary_is_a_straight_ones(
    tiny: Path, foodie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ROWS", 4)  # kills in the middle of a batch, and between two
    settings = Settings(prompts=("1", "3"), rotate="seeded", fallback="random", languages=("zh",))
    straight = go(str(tiny), foodie, tmp_path / "straight", settings, limit=3)
    count = straight["askings"]
    assert count == 3 * 2 * 3
    for last in range(1, count + 1):
        out = tmp_path / f"killed-{last}"
        told: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            go(str(tiny), foodie, out, settings, limit=3, on_answer=after(last), told=told)
        assert f"stopped after {last} of {count}" in told[-1]
        assert not (out / "suite.json").exists()
        with open(out / "answers.jsonl", "a") as file:
            file.write('{"key": "sivqa/zh')  # in the middle of a line
        resumed = go(str(tiny), foodie, out, settings, limit=3)
        assert timeless(resumed) == timeless(straight)
        assert contents(out) == contents(tmp_path / "straight")


def test_an_asking_scores_what_it_scores_alone(tiny: Path, foodie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(prompts=("0", "2", "3"), languages=("zh", "en"))
    together = go(str(tiny), foodie, tmp_path / "many", settings, limit=4)
    monkeypatch.setattr(batches, "ROWS", 1)
    alone = go(str(tiny), foodie, tmp_path / "one", settings, limit=4)
    only = go(str(tiny), foodie, tmp_path / "likely", Settings(prompts=("0", "2", "3"), modes=("likelihood",)), limit=4)
    assert together["askings"] == alone["askings"] == only["askings"]
    many, one, likely = ({line["key"]: line for line in map(json.loads, (tmp_path / name / "answers.jsonl").read_text().splitlines())}
                         for name in ("many", "one", "likely"))  # fmt: skip
    for key, line in many.items():
        assert line["scores"] == pytest.approx(one[key]["scores"], abs=1e-5)
        assert line["scores"] == pytest.approx(likely[key]["scores"], abs=1e-5)
        assert line["raw"] == one[key]["raw"]
        assert "raw" not in likely[key]


def test_the_answer_goes_on_from_the_forced_prefix(tiny: Path, foodie: Path) -> None:
    from intervale.evaluate.foodieqa import ask_item

    model = load_model(tiny, device="cpu")
    item, plain = read_suite(foodie, ("textqa",), ("zh",), skip_bad=True).parts[0].items[0]
    item2, plain2 = read_suite(foodie, ("sivqa",), ("zh",), skip_bad=True).parts[0].items[0]
    without = ask_item(item, plain, "textqa", "zh", "picture", "0", "as-is").record
    forced = ask_item(item2, plain2, "sivqa", "zh", "blind", "3", "as-is").record
    text = model.tokenizer.decode(prompt_ids(forced, model.template, model.tokenizer, ()).tolist())
    assert text.endswith("assistant\n我选择（")
    assert model.tokenizer.decode(prompt_ids(without, model.template, model.tokenizer, ()).tolist()).endswith("assistant\n")
    assert letter_ids("我选择（", 4, model.tokenizer) == [model.tokenizer.encode(letter) for letter in "ABCD"]


class Joining:
    """A tokenizer that joins a bracket and the letter after it, as Qwen's does."""

    def encode(self, text: str) -> list[int]:
        found = []
        while text:
            step = 2 if text[0] == "(" and text[1:2].isalpha() else 1
            found.append(hash(text[:step]) % 10**6)
            text = text[step:]
        return found


def test_a_tokenizer_that_joins_bracket_and_letter_scores_the_letter_itself() -> None:
    tokenizer = Joining()
    assert letter_ids("answer (", 2, tokenizer) == [tokenizer.encode("A"), tokenizer.encode("B")]  # type: ignore[arg-type]
    assert letter_ids("answer: ", 2, tokenizer) == [tokenizer.encode("A"), tokenizer.encode("B")]  # type: ignore[arg-type]


def test_a_combination_is_an_evaluation_that_compare_reads(tiny: Path, run_folder: Path, foodie: Path, tmp_path: Path) -> None:
    settings = Settings(prompts=("0",), languages=("zh",))
    for model, name in ((tiny, "before"), (run_folder, "after")):
        go(str(model), foodie, tmp_path / name, settings, tasks=("sivqa", "mivqa"), max_tiles=1)
    found = compare(tmp_path / "before" / "mivqa-zh" / "0-likelihood", tmp_path / "after" / "mivqa-zh" / "0-likelihood")
    assert (found["n"], found["chance"], found["protocol"]["wording"]) == (12, 0.25, "0")
    with pytest.raises(UserError, match="a whole suite") as caught:
        compare(tmp_path / "before", tmp_path / "after")
    assert "before/mivqa-zh/0-likelihood" in caught.value.fix
    with pytest.raises(UserError, match=r"protocol\.task"):
        compare(tmp_path / "before" / "mivqa-zh" / "0-likelihood", tmp_path / "after" / "sivqa-zh" / "0-likelihood")


@pytest.mark.parametrize("task", ["sivqa", "mivqa", "textqa"])
def test_items_the_model_was_trained_on_are_found_again(tiny: Path, tmp_path: Path, task: str) -> None:
    write_foodieqa(tmp_path / "src", traps=False)
    write_dataset(read_foodieqa(tmp_path / "src", task), tmp_path / "data", fraction=0.0, seed=0, skip_bad=False, about={"task": task})
    records = read_records(tmp_path / "data" / "train.jsonl")
    shutil.copytree(tiny, tmp_path / "tuned")
    told = {"train": {"file": str(tmp_path / "data" / "train.jsonl"), "items": len(records), "digest": data_digest(records)}}
    (tmp_path / "tuned" / "intervale.json").write_text(json.dumps(told))
    settings = Settings(prompts=("0",), modes=("likelihood",))
    for model, seen in ((tmp_path / "tuned", True), (tiny, None)):
        suite = go(str(model), tmp_path / "src", tmp_path / f"out-{seen}", settings, tasks=(task,), limit=2)
        zh = [row for row in suite["combinations"] if row["language"] == "zh"]
        assert [row["scored_on_training_items"] for row in zh] == [seen]


def test_another_suite_is_refused_by_name_and_a_finished_one_only_read(tiny: Path, foodie: Path, tmp_path: Path) -> None:
    settings = Settings(prompts=("0",), languages=("zh",))
    first = go(str(tiny), foodie, tmp_path / "out", settings, tasks=("textqa",))
    told: list[str] = []
    assert go(str(tiny), foodie, tmp_path / "out", settings, tasks=("textqa",), told=told) == first
    assert "already evaluated" in told[0]
    with pytest.raises(UserError, match=r'settings.rotate: "none" -> "all"'):
        go(str(tiny), foodie, tmp_path / "out", Settings(prompts=("0",), languages=("zh",), rotate="all"), tasks=("textqa",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a suite"):
        go(str(tiny), foodie, tmp_path / "mine", settings, tasks=("textqa",), fresh=True)


def test_the_command_says_what_it_will_cost_and_prints_the_tables(
    tiny: Path, foodie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", tiny, foodie, "--suite", "foodieqa", "--out", tmp_path / "out", "--max-new-tokens", 4, "--device", "cpu"]
    assert run_command(monkeypatch, *words) == 1
    assert "3 faulty items; nothing was asked" in capsys.readouterr().err
    words += ["--skip-bad", "--prompts", "0,1", "--tasks", "sivqa,textqa", "--rotate", "all"]
    assert run_command(monkeypatch, *words, "--dry-run") == 0
    told = capsys.readouterr()
    assert "sivqa zh: 21 items, 2 prompts x 4 orders x 1 view = 160 askings; left out: 3 of 24" in told.out
    assert "different pictures (36 tiles)" in told.out
    assert "FoodieQA's terms" in told.err
    assert not (tmp_path / "out").exists()
    assert run_command(monkeypatch, *words, "--limit", 2) == 0
    told = capsys.readouterr()
    assert "by the first" in told.err
    assert "mean  maximum" in told.out
    assert "a maximum over some is no published number" in told.out
    assert "right in every order" in told.out
    assert "3 of 24 items left out (item, no English)" in told.out
    for lang in ("zh", "en"):
        assert run_command(monkeypatch, "--lang", lang, *words, "--limit", 2, "--json") == 0
        assert json.loads(capsys.readouterr().out)["kind"] == "intervale suite"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rotate", "all"], "--rotate belongs to --suite"),
        (["--concurrency", "3"], "--concurrency belongs to --base-url"),
        (["--suite", "foodieqa", "--mode", "likelihood"], "--mode is a data set's"),
        (["--suite", "foodieqa", "--tasks", "sivq"], "did you mean 'sivqa'"),
        (["--suite", "foodieqa", "--baselines", "blnd"], "did you mean 'blind'"),
        (["--suite", "foodieqa", "--prompts", "9"], "there is no prompt '9'"),
        (["--base-url", "http://x/v1", "--model-name", "m"], "there is no model folder"),
    ],
)
def test_a_wrong_word_is_told(
    tiny: Path,
    foodie: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    assert (
        run_command(
            monkeypatch, "evaluate", tiny, foodie, "--out", tmp_path / "out", *(["--skip-bad"] if "--suite" in words else []), *words
        )
        == 1
    )
    assert told in capsys.readouterr().err
