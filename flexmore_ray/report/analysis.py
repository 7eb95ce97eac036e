"""What results say: scores with intervals, best ranks, regression on rank, the Pareto front.

    symbol   meaning
    M        mixtures of a section
    N        documents of a task
    B        resamples of the bootstrap
    R        ranks at which a two-expert mixture was scored, the full one last

`resample` draws the documents of each task again, with replacement and with the same draw for all mixtures, so that
the difference of two mixtures has the interval of a paired comparison. Everything that follows is a `Measure` (a
score and its B resampled values per mixture) or a function of one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.report.sections import Cell, Rank, Section
from flexmore_ray.results import read_samples
from flexmore_ray.spec import FULL
from flexmore_ray.storage import AnyPath
from flexmore_ray.suites import Group

Array = NDArray[Any]

RESAMPLES = 2000
LEVEL = 0.95
"""Share of the resampled values that an interval holds, the same share left out on either side."""
MIN_RANKS = 4
"""Ranks that a quadratic is fitted to at the least; through three it would pass exactly."""

SHARES = (0.9, 0.95, 1.0)
"""Shares of the full mixture's gain over the public expert whose parameters a curve tells."""

SUFFICIENT = 0.95
"""Share of the gain over the lowest rank that makes a rank sufficient."""

_FLAT = 1e-9  # gain in score below which a fitted curve counts as flat
_ROUNDING = 1e-6  # of resampled scores, which are kept in float32
_BATCH = 16  # cells whose samples are in memory at the same time
_MOST_PERMUTATIONS = 20_000


# --- the bootstrap ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the interval of its resampled values."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better, worse, or equal within noise: whether a difference's interval excludes zero."""
        if math.isnan(self.value):
            return "not known"
        return "better" if self.low > _ROUNDING else "worse" if self.high < -_ROUNDING else "equal within noise"


