"""The honest end: the best few and the baselines on the test split, with paired-bootstrap intervals."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmore_ray.report.analysis import RESAMPLES, Array, Interval, Measure, bootstrap_means, interval, mean
from flexmore_ray.scores import Sample, Scores, TaskScore
from search.ledger import Entry

_LEAST_GAIN = 1e-3  # of the full mixture over the public expert, below which no share of it is given


def measure(scores: Sequence[Scores], seed: int = 0) -> tuple[Measure, dict[str, Measure]]:
    """The average of groups, and each group, of some mixtures, their documents drawn again and again.

    The draw of a task's documents is the same for all mixtures, so that differences are paired. A task whose score
    is not the mean over its documents is held fixed.

    Args:
        scores: of M mixtures on the same documents.
        seed: of the draws.

    Returns:
        The average over groups, and by group; M columns each.
    """
    groups: dict[str, list[Measure]] = {}
    for name, first in scores[0].tasks.items():
        found = [mixture.tasks[name] for mixture in scores]
        groups.setdefault(first.group, []).append(_resampled(found, seed))
    by_group = {name: mean(tasks) for name, tasks in groups.items()}
    return mean(list(by_group.values())), by_group


def _resampled(scores: Sequence[TaskScore], seed: int) -> Measure:
    values = np.array([score.value for score in scores], dtype=np.float64)
    documents = _document_values(scores)
    if not np.allclose(documents.mean(axis=1), values, rtol=0, atol=1e-9):
        return Measure(values, np.broadcast_to(values, (RESAMPLES, len(values))))
    name = int.from_bytes(hashlib.sha256(scores[0].task.encode()).digest()[:8])
    return Measure(values, bootstrap_means(documents, RESAMPLES, np.random.default_rng([seed, name])))


def _document_values(scores: Sequence[TaskScore]) -> Array:
    """The primary metric of every document (M, N); NaN where it is not a number."""
    key = (scores[0].metric, scores[0].filter)
    return np.array([[_number(sample, key) for sample in score.samples] for score in scores], dtype=np.float64)


def _number(sample: Sample, key: tuple[str, str]) -> float:
    value = sample.metrics.get(key)
    return float(value) if isinstance(value, bool | int | float) else np.nan


def conclude(entries: Sequence[Entry], finalists: Sequence[Entry], scores: Sequence[Scores]) -> dict[str, Any]:
    """What `final.json` says of the entries: test scores, differences of the winner to each, and the verdict.

    Args:
        entries: those scored on the test split.
        finalists: the best of them by the validation split, the winner first.
        scores: on the test split, one for each entry.
    """
    average, groups = measure(scores)
    winner = next(i for i, entry in enumerate(entries) if entry.number == finalists[0].number)
    chosen = {entry.number for entry in finalists}
    differences = {i: average.difference(winner, i) for i in range(len(entries)) if i != winner}
    rows = []
    for i, entry in enumerate(entries):
        row = {
            **{
                name: getattr(entry, name)
                for name in ("name", "kind", "warm", "fits", "cost", "parameters", "active", "ranks")
            },
            "finalist": entry.number in chosen,
            "validation": entry.value,
            "groups_validation": entry.groups,
            "test": _plain(average.interval(i)),
            "groups": {name: _plain(group.interval(i)) for name, group in groups.items()},
        }
        if i in differences:
            row["difference"] = _plain(differences[i]) | {"verdict": differences[i].verdict}
        rows.append(row)
    by_name = {entry.name: i for i, entry in enumerate(entries) if entry.kind == "baseline"}
    against = {name: differences[i] for name, i in by_name.items() if i in differences}
    gain = _gain(average, winner, by_name)
    return {
        "winner": entries[winner].name,
        "entries": rows,
        "gain": None if gain is None else _plain(gain),
        "verdict": _sentence(entries[winner].name, against),
    }


def _gain(average: Measure, winner: int, baselines: Mapping[str, int]) -> Interval | None:
    """(winner - public) / (full - public); None where the full mixture gains nothing."""
    if not {"full", "public"} <= set(baselines):
        return None
    full, public = baselines["full"], baselines["public"]
    whole = average.value[full] - average.value[public]
    draws = average.draws[:, full] - average.draws[:, public]
    if min(whole, draws.min()) < _LEAST_GAIN:
        return None
    value = float((average.value[winner] - average.value[public]) / whole)
    return interval(value, (average.draws[:, winner] - average.draws[:, public]) / draws)


def _sentence(winner: str, against: Mapping[str, Interval]) -> str:
    """The verdict in words: against the full mixture, then against the other baselines by verdict."""
    parts = []
    if "full" in against:
        parts.append(f"{winner} is {_in_words(against['full'])} the full mixture ({_points(against['full'])})")
    elif winner == "full":
        parts.append("the winner is the full mixture itself")
    else:
        parts.append(f"{winner} is the winner")
    for verdict in ("better", "equal within noise", "worse"):
        names = [name for name, found in against.items() if name != "full" and found.verdict == verdict]
        if names:
            parts.append(f"{_WORDS[verdict]} {', '.join(names)}")
    return "; ".join(parts) + "."


_WORDS = {"better": "better than", "equal within noise": "equal within noise to", "worse": "worse than"}


def _in_words(found: Interval) -> str:
    return _WORDS[found.verdict]


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.1f} points, {100 * found.low:+.1f} to {100 * found.high:+.1f}"


def _plain(found: Interval) -> dict[str, float]:
    return dataclasses.asdict(found)
