"""Saving in the background: what is written, and when its errors are heard."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loop import run, write_recipe

from intervale.core.errors import UserError
from intervale.core.runlog import read_metrics
from intervale.train import running, sharded, state, step, steps
from intervale.train.saving import Saver
from intervale.train.state import Tensors, moments_by_name, trainable
from intervale.train.strategy import Plain


def test_the_block_ends_when_the_save_has() -> None:
    gate, written = threading.Event(), []
    threading.Timer(0.2, gate.set).start()
    with Saver() as saver:
        saver.begin(lambda: (gate.wait(5), written.append(1)))
        assert written == []
    assert written == [1]


def test_saves_are_made_one_after_another() -> None:
    gate, order = threading.Event(), []
    threading.Timer(0.2, gate.set).start()
    with Saver() as saver:
        saver.begin(lambda: (gate.wait(5), order.append("first")))
        saver.begin(lambda: order.append("second"))
    assert order == ["first", "second"]


def _full() -> None:
    raise UserError("the disk is full", "free some space")


def test_a_save_that_failed_is_told_by_the_next_step_and_once() -> None:
    with Saver() as saver:
        saver.begin(_full)
        assert saver._thread is not None
        saver._thread.join()
        with pytest.raises(UserError, match="disk is full"):
            saver.check()
        saver.check()


def test_a_save_that_fails_last_is_told_at_the_end() -> None:
    with pytest.raises(UserError, match="disk is full"), Saver() as saver:
        saver.begin(_full)


def test_an_error_of_the_steps_is_not_hidden_by_one_of_a_save() -> None:
    def steps() -> None:
        with Saver() as saver:
            saver.begin(_full)
            raise ValueError("the step's own")

    with pytest.raises(ValueError, match="the step's own"):
        steps()


def _learning() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.5)
    return network, optimizer


def _step(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _numbers(tensors: Tensors) -> list[torch.Tensor]:
    return [*tensors.weights.values(), *(value for own in tensors.moments.values() for value in own.values())]


def _of(network: Any, optimizer: Any, first: bool = True) -> Tensors:
    return Plain(network, optimizer, SimpleNamespace(first=first)).tensors()  # type: ignore[arg-type]


def test_a_later_step_changes_nothing_of_what_is_being_written() -> None:
    network, optimizer = _learning()
    _step(network, optimizer)
    given = _of(network, optimizer)
    before = [tensor.clone() for tensor in _numbers(given)]
    _step(network, optimizer)
    assert not given.live
    assert all(torch.equal(was, now) for was, now in zip(before, _numbers(given), strict=True))
    named = trainable(network)
    now = _numbers(Tensors(dict(named), moments_by_name(named, optimizer)))
    assert not any(torch.equal(was, new) for was, new in zip(before, now, strict=True)), "the step changed nothing: the test cannot fail"


def test_without_room_for_copies_the_parameters_themselves_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "free_ram", lambda: 10)
    network, optimizer = _learning()
    given = _of(network, optimizer)
    assert given.live
    assert given.weights["weight"] is network.weight


def test_a_process_that_writes_nothing_copies_nothing(tmp_path: Path) -> None:
    assert _of(*_learning(), first=False) == Tensors({}, {})


def test_a_second_ctrl_c_leaves_the_block_when_the_save_has_ended_and_says_so() -> None:
    """Else the run's lock would be free while a thread still writes."""
    gate, written, said = threading.Event(), [], []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = [threading.Timer(at, os.kill, (os.getpid(), signal.SIGINT)) for at in (0.2, 0.4)] + [threading.Timer(0.6, gate.set)]

    def steps_then_ctrl_c() -> None:
        with Saver(said.append) as saver:
            saver.begin(lambda: (gate.wait(5), written.append(1)))
            for timer in timers:
                timer.start()

    try:
        with pytest.raises(KeyboardInterrupt):
            steps_then_ctrl_c()
        assert written == [1]
        assert said[0] == "stopping after this save ..."
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGINT, before)


def test_a_save_is_made_where_the_system_gives_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    written = []
    with Saver() as saver:
        saver.begin(lambda: written.append(1))
        assert written == [1]


