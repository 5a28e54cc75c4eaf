"""An evaluation asks every item once, survives being stopped, and sums up what is on file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from intervale.core.errors import UserError
from intervale.core.files import sha256_file, write_json
from intervale.core.lang import set_language
from intervale.core.records import Message, Record, data_digest, read_records, to_json
from intervale.data.dataset import TileCache, load_item
from intervale.engine import batch as engine_batch
from intervale.engine.decode import encode_tiles
from intervale.evaluate import batches as batching
from intervale.evaluate import features as featuring
from intervale.evaluate import run as running
from intervale.evaluate.folder import PREDICTIONS, PROTOCOL, SUMMARY, read_predictions
from intervale.evaluate.provenance import about, scored_on_training_items
from intervale.evaluate.run import evaluate, plan
from intervale.model.forward import embed
from intervale.model.load import load_model
from intervale.model.presets import init_model

QUESTION, TAIL = "<image>\n图中的菜是什么味道?", "，图中的菜是酸辣粉"


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tiny model is slower on two threads than on one, much slower when other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Path:
    return tiny


def write_data(folder: Path, items: int = 6, **changes: Any) -> Path:
    """`items` questions on three drawn pictures, two tags."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for n in range(3):
        Image.new("RGB", (60 + 40 * n, 60), (80 * n, 200 - 50 * n, 90)).save(folder / "images" / f"{n}.png")
    lines = []
    for n in range(items):
        choices = ("酸", "酸辣", "甜", "苦")
        fields: dict[str, Any] = {"choices": choices, "answer": n % 4, "tags": {"kind": "even" if n % 2 == 0 else "odd"}} | changes
        told = Message("assistant", choices[n % 4] + TAIL)
        lines.append(to_json(Record(f"q{n}", (Message("user", QUESTION), told), (f"images/{n // 2 % 3}.png",), **fields)) + "\n")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "data.jsonl"


def go(model: Path, data: Path, out: Path, *, fresh: bool = False, told: list[str] | None = None, **options: Any) -> dict[str, Any]:
    options = {"max_new_tokens": 4, "device": "cpu"} | options
    return evaluate(plan(str(model), data, out, **options), fresh=fresh, tell=(told if told is not None else []).append)


def timeless(value: Any) -> Any:
    """Without the times, which are the only thing that may differ between two runs."""
    return {key: entry for key, entry in value.items() if key != "seconds"}


@pytest.mark.parametrize(
    ("prompt", "mode"), [("open", "strict"), ("mcq", "strict"), ("mcq", "official"), ("open", "likelihood"), ("mcq", "likelihood")]
)
def test_every_mode_asks_every_item_once_and_sums_up_what_is_on_file(model: Path, tmp_path: Path, prompt: str, mode: str) -> None:
    summary = go(model, write_data(tmp_path), tmp_path / "out", prompt=prompt, mode=mode)
    lines = read_predictions(tmp_path / "out")
    assert [line["id"] for line in lines] == [f"q{n}" for n in range(6)]
    assert [line["images"] for line in lines] == [[f"images/{n // 2}.png"] for n in range(6)]
    assert list(lines[0])[:3] == ["id", "question", "images"]
    assert summary == json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert summary["correct"] == sum(line["parsed"] == line["answer"] for line in lines)
    assert summary["accuracy"] == summary["correct"] / 6
    assert {value: score["n"] for value, score in summary["tags"]["kind"].items()} == {"even": 3, "odd": 3}
    assert sum(summary["predicted_positions"].values()) == 6
    assert summary["protocol"] == {
        "prompt": prompt, "mode": mode, "max_tiles": 4, "max_new_tokens": None if mode == "likelihood" else 4, "headline": "sum" if mode == "likelihood" else None,
    }  # fmt: skip
    assert ("raw" in lines[0]) == (mode != "likelihood")


