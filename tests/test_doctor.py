"""`flexmore doctor` finds faults that were planted for real: here on this machine, below on a cluster of two nodes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flexmore_ray.__main__ import main
from flexmore_ray.cluster import facts as facts_module
from flexmore_ray.cluster import read_cluster
from flexmore_ray.cluster.doctor import (
    OK,
    PROBLEM,
    WARNING,
    Finding,
    check_access,
    check_answers,
    check_clocks,
    check_gpus,
    check_mixture,
    check_shared_memory,
    check_spaces,
    check_upload,
    check_versions,
    diagnose,
)
from flexmore_ray.cluster.facts import (
    Access,
    Gpus,
    NodeFacts,
    SilentNode,
    Space,
    Upload,
    gather_access,
    gather_upload,
    node_facts,
    within,
)
from flexmore_ray.cluster.survey import gather_here
from flexmore_ray.errors import UsageError
from tests.test_cluster import flexmore
from tests.test_jobs import BIN, free_port

GIB = 2**30
WAY = Access(token_file="token")
VERSIONS = {"python": "3.11.7", "ray": "2.60.0"}
WELL = NodeFacts(
    name="a",
    versions=VERSIONS,
    spaces={"Ray's temporary folder": Space(path="/tmp", total=100 * GIB, free=50 * GIB)},
    shared_memory=Space(path="/dev/shm", total=8 * GIB, free=8 * GIB),
    memory=16 * GIB,
    open_files=65536,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in [*os.environ]:
        if name.startswith(("RAY_", "AWS_")):
            monkeypatch.delenv(name)


def but(**changes) -> NodeFacts:
    return dataclasses.replace(WELL, **changes)


def found(findings, level: str = PROBLEM) -> list[str]:
    return [str(each) for each in findings if each.level == level]


def one(findings, level: str, *words: str) -> None:
    """Exactly one finding of a level, which says these words and has a remedy."""
    (text,) = found(findings, level)
    for word in words:
        assert word in text
    assert text.count("; ") >= 1


# Faults planted on this machine


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    (tmp_path / "work").mkdir()
    here = gather_here({"--store": str(tmp_path / "store")}, "n", 20)
    findings = diagnose(WAY, [here], {"--store": str(tmp_path / "store")}, gather_upload(tmp_path / "work"), 1000)
    assert {each.check for each in findings if each.level == OK} >= {
        *("token", "ports", "nodes", "versions", "folders", "disk", "working dir", "memory")
    }
    assert not [each for each in findings if each.check in ("folders", "versions", "nodes") and each.level != OK]
    assert list((tmp_path / "store").iterdir()) == []


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folders = {"--store": str(tmp_path / "file" / "store")}
    findings = diagnose(WAY, [gather_here(folders, "n", 20)], folders)
    one([each for each in findings if each.check == "folders"], PROBLEM, "--store", "cannot be written", "Not a dir")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_full_disk(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(store)], check=True)
    try:
        (store / "full").write_bytes(b"x" * 64 * 1024)
        folders = {"--results": str(store)}
        findings = diagnose(WAY, [gather_here(folders, "n", 20)], folders)
    finally:
        subprocess.run(["umount", str(store)], check=True)
    one([each for each in findings if each.check == "folders"], PROBLEM, "No space left", "--results")
    assert any("--results" in text and "0 B free" in text for text in found(findings))


def test_a_store_by_uri_where_nobody_answers(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    folders = {"--store": "s3://bucket/store"}
    start = time.monotonic()
    findings = diagnose(WAY, [gather_here(folders, "n", 6)], folders)
    assert time.monotonic() - start < 60
    one([each for each in findings if each.check == "folders"], PROBLEM, "s3://bucket/store", "AWS_ENDPOINT_URL")


def test_a_folder_that_never_answers_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "_leave", lambda *_: time.sleep(30))
    folders = {"--store": str(tmp_path)}
    facts = node_facts("a", folders, "n", 0.2, {})
    assert facts.unwritable == {f"--store {tmp_path}": "no answer in 0 s"}


def test_a_call_in_time_gives_its_value_or_its_error():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(1))


def test_a_token_that_others_can_read(tmp_path):
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    findings = list(check_access(gather_access()))
    one([each for each in findings if each.check == "token"], PROBLEM, "0644", f"chmod 600 {token}")
    assert "secret" not in "".join(map(str, findings))
    token.chmod(0o600)
    assert not found(check_access(gather_access()))


def test_a_taken_port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setitem(facts_module.PORTS, port, "--port")
        access = gather_access()
        assert port in access.taken_ports
        one(
            check_access(dataclasses.replace(WAY, taken_ports={port: access.taken_ports[port]})),
            WARNING,
            str(port),
            "--port",
            "in use",
        )


def test_a_working_directory_that_is_too_large(tmp_path):
    for name, size in (("weights.safetensors", 3 * GIB), (".git/pack", GIB), ("left/out.bin", GIB), ("plan.yaml", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # takes no room
    (tmp_path / ".rayignore").write_text("left\n")
    upload = gather_upload(tmp_path)
    assert upload.bytes == 3 * GIB + 10 + len("left\n")
    one(check_upload(upload), PROBLEM, "weights.safetensors 3.0 GiB", ".rayignore")
    (tmp_path / ".rayignore").write_text("left\n*.safetensors\n")
    assert not found(check_upload(gather_upload(tmp_path)))
    with pytest.raises(UsageError, match="not a folder"):
        gather_upload(tmp_path / "plan.yaml")


def test_a_folder_of_too_many_files_is_not_counted_to_its_end(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / str(i)).touch()
    monkeypatch.setattr(facts_module, "_WALK_FILES", 5)
    upload = gather_upload(tmp_path)
    assert (upload.partial, upload.files) == (True, 5)
    one(check_upload(upload), WARNING, "more than 5 files")


def test_the_command_ends_with_1_where_there_is_a_problem(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["doctor", "--json", "--store", "file/store"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == sum(each["level"] == "problem" for each in result["findings"]) >= 1
    assert {*result["findings"][0]} == {"check", "level", "text", "remedy"}


# Checks of facts


def test_versions_that_differ_are_named_by_node():
    other = but(name="b", versions=VERSIONS | {"ray": "2.59.0"})
    one(check_versions([WELL, other]), PROBLEM, "ray differs: 2.59.0 on b, 2.60.0 on a", "constraints.txt")
    one(check_versions([but(versions=VERSIONS | {"torch": "missing"})]), PROBLEM, "torch is not installed")
    assert not found(check_versions([WELL, but(name="b")]))


@pytest.mark.parametrize(
    ("free", "what", "level"),
    [
        (4, "Ray's temporary folder", PROBLEM),
        (8, "Ray's temporary folder", WARNING),
        (50, "Ray's temporary folder", OK),
        (4, "cache", WARNING),
        (0, "cache", PROBLEM),
    ],
)
def test_disks_that_fill_up(free, what, level):
    node = but(spaces={what: Space(path="/x", total=100 * GIB, free=free * GIB)})
    assert [each.level for each in check_spaces([node])] == [level]


def test_shared_memory_against_the_object_store():
    small = Space(path="/dev/shm", total=64 * 2**20, free=64 * 2**20)
    one(check_shared_memory([but(shared_memory=small, object_store=GIB)]), PROBLEM, "64.0 MiB", "--shm-size")
    one(check_shared_memory([but(shared_memory=small)]), WARNING, "little room")
    assert not found(check_shared_memory([WELL, but(shared_memory=None)]))


@pytest.mark.parametrize(
    ("gpus", "given", "words"),
    [
        (None, 1, "the driver shows none"),
        (Gpus(installed=1, seen=0, driver="550.1", runtime=None), 1, "built without CUDA"),
        (Gpus(installed=1, seen=0, driver="470.1", runtime="12.8", error="no"), 1, "too old for torch's CUDA 12.8"),
        (Gpus(installed=2, seen=1, driver="550.1", runtime="12.8"), 2, "torch sees 1"),
        (Gpus(installed=1, seen=1, driver="550.1", runtime="12.8", error="out of memory"), 1, "out of memory"),
    ],
)
def test_gpus_that_cannot_be_used(gpus, given, words):
    one(check_gpus([but(gpus=gpus, given_gpus=given)]), PROBLEM, words)


def test_gpus_that_can_be_used_and_a_mixture_that_does_not_fit():
    gpus = Gpus(installed=1, seen=1, bytes=(80 * GIB,), driver="550.1", runtime="12.8")
    node = but(gpus=gpus, given_gpus=1)
    assert not found(check_gpus([node])) + found(check_mixture([node], 60 * GIB), PROBLEM)
    one(check_mixture([node], 75 * GIB), WARNING, "a GPU has 80.0 GiB")
    one(check_mixture([node], 90 * GIB), PROBLEM, "--dtype bfloat16")
    one(check_mixture([WELL], 60 * GIB), PROBLEM, "memory has 16.0 GiB")


def test_clocks_and_nodes_that_do_not_answer():
    one(check_clocks([WELL, but(name="b", clock=-300)]), PROBLEM, "b: its clock is 300 s behind", "synchronise")
    one(check_clocks([WELL, but(name="b", clock=5)]), WARNING, "5 s ahead")
    one(check_answers([WELL, SilentNode(name="b", reason="it did not answer in 90 s")]), PROBLEM, "b: it did not")
    missing = SilentNode(name="b", reason="ModuleNotFoundError: No module named 'flexmore_ray'")
    one(check_answers([WELL, missing]), PROBLEM, "install flexmore-ray there")


@pytest.mark.parametrize(
    ("access", "level", "words"),
    [
        (
            Access(address="h:1", token_mode=0o600, token_file="t", with_token=401),
            PROBLEM,
            "does not accept this token",
        ),
        (
            Access(address="h:1", token_mode=0o600, token_file="t", with_token=200, without_token=200),
            PROBLEM,
            "everyone",
        ),
        (Access(address="h:1", token_mode=0o600, token_file="t", with_token="refused"), WARNING, "does not answer"),
        (Access(address="h:1", mode="token", token_file="t", with_token=200, without_token=401), PROBLEM, "not there"),
        (Access(with_token=200), WARNING, "RAY_AUTH_TOKEN"),
    ],
)
def test_ways_to_a_cluster_that_do_not_lead_there(access, level, words):
    one(check_access(access), level, words)


def test_a_finding_is_one_line():
    assert str(Finding(check="disk", level=OK, text="much")) == "ok       disk           much"
    small = Upload(folder="/w", bytes=1, files=1, largest=(("a", 1),), limit=GIB)
    assert "\n" not in "".join(str(each) for each in diagnose(WAY, [WELL], {}, small, 1))


# Faults planted on a cluster of two nodes, of which the second has a machine of its own as far as mounts can make one

NODE = """
import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

