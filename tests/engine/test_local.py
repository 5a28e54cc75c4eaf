from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batch import with_language_model
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from intervale.core.errors import UserError
from intervale.data.prompt import Turn, encode_turns
from intervale.engine.api import ChatTurn, Request, Sampling
from intervale.engine.decode import encode_tiles, generate, prefill, score_continuations
from intervale.engine.local import LocalEngine, answer
from intervale.model.load import Model, load_model
from intervale.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny, device="cpu")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8))


def test_greedy_answers_are_transformers_own_tokens(model: Model, picture: Image.Image) -> None:
    from intervale.data.prompt import Picture
    from intervale.data.tiling import cut_tiles
    from intervale.model.forward import normalise

    tiles = cut_tiles(picture, model.tiling)
    tokens = len(tiles) * model.tiling.tokens_per_tile
    ids_S = encode_turns([Turn("user", (Picture(tokens), "\n是什么?"))], model.template, model.tokenizer, answer_next=True).ids_S
    ours = list(generate(model, prefill(model, ids_S, encode_tiles(model, tiles)), Sampling(max_new_tokens=20)))
    theirs = model.network.generate(
        input_ids=torch.from_numpy(ids_S)[None],
        attention_mask=torch.ones(1, len(ids_S), dtype=torch.long),
        pixel_values=normalise(torch.from_numpy(tiles), torch.float32),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=list(model.stop_ids),
        pad_token_id=2,
    )[0, len(ids_S) :].tolist()
    assert ours == theirs


def test_scores_are_the_log_probabilities_of_a_plain_forward_pass(model: Model) -> None:
    ids_S = encode_turns([Turn("user", ("hello",))], model.template, model.tokenizer, answer_next=True).ids_S
    continuations = [model.tokenizer.encode(text) for text in ("川菜", "a", "川菜，图")]
    scored = score_continuations(model, prefill(model, ids_S, None), continuations)
    for ids, values in zip(continuations, scored, strict=True):
        whole = torch.tensor([[*ids_S.tolist(), *ids]])
        with torch.no_grad():
            log = torch.log_softmax(model.network(input_ids=whole).logits[0].float(), -1)
        wanted = [float(log[len(ids_S) - 1 + at, token]) for at, token in enumerate(ids)]
        assert values == pytest.approx(wanted, abs=2e-5)


def test_a_stream_adds_up_to_the_answer_and_seeds_repeat(model: Model, picture: Image.Image) -> None:
    engine = LocalEngine(model)
    request = Request(
        (ChatTurn("user", (picture, "\n什么菜?")),), Sampling(max_new_tokens=30, temperature=1.0, top_k=50, top_p=0.9, seed=4)
    )
    pieces = list(engine.stream(request))
    assert pieces[-1].finish in ("stop", "length")
    assert all(piece.finish == "" for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == answer(engine, request)[0]
    assert len(engine._features) == 1  # the second request took the picture's features from memory


def test_leaving_the_stream_stops_within_a_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from intervale.engine import decode

    steps = []
    real = decode._advance
    monkeypatch.setattr(decode, "_advance", lambda *a: steps.append(1) or real(*a))
    stream = LocalEngine(model).stream(Request((ChatTurn("user", ("hi",)),), Sampling(max_new_tokens=200, temperature=1.0, seed=1)))
    next(stream)
    made = len(steps)
    stream.close()
    assert made < 10
    assert len(steps) == made


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(model: Model) -> None:
    with pytest.raises(UserError, match="context is 2048"):
        list(LocalEngine(model).stream(Request((ChatTurn("user", ("x" * 3000,)),))))


def test_the_user_speaks_last(model: Model) -> None:
    with pytest.raises(UserError, match="user's turn"):
        list(LocalEngine(model).stream(Request((ChatTurn("assistant", ("x",)),))))


def test_an_answer_that_goes_on_keeps_the_space_before_its_first_word(model: Model) -> None:
    """Llama's and Phi3's tokenizer.json drop the space that a text begins with."""
    words = {"▁": 3, "w": 4, "▁w": 5, "a": 6}
    backend = Backend(models.BPE({f"<{at}>": at for at in range(200) if at not in words.values()} | words, [("▁", "w")], fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    stripping = replace(model, tokenizer=Tokenizer(backend, False, "test"))
    engine = LocalEngine(stripping)
    engine._tokens = lambda *_: iter([5, 4])  # type: ignore[method-assign]
    turns = (ChatTurn("user", ("a",)), ChatTurn("assistant", ("a",)))
    assert answer(engine, Request(turns[:1]))[0] == "ww"
    assert answer(engine, Request(turns))[0] == " ww"


def test_a_rotary_embedding_that_turns_with_the_length_is_one_throughout_a_prompt(model: Model) -> None:
    long = with_language_model(model, "phi3-long")  # turns beyond 1,024 positions
    engine, turns = LocalEngine(long), [ChatTurn("user", ("什么菜?" * 60,))]
    for more in ("x" * 150, "y" * 200, "z" * 300, "short again"):  # the second goes over it, the last asks anew
        request = Request(tuple(turns), Sampling(max_new_tokens=60))
        ids_S = encode_turns([Turn(turn.role, turn.parts) for turn in turns], long.template, long.tokenizer, answer_next=True).ids_S  # type: ignore[arg-type]
        made = [one for one in generate(long, prefill(long, ids_S, None), request.sampling) if one not in long.stop_ids]
        said = answer(engine, request)[0]
        assert said == long.tokenizer.decode(made), len(ids_S)
        assert answer(engine, request)[0] == said  # now from what was kept
        turns = (
            [*turns, ChatTurn("assistant", (said,)), ChatTurn("user", (more,))]
            if more != "z" * 300
            else [ChatTurn("user", ("什么菜?" * 61,))]
        )
