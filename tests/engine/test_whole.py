"""Whole answers, many at a time: asked again until they are answers, never more open at once than allowed, refusals told."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from intervale.engine.api import ChatTurn, EngineError, Request, Sampling, UpstreamRefusedError
from intervale.engine.whole import Ask, Server, Whole, ask_all


def good(text: str = "B", **more: Any) -> httpx.Response:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return httpx.Response(200, json={"choices": [{"message": {"content": text}, "finish_reason": "stop"} | more], "usage": usage})


class Other(httpx.AsyncBaseTransport):
    """Answers by `rule(number of the request, its JSON)`; notes how many were open at once and when each came."""

    def __init__(self, rule: Callable[[int, dict[str, Any]], httpx.Response | Exception], slow: float = 0.0) -> None:
        self.rule, self.slow, self.open, self.most, self.came, self.headers = rule, slow, 0, 0, list[float](), httpx.Headers()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        self.came.append(time.monotonic())
        self.headers = request.headers
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(self.slow)
        self.open -= 1
        answer = self.rule(len(self.came), body)
        if isinstance(answer, Exception):
            raise answer
        return answer


def asks(count: int, top: int = 0) -> list[Ask]:
    return [Ask(str(n), lambda n=n: Request((ChatTurn("user", (f"q{n}",)),), Sampling(max_new_tokens=5)), top) for n in range(count)]  # type: ignore[misc]


def told(other: Other, count: int, top: int = 0, **more: Any) -> dict[str, Whole | UpstreamRefusedError]:
    server = Server("http://there/v1", "big", "key", **({"pause": 0.001, "transport": other} | more))
    return {key: answer for together in ask_all(server, asks(count, top)) for key, answer in together}


def test_every_ask_is_answered_by_its_own_words_and_no_more_are_open_than_allowed() -> None:
    other = Other(lambda _, body: good(body["messages"][0]["content"]), slow=0.002)
    found = told(other, 40, concurrency=5)
    assert {key: answer.text for key, answer in found.items() if isinstance(answer, Whole)} == {str(n): f"q{n}" for n in range(40)}
    assert other.most == 5
    assert other.headers["authorization"] == "Bearer key"
    first = found["0"]
    assert isinstance(first, Whole)
    assert (first.prompt_tokens, first.tokens, first.finish, first.first) == (7, 2, "stop", None)


@pytest.mark.parametrize(
    "fault",
    [
        httpx.Response(429), httpx.Response(500), httpx.Response(502), httpx.Response(503), httpx.ReadTimeout("x"), httpx.ConnectError("x"),
        httpx.Response(200, content=b"<html>"), httpx.Response(200, json={"choices": []}), httpx.Response(200, json=[1]),
        httpx.Response(200, json={"choices": [{"message": None}]}), httpx.Response(200, json={"choices": [{"message": {"content": 3}}]}),
    ],
)  # fmt: skip
def test_what_may_pass_is_asked_again_and_in_the_end_told(fault: httpx.Response | Exception) -> None:
    other = Other(lambda number, _: fault if number < 3 else good())
    assert isinstance(told(other, 1, retries=2)["0"], Whole)
    assert len(other.came) == 3
    other = Other(lambda number, _: fault)
    with pytest.raises(EngineError):
        told(other, 1, retries=2)
    assert len(other.came) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_all_requests_wait_as_long_as_the_server_asked_for(form: str) -> None:
    after = "1.2" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    least = 1.1 if form == "seconds" else 1.5  # a date has whole seconds
    other = Other(lambda number, _: httpx.Response(429, headers={"retry-after": after}) if number == 1 else good())
    told(other, 6, concurrency=1)
    assert other.came[1] - other.came[0] > least
    assert other.came[-1] - other.came[1] < 1.0


def test_a_refusal_is_told_once_and_the_others_go_on() -> None:
    other = Other(lambda _, body: httpx.Response(400, json={"error": {"message": "filtered"}}) if "q1" in str(body) else good())
    found = told(other, 3)
    assert isinstance(found["1"], UpstreamRefusedError)
    assert "filtered" in found["1"].fix
    assert len(other.came) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_concerns_all_requests_stops_them_all(status: int) -> None:
    other = Other(lambda *_: httpx.Response(status, json={"error": {"message": "no"}}))
    with pytest.raises(EngineError, match=str(status)) as caught:
        told(other, 50, concurrency=4)
    assert len(other.came) <= 4
    assert "key" not in str(caught.value.what)


TOPS = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]


def test_log_probabilities_are_the_servers_or_an_error() -> None:
    content = [{"token": "A", "logprob": -0.1, "top_logprobs": TOPS}, {"token": ")", "logprob": 0, "top_logprobs": []}]
    other = Other(lambda _, body: good(logprobs={"content": content}) if (body["logprobs"], body["top_logprobs"]) == (True, 20) else good())
    answer = told(other, 1, top=20)["0"]
    assert isinstance(answer, Whole)
    assert answer.first == (("A", -0.1), ("B", -2.5))
    silent = told(Other(lambda *_: good("", logprobs={"content": []})), 1, top=20)["0"]
    assert isinstance(silent, Whole)
    assert silent.first == ()
    for given in ({}, {"logprobs": None}, {"logprobs": {"content": None}}, {"logprobs": {"content": [{"token": "A", "top_logprobs": []}]}}):
        with pytest.raises(EngineError, match="no log-probabilities"):
            told(Other(lambda *_, given=given: good(**given)), 1, top=20)


def test_a_server_that_lists_only_the_others_loses_no_token() -> None:
    """LMDeploy's form: the chosen token stands apart from `top_logprobs`."""
    content = [{"token": "▁A", "bytes": [226, 150, 129, 65], "logprob": -0.1, "top_logprobs": TOPS[1:]}]
    answer = told(Other(lambda *_: good(logprobs={"content": content})), 1, top=20)["0"]
    assert isinstance(answer, Whole)
    assert answer.first == (("▁A", -0.1), ("B", -2.5))


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_log_probabilities_that_are_no_numbers_are_no_answer(value: str) -> None:
    raw = json.dumps({"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": [TOPS[0], "HERE"]}]}}]})
    bad = raw.replace('"HERE"', f'{{"token": "B", "logprob": {value}}}').encode()
    with pytest.raises(EngineError, match="not numbers"):
        told(Other(lambda *_: httpx.Response(200, content=bad)), 1, top=20, retries=1)