def test_an_error_of_a_save_is_told_where_the_steps_own_ends_the_run() -> None:
    said: list[str] = []

    def fails() -> None:
        with Saver(said.append) as saver:
            saver.begin(_full)
            raise ValueError("the step's own")

    with pytest.raises(ValueError, match="the step's own"):
        fails()
    assert said == ["the last save failed too: the disk is full"]


# --- in a run --------------------------------------------------------------------------------------------------------------------


class Slow:
    """`save_checkpoint` that takes a while; `going` while one is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> None:
        self.going, self.seconds, self._real = False, seconds, steps.save_checkpoint
        monkeypatch.setattr(steps, "save_checkpoint", self)

    def __call__(self, *values: Any) -> Path:
        self.going = True
        try:
            time.sleep(self.seconds)
            return self._real(*values)
        finally:
            self.going = False

    def seen(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, value: Any = None) -> list[bool]:
        """Was a save going on, at every call of `name`?"""
        real, found = getattr(place, name), []

        def call(*values: Any) -> Any:
            found.append(self.going)
            return real(*values) if value is None else value

        monkeypatch.setattr(place, name, call)
        return found


def test_no_process_leaves_before_the_last_save_stands(tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one of several has ended with a stop's code, the launcher gives the others 20 s."""
    waits = Slow(monkeypatch).seen(monkeypatch, steps, "wait")
    assert run(write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=2), "data.eval=null").status == "done"
    assert waits == [True, False], "a save at step 2 of 4, in the background, and the last"


def test_no_process_leaves_for_a_loss_that_is_no_number_before_the_save_stands(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = step.batch_losses, []

    def poisoned(*values: Any) -> Any:
        calls.append(1)
        found, correct = real(*values)
        return found * (float("nan") if len(calls) > 4 else 1.0), correct

    monkeypatch.setattr(step, "batch_losses", poisoned)
    waits = Slow(monkeypatch).seen(monkeypatch, running, "wait")
    with pytest.raises(UserError, match="the loss is nan"):
        run(write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=2))
    assert waits == [False]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_memory_that_ends_beside_a_save_costs_the_wait_for_it_and_no_smaller_packs(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, real, calls, said = Slow(monkeypatch), steps.accumulate, [], []

    def accumulate(*values: Any) -> Any:
        calls.append(slow.going)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*values)

    monkeypatch.setattr(steps, "accumulate", accumulate)
    fits = []
    monkeypatch.setattr(steps, "lower", lambda *values: fits.append(values))
    assert run(write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=2), said=said).status == "done"
    assert calls == [False, False, True, False, False]
    assert fits == []
    assert [entry["step"] for entry in read_metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]
    assert "memory ended; the same step again with the memory of a save that has ended" in said


def test_no_loader_is_made_while_a_save_may_hold_a_lock_and_none_is_measured_with_its_copies(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    loaders = slow.seen(monkeypatch, steps, "load_ahead")
    measured = slow.seen(monkeypatch, steps, "_refitted", value=True)
    assert run(write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=1)).status == "done"
    assert (measured, loaders) == ([False], [False, False])


def test_copies_are_made_when_those_of_the_save_before_are_gone(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Slow(monkeypatch).seen(monkeypatch, state.Tensors, "copied")
    assert run(write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=1)).status == "done"
    assert made == [False] * 4


def test_a_run_whose_folder_is_removed_in_the_middle_of_a_save_ends_with_one_error(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = state.save_trained

    def save(*values: Any) -> None:
        shutil.rmtree(tmp_path / "run")
        real(*values)

    monkeypatch.setattr(state, "save_trained", save)
    with pytest.raises(UserError, match=r"cannot be written: .*No such file"):
        run(write_recipe(tmp_path, tiny, plates, epochs=2))
    assert not (tmp_path / "run").exists()


def test_a_gathered_tensor_is_a_copy_where_it_is_written_and_nothing_elsewhere() -> None:
    own = torch.nn.Parameter(torch.ones(3))
    copy = sharded._whole(own, True)
    with torch.no_grad():
        own.zero_()
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert sharded._whole(own, False).numel() == 0
