"""The mixtures that every search is compared with, and how it spreads an expert's rank. Pure: no weights, no Ray."""

from __future__ import annotations

from flexmore_ray.budget import Granularity, OptimalRanks, Spectra, count_parameters, discarded_energy
from flexmore_ray.mixture import Parts
from flexmore_ray.rules import Budget, Rule, allocate, extremes
from flexmore_ray.spec import ExpertRank, MixtureSpec, check_rank

_RULES: tuple[Rule, ...] = ("uniform", "energy", "entropy", "optimal")


def baselines(
    parts: Parts, budget: Budget, spectra: Spectra, active: int | None, granularity: Granularity = "matrix"
) -> dict[str, MixtureSpec]:
    """The mixtures that a search starts with, by name, in this order.

        full, public          every expert full-size; the public expert alone, active 1: whether they fit or not
        uniform, energy,      what each rule makes of the budget, "optimal" matrix by matrix (see `flexmore_ray.rules`);
        entropy, optimal      left out where nothing of the kind fits
        optimal-expert        "optimal" at the search's granularity, or optimal-projection, or optimal-layer; left out
                              where it is the same as "optimal"

    Args:
        parts: the source; its mixture's own ranks and active experts do not matter.
        budget: what all but the first two must fit.
        spectra: singular values of the deltas of the domain experts; see `allocate`.
        active: experts per token, or all that are kept if fewer; None means the checkpoint's own number.
        granularity: of the search.
    """
    full, public = extremes(parts, active)
    found: dict[str, MixtureSpec | None] = {"full": full, "public": public}
    found |= {rule: allocate(parts, budget, spectra, rule, active=active) for rule in _RULES}
    if granularity != "matrix":
        own = allocate(parts, budget, spectra, "optimal", granularity=granularity, active=active)
        found |= {f"optimal-{granularity}": own} if own != found["optimal"] else {}
    return {name: spec for name, spec in found.items() if spec is not None}


def spread(parts: Parts, spectra: Spectra, expert: str, rank: ExpertRank, granularity: Granularity) -> ExpertRank:
    """Spread one expert's rank over its matrices, for the least discarded energy.

    The result costs at most what `rank` on every matrix costs, and discards less, or is `rank`
    itself. For one source and its spectra it depends on `expert`, `rank` and `granularity` alone.

    Args:
        parts: the source.
        spectra: singular values of the expert's deltas.
        expert: a domain expert.
        rank: an integer says what may be spent; "full", "drop" and a refined rank stay as they are.
        granularity: which matrices share a rank; "expert" changes nothing.

    Raises:
        UsageError: an unknown granularity, or no rank.
    """
    rank = check_rank(rank, where=f"ranks.{expert}")
    source = parts.source
    shape, born = source.shape, source.born_ranks
    keys = shape.keys(expert)
    if not isinstance(rank, int) or granularity == "expert" or any(key not in spectra for key in keys):
        return rank
    pair, own = (source.experts[0], expert), {key: spectra[key][: born.get(key)] for key in keys}

    def measured(ranks: ExpertRank) -> tuple[int, float]:
        assignment = MixtureSpec(ranks={expert: ranks}).assignment(pair, shape, born=born)
        return count_parameters(shape, pair, assignment).total, discarded_energy(own, assignment)

    cost, energy = measured(rank)
    spent = OptimalRanks(shape, pair, own, granularity).allocate(cost)[expert]
    spent_cost, spent_energy = measured(spent)
    return spent if spent_cost <= cost and spent_energy < energy else rank
