"""The faults, and the loop that tries them on a stage at random moments and sees what comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.hosts import Host, Hosts
from tests.chaos.stages import STAGES, Stage, processes_left, workers_left

RUN_SECONDS = 420.0
"""Longest that one run of a stage may take, faults included."""
MOMENT_SECONDS = 90.0
"""Longest wait for the next commit before a fault comes anyway."""
RECLAIM_SECONDS = 45.0
"""A cloud takes a spot machine away so long after its notice, whatever still runs on it."""
PARTITION_SECONDS = 150.0
"""Longer than Ray takes to give a silent node up."""
BLIP_SECONDS = 8.0
"""Shorter than that."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What came of some faults of one kind on one stage."""

    fault: str
    stage: str
    times: int = 0
    lost: int = 0
    """Results of an undisturbed run that are missing or differ."""
    duplicated: int = 0
    """Committed files that were written again."""
    orphans: int = 0
    """Processes that were left behind."""
    recovered: list[float] = dataclasses.field(default_factory=list)
    """Seconds from each fault to the next commit."""
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class Trial:
    """One run of a stage that faults are tried on."""

    stage: Stage
    hosts: Hosts
    chance: random.Random
    outcome: Outcome
    driver: Host
    """Where the command runs."""

    def say(self, text: str) -> None:
        """Note something worth knowing."""
        self.outcome.notes.append(text)
        print(f"    {text}", flush=True)

    def look(self) -> int:
        """Commits so far."""
        self.hosts.tend()
        return self.stage.watch.look()

    def await_that(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition while the stage runs; returns whether it came about."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.stage.running or time.monotonic() > deadline:
                return condition()
            time.sleep(0.1)
        return True

    def moment(self) -> bool:
        """Wait for the moment of a fault: soon after a commit; returns whether the stage still runs."""
        before = self.look()
        self.await_that(lambda: self.look() > before, MOMENT_SECONDS)
        until = time.monotonic() + self.chance.uniform(0.0, 2.0)
        self.await_that(lambda: time.monotonic() > until, 5.0)
        return self.stage.running

    def recover(self, since: float, before: int) -> None:
        """Wait for the next commit after a fault, and note how long it took; a driver that ended is started again."""
        while self.look() <= before and not self.stage.ended:
            if not self.stage.running:
                self.stage.start(self.driver, self.hosts)
            if time.monotonic() - since > RUN_SECONDS:
                raise TimeoutError(f"no commit for {RUN_SECONDS:g} s: {self.stage.log()}")
            time.sleep(0.1)
        self.outcome.recovered.append(time.monotonic() - since)


def kill(trial: Trial) -> None:
    """A worker host loses its power; another one comes."""
    host = trial.chance.choice(trial.hosts.workers)
    trial.hosts.drop(host)
    trial.hosts.grow(wait=False)


def reclaim(trial: Trial) -> None:
    """A spot machine is taken back: notice, grace, and then the end whatever it does; another one comes."""
    host = trial.chance.choice(trial.hosts.workers)
    noticed = time.monotonic()
    host.terminate()
    trial.hosts.grow(wait=False)
    trial.await_that(lambda: not host.processes(), RECLAIM_SECONDS)
    if host.processes():
        trial.say(f"{len(host.processes())} processes still there {RECLAIM_SECONDS:g} s after the notice")
    else:
        trial.say(f"left {time.monotonic() - noticed:.1f} s after the notice")
    trial.hosts.drop(host)


def partition(trial: Trial) -> None:
    """A worker host is cut off until Ray gives it up, and comes back with all that runs on it."""
    trial.hosts.await_nodes(len(trial.hosts.all))  # one that still starts is cut off from nothing
    host = trial.chance.choice(trial.hosts.workers)
    host.cut()
    cut = time.monotonic()
    given_up = trial.await_that(lambda: _given_up(trial.hosts, host), PARTITION_SECONDS)
    lasted, running = time.monotonic() - cut, len(host.processes())
    host.join()
    joined = time.monotonic()
    while given_up and host.processes() and time.monotonic() - joined < 60:
        time.sleep(0.3)
        trial.look()
    left = len(host.processes()) if given_up else 0
    trial.say(
        f"{'given up' if given_up else 'the run ended'} after {lasted:.0f} s; {running} processes when the network "
        f"came back, {left} left {time.monotonic() - joined:.1f} s later"
    )
    trial.outcome.orphans += left
    trial.hosts.drop(host)
    trial.hosts.grow(wait=False)


def _given_up(hosts: Hosts, host: Host) -> bool:
    time.sleep(1)
    states = hosts.states()
    return bool(states) and host.address not in states


def blip(trial: Trial) -> None:
    """A worker host is cut off for some seconds."""
    trial.hosts.await_nodes(len(trial.hosts.all))  # one that still starts is cut off from nothing
    host = trial.chance.choice(trial.hosts.workers)
    host.cut()
    trial.await_that(lambda: False, BLIP_SECONDS)
    host.join()


def head(trial: Trial) -> None:
    """The head's host loses its power and starts again with what its disk holds; the driver is elsewhere."""
    trial.hosts.head.crash()
    time.sleep(trial.chance.uniform(0.0, 5.0))
    trial.hosts.head.start()


def driver(trial: Trial) -> None:
    """The driver is killed and started again."""
    for process in trial.driver.processes():
        if " -m flexmore_ray " in " ".join(process.cmdline()):
            process.kill()
    assert trial.stage.process is not None
    trial.stage.process.wait()


def fill(trial: Trial) -> None:
    """The disk of the results is full; the driver must say so and end, and goes on once there is room."""
    ballast = trial.stage.out / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert trial.stage.process is not None
    while trial.stage.running:
        with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(4096))
        time.sleep(0.1)
    said = trial.stage.log().strip().splitlines()[-1]
    if trial.stage.process.poll() != 1 or not said.startswith("flexmore: "):
        trial.say(f"ended with {trial.stage.process.poll()}: {said}")
    ballast.unlink()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fault on a stage."""

    fault: str
    do: Callable[[Trial], None]
    stages: tuple[str, ...]
    driver_on_worker: bool = False
    """Whether the driver is on a host of its own, beside the head and the workers."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    disk: int | None = None
    """Megabytes of the disk that a run is on; None: as many as there are."""
    skewed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment of hosts that come later."""


def scenarios() -> Iterator[Scenario]:
    """All faults of the cluster."""
    every = ("decompose", "grid", "search")
    served = (*every, "serve")
    yield Scenario(fault="worker node killed, another added", do=kill, stages=served)
    yield Scenario(fault="spot reclaim: SIGTERM and grace", do=reclaim, stages=served)
    yield Scenario(fault="partition until the node is given up", do=partition, stages=served)
    yield Scenario(fault="partition of 8 s", do=blip, stages=every)
    yield Scenario(fault="driver killed", do=driver, stages=every)
    yield Scenario(fault="slow store, worker node killed", do=kill, stages=("grid",), variables=SLOW)
    yield Scenario(fault="clocks 2 hours apart, worker node killed", do=kill, stages=every, skewed=skewed("+2h"))
    yield Scenario(fault="full disk", do=fill, stages=every, disk=40)
    yield Scenario(fault="head restarted", do=head, stages=served, driver_on_worker=True, variables=ROCKSDB)


SLOW = {"CHAOS_WRITE_SECONDS": "1"}
ROCKSDB = {"RAY_gcs_storage": "rocksdb"}
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def skewed(by: str) -> dict[str, str]:
    """Environment of a host whose clock is off while its files have the disk's times; of Debian's package faketime."""
    more = dict.fromkeys(
        ("FAKETIME_DONT_FAKE_MONOTONIC", "FAKETIME_NO_CACHE", "NO_FAKE_STAT"), "1"
    )  # files have theirs
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": by, **more}


TRIES = 4
WORKERS = 1
"""Hosts besides the head's, which works too."""
_EXPECTED: dict[str, Any] = {}


