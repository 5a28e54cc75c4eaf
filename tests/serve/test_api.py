"""The API as the `openai` client sees it, on a live port with a tiny random model."""

import concurrent.futures
import gc
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from serve_fixture import asking, data_url, encoded, live, picture

from intervale.data.prompt import Turn, encode_turns
from intervale.engine.api import ChatTurn, Delta, Request, Sampling
from intervale.engine.decode import generate, prefill
from intervale.engine.local import Face, LocalEngine, answer
from intervale.engine.scheduler import Scheduler
from intervale.model.load import Model, load_model

DISH = picture(1)
URL = data_url(encoded(DISH))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny, device="cpu")


@pytest.fixture(scope="module")
def desk(model: Model) -> Scheduler:
    return Scheduler(LocalEngine(model, {"tuned": Face(model), "base": Face(model)}), ("tuned", "base"))


@pytest.fixture(scope="module")
def url(desk: Scheduler) -> Iterator[str]:
    with live(desk) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def expected(model: Model, text: str, tokens: int = 16, *pictures: object) -> str:
    parts = [part for one in pictures for part in (one, "\n")] + [text]
    return answer(LocalEngine(model), Request((ChatTurn("user", tuple(parts)),), Sampling(max_new_tokens=tokens)))[0]  # type: ignore[arg-type]


def test_a_streamed_and_a_whole_answer_are_the_models_own(client: openai.OpenAI, model: Model) -> None:
    wanted = expected(model, "什么菜?", 16, DISH)
    whole = client.chat.completions.create(model="tuned", messages=asking("什么菜?", URL), temperature=0, max_tokens=16)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == wanted
    assert whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            model="tuned",
            messages=asking("什么菜?", URL),
            temperature=0,
            max_completion_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 8  # type: ignore[union-attr]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the second time, the prompt was known
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    numbers = {chunk.id for chunk in chunks}
    assert len(numbers) == 1
    assert all(re.fullmatch(r"chatcmpl-[0-9a-f]{32}", number) for number in (*numbers, whole.id))
    assert whole.id not in numbers


def test_log_probabilities_are_the_models_own_streamed_or_whole(client: openai.OpenAI, model: Model) -> None:
    ask = {
        "model": "tuned",
        "messages": asking("什么菜?"),
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 1.5,
        "seed": 4,
    }
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens
    streamed = client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].logprobs.content for chunk in streamed if chunk.choices and chunk.choices[0].logprobs]
    again = [one for piece in pieces for one in piece]
    assert [one.token for one in again] == [one.token for one in told]
    assert [one.logprob for one in again] == pytest.approx([one.logprob for one in told], abs=1e-4)  # its prompt was known, by then

    prompt = encode_turns([Turn("user", ("什么菜?",))], model.template, model.tokenizer, answer_next=True).ids_S
    ids = _ids_of(model, told)
    assert model.tokenizer.decode([one for one in ids if one not in model.stop_ids]) == whole.choices[0].message.content
    logits = model.network(input_ids=torch.tensor([[*prompt.tolist(), *ids]])).logits[0, len(prompt) - 1 : -1]
    known = torch.log_softmax(logits.float(), -1)  # before the temperature
    assert [one.logprob for one in told] == pytest.approx([float(known[at, token]) for at, token in enumerate(ids)], abs=1e-4)
    for at, one in enumerate(told):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(known[at].topk(3).values.tolist(), abs=1e-4)
    plain = client.chat.completions.create(**ask | {"top_logprobs": 0}).choices[0].logprobs.content  # type: ignore[call-overload]
    assert [one.logprob for one in plain] == pytest.approx([one.logprob for one in told], abs=1e-4)
    assert not any(one.top_logprobs for one in plain)


def _ids_of(model: Model, told: list[Any]) -> list[int]:
    by_bytes = {model.tokenizer.bytes_of(at): at for at in reversed(range(model.tokenizer.size))}
    return [by_bytes[bytes(one.bytes)] for one in told]


def test_an_answer_goes_on_from_its_beginning(client: openai.OpenAI, model: Model) -> None:
    begun = [*asking("什么菜?"), {"role": "assistant", "content": "这是"}]
    ask = {"model": "tuned", "messages": begun, "max_tokens": 8, "temperature": 0}
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    said = client.chat.completions.create(**ask, extra_body=extra).choices[0].message.content  # type: ignore[call-overload]
    asked = encode_turns([Turn("user", ("什么菜?",))], model.template, model.tokenizer, answer_next=True).ids_S
    ids_S = np.concatenate([asked, model.tokenizer.encode("这是")])
    made = [one for one in generate(model, prefill(model, ids_S, None), Sampling(max_new_tokens=8)) if one not in model.stop_ids]
    assert said == model.tokenizer.decode(made)
    for wrong in ({}, {"continue_final_message": True, "add_generation_prompt": True}, {"add_generation_prompt": False}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ask, extra_body=wrong)  # type: ignore[call-overload]
    twice = [*begun, {"role": "assistant", "content": "一道"}]
    with pytest.raises(openai.BadRequestError, match="must follow the user's message"):
        client.chat.completions.create(**ask | {"messages": twice}, extra_body=extra)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="the answer to go on with"):
        client.chat.completions.create(**ask | {"messages": asking("x")}, extra_body=extra)  # type: ignore[call-overload]


class _Uncounted:
    """An engine that does not know how long the prompt is, as a server without usage."""

    def stream(self, request: Request) -> Iterator[Delta]:
        yield Delta("a", 1)
        yield Delta("b", 2, "stop")