def interval(value: float, draws: Array) -> Interval:
    """The percentile interval of an estimate from its resampled values (B,)."""
    if math.isnan(value):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score of every mixture, or of some: on a task, a group, or all; NaN where it was not scored."""

    value: Array
    """(M,)"""
    draws: Array
    """(B, M), row b from the b-th resample of the documents, the same for all mixtures."""

    def __getitem__(self, columns: Sequence[int]) -> Measure:
        return Measure(self.value[list(columns)], self.draws[:, list(columns)])

    def interval(self, column: int) -> Interval:
        """The score of one mixture."""
        return interval(float(self.value[column]), self.draws[:, column])

    def difference(self, column: int, base: int) -> Interval:
        """The score of one mixture minus that of another, paired by documents."""
        value = float(self.value[column] - self.value[base])
        return interval(value, self.draws[:, column] - self.draws[:, base])


def mean(measures: Sequence[Measure]) -> Measure:
    """The unweighted mean; NaN for a mixture that one of them lacks."""
    value = functools.reduce(np.add, (measure.value for measure in measures)) / len(measures)
    draws = functools.reduce(np.add, (measure.draws for measure in measures)) / len(measures)
    return Measure(value, draws)


def bootstrap_means(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Means over documents drawn with replacement, the same draw for all mixtures.

    Args:
        values: (M, N), a number per mixture and document.
        resamples: B.
        rng: where the draws come from.

    Returns:
        (B, M): counts of the drawn documents (B, N) times the values (N, M), over N.
    """
    documents = values.shape[1]
    drawn = rng.integers(documents, size=(resamples, documents)) + documents * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * documents).reshape(resamples, documents)
    return counts.astype(np.float64) @ values.T / documents


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The measures of a section."""

    tasks: Mapping[str, Measure]
    groups: Mapping[str, Measure]
    average: Measure
    """Unweighted mean of the groups."""
    documents: Mapping[str, int]
    """Task -> number of documents."""
    held_fixed: tuple[str, ...]
    """Tasks whose score is not a mean over documents and is not resampled."""


def resample(
    section: Section,
    results: str | AnyPath,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    advance: Callable[[], object] | None = None,
) -> Estimates:
    """Read the samples of a section and draw the documents of each task again and again.

    Args:
        section: What to read.
        results: The results folder.
        resamples: B, at least 1.
        seed: Of the draws; a task's draws depend on it, on the task's name and on nothing else.
        advance: Called after each task.

    Raises:
        FlexmoreError: A file is missing or damaged, or mixtures were scored on different documents.
    """
    tasks, documents, fixed = {}, {}, []
    for task in section.tasks:
        cells = {i: section.cells.get((m.mixture_id, task)) for i, m in enumerate(section.mixtures)}
        found = {i: cell for i, cell in cells.items() if cell is not None}
        value = np.full(len(section.mixtures), np.nan)
        draws = np.full((resamples, len(section.mixtures)), np.nan, dtype=np.float32)
        columns = list(found)
        if found:
            value[columns] = [cell.value for cell in found.values()]
            documents[task], per_document = _document_values(results, list(found.values()))
            rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(task.encode()).digest()[:8])])
            if per_document is None:
                fixed.append(task)
                draws[:, columns] = value[columns]
            else:
                draws[:, columns] = bootstrap_means(per_document, resamples, rng)
        tasks[task] = Measure(value, draws)
        if advance:
            advance()
    groups = {group.name: mean([tasks[task] for task in group.tasks]) for group in section.groups}
    return Estimates(tasks, groups, mean(list(groups.values())), documents, tuple(fixed))


def _document_values(results: str | AnyPath, cells: Sequence[Cell]) -> tuple[int, Array | None]:
    """Number of documents, and (M, N) values whose means are the scores; None where there are none such."""
    rows, ids, hashes = [], None, None
    for start in range(0, len(cells), _BATCH):
        batch = cells[start : start + _BATCH]
        table = read_samples(results, [cell.cell for cell in batch])
        shape = (len(batch), table.num_rows // len(batch))
        same = table.num_rows == shape[0] * shape[1]
        found = [table[name].to_numpy() for name in ("doc_id", "doc_hash")]
        if ids is None:
            ids, hashes = (column[: shape[1]] for column in found)
        same = same and shape[1] == len(ids)
        same = same and bool((found[0].reshape(shape) == ids).all() and (found[1].reshape(shape) == hashes).all())
        if not same:
            raise FlexmoreError(
                f"task {cells[0].task}: mixtures were scored on different documents under the same split and limit, so "
                f"they cannot be compared; look at samples/{cells[0].cell}.parquet and samples/{batch[-1].cell}.parquet"
            )
        rows.append(_primary_values(table, batch[0].metric or "").reshape(shape))
    values = np.concatenate(rows)
    scores = np.array([cell.value for cell in cells], dtype=np.float64)
    assert ids is not None
    return len(ids), values if np.allclose(values.mean(1), scores, rtol=0, atol=1e-9) else None


def _primary_values(table: Any, metric: str) -> Array:
    """The primary metric of every document (rows of the table); NaN where it is not a number."""
    if table["correct"].null_count == 0:
        return table["correct"].to_numpy().astype(np.float64)
    out = np.full(table.num_rows, np.nan)
    for row, text in enumerate(table["metrics"].to_pylist()):
        value = next((value for name, _, value in json.loads(text) if name == metric), None)
        if isinstance(value, bool | int | float):
            out[row] = value
    return out


# --- ranks ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """A score against the rank of an expert, over its two-expert mixtures."""

    ranks: tuple[Rank, ...]
    """Ascending, "full" last; R of them."""
    x: Array
    """log2 of the ranks (R,); NaN for "full" where its rank is not known."""
    measure: Measure
    """One column per rank."""


def curve(section: Section, measure: Measure, expert: str) -> Curve:
    """The scores of one expert's two-expert mixtures, those that were scored."""
    columns = {m.pair[1]: i for i, m in enumerate(section.mixtures) if m.pair and m.pair[0] == expert}
    ranks = sorted((r for r in columns if not np.isnan(measure.value[columns[r]])), key=_order)
    x = np.array([_log2(rank, section.full_ranks.get(expert, section.full_rank)) for rank in ranks])
    return Curve(tuple(ranks), x, measure[[columns[rank] for rank in ranks]])


def _order(rank: Rank) -> float:
    return rank if isinstance(rank, int) else math.inf


def _log2(rank: Rank, full_rank: int | None) -> float:
    if isinstance(rank, int):
        return math.log2(rank)
    return math.nan if full_rank is None else math.log2(full_rank)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves at the ranks that all of them have."""
    common = [rank for rank in curves[0].ranks if all(rank in other.ranks for other in curves)]
    picked = [c.measure[[c.ranks.index(rank) for rank in common]] for c in curves]
    x = [curves[0].x[curves[0].ranks.index(rank)] for rank in common]
    return Curve(tuple(common), np.array(x), mean(picked))


def pooled_curve(section: Section, measure: Measure) -> Curve | None:
    """The mean over all experts that have two-expert mixtures; None if there are none."""
    curves = [curve(section, measure, expert) for expert in section.experts]
    curves = [found for found in curves if found.ranks]
    return mean_curve(curves) if curves else None


def own_curve(section: Section, measure: Measure, group: Group) -> Curve | None:
    """The curve of the expert whose domain a group is; None if it has no such expert."""
    if group.domain not in section.experts:
        return None
    found = curve(section, measure, str(group.domain))
    return found if found.ranks else None


@dataclasses.dataclass(frozen=True)
class BestRank:
    """The best of an expert's measured ranks."""

    rank: Rank
    low: Rank
    """Interval of the best rank: where it falls when the documents are drawn again."""
    high: Rank
    score: float
    full: float
    """Score of the full expert; NaN if it was not scored."""
    gain: Interval
    """Score minus that of the full expert."""
    optimism: float
    """By how much `score` is too high for having been picked: bootstrap estimate, same unit."""


