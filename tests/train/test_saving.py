"""Saving in the background: what is written, and when its errors are heard."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intervale.core.errors import UserError
from intervale.train import state
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
