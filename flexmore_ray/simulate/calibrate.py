"""What the cells of a grid cost, learned from a results folder.

A cell's seconds are those of `PreparedTask.score`: forward passes and metrics of one task, nothing else. The model is

    seconds = (a_task + b_task * documents) * f(mixture),     f = c0 + c1 E + c2 K + c3 K P / E,    all >= 0,

with E kept experts, K active ones and P parameters: a call, a document, and for the mixture what its experts cost by
being there, by being chosen, and by their size. What the seconds leave out comes from when cells were committed: the
start from the folder's lock, which a run takes first; the time between units from how closely the commits follow each
other; a commit from how long its cell came after its samples. So calibrate with a run that was not interrupted, with
as many workers on a node as the runs to predict will have: workers that share cores or a GPU slow each other down.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flexmore_ray.errors import UsageError
from flexmore_ray.results import DONE, read_cells
from flexmore_ray.spec import DROP, suggest
from flexmore_ray.storage import AnyPath

DRIVER_SECONDS = 0.004
"""Of the driver for one cell: `make bench`, 10,000 cells that score nothing."""
_ROUNDS = 6  # of fitting tasks and mixtures in turn; they settle within four
_FEW = 30  # cells: fewer say nothing about the time between them

Vector = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What a mixture's speed depends on."""

    experts: int
    """Kept experts, the public one included."""
    active: int
    parameters: float

    @property
    def features(self) -> tuple[float, float, float, float]:
        """What the model weighs."""
        active = min(self.active, self.experts)
        return 1.0, float(self.experts), float(active), active * self.parameters / self.experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What a run takes beside the seconds that its cells record; all in seconds."""

    start: float = 0.0
    """From the beginning of a run until a worker can take its first unit, its first mixture loaded."""
    decompose: float = 0.0
    """Of one expert, once per run, from when a worker first needs its factors; experts do it side by side."""
    switch: float = 0.0
    """Of a worker, to another mixture."""
    unit: float = 0.0
    """Between two units of a worker."""
    first: float = 0.0
    """Per document that a worker has not had before: its tokens, prefixes and batches are remembered."""
    driver: float = 0.0
    """Of the driver, to take in the result of a unit."""
    commit: float = 0.0
    """Of one cell, in one of the grid's threads for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A cell that was computed."""

    task: str
    documents: int
    seconds: float
    size: Size
    committed: float
    """Seconds since 1970."""
    commit: float
    """Seconds from its samples to itself."""


def read_measured(results: AnyPath) -> list[Measured]:
    """The cells of a results folder that are done, in the order in which they were committed.

    Raises:
        UsageError: there is none.
        FlexmoreError: a file is damaged.
    """
    cells = []
    for row in read_cells(results).to_pylist():
        if row["status"] != DONE or not row["documents"]:
            continue
        name = f"{row['cell']}.parquet"
        committed = (results / "cells" / name).stat().st_mtime
        ranks = json.loads(row["mixture"])["ranks"]
        kept = 1 + sum(rank != DROP for rank in ranks.values())
        cells.append(
            Measured(
                task=row["task"],
                documents=row["documents"],
                seconds=row["seconds"],
                size=Size(experts=kept, active=row["active"], parameters=row["parameters"]),
                committed=committed,
                commit=max(0.0, committed - (results / "samples" / name).stat().st_mtime),
            )
        )
    if not cells:
        raise UsageError(f"--calibrate: {results} holds no finished cell; run a small grid first")
    return sorted(cells, key=lambda cell: cell.committed)


# ------------------------------------------------------------------------------------ the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Seconds of cells."""

    tasks: Mapping[str, tuple[float, float]]
    """Seconds of a call and of a document, for the average mixture."""
    weights: tuple[float, float, float, float]
    """Of `Size.features`; the average mixture comes to 1."""

    def factor(self, size: Size) -> float:
        """Time that a mixture takes, as a multiple of the average mixture's."""
        return sum(weight * feature for weight, feature in zip(self.weights, size.features, strict=True))

    def seconds(self, task: str, documents: int, size: Size) -> float:
        """Seconds of a mixture on some documents of a task."""
        call, document = self.tasks[task]
        return (call + document * documents) * self.factor(size)


