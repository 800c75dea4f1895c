"""Files that are whole or absent: atomic writes, content hashes, the cache folder. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.errors import StorageError, VeneerError, nearest


def cache_dir() -> Path:
    """Where converted models and rendered data are kept: ``$VENEER_CACHE``, else the user's cache folder."""
    if "VENEER_CACHE" in os.environ:
        return Path(os.environ["VENEER_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "veneer"


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def absent_folder(folder: Path) -> str:
    """What to say of a folder that does not exist: also the one most like it, where its path leaves what exists."""
    said = f"the folder '{folder}' does not exist either"
    with contextlib.suppress(OSError):  # a folder on the way that may not be entered
        missing = folder
        while not missing.parent.is_dir():
            missing = missing.parent
        there = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
        if close := nearest(missing.name, there, 1):
            return f"{said}; did you mean '{missing.parent / close[0]}'?"
    return said


_STORAGE_PROBLEMS = (
    ((errno.ENOSPC, errno.EDQUOT), "the disk is full", "free some space, or write to another folder"),
    ((errno.EFBIG,), "a file grew larger than this system allows", "raise the limit (ulimit -f), or write elsewhere"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "no permission", "choose a place that you may read and write"),
    ((errno.ENOTDIR, errno.EEXIST), "a file is in the way of a folder", "move the file, or choose another folder"),
)
_NUMBER_IN_TEXT = re.compile(r"os error (\d+)\b")


def storage_problem(error: BaseException, path: str | Path | None = None) -> StorageError | None:
    """What the system's refusal to read or write means and how to mend it; None for any other error.

    safetensors and torch report a refusal as an error of their own kind with the number or the words in its text.
    """
    number: int | None
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    elif found := _NUMBER_IN_TEXT.search(str(error)):
        number = int(found[1])
    else:
        known = [number for numbers, _, _ in _STORAGE_PROBLEMS for number in numbers]
        number = next((number for number in known if os.strerror(number) in str(error)), None)
    where = path if path is not None else getattr(error, "filename", None)
    for numbers, what, fix in _STORAGE_PROBLEMS:
        if number in numbers:
            return StorageError(what, where=None if where is None else str(where), fix=fix)
    return None


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turns the system's refusals to write ``path`` into a :class:`StorageError` that says how to mend them."""
    try:
        yield
    except VeneerError:
        raise
    except Exception as error:
        if problem := storage_problem(error, path):
            raise problem from error
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it replaces ``path`` in one step, on failure it is removed.

    Raises:
        StorageError: when the disk is full or the folder is not writable.
    """
    target = Path(path)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``; on success it becomes ``path``, on failure it is removed.

    An existing ``path`` is replaced only after the new folder is whole.

    Raises:
        StorageError: when the disk is full or the parent folder is not writable.
    """
    target = Path(path)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
                os.replace(target, old / "old")
                os.replace(temporary, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON with sorted keys and a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
