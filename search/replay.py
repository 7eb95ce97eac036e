"""A search again, with other numbers of workers: the recorded times of its entries under the order that it follows.

Baselines come first, then trials, then what is reported on the test split; each begins when the one before has ended,
and a worker that is free takes what is next. Which trials are stopped early is as recorded: with more workers ASHA
decides on fewer results, and the sampler too, so a search may find less in the same number of trials.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence

from flexmore_ray.errors import UsageError
from flexmore_ray.results import DONE, read_cells
from flexmore_ray.simulate import Outcome, Span
from flexmore_ray.storage import AnyPath
from search.ledger import Entry, Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """The times of a search."""

    start: float
    """Seconds from its beginning until its workers are ready."""
    stages: Sequence[Sequence[float]]
    """Seconds of baselines, trials and tests, what Tune and the search add to each included."""

    @property
    def assumed(self) -> list[str]:
        """What a replay takes for granted, a sentence each."""
        notes = ["trials are stopped early as recorded, and workers share nodes as in the recorded run"]
        if not self.stages[-1]:
            notes.append("nothing is scored on the test split: the search keeps its cells in another folder")
        return notes


def read_search(out: AnyPath, *, trials: int | None = None, start: float | None = None) -> Recorded:
    """The times of a search from its folder.

    Args:
        out: the folder.
        trials: as many trials as this, those of the folder again and again; None: as many as there are.
        start: seconds until workers are ready; None takes those of the folder's last run.

    Raises:
        UsageError: the folder has no entry that ended, or does not tell its start.
    """
    ended = [entry for entry in Ledger(out).read() if entry.finished is not None and entry.state != "failed"]
    if not any(entry.kind == "trial" for entry in ended):
        raise UsageError(f"--search: {out} holds no trial that ended; name the --out of a search")
    if trials is not None and trials < 1:
        raise UsageError(f"--trials: at least 1, got {trials}")
    beside = max(0.0, statistics.median(_beside(entry) for entry in ended))
    tried = [entry.seconds + beside for entry in ended if entry.kind == "trial"]
    known = tried if trials is None else list(itertools.islice(itertools.cycle(tried), trials))
    stages = [[entry.seconds + beside for entry in ended if entry.kind == "baseline"], known, _tests(out, beside)]
    return Recorded(start=_start(out, ended) if start is None else start, stages=stages)


def _beside(entry: Entry) -> float:
    """Seconds of an entry that its rungs did not compute."""
    assert entry.finished is not None
    return entry.finished - entry.started - entry.seconds


def _tests(out: AnyPath, beside: float) -> list[float]:
    """Seconds of every mixture that was scored on the test split; none where the cells are in another folder."""
    seconds: dict[str, float] = defaultdict(float)
    for row in read_cells(out / "results").select(["mixture_id", "split", "seconds", "status"]).to_pylist():
        if row["split"] == "test" and row["status"] == DONE:
            seconds[row["mixture_id"]] += row["seconds"]
    return [taken + beside for taken in seconds.values()]


def _start(out: AnyPath, ended: Sequence[Entry]) -> float:
    lock = out / ".lock"
    first = min((entry.finished or 0.0) - entry.seconds for entry in ended)
    began = lock.stat().st_mtime if lock.exists() else None
    if began is None or began > first:
        raise UsageError(f"--search: {out} was gone on with, and does not tell its start; give --start-seconds")
    return first - began


def replay(recorded: Recorded, workers: int) -> Outcome:
    """Go through the stages with so many workers.

    Raises:
        UsageError: fewer than one worker.
    """
    if workers < 1:
        raise UsageError(f"--workers: at least 1, got {workers}")
    now, spans = recorded.start, []
    for stage, durations in enumerate(recorded.stages):
        free = [(now, worker) for worker in range(workers)]
        for number, seconds in enumerate(durations):
            begin, worker = heapq.heappop(free)
            spans.append(Span(worker=worker, tag=(stage, number), begin=begin, end=begin + seconds))
            heapq.heappush(free, (begin + seconds, worker))
        now = max(when for when, _ in free)
    scoring = sum(map(sum, recorded.stages))
    longest = sum(max(durations, default=0.0) for durations in recorded.stages)
    return Outcome(
        workers=workers,
        makespan=now,
        scoring=scoring,
        held=workers * now,
        bounds={"work": scoring / workers, "start": recorded.start, "longest unit": longest},
        spans=spans,
    )
