"""Run a grid of mixtures x tasks on Ray: elastic, restartable, one commit per cell.

Workers hold one mixture each and switch its ranks in place; their factors come from the expert actors. The
driver alone writes results, so only it needs to reach their folder: a cell is in the folder or it is not, and a
run does what is missing there. See `plan` for what a grid computes and `pool` for who computes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from tqdm import tqdm

from flexmore_ray.atomic import alone, remove_abandoned, write_file
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.factors import base_spec, open_parts, serve_factors
from flexmore_ray.metrics import GridMetrics, reporting
from flexmore_ray.mixture import Parts, parse_dtype
from flexmore_ray.placement import Needs, check_room
from flexmore_ray.plan import (
    Cell,
    Plan,
    PlannedMixture,
    Wanted,
    expand,
    identify,
    plan_cells,
    plan_record,
    record_name,
    resolve,
)
from flexmore_ray.pool import Pool, Queue, Unit
from flexmore_ray.results import commit_cell, done_cells, read_cells
from flexmore_ray.runtime import cluster, nodes, on_running_cluster
from flexmore_ray.scores import PreparedTask, TaskScore, TaskSet, iter_shards, load_tasks
from flexmore_ray.spec import suggest
from flexmore_ray.storage import AnyPath, StorageError, matching
from flexmore_ray.store import FactorSource
from flexmore_ray.worker import Worker

SHARD_DOCUMENTS = 500
_WRITERS = 16  # threads that commit: most of a commit is waiting for the disk or the store
_COMMITS = 64  # under way at once, at most
_CELL_BYTES, _DOCUMENT_BYTES = 12_000, 100  # what the files of a cell take, and a row of its samples
_LEAST = {"workers": 1, "shard_documents": 1, "num_cpus": 0, "num_gpus": 0, "expert_gpus": 0}
_SMALLEST_SHARE = 0.0001  # of a CPU or GPU that Ray can reserve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a grid; what it computes is in the plan."""

    workers: int | None = None
    """Workers; None: as many as the nodes can hold, following those that join and leave."""
    num_cpus: float = 1
    """CPUs of one worker."""
    num_gpus: float = 0
    """GPUs of one worker; fractions are allowed."""
    expert_gpus: float = 0
    """GPUs of one expert actor; fractions are allowed."""
    pin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By expert, the nodes that its actor may run on; see `start_experts`."""
    dtype: str | None = None
    """What workers compute in; None: float32 on the CPU, the checkpoint's own dtype on a GPU."""
    store: AnyPath | None = None
    """Folder of the factors; None: the plan's store, else one in the cache."""
    shard_documents: int = SHARD_DOCUMENTS
    """A task with more documents is split into parts of at most about so many."""

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            option = name.removeprefix("num_").replace("_", "-")
            if value is not None and value < low:
                raise UsageError(f"--{option}: at least {low}, got {value}")
            if value and value < _SMALLEST_SHARE:
                raise UsageError(f"--{option}: 0, or at least {_SMALLEST_SHARE}, got {value}")

        if not self.num_cpus and not self.num_gpus:
            raise UsageError("--cpus: a worker needs a share of a CPU or of a GPU for Ray to place it; got 0 of both")

    @property
    def device(self) -> str:
        """Device of a worker."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def needs(self) -> Needs:
        """What one worker asks of a node."""
        return Needs(num_cpus=self.num_cpus, num_gpus=self.num_gpus)

    def check_experts(self, experts: Sequence[str]) -> None:
        """Check that every expert that is pinned is among `experts`, the public one first.

        Raises:
            UsageError: one is not.
        """
        for name in self.pin:
            if name not in experts[1:]:
                raise UsageError(f"--pin: unknown expert {name!r}; {suggest(name, experts[1:])}")

    def compute_dtype(self, parts: Parts) -> str:
        """Name of the dtype that workers compute in."""
        default = "float32" if self.device == "cpu" else parts.source.dtype
        return str(parse_dtype(self.dtype or default)).removeprefix("torch.")


# ------------------------------------------------------------------------------------ planning


class Grid:
    """A plan on the weights, tasks and results that it names: what is to do, and what is done.

    Args:
        plan: what to compute.
        results: the results folder; need not exist.
        options: how to run it.

    Raises:
        UsageError, CheckpointError, StoreError, TaskError: the plan, its source or its tasks are no good, or the
            results are of other weights.
    """

    def __init__(self, plan: Plan, results: AnyPath, options: Options) -> None:
        self.plan, self.results, self.options = plan, results, options
        self.parts, self.store = open_parts(plan.spec(), options.store or plan.store)
        options.check_experts(self.parts.source.experts)
        wanted = expand(plan, self.parts)
        self.tasks: TaskSet = load_tasks(
            list(plan.tasks),
            split=plan.split,
            limit=plan.limit,
            seed=plan.seed,
        )
        self.mixtures: list[PlannedMixture] = identify([item for item in wanted if not item.rule], self.parts)
        self.waiting: list[Wanted] = [item for item in wanted if item.rule]
        self.cells: dict[str, Cell] = plan_cells(self.mixtures, self.tasks, self.dtype)
        self.check_results()
        self.done: set[str] = done_cells(results, self.cells)
        self.advance()

    @property
    def dtype(self) -> str:
        """Name of the dtype that workers compute in."""
        return self.options.compute_dtype(self.parts)

    @property
    def missing(self) -> dict[str, Cell]:
        """Cells to compute that are known already, by hash."""
        return {name: cell for name, cell in self.cells.items() if name not in self.done}

    @property
    def total(self) -> int:
        """Cells in all; of a mixture that waits for results, as many as there are tasks."""
        return len(self.cells) + len(self.waiting) * len(self.tasks.tasks)

    @property
    def left(self) -> int:
        """Cells that are not done."""
        return self.total - len(self.done)

    @property
    def pairs(self) -> list[PlannedMixture]:
        """The two-expert mixtures."""
        return [mixture for mixture in self.mixtures if mixture.pair]

    def advance(self) -> dict[str, Cell]:
        """Begin the second stage if the first is over and nothing of it failed: the cells that it adds, by hash."""
        if not self.waiting:
            return {}
        ids = {mixture.mixture_id for mixture in self.pairs}
        first = {name for name, cell in self.cells.items() if cell.mixture.mixture_id in ids}
        if not first <= self.done:
            return {}
        scores: dict[str, dict[str, float]] = {}
        rows = read_cells(self.results, first & self.done).select(["mixture_id", "task", "value"])
        for row in rows.to_pylist():
            scores.setdefault(row["mixture_id"], {})[row["task"]] = row["value"]
        groups = self.tasks.suite.groups
        added = identify(resolve(self.waiting, self.pairs, scores, groups), self.parts)
        self.mixtures, self.waiting = [*self.mixtures, *added], []
        cells = {n: c for n, c in plan_cells(added, self.tasks, self.dtype).items() if n not in self.cells}
        self.cells |= cells
        self.done |= done_cells(self.results, cells)
        return {name: cell for name, cell in cells.items() if name not in self.done}

    def check_results(self) -> None:
        """Refuse a folder with the results of a plan on other weights."""
        ours = self.record()
        for path in matching(self.results / "plans", "*.json"):
            theirs = read_record(path)
            for name, digest in ours["digests"].items():
                if theirs.get("digests", {}).get(name, digest) != digest or theirs["weights"] != ours["weights"]:
                    raise UsageError(
                        f"results: {self.results} holds results of other weights ({', '.join(theirs['source'])}, "
                        f"expert {name}); choose another folder"
                    )

    def record(self) -> dict[str, Any]:
        """What `results/plans/` keeps of this grid."""
        record = plan_record(self.plan, self.parts, self.tasks, self.dtype, self.mixtures, self.waiting)
        return record | {"store": str(self.store) if self.uses_factors else None}

    def summary(self) -> dict[str, Any]:
        """Counts, with the mixtures that wait for results counted as distinct and missing, and what to expect."""
        distinct = len({mixture.mixture_id for mixture in self.mixtures}) + len(self.waiting)
        return {
            "mixtures": len(self.mixtures) + len(self.waiting),
            "distinct_mixtures": distinct,
            "cells": self.total,
            "done": len(self.done),
            "missing": self.left,
            "waiting": [item.name for item in self.waiting],
            "documents": {name: len(task.documents) for name, task in self.tasks.tasks.items()},
            "seconds": self._expected_seconds(),
            "bytes": self._expected_bytes(),
        }

    def _expected_seconds(self) -> float | None:
        """Seconds of one worker for what is missing, by the cells that are there; None where there are none."""
        seconds = read_cells(self.results, self.done)["seconds"].to_pylist()
        return self.left * sum(seconds) / len(seconds) if seconds else None

    def _expected_bytes(self) -> dict[str, int]:
        """Memory that a worker's weights take, and disk that results and factors take."""
        width = parse_dtype(self.dtype).itemsize
        shape = self.parts.source.shape
        per_rank = sum(sum(shape.matrix(key.projection)) for key in shape.keys("one"))
        experts = len(self.parts.source.experts) - 1
        documents = sum(len(task.documents) for task in self.tasks.tasks.values())
        return {
            "worker": (max(m.parameters for m in self.mixtures) + experts * per_rank * self.hold_rank) * width,
            "store": experts * per_rank * self.hold_rank * self.parts.factors.dtype.itemsize,
            "results": self.total * _CELL_BYTES + self.total // len(self.tasks.tasks) * documents * _DOCUMENT_BYTES,
        }

    @property
    def hold_rank(self) -> int:
        """The highest rank of a low-rank matrix in the plan; 0 if there is none."""
        return max((mixture.highest_rank for mixture in self.mixtures if mixture.uses_factors), default=0)

    @property
    def uses_factors(self) -> bool:
        """Whether any mixture cuts an expert to a rank."""
        return any(mixture.uses_factors for mixture in self.mixtures)


