"""`import-xtuner`: the tutorial's config as a recipe, read as data; what differs, is missing or unread is told with its line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import draw_plates, run_command
from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.core.pyconfig import Reference, Unread, parse_pyconfig, read_pyconfig
from intervale.core.runlog import read_metrics
from intervale.train.recipe import TrainRecipe
from intervale.train.xtuner import import_config, recipe_of
from intervale.train.xtuner_walk import Imported
from xtuner_fixture import CONFIG, write_config

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> Imported:
    return import_config(read_pyconfig(path), Path("data/foodie"))


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(CONFIG.split("\n"), 1) if text in line)


def test_the_tutorials_config_is_our_recipe_of_it(tmp_path: Path) -> None:
    """recipes/foodieqa_lora.yaml was written by hand from the same file: the import must agree."""
    ours = load_recipe(ROOT / "recipes" / "foodieqa_lora.yaml", TrainRecipe)
    recipe = recipe_of(imported(write_config(tmp_path)))
    assert recipe.lora == ours.lora
    expected = ours.train.model_dump() | {"eval_steps": None}  # XTuner has no held-out loss
    assert recipe.train.model_dump() == expected
    assert recipe.data.model_dump() == ours.data.model_dump() | {"eval": None}
    assert recipe.model == "OpenGVLab/InternVL2-2B"


def test_what_differs_and_what_has_no_counterpart_is_told_with_its_line(tmp_path: Path) -> None:
    found = imported(write_config(tmp_path))
    told = {note.line: note.text for note in found.different}
    for start, word in (
        ("prompt_template =", "system text"),
        ("accumulative_counts =", "means of 2 micro-batches"),
        ("weight_decay =", "norms and biases do not decay"),
        ("dtype='float16'", "bfloat16"),
        ("llm_lora=", "llm+head"),
        ("save_steps =", "32 optimizer steps"),
        ("max_length =", "refused before the run"),
        ("randomness =", "seed"),
    ):
        assert word in told[line_of(start)], start
    missing = "\n".join(note.text for note in found.missing)
    for name in ("sampler", "collate_fn", "custom_hooks", "loss_scale", "env_cfg", "log_level"):
        assert name in missing
    assert "not known" not in missing
    assert found.unread == []
    assert found.prepare == ["intervale prepare llava food/sivqa_llava.json data/foodie --image-root food/"]


def test_the_imported_recipe_trains(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config -> recipe -> prepare, as printed -> two steps, through the command line."""
    draw_plates(tmp_path, 8)
    items = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "sivqa_llava.json").write_text(
        json.dumps(
            [
                {
                    "id": item["id"],
                    "image": item["images"][0],
                    "conversations": [
                        {"from": "human", "value": item["messages"][0]["content"]},
                        {"from": "gpt", "value": item["messages"][1]["content"]},
                    ],
                }
                for item in items
            ]
        )
    )
    config = write_config(tmp_path, tiny, tmp_path, max_epochs="2", dataloader_num_workers="0", save_steps="2")
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, "import-xtuner", config, "r.yaml", "--data", "data/foodie") == 0
    (command,) = imported(config).prepare
    assert run_command(monkeypatch, *command.split()[1:]) == 0
    assert run_command(monkeypatch, "train", "r.yaml") == 0
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "runs" / "r") if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert run_command(monkeypatch, "import-xtuner", config, "r.yaml") == 1  # nothing is overwritten


def test_nothing_of_a_config_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sentinel = tmp_path / "ran"
    attack = f"open({str(sentinel)!r}, 'w')"
    path = write_config(tmp_path)
    path.write_text(path.read_text() + f"\n{attack}\nextra = {attack}\nfor _ in [{attack}]:\n    pass\n")
    found = imported(path)
    assert len(found.unread) == 3
    assert run_command(monkeypatch, "import-xtuner", path, tmp_path / "r.yaml") == 0
    assert "NOT in the recipe" in capsys.readouterr().out
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lr": "float('3e-5')"}, r"tutorial\.py:\d+: optim_wrapper\.optimizer\.lr is `float\('3e-5'\)`, which is not read"),
        ({"batch_size": "'4'"}, r"tutorial\.py:\d+: train_dataloader\.batch_size is '4', not a whole number"),
        ({"max_epochs": "0"}, r"tutorial\.py:\d+: train_cfg\.max_epochs is 0, not a whole number of at least 1"),
        ({"accumulative_counts": "0"}, "accumulative_counts is 0"),
        ({"betas": "('x', 1)"}, "not two numbers"),
        ({"batch_size": "0"}, r"tutorial\.py:\d+: train\.batch_size"),
        ({"model": "dict(type=LLaVAModel)"}, "model.type is"),
        ({"path": "None"}, "no model_path"),
        ({"betas": "(0.9, 1.5)"}, r"tutorial\.py:\d+: train\.betas"),
    ],
)
def test_a_value_that_cannot_be_taken_names_file_line_and_fix(tmp_path: Path, changes: dict[str, str], why: str) -> None:
    text = CONFIG
    if "model" in changes:
        text = text.replace("type=InternVL_V1_5,", "type=TrainLoop,")
        (tmp_path / "tutorial.py").write_text(text)
        path = tmp_path / "tutorial.py"
    else:
        path = write_config(tmp_path, **changes)
    with pytest.raises(UserError, match=why) as caught:
        imported(path)
    assert caught.value.fix


