"""Several prompts at once give, row by row, what `engine.decode` gives for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, Phi3Config, Qwen2Config

from intervale.core.errors import UserError
from intervale.data.prompt import Picture, Turn, encode_turns
from intervale.data.tiling import cut_tiles
from intervale.engine import batch as batching
from intervale.engine.api import Sampling
from intervale.engine.batch import generate_batch, prefill_batch, score_batch
from intervale.engine.decode import encode_tiles, generate, prefill, score_continuations
from intervale.model.load import Model, load_model

TOLERANCE = 1e-5
Row = tuple[np.ndarray, torch.Tensor | None]


def with_language_model(model: Model, name: str) -> Model:
    """The tiny model with another family's language model, random: Qwen2 has biases, this Phi3 a window shorter than the prompts."""
    if name == "internlm2":
        return model
    config = model.network.config
    sizes: dict[str, Any] = {
        "vocab_size": config.text_config.vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    text = Qwen2Config(**sizes) if name == "qwen2" else Phi3Config(**sizes, sliding_window=48)
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


@pytest.fixture(scope="module", params=["internlm2", "qwen2", "phi3"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Model:
    return with_language_model(load_model(tiny, device="cpu"), request.param)


def row(model: Model, text: str, sizes: Sequence[tuple[int, int]] = ()) -> Row:
    """A prompt with pictures of these sizes."""
    drawn = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), np.uint8)) for n, size in enumerate(sizes)]
    parts = [encode_tiles(model, cut_tiles(picture, model.tiling)) for picture in drawn]
    told = (*(Picture(part.shape[0] * part.shape[1]) for part in parts), text)
    ids_S = encode_turns([Turn("user", told)], model.template, model.tokenizer, answer_next=True).ids_S
    return ids_S, torch.cat(parts) if parts else None


@pytest.fixture(scope="module")
def rows(model: Model) -> list[Row]:
    """Several lengths and tile counts, one of text alone, and two that are equal."""
    return [
        row(model, "是什么?", [(56, 56)]),
        row(model, "hi"),
        row(model, "什么菜? Which of the two?", [(56, 170), (112, 112)]),
        row(model, "What is on the plate? " * 5, [(60, 120)]),
        row(model, "hi"),
    ]


def start(model: Model, rows: Sequence[Row]) -> batching.PrefilledBatch:
    return prefill_batch(model, [ids for ids, _ in rows], [features for _, features in rows])


def one_by_one(model: Model, rows: Sequence[Row], new: int) -> list[list[int]]:
    return [list(generate(model, prefill(model, *row), Sampling(max_new_tokens=new))) for row in rows]


def test_the_rows_are_of_different_lengths(rows: list[Row]) -> None:
    lengths = [len(ids) for ids, _ in rows]
    assert len(set(lengths)) == 4
    assert max(lengths) > 1.5 * min(lengths)


def test_logits_and_cache_are_those_of_each_prompt_alone(model: Model, rows: list[Row]) -> None:
    together = start(model, rows)
    for at, (ids, features) in enumerate(rows):
        alone = prefill(model, ids, features)
        assert together.lengths[at] == alone.length
        assert (together.logits_BV[at] - alone.logits_V).abs().max() <= TOLERANCE
        for mine, its in zip(together.cache.layers, alone.cache.layers, strict=True):
            assert (mine.keys[at, :, -alone.length :] - its.keys[0]).abs().max() <= TOLERANCE
            assert (mine.values[at, :, -alone.length :] - its.values[0]).abs().max() <= TOLERANCE


def test_greedy_answers_are_those_of_each_prompt_alone(model: Model, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))  # random weights may stop at once
    alone = one_by_one(model, rows, 24)
    assert len(set(map(tuple, alone))) == 4  # two prompts are equal; the others must not all end in one loop
    assert generate_batch(model, start(model, rows), 24) == alone


def test_every_row_ends_at_its_own_stop_and_costs_nothing_after(model: Model, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    free = one_by_one(model, rows, 12)
    monkeypatch.setattr(Model, "stop_ids", (free[0][0], free[2][3], free[3][2]))
    alone = one_by_one(model, rows, 12)
    widths: list[int] = []
    real = batching._hidden
    begun = start(model, rows)
    monkeypatch.setattr(
        batching, "_hidden", lambda m, cache, embedded, *rest: widths.append(len(embedded)) or real(m, cache, embedded, *rest)
    )
    assert generate_batch(model, begun, 12) == alone
    assert len({len(ids) for ids in alone}) > 1
    assert widths == [sum(len(ids) > step for ids in alone) for step in range(1, max(map(len, alone)))]


def test_every_row_ends_where_its_context_is_full(model: Model, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "stop_ids", (-1,))
    limit = max(len(ids) for ids, _ in rows) + 3
    monkeypatch.setattr(model.network.config.text_config, "max_position_embeddings", limit)
    answers = generate_batch(model, start(model, rows), 60)
    assert answers == one_by_one(model, rows, 60)
    assert min(map(len, answers)) == 3
    assert max(map(len, answers)) == 60


def test_log_probabilities_are_those_of_each_prompt_alone_and_the_cache_is_left(model: Model, rows: list[Row]) -> None:
    texts = [["川菜", "a", "川菜，图"], ["b"], ["x" * 9, "酸辣", "y", "zz"], ["甜", "ab"], ["a", "b"]]
    asked = [[model.tokenizer.encode(text) for text in own] for own in texts]
    together = start(model, rows)
    scored = score_batch(model, together, asked)
    for (ids, features), own, values in zip(rows, asked, scored, strict=True):
        wanted = score_continuations(model, prefill(model, ids, features), own)
        assert [len(one) for one in values] == [len(one) for one in own]
        for mine, its in zip(values, wanted, strict=True):
            assert mine == pytest.approx(its, abs=TOLERANCE)
    assert together.cache.get_seq_length() == max(together.lengths)
    assert score_batch(model, together, asked) == scored


def test_one_row_and_rows_without_padding_are_batches_too(model: Model, rows: list[Row]) -> None:
    for chosen in ([rows[2]], [rows[1], rows[4]]):
        begun = start(model, chosen)
        assert begun.mask_BS is None
        asked = [[model.tokenizer.encode(text) for text in ("酸", "酸辣")]] * len(chosen)
        for own, values in zip(chosen, score_batch(model, begun, asked), strict=True):
            for mine, its in zip(values, score_continuations(model, prefill(model, *own), asked[0]), strict=True):
                assert mine == pytest.approx(its, abs=TOLERANCE)
        assert generate_batch(model, begun, 8) == one_by_one(model, chosen, 8)


def test_a_dynamic_rotary_embedding_never_sees_a_position_of_the_padding(
    model: Model, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long continuation of a short prompt beside a short one of the longest: only real positions count."""
    seen: list[int] = []
    real = batching._hidden
    monkeypatch.setattr(
        batching, "_hidden", lambda m, c, e, positions, mask: seen.append(int(positions.max())) or real(m, c, e, positions, mask)
    )
    longest = max(len(ids) for ids, _ in rows)
    asked = [[[7] * (2 if len(ids) == longest else 9)] for ids, _ in rows]
    score_batch(model, start(model, rows), asked)
    assert seen == [longest - 1, longest]


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(model: Model, rows: list[Row]) -> None:
    with pytest.raises(UserError, match="context is 2048"):
        start(model, [rows[0], row(model, "x" * 3000)])
