"""What `flexmore doctor` looks at: facts of a node, of a working directory, and of the way to a cluster.

Nothing here judges; `flexmore_ray.cluster.doctor` does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from flexmore_ray.atomic import write_file
from flexmore_ray.cluster import port_taken, read_cluster
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.storage import RemotePath, open_path

PACKAGES = ("ray", "torch", "transformers", "lm-eval", "flexmore-ray")
PORTS = {6379: "--port", 8265: "--dashboard-port", 8000: "port of flexmore serve"}
"""Ports that a cluster and a service take unless told otherwise, and what changes them."""
_WALK_SECONDS, _WALK_FILES = 20.0, 200_000  # of a folder to upload
_LATE_SECONDS = 5.0  # a network file system may show a new file this much later
_HTTP_SECONDS = 10.0
_GPU_SECONDS = 60.0
_GPUS = """
import json, torch
count = torch.cuda.device_count()
error = None
try:
    if count:
        torch.zeros(1, device="cuda")
except RuntimeError as failure:
    error = str(failure)
sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(count)] if not error else []
print(json.dumps({"seen": count, "bytes": sizes, "runtime": torch.version.cuda, "error": error}))
"""

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Room on a file system, in bytes."""

    path: str
    total: int
    free: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpus:
    """GPUs of a node."""

    installed: int
    """Those that the driver lists."""
    seen: int
    """Those that torch can use."""
    bytes: tuple[int, ...] = ()
    """Memory of each."""
    driver: str | None = None
    runtime: str | None = None
    """CUDA version that torch was built with; None where it was built without."""
    error: str | None = None
    """What torch said when it was asked to use one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What was found on one node."""

    name: str
    versions: Mapping[str, str]
    """By package, Python included; "missing" for one that is not installed."""
    unwritable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By folder that all nodes must share: why this one cannot write to it."""
    unseen: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """By such a folder: nodes that wrote a file which is not there from here."""
    spaces: Mapping[str, Space] = dataclasses.field(default_factory=dict)
    """By what it is for."""
    shared_memory: Space | None = None
    """/dev/shm; None where the machine has none."""
    object_store: int = 0
    """Bytes that Ray's object store is to have."""
    gpus: Gpus | None = None
    """None where no driver is installed."""
    given_gpus: float = 0
    """GPUs that Ray gives out here."""
    memory: int = 0
    """Bytes of main memory."""
    open_files: int = 0
    """Highest number of open files that a process may ask for."""
    home: str | None = None
    """Why the home folder cannot be written; None where it can."""
    threads: str | None = None
    """OMP_NUM_THREADS, as it is set for Ray's workers."""
    cpus: int = 1
    clock: float = 0
    """Seconds that its clock is ahead of the asking machine's, at least; 0 where no difference shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SilentNode:
    """A node that did not say what was asked."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """What ``--working-dir`` would send to the cluster."""

    folder: str
    bytes: int
    files: int
    largest: Sequence[tuple[str, int]]
    """Path and bytes of the largest files."""
    limit: int
    """Bytes of a package that Ray takes."""
    partial: bool = False
    """Whether there is more than was counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """How this machine would reach a cluster, and whether it is let in."""

    address: str | None = None
    """RAY_ADDRESS; None where no cluster is named."""
    mode: str | None = None
    """RAY_AUTH_MODE."""
    token_file: str | None = None
    """None where the token is in RAY_AUTH_TOKEN."""
    token_mode: int | None = None
    """Permission bits of the file; None where there is none."""
    dashboard: str | None = None
    """URL that was asked; None where no cluster is named."""
    with_token: int | str | None = None
    """HTTP status of an answer to a request with the token, or why there was none."""
    without_token: int | str | None = None
    """Likewise without it."""
    refused: str | None = None
    """Why Ray did not let this machine connect."""
    taken_ports: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Of `PORTS`, those that another program holds, and why they cannot be listened on."""


def within(seconds: float, call: Callable[[], Value]) -> Value:
    """Call a function that may never return.

    Raises:
        TimeoutError: it has not returned in time, and goes on in a thread of its own.
    """
    outcome: list[tuple[Value | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    value: Any
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def node_facts(
    name: str, folders: Mapping[str, str], nonce: str, seconds: float, resources: Mapping[str, float]
) -> NodeFacts:
    """Look at the node where this runs, and leave a file in each shared folder.

    Args:
        name: of the node.
        folders: by option, such as "--store": path or URI.
        nonce: of this look, part of the files' names.
        seconds: that each folder has to answer.
        resources: that Ray gives out here.
    """
    from flexmore_ray.storage.cache import cache_folder

    unwritable = {}
    for option, folder in folders.items():
        try:
            within(seconds, functools.partial(_leave, folder, nonce, name))
        except (OSError, FlexmoreError) as error:
            unwritable[f"{option} {folder}"] = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    local = {
        option: Path(folder) for option, folder in folders.items() if not isinstance(open_path(folder), RemotePath)
    }
    places = {"Ray's temporary folder": _ray_folder(), "cache": cache_folder(), **local}
    return NodeFacts(
        name=name,
        versions={"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        unwritable=unwritable,
        spaces={what: space for what, path in places.items() if (space := _space(path))},
        shared_memory=_space(Path("/dev/shm")),
        object_store=int(resources.get("object_store_memory", 0)),
        gpus=_gpus(),
        given_gpus=resources.get("GPU", 0),
        memory=psutil.virtual_memory().total,
        open_files=_open_files(),
        home=_unwritable_home(),
        threads=os.environ.get("OMP_NUM_THREADS"),
        cpus=os.cpu_count() or 1,
    )


def others_seen(folders: Mapping[str, str], nonce: str, writers: Mapping[str, Sequence[str]], seconds: float) -> Any:
    """Look for the files that nodes left.

    Args:
        folders: by option, as of `node_facts`.
        nonce: likewise.
        writers: by option: nodes that left a file.
        seconds: that each folder has to answer.

    Returns:
        This node's time in seconds, and by option and folder the nodes whose file is not there.
    """
    now, unseen = time.time(), {}
    for option, folder in folders.items():
        if not writers[option]:
            continue
        try:
            missing = within(seconds, functools.partial(_missing, folder, nonce, writers[option]))
        except (OSError, FlexmoreError):
            missing = list(writers[option])
        if missing:
            unseen[f"{option} {folder}"] = missing
    return now, unseen


def remove_left(folders: Mapping[str, str], nonce: str, name: str, seconds: float) -> None:
    """Remove the files that `node_facts` left on this node."""
    for folder in folders.values():
        try:
            within(seconds, functools.partial(_file(folder, nonce, name).unlink, missing_ok=True))
        except (OSError, FlexmoreError) as error:
            logging.getLogger(__name__).info("%s: %s", folder, error)


def _file(folder: str, nonce: str, name: str) -> Any:
    return open_path(folder) / f".doctor-{nonce}-{name.replace(' ', '-').replace(':', '-')}"


def _leave(folder: str, nonce: str, name: str) -> None:
    path = _file(folder, nonce, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(nonce.encode()))


def _missing(folder: str, nonce: str, others: Sequence[str]) -> list[str]:
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        missing = [name for name in others if not _file(folder, nonce, name).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _ray_folder() -> Path:
    """Ray's temporary folder: of the cluster that this process belongs to, else where one would be started."""
    import ray

    if ray.is_initialized():
        worker: Any = ray._private.worker.global_worker
        return Path(worker.node.get_session_dir_path())
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def _space(path: Path) -> Space | None:
    """Room on the file system of a path, or of its nearest parent that exists."""
    for place in (path, *path.absolute().parents):
        try:
            usage = shutil.disk_usage(place)
        except OSError:
            continue
        return (
            Space(path=str(path), total=usage.total, free=usage.free) if path.name != "shm" or place == path else None
        )
    return None


