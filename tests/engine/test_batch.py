"""Several prompts at once, sharing what they have in common or not, give prompt by prompt what `engine.decode` gives for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, Phi3Config, Qwen2Config

from intervale.core.errors import UserError
from intervale.data.prompt import Picture, Turn, encode_turns
from intervale.data.tiling import cut_tiles
from intervale.engine import batch as batching
from intervale.engine.api import Sampling
from intervale.engine.batch import generate_batch, score_batch
from intervale.engine.decode import encode_tiles, generate, prefill, score_continuations
from intervale.engine.tree import Prompt
from intervale.model.load import Model, load_model

TOLERANCE = 1e-5
SHORT, LONG = [1.0 + 0.1 * n for n in range(8)], [2.0 + 0.3 * n for n in range(8)]


def with_language_model(model: Model, name: str) -> Model:
    """The tiny model with another family's language model, random: Qwen2 has biases, `qwen2-window` a window in its second layer,
    `phi3` one shorter than the prompts, `phi3-long` a rotary embedding that changes with the longest position of a pass."""
    if name == "internlm2":
        return model
    config = model.network.config
    sizes: dict[str, Any] = {
        "vocab_size": config.text_config.vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}
    text = {
        "llama": lambda: LlamaConfig(**sizes),
        "qwen2": lambda: Qwen2Config(**sizes),
        "qwen2-window": lambda: Qwen2Config(**sizes, use_sliding_window=True, sliding_window=48, max_window_layers=1),
        "phi3": lambda: Phi3Config(**sizes, sliding_window=48),
        "phi3-long": lambda: Phi3Config(**sizes, sliding_window=None, original_max_position_embeddings=1024, rope_parameters=rope),
    }[name]()
    torch.manual_seed(0)
    network = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=text.to_dict(),
            image_token_id=config.image_token_id,
            downsample_ratio=config.downsample_ratio,
        )
    ).eval()
    for name_, parameter in network.named_parameters():
        if parameter.ndim == 1 and "norm" not in name_:
            torch.nn.init.normal_(parameter, std=0.1)  # biases of zero would hide a mistake
        elif "language_model" in name_ or "lm_head" in name_:
            torch.nn.init.normal_(parameter, std=0.3)
    return replace(model, network=network.requires_grad_(False))


@pytest.fixture(scope="module", params=["internlm2", "llama", "qwen2", "qwen2-window", "phi3", "phi3-long"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Model:
    return with_language_model(load_model(tiny, device="cpu"), request.param)


def drawn(model: Model, size: tuple[int, int], seed: int = 0) -> tuple[str, torch.Tensor]:
    """A picture: what it is, its features."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))
    return f"{size}-{seed}", encode_tiles(model, cut_tiles(picture, model.tiling))


def prompt(model: Model, *parts: Any) -> Prompt:
    """A user's turn of pictures and texts, in this order."""
    pictures = [part for part in parts if not isinstance(part, str)]
    told = tuple(part if isinstance(part, str) else Picture(part[1].shape[0] * part[1].shape[1]) for part in parts)
    ids_S = encode_turns([Turn("user", told)], model.template, model.tokenizer, answer_next=True).ids_S
    return Prompt(ids_S, tuple(pictures))


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[Prompt]:
    """Several lengths and tile counts, one of text alone, and two that are equal."""
    return [
        prompt(model, drawn(model, (56, 56)), "是什么?"),
        prompt(model, "hi"),
        prompt(model, drawn(model, (56, 170)), drawn(model, (112, 112), 1), "什么菜? Which of the two?"),
        prompt(model, drawn(model, (60, 120)), "What is on the plate? " * 5),
        prompt(model, "hi"),
    ]


@pytest.fixture(scope="module")
def rows(model: Model) -> list[list[Prompt]]:
    """Prompts that share their beginnings: one picture's questions (two equal, one the start of another), two pictures with the second
    differing or in another place, a question before its picture, texts alone, and a prompt on its own."""
    plate, soup, bowl = drawn(model, (170, 170)), drawn(model, (56, 120), 1), drawn(model, (56, 120), 2)
    return [
        [prompt(model, plate, text) for text in ("是什么? 酸", "是什么? 辣的还是甜的?", "Which?", "是什么? 酸", "是什么")],
        [prompt(model, plate, soup, "Which?"), prompt(model, plate, bowl, "Which?"), prompt(model, plate, "a", soup, "Which is it?")],
        [prompt(model, "是什么菜?\n", soup), prompt(model, "是什么菜?\n", bowl), prompt(model, "是什么?\n", soup)],
        [prompt(model, "hi"), prompt(model, "hi there, what is sour?"), prompt(model, "hi")],
        [prompt(model, plate, "alone")],
    ]


