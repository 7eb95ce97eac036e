"""How requests travel through Ray Serve, and on which addresses it listens.

Handle calls go over gRPC and carry their values, rather than through Ray's object store: with a bare application of
this shape a request took 6.2 ms of CPU time in proxy, ingress and replica instead of 10.9, and a streamed piece 0.28
instead of 1.1 (two cores, 16 clients). `by_value` is set on the handles, `REPLICA_VARIABLES` on the replicas wherever
they run; the rest is environment of the whole cluster, `local_variables` for one that is started here. HAProxy, which
Serve can put in place of its own proxy, takes another 2 ms off; it is not the default here, as it listens on all
addresses and, when an ingress replica was killed, answered 500 to requests that came after.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.serve._private.replica as serve_replica
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle

from flexmore_ray.errors import FlexmoreError, UsageError

REPLICA_VARIABLES: Mapping[str, str] = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # all methods are async and short
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 2**20),  # log-probabilities of many prompts are large
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
"""Environment of replicas, read when their process starts."""
_CLUSTER_VARIABLES = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # from Serve's own proxy to the ingress too
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # not 5: on a busy machine it takes longer to import Ray alone
}


class EngineStopped(RuntimeError):  # noqa: N818
    """The replica's engine has ended, and Serve is about to replace the replica; another one can answer."""


def by_value(handle: DeploymentHandle, method: str, *, stream: bool = False) -> DeploymentHandle:
    """The handle of a method whose arguments and results cross with the call itself, not through the object store."""
    return handle.options(
        method_name=method,
        stream=stream,
        _by_reference=False,
        request_serialization="pickle",
        response_serialization="pickle",
    )


def replica_environment(**more: str) -> dict[str, Any]:
    """Options of a replica's actor that give it `REPLICA_VARIABLES` and others; none where this process has them."""
    wanted = {**REPLICA_VARIABLES, **more}
    missing = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    return {"runtime_env": {"env_vars": missing}} if missing else {}


def keep_to_loopback() -> None:
    """Let this replica's server for calls from other replicas listen where the cluster's nodes are, and nowhere else.

    Ray 2.60 opens it on all addresses of the machine, and it unpickles whatever it is sent. Call this in the
    constructor of a replica, which runs before the server starts. It does nothing where nodes are not on the loopback.
    """
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    open_port = serve_replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> Any:
        return open_port(server, address.replace("[::]:", "127.0.0.1:"))

    if open_port.__name__ != on_loopback.__name__:
        serve_replica.add_port_to_grpc_server = on_loopback


@contextlib.contextmanager
def local_variables() -> Iterator[None]:
    """Environment for a cluster that is started within the block; what the user has set goes before it."""
    wanted = {**REPLICA_VARIABLES, **_CLUSTER_VARIABLES}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        UsageError: it is no port.
        FlexmoreError: it is taken, or not one of this machine.
    """
    if not 0 < port < 2**16:
        raise UsageError(f"--port: 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FlexmoreError(f"--port: {host}:{port} cannot be listened on ({reason}); choose another") from None


def check_no_serve() -> None:
    """Refuse a cluster on which Serve runs already, with options and applications of its own.

    Raises:
        FlexmoreError: it does.
    """
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    raise FlexmoreError(
        "Ray Serve runs on this cluster already; add the application to its config file (see serve/config.yaml), "
        "or end it with serve shutdown"
    )
