"""The same small grid undisturbed and under kill -9 of everything that runs it: the same rows, each computed once.

Run with `make slow`. Every process that is killed here was started here: the driver, its Ray workers and expert
actors, and the nodes of a simulated cluster.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from flexmore_ray.results import read_cells, read_samples

KILLS = 20
PLAN = """
source: zoo://nano
tasks: [nano_arithmetic, nano_mayors, nano_program]
limit: 60
mixtures:
  - pairs: [2, 16, full]
  - {uniform: [2, 16, best, best2], active: [2, all]}
"""


class Simulated:
    """A cluster of three nodes with one CPU each, and a driver that runs the grid on it."""

    def __init__(self, plan: Path) -> None:
        self.plan = plan
        small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
        self.others: list[Any] = []
        self.grow()
        self.grow()
        self.driver: subprocess.Popen | None = None

    def grow(self) -> None:
        """Add a node."""
        self.others.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))

    def shrink(self) -> None:
        """Kill a node and all that runs on it."""
        self.cluster.remove_node(self.others.pop(0), allow_graceful=False)

    def start(self, results: Path) -> None:
        """Start the driver."""
        store = results.with_name(f"store-of-{results.name}")
        command = [sys.executable, "-m", "flexmore_ray", "grid", str(self.plan)]
        command += ["--results", str(results), "--store", str(store), "--json"]
        with open(results.parent / "driver.log", "a") as log:
            environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray processes of this cluster whose title begins with a name."""
        found = []
        for node in (self.cluster.head_node, *self.others):
            for raylet in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    children = psutil.Process(raylet.process.pid).children()
                    found += [child for child in children if title(child).startswith(f"ray::{name}")]
        return found

    def close(self) -> None:
        """End what is left of the driver and the cluster."""
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()


@pytest.fixture
def simulated(ray_home: None, loopback: None, tmp_path: Path) -> Iterator[Simulated]:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    simulated = Simulated(plan)
    yield simulated
    simulated.close()


@pytest.fixture(scope="module")
def undisturbed(ray_home: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "plan.yaml").write_text(PLAN)
    command = [sys.executable, "-m", "flexmore_ray", "grid", "plan.yaml", "--results", "results"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return rows(folder / "results")


def rows(results: Path) -> list[dict]:
    """Cells and samples but for the time they took."""
    cells = read_cells(results).drop_columns(["seconds"]).to_pylist()
    samples = sorted(read_samples(results).to_pylist(), key=lambda row: (row["cell"], row["doc_id"]))
    assert cells
    return cells + samples


class Watch:
    """Sees whether a committed cell is ever written again."""

    def __init__(self, results: Path) -> None:
        self.folder = results / "cells"
        self.seen: dict[str, tuple[int, int]] = {}

    def look(self) -> int:
        """Compare with the last look; returns the number of committed cells."""
        for path in self.folder.glob("[!.]*.parquet") if self.folder.exists() else ():
            status = path.stat()
            identity = (status.st_ino, status.st_mtime_ns)
            assert self.seen.setdefault(path.name, identity) == identity, f"{path.name} was computed twice"
        return len(self.seen)


def kill(simulated: Simulated, what: str) -> bool:
    """Kill -9 something; False if there is no such thing at the moment."""
    if what == "driver":
        assert simulated.driver is not None
        simulated.driver.kill()
        simulated.driver.wait()
    elif what == "node":
        simulated.shrink()
        simulated.grow()
    else:
        found = simulated.actors({"worker": "Worker", "expert": "ExpertActor"}[what])
        if not found:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
            random.choice(found).kill()
    return True


def await_moment(simulated: Simulated, watch: Watch, chance: random.Random) -> None:
    """Wait for the moment of a kill: any, or one soon after a commit, so that the grid moves on between kills."""
    any_moment = chance.random() < 0.3
    committed, start = watch.look(), time.monotonic()
    assert simulated.driver is not None
    while simulated.driver.poll() is None and time.monotonic() - start < 30:
        if any_moment or watch.look() > committed:
            time.sleep(chance.uniform(0, 3))
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_whatever_is_killed_the_rows_are_the_same(simulated, undisturbed, tmp_path):
    chance = random.Random(7)
    kills: Counter[str] = Counter()
    finished = 0
    while kills.total() < KILLS:
        results = tmp_path / f"results-{finished}"
        watch = Watch(results)
        while simulated.driver is None or simulated.driver.wait() != 0:
            simulated.start(results)
            while simulated.driver.poll() is None:
                await_moment(simulated, watch, chance)
                kinds = ["driver"] * 2 + ["worker"] * 4 + ["expert"] * 2 + ["node"] * 2
                what = chance.choice([kind for kind in kinds if kills[kind] <= kills.total() / 3])
                if simulated.driver.poll() is None and kills.total() < KILLS + 10 and kill(simulated, what):
                    kills[what] += 1
        watch.look()
        assert rows(results) == undisturbed
        finished, simulated.driver = finished + 1, None
    assert all(kills[what] >= 2 for what in ("driver", "worker", "expert", "node")), kills
    print(f"{kills.total()} kills ({dict(kills)}) in {finished} runs")


@pytest.mark.slow
def test_a_cluster_that_shrinks_to_one_node_and_grows_again(simulated, undisturbed, tmp_path):
    results = tmp_path / "results"
    simulated.start(results)
    watch, total = Watch(results), sum("mixture" in row for row in undisturbed)
    for share, change in (
        (0.15, simulated.shrink),
        (0.3, simulated.shrink),
        (0.5, simulated.grow),
        (0.6, simulated.grow),
    ):
        wait_for(lambda share=share: watch.look() >= share * total, simulated)
        change()
    assert simulated.driver is not None
    assert simulated.driver.wait(timeout=300) == 0
    watch.look()
    assert rows(results) == undisturbed


def wait_for(condition: Callable[[], bool], simulated: Simulated) -> None:
    """Wait until a condition holds, as long as the driver lives."""
    assert simulated.driver is not None
    while not condition():
        assert simulated.driver.poll() is None, "the driver ended early"
        time.sleep(0.1)


def title(process: psutil.Process) -> str:
    """What a process is called; empty for one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        return process.cmdline()[0]
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_leaves_no_process_of_its_own_cluster(stop, ray_home, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("limit: 60", "limit: 200"))
    command = [sys.executable, "-m", "flexmore_ray", "grid", "plan.yaml", "--results", "results"]
    with open(tmp_path / "said", "w+") as said:
        driver = subprocess.Popen(command, cwd=tmp_path, stderr=said)
        family: list[psutil.Process] = []
        while not any(title(process).startswith("ray::Worker") for process in family):
            assert driver.poll() is None, "the driver ended early"
            time.sleep(0.5)
            family = psutil.Process(driver.pid).children(recursive=True)
        for _ in range(4):  # an interrupt that comes within a callback of Ray's is lost
            driver.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(timeout=15)
                break
        said.seek(0)
        lines = said.read().splitlines()
    if stop == signal.SIGTERM:
        assert (driver.poll(), lines[-1:]) == (1, ["flexmore: interrupted; what was finished is kept"])
        assert not [line for line in lines if "Traceback" in line]
    _, alive = psutil.wait_procs(family, timeout=120)  # Ray's agents take a minute to notice
    assert [title(process) for process in alive] == []
