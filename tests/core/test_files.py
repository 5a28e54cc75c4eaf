import errno
import os
from pathlib import Path

import pytest

from intervale.core import files
from intervale.core.errors import UserError
from intervale.core.files import inside, parse_json, staged_folder, write_atomic


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="disk is full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_staged_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_folder(tmp_path / "dst") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path / "dst") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "dst" / "whole").read_text() == "x"


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"), staged_folder(tmp_path / "dst"):
        pass
    assert (tmp_path / "dst" / "mine").read_text() == "x"


def test_a_full_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"):
        files.need_space(tmp_path / "a" / "b", 1 << 60)


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd", "a\0b", "x" * 5000, "link/x.png"])
def test_every_way_out_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root_evil").mkdir()
    (root / "link").symlink_to(tmp_path / "root_evil")
    with pytest.raises(UserError, match="line 3"):
        inside(root, name, "line 3")


def test_a_path_inside_is_found_through_dots(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.png").write_text("x")
    assert inside(tmp_path, "a/../b.png", "here") == (tmp_path / "b.png").resolve()


@pytest.mark.parametrize(
    ("text", "why"), [('{"a": 1, "a": 2}', "stands twice"), ("[NaN]", "NaN"), ("{", "not valid JSON"), ("[" * 100_000, "")]
)
def test_json_that_is_not_standard_is_refused_with_its_place(text: str, why: str) -> None:
    with pytest.raises(UserError, match=f"f.json:7.*{why}"):
        parse_json(text, "f.json:7")
