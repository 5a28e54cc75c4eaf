"""What is made beside the encoding: by a process of its own, waited for, ended with the block, and never in the step's way."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from intervale.model.decoder import Walk
from intervale.train import ahead
from intervale.train.ahead import building, made_ahead
from intervale.train.builder import build_all

CPU = torch.device("cpu")


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def there(*paths: Path) -> bool:
    """Are these files there, and not empty, within a minute?"""
    until = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def runs(process: int) -> bool:
    """Does a process with this number run, or will it within two seconds?"""
    for _ in range(100):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return False
    return True


def writing(path: Path) -> partial[int]:
    return partial(Path.write_text, path, "made")


def test_a_process_makes_the_works_beside_the_block_where_the_users_folder_hides_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user has a file of this name')")
    monkeypatch.chdir(tmp_path)
    before, paths = children(), [tmp_path / name for name in ("one", "two")]
    with building([writing(path) for path in paths], CPU):
        assert children() - before
        assert there(*paths)
    assert children() == before


def test_it_is_waited_for_as_long_as_the_block_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 30.0)
    path, before, begun = tmp_path / "made", children(), time.monotonic()
    late = partial(subprocess.run, [sys.executable, "-c", f"import time; time.sleep(0.7); open({str(path)!r}, 'w').write('made')"])
    with building([partial(time.sleep, 600)], CPU):  # one that has only begun is no help
        pass
    assert time.monotonic() - begun < 10
    assert children() == before
    with building([writing(tmp_path / "begun"), late], CPU):
        assert there(tmp_path / "begun")
        time.sleep(0.5)  # with its start more than the second that is left
    assert path.read_text() == "made"
    assert children() == before


def test_a_process_that_takes_too_long_is_ended_with_what_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 0.1)
    before, path = children(), tmp_path / "number"
    with building([partial(subprocess.run, ["sh", "-c", f"echo $$ > {path}; exec sleep 600"])], CPU):
        assert there(path)
    assert children() == before
    assert not runs(int(path.read_text()))


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "number"
    code = (
        "import sys, time\nfrom functools import partial\nimport torch\nfrom intervale.train.ahead import building\n"
        "import subprocess\nworks = [partial(subprocess.run, ['sh', '-c', f'echo $PPID > {sys.argv[1]}; exec sleep 30'])]\n"
        "with building(works, torch.device('cpu')):\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as process:
        assert there(path)
        process.kill()
    assert not runs(int(path.read_text()))


def test_an_error_in_the_block_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE", 600.0)
    before = children()
    with pytest.raises(KeyboardInterrupt), building([partial(time.sleep, 600)], CPU):
        raise KeyboardInterrupt
    assert children() == before


def test_a_builder_that_cannot_start_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for command in (("-c", "raise SystemExit(3)"), ("-m", "intervale.no_such_module")):
        monkeypatch.setattr(ahead, "_BUILDER", command)
        with building([partial(print, "x" * 10**6)], CPU):  # more than a pipe holds
            done.append(command)
    monkeypatch.setattr(ahead, "PYTHON", ["/no/such/python"])
    with building([partial(print)], CPU):
        done.append(())
    assert len(done) == 3


def test_without_a_gpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def builds(self) -> list[object]:
            raise AssertionError("asked for")

    monkeypatch.setattr(subprocess, "Popen", None)
    with made_ahead(Walk(compiled=True, adapter=Kernels()), CPU):  # type: ignore[arg-type]
        pass


def test_one_process_of_a_machine_builds_for_all_and_each_takes_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, built = [], []

    @contextlib.contextmanager
    def building(works: list[str], device: torch.device) -> Iterator[None]:
        begun.append(device.index)
        yield

    monkeypatch.setattr(ahead, "building", building)
    monkeypatch.setattr(ahead, "build_all", lambda works, device: built.append((works, device.index)))
    walk: Any = SimpleNamespace(compiled=False, adapter=SimpleNamespace(builds=lambda: ["kernel"]))
    for name in ("cuda", "cuda:0", "cuda:1"):  # one process alone; the first and the second of a machine
        with made_ahead(walk, torch.device(name)):
            assert not built or built[-1][1] != torch.device(name).index
    assert begun == [None, 0]
    assert built == [(["kernel"], None), (["kernel"], 0), (["kernel"], 1)]


def test_all_works_are_made_before_it_returns_and_one_that_fails_spoils_no_other() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    done: list[str] = []
    names = [str(number) for number in range(9)]
    build_all([broken, *(partial(done.append, name) for name in names)], CPU)
    assert sorted(done) == names
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("build")]