def test_a_likelihood_is_that_of_the_trained_sequence(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    go(model, data, tmp_path / "out", mode="likelihood")
    record, line = read_records(data)[1], read_predictions(tmp_path / "out")[1]
    loaded = load_model(model, device="cpu")
    item = load_item(record, loaded.tokenizer, loaded.template, loaded.tiling, TileCache())
    ids = torch.from_numpy(item.ids_S)[None]
    with torch.inference_mode():
        embedded = embed(loaded.network, ids, encode_tiles(loaded, item.pictures[0].tiles_PHWC), loaded.network.config.image_token_id)
        hidden = loaded.network.model.language_model(inputs_embeds=embedded).last_hidden_state
        logs = torch.log_softmax(loaded.network.lm_head(hidden[0]).float(), -1)
    first = int(item.trained_S.argmax())
    length = len("酸辣，".encode())  # the tiny tokenizer has a token a byte
    wanted = sum(float(logs[at - 1, item.ids_S[at]]) for at in range(first, first + length))
    score = line["scores"][1]
    assert score["tokens"] == length
    assert score["sum"] == pytest.approx(wanted, abs=1e-4)
    assert score["mean"] == pytest.approx(wanted / length, abs=1e-5)
    assert line["parsed"] == max(range(4), key=lambda n: line["scores"][n]["sum"])
    assert line["parsed_mean"] == max(range(4), key=lambda n: line["scores"][n]["mean"])


def test_equal_likelihoods_are_a_tie_and_wrong(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, items=1, choices=("酸", " 酸 "), answer=0)
    summary = go(model, data, tmp_path / "out", mode="likelihood")
    assert (summary["correct"], summary["ties"], summary["predicted_positions"]["none"]) == (0, 1, 1)


def test_a_picture_goes_through_the_tower_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = featuring.encode_tiles
    monkeypatch.setattr(featuring, "encode_tiles", lambda m, tiles: passes.append(len(tiles)) or real(m, tiles))
    monkeypatch.setattr(batching, "ROWS", 2)
    data = write_data(tmp_path, items=12)
    go(model, data, tmp_path / "out", mode="likelihood", prompt="mcq")
    job = plan(str(model), data, tmp_path / "out")
    assert sum(passes) == sum({record.images: sum(tiles) for record, tiles in zip(job.records, job.tiles, strict=True)}.values())
    assert len(passes) < 6  # of the six batches, those whose pictures were still there ran no tower


@pytest.mark.parametrize("mode", ["strict", "likelihood"])
@pytest.mark.parametrize("lines", [1, 3, 4, 5, 9])
def test_a_stopped_evaluation_goes_on_and_ends_as_a_straight_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, lines: int
) -> None:
    monkeypatch.setattr(batching, "ROWS", 4)
    data = write_data(tmp_path, items=10)
    towers: list[bytes] = []
    tower = featuring.encode_tiles
    monkeypatch.setattr(featuring, "encode_tiles", lambda m, tiles: towers.append(tiles.tobytes()) or tower(m, tiles))
    straight = go(model, data, tmp_path / "straight", mode=mode)
    together = set(towers)
    real = running.append_prediction
    written: list[str] = []

    def stopping(out: Path, line: dict[str, Any]) -> None:
        if len(written) == lines:  # in the middle of a batch, unless it is the 5th line
            raise KeyboardInterrupt
        written.append(line["id"])
        real(out, line)

    monkeypatch.setattr(running, "append_prediction", stopping)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        go(model, data, tmp_path / "out", told=told, mode=mode)
    assert f"{lines} of 10" in told[-1]
    assert not (tmp_path / "out" / SUMMARY).exists()
    with open(tmp_path / "out" / PREDICTIONS, "a") as file:
        file.write('{"id": "q3", "que')  # a crash in the middle of a line
    monkeypatch.setattr(running, "append_prediction", lambda out, line: written.append(line["id"]) or real(out, line))
    continued = go(model, data, tmp_path / "out", mode=mode)
    assert sorted(written) == sorted(f"q{n}" for n in range(10))
    assert timeless(continued) == timeless(straight)
    both = [[timeless(line) for line in read_predictions(tmp_path / name)] for name in ("straight", "out")]
    assert both[0] == both[1]
    assert [line["id"] for line in both[0]] == [f"q{n}" for n in range(10)]
    assert set(towers) == together  # and never other pictures in a pass: rounding depends on it