def flat(rows: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    return [prompt for row in rows for prompt in row]


def apart(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """A row each: nothing is shared."""
    return [[prompt] for prompt in prompts]


def prefilled(model: Model, asked: Prompt) -> Any:
    return prefill(model, asked.ids_S, torch.cat([part for _, part in asked.pictures]) if asked.pictures else None)


def one_by_one(model: Model, prompts: Sequence[Prompt], new: int) -> list[list[int]]:
    return [list(generate(model, prefilled(model, asked), Sampling(max_new_tokens=new))) for asked in prompts]


def scored_alone(model: Model, prompts: Sequence[Prompt], asked: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
    return [score_continuations(model, prefilled(model, one), own) for one, own in zip(prompts, asked, strict=True)]


def encoded(model: Model, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    return [[model.tokenizer.encode(text) for text in own] for own in texts]


def same(mine: list[list[list[float]]], its: list[list[list[float]]]) -> None:
    assert [[len(one) for one in own] for own in mine] == [[len(one) for one in own] for own in its]
    for own, others in zip(mine, its, strict=True):
        for one, other in zip(own, others, strict=True):
            assert one == pytest.approx(other, abs=TOLERANCE)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(rows, positions of a row, longest position) of every pass from now on."""
    seen: list[tuple[int, int, int]] = []
    real = batching._hidden

    def noted(model: Model, cache: Any, embedded: torch.Tensor, positions: torch.Tensor, mask: Any) -> torch.Tensor:
        seen.append((*embedded.shape[:2], int(positions.max())))
        return real(model, cache, embedded, positions, mask)

    monkeypatch.setattr(batching, "_hidden", noted)
    return seen


TEXTS = [["川菜", "a", "川菜，图"], ["b"], ["x" * 9, "酸辣", "y", "zz"], ["甜", "ab"], ["a", "b"]]


def test_the_prompts_are_of_different_lengths(prompts: list[Prompt]) -> None:
    lengths = [len(asked.ids_S) for asked in prompts]
    assert len(set(lengths)) == 4
    assert max(lengths) > 1.5 * min(lengths)


def test_log_probabilities_of_shared_prompts_are_those_of_each_alone(model: Model, rows: list[list[Prompt]]) -> None:
    asked = encoded(model, [TEXTS[n % len(TEXTS)] for n in range(len(flat(rows)))])
    same(score_batch(model, rows, asked), scored_alone(model, flat(rows), asked))
    for row in rows:  # without the padding of other rows
        asked = encoded(model, [["酸", "酸辣", "b"]] * len(row))
        same(score_batch(model, [row], asked), scored_alone(model, row, asked))
        letters = [[own[0][:1], own[2][:1]] for own in asked]  # nothing stands behind the prompts
        same(score_batch(model, [row], letters), scored_alone(model, row, letters))


def test_log_probabilities_of_prompts_apart_are_those_of_each_alone(model: Model, prompts: list[Prompt]) -> None:
    asked = encoded(model, TEXTS)
    scored = score_batch(model, apart(prompts), asked)
    same(scored, scored_alone(model, prompts, asked))
    assert score_batch(model, apart(prompts), asked) == scored


def test_greedy_answers_of_shared_prompts_are_those_of_each_alone(
    model: Model, rows: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))  # random weights may stop at once
    alone = one_by_one(model, flat(rows), 24)
    assert len(set(map(tuple, alone))) >= 9  # four prompts of the fifteen are equal to others; the rest must not all end in one loop
    assert generate_batch(model, rows, 24) == alone
    monkeypatch.setattr(Model, "stop_ids", tuple({alone[0][3], alone[2][5], alone[5][1], alone[9][7]}))
    stopped = one_by_one(model, flat(rows), 24)
    assert len({len(ids) for ids in stopped}) > 2
    assert generate_batch(model, rows, 24) == stopped
    for row in rows:
        assert generate_batch(model, [row], 24) == one_by_one(model, row, 24)


def test_greedy_answers_of_prompts_apart_are_those_of_each_alone(
    model: Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    alone = one_by_one(model, prompts, 24)
    assert len(set(map(tuple, alone))) == 4
    assert generate_batch(model, apart(prompts), 24) == alone


def test_what_is_shared_goes_through_the_network_once(model: Model, rows: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes(monkeypatch)
    one = rows[0]
    score_batch(model, [one], encoded(model, [["酸", "酸辣"]] * len(one)))
    trunk, crown = seen
    whole = sum(len(asked.ids_S) for asked in one)
    assert trunk[0] == crown[0] == 1
    assert trunk[1] > 0.8 * min(len(asked.ids_S) for asked in one)
    assert trunk[1] + crown[1] < 0.4 * whole


def test_every_answer_ends_at_its_own_stop_and_costs_nothing_after(
    model: Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    free = one_by_one(model, prompts, 12)
    monkeypatch.setattr(Model, "stop_ids", (free[0][0], free[2][3], free[3][2]))
    alone = one_by_one(model, prompts, 12)
    assert len({len(ids) for ids in alone}) > 1
    steps = range(1, max(map(len, alone)))
    seen = passes(monkeypatch)
    assert generate_batch(model, apart(prompts), 12) == alone
    assert [rows for rows, _, _ in seen[1:]] == [sum(len(ids) > step for ids in alone) for step in steps]
    seen.clear()
    shared = [prompts[:1], prompts[1:]]  # the two that are equal have one answer
    assert generate_batch(model, shared, 12) == alone
    living = [[sum(len(ids) > step for ids in own) for own in (alone[:1], alone[1:4])] for step in steps]
    assert [(rows, width) for rows, width, _ in seen[2:]] == [(sum(n > 0 for n in own), max(own)) for own in living]


def test_every_answer_ends_where_its_context_is_full(
    model: Model, prompts: list[Prompt], rows: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    for asked in (apart(prompts), rows[:1]):
        limit = max(len(one.ids_S) for one in flat(asked)) + 3
        monkeypatch.setattr(model.network.config.text_config, "max_position_embeddings", limit)
        answers = generate_batch(model, asked, 6)
        assert answers == one_by_one(model, flat(asked), 6)
        assert min(map(len, answers)) == 3
        assert max(map(len, answers)) == 6


def test_a_dynamic_rotary_embedding_never_sees_a_position_of_the_padding(
    model: Model, prompts: list[Prompt], rows: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long continuation of a short prompt beside a short one of the longest: only real positions count."""
    seen = passes(monkeypatch)
    longest = max(len(asked.ids_S) for asked in prompts)
    asked = [[[7] * (2 if len(one.ids_S) == longest else 9)] for one in prompts]
    score_batch(model, apart(prompts), asked)
    assert [position for _, _, position in seen] == [longest - 1, longest]
    seen.clear()
    score_batch(model, rows, [[[7]]] * len(flat(rows)))
    assert max(position for _, _, position in seen) == max(len(one.ids_S) for one in flat(rows)) - 1


def test_beyond_its_turn_a_rotary_embedding_is_the_long_one_for_shared_prompts_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [drawn(model, (230, 230), seed) for seed in range(8)]
    before = "rice " * 160
    row = [prompt(model, before, *pictures, text) for text in ("是什么?", "Which is sour?")]
    assert min(len(asked.ids_S) for asked in row) > 1024 + 40
    asked = encoded(model, [["酸", "酸辣"]] * 2)
    same(score_batch(model, [row], asked), scored_alone(model, row, asked))
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    assert generate_batch(model, [row], 4) == one_by_one(model, row, 4)


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(model: Model, prompts: list[Prompt]) -> None:
    with pytest.raises(UserError, match="context is 2048"):
        generate_batch(model, apart([prompts[0], prompt(model, "x" * 3000)]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_embedded_models_log_probabilities_differ_by_rounding_alone(dtype: torch.dtype) -> None:
    """Trained weights, log-probabilities down to -20: in float32 they differ by a millionth of their size; in float64 by nothing that
    a float32 logit shows."""
    nano = load_model("nano", device="cpu")
    nano = replace(nano, network=nano.network.to(dtype))
    key, features = drawn(nano, (448, 336))
    row = [prompt(nano, (key, features.to(dtype)), text) for text in ("图中的菜属于哪个菜系?", "图片中的食物通常是什么味道?", "Which?")]
    asked = encoded(nano, [["川菜，", "粤菜，", "酸辣，"]] * 3)
    scored, alone = score_batch(nano, [row], asked), scored_alone(nano, row, asked)
    values, others = ([value for own in side for ids in own for value in ids] for side in (scored, alone))
    assert min(others) < -8
    assert values == pytest.approx(others, rel=1e-6, abs=1e-5 if dtype == torch.float32 else 2e-6)
