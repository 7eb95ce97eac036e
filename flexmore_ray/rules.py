"""What a mixture may cost, and what an allocation rule makes of that. Pure: no weights, no Ray.

    uniform   one rank for all domain experts, the highest that fits
    energy    every matrix keeps the same share of its energy, the highest that fits
    entropy   every matrix has its effective rank; all times one factor, the largest that fits
    optimal   the least discarded energy (`allocate_optimal`), for matrices that share a rank or each by itself

Over a weighted store energy is the change of the outputs that dropping a direction is expected to cost, in one unit
for all experts, layers and projections: "optimal" then spends parameters where they buy most.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, cast, get_args

from flexmore_ray.budget import (
    Granularity,
    OptimalRanks,
    Spectra,
    allocate_energy,
    check_granularity,
    collect_ranks,
    count_parameters,
    entropy_rank,
    expert_params,
    matrix_params,
    parse_budget,
)
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import Parts
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, Assignment, ExpertRank, MixtureSpec, ModelShape, suggest

Measure = Literal["parameters", "active", "bytes"]
"""What a budget counts: total parameters, the most that one token can use, or bytes as stored."""
Rule = Literal["uniform", "energy", "entropy", "optimal"]
Ranks = Mapping[str, ExpertRank]
"""Ranks of domain experts, by name."""

_NAMES = {"parameters": "parameters", "active": "active parameters", "bytes": "bytes"}
_THRESHOLDS = 2**40
"""Energy thresholds are told apart to within 2^-40, about as finely as `energy_rank` tells them apart."""
_FACTORS = 2**32
"""Common factors of ranks below 2^16 that round down to different ranks differ by more than 2^-32."""


# -------------------------------------------------------------------------------- budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a mixture may cost at most, and what it costs."""

    measure: Measure
    limit: int
    """In the measure; a mixture that costs just as much fits."""
    shape: ModelShape
    experts: tuple[str, ...]
    """All expert names of the source, the public one first."""
    width: int
    """Bytes of one parameter in the source's stored dtype."""
    full_cost: int
    """Cost of the full mixture, with as many active experts as the checkpoint says."""
    public_cost: int
    """Cost of the public expert alone."""

    def cost(self, assignment: Assignment) -> int:
        """What a rank assignment costs in the measure."""
        return _cost(self.measure, self.shape, self.experts, self.width, assignment)

    def fits(self, assignment: Assignment) -> bool:
        """Whether a rank assignment costs no more than the limit."""
        return self.cost(assignment) <= self.limit


def read_budget(text: str, measure: str, parts: Parts) -> Budget:
    """Read the budget of a search.

    Args:
        text: a count (``10.75B``, ``1.5M``; of bytes also ``3.2GB``, ``1.5GiB``), or a ratio of what
            the full mixture costs in the measure (``0.33x``).
        measure: one of "parameters", "active", "bytes".
        parts: the source; its mixture's own ranks and active experts do not matter.

    Raises:
        UsageError: an unknown measure, a text of another form, a budget below the cost of the public
            expert alone or above that of the full mixture.
    """
    known = get_args(Measure)
    if measure not in known:
        raise UsageError(f"measure: one of {', '.join(known)} is needed, got {measure!r}")
    source = parts.source
    frame = (measure, source.shape, source.experts, source.dtype.itemsize)
    full, public = (_cost(*frame, parts.with_spec(spec).assignment) for spec in extremes(parts, None))
    limit = parse_budget(text, full, in_bytes=measure == "bytes")
    if not public <= limit <= full:
        raise UsageError(
            f"budget: {str(text).strip()} is {limit:,} {_NAMES[measure]}; give at least the public expert alone "
            f"({public:,}) and at most the full mixture ({full:,})"
        )
    return Budget(
        measure=cast(Measure, measure),
        limit=limit,
        shape=source.shape,
        experts=source.experts,
        width=source.dtype.itemsize,
        full_cost=full,
        public_cost=public,
    )


def _cost(measure: str, shape: ModelShape, experts: tuple[str, ...], width: int, assignment: Assignment) -> int:
    count = count_parameters(shape, experts, assignment)
    return {"parameters": count.total, "active": count.active, "bytes": count.total * width}[measure]


# --------------------------------------------------------------------------------- rules


def allocate(
    parts: Parts,
    budget: Budget,
    spectra: Spectra,
    rule: Rule,
    *,
    granularity: Granularity = "matrix",
    active: int | None = None,
) -> MixtureSpec | None:
    """The mixture that a rule makes of a budget; None where none of its kind fits, or no domain expert has spectra.

    Under a budget of active parameters, "optimal" is what is best for a total that just fits, found by
    bisection: no other split of that total discards less, but other totals may have cheaper choices.
    A domain expert without spectra must have been low-rank from the start, and stays as it was made.

    Args:
        parts: the source; its mixture's own ranks and active experts do not matter.
        budget: what the mixture must fit.
        spectra: singular values of the deltas of the domain experts.
        rule: see above.
        granularity: for "optimal", which matrices share one rank; the other rules have none.
        active: experts per token, or all that are kept if fewer; None means the checkpoint's own number.

    Raises:
        UsageError: an unknown rule or granularity.
    """
    check_rule(rule, granularity)
    full, _ = extremes(parts, active)
    spectra = _own_spectra(parts, spectra)
    shape, experts = budget.shape, list(dict.fromkeys(key.expert for key in spectra))
    if not experts:
        return None
    fit = functools.partial(_highest, parts, budget, full)
    if rule == "uniform":
        return fit(lambda rank: dict.fromkeys(experts, FULL if rank == shape.full_rank else rank), 1, shape.full_rank)
    if rule == "energy":
        return fit(lambda step: allocate_energy(shape, spectra, step / _THRESHOLDS), 0, _THRESHOLDS)
    if rule == "entropy":
        return fit(_entropy_rule(shape, spectra), 0, _FACTORS)
    return fit(*_optimal_rule(parts, budget, spectra, granularity))


