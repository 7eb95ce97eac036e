"""Makes commits to disk slow: every fsync of a process that finds this on its path takes longer."""

import os
import time

_fsync = os.fsync


def slow(handle):
    """fsync, after CHAOS_WRITE_SECONDS."""
    time.sleep(float(os.environ.get("CHAOS_WRITE_SECONDS", "0")))
    _fsync(handle)


os.fsync = slow
