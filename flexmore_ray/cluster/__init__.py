"""`flexmore cluster up / status / env / down`: a Ray cluster of this machine, for its user alone, until it is ended.

The head runs in the background with token authentication, on the loopback address unless told otherwise, and keeps its
state in RocksDB: after a crash or a restart of the machine `up` finds its Serve applications and jobs, `down`
forgets them. All it needs is in ``~/.flexmore/cluster``:

    cluster.json   what runs: written when it has started, removed when it has ended
    gcs/           Ray's own state
    head.log       what ``ray start`` printed
    ray            a link to Ray's folder in the temporary folder, where sockets need short names
    logs           Ray's logs: a link while it runs, the folder itself afterwards

Processes are told by ``FLEXMORE_CLUSTER`` in their environment, or, where a process title overwrote that, by the head's
session and files in Ray's folder. A process id alone is never trusted: after a restart it may be another program's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from flexmore_ray.atomic import locked, write_file
from flexmore_ray.errors import FlexmoreError, UsageError

MARKER = "FLEXMORE_CLUSTER"
"""Variable that every process of a cluster inherits; its value is the cluster's id."""
DASHBOARD_HOST = "127.0.0.1"
_START_SECONDS, _ANSWER_SECONDS, _POLL_SECONDS = 180.0, 30.0, 0.3
_TELL_SECONDS, _SERVE_SECONDS, _END_SECONDS = 40.0, 90.0, 15.0  # for jobs, for Serve, for processes after each signal
_TOKEN_BYTES = 2**16
_SLOW = "timed out during startup"  # what Ray says after 30 s of waiting for its own raylet, on a busy machine
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_CONNECTION = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE")

Result = dict[str, Any]


