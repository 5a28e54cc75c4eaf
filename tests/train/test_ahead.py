"""What is made while the pictures are encoded: begun once, waited for, and never in the way."""

import sys
import threading

import pytest
import torch

from intervale.train.ahead import made_ahead

CPU = torch.device("cpu")


def test_the_blocks_end_waits_for_every_work_that_was_begun() -> None:
    go, done = threading.Event(), []

    def slow() -> None:
        go.wait(10)
        done.append("slow")

    with made_ahead([slow, lambda: done.append("quick")], CPU) as begin:
        begin()
        begin()
        threading.Timer(0.05, go.set).start()
    assert sorted(done) == ["quick", "slow"]


def test_nothing_is_made_where_nothing_was_begun() -> None:
    done: list[str] = []
    with made_ahead([lambda: done.append("made")], CPU):
        pass
    assert not done


def test_what_fails_ahead_is_left_for_the_step_to_meet() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    done: list[str] = []
    with made_ahead([broken, lambda: done.append("made")], CPU) as begin:
        begin()
    assert done == ["made"]


def test_an_error_in_the_block_does_not_wait_and_leaves_the_interpreter_as_it_was() -> None:
    go, before = threading.Event(), sys.getswitchinterval()

    def run() -> None:
        with made_ahead([lambda: go.wait(10) or None], CPU) as begin:
            begin()
            assert sys.getswitchinterval() < before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not go.is_set()
    assert sys.getswitchinterval() == before
    go.set()
