"""Which cluster a command runs on, what it leaves behind, and where actors find room."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.placement import Needs, check_room
from flexmore_ray.runtime import cluster

OWN_CLUSTER = """
import os
import ray
from flexmore_ray.runtime import cluster, nodes

with cluster(num_cpus=1):
    (node,) = nodes()
    assert node["Resources"]["CPU"] == 1
    assert node["NodeManagerAddress"] == "127.0.0.1"
    with cluster(num_cpus=5):  # inside, it is the same one, and stays
        assert nodes()[0]["NodeID"] == node["NodeID"]
    assert ray.is_initialized()
assert not ray.is_initialized()
assert "RAY_AUTH_MODE" not in os.environ
"""


def test_a_cluster_of_its_own_ends_with_the_block_and_leaves_no_trace(tmp_path):
    """In a process of its own: Ray keeps the way of authentication that a process first used."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER], env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    token = Path(tmp_path) / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_an_address_where_nothing_answers_is_refused_soon(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(FlexmoreError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*unset RAY_ADDRESS"), cluster():
        pass
    assert time.monotonic() - start < 20


NODE = {"Resources": {"CPU": 8, "GPU": 2, "site": 1}, "Labels": {"owner": "acme"}}


@pytest.mark.parametrize(
    ("needs", "room"),
    [
        (Needs(num_cpus=1), 8),
        (Needs(num_cpus=3), 2),
        (Needs(num_cpus=1, num_gpus=0.5), 4),
        (Needs(num_gpus=3), 0),
        (Needs(num_cpus=1, pin="site"), 8),
        (Needs(num_cpus=1, pin="owner=acme"), 8),
        (Needs(num_cpus=1, pin="owner=other"), 0),
        (Needs(), float("inf")),
    ],
)
def test_room_on_a_node(needs, room):
    assert needs.capacity(NODE) == room
    if not room:
        with pytest.raises(
            UsageError, match=r"worker: its actor asks for .*the cluster has 1 node: CPU 8 GPU 2 site 1"
        ):
            check_room({"worker": needs}, [NODE])
