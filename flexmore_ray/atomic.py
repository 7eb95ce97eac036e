"""Files that are whole or not there: a temporary name, fsync, rename, fsync of the folder. Folders with one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from flexmore_ray.errors import UsageError

_ABANDONED_SECONDS = 600  # a temporary file that nobody wrote to for this long was left by a killed run


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears under its name only when all of it is on disk.

    A process that is killed leaves at most a hidden temporary file, ``.NAME.HEX.tmp``.

    Args:
        path: the file; one that is there is replaced.
        write: writes the content into the open file.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process however it ends.

    Args:
        folder: made if missing.
        what: what else would be running, such as "grid".

    Raises:
        UsageError: another process holds it, or the folder cannot be written.
    """
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another {what} is running on {folder}; wait, or choose another folder") from None
        yield


def _lock_file(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "w")  # closed by the caller
    except OSError as error:
        raise UsageError(f"{folder}: not a folder that can be written: {error.strerror}; choose another") from None


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files that killed runs left in a folder and its folders."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        with contextlib.suppress(FileNotFoundError):  # another process may finish or remove its own
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
