"""Custom metrics in Ray's own pipeline: on every node's metrics port, in Prometheus with the prefix ``ray_``.

| metric                           | kind    | tags           | counts                                        |
|----------------------------------|---------|----------------|-----------------------------------------------|
| flexmore_grid_cells              | counter | grid, status   | cells committed: done, failed                 |
| flexmore_grid_cells_left         | gauge   | grid           | cells of the plan that are still missing      |
| flexmore_grid_workers            | gauge   | grid           | workers that have started                     |
| flexmore_grid_documents          | counter | grid           | documents scored; its rate is documents/s     |
| flexmore_search_trials           | counter | state          | entries of searches that ended, by how        |
| flexmore_search_best             | gauge   |                | best score so far, in [0, 1]                  |
| flexmore_search_budget           | gauge   |                | limit of what the budget measures             |
| flexmore_search_documents        | counter |                | documents scored                              |
| flexmore_expert_events           | counter | expert, event  | truncations served, cache hits and misses,    |
|                                  |         |                | decompositions, evictions                     |
"""

from __future__ import annotations

import functools

from ray.util.metrics import Counter, Gauge


class GridMetrics:
    """Progress of one grid."""

    def __init__(self, grid: str) -> None:
        self._cells = Counter("flexmore_grid_cells", "Cells committed", ("grid", "status"))
        self._left = Gauge("flexmore_grid_cells_left", "Cells of the plan that are still missing", ("grid",))
        self._workers = Gauge("flexmore_grid_workers", "Workers that have started", ("grid",))
        self._documents = Counter("flexmore_grid_documents", "Documents scored", ("grid",))
        self._tags = {"grid": grid}

    def committed(self, status: str, left: int, workers: int) -> None:
        """A cell was committed."""
        self._cells.inc(1, {**self._tags, "status": status})
        self._left.set(left, self._tags)
        self._workers.set(workers, self._tags)

    def scored(self, documents: int) -> None:
        """Documents came back from a worker."""
        self._documents.inc(documents, self._tags)


class SearchMetrics:
    """Progress of one search."""

    def __init__(self) -> None:
        self._trials = Counter("flexmore_search_trials", "Entries that ended", ("state",))
        self._best = Gauge("flexmore_search_best", "Best score so far")
        self._budget = Gauge("flexmore_search_budget", "Limit of what the budget measures")
        self._documents = Counter("flexmore_search_documents", "Documents scored")

    def ended(self, state: str, best: float | None, budget: int) -> None:
        """An entry ended; the best score is None before there is one."""
        self._trials.inc(1, {"state": state})
        self._budget.set(budget)
        if best is not None:
            self._best.set(best)

    def scored(self, documents: int) -> None:
        """Documents came back from a worker."""
        if documents:
            self._documents.inc(documents)


@functools.cache
def _expert_events() -> Counter:
    return Counter("flexmore_expert_events", "What expert actors did", ("expert", "event"))


def observe_expert(expert: str, event: str, count: int = 1) -> None:
    """Count what an expert actor did, in its process."""
    _expert_events().inc(count, {"expert": expert, "event": event})
