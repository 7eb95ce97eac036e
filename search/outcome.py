"""What a search left in its folder, read back for the report: settings, entries, front, verdict, importance of ranks.

OUT/search.json      its identity and settings
OUT/trials.parquet   every entry: baselines and trials
OUT/front.parquet    the complete entries that no other one beats
OUT/final.json       winner, finalists and baselines with their test scores
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pyarrow
import pyarrow.parquet
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.results import read_bounded
from flexmore_ray.spec import DROP, FULL
from flexmore_ray.storage import AnyPath, StorageError
from search.ledger import TRIAL_SCHEMA, Entry, read_json
from search.space import ACTIVE

_SETTINGS = (
    "source",
    "experts",
    "tasks",
    "measure",
    "full_cost",
    "granularity",
    "levels",
    "actives",
    "objective",
    "rungs",
)
_FINAL = ("winner", "entries", "gain", "verdict", "documents", "seconds")
MEASURES = {"parameters": "total parameters", "active": "active parameters", "bytes": "bytes"}
"""What a budget can count -> how the report calls it."""

_MOST_EXPERTS = 8  # whose ranks are listed one by one in a table

# --- what a search left -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """The files of a search that has ended."""

    settings: Mapping[str, Any]
    entries: tuple[Entry, ...]
    """By number."""
    front: tuple[Entry, ...]
    """By cost."""
    final: Mapping[str, Any]

    @property
    def experts(self) -> tuple[str, ...]:
        """The domain experts."""
        return tuple(self.settings["experts"][1:])

    @property
    def baselines(self) -> list[Entry]:
        """Entries that the sampler did not choose."""
        return [entry for entry in self.entries if entry.kind == "baseline"]

    @property
    def trials(self) -> list[Entry]:
        """Entries that the sampler chose."""
        return [entry for entry in self.entries if entry.kind != "baseline"]

    @property
    def complete_trials(self) -> list[Entry]:
        """Trials whose score is over all documents."""
        return [entry for entry in self.trials if entry.state == "complete" and entry.point]

    @property
    def top(self) -> int:
        """The highest level of a point, the full expert; -1 is drop, and a level between them rank 2**level."""
        return len(self.settings["levels"]) - 2

    @property
    def winner(self) -> Mapping[str, Any] | None:
        """The entry of `final.json` that won; None if none could."""
        found = (entry for entry in self.final["entries"] if entry["name"] == self.final["winner"])
        return next(found, None)

    def best(self, number: int) -> list[Entry]:
        """Complete entries within the budget, the highest score first, the cheapest of equals; each mixture once."""
        fitting = [entry for entry in self.entries if entry.state == "complete" and entry.fits]
        found: dict[str, Entry] = {}
        for entry in sorted(fitting, key=lambda entry: (-entry.value, entry.cost, entry.number)):
            found.setdefault(entry.mixture_id, entry)
        return list(found.values())[:number]

    def amount(self, cost: int) -> str:
        """A cost with its unit, such as 1.46M, or 5.84 MB of bytes."""
        letter = " {}B" if self.settings["measure"] == "bytes" else "{}"
        if cost >= 1e9:
            return f"{cost / 1e9:.2f}{letter.format('G' if 'B' in letter else 'B')}"
        return f"{cost / 1e6:.2f}{letter.format('M')}" if cost >= 1e5 else f"{cost:,}{letter.format('')}"

    def ratio(self, cost: int) -> str:
        """A cost as a share of the full mixture's."""
        return f"{cost / self.settings['full_cost']:.3f}x"


def read_search(out: AnyPath) -> Search:
    """Read the files of a search.

    Raises:
        UsageError: there is no search in the folder, or it has not ended.
        FlexmoreError: a file is damaged.
    """
    if not (out / "search.json").is_file():
        raise UsageError(f"no search in {out}: it has no search.json; start one with flexmore search --out {out}")
    for name in ("final.json", "trials.parquet", "front.parquet"):
        if not (out / name).is_file():
            raise UsageError(f"the search in {out} has not ended: it has no {name}; start the same search again")
    return Search(
        settings=_read_object(out / "search.json", _SETTINGS),
        entries=_read_entries(out / "trials.parquet"),
        front=_read_entries(out / "front.parquet"),
        final=_read_object(out / "final.json", _FINAL),
    )


def _read_object(path: AnyPath, keys: Iterable[str]) -> dict[str, Any]:
    data = read_json(path)
    data = data.get("identity", {}) | data
    missing = [key for key in keys if key not in data]
    if missing:
        raise FlexmoreError(f"{path} has no {', '.join(missing)}; start the same search again to write it anew")
    return data


def _read_entries(path: AnyPath) -> tuple[Entry, ...]:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(path.read_bytes()))
        return tuple(_entry(row) for row in read_bounded(file).to_pylist())
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FlexmoreError(f"{path} cannot be read ({what}); start the same search again to write it anew") from error


