from pathlib import Path

import pytest

from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.train.recipe import TrainRecipe

BASE = "model: m\ndata: {train: t.jsonl}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> TrainRecipe:
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", TrainRecipe, overrides)


def test_exponents_are_numbers_and_overrides_win(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + "train: {learning_rate: 3e-5, epochs: 2}\n", "train.epochs=7", "lora.rank=4", "data.max_tiles=2")
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.lora.rank, recipe.data.max_tiles) == (3e-5, 7, 4, 2)


def test_on_and_off_are_words(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "train: {checkpointing: on}\n").train.checkpointing == "on"
    assert load(tmp_path, BASE, "train.checkpointing=off").train.checkpointing == "off"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BASE + "train: {learnig_rate: 1}\n", "did you mean 'learning_rate'"),
        (BASE + "lerning_rate: 1\n", "unknown key 'lerning_rate'"),
        (BASE + "batch_size: 4\n", "did you mean 'train.batch_size'"),
        ("model: m\ndata: {train: [{path: a.jsonl}, {path: b.jsonl, wieght: 2}]}\n", "'data.train.1.wieght' (did you mean 'weight'?)"),
        (BASE + "train: {epochs: '3'}\n", "train.epochs"),
        (BASE + "train: {epochs: 0}\n", "train.epochs"),
        (BASE + "train: {learning_rate: .nan}\n", "train.learning_rate"),
        (BASE + "train: {vision: frozen, projector: frozen, llm: frozen}\n", "nothing is trained"),
        (BASE + "train: {save_total_limit: 0}\n", "-1 to keep all"),
        ("model: m\n", "data is missing"),
        (BASE + "train: {epochs: 1}\ntrain: {epochs: 2}\n", "stands twice"),
        (BASE + "train: {epochs\n", "not valid YAML"),
        ("- a\n", "key: value"),
        (BASE + "train: {epochs: 1:30:00}\n", "train.epochs"),
        (BASE + "out: 2024-13-45\n? [a]\n: b\n", "not valid YAML"),
        (BASE + "train: {epochs: " + "[" * 3000, "not valid YAML"),
    ],
)
def test_each_fault_of_a_recipe_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=r"r\.yaml") as caught:
        load(tmp_path, text)
    assert why in caught.value.what


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, BASE + "train: {epochs: 0, batch_size: 0, foo: 1}\n")
    assert all(name in caught.value.what for name in ("train.epochs", "train.batch_size", "train.foo"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {pack_tokens: 0}", "train.pack_tokens: input should be 'auto', or greater than or equal to 1 (it is 0)"),
        ("train: {pack_tokens: all}", "train.pack_tokens: input should be 'auto', or a valid integer (it is 'all')"),
        ("data: {train: [{path: a, weight: 0}]}", "data.train.0.weight: input should be greater than 0 (it is 0)"),
        ("data: {train: 5}", "data.train: input should be a valid string, or a valid list (it is 5)"),
        ("train: {llm: frozen, projector: frozen}", "nothing is trained: vision, projector and llm are all frozen"),
        ("train: {batch-size: 3}", "unknown key 'train.batch-size' (did you mean 'batch_size'?)"),
        ("lora: {alpha: .inf}", "lora.alpha: input should be a finite number (it is inf)"),
    ],
)
def test_a_fault_is_one_line_in_words_for_people(tmp_path: Path, text: str, told: str) -> None:
    data = "" if text.startswith("data") else "data: {train: t}\n"
    (tmp_path / "r.yaml").write_text(f"model: m\n{data}{text}")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml", TrainRecipe)
    assert caught.value.what == f"{tmp_path / 'r.yaml'}: {told}"