def home() -> Path:
    """The folder that holds everything about this user's cluster."""
    return Path.home() / ".flexmore" / "cluster"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that was started, as ``cluster.json`` holds it."""

    id: str
    """Random, the value of `MARKER`."""
    pid: int
    """Of ``ray start``, which is also its session."""
    host: str
    """Address of the node; other machines reach it only where that is not a loopback address."""
    port: int
    """Of the head, on `host`."""
    dashboard_port: int
    """On 127.0.0.1."""
    token_file: str
    ray_folder: str
    """Ray's sessions: sockets, logs, packages of jobs. Ray lets everyone in, the folder around it nobody else."""

    @property
    def address(self) -> str:
        """As RAY_ADDRESS."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def dashboard(self) -> str:
        """URL of the dashboard, of jobs, and of Serve's interface."""
        return f"http://{DASHBOARD_HOST}:{self.dashboard_port}"

    def environment(self) -> dict[str, str]:
        """What ``flexmore``, ``ray``, ``ray job`` and ``serve`` need to find the cluster and be let in."""
        variables = {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_DASHBOARD_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_file,
        }
        if _is_loopback(self.host):  # else Ray puts the machine's own address in its place, where nobody listens
            variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        return variables

    def members(self) -> list[psutil.Process]:
        """Its processes on this machine, jobs and what they started included."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def is_up(self) -> bool:
        """Whether its head runs."""
        return any(process.pid == self.pid for process in self.members())

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            if process.environ().get(MARKER) == self.id:
                return True
            folder = str(Path(self.ray_folder).resolve()) + os.sep
            in_session = os.getsid(process.pid) == self.pid
            return in_session and any(file.path.startswith(folder) for file in process.open_files())
        except (psutil.Error, OSError):  # it ended just now, or is another user's
            return False

    def ask(self, path: str, method: str = "GET", timeout: float = _ANSWER_SECONDS) -> Any:
        """Send a request to the dashboard, with the token.

        Raises:
            OSError: it does not answer within `timeout` seconds, or refuses; also as `urllib.error.HTTPError`.
        """
        token = Path(self.token_file).read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.dashboard + path, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except ValueError as error:
            raise OSError(f"{self.dashboard}{path} did not answer in JSON") from error

    def nodes(self) -> list[Result]:
        """Its nodes that are alive, as Ray's state interface describes them. Raises OSError as `ask`."""
        nodes = self.ask("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def jobs(self) -> list[Result]:
        """Submitted jobs and connected programs that have not ended. Raises OSError as `ask`."""
        return [job for job in self.ask("/api/jobs/") if job["status"] not in _ENDED]

    def applications(self) -> Result | None:
        """Serve's applications by name; None where Serve does not run. Raises OSError as `ask`."""
        answer = self.ask("/api/serve/applications/")
        return dict(answer["applications"]) if (answer.get("controller_info") or {}).get("actor_id") else None


def read_cluster() -> Cluster | None:
    """The cluster that was started here and not ended; None where there is none. Its head may have died.

    Raises:
        FlexmoreError: ``cluster.json`` cannot be understood.
    """
    file = home() / "cluster.json"
    try:
        return Cluster(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise FlexmoreError(f"{file} is not a cluster's record ({error}); remove it once no Ray process runs") from None


def up(
    *,
    host: str = "127.0.0.1",
    port: int = 6379,
    dashboard_port: int = 8265,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    token_file: Path | None = None,
) -> tuple[Cluster, bool]:
    """Start a head in the background, and wait until it answers.

    Args:
        host: address of this machine for the other nodes of the cluster; on a loopback address there can be none.
        port: of the head.
        dashboard_port: of dashboard and jobs, on 127.0.0.1.
        num_cpus: for Ray to give out; None means all.
        num_gpus: likewise.
        token_file: holds the token; None means ``~/.ray/auth_token``. Made if missing.

    Returns:
        The cluster, and whether it goes on with the state of one whose head had died.

    Raises:
        UsageError: a number that is negative, ports that are the same, or no file for a token.
        FlexmoreError: one runs already, a port is taken, or it did not come up; then no process is left.
    """
    for option, number in (("--cpus", num_cpus), ("--gpus", num_gpus)):
        if number is not None and number < 0:
            raise UsageError(f"{option}: 0 or more is needed, got {number}")
    if port == dashboard_port:
        raise UsageError(f"--port and --dashboard-port: two different ports are needed, got {port} for both")
    with _alone():
        before = read_cluster()
        if before and before.is_up():
            raise FlexmoreError(
                f"a cluster runs already at {before.address} (process {before.pid}); "
                "see flexmore cluster status, or end it with flexmore cluster down"
            )
        if before:
            _end(before)
        _check_ports(host, port, dashboard_port)
        cluster = Cluster(
            id=before.id if before else secrets.token_hex(8),
            pid=0,
            host=host,
            port=port,
            dashboard_port=dashboard_port,
            token_file=str(_token(token_file)),
            ray_folder=before.ray_folder if before else f"{tempfile.mkdtemp(prefix='flexmore-')}/ray",
        )
        Path(cluster.ray_folder).parent.mkdir(mode=0o700, exist_ok=True)  # again, where a restart emptied /tmp
        try:
            try:
                return _start(cluster, num_cpus, num_gpus), before is not None
            except FlexmoreError as error:
                if _SLOW not in str(error):
                    raise
                print("note: Ray was too slow to start on this busy machine; trying once more", file=sys.stderr)
            return _start(cluster, num_cpus, num_gpus), before is not None
        except BaseException as error:
            if before is None:
                _forget(cluster)
            elif isinstance(error, FlexmoreError):
                way_out = "if the state it kept is to blame, flexmore cluster down forgets that"
                raise FlexmoreError(f"{error}; {way_out}") from None
            raise


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(home(), wait=False))
        except BlockingIOError:
            raise FlexmoreError("another flexmore cluster up or down is at work; wait for its end") from None
        home().chmod(0o700)
        yield


def _start(cluster: Cluster, num_cpus: int | None, num_gpus: int | None) -> Cluster:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", cluster.host, "--port", str(cluster.port), "--temp-dir", cluster.ray_folder]
    command += ["--include-dashboard", "true", "--dashboard-host", DASHBOARD_HOST]
    command += ["--dashboard-port", str(cluster.dashboard_port), "--dashboard-agent-listen-port", "0"]
    command += ["--min-worker-port", "0", "--max-worker-port", "0"]
    command += ["--ray-client-server-port", str(_free_port(cluster.host))]  # 10001 else, which another may have
    command += ["--num-cpus", str(num_cpus)] if num_cpus is not None else []
    command += ["--num-gpus", str(num_gpus)] if num_gpus is not None else []
    _link(home() / "ray", Path(cluster.ray_folder))
    _link(home() / "logs", Path(cluster.ray_folder) / "session_latest" / "logs")
    _write(cluster)  # before the head starts: if this process is killed, `down` still finds what it started
    with open(home() / "head.log", "wb") as log:
        head = subprocess.Popen(
            command,
            env=_head_environment(cluster),
            cwd=Path.home(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = dataclasses.replace(cluster, pid=head.pid)
    try:
        _write(cluster)
        _wait_until_up(cluster, head)
    except BaseException:
        _end(cluster)
        head.wait()
        raise
    return cluster


def _write(cluster: Cluster) -> None:
    text = json.dumps(dataclasses.asdict(cluster), indent=2) + "\n"
    write_file(home() / "cluster.json", lambda file: file.write(text.encode()))


def _head_environment(cluster: Cluster) -> dict[str, str]:
    """Environment of the head, from which jobs, workers and replicas have theirs."""
    inherited = {name: value for name, value in os.environ.items() if name not in _CONNECTION}
    programs = str(Path(sys.executable).parent)
    defaults = {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # serve/transport.py says why
        "RAY_JOB_STOP_WAIT_TIME_S": "30",  # between SIGTERM and SIGKILL of a job; Ray's 3 s are short
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    asked = cluster.environment()
    return {
        **defaults,
        **inherited,
        **{name: asked[name] for name in asked if name not in _CONNECTION},
        "PATH": f"{programs}{os.pathsep}{inherited.get('PATH', os.defpath)}",  # so that jobs find flexmore
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(home() / "gcs"),
        MARKER: cluster.id,
    }


def _wait_until_up(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise FlexmoreError(f"the cluster did not start: {_reason()}; see {home() / 'head.log'}")
        try:
            nodes = cluster.nodes()
        except OSError:
            nodes = []
        if nodes:
            return
        time.sleep(_POLL_SECONDS)
    raise FlexmoreError(
        f"the cluster did not answer within {_START_SECONDS:.0f} s; see {home() / 'logs'}, then run the command again"
    )


def _reason() -> str:
    """The line of the head's output that says most."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", (home() / "head.log").read_text(errors="replace"))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b|exited unexpectedly|\[type=", line)]
    return ([*lines, *errors] or ["it ended without a word"])[-1][:300]


def _check_ports(host: str, port: int, dashboard_port: int) -> None:
    for option, address, number in (("--port", host, port), ("--dashboard-port", DASHBOARD_HOST, dashboard_port)):
        if address == host and port_taken(host, 0):
            raise UsageError(f"--host: {host} is not an address of this machine; see ip address")
        if not 0 < number < 2**16:
            raise UsageError(f"{option}: 1 to 65535, got {number}")
        if reason := port_taken(address, number):
            raise FlexmoreError(f"{option}: {address}:{number} cannot be listened on ({reason}); choose another")


def port_taken(host: str, port: int) -> str | None:
    """Why a port cannot be listened on; None where it can."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        return int(found.getsockname()[1])


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _token(file: Path | None) -> Path:
    """The token's file, made if missing, readable for its owner alone."""
    file = file or Path.home() / ".ray" / "auth_token"
    file = file.expanduser().absolute()
    if file.exists() and not file.is_file():
        raise UsageError(f"--token-file: the name of a file is needed, got {file}")
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as content:
            content.write(secrets.token_hex(32))
    if file.parent == Path.home() / ".ray":
        file.parent.chmod(0o700)
    words = file.read_bytes()[:_TOKEN_BYTES].split()
    if len(words) != 1:  # of what is no token nothing is changed
        raise UsageError(f"--token-file: one word is needed in {file}, found {len(words)}; remove it, and one is made")
    file.chmod(0o600)
    return file


def _link(link: Path, target: Path) -> None:
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # logs of the last cluster
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def down(say: Callable[[str], None] = lambda text: None) -> int | None:
    """End the cluster: its jobs are told, Serve finishes its requests, then its processes end; its state is forgotten.

    Args:
        say: gets a line for each thing done.

    Returns:
        How many processes were ended at last; None where there was no cluster.

    Raises:
        FlexmoreError: a process does not end; or this is one of the cluster's own jobs.
    """
    with _alone():
        cluster = read_cluster()
        if cluster is None:
            return None
        if os.environ.get(MARKER) == cluster.id:
            raise FlexmoreError("a job cannot end the cluster that it runs on; run flexmore cluster down outside of it")
        if cluster.is_up():
            try:
                _end_jobs(cluster, say)
                _end_serve(cluster, say)
            except (OSError, KeyError, TypeError) as error:
                say(f"note: the head does not answer ({error}); its processes are ended as they are")
        ended = _end(cluster)
        _forget(cluster)
        return ended


def _end_jobs(cluster: Cluster, say: Callable[[str], None]) -> None:
    alive = {node["node_id"] for node in cluster.nodes()}
    running = [job for job in cluster.jobs() if job["driver_node_id"] in {None, *alive}]
    submitted = [job for job in running if job["type"] == "SUBMISSION"]
    outside = [job for job in running if job["type"] == "DRIVER"]
    for job in submitted:
        say(f"told to end: {job['submission_id']}: {job['entrypoint']}")
        cluster.ask(f"/api/jobs/{job['submission_id']}/stop", method="POST", timeout=_TELL_SECONDS)
    told = [process for job in outside if (process := _flexmore_process(job))]
    for process in told:
        say(f"told to end: process {process.pid}: {shlex.join(process.cmdline()[1:])}")
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _TELL_SECONDS
    ids = {job["submission_id"] for job in submitted}
    while ids and time.monotonic() < deadline:
        ids &= {job["submission_id"] for job in cluster.jobs()}
        time.sleep(_POLL_SECONDS if ids else 0)
    _, slow = psutil.wait_procs(told, timeout=max(0, deadline - time.monotonic()))
    for name in (*sorted(ids), *(f"process {process.pid}" for process in slow)):
        say(f"note: {name} has not ended in {_TELL_SECONDS:.0f} s")


def _flexmore_process(job: Result) -> psutil.Process | None:
    """The flexmore command of this machine that a job without submission is; other programs just lose the cluster."""
    try:
        process = psutil.Process(int(job["driver_info"]["pid"]))
        mine = process.uids().real == os.getuid() and " ".join(process.cmdline()) == job["entrypoint"]
        return process if mine and any(Path(word).name == "flexmore" for word in process.cmdline()[:3]) else None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None


def _end_serve(cluster: Cluster, say: Callable[[str], None]) -> None:
    applications = cluster.applications()
    if applications is None:
        return
    cluster.ask("/api/serve/applications/", method="DELETE", timeout=_SERVE_SECONDS)
    say(f"Serve is shut down ({', '.join(applications) or 'without an application'})")


def _end(cluster: Cluster) -> int:
    """End every process of the cluster on this machine: the head first, which ends most of the others itself.

    Returns:
        How many there were.

    Raises:
        FlexmoreError: some remain.
    """
    members = cluster.members()
    count = len(members)
    heads = [process for process in members if process.pid == cluster.pid]
    for chosen, sign in (
        (heads, signal.SIGTERM),
        (None, signal.SIGTERM),
        (None, signal.SIGKILL),
        (None, signal.SIGKILL),
    ):
        targets = cluster.members() if chosen is None else chosen
        for process in targets:
            _signal(process, sign)
        psutil.wait_procs(targets, timeout=_END_SECONDS)
        if not cluster.members():
            return count
    left = ", ".join(str(process.pid) for process in cluster.members())
    raise FlexmoreError(
        f"processes of the cluster do not end: {left}; see what they wait for, then run the command again"
    )


def _signal(process: psutil.Process, sign: signal.Signals) -> None:
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:  # psutil makes sure that the id was not taken over by another
        return


def _forget(cluster: Cluster) -> None:
    """Remove what the cluster kept, the record last; its logs stay."""
    logs, kept = Path(cluster.ray_folder) / "session_latest" / "logs", home() / "logs"
    if kept.is_symlink():
        kept.unlink()
        if logs.is_dir():
            shutil.move(str(logs.resolve()), kept)
    (home() / "ray").unlink(missing_ok=True)
    for folder in (Path(cluster.ray_folder).parent, home() / "gcs"):
        shutil.rmtree(folder, ignore_errors=True)
    (home() / "cluster.json").unlink()
