"""Builds in threads: begun once, waited for, and never in the step's way."""

import threading

import torch

from intervale.train.ahead import Beside

CPU = torch.device("cpu")


def test_what_is_begun_once_runs_beside_and_is_waited_for() -> None:
    go, done = threading.Event(), []

    def slow() -> None:
        go.wait(10)
        done.append("slow")

    builds = Beside([slow, lambda: done.append("quick")], CPU)
    builds.begin()
    builds.begin()
    assert "slow" not in done
    go.set()
    builds.finish()
    assert sorted(done) == ["quick", "slow"]
    builds.begin()
    builds.finish()
    assert len(done) == 2


def test_who_needs_them_at_once_finds_them_made() -> None:
    done: list[int] = []
    Beside([lambda at=at: done.append(at) for at in range(9)], CPU, wait=True).begin()
    assert sorted(done) == list(range(9))


def test_a_build_that_fails_is_left_for_the_step_to_meet() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    done: list[str] = []
    builds = Beside([broken, lambda: done.append("made")], CPU, wait=True)
    builds.begin()
    assert done == ["made"]


def test_without_works_there_is_nothing_to_do() -> None:
    builds = Beside()
    builds.begin()
    builds.finish()