def fit(cells: Sequence[Measured]) -> Model:
    """The model that comes closest to measured cells, tasks and mixtures in turn."""
    features = np.array([cell.size.features for cell in cells])
    scales = np.maximum(features.max(axis=0), 1e-300)
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, cell in enumerate(cells):
        by_task[cell.task].append(index)
    seconds, documents = (np.array([getattr(c, name) for c in cells], float) for name in ("seconds", "documents"))
    factors, weights = np.ones(len(cells)), np.array([1.0, 0.0, 0.0, 0.0])
    tasks: dict[str, tuple[float, float]] = {}
    for _ in range(_ROUNDS):
        base = np.empty(len(cells))
        for task, rows in by_task.items():
            tasks[task] = _fit_task(documents[rows], seconds[rows], factors[rows])
            base[rows] = tasks[task][0] + tasks[task][1] * documents[rows]
        weights = _least_squares(features / scales, seconds / base)
        factors = features / scales @ weights
        weights, factors = weights / factors.mean(), factors / factors.mean()
    return Model(tasks=tasks, weights=tuple((weights / scales).tolist()))


def _fit_task(documents: Vector, seconds: Vector, factors: Vector) -> tuple[float, float]:
    """Seconds of a call and of a document; of the document alone where all cells have as many."""
    scale = np.array([np.median(seconds[documents == number]) for number in documents])
    columns = [np.ones(len(documents)), documents] if len(set(documents)) > 1 else [documents]
    matrix = np.stack(columns, axis=1) * (factors / scale)[:, None]
    found = _least_squares(matrix, seconds / scale).tolist()
    return (found[0], found[1]) if len(found) > 1 else (0.0, found[0])


def _least_squares(matrix: Vector, values: Vector) -> Vector:
    """Least squares under coefficients that are not negative, for a few columns that are not negative either."""
    best, least = np.zeros(matrix.shape[1]), math.inf
    for number in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), number):
            found = np.linalg.lstsq(matrix[:, chosen], values, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ found - values).sum())
            if error < least * (1 - 1e-9) and (found >= 0).all():
                best, least = np.zeros(matrix.shape[1]), error
                best[list(chosen)] = found
    return best


def held_out_errors(cells: Sequence[Measured]) -> dict[str, float]:
    """By task, predicted over measured seconds minus 1, on cells that the prediction has not seen.

    The mixtures' part of the model is fitted on all other tasks, the task's own part on every other of its cells;
    predicted is the sum over the rest of its cells. A task with one cell is not among them.
    """
    errors = {}
    for task in sorted({cell.task for cell in cells}):
        own = sorted((c for c in cells if c.task == task), key=lambda c: (c.documents, c.committed))
        others = [cell for cell in cells if cell.task != task] or own[::2]
        model = fit(others)
        known, rest = own[::2], own[1::2]
        if not rest:
            continue
        factors = np.array([model.factor(cell.size) for cell in known])
        documents, seconds = (np.array([getattr(c, name) for c in known], float) for name in ("documents", "seconds"))
        call, document = _fit_task(documents, seconds, factors)
        predicted = sum((call + document * cell.documents) * model.factor(cell.size) for cell in rest)
        errors[task] = predicted / sum(cell.seconds for cell in rest) - 1
    return errors


# ------------------------------------------------------------------------- what a run costs beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """All that a prediction needs to know of a machine."""

    model: Model
    timing: Timing
    workers: int | None
    """Workers of the last run, as its commits tell; None where they were too few to tell."""
    cells: int
    errors: Mapping[str, float]
    """See `held_out_errors`."""
    sizes: Mapping[str, tuple[int, int]]
    """By task, the fewest and the most documents of a cell."""
    largest: Size
    """The most experts, active experts and parameters of any mixture."""
    document_seconds: float | None = None
    """Of the average mixture, for tasks that were not measured; None refuses them."""

    def seconds(self, task: str, documents: int, size: Size) -> float:
        """Seconds that a worker would record for a mixture on some documents of a task.

        Raises:
            UsageError: the task was not measured, and nothing is assumed of such tasks.
        """
        if task in self.model.tasks:
            return self.model.seconds(task, documents, size)
        if self.document_seconds is None:
            known = suggest(task, list(self.model.tasks))
            raise UsageError(
                f"--calibrate: no cell of task {task} was measured ({known}); calibrate with a grid that has it, or "
                "state --document-seconds, to be taken for all tasks that were not measured"
            )
        return self.document_seconds * documents * self.model.factor(size)


