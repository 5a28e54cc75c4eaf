"""Pictures are looked at in as many threads as memory allows."""

import pytest

from intervale.data import split

GIB = 1 << 30


def test_threads_follow_the_free_memory_and_the_largest_picture_that_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split.os, "cpu_count", lambda: 64)

    def threads(free: int, pixels: int) -> int:
        monkeypatch.setattr(split, "free_ram", lambda: free)
        monkeypatch.setenv("INTERVALE_MAX_PIXELS", str(pixels))
        return split._threads()

    assert threads(64 * GIB, 40_000_000) == split.MAX_THREADS
    assert threads(4 * GIB, 40_000_000) == 4
    assert threads(4 * GIB, 160_000_000) == 1
    assert threads(0, 40_000_000) == 1
