"""Custom metrics in Ray's own pipeline: on every node's metrics port, in Prometheus with the prefix ``ray_``.

| metric                           | kind    | tags           | counts                                        |
|----------------------------------|---------|----------------|-----------------------------------------------|
| flexmore_grid_cells              | counter | grid, status   | cells committed: done, failed                 |
| flexmore_grid_cells_left         | gauge   | grid           | cells of the plan that are still missing      |
| flexmore_grid_workers            | gauge   | grid           | workers that have started                     |
| flexmore_grid_documents          | counter | grid           | documents scored; its rate is documents/s     |
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


@functools.cache
def _expert_events() -> Counter:
    return Counter("flexmore_expert_events", "What expert actors did", ("expert", "event"))


def observe_expert(expert: str, event: str, count: int = 1) -> None:
    """Count what an expert actor did, in its process."""
    _expert_events().inc(count, {"expert": expert, "event": event})
