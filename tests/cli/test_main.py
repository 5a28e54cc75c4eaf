"""The end of a process that holds a GPU: at once, but with its exit code, its output and what it still writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A stand-in for torch, since there may be no GPU here; `act` is what the command does.
HOLDS_A_GPU = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
import intervale.cli.main as entry
entry._run = lambda: exec(sys.argv[1])
entry.main()
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"INTERVALE_LANG": "en"}


def end(act: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", HOLDS_A_GPU, act]
    return subprocess.run(["sh", "-c", f'exec "$@" {shell}', "sh", *words], env=BUFFERED, capture_output=True, text=True)


@pytest.mark.parametrize(("word", "code"), [("", 0), ("0", 0), ("3", 3), ("'no such thing'", 1)])
def test_code_and_output_are_kept(word: str, code: int) -> None:
    done = end(f"print('a word'); sys.exit({word})")
    assert (done.returncode, done.stdout) == (code, "a word\n")
    assert ("no such thing" in done.stderr) == (code == 1)


def test_what_threads_still_write_is_written(tmp_path: Path) -> None:
    slow = f"import time, pathlib; write = lambda name: (time.sleep(0.3), pathlib.Path({str(tmp_path)!r}, name).touch()); "
    thread = "import threading; threading.Thread(target=write, args=('thread',)).start(); "
    pool = "from concurrent.futures import ThreadPoolExecutor as Pool; Pool(1).submit(write, 'pool'); "
    # each in a scope of its own: what exec binds is not seen by a lambda's body
    done = end(f"exec({(slow + thread + pool)!r}, {{}}); sys.exit(0)")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool", "thread"]


def test_a_stdout_that_is_closed_is_no_fault() -> None:
    for shell in (">&-", ">&- 2>&-"):
        done = end("print('a word'); sys.exit(0)", shell)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_told() -> None:
    done = end("print('a word'); sys.exit(0)", "> /dev/full")
    assert done.returncode == 120
    assert "could not be written" in done.stderr
    assert end("print('a word'); sys.exit(3)", "> /dev/full").returncode == 3
