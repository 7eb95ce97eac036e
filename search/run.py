"""A search from its plan to its files: run it on Ray, score the best on the test split, write it down."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexmore_ray.atomic import alone, remove_abandoned
from flexmore_ray.budget import Spectra
from flexmore_ray.errors import FlexmoreError
from flexmore_ray.experts import ExpertActors
from flexmore_ray.factors import base_spec, serve_factors
from flexmore_ray.metrics import SearchMetrics
from flexmore_ray.placement import check_room
from flexmore_ray.plan import PlannedMixture
from flexmore_ray.runtime import cluster, nodes, on_running_cluster
from flexmore_ray.scores import DEFAULT_SEED, TaskScore
from flexmore_ray.spec import DROP
from flexmore_ray.storage import AnyPath
from flexmore_ray.store import FactorSource
from flexmore_ray.worker import Worker
from flexmore_ray.written import remember
from search.engine import Job, ScoreError, run_jobs
from search.ledger import Entry, Journal, Ledger, front
from search.objective import Block
from search.plan import Mixtures, Search
from search.progress import Progress
from search.report import write_report
from search.study import STANDARD, Study
from search.verdict import conclude


class _Run:
    """The source of jobs: the study's entries, then the best of them and the baselines on the test split."""

    def __init__(self, search: Search, study: Study, progress: Progress) -> None:
        self._search, self._objective, self._study, self._progress = search, search.objective, study, progress
        self._running: dict[str, Entry] = {}
        self._tests: list[PlannedMixture] | None = None
        self._testing: dict[str, PlannedMixture] = {}

    @property
    def ended(self) -> bool:
        """Whether everything is scored."""
        return self._study.ended and not self._waiting() and not self._testing

    @property
    def idle(self) -> bool:
        """Whether the next jobs depend on how those that run end."""
        return not self.ended and not self._study.ready and not self._waiting()

    def _waiting(self) -> list[PlannedMixture]:
        """Mixtures to score on the test split; known once the study has ended."""
        if self._tests is None:
            if not self._study.ended:
                return []
            entries = {entry.mixture_id: entry for entry in reported(self._study, self._search.settings.finalists)}
            mixtures = [self._study.mixtures[entry.number] for entry in entries.values()]
            self._tests = [m for m in mixtures if not self._objective.known(m.mixture_id, self._objective.test)]
            self._progress.testing(len(self._tests))
        return self._tests

    def next(self) -> Job | None:
        """The next job; None where there is none now."""
        entry = self._study.next()
        if entry is not None:
            mixture = self._study.mixtures[entry.number]
            self._running[entry.name] = entry
            self._note()
            rungs = self._objective.rungs
            known = next((i for i, blocks in enumerate(rungs) if not self._known(mixture, blocks)), len(rungs))
            return self._job(mixture, rungs, known=known, may_stop=entry.kind == "trial")
        if self._study.live or not self._waiting():
            return None
        assert self._tests is not None
        mixture = self._tests.pop(0)
        name = f"test-{mixture.name}"
        self._testing[name] = mixture
        self._note()
        return self._job(dataclasses.replace(mixture, name=name), [self._objective.test], known=0, may_stop=False)

    def _note(self) -> None:
        self._progress.at_work = len(self._running) + len(self._testing)

    def _known(self, mixture: PlannedMixture, blocks: Sequence[Block]) -> bool:
        return self._objective.known(mixture.mixture_id, blocks)

    @staticmethod
    def _job(mixture: PlannedMixture, rungs: Sequence[Sequence[Block]], *, known: int, may_stop: bool) -> Job:
        ranks, active = dict(mixture.spec.ranks), mixture.active
        return Job(name=mixture.name, ranks=ranks, active=active, rungs=rungs, known=known, may_stop=may_stop)

    def receive(self, job: Job, rung: int, scores: Mapping[Block, TaskScore], seconds: float) -> float | None:
        """Commit a rung's cells; returns the merit of the score on all documents so far."""
        testing = self._testing.get(job.name)
        entry = None if testing else self._running[job.name]
        mixture = testing or self._study.mixtures[self._running[job.name].number]
        for block, score in scores.items():
            self._check(block, score.value)
            self._objective.take(mixture, block, score, self._search.weights)
        self._progress.scored(sum(score.documents for score in scores.values()))
        if entry is None or rung < len(entry.rungs):  # the test split, or an actor that died and began again
            return None
        found = self._objective.scores(mixture.mixture_id, rung)
        for task in found.tasks.values():
            self._check(task.task, task.value)
        self._study.report(entry, found.score, found.groups, self._objective.documents(rung), seconds)
        comparable = entry.kind == "trial" or (entry.fits and not self._search.settings.front)
        return self._study.merit(entry, rung) if comparable else None

    @staticmethod
    def _check(what: Block | str, value: float) -> None:
        if not math.isfinite(value):
            task = what if isinstance(what, str) else what.task
            raise ScoreError(f"task {task}: its score is {value}, not a number")

    def finish(self, job: Job, error: str | None, *, stopped: bool) -> None:
        """Note how a job ended."""
        if job.name in self._testing:
            mixture = self._testing.pop(job.name)
            self._note()
            if error:
                raise FlexmoreError(f"{mixture.name} on the test split: {error}; what was finished is kept")
            return
        entry = self._running.pop(job.name)
        self._note()
        self._study.finish(entry, "failed" if error else "stopped" if stopped else "complete", error)
        self._objective.release(entry.mixture_id)
        self._progress.ended(entry)


