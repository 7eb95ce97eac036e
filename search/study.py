"""What a search has tried and what it tries next: baselines first, then trials. Knows neither Ray nor models."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import Trial

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.plan import PlannedMixture
from flexmore_ray.spec import ExpertRank
from search.ledger import Entry, Journal, Ledger
from search.samplers import ExhaustedError, FeasibleSampler
from search.space import Point, Space

MAX_FAILURES = 10
"""A search ends after so many failed trials in a row."""
STANDARD = ("full", "public", "uniform", "energy", "entropy", "optimal")
"""Names of the baselines that every search has."""
OWN = ("optimal-expert", "optimal-projection", "optimal-layer")
"""Of these the one of the search's granularity, where it is not the same as "optimal"."""
RESERVED = (*STANDARD, *OWN)
"""Names that no mixture file may have."""
WARM = (*OWN, "optimal", "uniform", "energy")
"""Baselines whose nearest points in the space are the first trials, in this order."""

Identify = Callable[[str, Mapping[str, ExpertRank], int], PlannedMixture]
"""Name, ranks and active experts -> the mixture with its identity."""


class Study:
    """The order of a search, with all that it knows of its entries.

    Args:
        space: what to try.
        sampler: one of `SAMPLERS`.
        seed: of the sampler.
        trials: how many points to try in all, baselines not counted.
        front: whether to look for the whole front of score against cost rather than the best score.
        baselines: what comes first, by name, in order.
        identify: makes mixtures of the space.
        recalled: makes mixtures of any ranks, such as those of the ledger's entries.
        cost: what the budget measures of a mixture.
        budget: its limit.
        ledger: where entries are kept; those that are there are taken over.
        journal: where trials are shown to Optuna's tools.

    Raises:
        UsageError: a mixture file is not what it was when the search began.
        FlexmoreError: the ledger cannot be read.
    """

    def __init__(
        self,
        space: Space,
        *,
        sampler: str,
        seed: int,
        trials: int,
        front: bool,
        baselines: Mapping[str, PlannedMixture],
        identify: Identify,
        recalled: Identify,
        cost: Callable[[PlannedMixture], int],
        budget: int,
        ledger: Ledger,
        journal: Journal,
    ) -> None:
        self.front, self.budget, self.space = front, budget, space
        self._wanted, self._cost, self._identify = trials, cost, identify
        self._ledger, self._journal = ledger, journal
        self._baselines, self._recalled = dict(baselines), recalled
        self.mixtures: dict[int, PlannedMixture] = {}
        """By number, the mixture of an entry."""
        self.entries = ledger.read()
        self.live: dict[int, Trial | None] = {}
        """By number, what runs now."""
        self.reason: str | None = None
        """Why the search ended before all trials; None while it did not."""
        self._ids: set[str] = set()
        self._shown: set[str] = set()  # mixtures that the sampler knows of: two baselines may be the same
        self._study = optuna.create_study(
            directions=["maximize", "minimize"] if front else ["maximize"],
            sampler=FeasibleSampler(sampler, space, seed, self._is_new, fill=not front),
        )
        for entry in self.entries:
            self._recall(entry)

    def _recall(self, entry: Entry) -> None:
        """Take over an entry of an earlier run; one that was running is run again by `next`."""
        mixture = self._recalled(entry.name, entry.ranks, entry.active)
        given = self._baselines.get(entry.name, mixture) if entry.name not in RESERVED else mixture
        if {mixture.mixture_id, given.mixture_id} != {entry.mixture_id}:
            raise UsageError(f"{entry.name} is another mixture than when the search began; give it another name")
        self.mixtures[entry.number] = mixture
        self._ids.add(entry.mixture_id)
        if entry.state != "running":
            self._show(entry)

    def _show(self, entry: Entry) -> None:
        """Put an entry that has ended into the sampler's study, if the space has it, and into the journal."""
        trial = entry.frozen(self.space.distributions, self.budget, front=self.front)
        told = self.live.get(entry.number) is not None
        if entry.point is not None and not told and entry.mixture_id not in self._shown:
            self._study.add_trial(trial)
        self._shown.add(entry.mixture_id)
        self._journal.add(trial)

    def _is_new(self, point: Point) -> bool:
        return self._identify("point", *self.space.assignment(point)).mixture_id not in self._ids

    # ------------------------------------------------------------------------------------- asking

    @property
    def trials(self) -> list[Entry]:
        """The entries that are trials."""
        return [entry for entry in self.entries if entry.kind == "trial"]

    @property
    def ready(self) -> bool:
        """Whether there is an entry to start now."""
        return next(self._left(), None) is not None

    @property
    def ended(self) -> bool:
        """Whether nothing runs and nothing is left to start."""
        return not self.live and not self.ready

    def next(self) -> Entry | None:
        """The next entry to evaluate, noted as running; None where there is none now.

        Trials begin when all baselines have ended.
        """
        made = next(self._left(), None)
        entry = made() if made else None
        if entry is not None:
            entry.started = time.time()
            self._ledger.write(entry)
        return entry

    def _left(self) -> Iterator[Callable[[], Entry | None]]:
        """Ways to make the next entry, the first of which to take."""
        for entry in self.entries:
            if entry.state == "running" and entry.number not in self.live:
                yield functools.partial(self._resume, entry)
        there = {entry.name for entry in self.entries}
        for name, mixture in self._baselines.items():
            if name not in there:
                yield functools.partial(self._start, mixture, "baseline", self._point(mixture), None)
        if any(entry.kind == "baseline" and entry.state == "running" for entry in self.entries):
            return
        if self.reason is None and len(self.trials) < self._wanted:
            yield self._ask

    def _resume(self, entry: Entry) -> Entry:
        """Run an entry again that an earlier run had begun."""
        trial = None
        if entry.kind == "trial":
            assert entry.point is not None
            trial = self._enqueued(entry.point, entry.system)
            self._constrain(trial, entry.cost)
        self.live[entry.number] = trial
        entry.rungs, entry.groups, entry.documents, entry.seconds = [], {}, 0, 0.0
        return entry

    def _ask(self) -> Entry | None:
        warm, point = next(self._warm(), (None, None))
        try:
            trial = self._enqueued(point) if point else self._suggested()
        except ExhaustedError:
            self.reason = "every assignment within the budget has been tried"
            return None
        ranks, active = self.space.assignment(trial.params)
        name = f"trial-{_first_free(int(entry.name.removeprefix('trial-')) for entry in self.trials)}"
        return self._start(self._identify(name, ranks, active), "trial", dict(trial.params), trial, warm)

    def _warm(self) -> Iterator[tuple[str, Point]]:
        """Baselines whose nearest points are not tried yet, with these points."""
        given = {entry.name: entry for entry in self.entries if entry.kind == "baseline"}
        for name in filter(given.__contains__, WARM):
            point = self.space.nearest(given[name].ranks, given[name].active)
            if self._is_new(point):
                yield name, point

    def _enqueued(self, point: Point, system: Mapping[str, Any] | None = None) -> Trial:
        """A trial at a point; with what a sampler noted of it in an earlier run."""
        noted = {"fixed_params": dict(point), **(system or {})}
        self._study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=noted))
        return self._suggested()

    def _suggested(self) -> Trial:
        trial = self._study.ask()
        try:
            for name, bounds in self.space.distributions.items():
                trial.suggest_int(name, bounds.low, bounds.high)
        except ExhaustedError:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        return trial

    def _start(
        self, mixture: PlannedMixture, kind: Any, point: Point | None, trial: Trial | None, warm: str | None = None
    ) -> Entry:
        cost = self._cost(mixture)
        entry = Entry(
            number=_first_free(other.number for other in self.entries),
            name=mixture.name,
            kind=kind,
            ranks=dict(mixture.spec.ranks),
            active=mixture.active,
            mixture_id=mixture.mixture_id,
            parameters=mixture.parameters,
            cost=cost,
            fits=cost <= self.budget,
            point=point,
            warm=warm,
        )
        if trial is not None:
            self._constrain(trial, cost)
            noted = self._study.get_trials(deepcopy=False)[trial.number].system_attrs
            entry.system = {key: value for key, value in noted.items() if "generation" in key}
        self.entries.append(entry)
        self.mixtures[entry.number] = mixture
        self._ids.add(mixture.mixture_id)
        self.live[entry.number] = trial
        return entry

    def _constrain(self, trial: Trial, cost: int) -> None:
        trial.set_constraint("budget", float(cost - self.budget))

    def _point(self, mixture: PlannedMixture) -> Point | None:
        """The point of a mixture; None where the space has none that is the same."""
        point = self.space.nearest(mixture.spec.ranks, mixture.active)
        same = self._identify("point", *self.space.assignment(point))
        return point if same.mixture_id == mixture.mixture_id else None

    # ------------------------------------------------------------------------------------ telling

    def report(self, entry: Entry, score: float, groups: Mapping[str, float], documents: int, seconds: float) -> None:
        """Note the score of a running entry at its next rung.

        Args:
            entry: what `next` gave.
            score: on all documents up to this rung.
            groups: the same by group.
            documents: number of all these documents.
            seconds: that this rung took.
        """
        trial = self.live[entry.number]
        if trial is not None and not self.front:
            trial.report(score, len(entry.rungs))
        entry.rungs.append(score)
        entry.groups, entry.documents = dict(groups), documents
        entry.seconds += seconds

    def finish(self, entry: Entry, state: Any, error: str | None = None) -> None:
        """Note how a running entry ended.

        Args:
            entry: what `next` gave.
            state: complete, stopped or failed.
            error: why it failed, one line; None if it did not.

        Raises:
            FlexmoreError: a baseline failed, without which nothing can be compared.
        """
        if entry.kind == "baseline" and state == "failed":  # the ledger still has it as running, to be run again
            raise FlexmoreError(f"baseline {entry.name}: {error}; what was finished is kept")
        entry.state, entry.error, entry.finished = state, error, time.time()
        self._ledger.write(entry)
        trial = self.live.get(entry.number)
        if trial is not None:
            values = ([entry.value, float(entry.cost)] if self.front else entry.value) if state == "complete" else None
            told = {"complete": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}[state]
            self._study.tell(trial, values, state=optuna.trial.TrialState[told])
        self._show(entry)
        del self.live[entry.number]
        self.reason = self.broken or self.reason

    def merit(self, entry: Entry, rung: int) -> float:
        """What early stopping compares at a rung: the score, or for a front how far it is above the baselines'."""
        score = entry.rungs[rung]
        if not self.front:
            return score
        ended = [other for other in self.entries if other.kind == "baseline" and other.state == "complete"]
        return score - max((other.rungs[rung] for other in ended if other.cost <= entry.cost), default=0.0)

    @property
    def broken(self) -> str | None:
        """That the last trials failed, as many as end a search, and why; None where they did not."""
        last = [entry for entry in self.trials if entry.state != "running"][-MAX_FAILURES:]
        if [entry.state for entry in last] != ["failed"] * MAX_FAILURES:
            return None
        return f"{MAX_FAILURES} trials in a row failed, the last with: {last[-1].error}"

    @property
    def best(self) -> Entry | None:
        """The first of `ranking`; None before there is one."""
        return next(iter(self.ranking), None)

    @property
    def ranking(self) -> Sequence[Entry]:
        """The complete entries within the budget, the highest score first, of equals the cheapest; no mixture twice."""
        fitting = [entry for entry in self.entries if entry.state == "complete" and entry.fits]
        found: dict[str, Entry] = {}
        for entry in sorted(fitting, key=lambda entry: (-entry.value, entry.cost, entry.number)):
            found.setdefault(entry.mixture_id, entry)
        return list(found.values())


def _first_free(numbers: Iterable[int]) -> int:
    """The lowest number that is not taken: one is free where a damaged file of the ledger was deleted."""
    taken = set(numbers)
    return next(number for number in itertools.count() if number not in taken)