asked = {"num_cpus": 2, "object_store_memory": 200 * 2**20, "dashboard_agent_listen_port": 0}
Node(RayParams(gcs_address=sys.argv[1], node_ip_address="127.0.0.1", **asked), head=False)
signal.pause()
"""
SKEWED = """
import time
real = time.time
time.time = lambda: real() + 300
"""


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A cluster whose second node has faults: gives the environment that finds it, and the second node's process."""
    ports = ("--port", str(free_port()), "--dashboard-port", str(free_port()))
    store, strange = tmp_path / "store", tmp_path / "strange"
    store.mkdir()
    (strange / "transformers-1.0.dist-info").mkdir(parents=True)
    (strange / "transformers-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 1.0\n"
    )
    (strange / "sitecustomize.py").write_text(SKEWED)
    worker = None
    flexmore("cluster", "up", *ports, "--cpus", "1")
    try:
        cluster = read_cluster()
        assert cluster is not None
        environment = {**os.environ, **cluster.environment(), "OMP_NUM_THREADS": "1"}
        (tmp_path / "node.py").write_text(NODE)  # ray start joins no cluster on the loopback
        mounts = f"mount -t tmpfs tmpfs {store} && mount -t tmpfs -o size=60m tmpfs /dev/shm"
        script = f"{mounts} && ulimit -n 4000 && exec {sys.executable} {tmp_path / 'node.py'} {cluster.address}"
        worker = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            env={
                **environment,
                "PYTHONPATH": str(strange),
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "8",
            },
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "worker.log").open("wb"),
        )
        deadline = time.monotonic() + 240
        while len(cluster.nodes()) < 2:
            assert worker.poll() is None, (tmp_path / "worker.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield environment, worker.pid
    finally:
        if worker:
            _end_tree(worker)
        flexmore("cluster", "down")


def _end_tree(worker: subprocess.Popen) -> None:
    tree = psutil.Process(worker.pid).children(recursive=True) if worker.poll() is None else []
    worker.kill()
    for process in tree:
        if process.is_running():
            process.kill()
    worker.wait()
    psutil.wait_procs(tree, timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="a machine within this one needs root")
def test_faults_of_a_second_node(two_nodes, tmp_path):
    environment, worker = two_nodes
    command = ["doctor", "--store", str(tmp_path / "store"), "--working-dir", str(tmp_path / "home"), "--json"]
    out = flexmore(*command, "--timeout", "150", rc=1, environment=environment)
    findings = json.loads(out.splitlines()[-1])["findings"]
    wrong = [f"{each['check']}: {each['text']}" for each in findings if each["level"] != "ok"]

    def planted(check: str, *words: str) -> bool:
        return any(line.startswith(check) and all(word in line for word in words) for line in wrong)

    assert planted("folders", "not the same folder"), wrong
    assert planted("versions", "transformers differs", "1.0 on"), wrong
    assert planted("clocks", "ahead"), wrong
    assert planted("shared memory", "60.0 MiB", "object store"), wrong
    assert planted("open files", "4,000"), wrong
    assert planted("threads", "OMP_NUM_THREADS=8"), wrong
    assert [each["text"] for each in findings if each["check"] == "nodes" and each["level"] == "ok"]
    assert list((tmp_path / "store").iterdir()) == []

    token = tmp_path / "wrong"
    token.write_text("0" * 64)
    token.chmod(0o600)
    out = flexmore(*command, rc=1, environment=environment | {"RAY_AUTH_TOKEN_PATH": str(token)})
    assert "does not accept this token" in out

    (raylet,) = [each for each in psutil.Process(worker).children() if each.name() == "raylet"]
    raylet.suspend()  # the node hangs
    start = time.monotonic()
    out = flexmore(*command, "--timeout", "20", rc=1, environment=environment)
    assert "did not answer in 20 s" in out
    assert time.monotonic() - start < 200