def test_tokens_that_look_alike_are_all_kept_and_an_impossible_one_is_none() -> None:
    raw = [{"token": "A", "logprob": -0.1}, {"token": "A", "logprob": -3.0}, {"token": "B", "logprob": -math.inf}]
    reply = json.dumps({"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": raw}]}}]}).encode()
    answer = told(Other(lambda *_: httpx.Response(200, content=reply)), 1, top=20)["0"]
    assert isinstance(answer, Whole)
    assert answer.first == (("A", -0.1), ("A", -3.0))


def test_half_a_character_becomes_a_mark_that_can_be_written() -> None:
    """JavaScript servers cut an emoji in two at the token limit and write the half as an escape."""
    raw = b'{"choices": [{"message": {"content": "\\ud83dB \\ud83c\\udf5c"}, "finish_reason": "stop"}]}'
    answer = told(Other(lambda *_: httpx.Response(200, content=raw)), 1)["0"]
    assert isinstance(answer, Whole)
    assert answer.text == "\ufffdB 🍜"


def test_counts_that_are_none_are_untold() -> None:
    usage = {"prompt_tokens": True, "completion_tokens": -3}
    answer = told(
        Other(
            lambda *_: httpx.Response(200, json={"choices": [{"message": {"content": [{"text": None}, {"text": "B"}]}}], "usage": usage})
        ),
        1,
    )["0"]
    assert isinstance(answer, Whole)
    assert (answer.text, answer.prompt_tokens, answer.tokens) == ("B", None, None)


def test_a_reply_of_a_hundred_thousand_brackets_is_no_answer() -> None:
    with pytest.raises(EngineError, match="not a chat completion"):
        told(Other(lambda *_: httpx.Response(200, content=b"[" * 200_000)), 1, retries=1)


class Drip(httpx.AsyncByteStream):
    """A body that never ends and never pauses long enough for a timeout between its pieces."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b" "


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_drips_is_given_up_after_the_time_for_a_whole_one(status: int) -> None:
    other = Other(lambda *_: httpx.Response(status, stream=Drip()))
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0\.2 s"):
        told(other, 1, seconds=0.2, retries=1)
    assert len(other.came) == 2
    assert time.monotonic() - began < 5


def test_extras_go_into_every_request_and_null_takes_a_key_out() -> None:
    seen: list[dict[str, Any]] = []
    other = Other(lambda _, body: seen.append(body) or good())  # type: ignore[func-returns-value]
    told(other, 1, extra={"max_tokens": None, "max_completion_tokens": 5})
    assert "max_tokens" not in seen[0]
    assert (seen[0]["max_completion_tokens"], seen[0]["stream"], seen[0]["temperature"]) == (5, False, 0.0)


def test_leaving_early_leaves_nothing_running() -> None:
    other = Other(lambda *_: good(), slow=0.01)
    answers = ask_all(Server("http://there/v1", "big", transport=other, concurrency=2), asks(100))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    before = len(other.came)
    time.sleep(0.05)
    assert len(other.came) == before <= 6


def test_an_unreadable_picture_stops_with_its_own_words() -> None:
    from intervale.core.errors import UserError

    def broken() -> Request:
        raise UserError("a.jpg: damaged", "replace it")

    with pytest.raises(UserError, match=r"a\.jpg"):
        list(ask_all(Server("http://there/v1", "big", transport=Other(lambda *_: good())), [Ask("0", broken)]))


def test_the_key_is_in_no_representation() -> None:
    assert "secret" not in repr(Server("http://there/v1", "big", "secret"))
