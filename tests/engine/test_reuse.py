"""A turn that goes on, a picture that comes again, two models on one network: the same answers as without any of it."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intervale.engine import local
from intervale.engine.api import ChatTurn, Delta, Photo, Request, Sampling
from intervale.engine.local import LocalEngine, answer, faces_of
from intervale.engine.reuse import Conversations, Features, Kept, Span, shared_length
from intervale.engine.scheduler import Scheduler
from intervale.engine.text import spoken
from intervale.model.load import Model, load_model
from intervale.model.pair import load_pair


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny, device="cpu")


def picture(seed: int, size: tuple[int, int] = (90, 130)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


def user(*parts: object) -> ChatTurn:
    return ChatTurn("user", parts)  # type: ignore[arg-type]


def told(engine: LocalEngine, turns: list[ChatTurn], **about: object) -> tuple[str, Delta]:
    pieces = list(engine.stream(Request(tuple(turns), Sampling(max_new_tokens=24), **about)))  # type: ignore[arg-type]
    return "".join(piece.text for piece in pieces), pieces[-1]


def plain(model: Model) -> LocalEngine:
    return LocalEngine(model, feature_bytes=0, cache_bytes=0)


def test_a_conversation_goes_on_with_the_same_text_and_computes_only_what_is_new(model: Model) -> None:
    engine = LocalEngine(model)
    turns = [user(picture(1), "\n什么菜?")]
    for question in ("和哪个菜系?", "and why?", "再说一遍"):
        text, last = told(engine, turns)
        assert (text, last.tokens) == (lambda a: (a[0], a[1].tokens))(told(plain(model), turns))
        before = last.prompt_tokens
        turns += [ChatTurn("assistant", (text,)), user(question)]
        assert told(engine, turns)[1].reused >= before


def test_the_second_turn_on_a_picture_begins_in_two_fifths_of_the_firsts_time() -> None:
    nano = load_model("nano", device="cpu")

    def begin(engine: LocalEngine, turns: list[ChatTurn]) -> tuple[float, str]:
        # This process's own time: what else the machine does is not the claim.
        began, first, text = time.process_time(), 0.0, ""
        for piece in engine.stream(Request(tuple(turns), Sampling(max_new_tokens=8), visitor="a")):
            first = first or (time.process_time() - began if piece.tokens else 0.0)
            text += piece.text
        return first, text

    begin(plain(nano), [user(picture(9, (300, 420)), "\nwarm")])
    times = []
    for number in range(3):
        engine, turns = LocalEngine(nano), [user(picture(number, (300, 420)), "\n这是什么?")]
        first, said = begin(engine, turns)
        turns += [ChatTurn("assistant", (said,)), user("颜色呢?")]
        second, again = begin(engine, turns)
        assert again == begin(plain(nano), turns)[1]
        times.append(second / first)
    assert min(times) <= 0.4, times


def test_long_prompts_read_in_steps_answer_as_in_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [user(picture(1, (300, 200)), "\n", picture(2), "\n", "x" * 300)]
    whole = told(plain(model), turns)[0]
    monkeypatch.setattr(local, "_AT_ONCE", 7)
    engine = LocalEngine(model)
    assert told(engine, turns)[0] == whole
    assert told(engine, turns)[0] == whole  # again, from the kept prompt


def test_another_picture_under_the_same_words_is_not_mistaken(model: Model) -> None:
    engine = LocalEngine(model)
    for seed in (1, 2, 1):
        turns = [user("Look: ", picture(seed), "\n什么菜?")]
        text, last = told(engine, turns)
        assert text == told(plain(model), turns)[0]
    assert last.reused > 0


def test_the_other_visitor_finds_nothing_of_the_first(model: Model) -> None:
    engine = LocalEngine(model)
    turns = [user(picture(1), "\n什么菜?")]
    told(engine, turns, visitor="a")
    assert told(engine, turns, visitor="b")[1].reused == 0
    assert told(engine, turns, visitor="a")[1].reused > 0


def test_a_cancelled_answer_leaves_a_usable_conversation(model: Model) -> None:
    engine = LocalEngine(model)
    turns = [user(picture(1), "\n什么菜?")]
    stream = engine.stream(Request(tuple(turns), Sampling(max_new_tokens=100)))
    while not next(stream).tokens:
        pass
    stream.close()
    text, last = told(engine, turns)
    assert text == told(plain(model), turns)[0]
    assert last.reused == last.prompt_tokens - 1


def test_an_encoded_picture_answers_as_the_decoded_one_and_is_read_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = picture(3)
    decoded.save(tmp_path / "a.png")
    photo = Photo((tmp_path / "a.png").read_bytes(), "image/png", decoded.size)
    engine = LocalEngine(model)
    assert told(engine, [user(photo, "\nx")])[0] == told(plain(model), [user(decoded, "\nx")])[0]
    monkeypatch.setattr(local, "encode_tiles", None)
    told(engine, [user("again", photo, "\nx")], visitor="other")


def test_fewer_tiles_for_one_picture_are_another_picture(model: Model, tmp_path: Path) -> None:
    picture(3, (200, 300)).save(tmp_path / "a.png")
    photo = Photo((tmp_path / "a.png").read_bytes(), "image/png", (300, 200))
    engine = LocalEngine(model)
    many = told(engine, [user(photo, "\nx")])[1].prompt_tokens
    few = told(engine, [user(replace(photo, max_tiles=1), "\nx")])[1]
    assert few.prompt_tokens < many
    assert told(engine, [user(replace(photo, max_tiles=99), "\nx")])[1].prompt_tokens == many


def test_shared_length_ends_at_the_first_picture_that_differs() -> None:
    ids = np.array([1, 2, 9, 9, 3, 9, 9, 4])
    spans = (Span(2, 2, "a"), Span(5, 2, "b"))
    assert shared_length(ids, spans, ids, spans) == 8
    assert shared_length(ids, spans, ids, (Span(2, 2, "a"), Span(5, 2, "c"))) == 5
    assert shared_length(ids, spans, ids, (Span(2, 2, "x"), Span(5, 2, "b"))) == 2
    assert shared_length(ids, spans, ids[:6], spans[:1]) == 6
    assert shared_length(ids, spans, np.array([7]), ()) == 0


def test_both_stores_stay_within_their_bytes() -> None:
    features = Features(100)
    for number in range(9):
        features.put(number, torch.zeros(40, dtype=torch.uint8))
    features.put("big", torch.zeros(101, dtype=torch.uint8))
    assert (len(features), features.bytes) == (2, 80)
    assert features.get(7) is not None
    assert features.get("big") is None
    store = Conversations(3000)
    for number in range(9):
        cache = Conversations(0).take("x", np.arange(3), ())
        cache.update(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16), 0)
        store.put(Kept("o", np.full(10, number), (), 8, cache))
    assert (len(store), store.bytes) == (2, 2560)
    assert store.take("o", np.full(12, 8), ()).get_seq_length() == 10
    assert (len(store), store.bytes) == (1, 1280)
    assert store.take("o", np.array([7, 7, 7, 0, 0]), ()).get_seq_length() == 3  # copied: the other conversation stays
    assert len(store) == 1
    assert store.take("o", np.full(12, 3), ()).get_seq_length() == 0


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_told() -> None:
    def run(text: str, *stops: str) -> tuple[list[str], str]:
        pieces = list(spoken(iter(map(ord, text)), lambda ids: "".join(map(chr, ids)), {0}, stops))
        return [piece[0] for piece in pieces], pieces[-1][2]

    assert run("one STOP two", "STOP") == (["o", "n", "e", " ", "", "", "", ""], "stop")
    assert run("aSTaSTOb", "STOP") == (["a", "", "", "STa", "", "", "", "STOb", ""], "length")
    assert run("ab\0", "x") == (["a", "b", ""], "stop")
    assert "".join(run("abcabd", "abd", "zz")[0]) == "abc"


def questions(count: int) -> list[list[ChatTurn]]:
    return [[user(picture(number % 3), f"\n第{number}个问题?")] for number in range(count)]


def test_base_and_tuned_together_are_each_alone(run_folder: Path, tiny: Path) -> None:
    asked = questions(50)
    alone = {
        "tuned": [told(plain(load_model(run_folder, device="cpu")), turns)[0] for turns in asked],
        "base": [told(plain(load_model(tiny, device="cpu")), turns)[0] for turns in asked],
    }
    assert alone["tuned"] != alone["base"]
    pair = load_pair(run_folder, device="cpu")
    assert not pair.same_eyes
    assert pair.tuned.network is pair.base.network
    desk = Scheduler(LocalEngine(pair.tuned, faces_of(pair, "tuned", "base")), ("tuned", "base"), waiting=200)

    async def one(name: str, number: int, turns: list[ChatTurn]) -> str:
        request = Request(tuple(turns), Sampling(max_new_tokens=24), model=name, visitor=str(number % 5))
        return "".join([piece.text async for piece in desk.answer(request)])

    async def everything() -> dict[str, list[str]]:
        tasks = {name: [asyncio.create_task(one(name, at, turns)) for at, turns in enumerate(asked)] for name in ("tuned", "base")}
        return {name: list(await asyncio.gather(*those)) for name, those in tasks.items()}

    together = asyncio.run(everything())
    desk.close()
    assert together == alone


def test_a_plain_model_is_no_pair_and_another_base_is_refused(run_folder: Path, tiny: Path, tmp_path: Path) -> None:
    from intervale.core.errors import UserError
    from intervale.model.presets import init_model

    with pytest.raises(UserError, match="plain model"):
        load_pair(tiny, device="cpu")
    init_model(tmp_path / "other", "tiny", seed=3)
    with pytest.raises(UserError, match="not trained on"):
        load_pair(run_folder, tmp_path / "other", device="cpu")
    assert load_pair(run_folder, tiny, device="cpu").base.folder == tiny


def test_an_unknown_model_is_refused_by_name(model: Model) -> None:
    from intervale.engine.api import RefusedError

    with pytest.raises(RefusedError, match="no model 'gpt'") as refused:
        answer(LocalEngine(model), Request((user("x"),), model="gpt"))
    assert refused.value.code == "model_not_found"
