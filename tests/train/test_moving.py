"""Steps on their way to a GPU, which stands in here: what matters is who moves what, and when."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from intervale.core.errors import UserError
from intervale.data.pictures import Picture
from intervale.data.tiling import Tiling
from intervale.model.features import FeatureStore
from intervale.train import moving
from intervale.train.batches import Loaded
from intervale.train.feature_cache import KeptFeatures
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

    def move(batch: Any, compute: Any, staging: Any) -> Any:
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
    def move(batch: Any, compute: Any, staging: Any) -> Any:
        if batch.number == 1:
            raise torch.OutOfMemoryError("full")
        return SimpleNamespace(number=batch.number, where="gpu", tensors=list)

    monkeypatch.setattr(moving, "_on_device", move)
    seen = [loaded.batches[0].where for loaded in moved(steps(3), GPU)]  # type: ignore[attr-defined]
    assert seen == ["gpu", "host", "gpu"]
    assert here.waited == 2


def test_what_cannot_be_read_is_told_by_the_thread_that_trains_when_the_steps_before_it_are_made(
    here: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(batch: Any, compute: Any, staging: Any) -> Any:
        if batch.number == 2:
            raise UserError("lost", "find it")
        return batch

    monkeypatch.setattr(moving, "_on_device", move)
    seen = []
    with pytest.raises(UserError, match="lost"):
        seen.extend(loaded.batches[0].number for loaded in moved(steps(4), GPU))  # type: ignore[attr-defined]
    assert seen == [0, 1]


@pytest.mark.parametrize("made", [0, 1, 3])
def test_who_stops_before_the_end_leaves_no_thread_that_reads(here: Stream, monkeypatch: pytest.MonkeyPatch, made: int) -> None:
    """The loading processes of the next try are forked, and must not find a lock held."""
    monkeypatch.setattr(moving, "_on_device", lambda batch, compute, staging: time.sleep(0.05) or batch)
    coming = moved(steps(5), GPU)
    for _ in range(made):
        next(coming)
    del coming
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("move")]


def test_items_that_were_bad_travel_with_their_step_and_no_steps_are_none(here: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_on_device", lambda batch, compute, staging: batch)
    bad = [("q1", UserError("broken", "mend it"))]
    (loaded,) = moved(iter([Loaded([], bad)]), GPU)
    assert (loaded.batches, loaded.bad) == ([], bad)
    assert list(moved(steps(0), GPU)) == []


def test_features_that_were_lost_are_computed_by_the_thread_as_a_step_would(
    here: Stream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a graph and in the run's type, whatever the thread that trains is doing; no random number is drawn."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    sha = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    tiling = Tiling(tile_size=28, tokens_per_tile=1, min_tiles=1, max_tiles=1, thumbnail=False)
    weight = torch.randn(3, 8, requires_grad=True)
    monkeypatch.setattr("intervale.train.encode.tower_features", lambda network, pixels: pixels.mean((2, 3))[:, None] @ weight)
    kept = KeptFeatures(
        FeatureStore(tmp_path / "store", disk_budget=1 << 20),
        {},
        False,
        {"0" * 40: Picture("0" * 40, tmp_path / "a.png", sha, "a.png")},
        None,  # type: ignore[arg-type]
        tiling,
        torch.bfloat16,
        torch.device("cpu"),
    )
    got: list[torch.Tensor] = []
    monkeypatch.setattr(moving, "_on_device", lambda batch, compute, staging: got.append(kept.get("0" * 40)) or batch)
    before = torch.get_rng_state()
    list(moved(steps(2), GPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert [(one.dtype, one.requires_grad) for one in got] == [(torch.bfloat16, False)] * 2
    assert torch.equal(*got)


class Event:
    """Something that is over when it was waited for."""

    over = False

    def synchronize(self) -> None:
        self.over = True


def test_features_arrive_as_they_are_and_a_piece_of_memory_is_taken_again_when_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    stream: Any = SimpleNamespace(record_event=lambda: events.append(Event()) or events[-1])
    staging = moving.Staging(torch.device("cpu"), stream)
    sizes, pieces = [(2, 4, 8), (5, 4, 8), (1, 4, 8), (5, 4, 8), (13, 4, 8), (2, 4, 8)], []
    sent = [torch.randn(size).to(torch.bfloat16 if at % 2 else torch.float32) for at, size in enumerate(sizes)]
    got = []
    for number, features in enumerate(sent):
        got.append(staging.up(features))
        assert [event.over for event in events] == [True] * (number - 1) + [False] * min(2, number + 1)
        pieces.append([piece.data_ptr() for piece in staging._pieces])
    for features, there in zip(sent, got, strict=True):
        assert there.dtype == features.dtype
        assert torch.equal(there, features)
    assert pieces[2] == pieces[1] == pieces[3], "no new memory where the old is large enough"
