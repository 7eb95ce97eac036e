"""`flexmore cluster`: what it starts, keeps, ends, and leaves alone. Those that start Ray run with `make slow`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flexmore_ray import cluster as cluster_module
from flexmore_ray.__main__ import main
from flexmore_ray.cluster import MARKER, Cluster, _token, down, home, read_cluster, up
from flexmore_ray.errors import FlexmoreError, UsageError
from tests.test_jobs import BIN, free_port


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in [*os.environ]:
        if name.startswith("RAY_") or name == MARKER:
            monkeypatch.delenv(name)


def record(tmp_path: Path, pid: int = 0) -> Cluster:
    """A cluster that is said to run, with nothing of Ray."""
    home().mkdir(parents=True)
    (home() / "gcs").mkdir()
    folder = tmp_path / "private" / "ray"
    (folder / "session_1" / "logs").mkdir(parents=True)
    (folder / "session_1" / "logs" / "raylet.out").write_text("words")
    (folder / "session_latest").symlink_to(folder / "session_1")
    (home() / "logs").symlink_to(folder / "session_latest" / "logs")
    token = _token(None)
    cluster = Cluster(
        id=tmp_path.name,
        pid=pid,
        host="127.0.0.1",
        port=free_port(),
        dashboard_port=free_port(),
        token_file=str(token),
        ray_folder=str(folder),
    )
    cluster_module._write(cluster)
    return cluster


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    """Another program, whose process id a record may hold after a restart of the machine."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_a_process_id_that_another_program_has_now_is_no_head_and_is_left_alone(tmp_path, sleeper):
    cluster = record(tmp_path, sleeper.pid)
    assert not cluster.is_up()
    assert down() == 0
    assert sleeper.poll() is None
    assert read_cluster() is None


def test_what_a_dead_head_left_is_ended_and_nothing_else(tmp_path, sleeper):
    environment = os.environ | {MARKER: tmp_path.name}
    orphan = subprocess.Popen(["sh", "-c", "sleep 61 & wait"], env=environment, start_new_session=True)
    stubborn = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(60)",
    ]
    deaf = subprocess.Popen(stubborn, env=environment, stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    cluster = record(tmp_path, sleeper.pid)
    cluster_module._END_SECONDS, before = 0.5, cluster_module._END_SECONDS
    try:
        assert down() == 3
    finally:
        cluster_module._END_SECONDS = before
    assert not cluster.members()
    orphan.wait(timeout=5)
    deaf.wait(timeout=5)
    assert sleeper.poll() is None


def test_down_keeps_the_logs_and_forgets_the_rest_and_may_be_repeated(tmp_path, capsys):
    cluster = record(tmp_path)
    assert main(["cluster", "down"]) == 0
    assert (home() / "logs" / "raylet.out").read_text() == "words"
    assert not (home() / "logs").is_symlink()
    assert not Path(cluster.ray_folder).parent.exists()
    assert not (home() / "gcs").exists()
    assert "none left" in capsys.readouterr().out
    assert main(["cluster", "down"]) == 0
    assert "no cluster runs" in capsys.readouterr().out


def test_a_job_cannot_end_the_cluster_that_it_runs_on(tmp_path, monkeypatch):
    record(tmp_path)
    monkeypatch.setenv(MARKER, tmp_path.name)
    with pytest.raises(FlexmoreError, match="outside of it"):
        down()
    assert read_cluster()


def test_status_of_none_and_of_a_dead_one_is_1(tmp_path, capsys):
    assert main(["cluster", "status", "--json"]) == 1
    shown = capsys.readouterr().out
    assert "flexmore cluster up" in shown
    assert json.loads(shown.splitlines()[-1])["running"] is False
    record(tmp_path)
    assert main(["cluster", "status"]) == 1
    assert "has died" in capsys.readouterr().out


def test_a_record_that_cannot_be_understood_is_named(tmp_path):
    home().mkdir(parents=True)
    (home() / "cluster.json").write_text('{"pid": 1}')
    with pytest.raises(FlexmoreError, match=r"cluster\.json is not a cluster's record"):
        read_cluster()


@pytest.mark.parametrize("option", ["port", "dashboard_port"])
def test_a_taken_port_is_refused_with_its_option(option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"port": free_port(), "dashboard_port": free_port(), option: taken.getsockname()[1]}
        with pytest.raises(FlexmoreError, match=rf"--{option.replace('_', '-')}: 127\.0\.0\.1:\d+ .*choose another"):
            up(**ports)
    assert read_cluster() is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", ""])
def test_a_host_that_other_nodes_cannot_use_is_bad_use(host, capsys):
    assert main(["cluster", "up", "--host", host]) == 2
    assert "--host" in capsys.readouterr().err


def test_the_token_is_its_owners_alone_and_is_kept(tmp_path):
    file = _token(None)
    assert file == tmp_path / "home" / ".ray" / "auth_token"
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    secret = file.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", secret)
    file.chmod(0o644)
    file.parent.chmod(0o755)
    assert _token(None).read_text() == secret
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(UsageError, match=r"one word is needed in .*/empty, found 0; remove it"):
        _token(empty)


def test_env_is_what_a_shell_evaluates(tmp_path, capsys, monkeypatch):
    cluster = record(tmp_path)
    assert main(["cluster", "env"]) == 1
    assert "has died" in capsys.readouterr().err
    monkeypatch.setattr(Cluster, "is_up", lambda cluster: True)
    assert main(["cluster", "env"]) == 0
    script = (
        capsys.readouterr().out + 'echo "$RAY_ADDRESS $RAY_API_SERVER_ADDRESS $RAY_DASHBOARD_ADDRESS $RAY_AUTH_MODE"'
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cluster.address, cluster.dashboard, cluster.dashboard, "token"]


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "_free_port", lambda host: 1)  # which Ray refuses
    with pytest.raises(FlexmoreError, match=r"did not start: .*must be an integer between 1024.*head\.log"):
        up(port=free_port(), dashboard_port=free_port(), num_cpus=1)
    assert read_cluster() is None
    assert not (home() / "gcs").exists()
    assert not _with_home(tmp_path)


