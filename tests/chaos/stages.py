"""What faults are tried on: commands that run on the cluster, what they commit, and what they end with."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pyarrow.parquet as pq

from flexmore_ray.results import DONE, read_cells, read_samples
from tests.chaos.hosts import Host, Hosts, alive

GRID = """
source: zoo://nano
tasks: [nano_arithmetic, nano_mayors, nano_program]
limit: 16
mixtures:
  - pairs: [2, 4, 8, 16, 32, full]
  - {uniform: [2, 16], active: [1, 2, 4, all]}
"""
TASKS = ["--tasks", "nano_arithmetic", "--tasks", "nano_mayors", "--tasks", "nano_program"]
SEARCH = ["--source", "zoo://nano", *TASKS, "--budget", "0.4x", "--trials", "8", "--seed", "3", "--workers", "1"]
SEARCH += ["--limit", "27", "--test-limit", "9"]
WORK = ("ray::Worker", "ray::ExpertActor", "ray::expert", "ray::Evaluation", "ray::worker", "ray::trial")
"""How Ray calls the processes of our actors."""


class Watch:
    """Sees what is committed, and whether any of it is ever written again.

    Args:
        find: the files that are committed.
    """

    def __init__(self, find: Callable[[], Iterator[Path]]) -> None:
        self._find = find
        self.seen: dict[Path, tuple[int, int, str]] = {}
        self.twice: set[Path] = set()
        """Committed files that were written again."""
        self.gone: set[Path] = set()
        """Committed files that went away."""

    def look(self) -> int:
        """Compare with what was there; returns how many files have been committed."""
        found = set()
        for path in self._find():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                before = self.seen.get(path)
                found.add(path)
                if before is None:
                    self.seen[path] = status.st_ino, status.st_mtime_ns, _digest(path)
                elif before[:2] != (status.st_ino, status.st_mtime_ns):
                    self.twice.add(path)
        self.gone |= set(self.seen) - found
        return len(self.seen)

    def changed(self) -> set[Path]:
        """Committed files whose content is not what it was."""
        return {path for path, (_, _, digest) in self.seen.items() if path.exists() and _digest(path) != digest}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _factors(store: Path) -> Iterator[Path]:
    return (path for path in store.rglob("[!.]*") if path.suffix == ".safetensors")


class Stage(abc.ABC):
    """A command on the cluster. A run that ends early is started again, as a user would."""

    name: ClassVar[str]
    variables: ClassVar[Mapping[str, str]] = {}
    """Environment of the hosts."""
    arguments: list[str]

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True)
        self._log = out.parent.parent / f"{self.name}-{out.name}.log"  # not on the disk that a fault may fill
        self.process: subprocess.Popen[bytes] | None = None
        self.watch = Watch(self.committed)

    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-m", "flexmore_ray", self.name, *self.arguments]

    def start(self, host: Host, hosts: Hosts | None) -> None:
        """Start the driver on a host; without a cluster it starts one of its own there."""
        variables = {} if hosts is None else {"RAY_ADDRESS": hosts.address}
        self.process = host.run(self.command(), self._log, **variables)

    @property
    def running(self) -> bool:
        """Whether the driver runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether the driver has ended well."""
        return self.process is not None and self.process.poll() == 0

    def log(self) -> str:
        """The end of what the driver has printed."""
        return self._log.read_text()[-1500:]

    def done(self, results: Path) -> Iterator[Path]:
        """Cells that did not fail: one that failed is computed again by the next run."""
        for path in (results / "cells").glob("[!.]*.parquet"):
            if path in self.watch.seen or pq.read_table(path, columns=["status"])["status"][0].as_py() == DONE:
                yield path

    @abc.abstractmethod
    def committed(self) -> Iterator[Path]:
        """Files that are never to be written again."""

    @abc.abstractmethod
    def result(self) -> Any:
        """What the command ends with, without times."""


class Grid(Stage):
    """A grid of 50 mixtures on three tasks."""

    name = "grid"

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        (out / "plan.yaml").write_text(GRID)
        self.results = out / "results"
        self.arguments = [str(out / "plan.yaml"), "--results", str(self.results), "--store", str(out / "store")]

    def committed(self) -> Iterator[Path]:
        yield from self.done(self.results)
        yield from _factors(self.out / "store")

    def result(self) -> Any:
        cells = read_cells(self.results).drop_columns(["seconds"]).to_pylist()
        samples = read_samples(self.results).to_pylist()
        return cells, sorted(samples, key=lambda row: (row["cell"], row["doc_id"]))


class Decompose(Stage):
    """The factors of all experts, to a store whose every write takes half a second."""

    name = "decompose"
    variables: ClassVar = {"CHAOS_WRITE_SECONDS": "0.5"}

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.arguments = ["zoo://nano", "--store", str(out / "store")]

    def committed(self) -> Iterator[Path]:
        yield from _factors(self.out / "store")

    def result(self) -> Any:
        store = self.out / "store"
        return {str(path.relative_to(store)): _digest(path) for path in _factors(store)}


class Search(Stage):
    """A search of eight trials by one worker, so that its order does not depend on time."""

    name = "search"

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.arguments = [*SEARCH, "--out", str(out / "search"), "--store", str(out / "store")]

    def committed(self) -> Iterator[Path]:
        folder = self.out / "search"
        yield from self.done(folder / "results")
        for path in (folder / "trials").glob("[0-9]*.json"):
            if json.loads(path.read_text())["state"] != "running":
                yield path

    def result(self) -> Any:
        folder = self.out / "search"
        rows = pq.read_table(folder / "trials.parquet").drop_columns(["seconds", "started", "finished"]).to_pylist()
        final = json.loads((folder / "final.json").read_text())
        final.pop("seconds")
        return rows, final, sorted(read_cells(folder / "results")["cell"].to_pylist())


STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Grid, Decompose, Search)}


def workers_left(hosts: Hosts, seconds: float = 20.0) -> list[str]:
    """Processes of our actors that still run some time after the driver has ended."""
    deadline = time.monotonic() + seconds
    while True:
        left = [title(process) for host in hosts.all for process in host.processes()]
        left = [name for name in left if name.startswith(WORK)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def title(process: psutil.Process) -> str:
    """What a process is called; empty for one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        return process.cmdline()[0]
    return ""


def processes_left(seconds: float = 10.0) -> list[str]:
    """Whatever still runs in these namespaces besides this process, some time after all hosts are gone."""
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in psutil.process_iter() if process.pid != os.getpid() and alive(process)]
        if not left or time.monotonic() > deadline:
            return [title(process) for process in left]
        time.sleep(0.2)
