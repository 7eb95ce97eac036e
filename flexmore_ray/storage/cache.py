"""Copies of objects on this node, for what is mapped into memory: weights, factors, tokenizers.

CACHE/remote/URI-VERSION/NAME   CACHE is FLEXMORE_CACHE, else ~/.cache/flexmore

URI and VERSION (size and time of the object) are hashes, so that an object which was replaced is fetched again and the
copy of its former self removed. All processes of a node share a copy. Nothing else is removed unless
``FLEXMORE_CACHE_GB`` sets a limit; deleting the folder is safe at any time, what is open stays open.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from flexmore_ray.errors import UsageError
from flexmore_ray.storage import AnyPath, RemotePath, StorageError

_IN_USE_SECONDS = 600  # what was asked for so lately may be about to be opened


def cache_folder() -> Path:
    """Where this node keeps stores that nobody named, and copies of objects.

    It is ``FLEXMORE_CACHE``, else ``flexmore`` in the user's cache.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLEXMORE_CACHE") or Path(home) / "flexmore")


def local_file(path: AnyPath) -> Path:
    """A file of this machine with the content of one that may be an object.

    An object is copied once for all processes of this node; it is known by its URI, size and time. Deleting the cache
    at any time is safe.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be read, or the cache cannot be written.
    """
    if isinstance(path, Path):
        return path
    return _cached(path, [path]) / path.name


def local_folder(folder: AnyPath, patterns: Sequence[str]) -> Path:
    """A folder of this machine with those files of a folder whose names match, for libraries that read a folder."""
    if isinstance(folder, Path):
        return folder
    files = [path for path in folder.iterdir() if any(fnmatch.fnmatchcase(path.name, p) for p in patterns)]
    return _cached(folder, [path for path in files if path.is_file()])


def _cached(what: RemotePath, files: Sequence[RemotePath]) -> Path:
    """The folder of the cache that holds these objects; fetches what is not there. One process of a node at a time."""
    root = cache_folder() / "remote"
    version = json.dumps([[path.name, *path.stat()] for path in files])
    key = f"{_hash(str(what))}-{_hash(version)}"
    final = root / key
    try:
        if not final.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with (root / f".{_hash(str(what))[:2]}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not final.is_dir():
                    _fetch(files, final)
                    _forget(root, final)
        os.utime(final)
    except OSError as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        raise StorageError(
            f"{what}: cannot be kept in {root}: {error.strerror or error}; make room, or set FLEXMORE_CACHE to a "
            "folder on another disk"
        ) from None
    return final


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _fetch(files: Sequence[RemotePath], final: Path) -> None:
    partial = final.with_name(f".{final.name}.tmp")  # only who holds the lock writes it
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for path in files:
            path.copy_to(partial / path.name)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _forget(root: Path, new: Path) -> None:
    """Remove other versions of what `new` holds, and what was used least lately above ``FLEXMORE_CACHE_GB``."""
    for path in root.glob(f"{new.name.partition('-')[0]}-*"):
        if path != new:
            shutil.rmtree(path, ignore_errors=True)
    limit = _cache_limit()
    entries = sorted(root.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0.0
    for path in entries:
        total += sum(file.stat().st_size for file in path.iterdir())
        if total > limit and path != new and time.time() - path.stat().st_mtime > _IN_USE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _cache_limit() -> float:
    """Bytes of the cache's copies of objects; no limit where ``FLEXMORE_CACHE_GB`` is not set."""
    text = os.environ.get("FLEXMORE_CACHE_GB", "inf")
    try:
        return float(text) * 1e9
    except ValueError:
        raise UsageError(f"FLEXMORE_CACHE_GB: a number of gigabytes is needed, got {text!r}") from None
