"""Processes that are started together end together, with the code and the words of the one that failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intervale.train import launch as starting
from intervale.train.launch import launch

FAILS = "import os, sys, time\nif os.environ['RANK'] == '1':\n    print('the reason', file=sys.stderr)\n    sys.exit(3)\ntime.sleep(60)"


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    code = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + ' ' + os.environ['MASTER_PORT'])"
    assert launch(3, [sys.executable, "-c", code]) == 0
    told = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(told) == 1
    assert told.pop().startswith("3 ")


def test_one_that_dies_ends_the_others_and_its_words_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert launch(2, [sys.executable, "-c", FAILS]) == 3
    assert time.monotonic() - begun < 15
    said = capsys.readouterr().err
    assert "process 1 of 2 ended with code 3" in said
    assert "the reason" in said


def test_the_cause_is_told_when_another_noticed_first(capsys: pytest.CaptureFixture[str]) -> None:
    """The first process loses its connection and ends before the one that made it break."""
    code = (
        "import os, sys, time\nif os.environ['RANK'] == '0':\n    sys.exit(3)\n"
        "time.sleep(1)\nprint('the reason', file=sys.stderr)\nsys.exit(1)"
    )
    assert launch(2, [sys.executable, "-c", code]) == 1
    said = capsys.readouterr().err
    assert "process 1 of 2 ended with code 1:\nthe reason" in said


def test_one_that_is_killed_gives_its_signal_as_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os, signal, time\nif os.environ['RANK'] == '0':\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert launch(2, [sys.executable, "-c", code]) == 128 + signal.SIGKILL
    assert "killed by signal 9" in capsys.readouterr().err


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    child = (
        "import os, time\nfrom intervale.train.launch import end_with_parent\nend_with_parent()\n"
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    code = f"from intervale.train.launch import launch\nlaunch(2, ['{sys.executable}', '-c', '''{child}'''])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        for _ in range(300):
            if len([path for path in tmp_path.iterdir() if path.read_text()]) == 2:
                break
            time.sleep(0.05)
        process.kill()
    ids = [int((tmp_path / rank).read_text()) for rank in "01"]
    for _ in range(100):
        alive = [name for name in ids if _runs(name)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0]


def test_one_of_several_ends_after_its_exit_handlers_and_before_the_interpreter_is_taken_apart() -> None:
    code = (
        "import atexit, sys\nfrom intervale.cli.main import main\n"
        "class Torn:\n    def __del__(self): print('torn')\n"
        "kept = Torn()\natexit.register(print, 'handled')\nsys.argv = ['intervale', *sys.argv[1:]]\nmain()"
    )

    def ended(*words: str, **environment: str) -> tuple[int, bool, bool]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=os.environ | environment, capture_output=True, text=True, check=False
        )
        return done.returncode, "handled" in done.stdout, "torn" in done.stdout

    assert ended("--version") == (0, True, True)
    assert ended("--version", WORLD_SIZE="2") == (0, True, False)
    assert ended("info", "/nowhere", WORLD_SIZE="2") == (1, True, False)
    assert ended("--no-such-option", WORLD_SIZE="2") == (2, True, False)


def test_none_is_ended_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the others have ended: by an error, or by a second Ctrl-C."""
    monkeypatch.setattr(starting, "_GRACE_SECONDS", 0.5)
    for number, code in enumerate((3, 130)):
        begun, written = tmp_path / f"{number}-begun", tmp_path / f"{number}-written"
        child = (
            "import os, sys, time\nfrom pathlib import Path\nfrom intervale.train.saving import Saver\n"
            f"begun = Path(r'{begun}')\n"
            "if os.environ['RANK'] == '1':\n"
            f"    while not begun.exists():\n        time.sleep(0.05)\n    sys.exit({code})\n"
            f"def write():\n    begun.touch()\n    time.sleep(5)\n    Path(r'{written}').touch()\n"
            "with Saver() as saver:\n    saver.begin(write)\n"
        )
        assert launch(2, [sys.executable, "-c", child]) == code
        assert written.exists()


def test_a_file_in_the_users_folder_hides_no_module(tmp_path: Path) -> None:
    """`-m` would look for typer and torch there first."""
    for name in ("typer", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    (tmp_path / "r.yaml").write_text("model: nano\ndata: {train: /nowhere.jsonl}\nparallel: {processes: 2, strategy: ddp}\n")
    command = [sys.executable, "-P", "-m", "intervale", "train", "r.yaml"]  # as the installed command: its folder is no place of modules
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"INTERVALE_DEVICE": "cpu"}, check=False)
    assert "/nowhere.jsonl: cannot be read" in done.stderr
    assert done.returncode == 1
