"""What is made beside the encoding: by a process of its own, waited for, ended with the block, and never in the step's way."""

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from intervale.model.decoder import Walk
from intervale.train import ahead
from intervale.train.ahead import building, made_ahead
from intervale.train.builder import build_all

CPU = torch.device("cpu")


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_a_process_makes_the_works_beside_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 60.0)
    before = children()
    with building([partial(Path.touch, tmp_path / name) for name in ("one", "two")], CPU):
        assert children() - before
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert children() == before


def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 0.1)
    before, begun = children(), time.monotonic()
    with building([partial(time.sleep, 600)], CPU):
        pass
    assert time.monotonic() - begun < 300
    assert children() == before


def test_an_error_in_the_block_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 600.0)
    before = children()
    with pytest.raises(KeyboardInterrupt), building([partial(time.sleep, 600)], CPU):
        raise KeyboardInterrupt
    assert children() == before


def test_a_builder_that_cannot_start_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for command in (("-c", "raise SystemExit(3)"), ("-m", "intervale.no_such_module")):
        monkeypatch.setattr(ahead, "_BUILDER", command)
        with building([partial(print, "x" * 10**6)], CPU):  # more than a pipe holds
            done.append(command)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with building([partial(print)], CPU):
        done.append(())
    assert len(done) == 3


def test_without_a_gpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def builds(self) -> list[object]:
            raise AssertionError("asked for")

    monkeypatch.setattr(subprocess, "Popen", None)
    with made_ahead(Walk(compiled=True, adapter=Kernels()), CPU):  # type: ignore[arg-type]
        pass


def test_all_works_are_made_before_it_returns_and_one_that_fails_spoils_no_other() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    done: list[str] = []
    names = [str(number) for number in range(9)]
    build_all([broken, *(partial(done.append, name) for name in names)], CPU)
    assert sorted(done) == names
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("build")]
