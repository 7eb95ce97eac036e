"""How long a grid or a search would take: discrete events under the scheduler that really runs it.

    calibration (what a cell costs) + plan (which cells)  ->  units  ->  Simulated (pool.Pool)  ->  makespan, cost

`Simulated` is the grid's own pool on a simulated clock: which worker gets which unit, how far ahead, how many workers
there are and how much a worker helps with another's mixture is decided by the code of `pool`, not by a model of it.
What is modelled is time, see `Timing`. All times are seconds. Nothing here starts Ray.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from flexmore_ray.errors import UsageError
from flexmore_ray.grid import _COMMITS, _WRITERS
from flexmore_ray.placement import Needs
from flexmore_ray.pool import _IDLE_SECONDS, _LOOK_SECONDS, Pool, Queue, Unit, _Member
from flexmore_ray.simulate.calibrate import Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a unit asks of a worker."""

    mixture: Hashable
    seconds: float
    """That are recorded for it."""
    documents: int = 0
    content: Hashable = None
    """Which documents these are."""
    experts: tuple[str, ...] = ()
    """Experts whose factors it needs."""
    early: bool = False
    """Whether the second stage waits for it."""


def new_unit(work: Work, tag: Any) -> Unit:
    """A unit of simulated work; `tag` names its cell."""
    return Unit(group=work.mixture, arguments=(work, tag), tag=tag)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A unit on a worker."""

    worker: int
    """From 0, in the order in which they were started."""
    tag: Any
    begin: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a simulated run went."""

    workers: int
    """As many as were started: fewer than asked where there is less to do."""
    makespan: float
    """From the beginning of the run to its last commit."""
    scoring: float
    """Sum over workers of the time spent on units; waiting for factors is not in it."""
    held: float
    """Sum over workers of the time from their creation to their end, which is what they cost."""
    bounds: Mapping[str, float]
    """What the run takes by each of these alone: work, start, decomposition, longest unit, commits."""
    spans: Sequence[Span]
    """Every unit, in the order in which they were given out."""

    @property
    def busy(self) -> float:
        """Share of the workers' time that is spent on units, in [0, 1]."""
        return self.scoring / self.held if self.held else 1.0

    @property
    def limit(self) -> str:
        """What takes longest by itself: the key of the largest of `bounds`."""
        return max(self.bounds, key=lambda name: self.bounds[name])


# ------------------------------------------------------------------------------------- the pool


@dataclasses.dataclass(eq=False, frozen=True)
class _Reference:
    """Stands for Ray's reference of a result."""

    actor: _Actor
    seconds: float
    """That the unit took; of a start, 0."""


class _Clock:
    """Simulated time, what happens when, and what all workers share."""

    def __init__(self, timing: Timing) -> None:
        self.now, self.timing = 0.0, timing
        self.events: list[tuple[float, int, _Reference]] = []
        self.factors: dict[str, float] = {}  # by expert, from when on its factors are there
        self.spans: list[Span] = []
        self.actors, self.held = 0, 0.0
        self._numbers = itertools.count()

    def plan(self, when: float, reference: _Reference) -> _Reference:
        """Let a result be there at a time; of equal times the first planned comes first."""
        heapq.heappush(self.events, (when, next(self._numbers), reference))
        return reference

    def factors_of(self, expert: str, asked: float) -> float:
        """When an expert's factors are there, if a worker asks for them at a time."""
        return self.factors.setdefault(expert, asked + self.timing.decompose)


