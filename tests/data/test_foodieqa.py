import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foodie_fixture import DISHES, SIDEWAYS, write_foodieqa
from intervale.core.errors import UserError
from intervale.core.files import sha256_file
from intervale.core.records import read_records
from intervale.data.check import check_files
from intervale.data.foodie_items import NO_ENGLISH, normal_cuisine
from intervale.data.foodieqa import read_foodieqa
from intervale.data.split import divide, groups_of
from intervale.data.writer import write_dataset

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "foodie_photos"


def write(src: Path, out: Path, task: str = "sivqa", language: str = "zh", **options: Any) -> dict[str, Any]:
    settings = {"fraction": 0.2, "seed": 0, "skip_bad": False, "about": {"task": task}, **options}
    return write_dataset(read_foodieqa(src, task, language), out, **settings)


def edit(src: Path, change: Callable[[list[dict[str, Any]]], None], task: str = "sivqa") -> None:
    path = src / f"{task}_tidy.json"
    items = json.loads(path.read_text(encoding="utf-8"))
    change(items)
    path.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    write_foodieqa(tmp_path / "src", traps=False)
    return tmp_path / "src"


def test_all_keeps_every_item_in_one_file(clean: Path, tmp_path: Path) -> None:
    card = write(clean, tmp_path / "out", fraction=0.0)
    records = read_records(tmp_path / "out" / "train.jsonl")
    assert [record.id for record in records] == [f"vqa-{number}" for number in range(24)]
    assert not (tmp_path / "out" / "eval.jsonl").exists()
    assert card["all"]
    assert card["scored_on_training_items"]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8")) == card
    assert card["files"]["train.jsonl"]["items"] == 24
    assert card["files"]["train.jsonl"]["question_type"]["flavor"] == 4


def test_the_answer_is_the_right_choice_and_the_dish(clean: Path) -> None:
    samples = read_foodieqa(clean).samples
    first, last = samples[0].record, samples[23].record
    assert first.messages[0].content == "<image>\n图片中的食物通常属于哪个菜系?"
    assert first.messages[1].content == f"川菜（四川，重庆），图中的菜是{DISHES[0]}"
    assert last.messages[1].content == f"{DISHES[11]}，图中的菜是{DISHES[11]}"  # the choice had trailing blanks
    assert last.choices[0] == DISHES[11]
    assert last.answer == 0
    assert len(samples[4].record.choices) == 3


def test_cuisines_are_grouped_as_the_authors_group_them(clean: Path) -> None:
    found = {sample.record.tags["cuisine"] for sample in read_foodieqa(clean).samples}
    assert found == {"川菜（四川，重庆）", "黔菜（贵州）", "上海菜", "徽菜（安徽）"}
    assert normal_cuisine("西北菜 （陕西，甘肃等地）") == "西北菜（陕西，甘肃等地）"


def test_english_items_have_their_own_ids_and_no_dish(clean: Path) -> None:
    reading = read_foodieqa(clean, language="both")
    english = [sample.record for sample in reading.samples if sample.record.id.endswith("-en")]
    assert len(english) == 23
    assert reading.counts[NO_ENGLISH] == 1
    assert english[0].messages[1].content == "cuisine_type 0"
    alone = read_foodieqa(clean, language="en")
    assert len(alone.samples) == 23
    assert [fault.where for fault in alone.faults] == [f"{clean / 'sivqa_tidy.json'}: item 7 (id vqa-6)"]


def test_four_pictures_are_the_options(clean: Path, tmp_path: Path) -> None:
    samples = read_foodieqa(clean, "mivqa").samples
    first = samples[0].record
    assert first.messages[0].content == "图A: <image>\n图B: <image>\n图C: <image>\n图D: <image>\n以下哪道菜是红色的？"
    assert (first.choices, first.answer, first.messages[1].content) == (("图A", "图B", "图C", "图D"), 0, "图A")
    assert samples[1].record.choices == ("红", "绿", "褐", "黄")
    assert read_foodieqa(clean, "mivqa", "both").samples[1].record.messages[0].content.startswith("Option A: <image>\nOption B")
    card = write(clean, tmp_path / "out", "mivqa")
    assert card["files"]["train.jsonl"]["pictures"] == card["files"]["train.jsonl"]["items"] * 4