def undisturbed(stage: type[Stage], scratch: Path, hosts: Hosts) -> Any:
    """What the stage ends with on a cluster where nothing happens; run once per process."""
    if stage.name not in _EXPECTED:
        _EXPECTED[stage.name] = _undisturbed(stage, scratch, hosts)
    return _EXPECTED[stage.name]


def _undisturbed(stage: type[Stage], scratch: Path, hosts: Hosts) -> Any:
    run = stage(scratch / "undisturbed")
    for _ in range(TRIES):  # a busy machine may be too slow for Ray, which is no fault of ours
        run.start(hosts.head, hosts)
        assert run.process is not None
        if run.process.wait(timeout=RUN_SECONDS) == 0:
            break
    assert run.ended, run.log()
    return run.result()


def attempt(scenario: Scenario, outcome: Outcome, times: int, seed: int, scratch: Path) -> None:
    """Try a fault so often on a stage, several times in one run where it lasts long enough.

    Args:
        scenario: the fault.
        outcome: of a stage; what comes of it is added there.
        times: how often.
        seed: of the moments and the hosts that it hits.
        scratch: an empty folder.
    """
    chance, kind = random.Random(f"{scenario.fault} {outcome.stage} {seed}"), STAGES[outcome.stage]
    runs = scratch / "runs"
    runs.mkdir(parents=True)
    if scenario.disk:  # mounted before there are hosts, which see what was there when they came
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={scenario.disk}m", "none", runs], check=True)
    hosts = Hosts(scratch, WORKERS, **{**kind.variables, **scenario.variables})
    try:
        driver = hosts.add_idle() if scenario.driver_on_worker else hosts.head
        expected = undisturbed(kind, scratch, hosts)
        if scenario.skewed:
            hosts.variables = dict(scenario.skewed)
            hosts.drop(hosts.workers[0])
            hosts.grow()
        for number in itertools.count():
            if outcome.times >= times:
                break
            stage = kind(runs / str(number))
            trial = Trial(stage=stage, hosts=hosts, chance=chance, outcome=outcome, driver=driver)
            _run(trial, scenario, times)
            _judge(trial, expected)
            shutil.rmtree(stage.out)
    finally:
        left = undrawn(hosts)
    outcome.orphans += len(left)
    outcome.notes += [f"left behind: {title}" for title in left]