class _Actor:
    """A worker: one unit after the other, in the order in which they were given."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._free = clock, 0.0
        self.made = clock.now
        self.member: Any = None
        self._held: Hashable | None = None
        self._seen: set[Hashable] = set()
        self.number = clock.actors
        clock.actors += 1
        self.start, self.run = _Method(self._start), _Method(self._run)

    def _start(self) -> _Reference:
        self._free = self._clock.now + self._clock.timing.start
        return self._clock.plan(self._free, _Reference(self, 0.0))

    def _run(self, work: Work, tag: Any) -> _Reference:
        clock = self._clock
        begin = max(clock.now, self._free)
        begin = max([begin, *(clock.factors_of(name, begin) for name in work.experts)])
        seconds = duration(work, clock.timing, self._held, self._seen)
        self._free, self._held = begin + seconds, work.mixture
        self._seen.add(work.content)
        clock.spans.append(Span(worker=self.number, tag=tag, begin=begin, end=self._free))
        return clock.plan(self._free, _Reference(self, seconds))


def duration(work: Work, timing: Timing, held: Hashable | None, seen: Set[Hashable]) -> float:
    """Seconds of a unit on a worker.

    Args:
        work: the unit's.
        timing: what it costs beside its own seconds.
        held: the mixture of the worker's last unit; None for its first, whose loading is part of the start.
        seen: the documents that the worker has had.
    """
    switch = timing.switch if held not in (None, work.mixture) else 0.0
    first = timing.first * work.documents if work.content not in seen else 0.0
    return work.seconds + timing.unit + switch + first


@dataclasses.dataclass(frozen=True)
class _Method:
    """Stands for a method of a Ray actor."""

    remote: Callable[..., _Reference]


class Simulated(Pool):
    """The grid's pool on a simulated clock: only what asks Ray or the time of day is another.

    Args:
        workers: how many.
        timing: of the clock.
    """

    def __init__(self, workers: int, timing: Timing) -> None:
        self.clock = _Clock(timing)
        self._workers, self._seen = workers, -math.inf
        self.most = 0
        """Workers at once, at most."""
        super().__init__(lambda: _Actor(self.clock), Needs(), workers)

    def _resize(self, waiting: int) -> None:
        """As many as there is work for, and none that had nothing to do for long; see `Pool._resize`."""
        now = self.clock.now
        if now - self._seen < _LOOK_SECONDS:
            return
        self._seen = now
        busy = sum(bool(member.units) for member in self._members)
        for _ in range(len(self._members), min(self._workers, busy + waiting)):
            actor = self._create()
            actor.member = _Member(actor=actor, ready=actor.start.remote(), busy=now)
            self._members.append(actor.member)
        self.most = max(self.most, len(self._members))
        for member in list(self._members):
            if member.units or waiting:
                member.busy = now
            elif now - member.busy > _IDLE_SECONDS:
                self._members.remove(member)
                self.clock.held += now - member.actor.made

    def _next_look(self, waiting: int) -> float:
        """When the pool may grow or shrink before anything else happens."""
        if waiting:
            return self._seen + _LOOK_SECONDS if len(self._members) < self._workers else math.inf
        idle = (member.busy for member in self._members if not member.units)
        return max(self._seen, min(idle, default=math.inf) + _IDLE_SECONDS) + _LOOK_SECONDS

    def _collect(self, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        """Rounds of `_round` for as long as nobody but who had a result can take a unit: `run` looks at all members."""
        while True:
            waiting = len(queue)
            yield from self._round(queue)
            if len(queue) > waiting or not queue or len(self._members) < self._workers:
                return
            for member in sorted(self._returned, key=lambda member: member.actor.number):
                self._feed(member, queue)

    def _round(self, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        """What is there at the time of the next event, as `Pool._collect` takes it in."""
        clock, events = self.clock, self.clock.events
        self._returned: list[_Member] = []
        look = self._next_look(len(queue))
        if look < (events[0][0] if events else math.inf):
            clock.now = max(clock.now, look)
            return
        clock.now = max(clock.now, events[0][0])
        while events and events[0][0] <= clock.now:
            reference = heapq.heappop(events)[2]
            member = reference.actor.member
            member.busy = clock.now
            self._returned.append(member)
            if reference is member.ready:
                member.node = "node"
            else:
                clock.now += clock.timing.driver
                yield member.units.pop(reference), reference.seconds

    def close(self) -> None:
        """Note until when workers were held."""
        self.clock.held += sum(self.clock.now - member.actor.made for member in self._members)
        self._members.clear()


class _Commits:
    """The threads that commit, as many as the grid has."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._threads = [0.0] * _WRITERS
        self._under_way: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin(self, tag: Any) -> None:
        """Commit a cell; where too many are under way the driver waits for the first of them."""
        end = max(self._clock.now, heapq.heappop(self._threads)) + self._clock.timing.commit
        heapq.heappush(self._threads, end)
        heapq.heappush(self._under_way, (end, next(self._numbers), tag))
        if len(self._under_way) >= _COMMITS:
            self.wait()

    def wait(self) -> None:
        """Let time pass until a commit is over."""
        self._clock.now = max(self._clock.now, self._under_way[0][0])

    def finished(self) -> Iterator[Any]:
        """The cells whose commit is over by now."""
        while self._under_way and self._under_way[0][0] <= self._clock.now:
            yield heapq.heappop(self._under_way)[2]


def simulate(units: Sequence[Unit], workers: int, timing: Timing, later: Sequence[Unit] = ()) -> Outcome:
    """Run units on simulated workers.

    Args:
        units: made by `new_unit`; those of one tag are one cell, which is committed when all are done.
        workers: how many.
        timing: what things take.
        later: units that are added once all cells whose units are `early` are committed.

    Raises:
        UsageError: fewer than one worker.
    """
    if workers < 1:
        raise UsageError(f"--workers: at least 1, got {workers}")
    pool = Simulated(workers, timing)
    clock, queue, commits = pool.clock, Queue(units), _Commits(pool.clock)
    left = Counter(unit.tag for unit in (*units, *later))
    early = {unit.tag for unit in units if unit.arguments[0].early}
    cells, waiting, scoring = len(left), list(later), 0.0
    while queue or commits or waiting:
        for unit, seconds in pool.run(queue):
            scoring += seconds
            left[unit.tag] -= 1
            if not left[unit.tag]:
                commits.begin(unit.tag)
            waiting = _settle(commits, early, waiting, queue)
        if commits:
            commits.wait()
        waiting = _settle(commits, early, waiting, queue)
    pool.close()
    return Outcome(
        workers=pool.most,
        makespan=clock.now,
        scoring=scoring,
        held=clock.held,
        bounds=_bounds(units, later, workers, cells, scoring, timing),
        spans=clock.spans,
    )


def _settle(commits: _Commits, early: set[Any], waiting: list[Unit], queue: Queue) -> list[Unit]:
    """Take note of the commits that are over; begins the second stage when the first is: what still waits."""
    early.difference_update(commits.finished())
    if early or not waiting:
        return waiting
    for unit in waiting:
        queue.add(unit)
    return []


def _bounds(
    units: Sequence[Unit], later: Sequence[Unit], workers: int, cells: int, scoring: float, timing: Timing
) -> dict[str, float]:
    def longest(some: Iterable[Unit]) -> float:
        return max((unit.arguments[0].seconds for unit in some), default=0.0)

    first = longest(unit for unit in units if unit.arguments[0].early or not later)
    needed = any(unit.arguments[0].experts for unit in (*units, *later))
    return {
        "work": scoring / workers,
        "start": timing.start,
        "decomposition": timing.decompose if needed else 0.0,
        "longest unit": max(longest(units), first + longest(later)),
        "commits": max(cells * timing.commit / _WRITERS, (len(units) + len(later)) * timing.driver),
    }
