"""Checkpoints written in the background: a save costs the steps a copy of what learns, not the disk's time.

Promises: one save at a time, in order; leaving the block waits for the last, whatever it is left by, so that the run's lock is not given
away before; an error of a save is raised by the next step, the next save, or at the end, whichever is first, and told where another
error is on its way already. Cost: a thread, and the copies until they are written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch

from intervale.core.lang import say
from intervale.train.launch import spared


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
    """`with saver:` around the steps; `begin` where one is due. `tell`: for what cannot be raised."""

    def __init__(self, tell: Callable[[str], None] = lambda text: None) -> None:
        self._tell = tell
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Run `write` in the background, after the one before. Raises: that one's error."""
        self.finish()
        # not a daemon: whichever way the process ends, Python waits for it
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, args=(write,), name="save")
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no more threads
            self._thread = None
            write()

    @property
    def busy(self) -> bool:
        """Is something being written?"""
        return self._thread is not None and not self._ended.is_set()

    def wait(self) -> None:
        """Until nothing is being written. A second Ctrl-C stops the steps, not a write that would have been for nothing."""
        interrupt: KeyboardInterrupt | None = None
        while self.busy:
            try:
                self._ended.wait()  # a `join` that is interrupted takes the thread for ended, before Python 3.13
            except KeyboardInterrupt as error:
                interrupt = error
                self._tell(say("stopping after this save ...", "本次保存结束后停止……"))
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if interrupt is not None:
            raise interrupt

    def finish(self) -> None:
        """Wait for what is being written. Raises: its error."""
        self.wait()
        self.check()

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            with spared():
                write()
        except BaseException as error:  # the steps raise it
            self._error = error
        finally:
            self._ended.set()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as error:
            if kind is None:
                raise
            # the error that is on its way is the one to end with; what could not be saved is told all the same
            told = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
            self._tell(say(f"the last save failed too: {told}", f"最后一次保存也失败了：{told}"))
