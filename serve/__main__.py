"""The command `flexmore serve`, also as `python -m serve`: its options, and the run until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import io
import ipaddress
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

APPLICATION = "flexmore"
_READY_SECONDS = 1800.0  # for weights to be read
_STOP_SECONDS = 60.0  # for requests in flight to finish
_POLL_SECONDS = 0.2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("mixture", metavar="MIXTURE", help="a mixture file, or a SOURCE")
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="P", help="port to listen on (default: 8000)")
    add("--name", metavar="NAME", help="of the model, for clients (default: of the file or the source)")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="DIR",
        help="folder or SOURCE that the mixture file may name outside its own folder (repeatable)",
    )
    add("--api-key", help=argparse.SUPPRESS)
    add("--api-key-file", metavar="FILE", help="clients must send one of its keys, one a line; or FLEXMORE_API_KEY")
    add("--admin-key-file", metavar="FILE", help="keys for /admin, one a line (default: /admin is closed)")
    add("--device", default="cpu", metavar="D", help="where to compute (default: cpu)")
    add("--dtype", metavar="D", help="compute dtype (default: float32 on the CPU)")
    add("--min-replicas", type=int, default=1, metavar="N", help="mixture replicas at least; 0: none while idle")
    add("--max-replicas", type=int, metavar="N", help="mixture replicas at most (default: 1, or --min-replicas)")
    add("--cpus", type=float, default=1, metavar="X", help="CPUs of one mixture replica (default: 1)")
    add("--gpus", type=float, default=0, metavar="X", help="GPUs of one mixture replica (default: 0)")
    add("--ingress-replicas", type=int, default=1, metavar="N", help="processes that speak HTTP (default: 1)")
    add("--expert-min-replicas", type=int, default=1, metavar="N", help="of each expert placed on its own (default: 1)")
    add("--expert-max-replicas", type=int, metavar="N", help="likewise at most (default: 1, or --expert-min-replicas)")
    add("--expert-gpus", type=float, default=0, metavar="X", help="GPUs of one of these replicas (default: 0)")
    add(
        "--on-lost",
        choices=["continue", "refuse"],
        default="continue",
        help="when an expert is lost: go on, or 503",
    )
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer (default: what the model takes)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of serve/settings.py")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; requests in flight are finished first.

    Args:
        args: what `add_options` parsed, and ``experts`` (names or None).

    Raises:
        FlexmoreError: the mixture or a setting is wrong, the port is taken, or the service did not come up.
    """
    from flexmore_ray.errors import UsageError
    from serve.app import bind
    from serve.gate import key_digest
    from serve.settings import environment_key, read_keys, read_settings
    from serve.transport import check_port

    if args.api_key is not None:
        raise UsageError(
            "--api-key: all users of this machine see command lines, and Ray keeps them; put a key that is not known "
            "yet into the environment (FLEXMORE_API_KEY) or into a file (--api-key-file)"
        )
    settings = read_settings(_given(args))
    keys = read_keys(settings.api_key_file, where="--api-key-file")
    keys += environment_key()
    admin_keys = read_keys(settings.admin_key_file, where="--admin-key-file")
    _check_exposure(args.host, bool(keys))
    check_port(args.host, args.port)
    application = bind(settings, api_keys=tuple(map(key_digest, keys)), admin_keys=tuple(map(key_digest, admin_keys)))
    with serving(application, settings, args.host, args.port) as url:
        print(f"{settings.model_name}: {url}", flush=True)
        started = time.monotonic()
        _wait_for_signal()
        print("stopping; requests in flight are finished", file=sys.stderr, flush=True)
    return {"model": settings.model_name, "url": url, "seconds": round(time.monotonic() - started, 1)}