def reported(study: Study, finalists: int) -> list[Entry]:
    """The entries that are scored on the test split: the best few, then the baselines."""
    best = list(study.ranking[:finalists])
    return best + [entry for entry in study.entries if entry.kind == "baseline" and entry not in best]


def run_search(search: Search, worker: type[Worker] = Worker) -> dict[str, Any]:
    """Run a search, or go on with it, to its files; what is done already is not done again.

    Args:
        search: the search.
        worker: what scores the mixtures.

    Returns:
        What `final.json` holds, with the paths of the files.

    Raises:
        UsageError: no node has what a worker needs, another search is in the folder, or one is running there.
        FlexmoreError: a baseline failed, ten trials in a row did, or files cannot be written.
    """
    options, objective = search.options, search.objective
    with alone(search.out, "search"):
        ledger = Ledger(search.out)
        ledger.claim(search.identity(), search.notes())
        for folder in (search.out, objective.results):
            remove_abandoned(folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(cluster(runs=f"search {search.out.name}"))
            if options.workers is None or not on_running_cluster():  # else an autoscaler may add nodes for them
                check_room({"worker": options.needs}, nodes())
            factors = stack.enter_context(_factors(search))
            mixtures = Mixtures(search, _spectra(search, factors))
            journal = Journal(search.out / "journal.log", front=search.settings.front)
            study = _study(search, mixtures, ledger, journal)
            progress = stack.enter_context(_progress(search, study))
            run_jobs(
                _Run(search, study, progress),
                _worker(worker, search, factors, hold_rank(search, mixtures, study)),
                {(split, name): t.content_hash for split, s in objective.sets.items() for name, t in s.tasks.items()},
                options.needs,
                rungs=objective.num_rungs,
                reduction=search.settings.reduction,
                workers=options.workers,
                recalled=_recalled(study),
                tell=progress.tell,
                name=f"search:{search.out.name}",
            )
        ledger.write_tables(study.entries)
        journal.send()
        if study.broken:
            raise FlexmoreError(f"{study.broken}; what was finished is kept in {search.out}")
        return _conclude(search, study, ledger)


def _factors(search: Search) -> contextlib.AbstractContextManager[FactorSource]:
    options = search.options
    rank = search.settings.max_rank or search.parts.source.shape.full_rank
    return serve_factors(
        search.parts,
        search.store,
        rank,
        options.needs if options.workers is None or not on_running_cluster() else None,
        expert_gpus=options.expert_gpus,
        pin=options.pin,
        run=f"search:{search.out.name}",
    )


def _progress(search: Search, study: Study) -> Progress:
    metrics = SearchMetrics(search.out.name, search.options.needs)
    return Progress(study, search.settings.trials, search.budget.limit, metrics)


def _spectra(search: Search, factors: FactorSource) -> Spectra:
    """Singular values of every delta that is not low-rank by birth; decomposes what is not in the store."""
    if isinstance(factors, ExpertActors):
        print("decomposing what the store lacks", flush=True)
        factors.complete()
    source = search.parts.source
    keys = [key for name in search.experts for key in source.shape.keys(name) if key not in source.born_ranks]
    return {key: factors.spectrum(key).numpy() for key in keys}


def _study(search: Search, mixtures: Mixtures, ledger: Ledger, journal: Journal) -> Study:
    settings = search.settings
    return Study(
        search.space(mixtures.fits),
        sampler=settings.sampler,
        seed=settings.seed,
        trials=settings.trials,
        front=settings.front,
        baselines=mixtures.baselines(),
        identify=mixtures.of_point,
        recalled=mixtures.named,
        cost=mixtures.cost,
        budget=search.budget.limit,
        ledger=ledger,
        journal=journal,
    )


def hold_rank(search: Search, mixtures: Mixtures, study: Study) -> int:
    """The highest rank of a low-rank matrix in any mixture of the search."""
    nothing = dict.fromkeys(search.experts, DROP)
    highest = [mixture.highest_rank for mixture in mixtures.baselines().values() if mixture.uses_factors]
    for rank in study.space.levels[1:-1]:
        for name in search.experts:
            alone_ = {**nothing, name: rank}
            if mixtures.fits(alone_, 1):
                highest.append(mixtures.of_point("point", alone_, 1).highest_rank)
    return max(highest, default=0)


def _worker(worker: type[Worker], search: Search, factors: FactorSource, rank: int) -> Worker:
    arguments = {"tasks": search.objective.sets["validation"].suite, "seed": DEFAULT_SEED}
    return worker(
        base_spec(search.parts, search.store),
        {"validation": arguments, "test": arguments},
        factors,
        search.options.device,
        search.objective.dtype,
        rank,
    )


def _recalled(study: Study) -> dict[int, list[float]]:
    """Merits of the entries of earlier runs that early stopping compares with."""
    ended = [entry for entry in study.entries if entry.state in ("complete", "stopped")]
    chosen = [entry for entry in ended if entry.kind == "trial" or (entry.fits and not study.front)]
    return {entry.number: [study.merit(entry, rung) for rung in range(len(entry.rungs))] for entry in chosen}


def _conclude(search: Search, study: Study, ledger: Ledger) -> dict[str, Any]:
    """Compare the best with the baselines on the test split, and write the files of the search."""
    finalists = study.ranking[: search.settings.finalists]
    entries = reported(study, search.settings.finalists)
    scores = [search.objective.test_scores(entry.mixture_id) for entry in entries]
    final = conclude(entries, finalists, scores)
    states = [entry.state for entry in study.trials]
    final |= {
        "documents": {
            "trials": sum(entry.documents for entry in study.trials),
            "baselines": sum(entry.documents for entry in study.entries if entry.kind == "baseline"),
            "test": len(entries) * search.objective.test_documents,
            "per_full_trial": search.objective.documents(search.objective.num_rungs - 1),
        },
        "stopped": states.count("stopped"),
        "failed": states.count("failed"),
        "seconds": sum(entry.seconds for entry in study.entries),
        "notes": _notes(search, study),
    }
    winner = next(entry for entry in entries if entry.name == final["winner"])
    save_mixture(search, winner, search.out / "winner.yaml")
    ledger.write_json("final.json", final)
    report = write_report(search.out)
    more = {"mixture": str(search.out / "winner.yaml"), "front": _front(study), "objective": search.settings.objective}
    return final | report | more


def _notes(search: Search, study: Study) -> list[str]:
    """What did not go as asked, a sentence each."""
    missing = [name for name in STANDARD if name not in {entry.name for entry in study.entries}]
    ended = [f"It ended before all {search.settings.trials} trials: {study.reason}."] if study.reason else []
    return ended + ([f"Baselines left out, as none of the kind fits: {', '.join(missing)}."] if missing else [])


def _front(study: Study) -> list[dict[str, Any]]:
    """The Pareto front on the validation split, by cost."""
    return [{name: getattr(entry, name) for name in ("name", "cost", "value")} for entry in front(study.entries)]


def save_mixture(search: Search, entry: Entry, path: AnyPath) -> None:
    """Write the mixture file of an entry."""
    store = str(search.store) if search.options.store else None
    spec = dataclasses.replace(search.parts.spec, ranks=entry.ranks, active=entry.active, store=store, mixture_id=None)
    spec.save(path)
    remember(path.read_bytes())
