"""Workers of a search that score by a mixture's ranks instead of its answers, in a module that actors can import."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmore_ray.scores import Sample, TaskScore
from flexmore_ray.spec import DROP, FULL
from flexmore_ray.worker import Worker


class Scripted(Worker):
    """Gives every document of a mixture one value."""

    def run(
        self, ranks: Mapping[str, Any], active: int, split: Any, task: str, content: str, documents: Any
    ) -> TaskScore:
        prepared, value = self._tasks[split][task], self.value(ranks)
        samples = [
            Sample(
                doc_id=number,
                doc_hash=prepared.hashes[number],
                target="",
                responses=[],
                correct=None,
                metrics={("acc", "none"): value},
            )
            for number in documents
        ]
        return prepared.aggregate(samples, 0.0)

    def value(self, ranks: Mapping[str, Any]) -> float:
        """Less for the points of a search than for its baselines."""
        return 0.1 if is_point(ranks) else 0.5


class Troubled(Scripted):
    """Dies once, on the first point that it gets; cannot score the second one, nor any from the fifth on.

    Args:
        folder: where it leaves a mark that it died.
        settings: of any worker.
    """

    def __init__(self, folder: Path, *settings: Any) -> None:
        super().__init__(*settings)
        self._mark = folder / "died"
        self._points: list[Mapping[str, Any]] = []

    def value(self, ranks: Mapping[str, Any]) -> float:
        value = super().value(ranks)
        if not is_point(ranks):
            return value
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks not in self._points:
            self._points.append(ranks)
        number = self._points.index(ranks)
        return math.nan if number == 1 or number > 3 else value


def is_point(ranks: Mapping[str, Any]) -> bool:
    """Whether the ranks are what a sampler chose: powers of two, and not all experts full or dropped."""
    values = list(ranks.values())
    same = all(rank == FULL for rank in values) or all(rank == DROP for rank in values)
    return not same and all(
        rank in (FULL, DROP) or (isinstance(rank, int) and rank.bit_count() == 1) for rank in values
    )