def _gpus() -> Gpus | None:
    """GPUs by the driver and by torch, asked in a process of its own: Ray hides them from tasks that reserve none."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    drivers = listed.stdout.split() if listed and listed.returncode == 0 else []
    seen = _run([sys.executable, "-c", _GPUS])
    try:
        about = json.loads(seen.stdout.splitlines()[-1]) if seen else {}
    except (ValueError, IndexError):
        about = {}
    return Gpus(
        installed=len(drivers),
        seen=about.get("seen", 0),
        bytes=tuple(about.get("bytes", ())),
        driver=drivers[0] if drivers else None,
        runtime=about.get("runtime"),
        error=about.get("error") or (None if about else "torch did not answer"),
    )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_GPU_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _open_files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # Ray raises the limit in force to this one
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _unwritable_home() -> str | None:
    try:
        with tempfile.NamedTemporaryFile(dir=Path.home(), prefix=".doctor-"):
            return None
    except (OSError, RuntimeError) as error:
        return str(error)


def gather_upload(folder: Path) -> Upload:
    """What Ray would send of a working directory, by its own rules.

    Raises:
        UsageError: it is not a folder.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    if not folder.is_dir():
        raise UsageError(f"--working-dir: {folder} is not a folder")
    folder, files = folder.resolve(), list[tuple[str, int]]()
    deadline = time.monotonic() + _WALK_SECONDS

    def count(path: Path) -> None:
        if len(files) >= _WALK_FILES or time.monotonic() > deadline:
            raise StopIteration
        if path.is_file():
            files.append((str(path.relative_to(folder)), path.stat().st_size))

    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.disabled = True
    excludes = [packaging._get_excludes(folder, get_runtime_env_default_excludes())]
    honour = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    try:
        packaging._dir_travel(folder, excludes, count, include_gitignore=honour, logger=quiet)
        partial = False
    except (StopIteration, OSError):
        partial = True
    return Upload(
        folder=str(folder),
        bytes=sum(size for _, size in files),
        files=len(files),
        largest=sorted(files, key=lambda item: -item[1])[:3],
        limit=packaging.GCS_STORAGE_MAX_SIZE,
        partial=partial,
    )


def gather_access() -> Access:
    """How this machine reaches a cluster, and whether it is let in; without a cluster, which ports are taken."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    in_variable = "RAY_AUTH_TOKEN" in os.environ
    facts = Access(
        mode=os.environ.get("RAY_AUTH_MODE"),
        token_file=None if in_variable else str(file),
        token_mode=stat.S_IMODE(file.stat().st_mode) if file.exists() and not in_variable else None,
    )
    address = os.environ.get("RAY_ADDRESS", "local")
    if address in ("", "local"):
        own = read_cluster()
        ours = {own.port, own.dashboard_port, 8000} if own and own.is_up() else set()
        taken = {port: reason for port in PORTS if port not in ours and (reason := port_taken("127.0.0.1", port))}
        return dataclasses.replace(facts, taken_ports=taken)
    token = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.exists() else "")
    url = _dashboard(address)
    return dataclasses.replace(
        facts, address=address, dashboard=url, with_token=_status(url, token), without_token=_status(url, "")
    )


def _dashboard(address: str) -> str:
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        if url := os.environ.get(variable):
            return url if "://" in url else f"http://{url}"
    parsed = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    return f"http://{parsed.hostname}:8265"


def _status(url: str, token: str) -> int | str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(f"{url}/api/version", headers=headers), timeout=_HTTP_SECONDS
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
