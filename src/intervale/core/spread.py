"""The same work on many items, over all cores. Promises: the order of the items; one core's result, only sooner.

Processes are forked, so the items are shared and only results travel; call it before threads or a GPU are in use. Few items
are done here and now, because starting processes costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_FEW, _CHUNK = 20_000, 2_000  # items
_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None  # what the forked children find


def _part(start: int) -> list[Any]:
    assert _work is not None
    function, items = _work
    return [function(item) for item in items[start : start + _CHUNK]]


def spread(function: Callable[[Item], Result], items: Sequence[Item], few: int = _FEW) -> list[Result]:
    """[function(item) for item in items]; with more than `few` items over all cores. Results must be picklable."""
    global _work
    cores = len(os.sched_getaffinity(0))
    if len(items) <= few or cores == 1:
        return [function(item) for item in items]
    _work = (function, items)
    try:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            return [result for part in pool.imap(_part, range(0, len(items), _CHUNK)) for result in part]
    finally:
        _work = None
