"""How a search goes: a bar on a terminal, a line now and then in a job's log, and Ray's metrics."""

from __future__ import annotations

import collections
import sys
import time
from types import TracebackType

from tqdm import tqdm

from flexmore_ray.budget import format_count
from flexmore_ray.metrics import SearchMetrics, reporting
from search.ledger import Entry
from search.study import Study

_LOG_SECONDS = 10.0
_STATES = ("running", "complete", "stopped", "failed")


class Progress:
    """Tells of a search for as long as its context is open.

    Args:
        study: what it is about.
        trials: how many there are to be.
        budget: the limit that their costs are under.
        metrics: told of it too.
    """

    def __init__(self, study: Study, trials: int, budget: int, metrics: SearchMetrics) -> None:
        self._study, self._trials, self._budget = study, trials, budget
        self._start = self._said = time.monotonic()
        self._before = len(self._ended())
        self._metrics, self._reporting = metrics, reporting(self._report)
        self.at_work = 0
        """Workers that score something now."""
        self._tests = 0
        self._text = ""
        done = self._before
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(desc="search", unit="trial", total=trials, initial=done, disable=hidden, leave=False)

    def __enter__(self) -> Progress:
        self._reporting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.at_work = 0
        self._reporting.__exit__(kind, error, traceback)
        self._bar.close()

    def scored(self, documents: int) -> None:
        """Documents came back from a worker."""
        self._metrics.scored(documents)

    def ended(self, entry: Entry) -> None:
        """An entry ended."""
        best = self._study.best
        if entry.kind == "trial":
            self._bar.update()
        if best is not None and best is entry:
            self._line(f"{entry.name} is the best so far: {self.describe()}")

    def testing(self, mixtures: int) -> None:
        """The test split begins."""
        self._tests = mixtures
        if mixtures:
            self._line(f"{self.describe()}; {mixtures} left to score on the test split")

    def tell(self) -> None:
        """Say how it goes, if it was not said for a while."""
        self._bar.set_postfix_str(self.describe(), refresh=False)
        if time.monotonic() - self._said > _LOG_SECONDS:
            self._line(self.describe())

    def describe(self) -> str:
        """Best so far, its size, the budget, counts of trials, time left."""
        best, ended = self._study.best, self._ended()
        stopped = sum(entry.state == "stopped" for entry in ended)
        parts = [f"{len(ended)}/{self._trials} trials", f"{len(self._study.live)} running", f"{stopped} stopped early"]
        if best is not None:
            size = f"{format_count(best.cost)} of {format_count(self._budget)}"
            parts.insert(0, f"best {100 * best.value:.1f} ({size})")
        left = self._seconds_left(len(ended))
        return ", ".join([*parts, *([f"about {left / 60:.1f} min left"] if left else [])])

    def _report(self) -> None:
        states = (*(("baseline", state) for state in _STATES), *(("trial", state) for state in _STATES))
        entries = collections.Counter(dict.fromkeys(states, 0))
        entries.update((entry.kind, entry.state) for entry in list(self._study.entries))
        entries["trial", "left"] = self._trials - sum(entries["trial", state] for state in _STATES)
        best = self._study.best
        found = None if best is None else (best.value, best.cost)
        left = self._seconds_left(len(self._ended()))
        self._metrics.report(entries, found, self._budget, self.at_work, left)

    def _seconds_left(self, ended: int) -> float | None:
        """By the pace of this run; None before there is one."""
        new = ended - self._before
        return (time.monotonic() - self._start) / new * (self._trials - ended) if new else None

    def _ended(self) -> list[Entry]:
        return [entry for entry in self._study.trials if entry.state != "running"]

    def _line(self, text: str) -> None:
        """A line in the log; on a terminal the bar has it."""
        self._said = time.monotonic()
        if self._bar.disable and text != self._text:
            print(text, flush=True)
        self._text = text