def undrawn(hosts: Hosts) -> list[str]:
    """Take a cluster down; returns what was still at work though its driver had ended, or is left after all."""
    left = workers_left(hosts)
    hosts.close()
    return left + processes_left()


def _run(trial: Trial, scenario: Scenario, times: int) -> None:
    started = time.monotonic()
    trial.stage.start(trial.driver, trial.hosts)
    while not trial.stage.ended:
        if time.monotonic() - started > RUN_SECONDS * 2:
            raise TimeoutError(f"{scenario.fault}: the run did not end: {trial.stage.log()}")
        if trial.outcome.times < times and trial.moment():
            before, since = trial.look(), time.monotonic()
            scenario.do(trial)
            trial.outcome.times += 1
            trial.recover(since, before)
        elif not trial.stage.running and not trial.stage.ended:
            trial.say(f"the driver ended and was started again: {trial.stage.log().strip().splitlines()[-1:]}")
            trial.stage.start(trial.driver, trial.hosts)
        else:
            trial.look()
            time.sleep(0.2)


def _judge(trial: Trial, expected: Any) -> None:
    """Compare with the undisturbed run."""
    trial.look()
    watch, found = trial.stage.watch, trial.stage.result()
    if found != expected:
        trial.outcome.lost += 1
        trial.say(f"the result differs from that of an undisturbed run: {trial.stage.out}")
    trial.outcome.lost += len(watch.gone) + len(watch.changed())
    trial.outcome.duplicated += len(watch.twice)
    for path in sorted(watch.twice | watch.gone):
        trial.say(f"written again or gone: {path.relative_to(trial.stage.out)}")
