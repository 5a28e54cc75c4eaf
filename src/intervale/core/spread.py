"""The same work on many items, over all cores. Promises: the order of the items; one core's result, only sooner.

Processes are forked, so the items are shared and only results travel; call it before threads or a GPU are in use. Few items
are done here and now, because starting processes costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_FEW, _CHUNK = 20_000, 2_000  # items
_work: tuple[Callable[[Any], Any], Sequence[Any], int] | None = None  # what the forked children find


def _part(start: int) -> list[Any]:
    assert _work is not None
    function, items, chunk = _work
    return [function(item) for item in items[start : start + chunk]]


def stream(function: Callable[[Item], Result], items: Sequence[Item], few: int = _FEW, chunk: int = _CHUNK) -> Iterator[Result]:
    """function(item) for each item, in order; with more than `few` items over all cores, `chunk` at a time. Results must be picklable."""
    global _work
    cores = len(os.sched_getaffinity(0))
    if len(items) <= few or cores == 1:
        yield from map(function, items)
        return
    _work = (function, items, chunk)
    try:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            for part in pool.imap(_part, range(0, len(items), chunk)):
                yield from part
    finally:
        _work = None


def spread(function: Callable[[Item], Result], items: Sequence[Item], few: int = _FEW) -> list[Result]:
    """`stream` as a list."""
    return list(stream(function, items, few))
