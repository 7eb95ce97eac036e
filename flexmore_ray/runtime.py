"""The Ray cluster that a command runs on: the one it was sent to, or its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from flexmore_ray.errors import FlexmoreError

_OBJECT_STORE = 512 * 2**20  # bytes; factors of large experts cross in pieces, results are small
_ANSWER_SECONDS = 5.0


@contextlib.contextmanager
def cluster(num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray for as long as the block runs.

    Inside a program that has called ``ray.init`` this does nothing. Where ``RAY_ADDRESS`` is set (as in
    every ``ray job submit``) it connects there. Otherwise it starts a cluster of this machine alone,
    reachable from this machine alone, and shuts down that one at the end.

    Args:
        num_cpus: CPUs of a cluster that is started; None means all of this machine.

    Raises:
        FlexmoreError: no cluster answers at ``RAY_ADDRESS``.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
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
    token = Path.home() / ".ray" / "auth_token"
    try:
        with _loopback():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray raises plain ones, such as of a start that takes too long
        reason = " ".join(str(error).split())[:200]
        raise FlexmoreError(f"Ray did not start on this machine ({reason}); run the command again") from error
    if token.exists():
        token.chmod(0o600)  # Ray writes it readable for everyone


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
