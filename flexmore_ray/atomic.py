"""Files that are whole or not there, and folders with one writer, on this machine or in an object store.

On this machine: a temporary name, fsync, rename, fsync of the folder; a lock that ends with its process. In a store:
one object sent whole (`flexmore_ray.storage`); a lease (`flexmore_ray.storage.lease`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from flexmore_ray.errors import UsageError
from flexmore_ray.storage import AnyPath, RemotePath, write_object
from flexmore_ray.storage.lease import lease

_ABANDONED_SECONDS = 600  # a temporary file that nobody wrote to for this long was left by a killed run


def write_file(path: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears under its name only when all of it is on disk.

    A process that is killed leaves at most a hidden temporary file, ``.NAME.HEX.tmp``.

    Args:
        path: the file; one that is there is replaced.
        write: writes the content into the open file.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    if isinstance(path, RemotePath):
        write_object(path, write)
        return
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
def alone(folder: AnyPath, what: str) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process however it ends; in a store a little later, see `lease`.

    Args:
        folder: made if missing.
        what: what else would be running, such as "grid".

    Raises:
        UsageError: another process holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise UsageError(f"another {what} is running on {folder}; wait, or choose another folder") from None
        yield


@contextlib.contextmanager
def locked(folder: AnyPath, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder's lock.

    Args:
        folder: made if missing.
        wait: whether to wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        UsageError: the folder cannot be written.
        StorageError: the store of the folder does not answer.
    """
    if isinstance(folder, RemotePath):
        with lease(folder, wait=wait):
            yield
        return
    with _lock_file(folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lock_file(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "w")  # closed by the caller
    except OSError as error:
        raise UsageError(f"{folder}: not a folder that can be written: {error.strerror}; choose another") from None


def remove_abandoned(folder: AnyPath) -> None:
    """Remove temporary files that killed runs left in a folder and its folders; an object store has none."""
    if isinstance(folder, RemotePath):
        return
    found = [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]
    now = _now(folder) if found else 0.0
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # another process may finish or remove its own
            if now - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _now(folder: Path) -> float:
    """The time by the clock that gives a folder's files theirs: that of a file server may differ from this machine's,
    and another machine's file that is being written must not look abandoned."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime
