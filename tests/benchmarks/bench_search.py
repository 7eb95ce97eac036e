"""The search: seconds per trial against a fresh actor per trial, Tune's overhead, what early stopping saves.

    python -m tests.benchmarks --only search [--quick]

The usual way with Tune is a function that loads the model and the tasks, in an actor of its own for every trial. It
gets the mixtures that a search tried, on the same documents, with as many actors at once, and must find the same
scores. Per trial, the time from the end of the first trial to that of the last, which leaves the start of both out,
and all of it. The overhead is that of trials that score nothing: of Tune alone, and of a whole search.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray import tune

from flexmore_ray.build import build_store
from flexmore_ray.evaluate import use_few_threads
from flexmore_ray.factors import base_spec
from flexmore_ray.grid import Options
from flexmore_ray.harness import MixtureLM
from flexmore_ray.mixture import load_mixture
from flexmore_ray.runtime import cluster
from flexmore_ray.scores import DEFAULT_SEED, TaskScore, TaskSet, load_tasks
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from search.engine import Job, run_jobs
from search.objective import Block
from search.plan import Search, Settings
from search.run import run_search
from tests.benchmarks.bench_grid import SOURCE, own_home
from tests.search_workers import Scripted

BUDGET = "0.33x"
WORKERS = 2


def new_search(
    out: Path, store: Path, *, results: Path | None = None, workers: int = WORKERS, **settings: Any
) -> Search:
    """A search on the embedded mixture, whose report on the test split is as short as can be."""
    fixed = {"source": (SOURCE,), "tasks": ("nano",), "budget": BUDGET, "test_limit": 1, "finalists": 1}
    return Search(Settings(**fixed | settings), out, Options(workers=workers, store=store), results)


def trials(out: Path) -> list[dict[str, Any]]:
    """The trials of a search that has ended, without the baselines."""
    return [row for row in pq.read_table(out / "trials.parquet").to_pylist() if row["kind"] == "trial"]


def per_trial(ends: Sequence[float]) -> float:
    """Seconds from one end to the next."""
    return (max(ends) - min(ends)) / (len(ends) - 1)


# --- a fresh actor per trial --------------------------------------------------------------------------------


def score_afresh(config: Mapping[str, Any], documents: Mapping[str, Sequence[int]], store: str) -> None:
    """One trial of Tune's usual way: load the mixture and the tasks, score, report."""
    wanted = config["mixture"]
    spec = MixtureSpec(source=(SOURCE,), store=store, ranks=json.loads(wanted["ranks"]), active=wanted["active"])
    mixture = load_mixture(spec)
    use_few_threads(mixture.model.config.hidden_size)
    tasks: TaskSet = load_tasks("nano", split="validation", seed=DEFAULT_SEED)
    lm = MixtureLM(mixture.model, mixture.tokenizer)
    scores = tasks.collect([tasks.tasks[name].score(lm, ids) for name, ids in documents.items()])
    tune.report({"score": scores.score, "ended": time.time()})


def usual_way(search: Search, rows: Sequence[Mapping[str, Any]], store: Path, folder: Path) -> list[Mapping[str, Any]]:
    """Results of the mixtures of some trials, each in an actor of its own."""
    documents = {block.task: block.documents for block in search.objective.rungs[0]}
    trainable = tune.with_parameters(score_afresh, documents=documents, store=str(store))
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"mixture": tune.grid_search([{"ranks": row["ranks"], "active": row["active"]} for row in rows])},
        tune_config=tune.TuneConfig(max_concurrent_trials=WORKERS, reuse_actors=False),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        results = tuner.fit()
    assert not results.errors
    by_ranks = {(r.config["mixture"]["ranks"], r.config["mixture"]["active"]): r.metrics for r in results}
    return [by_ranks[row["ranks"], row["active"]] for row in rows]


def reused_against_fresh(limit: int, count: int, store: Path, folder: Path) -> dict[str, float]:
    """Seconds per trial of a search without early stopping, and of the usual way; the scores must be the same."""
    out = folder / f"search-{limit}"
    begun = time.time()
    search = new_search(out, store, limit=limit, trials=count, rungs=1)
    run_search(search)
    ended = time.time()
    rows = trials(out)
    assert [row["state"] for row in rows] == ["complete"] * count
    again = time.time()
    theirs = usual_way(search, rows, store, folder / f"tune-{limit}")
    over = time.time()
    for row, result in zip(rows, theirs, strict=True):
        assert abs(row["score"] - result["score"]) < 1e-9, (row["name"], row["score"], result["score"])
    entries = pq.read_table(out / "trials.parquet").num_rows
    ours_steady, theirs_steady = per_trial([row["finished"] for row in rows]), per_trial([r["ended"] for r in theirs])
    ours_all, theirs_all = (ended - begun) / entries, (over - again) / len(rows)
    return {
        "documents_per_trial": search.objective.documents(0),
        "trials": count,
        "reused_seconds": ours_steady,
        "fresh_seconds": theirs_steady,
        "ratio": theirs_steady / ours_steady,
        "reused_seconds_with_start": ours_all,
        "fresh_seconds_with_start": theirs_all,
        "ratio_with_start": theirs_all / ours_all,
    }