def check_rule(rule: str, granularity: str) -> None:
    """Check the names of a rule and of a granularity.

    Raises:
        UsageError: one of them is unknown.
    """
    if rule not in get_args(Rule):
        raise UsageError(f"rule: unknown {rule!r}; {suggest(rule, get_args(Rule))}")
    check_granularity(granularity)


def extremes(parts: Parts, active: int | None) -> tuple[MixtureSpec, MixtureSpec]:
    """The full mixture, and the public expert alone."""
    experts = parts.source.experts
    full, public = (dict.fromkeys(experts[1:], rank) for rank in (FULL, DROP))
    kept = None if active is None else min(active, len(experts))
    spec = dataclasses.replace(parts.spec, mixture_id=None)
    return (dataclasses.replace(spec, ranks=full, active=kept), dataclasses.replace(spec, ranks=public, active=1))


def _own_spectra(parts: Parts, spectra: Spectra) -> Spectra:
    """Spectra of the domain experts that have them; one born low-rank has no more values than its own rank."""
    born, shape = parts.source.born_ranks, parts.source.shape
    keys = {expert: shape.keys(expert) for expert in parts.source.experts[1:]}
    missing = [key for own in keys.values() for key in own if key not in spectra]
    assert all(key in born for key in missing), f"no spectrum of {missing[0]}"
    without = {key.expert for key in missing}
    return {key: spectra[key][: born.get(key)] for expert in keys if expert not in without for key in keys[expert]}


def _entropy_rule(shape: ModelShape, spectra: Spectra) -> Callable[[int], Ranks]:
    """Ranks for a common factor of the effective ranks, given in steps of 1 / `_FACTORS`."""
    effective = {key: entropy_rank(values) for key, values in spectra.items()}

    def ranks(level: int) -> Ranks:
        return collect_ranks(shape, {key: max(1, level * rank // _FACTORS) for key, rank in effective.items()})

    return ranks


def _optimal_rule(
    parts: Parts, budget: Budget, spectra: Spectra, granularity: Granularity
) -> tuple[Callable[[int], Ranks], int, int]:
    """Ranks for a total of parameters, and its lowest and highest level, one rank of one matrix apart."""
    shape, full = budget.shape, parts.with_spec(extremes(parts, None)[0])
    with_spectra = {key.expert for key in spectra}
    as_made = [expert for expert in budget.experts[1:] if expert not in with_spectra]
    others = sum(expert_params(shape, full.assignment.ranks[expert]) for expert in as_made)
    others += len(as_made) * shape.hidden_size * shape.num_layers
    rule = OptimalRanks(shape, [expert for expert in budget.experts if expert not in as_made], spectra, granularity)
    limits = {"parameters": budget.limit, "bytes": budget.limit // budget.width, "active": full.count().full_total}
    most, unit = limits[budget.measure] - others, matrix_params(shape, PROJECTIONS[0], 1)
    return lambda level: rule.allocate(most + level * unit), -((most - rule.least) // unit), 0


class _Level(NamedTuple):
    """A mixture of some level: whether it fits, and whether that tells of higher levels too."""

    spec: MixtureSpec
    fits: bool
    hopeless: bool
    """No higher level fits, whichever experts become dense there."""
    dense: frozenset[str]
    """The experts that are dense throughout."""


def _highest(
    parts: Parts, budget: Budget, full: MixtureSpec, rule: Callable[[int], Ranks], low: int, high: int
) -> MixtureSpec | None:
    """The full mixture with the ranks of the highest level from `low` to `high` that fits; None if none does.

    Ranks grow with the level, and so does what they cost, but for active parameters: these fall where an
    expert becomes dense throughout, as it then no longer needs the public one. Between two such levels
    they grow as well, so that a stretch whose lowest level does not fit has none that does. A fall is
    smaller than what one more active expert adds: where one fewer would not fit, nothing higher does.
    """

    @functools.cache
    def at(level: int) -> _Level:
        spec = dataclasses.replace(full, ranks={**full.ranks, **rule(level)})
        assignment = parts.with_spec(spec).assignment
        fewer = assignment
        if budget.measure == "active":
            fewer = dataclasses.replace(assignment, active=assignment.active - 1)
        dense = frozenset(name for name in assignment.ranks if assignment.summary(name) == FULL)
        return _Level(spec, budget.fits(assignment), fewer.active > 0 and not budget.fits(fewer), dense)

    def search(low: int, high: int) -> MixtureSpec | None:
        lowest, highest = at(low), at(high)
        if highest.fits:
            return highest.spec
        if not lowest.fits and (lowest.hopeless or lowest.dense == highest.dense):
            return None
        if high - low < 2:
            return lowest.spec if lowest.fits else None
        middle = (low + high) // 2
        return search(middle, high) or search(low, middle)

    return search(low, high) if low <= high else None
