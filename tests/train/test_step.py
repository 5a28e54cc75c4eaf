"""Each device changes the speed, not the step: equivalences in float32 with dropout 0."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.records import Message, Record, read_records
from intervale.data.dataset import Item, TileCache, load_item
from intervale.model.attention import use_packed_attention
from intervale.model.decoder import Walk
from intervale.model.forward import normalise, tower_features
from intervale.model.load import load_network, text_side
from intervale.train.batches import Packing, collate, load_step
from intervale.train.prepare import draws_masks, freeze_and_adapt, recompute_tower, set_modes
from intervale.train.recipe import Data, Lora, Train, TrainRecipe
from intervale.train.state import trainable
from intervale.train.step import Compute, _features, accumulate, batch_losses, held_out

TOKEN = 267  # <IMG_CONTEXT> of `tiny`


def recipe(**train: object) -> TrainRecipe:
    return TrainRecipe(model="m", data=Data(train="t"), lora=Lora(rank=4, alpha=8, dropout=0.0, targets="llm+head"), train=Train(**train))


@pytest.fixture(scope="module")
def items(tiny: Path, plates: Path) -> list[Item]:
    side = text_side(tiny)
    assert side.tokenizer.control("<IMG_CONTEXT>") == TOKEN
    cache = TileCache()
    return [load_item(record, side.tokenizer, side.template, side.tiling, cache) for record in read_records(plates / "train.jsonl")]


def packed(network: InternVLForConditionalGeneration) -> InternVLForConditionalGeneration:
    use_packed_attention(network)
    return network


class Remembered(dict[str, torch.Tensor]):
    """Features by key, as a run keeps them."""

    projected = False

    def get(self, key: str) -> torch.Tensor:  # type: ignore[override]
        return self[key]


def remembered(network: InternVLForConditionalGeneration, items: list[Item]) -> Remembered:
    tiles = {picture.key: picture.tiles_PHWC for item in items for picture in item.pictures}
    with torch.no_grad():
        return Remembered(
            {key: tower_features(network, normalise(torch.from_numpy(own.copy()), torch.float32)) for key, own in tiles.items()}
        )


def gradients(
    tiny: Path, items: list[Item], sizes: list[int], keep: bool = False, share: bool = False, **train: object
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss of the step, gradient by name) with the items in micro-batches of these sizes."""
    network = load_network(tiny, dtype=torch.float32)
    chosen = recipe(**train)
    freeze_and_adapt(network, chosen)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    set_modes(network, chosen, True)
    if train.get("checkpointing") == "on":
        recompute_tower(network, chosen)
    bounds = np.cumsum([0, *sizes])
    kept = remembered(network, items) if keep else None
    if keep:
        items = [replace(item, pictures=tuple(replace(picture, tiles_PHWC=None) for picture in item.pictures)) for item in items]
    batches = [collate(items[a:b], TOKEN, share) for a, b in itertools.pairwise(bounds)]
    walk = Walk(recompute=train.get("checkpointing") == "on")
    compute = Compute(torch.float32, torch.device("cpu"), TOKEN, kept, walk)
    targets = sum(batch.targets for batch in batches)
    for _ in range(2 if keep else 1):  # the second pass takes every feature from memory
        network.zero_grad()
        sums = accumulate(network, batches, compute, targets)
    return sums.loss / targets, {name: parameter.grad for name, parameter in trainable(network).items() if parameter.grad is not None}


def assert_same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert abs(a[0] - b[0]) <= 1e-5 * abs(a[0])
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        if name.endswith("k_proj.bias"):  # adds the same to all scores of a query: its gradient is 0, and what is left is rounding
            others = a[1][name.replace("k_proj", "q_proj")].norm()
            assert max(gradient.norm(), b[1][name].norm()) <= 1e-5 * others, name
            continue
        assert (gradient - b[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [2, 5, 1]])
