"""The plan for the memory: as much at once as there is room for, and a ladder down to what must fit."""

import pytest
import torch

from intervale.train.memory import Fit, after_first_step, at_once, first_fit, in_words, lower, what_to_set
from intervale.train.recipe import Data, Train, TrainRecipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


def recipe(**train: object) -> TrainRecipe:
    return TrainRecipe(model="m", data=Data(train="t"), train=Train(**train))


@pytest.mark.parametrize(
    ("room", "fit"),
    [
        (60 * GIB, Fit(16384, False)),  # all that helps
        (16 * GIB, Fit(6953, False)),  # 85% of the room
        (6 * GIB, Fit(3400, False)),  # less than one item by the estimate: one is tried
        (3 * GIB, Fit(16384, True)),  # hopeless without recomputing, plenty with it
    ],
)
def test_a_gpu_gets_packs_as_large_as_its_memory_has_room_for(room: int, fit: Fit) -> None:
    assert first_fit(recipe(), CUDA, 3400, room, kept=2.1e6, recomputed=1e5) == fit


def test_what_the_recipe_says_holds() -> None:
    assert first_fit(recipe(pack_tokens=1, checkpointing="on"), CUDA, 3400, 60 * GIB, 2.1e6, 1e5) == Fit(1, True)
    assert first_fit(recipe(checkpointing="off"), CUDA, 3400, 1 * GIB, 2.1e6, 1e5) == Fit(3400, False)


def test_a_cpu_takes_batch_size_items_and_recomputes_when_the_estimate_is_too_much() -> None:
    assert first_fit(recipe(batch_size=4), CPU, 1000, 20 * GIB, 2.1e6, 1e5) == Fit(0, False)
    assert first_fit(recipe(batch_size=4), CPU, 1000, 4 * GIB, 2.1e6, 1e5) == Fit(0, True)


def test_the_ladder_halves_packs_down_to_an_item_then_recomputes_then_ends() -> None:
    rungs, fit = [], lower(Fit(16384, False), recipe(), 3400)
    while fit is not None:
        rungs.append(fit)
        fit = lower(fit, recipe(), 3400)
    assert rungs == [Fit(8192, False), Fit(4096, False), Fit(3400, False), Fit(3400, True)]
    assert lower(Fit(3400, False), recipe(checkpointing="off"), 3400) is None
    assert lower(Fit(0, False), recipe(batch_size=4), 100) == Fit(200, False)


def test_the_plan_is_told() -> None:
    assert in_words(Fit(16384, True), recipe()) == "packs of up to 16,384 tokens, activations recomputed"
    assert in_words(Fit(0, False), recipe(batch_size=4)) == "packs of 4 items"


def test_what_the_first_step_took_makes_packs_smaller_and_never_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "memory_allocated": 8 * GIB,
        "max_memory_allocated": 12 * GIB,
        "memory_reserved": 12 * GIB,
        "mem_get_info": (4 * GIB, 16 * GIB),
    }
    for name, value in measured.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert after_first_step(Fit(16384, False), CUDA, 1000, 4096) == Fit(6881, False)
    assert after_first_step(Fit(1, True), CUDA, 1000, 4096) == Fit(1, True)  # an item at a time, as the recipe says
    assert after_first_step(Fit(600, False), CUDA, 1000, 4096) == Fit(600, False)


def test_the_most_that_goes_through_at_once_is_an_item_at_least_and_a_step_at_most() -> None:
    assert at_once(Fit(1, False), recipe(), 3400, 8) == 3400
    assert at_once(Fit(16384, False), recipe(), 3400, 8) == 16384
    assert at_once(Fit(16384, False), recipe(), 340, 8) == 2720
    assert at_once(Fit(0, False), recipe(batch_size=4), 3400, 8) == 13600
    # a CPU recomputes when what goes through at once is too much, not when batch_size items were
    assert first_fit(recipe(batch_size=8, pack_tokens=1), CPU, 1000, 4 * GIB, 2.1e6, 1e5) == Fit(1, False)


@pytest.mark.parametrize(
    ("train", "gpu", "climbed", "told"),
    [
        ({}, True, True, "set lora.quantize: nf4, or lower data.max_tiles"),  # the ladder has tried the rest
        ({"checkpointing": "off"}, True, True, "set train.checkpointing: on, lora.quantize: nf4, or lower data.max_tiles"),
        ({"pack_tokens": 1, "checkpointing": "on", "llm": "frozen"}, True, True, "lower data.max_tiles"),
        ({}, False, False, "set train.pack_tokens: 1 (an item at a time, the same step), train.checkpointing: on, or lower data.max_tiles"),
        ({"pack_tokens": 1, "llm": "full"}, False, False, "set train.checkpointing: on, train.llm: lora, or lower data.max_tiles"),
    ],
)
def test_the_advice_names_what_still_helps_and_nothing_that_was_tried(
    train: dict[str, object], gpu: bool, climbed: bool, told: str
) -> None:
    assert what_to_set(recipe(**train), gpu, climbed) == told