def test_a_value_that_a_statement_may_change_is_not_trusted(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("model = dict(", "if lr:\n    lr = 1\nmodel = dict(", 1))
    with pytest.raises(UserError, match="may change it"):
        imported(path)
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "\nmodel['llm_lora']['r'] = 8\n")
    with pytest.raises(UserError, match="may change it"):
        imported(path)


def test_a_config_on_top_of_another_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text("from mmengine.config import read_base\nwith read_base():\n    from .base import *\n" + path.read_text())
    with pytest.raises(UserError, match=r"tutorial\.py:2: it builds on another config"):
        imported(path)


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("freeze_visual_encoder=True", "freeze_visual_encoder=False", "train.vision", "full"),
        ("target_modules=None", "target_modules=['wqkv', 'wo', 'w1', 'w2', 'w3']", "lora.targets", "llm"),
        ("dtype='float16'", "dtype='bfloat16'", "train.precision", "bf16"),
        ("freeze_llm=True", "freeze_llm=True, quantization_llm=True", "lora.quantize", "nf4"),
        ("seed=None", "seed=7", "train.seed", 7),
        ("type=CosineAnnealingLR, eta_min=0.0,", "type=LinearLR, start_factor=1, end_factor=0,", "train.schedule", "linear"),
        ("lr = 3e-5", "lr = 2 * 3e-5 / 2", "train.learning_rate", 3e-5),
        ("max_norm = 1", "max_norm: int = 5 - 4", "train.max_norm", 1),
        ("batch_size = 4", "batch_size = 4\nbatch_size *= 2", "train.batch_size", 8),
        ("path = 'MODEL'", "import os.path as osp\npath = osp.join('a', 'b')", "model", "a/b"),
    ],
)
def test_each_setting_reaches_its_key(tmp_path: Path, old: str, new: str, key: str, value: Any) -> None:
    assert old in CONFIG
    (tmp_path / "c.py").write_text(CONFIG.replace(old, new, 1))
    assert imported(tmp_path / "c.py").values[key] == value


def test_a_four_bit_base_without_lora_is_told(tmp_path: Path) -> None:
    begin, _, end = CONFIG.partition("    llm_lora=")
    (tmp_path / "c.py").write_text(f"{begin}    quantization_llm=True)\n{end.partition(chr(10))[2]}")
    found = imported(tmp_path / "c.py")
    assert "lora.quantize" not in found.values
    assert any(note.text.startswith("model.quantization_llm = True") for note in found.missing)


def test_unknown_settings_are_listed_and_narrow_targets_are_told(tmp_path: Path) -> None:
    text = CONFIG.replace("target_modules=None", "target_modules=['wqkv'], use_dora=True") + "my_option = 3\n"
    (tmp_path / "c.py").write_text(text)
    missing = "\n".join(note.text for note in imported(tmp_path / "c.py").missing)
    for word in ("my_option = 3: not known", "model.llm_lora.use_dora = True: not known", "target_modules ['wqkv']"):
        assert word in missing


def test_the_reader_keeps_lines_and_reads_only_data() -> None:
    config = parse_pyconfig(
        "from a.b import C as D\nx = dict(p=D, q=[1, -2], **{'r': f'{3}z'})\ny = [i for i in x]\nz = 'a' * 10 ** 9\nw = 9 ** 9 ** 9\n",
        "c.py",
    )
    assert config.values["x"].plain() == {"p": "a.b.C", "q": [1, -2], "r": "3z"}
    assert config.values["x"].value["p"].value == Reference("a.b.C")
    for name, line in (("y", 3), ("z", 4), ("w", 5)):
        assert isinstance(config.values[name].value, Unread)
        assert config.values[name].line == line


@pytest.mark.parametrize(
    "text", ["x = (", "x = " + "-" * 5000 + "1", "x = '\0'", "x = " + "(" * 300 + ")" * 300, "x = " + "1+" * 9000 + "1"]
)
def test_text_that_is_no_config_is_refused_or_unread(text: str) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(parse_pyconfig(text, "c.py").values["x"].value, Unread)
