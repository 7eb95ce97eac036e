"""What grids and searches would take and cost on so many workers: calibrated, simulated, and said in a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flexmore_ray.errors import UsageError
from flexmore_ray.grid import Grid
from flexmore_ray.plan import PlannedMixture
from flexmore_ray.pool import Unit
from flexmore_ray.scores import PreparedTask, iter_shards
from flexmore_ray.simulate import Outcome, Work, new_unit
from flexmore_ray.simulate.calibrate import Calibration, Size, average
from flexmore_ray.spec import DROP, FULL
from flexmore_ray.tables import columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would take on so many workers."""

    workers: int
    outcome: Outcome
    price: float | None = None
    """Of a worker for an hour; None where it is not known."""

    @property
    def worker_hours(self) -> float:
        """That the workers are held for, idle time included."""
        return self.outcome.held / 3600

    @property
    def cost(self) -> float | None:
        """In the money of the price; None without one."""
        return None if self.price is None else self.price * self.worker_hours

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "workers": self.workers,
            "seconds": self.outcome.makespan,
            "busy": self.outcome.busy,
            "worker_hours": self.worker_hours,
            "cost": self.cost,
            "limit": self.outcome.limit,
            "bounds": dict(self.outcome.bounds),
        }


def forecasts(run: Callable[[int], Outcome], workers: Sequence[int], price: float | None = None) -> list[Forecast]:
    """Forecasts for several numbers of workers.

    Args:
        run: simulates a number of workers.
        workers: the numbers.
        price: of a worker for an hour; None where it is not known.

    Raises:
        UsageError: the price is negative, or a number of workers below 1.
    """
    if price is not None and price < 0:
        raise UsageError(f"--price: at least 0 for an hour of one worker, got {price}")
    return [Forecast(workers=number, outcome=run(number), price=price) for number in workers]


def table(found: Sequence[Forecast]) -> str:
    """Forecasts as text, a line for each number of workers."""
    priced = any(forecast.cost is not None for forecast in found)
    rows = [["workers", "makespan", "busy", "worker hours", *(["cost"] if priced else []), "limited by"]]
    for forecast in found:
        cost = [f"{forecast.cost:,.2f}"] if forecast.cost is not None else []
        share = f"{100 * forecast.outcome.busy:.0f} %"
        hours = f"{forecast.worker_hours:,.2f}"
        rows.append([f"{forecast.workers:,}", duration(forecast.outcome.makespan), share, hours, *cost])
        rows[-1].append(forecast.outcome.limit)
    return columns(rows)


def duration(seconds: float) -> str:
    """Seconds for people: 42.1 s, 12.3 min, 5.1 h, 3.2 days."""
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {name}"
    return f"{seconds:.1f} s"


# ------------------------------------------------------------------------------------- a grid


def grid_units(grid: Grid, calibration: Calibration) -> tuple[list[Unit], list[Unit]]:
    """The units of what a grid has to do, and of what waits for the results of its pairs.

    Mixtures that wait have ranks that nobody knows yet: they are taken to be an average of those that the plan names
    with as many active experts, or of all.

    Raises:
        UsageError: a task was not measured, and nothing is assumed of such tasks.
    """
    early = {mixture.mixture_id for mixture in grid.pairs} if grid.waiting else set()
    units, later = [], []
    for name, cell in grid.missing.items():
        mixture, task = cell.mixture, grid.tasks.tasks[cell.task]
        work = Work(
            mixture=mixture.mixture_id,
            seconds=0.0,
            experts=_cut(mixture) if mixture.uses_factors else (),
            early=mixture.mixture_id in early,
        )
        units += list(_cell_units(work, size_of(mixture), task, name, grid, calibration))
    for item in grid.waiting:
        alike = [size_of(mixture) for mixture in grid.mixtures if mixture.active == item.active]
        size = average(alike or map(size_of, grid.mixtures))
        work = Work(mixture=item.name, seconds=0.0)
        for task in grid.tasks.tasks.values():
            later += list(_cell_units(work, size, task, f"{item.name} on {task.name}", grid, calibration))
    return units, later


def size_of(mixture: PlannedMixture) -> Size:
    """What a mixture's speed depends on."""
    return Size(experts=len(mixture.kept), active=mixture.active, parameters=mixture.parameters)


def _cut(mixture: PlannedMixture) -> tuple[str, ...]:
    """The experts whose factors a mixture needs."""
    return tuple(name for name, rank in mixture.spec.ranks.items() if rank not in (DROP, FULL))


def _cell_units(
    work: Work, size: Size, task: PreparedTask, tag: str, grid: Grid, calibration: Calibration
) -> Iterator[Unit]:
    """The units of a cell: one, or as many as the grid splits a big task into."""
    number = -(-len(task.documents) // grid.options.shard_documents)
    for index, documents in enumerate(iter_shards(task, max(1, number))):
        seconds = calibration.seconds(task.name, len(documents), size)
        content = (task.name, index)
        yield new_unit(dataclasses.replace(work, seconds=seconds, documents=len(documents), content=content), tag)


def describe(calibration: Calibration) -> str:
    """What was measured, as text."""
    timing, errors = calibration.timing, sorted(map(abs, calibration.errors.values()))
    workers = f"{calibration.workers} workers" if calibration.workers else "workers unknown"
    lines = [
        f"measured  {calibration.cells:,} cells of {len(calibration.model.tasks)} tasks by {workers}",
        f"beside    start {timing.start:.1f} s, between cells {1000 * timing.unit:.1f} ms, new documents "
        f"{1000 * timing.first:.2f} ms each, driver {1000 * timing.driver:.1f} ms and commit "
        f"{1000 * timing.commit:.1f} ms a cell",
    ]
    if errors:
        lines.append(
            f"error     {100 * statistics.median(errors):.1f} % of a task's seconds (median over tasks, at most "
            f"{100 * errors[-1]:.1f} %), on cells left out of the fit"
        )
    return "\n".join(lines)


def assumptions(grid: Grid, calibration: Calibration) -> list[str]:
    """What a prediction takes for granted that was not measured, a sentence each."""
    notes = ["workers share cores, GPU and network of a node with as many others as in the calibrated run"]
    tasks = grid.tasks.tasks
    unknown = [name for name in tasks if name not in calibration.model.tasks]
    if unknown:
        seconds = calibration.document_seconds
        notes.append(f"not measured, {seconds:g} s per document as stated: {', '.join(unknown)}")
    one = [name for name in tasks if len(set(calibration.sizes.get(name, (0,)))) == 1 and name not in unknown]
    other = [name for name in one if len(tasks[name].documents) != calibration.sizes[name][0]]
    if other:
        notes.append(f"measured at one number of documents, and taken to be in proportion: {', '.join(other)}")
    largest = calibration.largest
    beyond = [
        mixture.name
        for mixture in grid.mixtures
        if any(getattr(size_of(mixture), name) > getattr(largest, name) for name in ("experts", "active", "parameters"))
    ]
    if beyond:
        notes.append(f"larger than any mixture that was measured: {', '.join(beyond[:5])}{' ...' * (len(beyond) > 5)}")
    if grid.waiting:
        names = ", ".join(item.name for item in grid.waiting)
        notes.append(f"ranks not known before the pairs are done, taken as average ones: {names}")
    return notes