def _with_home(tmp_path: Path) -> list[psutil.Process]:
    """Processes of this test but itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("HOME") == str(tmp_path / "home"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def flexmore(*arguments: str, rc: int = 0, environment: dict[str, str] | None = None) -> str:
    """Run a command in a process of its own; returns what it printed."""
    done = subprocess.run(
        [str(BIN / "flexmore"), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment or {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A cluster, as the options of its ports."""
    ports = ("--port", str(free_port()), "--dashboard-port", str(free_port()))
    try:
        yield ports
    finally:
        flexmore("cluster", "down")
        assert not _with_home(tmp_path)


@pytest.mark.slow
def test_a_cluster_from_up_to_down_with_a_head_that_dies_in_between(running, tmp_path):
    out = json.loads(flexmore("cluster", "up", *running, "--cpus", "2", "--json").splitlines()[-1])
    cluster = read_cluster()
    assert cluster is not None
    assert out["environment"] == cluster.environment()
    assert out["nodes"][0]["resources"]["CPU"]["total"] == 2
    assert "runs already" in flexmore("cluster", "up", *running, rc=1)
    _is_private(cluster)

    client = {**os.environ, **cluster.environment()}
    submit = [str(BIN / "ray"), "job", "submit"]
    params = [*submit, "--", "flexmore", "params", "zoo://nano"]
    done = subprocess.run(params, env=client, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total 4," in done.stdout
    marked = tmp_path / "told"
    script = f"trap 'echo told > {marked}; exit' TERM; sleep 500 & wait"
    subprocess.run([*submit, "--no-wait", "--", "sh", "-c", script], env=client, check=True, timeout=300)
    _until(lambda: any("sleep 500" in " ".join(each.cmdline()) for each in cluster.members()))
    shown = flexmore("cluster", "status")
    assert "sleep 500" in shown

    os.kill(cluster.pid, signal.SIGKILL)
    _until(lambda: not cluster.is_up())
    assert "has died" in flexmore("cluster", "status", rc=1)
    again = json.loads(flexmore("cluster", "up", *running, "--cpus", "2", "--json").splitlines()[-1])
    assert again["resumed"]
    (lost,) = again["lost_jobs"]
    assert "sleep 500" in lost["entrypoint"]
    assert lost["options"] == ""  # it was submitted without a working directory
    cluster = read_cluster()
    assert cluster is not None
    assert not any("sleep 500" in " ".join(each.cmdline()) for each in cluster.members())

    marked.unlink(missing_ok=True)
    subprocess.run([*submit, "--no-wait", "--", "sh", "-c", script], env=client, check=True, timeout=300)
    _until(lambda: any("sleep 500" in " ".join(each.cmdline()) for each in cluster.members()))
    shown = flexmore("cluster", "down")
    assert "told to end" in shown
    assert marked.read_text() == "told\n"
    assert not cluster.members()
    assert (home() / "logs" / "gcs_server.out").is_file()


def _is_private(cluster: Cluster) -> None:
    """Every port on the loopback address, and no answer without the token."""
    listening = [
        each.laddr.ip
        for process in cluster.members()
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 4
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/version", timeout=10)
    assert stat.S_IMODE(Path(cluster.token_file).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(cluster.ray_folder).parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(home().stat().st_mode) == 0o700


def _until(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