@pytest.mark.parametrize("train", [{}, {"vision": "full", "llm": "full"}], ids=["lora", "full"])
def test_micro_batches_of_any_size_give_the_same_step(tiny: Path, items: list[Item], sizes: list[int], train: dict[str, object]) -> None:
    assert_same(gradients(tiny, items, [8], **train), gradients(tiny, items, sizes, **train))


def test_kept_features_give_the_step_of_live_ones(tiny: Path, items: list[Item]) -> None:
    assert_same(gradients(tiny, items, [4, 4]), gradients(tiny, items, [4, 4], keep=True))


def test_checkpointing_changes_nothing(tiny: Path, items: list[Item]) -> None:
    full = {"vision": "full", "llm": "full"}
    assert_same(gradients(tiny, items, [4, 4], **full), gradients(tiny, items, [4, 4], checkpointing="on", **full))


def test_the_loss_is_transformers_own_on_one_item(tiny: Path, items: list[Item]) -> None:
    network = load_network(tiny, dtype=torch.float32)
    item = items[0]
    network.config.image_token_id = TOKEN
    sums = held_out(packed(network), [collate([item], TOKEN)], Compute(torch.float32, torch.device("cpu"), TOKEN))
    network.model.language_model.set_attn_implementation("sdpa")
    labels = torch.where(torch.from_numpy(item.trained_S), torch.from_numpy(item.ids_S), -100)[None]
    pixels = normalise(torch.from_numpy(item.pictures[0].tiles_PHWC.copy()), torch.float32)
    wanted = network(input_ids=torch.from_numpy(item.ids_S)[None], pixel_values=pixels, labels=labels).loss
    assert sums.loss / sums.targets == pytest.approx(float(wanted), rel=1e-6)
    assert sums.targets == int(item.trained_S.sum())


def test_samples_of_a_batch_do_not_leak_into_each_other(tiny: Path, items: list[Item]) -> None:
    network = load_network(tiny, dtype=torch.float32)
    packed(network)
    compute = Compute(torch.float32, torch.device("cpu"), TOKEN)
    alone = [held_out(network, [collate([item], TOKEN)], compute).loss for item in items]
    together = held_out(network, [collate(items, TOKEN)], compute).loss
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_frozen_parts_stay_frozen_and_lora_stays_out_of_the_tower(tiny: Path, items: list[Item]) -> None:
    names = gradients(tiny, items, [8], projector="frozen")[1].keys()
    assert names
    assert all(".lora_" in name and ("language_model.layers" in name or name.startswith("lm_head")) for name in names)
    assert any(name.startswith("lm_head") for name in names)
    vision = gradients(tiny, items, [8], projector="frozen", llm="frozen", vision="lora")[1].keys()
    assert vision
    assert all("vision_tower" in name for name in vision)


@pytest.fixture(scope="module")
def asked(tiny: Path, plates: Path) -> list[Item]:
    """Three questions on each of three pictures, one on a fourth, one on two pictures, and one without any."""
    side, cache = text_side(tiny), TileCache()
    files = sorted({record.images[0] for record in read_records(plates / "train.jsonl")})
    told = [(n, (files[n],), f"<image>\n{text}?") for n in range(3) for text in ("colour", "what is its colour", "size")]
    told += [(3, (files[3],), "<image>\ncolour?"), (4, (files[0], files[1]), "<image><image>\nsame?"), (5, (), "hello")]
    records = [
        Record(f"q{at}", (Message("user", text), Message("assistant", f"answer {n} {at}")), images, root=plates)
        for at, (n, images, text) in enumerate(told)
    ]
    return [load_item(record, side.tokenizer, side.template, side.tiling, cache) for record in records]