def test_a_pictures_questions_share_its_prefill(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    real = engine_batch._hidden
    monkeypatch.setattr(engine_batch, "_hidden", lambda m, c, e, *rest: widths.append(tuple(e.shape[:2])) or real(m, c, e, *rest))
    data = write_data(tmp_path, items=12)  # four questions on each of three pictures
    go(model, data, tmp_path / "out", mode="likelihood")
    lines = read_predictions(tmp_path / "out")
    assert len(widths) == 2  # what they begin with, and all the rest
    assert sum(rows * width for rows, width in widths) < 0.3 * sum(line["prompt_tokens"] for line in lines)


def test_the_time_left_goes_by_what_is_left_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    told: list[str] = []
    done = {"a": {"correct": True}}
    progress = running._Progress([[("a", 500.0), ("b", 300.0)], [("c", 50.0), ("d", 50.0)]], done, told.append)
    clock[0] = 130.0
    progress.step({"id": "b", "correct": False})
    assert told == ["2/4  right so far 50.0%  0.033 items/s  ETA 0:10"]
    clock[0] = 131.0
    progress.step({"id": "c", "correct": True})
    assert len(told) == 1  # at most one in three seconds
    clock[0] = 132.0
    progress.step({"id": "d", "correct": True})
    assert told[-1].startswith("4/4  right so far 75.0%")
    assert told[-1].endswith("ETA 0:00")


@pytest.mark.parametrize("mode", ["strict", "likelihood"])
def test_batches_say_what_one_at_a_time_says(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    data = write_data(tmp_path, items=9)
    go(model, data, tmp_path / "many", mode=mode, max_new_tokens=12)
    monkeypatch.setattr(batching, "ROWS", 1)
    go(model, data, tmp_path / "one", mode=mode, max_new_tokens=12)
    for many, one in zip(read_predictions(tmp_path / "many"), read_predictions(tmp_path / "one"), strict=True):
        if mode == "likelihood":
            assert [s["sum"] for s in many.pop("scores")] == pytest.approx([s["sum"] for s in one.pop("scores")], abs=1e-5)
        assert timeless(many) == timeless(one)


@pytest.mark.parametrize(("mode", "told"), [("strict", "tokens"), ("likelihood", "tokens and a choice")])
def test_an_item_beyond_the_context_is_named_and_leaves_no_folder(model: Path, tmp_path: Path, mode: str, told: str) -> None:
    data = write_data(tmp_path, items=3)
    room = 2048 - read_predictions_length(model, data, tmp_path)
    length = room if mode == "strict" else room - 5
    asked = Message("user", QUESTION + "x" * length)
    record = Record("long", (asked, Message("assistant", "酸辣" + TAIL)), ("images/0.png",), ("酸辣", "甜"), 0)
    with open(data, "a", encoding="utf-8") as file:
        file.write(to_json(record) + "\n")
    with pytest.raises(UserError, match=rf"data\.jsonl:4: item 'long': the prompt has \d+ {told}.*context is 2048"):
        go(model, data, tmp_path / "out", mode=mode)
    assert not (tmp_path / "out").exists()


def read_predictions_length(model: Path, data: Path, folder: Path) -> int:
    """Tokens of the first item's prompt."""
    go(model, data, folder / "short", limit=1)
    return int(read_predictions(folder / "short")[0]["prompt_tokens"])


def test_a_damaged_picture_in_a_batch_is_named(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    picture = tmp_path / "images" / "1.png"
    picture.write_bytes(picture.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"data\.jsonl:3: images/1\.png: the picture is damaged"):
        go(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_evaluation_is_read_not_repeated(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path, items=2)
    first = go(model, data, tmp_path / "out")
    monkeypatch.setattr(running, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    told: list[str] = []
    assert go(model, data, tmp_path / "out", told=told) == first
    assert "already evaluated" in told[0]


def test_another_protocol_model_or_data_is_refused_by_name_and_fresh_keeps_the_old(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, items=2)
    go(model, data, tmp_path / "out")
    with pytest.raises(UserError) as caught:
        go(model, write_data(tmp_path / "other", items=3), tmp_path / "out", mode="likelihood", max_tiles=2)
    for told in ('protocol.mode: "strict" -> "likelihood"', "protocol.max_tiles: 4 -> 2", "data.items: 2 -> 3", "data.digest"):
        assert told in caught.value.what
    init_model(tmp_path / "seeded", "tiny", seed=7)
    with pytest.raises(UserError, match=r"model\.fingerprint"):
        go(tmp_path / "seeded", data, tmp_path / "out")
    go(model, data, tmp_path / "out", mode="likelihood", fresh=True)
    assert json.loads((tmp_path / "out.old-1" / PROTOCOL).read_text())["protocol"]["mode"] == "strict"
    assert (tmp_path / "out.old-1" / SUMMARY).is_file()


def test_a_folder_of_something_else_is_never_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="not an evaluation"):
            go(model, write_data(tmp_path, items=1), tmp_path / "out", fresh=fresh)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_items_that_cannot_be_scored_are_counted_not_skipped(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, items=3)
    open_ended = Record("free", (Message("user", QUESTION), Message("assistant", "酸")), ("images/0.png",))
    with open(data, "a", encoding="utf-8") as file:
        file.write(to_json(open_ended) + "\n")
    with pytest.raises(UserError, match=r"1 \(line 4\) of 4 items have no 'choices'"):
        go(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_picture_is_found_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png"):
        go(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_official_needs_letters_to_look_for(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        go(model, write_data(tmp_path, items=1), tmp_path / "out", mode="official")
    assert "--prompt mcq" in caught.value.fix


def test_limit_takes_the_first_items(model: Path, tmp_path: Path) -> None:
    summary = go(model, write_data(tmp_path), tmp_path / "out", limit=2)
    assert (summary["n"], summary["data"]["items"]) == (2, 2)


def exported(folder: Path, training: Path | None, digest: str = "") -> Path:
    folder.mkdir()
    if training is not None:
        records = read_records(training)
        write_json(
            folder / "intervale.json", {"train": {"file": str(training), "items": len(records), "digest": digest or data_digest(records)}}
        )
    return folder


def seen(model_folder: Path, data: Path) -> bool | None:
    return scored_on_training_items(model_folder, data, read_records(data))[0]


def test_whether_items_were_trained_on_is_said_when_it_can_be_known(tmp_path: Path) -> None:
    training = write_data(tmp_path / "train", items=2)
    held_out = write_data(tmp_path / "held", items=6)
    kept = [line for line in held_out.read_text().splitlines(True) if "images/0.png" not in line]
    assert len(kept) == 4
    tuned = exported(tmp_path / "tuned", training)
    assert seen(exported(tmp_path / "plain", None), training) is None
    assert seen(tuned, training) is True
    assert seen(tuned, held_out) is True  # two of the six, though in another file with another digest
    held_out.write_text("".join(kept))
    assert seen(tuned, held_out) is False
    training.unlink()
    assert seen(tuned, held_out) is None


def test_a_data_set_without_held_out_items_says_so_for_every_model(tmp_path: Path) -> None:
    data = write_data(tmp_path / "all", items=2)
    plain = exported(tmp_path / "plain", None)
    write_json(tmp_path / "all" / "dataset.json", {"all": True, "scored_on_training_items": True, "files": {"data.jsonl": {}}})
    assert seen(plain, data) is True
    write_json(tmp_path / "all" / "dataset.json", {"all": False, "scored_on_training_items": False, "files": {"data.jsonl": {}}})
    assert seen(plain, data) is None


def test_the_provenance_of_a_base_under_a_run_counts(tmp_path: Path) -> None:
    training = write_data(tmp_path / "train", items=2)
    other = write_data(tmp_path / "other", items=6)
    kept = [line for line in other.read_text().splitlines(True) if "images/2.png" in line]
    other.write_text("".join(kept))
    base = exported(tmp_path / "base", training)
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "base.json", {"folder": str(base)})
    write_json(run / "run.json", {"train": {"file": str(other), "digest": data_digest(read_records(other))}})
    for folder in (run, checkpoint):
        assert seen(folder, training) is True
        assert seen(folder, other) is True


def test_a_converted_export_still_knows_its_training(tmp_path: Path) -> None:
    training = write_data(tmp_path / "train", items=2)
    again = exported(tmp_path / "again", None)
    write_json(
        again / "intervale.json",
        {"format": "official", "before": json.loads((exported(tmp_path / "tuned", training) / "intervale.json").read_text())},
    )
    assert seen(again, training) is True


def write_open(folder: Path, items: int = 5) -> Path:
    data = write_data(folder, items=items, choices=(), answer=None)
    assert all(not record.choices for record in read_records(data))
    return data


def test_open_answers_are_asked_measured_and_summed_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from intervale.evaluate import ask as asking

    said = {"q0": "酸", "q1": "这是酸辣的", "q2": "咸", "q3": "", "q4": "酸，图中的菜是酸辣粉"}
    real = asking._greedy
    stop = next(iter(load_model(model, device="cpu").stop_ids))

    def speaking(m: Any, ids: Any, record: Record, protocol: Any) -> dict[str, Any]:
        return real(m, [*m.tokenizer.encode(said[record.id]), stop], record, protocol)

    monkeypatch.setattr(asking, "_greedy", speaking)
    data = write_open(tmp_path)  # 酸, 酸辣, 甜, 苦, 酸, each with a dish behind
    summary = go(model, data, tmp_path / "out")
    lines = {line["id"]: line for line in read_predictions(tmp_path / "out")}
    assert [lines[f"q{n}"]["reference"] for n in range(5)] == ["酸", "酸辣", "甜", "苦", "酸"]
    assert summary["protocol"]["headline"] == "contained"
    assert (summary["n"], summary["correct"], summary["accuracies"]["exact"]["correct"]) == (5, 3, 2)
    assert summary["means"]["f1"] == pytest.approx(sum(line["f1"] for line in lines.values()) / 5)
    assert (summary["empty"], summary["chance"]) == (1, None)
    assert {value: score["n"] for value, score in summary["tags"]["kind"].items()} == {"even": 3, "odd": 2}


def test_a_picture_that_changed_is_another_evaluation(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, items=2)
    first = go(model, data, tmp_path / "out")
    line = read_predictions(tmp_path / "out")[0]
    assert line["pictures"] == [sha256_file(tmp_path / "images" / "0.png")[:16]]
    Image.new("RGB", (60, 60), (1, 2, 3)).save(tmp_path / "images" / "0.png")
    with pytest.raises(UserError, match=r"data\.pictures"):
        go(model, data, tmp_path / "out")
    second = go(model, data, tmp_path / "again")
    assert first["data"]["digest"] == second["data"]["digest"]
    assert first["hashes"]["pictures"] != second["hashes"]["pictures"]


def test_a_picture_that_changes_while_it_is_asked_is_refused_by_item(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path, items=4)
    real = running.append_prediction

    def changing(out: Path, line: dict[str, Any]) -> None:
        Image.new("RGB", (60, 60), (9, 9, 9)).save(tmp_path / "images" / "1.png")
        real(out, line)

    monkeypatch.setattr(running, "append_prediction", changing)
    with pytest.raises(UserError, match="pictures of 2 items changed while they were evaluated: 'q2', 'q3'"):
        go(model, data, tmp_path / "out")
    assert not (tmp_path / "out" / SUMMARY).exists()


def test_every_summary_names_weights_data_seeds_and_software(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", items=2)
    training = write_data(tmp_path / "train", items=4)
    summary = go(model, data, tmp_path / "plain")
    assert summary["hashes"] == {
        "base": summary["model"]["fingerprint"], "adapter": None, "merged": None, "data": summary["data"]["digest"], "pictures": summary["data"]["pictures"],
    }  # fmt: skip
    assert summary["seeds"] == {"training": None, "evaluation": None}
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    card = {"base": {"fingerprint": "b" * 16}, "checkpoint_fingerprint": "c" * 16, "recipe": {"train": {"seed": 7}}}
    write_json(
        tuned / "intervale.json", card | {"train": {"file": str(training), "items": 4, "digest": data_digest(read_records(training))}}
    )
    summary = go(tuned, data, tmp_path / "exported")
    assert (summary["hashes"]["base"], summary["hashes"]["adapter"], summary["seeds"]["training"]) == ("b" * 16, "c" * 16, 7)
    assert summary["hashes"]["merged"] == summary["model"]["fingerprint"]
    assert summary["scored_on_training_items"] is True
    assert summary["seen"]["files"][0]["exact"] == 2
    assert "2 of 2 items are training items (2 with the very same pictures" in summary["scored_on_training_items_reason"]


def test_a_model_behind_an_address_is_not_known_unless_the_data_tells(tmp_path: Path) -> None:
    data = write_data(tmp_path, items=2)
    facts = {"digest": "d", "pictures": "p"}
    told = about(None, data, read_records(data), facts)
    assert told["scored_on_training_items"] is None
    assert "does not say what it was trained on" in told["scored_on_training_items_reason"]
    assert told["hashes"] == {"base": None, "adapter": None, "merged": None, **{"data": "d", "pictures": "p"}}
    write_json(tmp_path / "dataset.json", {"all": True})
    assert about(None, data, read_records(data), facts)["scored_on_training_items"] is True