def calibrate(results: AnyPath, *, start: float | None = None, document_seconds: float | None = None) -> Calibration:
    """Learn from a results folder what cells and runs cost.

    Args:
        results: the folder.
        start: seconds from the beginning of a run to its first unit; None takes those of the folder's last run.
        document_seconds: of the average mixture on a document of a task that was not measured; None refuses such tasks.

    Raises:
        UsageError: the folder has no finished cell, or does not tell its start.
    """
    for name, value in (("start-seconds", start), ("document-seconds", document_seconds)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name}: seconds >= 0, got {value}")
    cells = read_measured(results)
    model = fit(cells)
    began = _began(results)
    run = [cell for cell in cells if began is not None and cell.committed >= began]
    if start is None:
        if began is None or not run:
            raise UsageError(f"--calibrate: the last run in {results} committed nothing; give --start-seconds")
        start = max(0.0, min(cell.committed - cell.commit - cell.seconds for cell in run[:8]) - began)
    workers, unit = _between(run)
    counts: dict[str, list[int]] = defaultdict(list)
    for cell in cells:
        counts[cell.task].append(cell.documents)
    return Calibration(
        model=model,
        timing=Timing(
            start=start,
            unit=unit,
            first=_first(run, model, workers) if workers else 0.0,
            driver=DRIVER_SECONDS,
            commit=2 * _middle([cell.commit for cell in cells]),
        ),
        workers=workers,
        cells=len(cells),
        errors=held_out_errors(cells),
        sizes={task: (min(found), max(found)) for task, found in counts.items()},
        largest=Size(
            **{name: max(getattr(c.size, name) for c in cells) for name in ("experts", "active", "parameters")}
        ),
        document_seconds=document_seconds,
    )


def _began(results: AnyPath) -> float | None:
    """When the last run in a folder began; None where there was none, or nothing tells."""
    lock = results / ".lock"
    return lock.stat().st_mtime if lock.exists() else None


def _between(run: Sequence[Measured]) -> tuple[int | None, float]:
    """Workers of a run, and seconds between two units of one of them.

    In the time from the first commit to that after which some have nothing more to do, every worker is either at a
    cell or between two: workers x time = sum of the cells' seconds within it + cells x seconds between.
    """
    if len(run) < _FEW:
        return None, 0.0
    low = run[0].committed
    for workers in itertools.count(1):
        high = run[-workers].committed
        inside = [min(cell.committed, high) - max(cell.committed - cell.seconds, low) for cell in run[1:]]
        worked = sum(max(0.0, seconds) for seconds in inside)
        if worked <= workers * (high - low) * 1.01 or 2 * workers > len(run):
            break
    between = (workers * (high - low) - worked) / (len(run) - workers)
    return workers, max(0.0, between)


def _first(run: Sequence[Measured], model: Model, workers: int) -> float:
    """Seconds per document that a worker's first cell of some documents takes more than a later one."""
    met: dict[tuple[str, int], int] = defaultdict(int)
    more, documents = 0.0, 0
    for cell in run:
        met[cell.task, cell.documents] += 1
        if met[cell.task, cell.documents] <= workers:
            more += cell.seconds - model.seconds(cell.task, cell.documents, cell.size)
            documents += cell.documents
    return max(0.0, more / documents) if documents else 0.0


def _middle(seconds: Sequence[float]) -> float:
    """Mean without the highest tenth: a file's time of change is too coarse for a median."""
    ordered = sorted(seconds)
    return float(np.mean(ordered[: math.ceil(0.9 * len(ordered))]))


def average(sizes: Iterable[Size]) -> Size:
    """A mixture in the middle of some."""
    found = list(sizes)
    return Size(
        experts=round(np.mean([size.experts for size in found])),
        active=round(np.mean([size.active for size in found])),
        parameters=float(np.mean([size.parameters for size in found])),
    )
