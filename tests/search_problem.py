"""A search problem with synthetic scores, and a ledger and a journal in memory, for the tests of studies."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from flexmore_ray.plan import PlannedMixture
from flexmore_ray.spec import DROP, FULL, MixtureSpec
from search.ledger import Entry
from search.space import Space
from search.study import Study

TIMES = ("started", "finished")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Scores and costs of assignments, made up: each expert's level adds its part."""

    experts: tuple[str, ...]
    full_rank: int
    gains: np.ndarray
    """(experts, levels)"""
    costs: np.ndarray
    budget: float
    actives: tuple[int, ...] = (9,)
    baselines: tuple[str, ...] = ("full", "public", "uniform")

    @functools.cached_property
    def space(self) -> Space:
        return Space(experts=self.experts, full_rank=self.full_rank, actives=self.actives, fits=self.fits)

    @functools.cached_property
    def _place(self) -> dict[object, int]:
        return {level: i for i, level in enumerate(self.space.levels)}

    def fits(self, ranks, active) -> bool:
        return self.sum(self.costs, ranks) <= self.budget

    def sum(self, table, ranks) -> float:
        return sum(table[i][self._place[ranks[name]]] for i, name in enumerate(self.experts))

    def score(self, mixture: PlannedMixture) -> float:
        """Depends on ranks, and a little on the number of active experts."""
        return 0.1 + 0.8 * float(self.sum(self.gains, mixture.spec.ranks)) - 0.01 * abs(mixture.active - 2)

    def cost(self, mixture: PlannedMixture) -> int:
        return math.ceil(self.sum(self.costs, mixture.spec.ranks))

    def identify(self, name, ranks, active) -> PlannedMixture:
        """Equal ranks and equally many active experts of those kept are one mixture."""
        active = min(active, 1 + sum(rank != DROP for rank in ranks.values()))
        text = json.dumps([dict(ranks), active], sort_keys=True)
        return PlannedMixture(
            name=name,
            spec=MixtureSpec(ranks=ranks, active=active, mixture_id=hashlib.sha256(text.encode()).hexdigest()[:16]),
            active=active,
            parameters=1000,
            full_parameters=9999,
            kept=("public",),
            highest_rank=1,
            uses_factors=True,
            pair=None,
            rank=None,
        )

    def recalled(self, name, ranks, active) -> PlannedMixture:
        """A mixture of the ledger."""
        return self.identify(name, ranks, active)

    def uniform(self):
        """The highest level for all experts that fits."""
        fitting = [level for level in self.space.levels if self.fits(dict.fromkeys(self.experts, level), 9)]
        return max(fitting, key=self._place.__getitem__)

    def mixture(self, baseline: str) -> PlannedMixture:
        level = {"full": FULL, "public": DROP}.get(baseline) or self.uniform()
        ranks = dict.fromkeys(self.experts, level)
        if baseline == "energy":  # as "uniform", but for one expert
            ranks[self.experts[0]] = DROP
        return self.identify(baseline, ranks, max(self.actives))


class MemoryLedger:
    """A ledger that remembers every write, through JSON as files do."""

    def __init__(self, writes: Sequence[str] = ()) -> None:
        self.writes = list(writes)

    def write(self, entry: Entry) -> None:
        self.writes.append(json.dumps(dataclasses.asdict(entry)))

    def read(self) -> list[Entry]:
        last = {data["number"]: data for data in map(json.loads, self.writes)}
        return [Entry(**data) for _, data in sorted(last.items())]


class MemoryJournal:
    """A journal that only remembers."""

    def __init__(self) -> None:
        self.trials = []

    def add(self, trial) -> None:
        self.trials.append(trial)


def study_of(problem, *, sampler="tpe", seed=0, trials=20, front=False, ledger=None, journal=None) -> Study:
    return Study(
        problem.space,
        sampler=sampler,
        seed=seed,
        trials=trials,
        front=front,
        baselines={name: problem.mixture(name) for name in problem.baselines},
        identify=problem.identify,
        recalled=problem.recalled,
        cost=problem.cost,
        budget=math.floor(problem.budget),
        ledger=ledger if ledger is not None else MemoryLedger(),
        journal=journal or MemoryJournal(),
    )


def always(entry) -> str:
    return "complete"


def varied(entry) -> str:
    """By its mixture, a trial completes, is stopped early or fails."""
    number = int(entry.mixture_id, 16) % 7
    return "complete" if entry.kind == "baseline" or number > 2 else "failed" if number == 2 else "stopped"


def score(study, problem, entry, ending=always, rungs=1) -> None:
    """Evaluate an entry to its end."""
    state = ending(entry)
    mixture = study.mixtures[entry.number]
    assert mixture.mixture_id == entry.mixture_id
    reached = {"complete": rungs, "stopped": max(1, rungs - 1), "failed": rungs // 2}[state]
    for rung in range(reached):
        noise = (int(entry.mixture_id, 16) % 1000 / 1000 - 0.5) * 0.02 * (rungs - 1 - rung)
        value = problem.score(mixture) + noise
        study.report(entry, value, {"all": value, "rung": float(rung)}, 100 * (rung + 1), 0.5)
    study.finish(entry, state, "it broke" if state == "failed" else None)


def run(study, problem, ending=always, rungs=1) -> Study:
    """One entry after the other, to the end."""
    while (entry := study.next()) is not None:
        assert study.live
        score(study, problem, entry, ending, rungs)
    assert study.ended
    assert not study.live
    return study


def rows(entries) -> list[dict]:
    """The table of a search without its clock."""
    return [{name: value for name, value in entry.row().items() if name not in TIMES} for entry in entries]


def some_problem(seed=0, *, experts=3, full_rank=32, share=0.4, **changes) -> Problem:
    rng = np.random.default_rng(seed)
    levels = 2 + max(full_rank - 1, 0).bit_length()
    gains = np.sort(rng.random((experts, levels)), axis=1) / experts
    prices = rng.integers(1, 4, (experts, 1))
    costs = prices * np.array([0, *(2**k for k in range(levels - 2)), full_rank])
    names = tuple("abcdefgh"[:experts])
    return Problem(names, full_rank, gains, costs, share * costs[:, -1].sum(), **changes)


PROBLEM = some_problem(4, experts=3, full_rank=32, share=0.5, actives=(1, 2, 3, 4))
