"""Another server as an engine: tried again only before the first token, left when it is left, its faults told in our words."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from intervale.core.errors import UserError
from intervale.engine.api import ChatTurn, Delta, EngineError, Likely, Photo, RefusedError, Request, Sampling
from intervale.engine.remote import RemoteEngine

ASK = Request((ChatTurn("user", ("hi",)),), Sampling(max_new_tokens=9, seed=3, stop=("x",)))


def event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]} | more).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'
GOOD = event("he") + event("y") + event(finish="stop") + USAGE + b"data: [DONE]\n\n"


class Other(httpx.AsyncBaseTransport):
    """A server that answers as told, one entry a request; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.left = list(answers), [], 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(await request.aread()))
        self.headers = request.headers
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, bytes):
            return httpx.Response(200, content=answer)
        if callable(answer):
            return httpx.Response(200, stream=Flow(self, answer))
        return answer


class Flow(httpx.AsyncByteStream):
    def __init__(self, other: Other, make: Callable[[], AsyncIterator[bytes]]) -> None:
        self.other, self.make = other, make

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.make():
            yield part

    async def aclose(self) -> None:
        self.other.left += 1


def apart(*parts: bytes) -> Callable[[], AsyncIterator[bytes]]:
    """An answer that comes in these parts."""

    async def flow() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return flow


def engine(other: Other, **more: Any) -> RemoteEngine:
    return RemoteEngine("http://other/v1/", ("big", "small"), "key", pause=0.001, transport=other, **more)


def told(engine: RemoteEngine, request: Request = ASK) -> tuple[str, Delta]:
    pieces = list(engine.stream(request))
    return "".join(piece.text for piece in pieces), pieces[-1]


def test_an_answer_comes_with_its_counts_and_the_request_says_what_was_asked() -> None:
    other = Other(GOOD)
    assert told(engine(other)) == ("hey", Delta("", 2, "stop", 7))
    asked = other.asked[0]
    assert asked["messages"] == [{"role": "user", "content": "hi"}]
    assert (asked["model"], asked["max_tokens"], asked["seed"], asked["stop"], asked["stream"]) == ("big", 9, 3, ["x"], True)
    assert "top_k" not in asked
    assert other.headers["authorization"] == "Bearer key"


def test_an_event_of_several_tokens_counts_as_the_server_counts() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 6}}\n\n'
    other = Other(event("two tokens") + event(" or three") + event(finish="length") + usage + b"data: [DONE]\n\n")
    assert told(engine(other)) == ("two tokens or three", Delta("", 6, "length", 7))


def test_events_that_come_together_are_one_piece_and_where_they_are_cut_does_not_matter() -> None:
    whole = event("喂") + event("。") + event(" x") + event(finish="stop") + USAGE + b"data: [DONE]\n\n"
    together = [Delta("喂。 x", 3), Delta("", 2, "stop", 7)]
    assert list(engine(Other(whole)).stream(ASK)) == together
    assert list(engine(Other(whole.replace(b"\n", b"\r\n"))).stream(ASK)) == together
    for cut in range(1, len(whole)):
        pieces = list(engine(Other(apart(whole[:cut], whole[cut:]))).stream(ASK))
        assert "".join(piece.text for piece in pieces) == "喂。 x"
        assert pieces[-1] == together[-1]
        assert [piece.tokens for piece in pieces if piece.text][-1] == 3
    singly = [whole[at : at + 1] for at in range(len(whole))]
    assert [piece.text for piece in engine(Other(apart(*singly))).stream(ASK)] == ["喂", "。", " x", ""]


def test_what_came_with_a_fault_is_told_before_it() -> None:
    for fault in (b'data: {"error": {"message": "boom"}}\n\n', b"data: {nonsense\n\n"):
        pieces = engine(Other(event("he") + event("y") + fault)).stream(ASK)
        assert next(pieces) == Delta("hey", 2)
        with pytest.raises(EngineError) as broken:
            next(pieces)
        assert broken.value.code == "engine_interrupted"


def test_bytes_that_are_no_text_are_told_as_such() -> None:
    strange = event("a?b").replace(b"?", b"\xff")
    assert told(engine(Other(strange + event(finish="stop"))))[0] == "a\ufffdb"