def read_record(path: AnyPath) -> dict[str, Any]:
    """A record of `results/plans/`.

    Raises:
        FlexmoreError: it cannot be read or is none.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("source", "weights", "digests")} | record
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlexmoreError(f"{path}: not a plan's record ({error}); delete it, the cells stay") from error


def write_record(results: AnyPath, record: Mapping[str, Any]) -> None:
    """Write a plan's record whole."""
    path = results / "plans" / record_name(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


# ------------------------------------------------------------------------------------- running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run of a grid ended."""

    computed: int
    """Cells committed by this run, failed ones not counted."""
    failed: dict[str, str]
    """"mixture on task" -> error."""
    seconds: float


def run_grid(grid: Grid, worker: type[Worker] = Worker) -> Outcome:
    """Compute all missing cells on Ray and commit each; what fails is committed as failed, and the rest goes on.

    Args:
        grid: what to compute.
        worker: the class of the workers.

    Raises:
        UsageError: no node has what a worker needs, or another run writes to the folder.
        FlexmoreError: no worker can start, or the results cannot be written.
    """
    with alone(grid.results, "grid"):
        write_record(grid.results, grid.record())
        if not grid.missing and not grid.waiting:
            return Outcome(computed=0, failed={}, seconds=0.0)
        remove_abandoned(grid.results)
        options = grid.options
        with cluster(runs=f"grid {grid.plan.name}"), contextlib.ExitStack() as stack:
            if options.workers is None or not on_running_cluster():  # else an autoscaler may add nodes for them
                check_room({"worker": options.needs}, nodes())
            factors: FactorSource | None = None
            if grid.uses_factors:
                served = serve_factors(
                    grid.parts,
                    grid.store,
                    grid.hold_rank,
                    options.needs if options.workers is None or not on_running_cluster() else None,
                    expert_gpus=options.expert_gpus,
                    pin=options.pin,
                    run=f"grid:{grid.plan.name}",
                )
                factors = stack.enter_context(served)
            return _Run(grid, factors, worker).run()


class _Run:
    """One run of a grid: the queue, the workers, the commits."""

    def __init__(self, grid: Grid, factors: FactorSource | None, worker: type[Worker]) -> None:
        self._grid = grid
        self._pool = Pool(self._creator(factors, worker), grid.options.needs, grid.options.workers)
        self._metrics = GridMetrics(grid.plan.name, grid.options.needs)
        self._weights = grid.parts.weights
        self._writers = ThreadPoolExecutor(max_workers=_WRITERS)
        self._commits: dict[Future[str], str] = {}  # under way, with the cell of each
        self._parts: dict[str, list[TaskScore]] = {}
        self._errors: dict[str, str] = {}  # of cells whose failure is being committed, or is
        self._failed: dict[str, str] = {}
        self._computed = 0

    def _creator(self, factors: FactorSource | None, worker: type[Worker]) -> Any:
        grid, options = self._grid, self._grid.options
        plan = grid.plan
        tasks = {plan.split: {"tasks": grid.tasks.suite, "limit": plan.limit, "seed": plan.seed}}
        base = base_spec(grid.parts, grid.store)
        remote = ray.remote(max_restarts=0, **options.needs.options())(worker)
        run, numbers = uuid.uuid4().hex[:4], itertools.count(1)

        def create() -> Any:
            name = f"grid:{plan.name}:worker-{next(numbers)}:{run}"
            named = remote.options(name=name)
            return named.remote(base, tasks, factors, options.device, grid.dtype, grid.hold_rank)

        return create

    def run(self) -> Outcome:
        """Work off all cells."""
        start = time.monotonic()
        queue = Queue(self._units(self._grid.missing))
        progress = reporting(self._report)
        with progress, contextlib.closing(self._pool), self._writers, _bar(self._grid) as bar:
            while queue or self._commits:
                for unit, result in self._pool.run(queue):
                    self._receive(unit.tag, result)
                    self._settle(queue, bar, None if len(self._commits) >= _COMMITS else 0.0)
                self._settle(queue, bar, None)
            return Outcome(computed=self._computed, failed=self._named(), seconds=time.monotonic() - start)

    def _settle(self, queue: Queue, bar: tqdm, timeout: float | None) -> None:
        """Take note of the commits that are over, waiting for one of them up to `timeout` seconds (None: for ever)."""
        finished, _ = wait(self._commits, timeout, FIRST_COMPLETED)
        for commit in finished:
            commit.result()
            name = self._commits.pop(commit)
            if name in self._errors:
                self._failed[name] = self._errors[name]
            else:
                self._grid.done.add(name)
                self._computed += 1
            for added in self._units(self._advance()):
                queue.add(added)
            status = "failed" if name in self._failed else "done"
            self._metrics.committed(status)
            bar.total = self._grid.total
            bar.set_postfix_str(f"{self._pool.working} workers", refresh=False)
            bar.update()

    def _report(self) -> None:
        grid = self._grid
        self._metrics.report(grid.total, grid.left - len(self._failed), self._pool.working)

    def _advance(self) -> Mapping[str, Cell]:
        """The cells of the second stage, once the first is over."""
        before = len(self._grid.mixtures)
        added = self._grid.advance()
        if len(self._grid.mixtures) > before:
            write_record(self._grid.results, self._grid.record())
        return added

    def _named(self) -> dict[str, str]:
        cells = self._grid.cells
        failed = {f"{cells[name].mixture.name} on {cells[name].task}": text for name, text in self._failed.items()}
        return failed | {item.name: "waits for pairs that failed" for item in self._grid.waiting}

    def _units(self, cells: Mapping[str, Cell]) -> Iterator[Unit]:
        for name, cell in cells.items():
            task = self._grid.tasks.tasks[cell.task]
            for documents in self._shards(task):
                ranks, split = dict(cell.mixture.spec.ranks), self._grid.plan.split
                arguments = (ranks, cell.mixture.active, split, cell.task, task.content_hash, documents)
                yield Unit(group=cell.mixture.mixture_id, arguments=arguments, tag=name)

    def _shards(self, task: PreparedTask) -> Sequence[list[int] | None]:
        number = -(-len(task.documents) // self._grid.options.shard_documents)
        return [None] if number <= 1 else list(iter_shards(task, number))

    def _receive(self, name: str, result: TaskScore | Exception) -> None:
        """Take in the result of a unit; begins to commit its cell if that is now whole, or has failed."""
        if name in self._errors:
            return  # another part of its documents failed before
        cell = self._grid.cells[name]
        task = self._grid.tasks.tasks[cell.task]
        if isinstance(result, TaskScore):
            self._metrics.scored(result.documents)
            parts = self._parts.setdefault(name, [])
            parts.append(result)
            if sum(part.documents for part in parts) < len(task.documents):
                return
            try:
                result = parts[0] if len(parts) == 1 else task.merge(parts)
            except Exception as error:  # the task's own aggregation, which may raise anything
                result = error
        self._parts.pop(name, None)
        if isinstance(result, TaskScore):
            self._commit(name, cell, result, None)
        else:
            self._errors[name] = " ".join(f"{type(result).__name__}: {result}".split())
            self._commit(name, cell, None, self._errors[name])

    def _commit(self, name: str, cell: Cell, score: TaskScore | None, error: str | None) -> None:
        commit = self._writers.submit(
            commit_cell,
            self._grid.results,
            cell.key,
            score,
            mixture=cell.mixture.spec.to_dict(),
            active=cell.mixture.active,
            parameters=cell.mixture.parameters,
            weights=self._weights,
            group=self._grid.tasks.tasks[cell.task].group.name,
            error=error,
        )
        self._commits[commit] = name


def _bar(grid: Grid) -> tqdm:
    hidden = not sys.stderr.isatty()
    return tqdm(desc="grid", unit="cell", total=grid.total, initial=len(grid.done), disable=hidden, leave=False)
