"""Machines whose clocks differ: nothing that another one is at work on is taken for abandoned."""

from __future__ import annotations

import os
import time

import pytest

from flexmore_ray.atomic import remove_abandoned


@pytest.mark.parametrize("ahead", [-7200.0, 0.0, 7200.0])
def test_only_what_is_old_by_the_clock_of_the_disk_is_removed(ahead, tmp_path, monkeypatch):
    old, new = tmp_path / "cells" / ".old.parquet.1.tmp", tmp_path / "cells" / ".new.parquet.2.tmp"
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"half")
    status = old.stat()
    os.utime(old, (status.st_atime, status.st_mtime - 3600))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    remove_abandoned(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]
