"""Checkpoints written in the background: a save costs the steps a copy of what learns, not the disk's time.

Promises: one save at a time, in order; leaving the block waits for the last; an error of a save is raised by the next step, the next
save, or at the end, whichever is first. Cost: a thread, and the copies until they are written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch


def beside(device: torch.device, write: Callable[[], object]) -> Callable[[], object]:
    """`write` as another thread may run it: on a GPU with a stream of its own, after what is queued now, and no step waits for it."""
    if device.type != "cuda":
        return write
    queued = torch.cuda.Event()
    queued.record(torch.cuda.current_stream(device))

    def run() -> object:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            torch.cuda.current_stream(device).wait_event(queued)
            return write()

    return run


class Saver:
    """`with saver:` around the steps; `begin` where one is due."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Run `write` in the background, after the one before. Raises: that one's error."""
        self.finish()
        # not a daemon: whichever way the process ends, Python waits for it
        self._thread = threading.Thread(target=self._run, args=(write,), name="save")
        self._thread.start()

    def finish(self) -> None:
        """Wait for what is being written. Raises: its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # the steps raise it
            self._error = error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception:
            if kind is None:  # an error that is on its way already is the one to tell
                raise