# --- trials that score nothing ------------------------------------------------------------------------------


class Even(Scripted):
    """Gives all mixtures the same score, at once."""

    def value(self, ranks: Mapping[str, Any]) -> float:
        return 0.5


class Nothing:
    """A source of jobs that keeps nothing of what it is told but the time."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = list(jobs)[::-1]
        self._live = 0
        self.ends: list[float] = []

    idle = False

    @property
    def ended(self) -> bool:
        return not self._jobs and not self._live

    def next(self) -> Job | None:
        if not self._jobs:
            return None
        self._live += 1
        return self._jobs.pop()

    def receive(self, job: Job, rung: int, scores: Mapping[Block, TaskScore], seconds: float) -> float:
        return 0.0

    def finish(self, job: Job, error: str | None, *, stopped: bool) -> None:
        assert not error
        assert not stopped
        self._live -= 1
        self.ends.append(time.time())


def tune_alone(search: Search, count: int, rungs: int) -> float:
    """Seconds per trial of Tune and of the engine, with two actors and rungs of no documents."""
    arguments = {"tasks": search.objective.sets["validation"].suite, "seed": DEFAULT_SEED}
    worker = Even(base_spec(search.parts, search.store), {"validation": arguments}, None, "cpu", "float32", 0)
    jobs = (Job(name=f"job-{i}", ranks={}, active=1, rungs=[()] * rungs) for i in range(count))
    source = Nothing(jobs)
    run_jobs(source, worker, {}, search.options.needs, rungs=rungs, reduction=3, workers=WORKERS)
    return per_trial(source.ends)


def overhead(count: int, repeats: int, store: Path, folder: Path) -> dict[str, float]:
    """Milliseconds per trial and per rung, of Tune alone and of a search with its sampler, ledger and cells."""
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for rungs in (1, 3):
            out = folder / f"empty-{rungs}-{repeat}"
            search = new_search(out, store, tasks=("nano_order",), limit=9, trials=count, rungs=rungs, seed=repeat)
            found.setdefault(f"tune {rungs}", []).append(tune_alone(search, 10 * count, rungs))
            run_search(search, Even)
            assert [len(row["rungs"]) for row in trials(out)] == [rungs] * count
            found.setdefault(f"search {rungs}", []).append(per_trial([row["finished"] for row in trials(out)]))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    return {
        "trials": count,
        **{f"{who}_ms_per_trial": 1000 * seconds[f"{who} 1"] for who in ("tune", "search")},
        **{f"{who}_ms_per_rung": 500 * (seconds[f"{who} 3"] - seconds[f"{who} 1"]) for who in ("tune", "search")},
    }


# --- early stopping -----------------------------------------------------------------------------------------


def stopping(limit: int, count: int, seeds: int, store: Path, folder: Path) -> dict[str, Any]:
    """Documents and best validation score of searches with one rung and with three, with the same seeds."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 3: []}
    for seed in range(seeds):
        for rungs, results in found.items():
            out = folder / f"stopping-{rungs}-{seed}"
            settings = {"limit": limit, "trials": count, "seed": seed, "rungs": rungs}
            final = run_search(new_search(out, store, results=folder / f"cells-{rungs}", **settings))
            winner = next(entry for entry in final["entries"] if entry["name"] == final["winner"])
            documents = final["documents"]["trials"]
            results.append({"documents": documents, "score": winner["validation"], "stopped": final["stopped"]})
    saved = [1 - three["documents"] / one["documents"] for one, three in zip(found[1], found[3], strict=True)]
    lost = [one["score"] - three["score"] for one, three in zip(found[1], found[3], strict=True)]
    return {
        "trials": count,
        "documents_saved": statistics.median(saved),
        "score_lost": statistics.median(lost),
        "scores_lost": lost,
        "one_rung": found[1],
        "three_rungs": found[3],
    }


def run(*, quick: bool = False) -> dict[str, Any]:
    """All three."""
    sizes = ((3, 3),) if quick else ((12, 8), (50, 8))
    with own_home() as folder, cluster(num_cpus=WORKERS):
        store = folder / "store"
        build_store(open_source([SOURCE]), store)
        result = {
            "fresh_actors": [reused_against_fresh(limit, count, store, folder) for limit, count in sizes],
            "overhead": overhead(4 if quick else 20, 1 if quick else 3, store, folder),
            "early_stopping": stopping(*((9, 3, 1) if quick else (36, 24, 3)), store, folder),
        }
    for found in result["fresh_actors"]:
        print(
            f"seconds per trial of {found['documents_per_trial']:.0f} documents: reused actors "
            f"{found['reused_seconds']:.3f}, a fresh one each {found['fresh_seconds']:.3f}; "
            f"ratio {found['ratio']:.1f}, with the start of both {found['ratio_with_start']:.1f}"
        )
    print("overhead: " + ", ".join(f"{name} {value:.1f}" for name, value in result["overhead"].items()))
    stopped = result["early_stopping"]
    print(
        f"early stopping: {100 * stopped['documents_saved']:.0f} % of the documents saved, score lost "
        f"{100 * stopped['score_lost']:.2f} points (medians)"
    )
    return result
