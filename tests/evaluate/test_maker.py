"""nano says what it was shown: the artists held back are told from the others by their pictures' bytes, and nothing else is claimed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from intervale.core.embedded import ASSETS
from intervale.core.lang import in_language
from intervale.core.records import Message, Record, data_digest, to_json
from intervale.evaluate.maker import TRAINING, told_by_maker
from intervale.evaluate.provenance import seen_in_training
from intervale.evaluate.seen import in_words
from intervale.model.source import fingerprint

NANO, EMOJI = ASSETS / "nano", ASSETS / "foodemoji" / "images"


def asked(folder: Path, *names: str, question: str = "?") -> list[Record]:
    """A question about each picture, copied from foodemoji under a name that tells nothing."""
    folder.mkdir()
    records = []
    for number, name in enumerate(names):
        shutil.copyfile(sorted(EMOJI.glob(f"{name}-*"))[0], folder / f"{number}.webp")
        turns = (Message("user", f"<image>\n{question}"), Message("assistant", "x"))
        records.append(Record(str(number), turns, (f"{number}.webp",), root=folder, where=f"d.jsonl:{number}"))
    return records


@pytest.mark.parametrize(
    ("names", "verdict", "code"),
    [
        (("twemoji", "fxemoji"), False, "apart"),
        (("twemoji", "noto-v1"), None, "drawings"),
        (("fluent-emoji-flat",), None, "drawings"),
    ],
)
def test_nano_is_known_not_to_have_seen_the_artists_held_back(
    tmp_path: Path, names: tuple[str, ...], verdict: bool | None, code: str
) -> None:
    records = asked(tmp_path / "data", *names)
    seen = seen_in_training(NANO, tmp_path / "data" / "d.jsonl", records)
    assert (seen["verdict"], seen["code"]) == (verdict, code)
    with in_language("zh"):
        assert "training.json" in in_words(seen, len(records))


def test_of_anything_else_nano_says_nothing(tmp_path: Path) -> None:
    records = asked(tmp_path / "data", "twemoji", "fxemoji")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "data" / "1.webp")
    assert told_by_maker(NANO, fingerprint(NANO), records) == "not kept"
    words = [Record("w", (Message("user", "?"), Message("assistant", "x")), ())]
    assert told_by_maker(NANO, fingerprint(NANO), words) == "not kept"
    assert told_by_maker(NANO, fingerprint(NANO), [records[0], *words]) == "not kept"
    assert seen_in_training(NANO, tmp_path / "data" / "d.jsonl", words)["verdict"] is None


@pytest.mark.parametrize(("names", "more"), [(("twemoji",), False), (("noto-v1",), True)])
def test_a_run_on_nano_says_what_its_base_had_seen(tmp_path: Path, names: tuple[str, ...], more: bool) -> None:
    records = asked(tmp_path / "data", *names)
    training = asked(tmp_path / "training", "emojione", question="What is it?")
    (tmp_path / "training" / "t.jsonl").write_text("".join(to_json(record) + "\n" for record in training))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "base.json").write_text(json.dumps({"folder": str(NANO), "fingerprint": fingerprint(NANO)}))
    told = {"train": {"file": str(tmp_path / "training" / "t.jsonl"), "digest": data_digest(training)}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    seen = seen_in_training(tmp_path / "run", tmp_path / "data" / "d.jsonl", records)
    assert (seen["verdict"], seen["code"]) == (False, "none")
    with in_language("en"):
        assert ("what the base model was trained on before is not compared" in in_words(seen, 1)) == more


@pytest.mark.parametrize("spoilt", ["other weights", "damaged", "no drawings"])
def test_what_is_said_holds_of_those_very_weights_alone(tmp_path: Path, tiny: Path, spoilt: str) -> None:
    records = asked(tmp_path / "data", "twemoji")
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    told = json.loads((NANO / TRAINING).read_text())
    (model / TRAINING).write_text(json.dumps(told | {"weights": fingerprint(model)}))
    assert told_by_maker(model, fingerprint(model), records) == "apart"
    damaged = {"other weights": json.dumps(told), "damaged": "{", "no drawings": json.dumps({"weights": fingerprint(model)})}
    (model / TRAINING).write_text(damaged[spoilt])
    assert told_by_maker(model, fingerprint(model), records) is None


def test_every_embedded_picture_has_its_artist() -> None:
    drawings = json.loads((NANO / TRAINING).read_text())["drawings"]
    names = [*drawings["shown"], *drawings["never_shown"]]
    items = json.loads((ASSETS / drawings["data"] / "sivqa_tidy.json").read_text(encoding="utf-8"))
    artist = {Path(item["food_meta"]["food_file"]).name: item["artist"] for item in items}
    for file in EMOJI.iterdir():
        fitting = max((name for name in names if file.name.startswith(f"{name}-")), key=len)
        assert artist.get(file.name, fitting) == fitting
    assert {item["artist"] for item in items if item["split"] == "test"} == {*drawings["never_shown"]}