def test_log_probabilities_are_passed_on_or_refused() -> None:
    top = [{"token": "he", "logprob": -0.1, "bytes": [104, 101]}, {"token": "ho", "logprob": -3}]
    place = {"token": "he", "logprob": -0.1, "bytes": [104, 101], "top_logprobs": top}
    part = {"choices": [{"delta": {"content": "he"}, "logprobs": {"content": [place]}, "finish_reason": None}]}
    end = event(finish="stop") + USAGE + b"data: [DONE]\n\n"
    asking = replace(ASK, sampling=replace(ASK.sampling, likely=1))
    other = Other(b"data: " + json.dumps(part).encode() + b"\n\n" + end, GOOD, event(logprobs=None) + end)
    assert [piece.likely for piece in engine(other).stream(asking) if piece.text] == [
        (Likely("he", b"he", -0.1, (Likely("he", b"he", -0.1),)),)
    ]
    assert (other.asked[0]["logprobs"], other.asked[0]["top_logprobs"]) == (True, 1)
    with pytest.raises(RefusedError, match="gives no log-probabilities"):
        told(engine(other), asking)
    place["top_logprobs"] = [top[1]]  # LMDeploy's form: the chosen token stands apart
    apart = engine(Other(b"data: " + json.dumps(part).encode() + b"\n\n" + end)).stream(
        replace(asking, sampling=replace(ASK.sampling, likely=2))
    )
    first, *_ = apart
    assert [one.token for one in first.likely[0].top] == ["he", "ho"]
    part["choices"][0]["logprobs"] = {"content": [{"token": "he"}]}
    with pytest.raises(RefusedError, match="in another form"):
        told(engine(Other(b"data: " + json.dumps(part).encode() + b"\n\n" + end)), asking)


def told_with(text: str, *tokens: str) -> bytes:
    """An event whose tokens have log-probabilities; bytes that are half of a character."""
    content = [{"token": one, "logprob": -0.5, "bytes": [0xE4]} for one in tokens]
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "logprobs": {"content": content}}]}).encode() + b"\n\n"


def test_text_that_was_held_back_may_come_without_a_token_of_its_own() -> None:
    asking = replace(ASK, sampling=replace(ASK.sampling, likely=0))
    events = [told_with("a", "a"), told_with("", "x"), event("x"), event(finish="length") + USAGE + b"data: [DONE]\n\n"]
    for parts, counts in ((events, [1, 2, 2, 2]), ([b"".join(events)], [2, 2])):
        pieces = list(engine(Other(apart(*parts))).stream(asking))
        assert "".join(piece.text for piece in pieces) == "ax"
        assert [one.token for piece in pieces for one in piece.likely] == ["a", "x"]
        assert [piece.tokens for piece in pieces] == counts


def test_a_token_that_is_half_of_a_character_was_told_and_is_not_asked_for_again() -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield told_with("", "\ufffd")
        raise httpx.ReadError("reset")

    other = Other(breaks, GOOD)
    with pytest.raises(EngineError, match="middle"):
        told(engine(other), replace(ASK, sampling=replace(ASK.sampling, likely=0)))
    assert len(other.asked) == 1


@pytest.mark.parametrize("raw", [10**12, "he", [256], [-1], [[1]], {"a": 1}])
def test_bytes_that_are_none_are_refused(raw: Any) -> None:
    place = {"token": "he", "logprob": -0.1, "bytes": raw}
    part = {"choices": [{"delta": {"content": "he"}, "logprobs": {"content": [place]}}]}
    with pytest.raises(RefusedError, match="in another form"):
        told(engine(Other(b"data: " + json.dumps(part).encode() + b"\n\n")), replace(ASK, sampling=replace(ASK.sampling, likely=0)))


def test_a_begun_answer_is_not_sent_where_it_would_be_taken_for_a_finished_one() -> None:
    with pytest.raises(RefusedError, match="begun answer"):
        told(engine(Other()), replace(ASK, turns=(*ASK.turns, ChatTurn("assistant", ("this is",)))))