def test_text_questions_have_no_picture(clean: Path, tmp_path: Path) -> None:
    record = read_foodieqa(clean, "textqa").samples[2].record
    assert (record.images, record.reference(), record.tags["cuisine"]) == ((), "上海本帮菜", "上海菜")
    write(clean, tmp_path / "out", "textqa")
    assert check_files(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl").faults == ()


def test_an_older_file_name_is_found(clean: Path) -> None:
    (clean / "sivqa_tidy.json").rename(clean / "sivqa_filtered_bi.json")
    assert len(read_foodieqa(clean).samples) == 24
    (clean / "sivqa_filtered_bi.json").unlink()
    with pytest.raises(UserError, match=r"sivqa_tidy\.json or") as caught:
        read_foodieqa(clean)
    assert "--task mivqa" in caught.value.fix


def test_pictures_are_copied_byte_by_byte_under_their_names(clean: Path, tmp_path: Path) -> None:
    write(clean, tmp_path / "out", fraction=0.0)
    for name in ("images/a dish with spaces.png", "images/菜 二.png", "images/UPPER.JPEG", "images/turned.jpg"):
        assert sha256_file(tmp_path / "out" / name) == sha256_file(clean / name)
    assert not (tmp_path / "out" / "images" / "mi_0_0.png").exists()
    report = check_files(tmp_path / "out" / "train.jsonl")
    turned = next(look for path, look in report.looks.items() if path.name == "turned.jpg")
    assert (turned.width, turned.height) == (96, 64), f"dish {SIDEWAYS} stands upright"


def test_every_fault_is_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    write_foodieqa(tmp_path / "src", traps=True)
    with pytest.raises(UserError) as caught:
        write(tmp_path / "src", tmp_path / "out")
    told = caught.value.what
    assert "3 faulty items; nothing was written" in told
    for part in (
        "sivqa_tidy.json",
        "vqa-9",
        "not_there.jpg: no such picture",
        "the id 'vqa-8' stands already",
        "item 12 (id vqa-11)",
        "'answer' is '4'",
    ):
        assert part in told
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_skip_bad_lists_what_it_leaves_out(tmp_path: Path) -> None:
    write_foodieqa(tmp_path / "src", traps=True)
    card = write(tmp_path / "src", tmp_path / "out", skip_bad=True)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert card["skipped"] == 3
    assert {fault["kind"] for fault in skipped} == {"item", "picture"}
    assert sum(part["items"] for part in card["files"].values()) == 21


def _escape(items: list[dict[str, Any]]) -> None:
    items[0]["food_meta"]["food_file"] = "images/../../secret.png"


def _absolute(items: list[dict[str, Any]]) -> None:
    items[0]["food_meta"]["food_file"] = "/etc/passwd"


def _linked(items: list[dict[str, Any]]) -> None:
    items[0]["food_meta"]["food_file"] = "images/link.png"


def _empty_choice(items: list[dict[str, Any]]) -> None:
    items[0]["choices"][2] = "  "


def _no_question(items: list[dict[str, Any]]) -> None:
    del items[0]["question"]


def _no_dish(items: list[dict[str, Any]]) -> None:
    items[0]["food_name"] = ""


def _no_meta(items: list[dict[str, Any]]) -> None:
    del items[0]["food_meta"]


def _true(items: list[dict[str, Any]]) -> None:
    items[0]["answer"] = True


def _mark(items: list[dict[str, Any]]) -> None:
    items[0]["question"] += "<image>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_escape, "a path out of"),
        (_absolute, "not below"),
        (_linked, "a symbolic link that leads out"),
        (_empty_choice, "choices 2 is empty"),
        (_no_question, "'question' is missing"),
        (_no_dish, "'food_name' is empty"),
        (_no_meta, "'food_meta' is missing"),
        (_true, "'answer' is True"),
        (_mark, "2 <image> marks but 1 images"),
    ],
)
def test_a_faulty_item_is_named(clean: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], said: str) -> None:
    (tmp_path / "secret.png").write_bytes((clean / "images" / "alpha.png").read_bytes())
    (clean / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    edit(clean, change)
    with pytest.raises(UserError, match=r"item 1 \(id vqa-0\)") as caught:
        write(clean, tmp_path / "out")
    assert said in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "the file is empty"), (None, "damaged or cut short"), (b"%!PS-Adobe-3.0 EPSF", "not a picture")]
)
def test_a_bad_picture_stops_everything(clean: Path, tmp_path: Path, content: bytes | None, said: str) -> None:
    path = clean / "images" / "UPPER.JPEG"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=said):
        write(clean, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_that_does_not_parse_names_the_file(clean: Path) -> None:
    (clean / "sivqa_tidy.json").write_text('[{"question": NaN}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"sivqa_tidy\.json: not valid JSON"):
        read_foodieqa(clean)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_shares_no_picture_and_no_dish(clean: Path, tmp_path: Path, seed: int) -> None:
    # The same picture under a second name, and re-encoded under a third: both belong to the first.
    from PIL import Image

    Image.open(clean / "images" / "alpha.png").save(clean / "images" / "again.bmp")
    (clean / "images" / "copy.png").write_bytes((clean / "images" / "a dish with spaces.png").read_bytes())

    def change(items: list[dict[str, Any]]) -> None:
        items[8]["food_meta"]["food_file"], items[9]["food_meta"]["food_file"] = "images/again.bmp", "images/copy.png"

    edit(clean, change)
    write(clean, tmp_path / "out", seed=seed)
    train, held_out = read_records(tmp_path / "out" / "train.jsonl"), read_records(tmp_path / "out" / "eval.jsonl")
    assert len(train) + len(held_out) == 24
    assert 2 <= len(held_out) <= 8
    for tag in ("food_name",):
        assert not {r.tags[tag] for r in train} & {r.tags[tag] for r in held_out}
    assert check_files(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl").faults == ()


def test_the_same_seed_gives_the_same_folder(clean: Path, tmp_path: Path) -> None:
    cards = [write(clean, tmp_path / name, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    assert cards[0] == cards[1]
    assert cards[0]["files"]["eval.jsonl"]["sha256"] != cards[2]["files"]["eval.jsonl"]["sha256"]


def test_one_tied_group_cannot_be_split() -> None:
    with pytest.raises(UserError, match="no part of these 3 items"):
        divide(["1", "2", "3"], [{"a"}, {"a", "b"}, {"b"}], 0.2, 0)
    assert groups_of([{"a"}, {"c"}, {"a", "b"}, {"b"}, set()]) == [[0, 2, 3], [1], [4]]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_both_sides_of_a_split_hold_something(fraction: float) -> None:
    ties = [{f"picture {number // 3}"} for number in range(30)]
    division = divide([str(number) for number in range(30)], ties, fraction, 0)
    assert division.train
    assert abs(len(division.held_out) - fraction * 30) <= 3


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photographs are not on this machine")
def test_the_real_photographs_go_through(tmp_path: Path) -> None:
    card = write(PHOTOS, tmp_path / "out")
    assert sum(part["items"] for part in card["files"].values()) == 42
    assert check_files(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "eval.jsonl").faults == ()
