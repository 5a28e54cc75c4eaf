"""Steps on their way to a GPU, which stands in here: what matters is who moves what, and when."""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intervale.core.errors import UserError
from intervale.train import moving
from intervale.train.batches import Loaded
from intervale.train.moving import moved

GPU: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), kept=None)


class Stream:
    """A stream that counts what waited for it."""

    waited = 0

    def record_event(self) -> str:
        return "event"

    def wait_event(self, event: str) -> None:
        assert event == "event"
        self.waited += 1


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: contextlib.nullcontext())
    return stream


def steps(count: int) -> Iterator[Loaded]:
    for number in range(count):
        yield Loaded([SimpleNamespace(number=number, where="host", tensors=list)], [])  # type: ignore[list-item]


def test_a_step_is_moved_by_a_thread_while_the_one_before_is_made(here: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: dict[int, threading.Event] = {number: threading.Event() for number in range(4)}

    def move(batch: Any, compute: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        moves[batch.number].set()
        return SimpleNamespace(number=batch.number, where="gpu", tensors=list)

    monkeypatch.setattr(moving, "_on_device", move)
    seen = []
    for loaded in moved(steps(4), GPU):
        (batch,) = loaded.batches
        seen.append((batch.number, batch.where))  # type: ignore[attr-defined]
        if len(seen) < 4:
            assert moves[len(seen)].wait(10)  # the next one comes while this one is held
    assert seen == [(number, "gpu") for number in range(4)]
    assert here.waited == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("move")]


def test_without_room_beside_a_step_the_next_stays_where_it_is(here: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(batch: Any, compute: Any) -> Any:
        if batch.number == 1:
            raise torch.OutOfMemoryError("full")
        return SimpleNamespace(number=batch.number, where="gpu", tensors=list)

    monkeypatch.setattr(moving, "_on_device", move)
    seen = [loaded.batches[0].where for loaded in moved(steps(3), GPU)]  # type: ignore[attr-defined]
    assert seen == ["gpu", "host", "gpu"]
    assert here.waited == 2


def test_what_cannot_be_read_is_told_by_the_thread_that_trains(here: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(batch: Any, compute: Any) -> Any:
        raise UserError("lost", "find it")

    monkeypatch.setattr(moving, "_on_device", move)
    with pytest.raises(UserError, match="lost"):
        list(moved(steps(3), GPU))