def best_rank(curve: Curve) -> BestRank:
    """The rank with the highest score, the lowest one of equals.

    The optimism is Efron's bootstrap estimate: the score of the rank that is best in a resample, in that resample,
    minus the score of that same rank on all documents, averaged over resamples.
    """
    value, draws = curve.measure.value, curve.measure.draws
    best = int(np.argmax(value >= value.max() - _FLAT))
    picks = np.argmax(draws >= draws.max(1, keepdims=True) - _ROUNDING, axis=1)
    low, high = np.quantile(picks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    full = curve.ranks.index(FULL) if FULL in curve.ranks else None
    optimism = float(np.mean(np.take_along_axis(draws, picks[:, None], 1)[:, 0] - value[picks]))
    return BestRank(
        rank=curve.ranks[best],
        low=curve.ranks[int(low)],
        high=curve.ranks[int(high)],
        score=float(value[best]),
        full=math.nan if full is None else float(value[full]),
        gain=Interval(*[math.nan] * 3) if full is None else curve.measure.difference(best, full),
        optimism=max(0.0, optimism),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """A quadratic in log2 rank."""

    x: Array
    """log2 ranks that it was fitted to (R,)."""
    coefficients: Array
    """Constant, linear, quadratic (3,)."""
    best: Interval
    """log2 of the rank where it is highest within the measured range."""
    draws: Array
    """(B,), the same in every resample."""
    where: str
    """inside, lowest rank, highest rank, or flat."""
    r_squared: float
    """Share of the variance between ranks that it explains; NaN for a flat curve."""


def fit_quadratic(curve: Curve | None) -> Fit | None:
    """Least squares for score = c0 + c1 x + c2 x^2 with x = log2 rank, and again in every resample.

    Returns:
        None where there is no curve, or fewer than `MIN_RANKS` ranks whose log2 is known.
    """
    if curve is None:
        return None
    known = np.flatnonzero(~np.isnan(curve.x))
    if len(known) < MIN_RANKS:
        return None
    x, y = curve.x[known], curve.measure[known.tolist()]
    solve = np.linalg.pinv(np.vander(x, 3, increasing=True))
    coefficients = solve @ y.value
    best = float(highest_point(coefficients, x[0], x[-1]))
    draws = highest_point(y.draws.astype(np.float64) @ solve.T, x[0], x[-1])
    spread = float(np.sum((y.value - y.value.mean()) ** 2))
    left = float(np.sum((y.value - np.vander(x, 3, increasing=True) @ coefficients) ** 2))
    flat = spread < _FLAT**2
    where = "flat" if flat else "lowest rank" if best == x[0] else "highest rank" if best == x[-1] else "inside"
    return Fit(x, coefficients, interval(best, draws), draws, where, math.nan if flat else 1 - left / spread)


def highest_point(coefficients: Array, low: float, high: float) -> Array:
    """Where quadratics are highest on [low, high]; the lowest such place where several are as high.

    Args:
        coefficients: (..., 3): constant, linear, quadratic.
        low: Left end.
        high: Right end.

    Returns:
        (...,): the vertex if it is a maximum within the range, else an end of the range.
    """
    c0, c1, c2 = np.moveaxis(np.asarray(coefficients, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(c2 < 0, -c1 / (2 * c2), low)
    places = np.stack([np.full_like(c0, low), np.clip(vertex, low, high), np.full_like(c0, high)], -1)
    heights = c0[..., None] + c1[..., None] * places + c2[..., None] * places**2
    first = np.argmax(heights >= heights.max(-1, keepdims=True) - _FLAT, axis=-1)
    return np.take_along_axis(places, first[..., None], -1)[..., 0]


def sufficient_rank(curve: Curve) -> tuple[float, Array]:
    """The lowest log2 rank with `SUFFICIENT` of the gain from the lowest to the best rank, and per resample (B,).

    Unlike the quadratic it assumes no shape: linear in log2 rank between two measured ranks.
    """
    known = np.flatnonzero(~np.isnan(curve.x)).tolist()
    x, picked = curve.x[known], curve.measure[known]
    return float(_reached(x, picked.value[None])[0]), _reached(x, picked.draws.astype(np.float64))


def _reached(x: Array, values: Array) -> Array:
    """Where rows of values (B, R) over x (R,) first reach `SUFFICIENT` of their gain (B,)."""
    first = values[:, 0]
    return first_place(x, values, first + SUFFICIENT * (values.max(1) - first))


def first_place(x: Array, values: Array, target: Array) -> Array:
    """Where rows of values (B, R) over ascending x (R,) first reach targets (B,), linear between; inf: nowhere."""
    enough = values >= target[:, None] - _ROUNDING
    i = np.argmax(enough, axis=1)
    before = np.maximum(i - 1, 0)
    low, high = (np.take_along_axis(values, at[:, None], 1)[:, 0] for at in (before, i))
    share = np.divide(target - low, high - low, out=np.ones_like(low), where=high - low > _ROUNDING)
    return np.where(enough.any(1), x[before] + np.clip(share, 0, 1) * (x[i] - x[before]), math.inf)


# --- kinds ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KindComparison:
    """Best ranks on knowledge-heavy and on reasoning-heavy groups."""

    scope: str
    """own: each group with the expert whose domain it is; pooled: all groups, the mean over experts."""
    groups: Mapping[str, Mapping[str, Fit]]
    """Kind -> group -> fit to its curve."""
    kinds: Mapping[str, Fit]
    """Kind -> fit to the mean curve of its groups."""
    difference: Interval
    """log2 of the best rank on reasoning-heavy minus that on knowledge-heavy groups."""
    sufficient: Mapping[str, Interval]
    """Kind -> log2 of the sufficient rank, see `sufficient_rank`."""
    sufficient_difference: Interval
    """The same difference for the sufficient ranks."""
    permutations: tuple[int, int] | None
    """Ways to label the groups whose mean best log2 ranks differ at least as much, and all ways; None where a kind
    has one group only, or where there are too many ways to count."""


def compare_kinds(section: Section, estimates: Estimates, scope: str) -> KindComparison | None:
    """Compare the two kinds of groups.

    The quadratic of a kind is fitted to the mean curve of its groups, which is one regression over the groups with
    a constant of its own for each.

    Args:
        section: The section.
        estimates: Its measures.
        scope: own or pooled, see `KindComparison`.

    Returns:
        None where one of the kinds has no group with a curve that can be fitted.
    """
    curves: dict[str, dict[str, Curve]] = {"knowledge": {}, "reasoning": {}}
    for group in section.groups:
        measure = estimates.groups[group.name]
        found = own_curve(section, measure, group) if scope == "own" else pooled_curve(section, measure)
        if group.kind in curves and found is not None and fit_quadratic(found) is not None:
            curves[group.kind][group.name] = found
    if not all(curves.values()):
        return None
    groups = {kind: {n: fit for n, c in by.items() if (fit := fit_quadratic(c))} for kind, by in curves.items()}
    means = {kind: mean_curve(list(by.values())) for kind, by in curves.items()}
    kinds = {kind: fit for kind, found in means.items() if (fit := fit_quadratic(found))}
    if len(kinds) < 2:
        return None
    knowledge, reasoning = kinds["knowledge"], kinds["reasoning"]
    difference = interval(reasoning.best.value - knowledge.best.value, reasoning.draws - knowledge.draws)
    best = {kind: [fit.best.value for fit in by.values()] for kind, by in groups.items()}
    sufficient = {kind: sufficient_rank(found) for kind, found in means.items()}
    (low, low_draws), (high, high_draws) = sufficient["knowledge"], sufficient["reasoning"]
    return KindComparison(
        scope=scope,
        groups=groups,
        kinds=kinds,
        difference=difference,
        sufficient={kind: interval(*found) for kind, found in sufficient.items()},
        sufficient_difference=interval(high - low, high_draws - low_draws),
        permutations=permutations(best["knowledge"], best["reasoning"]),
    )


def permutations(first: Sequence[float], second: Sequence[float]) -> tuple[int, int] | None:
    """Exact two-sided permutation test of the difference of two means: ways at least as extreme, and all ways."""
    ways = math.comb(len(first) + len(second), len(first))
    if min(len(first), len(second)) < 2 or ways > _MOST_PERMUTATIONS:
        return None
    values = np.array([*first, *second], dtype=np.float64)
    total, seen = values.sum(), abs(np.mean(first) - np.mean(second))
    extreme = 0
    for chosen in itertools.combinations(range(len(values)), len(first)):
        part = values[list(chosen)].sum()
        extreme += int(abs(part / len(first) - (total - part) / len(second)) >= seen - _FLAT)
    return extreme, ways


# --- size and score ---------------------------------------------------------------------------------------


def pareto_front(parameters: Array, scores: Array) -> Array:
    """Which mixtures no other one beats: none as small or smaller scores higher, none smaller as high.

    Args:
        parameters: (M,)
        scores: (M,); NaN is never on the front.

    Returns:
        (M,) booleans.
    """
    front = np.zeros(len(scores), dtype=bool)
    best = -math.inf
    for i in np.lexsort((-scores, parameters)):
        first = best < scores[i]
        twin = bool(front.any()) and scores[i] == best and parameters[i] == parameters[front].max()
        if first or twin:
            front[i], best = True, scores[i]
    return front


# --- methods ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of choosing ranks, as a curve of score against parameters."""

    name: str
    active: int
    columns: tuple[int, ...]
    """Its mixtures that were scored, by parameters."""
    budgets: tuple[tuple[str, ...], ...]
    """Their budgets, as the plan says them; several where these make the same mixture."""
    full: int | None
    """Column of the full mixture at as many active experts; None if it was not scored."""
    needed: Mapping[float, Interval]
    """Share of the gain -> parameters at which the curve first reaches it, inf where it does not; see `needed`. Empty
    where the full mixture or the public expert alone was not scored, or the full one gains nothing."""
    against_baseline: Interval
    """Parameters needed for `SUFFICIENT` of the gain over those of the first curve; NaN where one does not reach it."""

    def points(self) -> Iterator[tuple[str, int]]:
        """Every budget with the column of its mixture."""
        for budgets, column in zip(self.budgets, self.columns, strict=True):
            yield from ((budget, column) for budget in budgets)


def compare_methods(section: Section, estimates: Estimates) -> list[Method]:
    """All curves of a section that have results, the baseline first."""
    average, public = estimates.average, section.public()
    methods: list[Method] = []
    first: tuple[float, Array] | None = None
    for name in section.curves:
        points = [i for i, m in enumerate(section.mixtures) if name in m.curves and not math.isnan(average.value[i])]
        points.sort(key=lambda i: section.mixtures[i].parameters)
        if not points:
            continue
        active = section.mixtures[points[0]].active
        full = section.full(active)
        found: dict[float, tuple[float, Array]] = {}
        if full is not None and public is not None and average.value[full] > average.value[public]:
            parameters = np.array([section.mixtures[i].parameters for i in points], dtype=np.float64)
            ends = average[[public, full]]
            found = {share: needed(parameters, average[points], ends, share) for share in SHARES}
        own = found.get(SUFFICIENT)
        first = first if methods else own
        methods.append(
            Method(
                name=name,
                active=active,
                columns=tuple(points),
                budgets=tuple(section.mixtures[i].curves[name] for i in points),
                full=full,
                needed={share: _places(*places) for share, places in found.items()},
                against_baseline=Interval(*[math.nan] * 3) if own is None or first is None else _ratio(own, first),
            )
        )
    return methods


def needed(parameters: Array, curve: Measure, ends: Measure, share: float) -> tuple[float, Array]:
    """Parameters at which a curve first reaches a share of the full mixture's gain over the public expert alone.

    Linear in log parameters between the curve's points. A curve that has reached it at its smallest point needs at
    most as many as that one; one that never does, inf.

    Args:
        parameters: (R,), ascending.
        curve: scores of R mixtures.
        ends: scores of the public expert alone and of the full mixture.
        share: of the gain, in [0, 1].

    Returns:
        On all documents, and in every resample (B,).
    """
    x = np.log(parameters)

    def places(values: Array, public: Array, full: Array) -> Array:
        return np.exp(first_place(x, values, public + share * (full - public)))

    value = places(curve.value[None], ends.value[:1], ends.value[1:])
    return float(value[0]), places(curve.draws.astype(np.float64), *ends.draws.astype(np.float64).T)


def _places(value: float, draws: Array) -> Interval:
    """As `interval`, of values that may be inf."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Interval(value, float(low), float(high))


def _ratio(own: tuple[float, Array], first: tuple[float, Array]) -> Interval:
    if math.isinf(own[0]) or math.isinf(first[0]):
        return Interval(*[math.nan] * 3)
    neither = np.isinf(own[1]) & np.isinf(first[1])  # no resample can tell them apart there
    ratio = np.divide(own[1], first[1], out=np.ones_like(own[1]), where=~neither)
    return _places(own[0] / first[0], ratio)
