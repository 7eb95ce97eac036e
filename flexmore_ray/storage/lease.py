"""A folder of an object store with one writer: a lease, renewed for as long as its owner lives.

FOLDER/.lock/OWNER.json   one object per owner, written again every `RENEW_SECONDS`

Who wants the folder writes an object of its own and then lists the others. Any other that is not `STALE_SECONDS` older
than its own, by the store's clock, has the folder, and it withdraws. As a store shows an object to everyone from the
moment that it is written, of two that come together at least one sees the other.

What it promises: no two owners that can renew their leases have a folder. What it does not: that an owner who was cut
off from the store, or stopped, for `STALE_SECONDS` knows that another took the folder over. Then both may compute the
same; since every commit is one whole object whose name follows from its content, that wastes work and loses nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from flexmore_ray.storage import RemotePath, StorageError

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0
_TRIES = 3  # of those that came together with another, before the folder counts as taken
_PAUSE_SECONDS = 1.0


@contextlib.contextmanager
def lease(folder: RemotePath, *, wait: bool) -> Iterator[None]:
    """Have a folder for as long as the block runs.

    Args:
        folder: the folder.
        wait: whether to wait for another owner to end.

    Raises:
        BlockingIOError: another owner has it, and `wait` is false.
        StorageError: the store does not answer.
    """
    own = folder / ".lock" / f"{uuid.uuid4().hex}.json"
    tries = 1
    while not _take(own):
        if not wait and tries >= _TRIES:
            raise BlockingIOError(f"{folder}: another process has it")
        time.sleep(random.uniform(0.2, 1) * _PAUSE_SECONDS)
        tries += 1
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(own, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(StorageError):  # a lease that cannot be given back now runs out
            own.unlink(missing_ok=True)


def _take(own: RemotePath) -> bool:
    """Write the own lease and look for others; withdraws it where another one is alive."""
    own.write_bytes(_owner())
    leases = {path: path.stat().st_mtime for path in own.parent.glob("*.json")}
    now = leases.get(own, 0)
    others = [path for path in leases if path != own]
    alive = [path for path in others if now - leases[path] <= STALE_SECONDS and not _has_ended(path)]
    if alive:
        own.unlink(missing_ok=True)
        return False
    for path in others:
        path.unlink(missing_ok=True)
    return True


def _renew(own: RemotePath, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(StorageError):  # tried again by the next round; the work goes on meanwhile
            own.write_bytes(_owner())


@functools.cache
def _machine() -> str:
    """This machine since its last start, and its name, as containers share the former."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def _owner() -> bytes:
    return json.dumps({"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}).encode()


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the machine did; None if it does not run."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]


def _has_ended(path: RemotePath) -> bool:
    """Whether the owner of a lease was a process of this machine that is no more: it need not run out."""
    try:
        owner = json.loads(path.read_bytes())
        return owner["machine"] == _machine() and _started(int(owner["pid"])) != owner["started"]
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        return False
