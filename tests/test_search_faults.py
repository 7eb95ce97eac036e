"""The same small search undisturbed and under kill -9 of its driver: the same table, nothing lost or done twice.

Run with `make slow`. What is killed here was started here: drivers, and the Ray processes that each had started.
With one worker the sampler's order does not depend on time, so the search goes on as it would have.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flexmore_ray.build import build_store
from flexmore_ray.source import open_source
from search.ledger import STUDY
from search.study import STANDARD
from tests.test_faults import Watch

KILLS = 10
TRIALS = 14
COMMAND = ["search", "--source", "zoo://nano", "--budget", "0.4x", "--trials", str(TRIALS), "--seed", "3"]
COMMAND += ["--tasks", "nano_arithmetic", "--tasks", "nano_mayors", "--tasks", "nano_program"]
COMMAND += ["--limit", "27", "--test-limit", "27", "--workers", "1"]
BASELINES = len(STANDARD) + 1  # with "optimal-expert"
TIMES = ("seconds", "started", "finished")


class Driver:
    """The command in a process of its own, with a Ray of its own."""

    def __init__(self, out: Path, store: Path) -> None:
        self.out, self.watch = out, Watch(out / "results")
        self.finished: dict[str, bytes] = {}
        """Files of the entries that have ended."""
        self._command = [sys.executable, "-m", "flexmore_ray", *COMMAND, "--out", str(out), "--store", str(store)]
        self._process: subprocess.Popen | None = None
        self.started = 0.0

    @property
    def process(self) -> subprocess.Popen:
        assert self._process is not None
        return self._process

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def start(self) -> None:
        self.started = time.monotonic()
        with open(self.out.with_suffix(".log"), "w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def said(self) -> list[str]:
        return self.out.with_suffix(".log").read_text().splitlines()

    def look(self) -> int:
        """Check that nothing that was finished changed; returns how many entries have ended."""
        self.watch.look()
        for path in sorted((self.out / "trials").glob("[0-9]*.json")):
            data = path.read_bytes()
            if json.loads(data)["state"] != "running":
                assert self.finished.setdefault(path.name, data) == data, f"{path.name} was written again"
        return len(self.finished)

    def kill(self) -> None:
        """Kill -9 the driver, and then what it had started, which would take a minute to notice."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=30)

    def await_that(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until a condition holds, as long as the driver runs."""
        limit = time.monotonic() + seconds
        while self.runs and not condition():
            assert time.monotonic() < limit, self.said()
            time.sleep(0.05)

    def close(self) -> None:
        """End what is left of it."""
        if self._process is not None and self.runs:
            self.kill()

    def finish(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Let it end; returns what it found, without times."""
        assert self.process.wait(timeout=240) == 0, self.said()
        self.look()
        return found(self.out)


def found(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table of trials and the end, without times."""
    rows = pq.read_table(out / "trials.parquet").drop_columns(list(TIMES)).to_pylist()
    final = json.loads((out / "final.json").read_text())
    final.pop("seconds")
    return rows, final | {"ranks": (out / "winner.yaml").read_text()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factors") / "store"
    build_store(open_source(["zoo://nano"]), folder)
    return folder


@pytest.fixture(scope="module")
def new_driver(ray_home: None, store: Path) -> Iterator[Callable[[Path], Driver]]:
    """Makes drivers by the folder of their search, and ends what is left of them."""
    with contextlib.ExitStack() as stack:
        yield lambda out: stack.enter_context(contextlib.closing(Driver(out, store)))


@pytest.fixture(scope="module")
def undisturbed(new_driver: Callable[[Path], Driver], tmp_path_factory: pytest.TempPathFactory) -> Any:
    driver = new_driver(tmp_path_factory.mktemp("undisturbed") / "out")
    driver.start()
    return driver.finish()


def await_moment(driver: Driver, chance: random.Random) -> None:
    """Wait for the moment of a kill: any, or one soon after an entry has ended, so that the search moves on."""
    if chance.random() < 0.3:
        moment = driver.started + chance.uniform(0, 15)
        driver.await_that(lambda: time.monotonic() > moment)
        return
    before = driver.look()
    driver.await_that(lambda: driver.look() > before)
    moment = time.monotonic() + chance.uniform(0, 2.5)
    driver.await_that(lambda: time.monotonic() > moment)


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(undisturbed, new_driver, tmp_path):
    chance = random.Random(11)
    kills, searches = [], 0
    while len(kills) < KILLS:
        driver = new_driver(tmp_path / f"out-{searches}")
        driver.start()
        while driver.runs and len(kills) < KILLS:
            await_moment(driver, chance)
            if driver.runs:
                driver.kill()
                kills.append(driver.look())
                driver.start()
        rows, final = driver.finish()
        assert [row["number"] for row in rows] == list(range(BASELINES + TRIALS))
        assert len({row["mixture_id"] for row in rows}) == len(rows)
        assert (rows, final) == undisturbed
        storage = JournalStorage(JournalFileBackend(str(driver.out / "journal.log")))
        shown = optuna.load_study(study_name=STUDY, storage=storage).trials
        assert sorted(trial.user_attrs["name"] for trial in shown) == sorted(row["name"] for row in rows)
        searches += 1
    print(f"{len(kills)} kills in {searches} searches, with so many entries that had ended: {kills}")


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_finished(undisturbed, new_driver, tmp_path):
    driver = new_driver(tmp_path / "out")
    for stop, share in ((signal.SIGINT, 3), (signal.SIGTERM, BASELINES + 3)):
        driver.start()
        driver.await_that(lambda share=share: driver.look() >= share)
        for _ in range(4):  # an interrupt that comes within a callback of Ray's is lost
            driver.process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.process.wait(timeout=15)
                break
        lines = driver.said()
        assert (driver.process.poll(), lines[-1:]) == (1, ["flexmore: interrupted; what was finished is kept"])
        assert not [line for line in lines if "Traceback" in line]
        assert share <= driver.look() < BASELINES + TRIALS
    driver.start()
    assert driver.finish() == undisturbed
