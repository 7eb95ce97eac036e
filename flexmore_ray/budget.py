"""Parameters of a mixture, and ranks under a parameter budget. Pure: no weights, no torch.

    symbol   meaning
    d        hidden size              f   intermediate size        L   layers
    in, out  columns, rows of a matrix; a pair of rank r has r (in + out) parameters
    s_i      singular values of a delta, largest first

The paper's figures (FlexMoRE, arXiv 2602.08818; `flexolmo-7x7b`): seven full experts 33.27B, the
public expert with seven router rows 7.30B, one unit of rank on one expert 1.45M.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import (
    FULL,
    PROJECTIONS,
    Assignment,
    ExpertRank,
    MatrixKey,
    MatrixRank,
    ModelShape,
)

Spectra = Mapping[MatrixKey, NDArray[np.float64]]
"""Singular values of every delta, largest first."""
Granularity = Literal["expert", "projection", "layer", "matrix"]

SHAPES = {
    "flexolmo-7x7b": ModelShape(
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        vocab_size=100352,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    )
}
"""Released model shapes by name (allenai/FlexOlmo-7x7B-1T)."""
SHAPE_EXPERTS: dict[str, tuple[str, ...]] = {
    "flexolmo-7x7b": ("public", "math", "news", "academic", "code", "creative", "reddit")
}
"""Expert names of the released models, in the order of their checkpoints."""


# ------------------------------------------------------------------------------ counting


def matrix_params(shape: ModelShape, projection: str, rank: MatrixRank) -> int:
    """Parameters of one matrix of an expert: in x out if "full", else rank (in + out)."""
    rows, columns = shape.matrix(projection)
    return rows * columns if rank == FULL else rank * (rows + columns)


def expert_params(shape: ModelShape, ranks: Mapping[str, Sequence[MatrixRank]]) -> int:
    """Parameters of one expert from its ranks by projection and layer, without its router row."""
    return sum(matrix_params(shape, p, rank) for p in PROJECTIONS for rank in ranks[p])


def trunk_params(shape: ModelShape) -> int:
    """Parameters of embeddings, head, attention and norms: all but experts and router."""
    d, query, key = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    embeddings = shape.vocab_size * d * (1 if shape.tied else 2)
    attention = 2 * d * query + 2 * d * key
    norms = query + key + 2 * d
    return embeddings + shape.num_layers * (attention + norms) + d


def break_even_rank(shape: ModelShape) -> int:
    """The highest rank at which a pair has fewer parameters than the dense matrix."""
    rows, columns = shape.matrix("gate_proj")
    return (rows * columns - 1) // (rows + columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a mixture, from its configuration alone."""

    total: int
    active: int
    """The most that one token can use: trunk, router, and the costliest choice of active experts."""
    full_total: int
    """The same source with every expert full-size."""
    experts: Mapping[str, int]
    """Parameters of each expert; 0 for one that is dropped."""

    @property
    def ratio(self) -> float:
        """`total` over `full_total`."""
        return self.total / self.full_total


def count_parameters(shape: ModelShape, experts: Sequence[str], assignment: Assignment) -> ParameterCount:
    """Count the parameters of a mixture.

    Args:
        shape: the model's sizes.
        experts: all expert names of the source, the public one first, dropped ones included.
        assignment: ranks of the kept experts.
    """
    own = {name: expert_params(shape, ranks) for name, ranks in assignment.ranks.items()}
    fixed = trunk_params(shape) + len(own) * shape.hidden_size * shape.num_layers
    dense = sum(matrix_params(shape, p, FULL) for p in PROJECTIONS) * shape.num_layers
    router = len(experts) * shape.hidden_size * shape.num_layers
    return ParameterCount(
        total=fixed + sum(own.values()),
        active=fixed + _costliest_choice(experts[0], own, assignment),
        full_total=trunk_params(shape) + router + len(experts) * dense,
        experts={name: own.get(name, 0) for name in experts},
    )


