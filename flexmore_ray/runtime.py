"""The Ray cluster that a command runs on: the one it was sent to, or its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.state import state
from ray.job_config import JobConfig

from flexmore_ray.errors import FlexmoreError

_OBJECT_STORE = 512 * 2**20  # bytes; factors of large experts cross in pieces, results are small
_ANSWER_SECONDS = 5.0
_OWN_TOKEN = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_LOOK_SECONDS = 1.0  # how often an actor looks whether its node drains


@contextlib.contextmanager
def cluster(num_cpus: int | None = None, runs: str | None = None) -> Iterator[None]:
    """Be connected to Ray for as long as the block runs.

    Inside a program that has called ``ray.init`` this does nothing. Where ``RAY_ADDRESS`` is set (as in
    every ``ray job submit``) it connects there. Otherwise it starts a cluster of this machine alone,
    reachable from this machine alone, and shuts down that one at the end.

    Args:
        num_cpus: CPUs of a cluster that is started; None means all of this machine.
        runs: what runs here, in words: the job's name in Ray's dashboard, unless it was submitted under another.

    Raises:
        FlexmoreError: no cluster answers at ``RAY_ADDRESS``.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if runs:
        quiet["job_config"] = JobConfig(metadata={"job_name": runs})
    before, on_terminate = os.environ.get("RAY_AUTH_MODE"), signal.getsignal(signal.SIGTERM)
    try:
        if on_running_cluster():
            _connect(os.environ["RAY_ADDRESS"], quiet)
        else:
            _start(num_cpus, quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # which ray.init puts its own in place of
        yield
    finally:
        ray.shutdown()
        if before is None:  # ray.init leaves it behind, and a later connection elsewhere would ask for a token
            os.environ.pop("RAY_AUTH_MODE", None)


def _connect(address: str, quiet: dict[str, Any]) -> None:
    host, colon, port = address.rpartition(":")
    try:
        plain = bool(colon) and "/" not in address and port.isdigit()
        if plain:  # try for some seconds, where Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        local = plain and host in ("127.0.0.1", "localhost") and not _listens_outside(int(port))
        with _loopback() if local else contextlib.nullcontext():
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise FlexmoreError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({' '.join(str(error).split())[:200]}); "
            "start one with ray start --head, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def _listens_outside(port: int) -> bool:
    """Whether a port of this machine answers at its own address too, not on the loopback alone."""
    try:
        socket.create_connection((ray.util.get_node_ip_address(), port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _start(num_cpus: int | None, quiet: dict[str, Any]) -> None:
    try:
        _make_token(Path.home() / ".ray" / "auth_token")
        with _loopback():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=_session_folder(),
                **quiet,
            )
    except Exception as error:  # Ray raises plain ones, such as of a start that takes too long
        reason = " ".join(str(error).split())[:200]
        raise FlexmoreError(f"Ray did not start on this machine ({reason}); run the command again") from error


def _make_token(file: Path) -> None:
    """Have the token that Ray asks for, readable for its owner alone: Ray itself would make one that all can read."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.keys() & _OWN_TOKEN:
        return
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not file.exists():
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as content:
            content.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # of another process that starts now; both use that one
            os.link(fresh, file)
        fresh.unlink()
    file.chmod(0o600)


def _session_folder() -> str | None:
    """Where Ray keeps logs, sockets and code: all users may write to what it makes, so in a folder that none enters.

    Returns:
        The folder; None where RAY_TMPDIR names one.

    Raises:
        FlexmoreError: there is such a folder, and it is of another user.
    """
    if "RAY_TMPDIR" in os.environ:
        return None
    private = Path(tempfile.gettempdir()) / f"flexmore-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    about = private.lstat()
    if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
        raise FlexmoreError(f"{private} is not a folder of yours; set RAY_TMPDIR to one that nobody else can enter")
    private.chmod(0o700)
    return str(private / "ray")


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray take the loopback address, for which it puts the machine's own one where clusters are possible."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def on_running_cluster() -> bool:
    """Whether ``RAY_ADDRESS`` names a cluster, which may have more nodes in a moment."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, each as Ray describes it."""
    return [node for node in ray.nodes() if node["Alive"]]


def leaving() -> set[str]:
    """Ids of the nodes that Ray drains: spot machines that are taken back, and idle ones that the autoscaler ends.

    A node drains from the notice (SIGTERM to ``ray start --block``, the autoscaler's request, ``ray drain-node``) to
    its end, for 30 seconds unless its RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S says otherwise; it ends before that once
    no actor is left on it. Ray starts nothing more there. The deadline that comes with it is by the node's own
    clock, and is not used.
    """
    return set(state.get_draining_nodes())


def staying() -> list[dict[str, Any]]:
    """The nodes that are alive and do not drain, each as Ray describes it."""
    going = leaving()
    return [node for node in nodes() if node["NodeID"] not in going]


def place_of(actor: Any) -> str:
    """Id of the node where an actor is, or was last; empty where it never was on one."""
    return str(state.actor_table(actor._actor_id.hex()).get("Address", {}).get("NodeID", ""))


def died_with_its_node(actor: Any) -> bool:
    """Whether an actor that died is not to blame, as far as is known now: the node where it was is gone or drains."""
    place = place_of(actor)
    return bool(place) and all(node["NodeID"] != place for node in staying())


def move_when_leaving(finish: Callable[[], object]) -> None:
    """Let the actor that calls this end once its node drains, to be started by Ray on another one.

    Ray repeats there the calls that it had in hand, so the actor needs max_restarts and max_task_retries.

    Args:
        finish: called before the end, in a thread of its own.
    """
    threading.Thread(target=_watch, args=(finish,), name="move when leaving", daemon=True).start()


def _watch(finish: Callable[[], object]) -> None:
    node = ray.get_runtime_context().get_node_id()
    while node not in leaving():
        time.sleep(_LOOK_SECONDS)
    finish()
    os.kill(os.getpid(), signal.SIGKILL)  # what ends in another way is not started again