def _entry(row: Mapping[str, Any]) -> Entry:
    """An entry from a row of `TRIAL_SCHEMA`."""
    fields = {name: row[name] for name in TRIAL_SCHEMA.names if name != "score" and name in row}
    fields |= {name: json.loads(row[name]) for name in ("ranks", "point", "groups") if row[name]}
    return Entry(**fields)


# --- ranks in words ---------------------------------------------------------------------------------------


def _flat(rank: Any) -> list[Any]:
    """All ranks in what a mixture file says of one expert."""
    if isinstance(rank, Mapping):
        return [found for part in rank.values() for found in _flat(part)]
    return [found for part in rank for found in _flat(part)] if isinstance(rank, list | tuple) else [rank]


def _level(rank: Any) -> float:
    """The order of ranks: drop, 1, 2 ... full."""
    return 0.0 if rank == DROP else math.inf if rank == FULL else float(rank)


def span(rank: Any) -> str:
    """What a mixture file says of one expert: its rank, or the lowest and the highest of its matrices' ranks."""
    found = sorted(_flat(rank), key=_level)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def describe_ranks(ranks: Mapping[str, Any], experts: Sequence[str]) -> str:
    """An assignment in a few words: "math 16, news drop"; of many experts how many have which rank.

    Args:
        ranks: Expert -> rank, as in a mixture file; an expert that is not named is full.
        experts: The domain experts. A refined rank is shown as its range, such as "4 to 16".
    """
    spans = {name: span(ranks.get(name, FULL)) for name in experts}
    if not spans:
        return "-"
    if len(set(spans.values())) == 1 and len(spans) > 1:
        return f"all {next(iter(spans.values()))}"
    if len(spans) <= _MOST_EXPERTS:
        return ", ".join(f"{name} {span}" for name, span in spans.items())
    counts = Counter(spans[name] for name in sorted(experts, key=lambda name: _level(_flat(ranks.get(name, FULL))[0])))
    return ", ".join(f"{number} \N{MULTIPLICATION SIGN} {span}" for span, number in counts.items())


def parameter_name(name: str) -> str:
    """What a parameter of a point stands for: the name of an expert, or "active experts"."""
    return "active experts" if name == ACTIVE else name.partition(".")[2]


# --- importance -------------------------------------------------------------------------------------------

FOLDS = 5
"""Repetitions of the estimate of importance, each without every `FOLDS`-th trial."""
_MIN_TRIALS = 30
_MIN_TRIALS_PER_PARAMETER = 5


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much of the variation in score one parameter explains by itself; all parameters together are 1."""

    name: str
    """See `parameter_name`."""
    value: float
    low: float
    """The lowest of the estimates with all trials and with some left out."""
    high: float
    """The highest of them."""


def trials_needed(search: Search) -> int:
    """Complete trials below which importance is not estimated: the forest would rank parameters by chance."""
    searched = len(search.experts) + (len(search.settings["actives"]) > 1)
    return max(_MIN_TRIALS, _MIN_TRIALS_PER_PARAMETER * searched)


def rank_importance(search: Search) -> list[Importance]:
    """The main effects of the parameters on the validation score, over the complete trials: fANOVA.

    fANOVA rather than Optuna's default, PED-ANOVA, because that one compares the best tenth of the trials with
    the rest, and of a few dozen trials a tenth is too few.

    Returns:
        The most important first; empty where the scores do not differ.

    Source: Hutter, Hoos, Leyton-Brown, An efficient approach for assessing hyperparameter importance, ICML 2014.
    """
    trials = search.complete_trials
    folds = [[t for i, t in enumerate(trials) if i % FOLDS != fold] for fold in range(FOLDS)]
    if any(np.ptp([entry.value for entry in fold]) == 0 for fold in folds if fold) or not trials:
        return []
    whole = _main_effects(trials, search)
    every = [whole, *(_main_effects(fold, search) for fold in folds)]
    found = [
        Importance(name, value, min(part[name] for part in every), max(part[name] for part in every))
        for name, value in whole.items()
    ]
    return sorted(found, key=lambda importance: -importance.value)


def _main_effects(entries: Sequence[Entry], search: Search) -> dict[str, float]:
    """Parameter -> share, from a study made of the entries' points."""
    actives, top = search.settings["actives"], search.top
    distributions: dict[str, BaseDistribution] = {
        name: IntDistribution(actives[0], actives[-1]) if name == ACTIVE else IntDistribution(-1, top)
        for name in entries[0].point or {}
    }
    with _quiet():
        study = optuna.create_study(direction="maximize")
        for entry in entries:
            study.add_trial(entry.frozen(distributions, search.settings["full_cost"], front=False))
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {parameter_name(name): float(found[name]) for name in distributions}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word from Optuna about a study that only exists for a moment."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
