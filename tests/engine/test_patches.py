"""What our launcher changes in LMDeploy, on stand-ins of the classes it changes: nothing is lost, and the answers stay what they were."""

import asyncio
import gc
import importlib.util
import random
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from intervale.engine import lmdeploy_launcher, lmdeploy_patches

PARENTS = ("lmdeploy", "lmdeploy.turbomind", "lmdeploy.turbomind.models", "lmdeploy.vl", "lmdeploy.cli")
NAMES = ("turbomind.turbomind", "turbomind.models.internvl", "vl.engine", "tokenizer", "cli.utils")


def put(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    for name in PARENTS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in NAMES:
        monkeypatch.setitem(sys.modules, f"lmdeploy.{name}", module)


@pytest.fixture
def lmdeploy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fresh one, under the names of LMDeploy's modules."""
    spec = importlib.util.spec_from_file_location("fake_lmdeploy", Path(__file__).with_name("fake_lmdeploy.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_lmdeploy", module)
    spec.loader.exec_module(module)
    put(monkeypatch, module)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    return module


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


class Asking:
    """One request at an instance of its own, read in a task."""

    def __init__(self, lmdeploy: Any, model: Any, length: int, picture: bool = True, **more: Any) -> None:
        self.instance, self.got, self.error = lmdeploy.TurboMindInstance(model), [], None
        named = {"multimodal": [{}] if picture else None, "stream_output": True} | more
        self.answers = self.instance.async_stream_infer(1, [0] * length, **named)
        self.task = asyncio.create_task(self.read())

    async def read(self) -> None:
        try:
            async for answer in self.answers:
                self.got.append(answer)
        except ValueError as error:
            self.error = error


def test_pictures_wait_for_room_until_a_first_token_and_text_passes_by(lmdeploy: Any) -> None:
    assert lmdeploy_patches.gate()

    async def run() -> None:
        model = lmdeploy.Model(8192)
        asked = [Asking(lmdeploy, model, length) for length in (3451, 3451, 3451, 20_000)]
        text = Asking(lmdeploy, model, 3451, picture=False)
        whole = Asking(lmdeploy, model, 3451, stream_output=False)  # would hold its room to its end
        await settle()
        assert [one.instance for one in model.started] == [asked[0].instance, asked[1].instance, text.instance, whole.instance]
        model.started[0].put("success", 1)
        await settle()
        assert [len(one.got) for one in asked] == [1, 0, 0, 0]
        assert model.started[-1].instance is asked[2].instance
        model.started[0].put("finish", 3)  # the room was free with the first token, and only once
        await settle()
        assert len(model.started) == 5
        for number in (1, 4):
            model.started[number].put("finish", 1)
        await settle()
        assert model.started[-1].instance is asked[3].instance  # larger than the room: alone
        model.started[-1].put("finish", 1)
        await asyncio.gather(*(one.task for one in asked))
        assert [[answer.status for answer in one.got] for one in asked] == [["success", "finish"], ["finish"], ["finish"], ["finish"]]
        text.task.cancel()
        whole.task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("end", ["error", "closed early", "cancelled while it ran", "cancelled while it waited", "aborted while it waited"])
def test_however_a_picture_ends_its_room_is_free_again(lmdeploy: Any, end: str) -> None:
    assert lmdeploy_patches.gate()

    async def run() -> None:
        model = lmdeploy.Model(4000)
        first = Asking(lmdeploy, model, 3000, broken=end == "error")
        second = Asking(lmdeploy, model, 3000)
        third = Asking(lmdeploy, model, 3000)
        await settle()
        if end == "error":
            assert str(first.error) == "the picture has a fault"
        elif end == "closed early":
            model.started[0].put("success", 1)
            await settle()
            first.task.cancel()
            await settle()
            await first.answers.aclose()
        elif end == "cancelled while it ran":
            first.task.cancel()
        else:
            if "cancelled" in end:
                second.task.cancel()
            else:
                await second.instance.async_cancel(1)
                await settle()
                assert [(answer.status, answer.token_ids) for answer in second.got] == [("cancel", [])]
                assert second.instance.cancelled == 0  # TurboMind has not seen it
            await settle()
            assert [one.instance for one in model.started] == [first.instance]
            model.started[0].put("finish", 1)
        await settle()
        if "waited" not in end:
            assert model.started[-1].instance is second.instance
            model.started[-1].put("finish", 1)
            await settle()
        assert model.started[-1].instance is third.instance
        await third.instance.async_cancel(1)
        assert third.instance.cancelled == 1  # one that runs is TurboMind's to cancel
        third.task.cancel()

    asyncio.run(run())


def test_engines_that_share_the_requests_out_have_no_gate(lmdeploy: Any) -> None:
    assert lmdeploy_patches.gate()

    async def run() -> None:
        model = lmdeploy.Model(4000, dp=2)
        asked = [Asking(lmdeploy, model, 3000) for _ in range(3)]
        await settle()
        assert len(model.started) == 3
        for one in asked:
            one.task.cancel()

    asyncio.run(run())


def test_fingerprints_are_made_beside_the_tiles_and_are_lmdeploys_own_where_it_caches_prefixes(lmdeploy: Any) -> None:
    assert lmdeploy_launcher.more_tiling_threads(3)  # as the launcher does it, first
    assert lmdeploy_patches.fingerprints()

    def made(backend: str, caching: bool) -> list[dict[str, bytes]]:
        encoder = lmdeploy.ImageEncoder("x", backend, backend_config=SimpleNamespace(enable_prefix_caching=caching))
        assert encoder.executor._max_workers == 3
        messages = encoder.preprocess([{"role": "user", "content": "hi"}])
        assert messages[0] == {"role": "user", "content": "hi"}
        return messages[-1]["content"]

    plain = [item["fingerprint"] for _ in range(2) for item in made("turbomind", False)]
    assert {len(one) for one in plain} == {32}
    assert len(set(plain)) == 4
    for item in made("turbomind", True):
        assert item["fingerprint"] == lmdeploy._resolve_fingerprint({"pixel_values": item["pixel_values"]})
    assert all("fingerprint" not in item for item in made("pytorch", False))


def told(tokenizer: Any, lmdeploy: Any, prompt: list[int], answer: list[int], sizes: Iterator[int]) -> str:
    ids, state, said, at = list(prompt), lmdeploy.DetokenizeState(len(prompt)), "", 0
    while at < len(answer):
        size = next(sizes)
        ids, at = ids + answer[at : at + size], at + size
        text, state = tokenizer.detokenize_incrementally(ids, state)
        said += text
    return said


def test_events_of_several_tokens_read_as_their_tokens_one_by_one_and_the_prompt_is_not_walked(lmdeploy: Any) -> None:
    rng, tokenizer = random.Random(5), lmdeploy.HuggingFaceTokenizer()
    letters = [*map(ord, "ĀāĂă"), *"🍜好é".encode()]
    cases = []
    for number in range(600):
        answer = [rng.choice(letters) for _ in range(rng.randrange(1, 14))] if number % 2 else list("好🍜 é🍜好".encode())
        prompt = [-1] * 40 if number % 5 == 0 else [300] * 3000
        cases.append((prompt, answer[: rng.randrange(1, len(answer) + 1)]))
    own = [told(tokenizer, lmdeploy, *case, iter(lambda: 1, 0)) for case in cases]
    chunks = [[rng.choice([1, 2, 3, 5]) for _ in range(20)] for _ in cases]
    unchanged = [told(tokenizer, lmdeploy, *case, iter(sizes)) for case, sizes in zip(cases, chunks, strict=True)]
    assert own != unchanged  # what the change is there for
    assert lmdeploy_patches.detokenizer()
    assert lmdeploy_patches.pace()
    before = lmdeploy.HuggingFaceTokenizer.walked
    assert [told(tokenizer, lmdeploy, *case, iter(sizes)) for case, sizes in zip(cases, chunks, strict=True)] == own
    assert lmdeploy.HuggingFaceTokenizer.walked - before <= 600 * (16 + 40)


def reading(lmdeploy: Any, streams: int, tokens: int, each: float) -> tuple[list[list[int]], list[float], float]:
    """So many streams whose tokens come every `each` seconds: sizes of the events, the first stream's seconds from a token to its event,
    and from the end to its event."""

    async def run() -> tuple[list[list[int]], list[float], float]:
        model, clock = lmdeploy.Model(), asyncio.get_running_loop()
        sizes: list[list[int]] = [[] for _ in range(streams)]
        late, made, ended, over = [], {}, [0.0] * streams, 0.0

        async def read(number: int) -> None:
            async for answer in lmdeploy.TurboMindInstance(model).async_stream_infer(1, [0], stream_output=True):
                sizes[number].append(len(answer.token_ids))
                if number == 0:
                    late.append(clock.time() - made[answer.token_ids[-1]])
            ended[number] = clock.time()

        tasks = [asyncio.create_task(read(number)) for number in range(streams)]
        await settle()
        for count in range(1, tokens + 1):
            made[count - 1] = over = clock.time()
            for one in model.started:
                one.put("finish" if count == tokens else "success", count)
            await asyncio.sleep(each)
        await asyncio.gather(*tasks)
        return sizes, late, max(ended) - over

    gc.collect()
    return asyncio.run(run())


def test_many_streams_of_a_busy_loop_are_read_several_tokens_at_a_time_with_nothing_lost_and_the_first_token_at_once(
    lmdeploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lmdeploy_patches.pace()
    monkeypatch.setattr(lmdeploy_patches.time, "thread_time", time.monotonic)  # it computes all the time
    sizes, _, end = reading(lmdeploy, 64, 300, 0.003)
    assert {sum(one) for one in sizes} == {300}
    assert {(one[0], one[1]) for one in sizes} == {(1, 1)}
    assert max(len(one) for one in sizes) < 220
    assert end < 0.02 + 0.1  # 20 ms, and what a busy machine adds


def test_many_streams_of_a_loop_with_time_to_spare_are_read_token_by_token(lmdeploy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lmdeploy_patches.pace()
    monkeypatch.setattr(lmdeploy_patches.time, "thread_time", lambda: 0.0)
    sizes, _, _ = reading(lmdeploy, 64, 60, 0.003)
    assert min(len(one) for one in sizes) > 50


def test_the_pause_grows_while_the_thread_computes_and_goes_when_it_does_not() -> None:
    def levels(shares: list[float]) -> list[float]:
        busy, now, used, found = lmdeploy_patches.Busy(), 5.0, 0.0, []
        busy.look(now, lambda: 0.0)
        for share in shares:
            now, used = now + 0.11, used + share * 0.11
            found.append(busy.look(now, lambda used=used: used))
        return found

    assert levels([0.9, 0.9, 0.6, 0.9, 0.9, 0.9]) == [0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
    assert levels([0.9, 0.9, 0.3, 0.6, 0.3, 0.3]) == [0.25, 0.5, 0.25, 0.25, 0.0, 0.0]
    busy = lmdeploy_patches.Busy()
    busy.level = 1.0
    assert busy.look(100.0, lambda: 99.0) == 0.0  # after a long silence


def test_a_single_client_gets_every_token_as_it_comes(lmdeploy: Any) -> None:
    assert lmdeploy_patches.pace()
    began = time.perf_counter()
    sizes, late, _ = reading(lmdeploy, 1, 60, 0.002)
    assert sizes == [[1] * 60]
    assert sorted(late)[30] < 0.001
    assert time.perf_counter() - began < 5


def test_metrics_are_left_out_where_the_option_exists(lmdeploy: Any) -> None:
    assert lmdeploy_patches.metrics()
    assert sys.argv[-1] == "--disable-metrics"
    del lmdeploy.ArgumentHelper.disable_metrics
    sys.argv.pop()
    assert not lmdeploy_patches.metrics()
    assert sys.argv == ["launcher"]


@pytest.mark.parametrize(
    "gone",
    [
        ("TurboMindInstance",),
        ("StreamingSemaphore", "ImageEncoder", "DetokenizeState", "ResponseType"),
        ("HuggingFaceTokenizer", "_resolve_fingerprint", "ArgumentHelper", "EngineOutput"),
        (),
    ],
)
def test_an_lmdeploy_built_otherwise_is_left_as_it_is_and_said_so(
    lmdeploy: Any, gone: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not gone:  # there, but with other parameters

        async def async_stream_infer(self: Any, request: Any) -> None: ...

        def take(self: Any, path: str) -> None: ...

        def detokenize_incrementally(self: Any, ids: Any) -> None: ...

        lmdeploy.TurboMindInstance.async_stream_infer = async_stream_infer
        lmdeploy.ImageEncoder.__init__ = take
        lmdeploy.HuggingFaceTokenizer.detokenize_incrementally = detokenize_incrementally
    for name in gone:
        monkeypatch.delattr(lmdeploy, name)
    looked = {name: dict(vars(kind)) for name, kind in vars(lmdeploy).items() if isinstance(kind, type)}
    made = []
    for name, change in (lmdeploy_patches.EVERYWHERE | lmdeploy_patches.TURBOMIND).items():
        if name == "metrics":
            continue
        before = {kind: dict(vars(lmdeploy)[kind].__dict__) for kind in looked}
        done = False
        with suppress(ImportError, AttributeError):
            done = change()
        if done:
            made.append(name)
        else:
            assert before == {kind: dict(vars(lmdeploy)[kind].__dict__) for kind in looked}
    monkeypatch.setenv("INTERVALE_ENGINE_PATCHES", ",".join({"gate", "pace", "fingerprints", "detokenizer"} - set(made)))
    lmdeploy_patches.apply("turbomind")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 - len(made)
    assert len(made) < 4
    assert all("built otherwise" in line for line in said[:-1])
    assert said[-1] == "intervale: changes to LMDeploy: none"


def test_the_changes_can_be_left_out_or_chosen_and_those_of_turbomind_are_not_made_before_pytorch(
    lmdeploy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(backend: str, asked: str | None) -> str:
        monkeypatch.delenv("INTERVALE_ENGINE_PATCHES", raising=False)
        if asked is not None:
            monkeypatch.setenv("INTERVALE_ENGINE_PATCHES", asked)
        lmdeploy_patches.apply(backend)
        return capsys.readouterr().out.strip().removeprefix("intervale: ")

    infer, semaphore = lmdeploy.TurboMindInstance.async_stream_infer, lmdeploy.StreamingSemaphore
    assert said("turbomind", "off") == "changes to LMDeploy: none"
    assert said("pytorch", None) == "changes to LMDeploy: detokenizer, metrics"
    assert said("turbomind", "fingerprints,detokenizer") == "changes to LMDeploy: fingerprints, detokenizer"
    assert (lmdeploy.TurboMindInstance.async_stream_infer, lmdeploy.StreamingSemaphore) == (infer, semaphore)
    assert said("turbomind", "gate,pace") == "changes to LMDeploy: gate, pace"
    assert lmdeploy.TurboMindInstance.async_stream_infer is not infer
    assert lmdeploy.StreamingSemaphore is not semaphore
    assert "there is no 'gates'" in said("turbomind", "gates")


def test_all_changes_are_made_unasked_and_hold_together_in_the_launchers_order(
    lmdeploy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INTERVALE_ENGINE_PATCHES", raising=False)
    assert lmdeploy_launcher.more_tiling_threads(2)
    lmdeploy_patches.apply("turbomind")
    assert capsys.readouterr().out == "intervale: changes to LMDeploy: detokenizer, metrics, gate, fingerprints, pace\n"