def test_pictures_go_as_data_urls_and_the_templates_line_break_stays_here() -> None:
    other = Other(GOOD)
    photo = Photo(b"\xff\xd8raw", "image/jpeg", (5, 5), 1)
    told(engine(other), Request((ChatTurn("user", (photo, "\n", Image.new("RGB", (2, 2)), "\n", "what\n?")),)))
    first, second, text = other.asked[0]["messages"][0]["content"]
    assert first["image_url"] == {"url": "data:image/jpeg;base64,/9hyYXc=", "detail": "low"}
    assert second["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "what\n?"}


@pytest.mark.parametrize(
    "first", [httpx.ConnectError("x"), httpx.ReadError("x"), httpx.Response(503), httpx.Response(429, headers={"retry-after": "0"}), b""]
)
def test_before_the_first_token_it_tries_again(first: Any) -> None:
    other = Other(first, GOOD)
    assert told(engine(other))[0] == "hey"
    assert len(other.asked) == 2


def test_after_the_first_token_it_does_not() -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield event("he")
        raise httpx.ReadError("10.0.0.7 reset")

    other = Other(breaks)
    with pytest.raises(EngineError, match="middle") as broken:
        told(engine(other))
    assert broken.value.code == "engine_interrupted"
    assert len(other.asked) == 1
    for cut in (event("he"), event("he") + b"data: {nonsense\n\n", event("he") + b'data: {"error": {"message": "boom"}}\n\n'):
        with pytest.raises(EngineError) as broken:
            told(engine(Other(cut)))
        assert broken.value.code == "engine_interrupted"


def test_it_gives_up_with_a_code_and_is_ill_until_it_answers() -> None:
    other = Other(*[httpx.ConnectError("x")] * 4, GOOD)
    remote = engine(other)
    with pytest.raises(EngineError, match="cannot be reached") as away:
        told(remote)
    assert (away.value.code, away.value.retry_after) == ("engine_unavailable", 5)
    assert remote.fault()
    told(remote)
    assert remote.fault() == ""
    with pytest.raises(EngineError) as busy:
        told(engine(Other(*[httpx.Response(429)] * 4)))
    assert busy.value.code == "busy"


def test_refusals_are_told_apart_and_their_words_kept_for_the_terminal() -> None:
    said = {"error": {"message": "path /secret", "code": "context_length_exceeded"}}
    with pytest.raises(RefusedError) as refused:
        told(engine(Other(httpx.Response(400, json=said))))
    assert refused.value.code == "context_length_exceeded"
    assert "secret" not in refused.value.what
    assert "secret" in refused.value.fix
    with pytest.raises(EngineError) as wrong:
        told(engine(Other(httpx.Response(401, text="<html>"))))
    assert wrong.value.code == "upstream_failed"
    with pytest.raises(RefusedError, match="no model 'huge'"):
        told(engine(Other()), Request(ASK.turns, model="huge"))
    with pytest.raises(UserError, match="not a web address"):
        RemoteEngine("localhost:8000", ("a",))


@pytest.mark.parametrize(
    "address", ["http://a..b/v1", f"http://{'a' * 64}/v1", "http://a:99999/v1", "http://a/v1?version=1", "http://a/v1?", "http://a/v1#x"]
)
def test_an_address_that_cannot_be_asked_is_refused_at_once(address: str) -> None:
    with pytest.raises(UserError, match="--base-url"):
        RemoteEngine(address, ("a",))
    assert RemoteEngine("http://[::1]:8000/a%2Fb/", ("a",)).url == "http://[::1]:8000/a%2Fb"


@pytest.mark.parametrize(("address", "key"), [("http://a/v1", "k\n"), ("http://a/v1", "ключ"), ("http://me:word@a/v1", "k")])
def test_a_key_that_no_request_can_carry_is_refused_at_once(address: str, key: str) -> None:
    with pytest.raises(UserError, match="key"):
        RemoteEngine(address, ("a",), key)


@pytest.mark.parametrize("odd", [{"choices": "abc"}, {"choices": [], "usage": "x"}, {"choices": [{"delta": {"content": [1]}}]}])
def test_an_event_of_another_form_is_a_fault_of_that_server(odd: Any) -> None:
    for before, code in ((b"", "engine_unavailable"), (event("he"), "engine_interrupted")):
        with pytest.raises(EngineError) as error:
            told(engine(Other(apart(before, b"data: " + json.dumps(odd).encode() + b"\n\n")), retries=0))
        assert error.value.code == code


def test_leaving_closes_the_connection_and_gives_the_place_back() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield event("x")
            await asyncio.sleep(0.001)

    other = Other(endless, endless)
    remote = engine(other, room=1)

    async def run() -> None:
        async with aclosing(remote.answer(ASK)) as pieces:
            await anext(pieces)
            with pytest.raises(EngineError) as full:
                await anext(remote.answer(ASK))
            assert full.value.code == "busy"
        assert (other.left, remote.load().active) == (1, 0)

    asyncio.run(run())
    stream = remote.stream(ASK)
    next(stream)
    stream.close()
    assert (other.left, remote.load().active) == (2, 0)