def _costliest_choice(public: str, own: Mapping[str, int], assignment: Assignment) -> int:
    """Expert parameters of the costliest `active` experts; corrections share the public expert.

    A choice with a correction also pays for the public expert, which is at least as much as one
    more dense expert: so the costliest choice has at least one expert that uses the public one.
    """
    extra = {name: 0 if name == public else count for name, count in own.items()}
    sharing = [n for n, ranks in assignment.ranks.items() if n == public or _is_correction(ranks)]
    first = max(sharing, key=lambda name: extra[name])
    others = sorted((count for name, count in extra.items() if name != first), reverse=True)
    return own[public] + extra[first] + sum(others[: assignment.active - 1])


def _is_correction(ranks: Mapping[str, Sequence[MatrixRank]]) -> bool:
    return any(rank != FULL for layers in ranks.values() for rank in layers)


_COUNT = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMBT]?|x|[KMGT]i?B)", re.IGNORECASE)
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {f"{unit}b": 1000**power for power, unit in enumerate("kmgt", 1)}
_BYTES |= {f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", 1)}


def parse_budget(text: str, full_total: int, *, in_bytes: bool = False, where: str = "budget") -> int:
    """Read a budget: a count (``10.75B``, ``4.2M``, ``800000``) or a ratio of the whole (``0.33x``).

    Args:
        text: the budget as it was written.
        full_total: what ``1x`` is: the parameters (or bytes) of the full mixture.
        in_bytes: whether bytes are counted, so that ``3.2GB`` and ``1.5GiB`` are counts too
            (``B`` alone is a billion, as for parameters).
        where: what errors call it.

    Raises:
        UsageError: none of these forms.
    """
    match = _COUNT.fullmatch(str(text).strip())
    unit = match[2].lower() if match else ""
    if match is None or (unit in _BYTES and not in_bytes):
        example = "3.2GB" if in_bytes else "10.75B"
        raise UsageError(f"{where}: a count such as {example} or a ratio such as 0.33x is needed, got {text!r}")
    number = Fraction(match[1])
    return int(number * full_total) if unit == "x" else round(number * (_SCALE | _BYTES)[unit])


def format_count(count: int) -> str:
    """A parameter count for people: 10.75B, 4.20M, 12.3K."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f}{unit}"
    return str(count)


# ---------------------------------------------------------------------------- allocation


def entropy_rank(spectrum: NDArray[np.float64]) -> int:
    """Effective rank ceil(exp(H(s / sum s))) of one spectrum (Roy and Vetterli 2007); 1 if zero."""
    values = spectrum[spectrum > 0]
    if values.size == 0:
        return 1
    p = values / values.sum()
    entropy = float(-(p * np.log(p)).sum())
    return max(1, math.ceil(math.exp(entropy) - 1e-9))


def energy_rank(spectrum: NDArray[np.float64], threshold: float) -> int:
    """The smallest rank that keeps at least `threshold` (in [0, 1]) of a spectrum's energy."""
    energy = np.cumsum(np.square(spectrum))
    if energy.size == 0 or energy[-1] == 0:
        return 1
    return min(len(spectrum), int(np.searchsorted(energy, threshold * energy[-1] * (1 - 1e-12))) + 1)


def discarded_energy(spectra: Spectra, assignment: Assignment) -> float:
    """Squared error of a rank assignment: the squares of all singular values beyond the ranks.

    That of a dropped expert is the whole of its deltas.
    """

    def kept(key: MatrixKey) -> int | None:
        rank = assignment.rank(key) if key.expert in assignment.ranks else 0
        return None if rank == FULL else int(rank)

    ranks = {key: kept(key) for key in spectra}
    return sum(float(np.square(spectra[key][rank:]).sum()) for key, rank in ranks.items() if rank is not None)


def collect_ranks(shape: ModelShape, ranks: Mapping[MatrixKey, int]) -> dict[str, ExpertRank]:
    """Integer ranks of single matrices as entries of a mixture file.

    Args:
        shape: the model's sizes.
        ranks: a rank >= 1 for every matrix of each expert that is named; one that costs as much as
            the dense matrix, or more, becomes "full", which is also exact.
    """
    by_key = {key: _cheaper(shape, key, rank) for key, rank in ranks.items()}
    return _collect(shape, dict.fromkeys(key.expert for key in ranks), by_key)


def allocate_energy(shape: ModelShape, spectra: Spectra, threshold: float) -> dict[str, ExpertRank]:
    """Energy-threshold rule: every matrix keeps at least `threshold` of its delta's energy.

    Raises:
        UsageError: `threshold` is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold: a share of the energy from 0 to 1 is needed, got {threshold}")
    return collect_ranks(shape, {key: energy_rank(spectrum, threshold) for key, spectrum in spectra.items()})


def allocate_entropy(shape: ModelShape, spectra: Spectra) -> dict[str, ExpertRank]:
    """Entropy rule: every matrix gets the effective rank of its delta."""
    return collect_ranks(shape, {key: entropy_rank(spectrum) for key, spectrum in spectra.items()})


def allocate_uniform(shape: ModelShape, experts: Sequence[str], budget: int) -> dict[str, ExpertRank]:
    """One rank for all domain experts: the highest whose mixture has at most `budget` parameters.

    Args:
        shape: the model's sizes.
        experts: all expert names, the public one first.
        budget: total parameters.

    Raises:
        UsageError: not even rank 1 fits.
    """
    if len(experts) < 2:
        return {}
    unit = (len(experts) - 1) * sum(matrix_params(shape, p, 1) for p in PROJECTIONS) * shape.num_layers
    base = _base_params(shape, experts)
    _check_rank_one(budget, base + unit)
    rank = (budget - base) // unit
    dense = (len(experts) - 1) * sum(matrix_params(shape, p, FULL) for p in PROJECTIONS) * shape.num_layers
    value: ExpertRank = FULL if budget - base >= dense or rank >= shape.full_rank else rank
    return dict.fromkeys(experts[1:], value)


def allocate_optimal(
    shape: ModelShape,
    experts: Sequence[str],
    spectra: Spectra,
    budget: int,
    granularity: Granularity = "matrix",
) -> dict[str, ExpertRank]:
    """Ranks with the least total discarded energy under a parameter budget.

    Energy of a group of matrices that share one rank is a concave function of its parameters, so
    taking the steps with the most energy per parameter first is optimal for every budget that
    such a choice fills exactly; what remains of the budget goes to the next steps that fit. A dense
    matrix costs in x out and discards nothing: it ends the group's curve (upper hull). No choice
    without dense matrices discards less at any budget; one with them, less by at most one such step.

    Args:
        shape: the model's sizes.
        experts: all expert names, the public one first.
        spectra: singular values of every delta of the domain experts.
        budget: total parameters.
        granularity: which matrices share one rank: those of an expert, of an expert and
            projection, of an expert and layer, or none.

    Returns:
        A rank for each domain expert; one whose every matrix gets nothing still has rank 1.

    Raises:
        UsageError: rank 1 for every matrix does not fit into the budget.
    """
    return OptimalRanks(shape, experts, spectra, granularity).allocate(budget)


def check_granularity(granularity: str) -> None:
    """Check the name of a granularity.

    Raises:
        UsageError: it is unknown.
    """
    if granularity not in get_args(Granularity):
        raise UsageError(f"granularity: one of {', '.join(get_args(Granularity))} is needed, got {granularity!r}")


class OptimalRanks:
    """`allocate_optimal` for any number of budgets: the singular values are sorted once.

    Args: as for `allocate_optimal`.

    Raises:
        UsageError: an unknown granularity.
    """

    # All groups are of one size (in + out is the same for every projection), and so are all steps by one
    # rank. Each is one entry of `_energy`, `_group`, `_rank` (what it adds, to whom, which rank it leads
    # to), most energy first; the hull has those of them that lie on it, and a last step to dense each.

    def __init__(
        self, shape: ModelShape, experts: Sequence[str], spectra: Spectra, granularity: Granularity = "matrix"
    ) -> None:
        check_granularity(granularity)
        self._shape, self._experts = shape, tuple(experts)
        groups = _groups(shape, self._experts[1:], granularity)
        self._groups = [groups[name] for name in sorted(groups)]
        curves = [_curve(shape, keys, spectra) for keys in self._groups]
        self._unit = curves[0].unit if curves else 1
        self._sort([curve.energy for curve in curves], np.array([curve.hull for curve in curves], np.int64))
        self._add_dense(curves)

    @property
    def least(self) -> int:
        """The smallest budget, in total parameters: rank 1 for every matrix."""
        return _base_params(self._shape, self._experts) + self._unit * len(self._groups)

    def allocate(self, budget: int) -> dict[str, ExpertRank]:
        """A rank for each domain expert.

        Args:
            budget: total parameters.

        Raises:
            UsageError: rank 1 for every matrix does not fit into the budget.
        """
        _check_rank_one(budget, self.least)
        left = budget - self.least
        steps = left // self._unit
        ranks, dense, energy = self._climb(left)
        if float(self._energy[:steps].sum()) > energy:
            ranks, dense = 1 + self._count(self._group[:steps]), np.zeros(len(ranks), bool)
        values: list[MatrixRank] = [FULL if d else int(r) for r, d in zip(ranks, dense, strict=True)]
        by_key = {key: value for keys, value in zip(self._groups, values, strict=True) for key in keys}
        return _collect(self._shape, self._experts[1:], by_key)

    def _climb(self, left: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], float]:
        """Up the hull, then on to ranks between its steps: ranks, which groups are dense, energy gained."""
        taken = _take(self._hull_group, self._hull_cost, left)
        energy = float(self._hull_energy[taken].sum())
        group, is_dense = self._hull_group[taken], self._hull_dense[taken]
        ranks, dense = 1 + self._count(group[~is_dense]), self._count(group[is_dense]) > 0
        if steps := (left - int(self._hull_cost[taken].sum())) // self._unit:
            more = np.flatnonzero((self._rank > ranks[self._group]) & ~dense[self._group])[:steps]
            ranks += self._count(self._group[more])
            energy += float(self._energy[more].sum())
        return ranks, dense, energy

    def _count(self, groups: NDArray[np.int32]) -> NDArray[np.int64]:
        return np.bincount(groups, minlength=len(self._groups))

    def _sort(self, energies: Sequence[NDArray[np.float64]], hull: NDArray[np.int64]) -> None:
        """Sort the steps by one rank of all groups; ties go to the first group, and there to the lowest rank."""
        lengths = [len(energy) for energy in energies]
        energy = np.concatenate([np.empty(0), *energies])
        group = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        rank = np.concatenate([np.empty(0, np.int32), *(np.arange(2, n + 2, dtype=np.int32) for n in lengths)])
        order = np.argsort(-energy, kind="stable")
        order = order[: np.count_nonzero(energy > 0)]
        self._energy, self._group, self._rank = energy[order], group[order], rank[order]
        self._on_hull = self._rank < hull[self._group] + 2

    def _add_dense(self, curves: Sequence[_Curve]) -> None:
        """Sort the hull: steps by one rank, and for each group the last one to dense."""
        gain = np.array([curve.dense_energy for curve in curves])
        cost = np.array([curve.dense_cost for curve in curves], np.int64)
        slope = np.array([curve.dense_energy / max(curve.dense_cost, 1) for curve in curves])
        useful = np.flatnonzero(slope > 0)
        energy = self._energy[self._on_hull]
        slopes = np.concatenate([energy / self._unit, slope[useful]])
        order = np.argsort(-slopes, kind="stable")
        self._hull_energy = np.concatenate([energy, gain[useful]])[order]
        self._hull_cost = np.concatenate([np.full(len(energy), self._unit), cost[useful]])[order]
        self._hull_group = np.concatenate([self._group[self._on_hull], useful.astype(np.int32)])[order]
        self._hull_dense = order >= len(energy)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """Kept energy against parameters of matrices that share one rank, from rank 1 to dense."""

    unit: int
    """Parameters of one rank."""
    energy: NDArray[np.float64]
    """What ranks 2, 3, .. add, as long as they cost less than dense."""
    hull: int
    """How many of these lie on the upper hull, beyond which the step to dense is the better one."""
    dense_cost: int
    dense_energy: float


def _curve(shape: ModelShape, keys: Sequence[MatrixKey], spectra: Spectra) -> _Curve:
    unit = sum(matrix_params(shape, key.projection, 1) for key in keys)
    dense = sum(matrix_params(shape, key.projection, FULL) for key in keys)
    energy = np.zeros(max(len(spectra[key]) for key in keys))
    for key in keys:
        energy[: len(spectra[key])] += np.square(spectra[key])
    steps = energy[1 : max(1, (dense - 1) // unit)]
    tails = np.append(np.cumsum(energy[:0:-1])[::-1], 0)[: len(steps) + 1]  # beyond rank 1, 2, ..
    costs = np.maximum(dense - unit * np.arange(1, len(steps) + 2), 0)
    kept = np.append(True, steps * costs[1:] >= tails[1:] * unit)
    hull = int(np.flatnonzero(kept)[-1])
    return _Curve(unit, steps, hull, int(costs[hull]), float(tails[hull]))


def _take(groups: NDArray[np.int32], costs: NDArray[np.int64], left: int) -> NDArray[np.intp]:
    """Positions of the steps that fit into `left`, in order; a group gets none after one that does not."""
    taken, rest = [], np.arange(len(groups))
    while rest.size:
        spent = np.cumsum(costs[rest])
        count = int(np.searchsorted(spent, left, side="right"))
        taken.append(rest[:count])
        left -= int(spent[count - 1]) if count else 0
        rest = rest[count:]
        # What is left only shrinks: a step that costs more ends its group here and now.
        ends = np.flatnonzero(costs[rest] > left)[::-1]
        end = np.full(groups.max() + 1, len(rest))
        end[groups[rest[ends]]] = ends  # of a group's, the first is assigned last
        rest = rest[np.arange(len(rest)) < end[groups[rest]]]
    return np.concatenate(taken or [np.arange(0)])


def _groups(
    shape: ModelShape, experts: Iterable[str], granularity: Granularity
) -> dict[tuple[str, ...], list[MatrixKey]]:
    """Matrices that share one rank, by the name of their group."""
    groups: dict[tuple[str, ...], list[MatrixKey]] = {}
    for expert in experts:
        for key in shape.keys(expert):
            parts = {"expert": (), "projection": (key.projection,), "layer": (str(key.layer),)}
            name = parts.get(granularity, (key.projection, str(key.layer)))
            groups.setdefault((expert, *name), []).append(key)
    return groups


def _base_params(shape: ModelShape, experts: Sequence[str]) -> int:
    """Parameters of the trunk, all router rows and the public expert."""
    full = dict.fromkeys(PROJECTIONS, (FULL,) * shape.num_layers)
    return trunk_params(shape) + len(experts) * shape.hidden_size * shape.num_layers + expert_params(shape, full)


def _check_rank_one(budget: int, least: int) -> None:
    if budget < least:
        raise UsageError(
            f"budget: {budget:,} parameters are fewer than the public expert and rank 1 for every domain "
            f"expert need ({least:,}); raise the budget or drop experts"
        )


def _cheaper(shape: ModelShape, key: MatrixKey, rank: int) -> MatrixRank:
    """A rank above break-even costs more than the dense matrix, which is also exact."""
    dense = matrix_params(shape, key.projection, FULL)
    return FULL if matrix_params(shape, key.projection, rank) >= dense else rank


def _collect(
    shape: ModelShape, experts: Iterable[str], by_key: Mapping[MatrixKey, MatrixRank]
) -> dict[str, ExpertRank]:
    """Per-matrix ranks as entries of a mixture file, in their shortest form."""
    layers = range(shape.num_layers)
    ranks = {
        expert: {p: tuple(by_key[MatrixKey(expert, layer, p)] for layer in layers) for p in PROJECTIONS}
        for expert in experts
    }
    assignment = Assignment(ranks=ranks, active=1)
    return {expert: assignment.compact(expert) for expert in ranks}
