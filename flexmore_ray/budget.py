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
import heapq
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?|x)", re.IGNORECASE)
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_budget(text: str, full_total: int) -> int:
    """Read a parameter budget: a count (``10.75B``, ``4.2M``, ``800000``) or a ratio (``0.33x``).

    Raises:
        UsageError: neither form.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"budget: a count such as 10.75B or a ratio such as 0.33x is needed, got {text!r}")
    number, unit = float(match[1]), match[2].lower()
    return int(number * full_total) if unit == "x" else round(number * _SCALE[unit])


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


def allocate_energy(shape: ModelShape, spectra: Spectra, threshold: float) -> dict[str, ExpertRank]:
    """Energy-threshold rule: every matrix keeps at least `threshold` of its delta's energy.

    Raises:
        UsageError: `threshold` is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold: a share of the energy from 0 to 1 is needed, got {threshold}")
    return _per_matrix(shape, spectra, lambda spectrum: energy_rank(spectrum, threshold))


def allocate_entropy(shape: ModelShape, spectra: Spectra) -> dict[str, ExpertRank]:
    """Entropy rule: every matrix gets the effective rank of its delta."""
    return _per_matrix(shape, spectra, entropy_rank)


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
    rank = (budget - _base_params(shape, experts, budget, unit)) // unit
    dense = (len(experts) - 1) * sum(matrix_params(shape, p, FULL) for p in PROJECTIONS) * shape.num_layers
    fits = budget - _base_params(shape, experts, budget, unit) >= dense
    value: ExpertRank = FULL if fits or rank >= shape.full_rank else rank
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
    matrix costs in x out and discards nothing: it ends the group's curve (upper hull).

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
    if granularity not in get_args(Granularity):
        raise UsageError(f"granularity: one of {', '.join(get_args(Granularity))} is needed, got {granularity!r}")
    groups = _groups(shape, experts[1:], granularity)
    unit = sum(matrix_params(shape, key.projection, 1) for keys in groups.values() for key in keys)
    left = budget - _base_params(shape, experts, budget, unit) - unit
    curves = {name: _curve(shape, keys, spectra) for name, keys in groups.items()}
    ranks: dict[tuple[str, ...], MatrixRank] = dict.fromkeys(groups, 1)
    heap = [(-steps[0].slope, name, 0) for name, steps in curves.items() if steps]
    heapq.heapify(heap)
    while heap:
        _, name, i = heapq.heappop(heap)
        step = curves[name][i]
        if step.cost > left or step.slope <= 0:
            continue
        left -= step.cost
        ranks[name] = step.rank
        if i + 1 < len(curves[name]):
            heapq.heappush(heap, (-curves[name][i + 1].slope, name, i + 1))
    by_key = {key: ranks[name] for name, keys in groups.items() for key in keys}
    return _collect(shape, experts[1:], by_key)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step up a group's curve: to `rank`, for `cost` parameters, at `slope` energy per parameter."""

    rank: MatrixRank
    cost: int
    slope: float


def _curve(shape: ModelShape, keys: Sequence[MatrixKey], spectra: Spectra) -> list[_Step]:
    """The upper hull of kept energy against parameters of matrices that share one rank, from rank 1."""
    unit = sum(matrix_params(shape, key.projection, 1) for key in keys)
    dense = sum(matrix_params(shape, key.projection, FULL) for key in keys)
    longest = max(len(spectra[key]) for key in keys)
    energy = np.zeros(longest)
    for key in keys:
        energy[: len(spectra[key])] += np.square(spectra[key])
    steps = [_Step(rank + 1, unit, float(energy[rank]) / unit) for rank in range(1, min(longest, (dense - 1) // unit))]
    tail = float(energy[1 + len(steps) :].sum())
    cost = dense - unit * (1 + len(steps))
    while steps and (cost <= 0 or steps[-1].slope < tail / cost):
        tail += steps[-1].slope * unit
        cost += unit
        steps.pop()
    return [*steps, _Step(FULL, cost, tail / cost)]


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


def _base_params(shape: ModelShape, experts: Sequence[str], budget: int, unit: int) -> int:
    """Parameters of the trunk, all router rows and the public expert; checks that rank 1 fits."""
    full = dict.fromkeys(PROJECTIONS, (FULL,) * shape.num_layers)
    base = trunk_params(shape) + len(experts) * shape.hidden_size * shape.num_layers + expert_params(shape, full)
    if budget < base + unit:
        raise UsageError(
            f"budget: {budget:,} parameters are fewer than the public expert and rank 1 for every domain "
            f"expert need ({base + unit:,}); raise the budget or drop experts"
        )
    return base


def _per_matrix(
    shape: ModelShape, spectra: Spectra, rule: Callable[[NDArray[np.float64]], int]
) -> dict[str, ExpertRank]:
    by_key = {key: _cheaper(shape, key, rule(spectrum)) for key, spectrum in spectra.items()}
    return _collect(shape, dict.fromkeys(key.expert for key in spectra), by_key)


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