def test_an_answers_tokens_are_told_where_the_prompts_are_not_known() -> None:
    with live(Scheduler(_Uncounted(), ("x",))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(model="x", messages=asking("?")).usage  # type: ignore[call-overload]
        told = client.chat.completions.create(model="x", messages=asking("?"), stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
        (streamed,) = [event.usage for event in told if event.usage]
        assert [(one.prompt_tokens, one.completion_tokens) for one in (whole, streamed)] == [(0, 2)] * 2
        assert 'intervale_tokens_total{model="x"} 4.0' in httpx.get(f"{url}/metrics").text


def test_the_stream_is_sse_and_ends_in_done(url: str) -> None:
    body = {"model": "base", "messages": asking("hi"), "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in got.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"


def test_models_health_and_metrics(url: str, client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tuned", "base"]
    assert client.models.retrieve("base").id == "base"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    text = httpx.get(f"{url}/metrics").text
    for name in ("ttft_seconds_count", "tokens_total", "queue", "cancelled_total", "active"):
        assert f"intervale_{name}" in text
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found"


def test_several_pictures_system_text_stop_seed_and_turns(client: openai.OpenAI, model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *asking("两张图?", URL, data_url(encoded(picture(2), "JPEG"), "image/jpeg"))]
    ask = {"model": "tuned", "messages": messages, "max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    first, again = (client.chat.completions.create(**ask).choices[0].message.content for _ in range(2))  # type: ignore[call-overload]
    assert first == again
    other = client.chat.completions.create(**ask | {"seed": 8}).choices[0].message.content  # type: ignore[call-overload]
    assert other != first
    greedy = client.chat.completions.create(**ask | {"temperature": 0}).choices[0]  # type: ignore[call-overload]
    text = greedy.message.content
    stopped = client.chat.completions.create(**ask | {"temperature": 0, "stop": [text[3:6]]}).choices[0]  # type: ignore[call-overload]
    assert stopped.message.content == text[: text.index(text[3:6])]
    assert stopped.finish_reason == "stop"
    more = [*messages, greedy.message.model_dump(), {"role": "user", "content": "还有?"}]
    assert client.chat.completions.create(**ask | {"messages": more}).choices[0].message.content is not None  # type: ignore[call-overload]


def test_low_detail_is_one_tile(client: openai.OpenAI) -> None:
    wide = data_url(encoded(picture(3, (60, 240))))

    def tokens(detail: str) -> int:
        parts = [{"type": "image_url", "image_url": {"url": wide, "detail": detail}}, {"type": "text", "text": "?"}]
        asked = client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": parts}], max_tokens=1)  # type: ignore
        return asked.usage.prompt_tokens  # type: ignore[union-attr]

    assert tokens("low") < tokens("auto") == tokens("high")


def test_of_64_parallel_requests_one_poisoned_63_are_right(client: openai.OpenAI, model: Model) -> None:
    damaged = data_url(encoded(DISH, "JPEG")[:-900], "image/jpeg")
    wanted = {number: expected(model, f"菜{number}?", 8, DISH) for number in range(4)}

    def one(number: int) -> str:
        url = damaged if number == 13 else URL
        asked = client.chat.completions.create(  # type: ignore[call-overload]
            model=("tuned", "base")[number % 2],
            messages=asking(f"菜{number % 4}?", url),
            temperature=0,
            max_tokens=8,
            stream=number % 3 == 0,
        )
        if number % 3 == 0:
            return "".join(chunk.choices[0].delta.content or "" for chunk in asked)
        return asked.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        results = [pool.submit(one, number) for number in range(64)]
    right = [number for number, result in enumerate(results) if not result.exception() and result.result() == wanted[number % 4]]
    assert len(right) == 63
    error = results[13].exception()
    assert isinstance(error, openai.BadRequestError)
    assert error.code == "invalid_image"
    assert "damaged" in error.message


def _jobs() -> list[object]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one).__name__ == "_Job"]


def test_200_disconnects_leak_no_place_thread_or_memory(url: str, desk: Scheduler, client: openai.OpenAI) -> None:
    threads = threading.active_count()

    def body(stream: bool) -> dict[str, object]:
        return {"model": "tuned", "messages": asking("x" * 50, URL), "max_tokens": 1500, "temperature": 1, "stream": stream}

    for number in range(100):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body(True), timeout=30) as got:
            if number % 2:
                next(got.iter_lines())
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body(False)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    for number in range(100):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(head.encode() + raw)
            time.sleep(0.001 * (number % 20))  # before it is read, while it waits, while it is answered
    for _ in range(500):
        load = desk.load()
        if load.active == load.waiting == 0:
            break
        time.sleep(0.02)
    assert (load.active, load.waiting) == (0, 0)
    assert threading.active_count() <= threads + 16  # the event loop's own pool; 200 came
    until = time.monotonic() + 10  # the last one's task may still be on its way out
    while _jobs() and time.monotonic() < until:
        time.sleep(0.05)
    assert not _jobs()
    text = httpx.get(f"{url}/metrics").text
    assert float(text.split("\nintervale_cancelled_total ")[1].split("\n")[0]) >= 100
    assert client.chat.completions.create(model="tuned", messages=asking("ok?"), max_tokens=1).choices  # type: ignore[arg-type]


def test_two_visitors_see_only_their_own(client: openai.OpenAI, model: Model) -> None:
    """Each goes on with its own conversation while the other talks; each gets what it would get alone."""

    def talk(name: str) -> list[str]:
        messages = asking(f"I am {name}", data_url(encoded(picture(len(name)))))
        said = []
        for turn in range(3):
            asked = client.chat.completions.create(model="tuned", messages=messages, temperature=0, max_tokens=10)  # type: ignore
            said.append(asked.choices[0].message.content or "")
            messages = [*messages, {"role": "assistant", "content": said[-1]}, {"role": "user", "content": f"{name} {turn}"}]
        return said

    alone = [talk("anna"), talk("bo")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, ["anna", "bo"])) == alone