@contextlib.contextmanager
def serving(application: Any, settings: Any, host: str, port: int) -> Iterator[str]:
    """Be up for as long as the block runs; gives the service's URL.

    Args:
        application: what `serve.app.build_app` made of `settings`.
        settings: of the application.
        host: address to listen on.
        port: on that address.

    Raises:
        FlexmoreError: the service did not come up, or the cluster has no room for it.
    """
    from ray import serve
    from ray.exceptions import RayError

    from flexmore_ray.errors import FlexmoreError
    from flexmore_ray.placement import check_room
    from flexmore_ray.runtime import cluster, nodes, on_running_cluster
    from serve.app import needs
    from serve.transport import check_no_serve, local_variables

    variables = contextlib.nullcontext() if on_running_cluster() else local_variables()
    with contextlib.ExitStack() as last, variables, cluster(runs=f"serve {settings.model_name}"):
        check_no_serve()
        check_room(needs(settings, settings.spec()), nodes())
        try:
            with _quiet():
                try:
                    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
                    serve.run(application, name=APPLICATION, route_prefix="/")
                except RayError as error:
                    raise FlexmoreError(f"Ray Serve did not start ({_first_line(error)}); run it again") from error
                except RuntimeError as error:
                    raise FlexmoreError(f"the service did not start: {_reason() or error}") from error
            url = f"http://{_for_url(host)}:{port}"
            _wait_until_ready(url)
            yield url
        finally:
            last.enter_context(contextlib.redirect_stdout(io.StringIO()))  # where Ray tells that Serve has ended
            last.enter_context(_quiet())
            _stop()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reason() -> str | None:
    """The last line of why a deployment did not start; None if nothing is known."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    messages = [deployment.message for deployment in (application.deployments if application else {}).values()]
    lines = [line.partition("Error: ")[2] for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1][:500] if lines else None


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, as the options say them."""
    from flexmore_ray.errors import UsageError

    names = ("mixture", "name", "device", "dtype", "min_replicas", "cpus", "gpus", "ingress_replicas", "on_lost")
    given = {name: getattr(args, name) for name in (*names, "api_key_file", "admin_key_file", "max_model_len")}
    given |= {name: getattr(args, name) for name in ("expert_min_replicas", "expert_gpus")}
    given["experts"] = getattr(args, "experts", None)
    given["allow"] = args.allow
    for kind in ("", "expert_"):
        most = getattr(args, f"{kind}max_replicas")
        given[f"{kind}max_replicas"] = max(1, getattr(args, f"{kind}min_replicas")) if most is None else most
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set: NAME=VALUE is needed, got {item!r}")
        given[name] = value
    return given


def _check_exposure(host: str, keys: bool) -> None:
    """Refuse to serve other machines without a key."""
    from flexmore_ray.errors import UsageError

    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UsageError(f"--host: an IP address is needed, such as 127.0.0.1 or 0.0.0.0, got {host!r}") from None
    if not loopback and not keys:
        raise UsageError(
            f"--host {host} lets other machines in, and there is no key; set FLEXMORE_API_KEY or --api-key-file"
        )


def _for_url(host: str) -> str:
    """An address that reaches a server which listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


def _wait_until_ready(url: str) -> None:
    """Wait for ``/ready``.

    Raises:
        FlexmoreError: the application failed to start.
    """
    from ray import serve

    from flexmore_ray.errors import FlexmoreError

    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=10):
            return
        status = serve.status().applications.get(APPLICATION)
        if status is not None and status.status == "DEPLOY_FAILED":
            reason = " ".join(status.message.split())[:500]
            raise FlexmoreError(f"the service did not start: {reason}")
        time.sleep(_POLL_SECONDS)
    raise FlexmoreError(f"the service was not ready within {_READY_SECONDS:g} s; see the logs of Ray Serve")


def _wait_for_signal() -> None:
    """Wait for SIGINT or SIGTERM."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not told.wait(1.0):  # in steps, so that the handler gets its turn
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop() -> None:
    """End the application and Serve; requests in flight finish first, within a minute."""
    from ray import serve

    def stop() -> None:
        serve.delete(APPLICATION)  # which waits for what is in flight; a shutdown alone does not
        serve.shutdown()

    ended = threading.Thread(target=stop, daemon=True)
    ended.start()
    ended.join(_STOP_SECONDS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Serve's notices out of the command's output."""
    import logging

    loggers = [logging.getLogger(name) for name in ("ray.serve", "ray")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def main() -> int:
    """The command on its own."""
    from flexmore_ray.__main__ import main as flexmore

    return flexmore(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
