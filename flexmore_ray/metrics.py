"""Custom metrics in Ray's own pipeline: on every node's metrics port, as ``ray_NAME``, counters as ``ray_NAME_total``.

| metric                        | kind    | tags               | counts                                              |
|-------------------------------|---------|--------------------|-----------------------------------------------------|
| flexmore_grid_cells           | counter | grid, status       | cells committed by this run: done, failed           |
| flexmore_grid_cells_planned   | gauge   | grid               | cells of the plan                                   |
| flexmore_grid_cells_left      | gauge   | grid               | of these, still to compute                          |
| flexmore_grid_workers         | gauge   | grid               | workers that have started                           |
| flexmore_grid_documents       | counter | grid               | documents scored; its rate is documents/s           |
| flexmore_search_entries       | gauge   | search, kind,      | baselines and trials: left, running, complete,      |
|                               |         | state              | stopped, failed                                     |
| flexmore_search_best          | gauge   | search             | best score so far, in [0, 1]                        |
| flexmore_search_best_cost     | gauge   | search             | what the budget measures of that mixture            |
| flexmore_search_budget        | gauge   | search             | limit of what the budget measures                   |
| flexmore_search_seconds_left  | gauge   | search             | for the trials, by the pace of this run             |
| flexmore_search_documents     | counter | search             | documents scored                                    |
| flexmore_reserved_seconds     | counter | run, resource      | seconds x CPUs or GPUs that workers reserved        |
| flexmore_expert_events        | counter | run, expert, event | of expert actors: truncations served, cache_hits,   |
|                               |         |                    | cache_misses, decompositions, evictions             |
| flexmore_expert_bytes         | gauge   | run, expert        | memory that an actor's factors take                 |
| flexmore_expert_bytes_allowed | gauge   | run, expert        | memory that they may take                           |

`grid` is the plan's name, `search` the name of the search's folder, `run` "grid:NAME" or "search:NAME". A gauge goes
away 20 seconds after it was last set, so all are set again and again; a counter stays with its node.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from ray.util.metrics import Counter, Gauge

from flexmore_ray.placement import Needs

REPORT_SECONDS = 5.0
"""How often progress is reported while nothing happens; Ray itself collects every 10 seconds."""


@contextlib.contextmanager
def reporting(report: Callable[[], object]) -> Iterator[None]:
    """Call `report` at the start, every 5 seconds and at the end, for as long as the block runs.

    Args:
        report: called in a thread of its own but for the last time.
    """
    ended = threading.Event()

    def regularly() -> None:
        report()
        while not ended.wait(REPORT_SECONDS):
            report()

    thread = threading.Thread(target=regularly, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        report()


class _Reserved:
    """What the workers of one run reserve, added up over time."""

    def __init__(self, run: str, needs: Needs) -> None:
        self._seconds = Counter(
            "flexmore_reserved_seconds", "Seconds x CPUs or GPUs that workers reserved", ("run", "resource")
        )
        self._run, self._each = run, {"CPU": needs.num_cpus, "GPU": needs.num_gpus}
        self._since = time.monotonic()

    def add(self, workers: int) -> None:
        """So many workers since the last call."""
        now = time.monotonic()
        passed, self._since = now - self._since, now
        for resource, each in self._each.items():
            if workers * each * passed > 0:
                self._seconds.inc(workers * each * passed, {"run": self._run, "resource": resource})


class GridMetrics:
    """Progress of one grid.

    Args:
        grid: the plan's name.
        needs: what one worker reserves.
    """

    def __init__(self, grid: str, needs: Needs) -> None:
        self._cells = Counter("flexmore_grid_cells", "Cells committed by this run", ("grid", "status"))
        self._planned = Gauge("flexmore_grid_cells_planned", "Cells of the plan", ("grid",))
        self._left = Gauge("flexmore_grid_cells_left", "Cells of the plan that are still to compute", ("grid",))
        self._workers = Gauge("flexmore_grid_workers", "Workers that have started", ("grid",))
        self._documents = Counter("flexmore_grid_documents", "Documents scored", ("grid",))
        self._reserved = _Reserved(f"grid:{grid}", needs)
        self._tags = {"grid": grid}

    def committed(self, status: str) -> None:
        """A cell was committed as "done" or "failed"."""
        self._cells.inc(1, {**self._tags, "status": status})

    def scored(self, documents: int) -> None:
        """Documents came back from a worker."""
        self._documents.inc(documents, self._tags)

    def report(self, planned: int, left: int, workers: int) -> None:
        """Say how it goes; to be called often."""
        self._planned.set(planned, self._tags)
        self._left.set(left, self._tags)
        self._workers.set(workers, self._tags)
        self._reserved.add(workers)


class SearchMetrics:
    """Progress of one search.

    Args:
        search: the name of its folder.
        needs: what one worker reserves.
    """

    def __init__(self, search: str, needs: Needs) -> None:
        self._entries = Gauge("flexmore_search_entries", "Baselines and trials", ("search", "kind", "state"))
        self._best = Gauge("flexmore_search_best", "Best score so far", ("search",))
        self._cost = Gauge("flexmore_search_best_cost", "What the budget measures of the best mixture", ("search",))
        self._budget = Gauge("flexmore_search_budget", "Limit of what the budget measures", ("search",))
        self._left = Gauge("flexmore_search_seconds_left", "For the trials, by the pace of this run", ("search",))
        self._documents = Counter("flexmore_search_documents", "Documents scored", ("search",))
        self._reserved = _Reserved(f"search:{search}", needs)
        self._tags = {"search": search}

    def scored(self, documents: int) -> None:
        """Documents came back from a worker."""
        if documents:
            self._documents.inc(documents, self._tags)

    def report(
        self,
        entries: Mapping[tuple[str, str], int],
        best: tuple[float, int] | None,
        budget: int,
        workers: int,
        seconds_left: float | None,
    ) -> None:
        """Say how it goes; to be called often.

        Args:
            entries: how many there are, by kind (baseline, trial) and state.
            best: the best score and what it costs; None before there is one.
            budget: the limit of costs.
            workers: that are at work.
            seconds_left: for the trials; None before there is a pace.
        """
        for (kind, state), number in entries.items():
            self._entries.set(number, {**self._tags, "kind": kind, "state": state})
        self._budget.set(budget, self._tags)
        if best is not None:
            self._best.set(best[0], self._tags)
            self._cost.set(best[1], self._tags)
        if seconds_left is not None:
            self._left.set(seconds_left, self._tags)
        self._reserved.add(workers)


class ExpertMetrics:
    """What one expert actor does and holds, in its process.

    Args:
        run: what the actor belongs to.
        expert: its name.
    """

    def __init__(self, run: str, expert: str) -> None:
        self._tags = {"run": run, "expert": expert}

    def happened(self, event: str, count: int = 1) -> None:
        """Count what the actor did."""
        _expert_events().inc(count, {**self._tags, "event": event})

    def watch(self, look: Callable[[], tuple[int, int]]) -> None:
        """Tell of its memory from now on, for as long as the process lives.

        Args:
            look: gives the bytes that its factors take, and those allowed.
        """
        held, budget = _expert_bytes()

        def regularly() -> None:
            while True:
                taken, allowed = look()
                held.set(taken, self._tags)
                budget.set(allowed, self._tags)
                time.sleep(REPORT_SECONDS)

        threading.Thread(target=regularly, name="metrics", daemon=True).start()


@functools.cache
def _expert_events() -> Counter:
    return Counter("flexmore_expert_events", "What expert actors did", ("run", "expert", "event"))


@functools.cache
def _expert_bytes() -> tuple[Gauge, Gauge]:
    return (
        Gauge("flexmore_expert_bytes", "Memory that an expert actor's factors take", ("run", "expert")),
        Gauge("flexmore_expert_bytes_allowed", "Memory that they may take", ("run", "expert")),
    )
