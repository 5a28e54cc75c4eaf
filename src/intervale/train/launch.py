"""Several processes of one command on this machine, for `parallel.processes`: started together, stopped together.

Promises: Ctrl-C and SIGTERM reach each process once and its exit code is the command's; a process that dies ends the others, and what
it last said is shown; none is ended in the middle of a save; nothing outlives this process. Under torchrun or accelerate (WORLD_SIZE is set) nothing is started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from intervale.core.lang import say

_GRACE_SECONDS = 20.0  # for the others to end after one died
_SHOWN_LINES = 15
_FOLLOWING = (None, 0, 3, 130, 143, -15)  # ended well, because another had, by a signal, or not yet
_UNWRITTEN = 120  # the interpreter's own code for output that could not be written
PARENT = "INTERVALE_PARENT"  # a process of ours watches over this id
PYTHON = (sys.executable, "-P")  # another like this one: without -P, `-m` looks for modules in the user's current folder first
SAVING = "INTERVALE_SAVING"  # a file that is there while the first process writes a checkpoint


def started_outside() -> bool:
    """Have torchrun, accelerate or we started this process as one of several?"""
    return "WORLD_SIZE" in os.environ


def python_environment() -> dict[str, str]:
    """For `PYTHON`: it finds modules where this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _environment(rank: int, count: int, port: int, saving: Path) -> Mapping[str, str]:
    own = {
        SAVING: saving,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
        PARENT: os.getpid(),
    }
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return (
        python_environment()
        | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        | {
            "MASTER_ADDR": "127.0.0.1",
            **{key: str(value) for key, value in own.items()},
        }
    )


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM go to every process instead of ending this one. They have sessions of their own, so a Ctrl-C comes once."""

    def handle(number: int, frame: FrameType | None) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(count: int, command: Sequence[str]) -> int:
    """Run `count` processes of `command` with ranks 0 .. count - 1; the exit code of the first that failed, else 0.

    The first process speaks; of another only the last lines are shown, and only if it failed.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="intervale-") as folder:
        files = [Path(folder) / f"{rank}.log" for rank in range(count)]
        saving = Path(folder) / "saving"
        processes = []
        try:
            for rank, file in enumerate(files):
                with open(file, "wb") as log:
                    said = None if rank == 0 else log
                    environment = _environment(rank, count, port, saving)
                    processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True))
            with _passed_on(processes):
                return _watch(processes, files, saving)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _watch(processes: Sequence[subprocess.Popen[bytes]], files: Sequence[Path], saving: Path) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            return _end(processes, failed, files, saving)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]], failed: int, files: Sequence[Path], saving: Path) -> int:
    """One has ended with a code: the others get the time to do so too (and to end a save), then a SIGTERM, then the end. What is told is the cause: not one
    that ended because another had."""
    code = processes[failed].returncode
    stopped = code in (130, 143)  # by a signal that all of them got: they are saving
    deadline = time.monotonic() + _GRACE_SECONDS
    patience = deadline if stopped else time.monotonic() + 2.0
    while any(process.poll() is None for process in processes) and (time.monotonic() < patience or saving.exists()):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    while any(process.poll() is None for process in processes) and (time.monotonic() < deadline or saving.exists()):
        time.sleep(0.05)
    failed = next((rank for rank, process in enumerate(processes) if process.returncode not in _FOLLOWING), failed)
    code = processes[failed].returncode
    if not stopped and (failed or code < 0):
        ended = say(f"ended with code {code}", f"以代码 {code} 退出")
        if code < 0:
            why = say(" (the system does this when memory ends)", "（内存耗尽时系统会这样做）") if -code == signal.SIGKILL else ""
            ended = say(f"was killed by signal {-code}{why}", f"被信号 {-code} 终止{why}")
        lines = files[failed].read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_SHOWN_LINES:] if failed else []
        note = say(f"process {failed} of {len(processes)} {ended}", f"{len(processes)} 个进程中的第 {failed} 个{ended}")
        print("\n".join([note + (say(":", "：") if lines else ""), *lines]), file=sys.stderr)
    return code if code > 0 else 128 - code


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Around a save: when another process has ended, the launcher gives this one the time for it."""
    mark = Path(os.environ[SAVING]) if SAVING in os.environ else None
    if mark is None:
        yield
        return
    with contextlib.suppress(OSError):
        mark.touch()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)


def leave_at_once(code: int) -> NoReturn:
    """End a process that is one of several, or holds a GPU, once its threads have ended and its exit handlers have run, without taking the interpreter apart.

    Of several, seen once: signal 6 ("terminate called without an active exception") after all work was done. That a thread of torch.distributed
    wanted Python while it was taken apart is inferred; it could not be made to happen again.
    """
    with contextlib.suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: what threads still write is waited for
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed by whoever started this
            continue
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                os.write(2, f"{say('the output could not be written', '输出无法写入')}: {error}\n".encode())
            code = code or _UNWRITTEN
    os._exit(code)


def end_with_parent() -> None:
    """In a process that `launch` started: end when the launcher does, however it ends (Linux)."""
    parent = os.environ.get(PARENT)
    if not parent or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before this line
        sys.exit(143)
