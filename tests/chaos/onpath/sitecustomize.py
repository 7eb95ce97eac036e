"""What every Python process on a simulated host finds on its path: slow commits, and no sight of other hosts.

Ray looks through the machine's processes for its own; those of other hosts are in other network namespaces.
"""

import contextlib
import os
import time

import psutil

_fsync, _processes = os.fsync, psutil.process_iter


def slow(handle):
    """fsync, after CHAOS_WRITE_SECONDS."""
    time.sleep(float(os.environ.get("CHAOS_WRITE_SECONDS", "0")))
    _fsync(handle)


def on_this_host(*arguments, **named):
    """psutil's process_iter, of the processes in this network namespace."""
    here = os.readlink("/proc/self/ns/net")
    for process in _processes(*arguments, **named):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/ns/net") == here:
                yield process


os.fsync = slow
psutil.process_iter = on_this_host
