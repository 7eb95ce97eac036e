"""Several hosts on one machine: network namespaces on a bridge, with one Ray node in each.

A namespace is a host as far as Ray can tell: it has an address of its own, its link can be cut and joined again
(a true partition: packets vanish, nothing is refused), and what runs in it can be killed as a whole. Everything lies
inside namespaces of the calling process (`isolated`), so that nothing can reach the machine's network, and whatever
is left when that process ends is killed by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from ray._raylet import GcsClient
from ray.core.generated import gcs_pb2
from ray.exceptions import RpcError

NETWORK = "10.77.0"
GCS_PORT = 6379
OBJECT_STORE = 100 * 2**20
START_SECONDS = 300.0
INSIDE = "FLEXMORE_CHAOS_INSIDE"
_ALIVE = gcs_pb2.GcsNodeInfo.GcsNodeState.Value("ALIVE")
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def isolated(arguments: Sequence[str]) -> None:
    """Go on as process 1 of fresh namespaces for network, mounts and processes; returns where that is so already.

    Args:
        arguments: of the Python interpreter that goes on.
    """
    if os.environ.get(INSIDE):
        _sh("ip link set lo up")
        Path("/run/netns").mkdir(parents=True, exist_ok=True)
        _sh("mount -t tmpfs none /run/netns")
        _sh("ip link add hosts type bridge", f"ip addr add {NETWORK}.254/24 dev hosts", "ip link set hosts up")
        return
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *own_user, "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    os.environ[INSIDE] = "1"
    os.execvp("unshare", [*command, sys.executable, *arguments])


def available() -> str | None:
    """Why hosts cannot be simulated here; None where they can."""
    probe = "ip link add probe type bridge && ip netns help"
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run(
            ["unshare", *own_user, "--net", "--mount", "--pid", "--fork", "sh", "-c", probe], capture_output=True
        )
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return None if b"ip netns" in done.stdout + done.stderr else "network namespaces cannot be made"


def _sh(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


class Host:
    """One simulated host with a Ray node.

    Args:
        number: last part of its address, 1 for the head.
        scratch: folder for logs and Ray's session.
        environment: of everything that runs on it.
        cpus: of its Ray node.
    """

    def __init__(self, number: int, scratch: Path, environment: Mapping[str, str], cpus: float = 1) -> None:
        self.number, self.name, self.address = number, f"host{number}", f"{NETWORK}.{number}"
        self.scratch, self.environment, self.cpus = scratch, dict(environment), cpus
        self.node: subprocess.Popen[bytes] | None = None
        self.troubled = False
        """Whether something was done to it; its node may end then."""
        link = f"link{number}"
        _sh(
            f"ip netns add {self.name}",
            f"ip link add {link} type veth peer name eth0 netns {self.name}",
            f"ip link set {link} master hosts up",
            f"ip -n {self.name} addr add {self.address}/24 dev eth0",
            f"ip -n {self.name} link set eth0 up",
            f"ip -n {self.name} link set lo up",
            f"ip -n {self.name} route add default via {NETWORK}.254",
        )

    def start(self) -> None:
        """Start the Ray node; the first host has the head."""
        self.troubled = False
        ray = [sys.executable, "-m", "tests.chaos.node", "start", "--block", "--disable-usage-stats"]
        ray += [f"--node-ip-address={self.address}", f"--num-cpus={self.cpus:g}"]
        ray += [f"--object-store-memory={OBJECT_STORE}", f"--temp-dir={self.scratch / self.name}"]
        if self.number == 1:
            ray += ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        else:
            ray += [f"--address={NETWORK}.1:{GCS_PORT}"]
        self.node = self.run(ray, self.scratch / f"{self.name}.log")

    def run(self, command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on this host."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=file,
                stderr=file,
                env=self.environment | variables,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """What runs on it."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        found = []
        for pid in map(int, pids.split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return [process for process in found if alive(process)]

    def crash(self) -> None:
        """Kill -9 all of it at once, as a power failure does."""
        self.troubled = True
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        if self.node is not None:
            self.node.wait()

    def terminate(self) -> None:
        """SIGTERM to its Ray node, as a cloud's notice that it takes the machine back."""
        self.troubled = True
        assert self.node is not None
        for process in self.processes():
            if process.pid == self.node.pid or "tests.chaos.node" in " ".join(process.cmdline()):
                process.terminate()
                return
        raise ProcessLookupError(f"{self.name}: no Ray node")

    def cut(self) -> None:
        """Take it off the network: packets vanish both ways."""
        self.troubled = True
        _sh(f"ip link set link{self.number} down")

    def join(self) -> None:
        """Put it back on the network."""
        _sh(f"ip link set link{self.number} up")

    def remove(self) -> None:
        """Kill what is left and take the host away."""
        self.crash()
        _sh(
            f"ip link del link{self.number}", f"ip netns del {self.name}"
        )  # the kernel would take its time with the link


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs."""
    try:
        return process.status() not in _ENDED
    except psutil.NoSuchProcess:
        return False


class Hosts:
    """A Ray cluster of simulated hosts.

    Args:
        scratch: an empty folder for logs, homes and sessions.
        workers: hosts besides the head's.
        cpus: of each node.
        variables: environment of everything on all hosts.
    """

    def __init__(self, scratch: Path, workers: int, cpus: float = 1, **variables: str) -> None:
        self.scratch, self._cpus, self._next = scratch, cpus, 1
        home = scratch / "home"
        home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = kept | {
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_prestart_worker_first_driver": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "FLEXMORE_CACHE": str(scratch / "cache"),
            "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent / 'onpath'}",
            "RAY_gcs_storage_path": str(scratch / "gcs"),  # of a head that keeps its state in RocksDB
            **variables,
        }
        self.variables: dict[str, str] = {}
        """More environment of the worker hosts that come."""
        self.head = self._new(cpus)
        self.workers: list[Host] = []
        self.others: list[Host] = []
        self.head.start()
        try:
            self.await_nodes(1)
            for _ in range(workers):
                self.grow()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def all(self) -> list[Host]:
        """The head's host, then the others."""
        return [self.head, *self.others, *self.workers]

    def add_idle(self) -> Host:
        """Add a host whose node has no CPUs, for a driver."""
        self.others.append(host := self._new(0))
        host.start()
        self.await_nodes(len(self.all))
        return host

    def grow(self, *, wait: bool = True) -> Host:
        """Add a worker host."""
        host = self._new(self._cpus)
        host.environment |= self.variables
        host.start()
        self.workers.append(host)
        if wait:
            self.await_nodes(len(self.all))
        return host

    def drop(self, host: Host) -> None:
        """Take a host away for good."""
        self.workers.remove(host)
        host.remove()

    def await_nodes(self, number: int) -> None:
        """Wait until so many nodes or more are alive."""
        deadline = time.monotonic() + START_SECONDS
        while (found := len(self.states())) < number:
            assert time.monotonic() < deadline, f"{found} of {number} nodes came up: {self.logs()}"
            self.tend()
            time.sleep(0.2)

    def tend(self) -> None:
        """Start nodes again that did not come up: Ray gives one 30 seconds, which a busy machine may exceed."""
        for host in self.all:
            if not host.troubled and host.node is not None and host.node.poll() is not None:
                host.crash()
                host.start()

    def states(self) -> dict[str, str]:
        """Address of each node that Ray takes for alive, and its id; none while the head does not answer."""
        try:
            table = GcsClient(address=self.address).get_all_node_info(timeout=2)
        except RpcError:
            return {}
        return {node.node_manager_address: id.hex() for id, node in table.items() if node.state == _ALIVE}

    def logs(self) -> str:
        """The end of what each node has printed."""
        return "\n".join((self.scratch / f"{host.name}.log").read_text()[-600:] for host in self.all)

    def close(self) -> None:
        """Take all hosts away."""
        for host in reversed(self.all):
            host.remove()

    def _new(self, cpus: float) -> Host:
        host = Host(self._next, self.scratch, self.environment, cpus)
        self._next += 1
        return host
