"""Files that are complete or absent, and paths that stay where they belong.

Every write goes aside first, is flushed to the disk, then renamed, so a crash or a full disk leaves the old state. A path
that comes from data is joined here and nowhere else. Cost: one fsync a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError

MIB = 1 << 20
SLACK = 16 * MIB  # room for the small files beside the weights, and for whatever else writes meanwhile


def _number(error: BaseException) -> int | None:
    """The system's number of an error. safetensors wraps it in a type of its own, so the text is the only thing left to look at."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    own: int | None = getattr(error, "errno", None)
    return int(found[1]) if own is None and found else own


def _is_full_disk(error: BaseException) -> bool:
    return _number(error) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission while writing `target` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_full_disk(error):
            raise UserError(
                f"{target}: the disk is full; what was being written was removed, earlier files are untouched",
                f"free some space under {target.parent} and run the same command again",
            ) from error
        number = _number(error)
        if isinstance(error, PermissionError) or number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{target}: not allowed to write here", "choose another output folder, or change its permissions") from error
        if isinstance(error, OSError) or number is not None or (isinstance(error, ValueError) and "null byte" in str(error)):
            raise UserError(
                f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}", "choose another output folder"
            ) from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk (a folder, so that a rename in it survives a crash)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file: it has its old content or its new content, never a part.

    Raises: UserError when the disk is full or the place is not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name[:60]}.{os.getpid()}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of readable JSON (UTF-8, two spaces)."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def refuse_existing(dst: Path) -> None:
    """Raise a UserError when `dst` holds something: nothing is ever overwritten silently."""
    if dst.is_symlink() or dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise UserError(f"{dst} already exists and is not empty", "choose another place, or remove this one first")


def set_aside(folder: Path) -> Path:
    """Rename a folder to NAME.old-1 (or the next free number), so that a fresh start loses nothing; returns the new place."""
    folder = Path(os.path.abspath(folder))
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, aside)
    return aside


@contextlib.contextmanager
def staged_folder(dst: Path) -> Iterator[Path]:
    """Build a folder aside and rename it to `dst` at the end; any exception removes what was built.

    Yields the folder to write into. Raises: UserError when `dst` holds something already, or on a full disk.
    """
    dst = Path(os.path.abspath(dst))
    aside = dst.with_name(f".{dst.name[:60]}.{os.getpid()}.partial")
    with disk_errors(dst):
        refuse_existing(dst)
        if dst.is_mount():
            raise UserError(
                f"{dst} is a mount point, which cannot be replaced by a finished folder",
                f"write into a folder below it, for example {dst / 'out'}",
            )
        try:
            dst.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            for path in sorted(aside.rglob("*")):
                fsync_path(path)
            fsync_path(aside)
            if dst.is_dir():
                dst.rmdir()
            os.replace(aside, dst)
            fsync_path(dst.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def need_space(folder: Path, size: int) -> None:
    """Raise a UserError when `size` bytes (and SLACK) do not fit on the disk of `folder`."""
    with disk_errors(folder):
        place = Path(os.path.abspath(folder))
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
    needed = size + SLACK
    if free < needed:
        raise UserError(
            f"{folder}: the disk is full: {needed / MIB:,.0f} MiB are needed ({SLACK // MIB} of them to spare) and {free / MIB:,.0f} MiB are free; "
            "nothing was written",
            f"free some space under {place}, or write elsewhere",
        )


def parse_json(text: str, where: str) -> Any:
    """JSON as the standard has it: no NaN, no duplicate keys. `where` (file, line) goes into the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}", "correct the line, or write the file again with a JSON library") from error


def read_text(path: Path) -> str:
    """A UTF-8 file as text, without a byte-order mark. Raises: UserError when absent, unreadable or not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from error


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises: UserError with the file's name."""
    return parse_json(read_text(path), str(path))


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object of our own making that has these keys. Raises: UserError when it is damaged."""
    value = read_json(path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise UserError(
            f"{path}: damaged: it should be a JSON object with {', '.join(keys) or 'its keys'}", "restore it, or make the folder again"
        )
    return value


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; the lock goes with the process, however it ends.

    Raises: UserError when another process holds it. The lock lies beside the folder, which may not exist yet.
    """
    path = Path(os.path.abspath(folder))
    path = path.with_name(f".{path.name[:60]}.lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(handle).st_ino == os.stat(path).st_ino  # not, if its last holder removed it in between
        except OSError:
            mine = False
        if not mine:
            raise UserError(f"{folder} is being written by another process", "wait for it, stop it, or choose another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a disk that turned read-only keeps the file; nobody holds it any more
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, relative: str, where: str) -> Path:
    """The file `relative` below `root`, refusing every way out of it.

    Raises: UserError for an absolute path, `..`, a NUL, or a symbolic link that leads out of `root`.
    """
    fix = f"put the file below {root} and name it by its path from there"
    try:
        joined = root / relative
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            joined.lstat()  # a name that is too long, or a loop of links, is told here
        resolved = joined.resolve()
        safe = not Path(relative).is_absolute() and resolved.is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: {relative[:200]!r} is not a usable path: {error}", fix) from error
    if "\\" in relative and not joined.exists():
        raise UserError(f"{where}: {relative[:200]!r} uses backslashes", "write the path with forward slashes")
    if not safe:
        kind = "a symbolic link that leads out of" if joined.is_symlink() else "a path out of"
        raise UserError(f"{where}: {relative[:200]!r} is {kind} {root}", fix)
    return resolved