@pytest.mark.parametrize("train", [{}, {"vision": "full", "llm": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("sizes", [[12], [5, 7]])
def test_questions_that_share_a_picture_give_the_step_of_separate_ones(
    tiny: Path, asked: list[Item], sizes: list[int], train: dict[str, object]
) -> None:
    apart, together = (gradients(tiny, asked, sizes, share=share, **train) for share in (False, True))
    assert_same(apart, together)


def test_turns_long_answers_and_other_beginnings_on_one_picture_give_the_step_of_separate_rows(tiny: Path, plates: Path) -> None:
    """Several turns, one answer of 200 characters, one system text of its own, one picture behind the first answer, one item twice."""
    side, cache = text_side(tiny), TileCache()
    image = read_records(plates / "train.jsonl")[0].images[0]
    ask, tell = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    turns = [
        (ask("<image>\ncolour?"), tell("red")),
        (ask("<image>\ncolour?"), tell("red")),
        (ask("<image>\ncolour?"), tell("blue" * 50)),
        (ask("<image>\nsize?"), tell("big"), ask("how big?"), tell("very")),
        (Message("system", "be brief"), ask("<image>\nsize?"), tell("big")),
        (ask("look"), tell("at what?"), ask("<image>\nthis"), tell("red")),
        (ask("say <image> this"), tell("no")),
    ]
    records = [Record(f"m{at}", messages, (image,), root=plates) for at, messages in enumerate(turns)]
    items = [load_item(record, side.tokenizer, side.template, side.tiling, cache) for record in records]
    assert_same(gradients(tiny, items, [7]), gradients(tiny, items, [7], share=True))
    assert collate(items, TOKEN, share=True).ids_1T.numel() < sum(len(item.ids_S) for item in items)


def test_sharing_holds_a_picture_and_its_text_once(asked: list[Item]) -> None:
    apart, together = (collate(asked, TOKEN, share) for share in (False, True))
    assert together.targets == apart.targets
    pictures = sum(int((batch.ids_1T == TOKEN).sum()) for batch in (together,))
    assert pictures < 0.6 * int((apart.ids_1T == TOKEN).sum())
    assert len(together.slots) == 3 + 1 + 2
    assert together.ids_1T.numel() < 0.7 * apart.ids_1T.numel()


def test_every_item_of_a_shared_row_has_its_own_loss(tiny: Path, asked: list[Item]) -> None:
    network = packed(load_network(tiny, dtype=torch.float32))
    compute = Compute(torch.float32, torch.device("cpu"), TOKEN)
    alone = torch.cat([batch_losses(network, collate([item], TOKEN).to(compute.device), compute)[0] for item in asked])
    together = batch_losses(network, collate(asked, TOKEN, share=True).to(compute.device), compute)[0]
    assert torch.allclose(alone.sort().values, together.sort().values, rtol=1e-5, atol=1e-6)  # rows stand in the order of their lengths


def test_a_pack_is_refused_by_a_network_that_would_mix_its_rows(tiny: Path, items: list[Item]) -> None:
    network = load_network(tiny, dtype=torch.float32)
    with pytest.raises(AssertionError, match="see each other"):
        held_out(network, [collate(items[:2], TOKEN)], Compute(torch.float32, torch.device("cpu"), TOKEN))


@pytest.mark.parametrize(("dropout", "other"), [(0.5, True), (0.0, False)])
def test_a_tower_with_dropout_sees_one_picture_anew_for_every_item(tiny: Path, items: list[Item], dropout: float, other: bool) -> None:
    """As a trainer without sharing does: one mask for two items would make their gradients alike. Without dropout it is seen once."""
    chosen = recipe(vision="lora").model_copy(update={"lora": Lora(rank=4, alpha=8, dropout=dropout)})
    network = load_network(tiny, dtype=torch.float32)
    freeze_and_adapt(network, chosen)
    set_modes(network, chosen, True)
    for name, parameter in network.named_parameters():
        if "vision_tower" in name and "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    assert draws_masks(network.model.vision_tower) == other
    (batch,) = load_step(
        [Record(str(n), ()) for n in range(2)],
        lambda record: items[0],
        range(2),
        Packing(2, apart=draws_masks(network.model.vision_tower)),
        TOKEN,
    ).batches
    found = _features(network, batch, Compute(torch.float32, torch.device("cpu"), TOKEN))
    assert found is not None
    first, second = found.chunk(2)
    assert torch.equal(first, second) != other
    assert len(batch.tiles_PHWC) == (2 if other else 1) * len(items[0].pictures[0].tiles_PHWC)
