"""Mixture files that this user's own searches wrote: when served they may name any place, as their user named it.

One line per file, the SHA-256 of its content, in ``written-mixtures`` in the cache. A file that came from elsewhere, or
was changed since, is not among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

_NAME = "written-mixtures"


def remember(content: bytes) -> None:
    """Note that this user's command wrote a mixture file of this content."""
    with contextlib.suppress(OSError):  # a cache that cannot be written: serving the file then asks for --allow
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            os.write(handle, f"{hashlib.sha256(content).hexdigest()}\n".encode())
        finally:
            os.close(handle)


def is_known(content: bytes) -> bool:
    """Whether this user's command wrote a mixture file of this content; a note that others may write to is not read."""
    try:
        handle = os.open(_path(), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    with os.fdopen(handle) as file:
        about = os.fstat(handle)
        others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others or about.st_uid != os.geteuid():
            return False
        return hashlib.sha256(content).hexdigest() in file.read().split()


def _path() -> Path:
    from flexmore_ray.mixture import cache_folder

    return cache_folder() / _NAME
