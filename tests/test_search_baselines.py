"""Budgets and baselines of a search, on synthetic spectra and on a tiny real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexmore_ray.budget import Granularity, break_even_rank, discarded_energy, energy_rank, entropy_rank, matrix_params
from flexmore_ray.build import build_store
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import Parts, open_mixture
from flexmore_ray.rules import Budget, allocate, read_budget
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, Assignment, MatrixKey, MixtureSpec, ModelShape
from search.__main__ import GRANULARITIES
from search.baselines import baselines, spread
from tests.common import random_model, write

EXPERTS = ("public", "math", "news", "code")
SHAPE = ModelShape(
    hidden_size=12, intermediate_size=20, num_layers=2, vocab_size=7, num_heads=1, num_kv_heads=1, head_dim=12
)
ORDER = ["full", "public", "uniform", "energy", "entropy", "optimal"]


@dataclasses.dataclass
class FakeSource:
    """All that budgets and baselines ask of a source; no weights behind it."""

    shape: ModelShape = SHAPE
    experts: tuple[str, ...] = EXPERTS
    born_ranks: Mapping[MatrixKey, int] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    active: int = 2

    @property
    def trunk(self) -> SimpleNamespace:
        return SimpleNamespace(config={"num_experts_per_tok": self.active})


def parts_of(**settings) -> Parts:
    return open_mixture(MixtureSpec(), source=FakeSource(**settings), factors=object())


def assigned(parts: Parts, spec: MixtureSpec) -> Assignment:
    return parts.with_spec(spec).assignment


def random_spectra(seed: int, born: Mapping[MatrixKey, int] | None = None) -> dict[MatrixKey, np.ndarray]:
    """Spectra from nearly flat to steep, of very different sizes."""
    rng = np.random.default_rng(seed)
    spectra = {}
    for key in (key for name in EXPERTS[1:] for key in SHAPE.keys(name)):
        values = np.sort(rng.random(SHAPE.full_rank) ** rng.choice([0.1, 1, 5]))[::-1] * rng.choice([0.3, 1, 3])
        spectra[key] = values[: (born or {}).get(key)]
    return spectra


def born_ranks(seed: int) -> dict[MatrixKey, int]:
    """One expert, or none, that was low-rank from the start, not everywhere of one rank."""
    rng = np.random.default_rng(seed)
    names = [name for name in EXPERTS[1:] if rng.random() < 0.3][:1]
    return {key: int(rng.integers(1, 7)) for name in names for key in SHAPE.keys(name)}


_SEED = st.integers(0, 2**32 - 1)
_MEASURE = st.sampled_from(["parameters", "active", "bytes"])
_ACTIVE = st.sampled_from([None, 1, 2, 3, 4, 9])


def budget_at(parts: Parts, measure: str, share: float) -> Budget:
    """The budget at a share of the way from the public expert alone to the full mixture."""
    whole = read_budget("1x", measure, parts)
    return read_budget(str(whole.public_cost + int(share * (whole.full_cost - whole.public_cost))), measure, parts)


# -------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("measure", ["parameters", "active", "bytes"])
def test_a_budget_costs_what_the_mixture_has(measure):
    parts = parts_of()
    budget = read_budget("0.75x", measure, parts)
    full, public = parts.with_spec(MixtureSpec()), parts.with_spec(MixtureSpec(ranks=dict.fromkeys(EXPERTS[1:], DROP)))
    count = full.count()
    expected = {"parameters": count.total, "active": count.active, "bytes": 2 * count.total}[measure]
    assert budget.full_cost == budget.cost(full.assignment) == expected
    assert budget.public_cost == budget.cost(public.assignment)
    assert budget.limit == expected * 3 // 4
    assert budget.fits(public.assignment)
    assert not budget.fits(full.assignment)
    assert dataclasses.replace(budget, limit=expected).fits(full.assignment)


@pytest.mark.parametrize("measure", ["parameters", "active", "bytes"])
def test_a_budget_reaches_from_the_public_expert_to_the_full_mixture(measure):
    parts = parts_of()
    budget = read_budget("1x", measure, parts)
    assert budget.limit == budget.full_cost
    assert read_budget(str(budget.public_cost), measure, parts).limit == budget.public_cost
    word = {"parameters": "parameters", "active": "active parameters", "bytes": "bytes"}[measure]
    for number, text in (
        (budget.public_cost - 1, None),
        (budget.full_cost + 1, None),
        *((0, "0"), (0, "0x"), (100 * budget.full_cost, "100x"), (10**12, "1T")),
    ):
        with pytest.raises(UsageError) as caught:
            read_budget(text or str(number), measure, parts)
        message = str(caught.value)
        assert message.startswith(f"budget: {text or number} is {number:,} {word};")
        assert f"({budget.public_cost:,})" in message
        assert f"({budget.full_cost:,})" in message
        assert "\n" not in message


@pytest.mark.parametrize("text", ["", "-1", "-0.5x", "nan", "inf", "True", "half", "1e4", "nanx", "3.2GB"])
def test_a_budget_of_another_form(text):
    with pytest.raises(UsageError, match=r"^budget: a count such as 10\.75B or a ratio such as 0\.33x is needed"):
        read_budget(text, "parameters", parts_of())


def test_a_budget_in_an_unknown_measure():
    with pytest.raises(UsageError, match="measure: one of parameters, active, bytes is needed, got 'flops'"):
        read_budget("0.5x", "flops", parts_of())


def test_bytes_are_those_of_the_stored_dtype():
    half, single = (parts_of(dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert read_budget("0.5x", "bytes", single).limit == 2 * read_budget("0.5x", "bytes", half).limit
    assert read_budget("0.01MB", "bytes", half).limit == read_budget("10KB", "bytes", half).limit == 10_000


def test_the_full_mixture_has_the_checkpoints_own_active_experts():
    few, many = (read_budget("1x", "active", parts_of(active=active)).limit for active in (1, 4))
    assert few < many == read_budget("1x", "parameters", parts_of()).limit


def test_a_ratio_is_of_the_mixture_that_the_source_can_make():
    """An expert that was low-rank from the start is never dense."""
    born = dict.fromkeys(SHAPE.keys("math"), 2)
    dense, low = (read_budget("1x", "parameters", parts_of(born_ranks=ranks)).limit for ranks in ({}, born))
    assert dense - low == sum(matrix_params(SHAPE, key.projection, FULL) - 2 * 32 for key in born)


# ----------------------------------------------------------------------------- baselines


@given(seed=_SEED, share=st.floats(0, 1), measure=_MEASURE, active=_ACTIVE)
def test_every_baseline_fits(seed, share, measure, active):
    born = born_ranks(seed)
    parts = parts_of(born_ranks=born)
    budget = budget_at(parts, measure, share)
    named = baselines(parts, budget, random_spectra(seed, born), active)
    assert list(named) == [name for name in ORDER if name in named]
    for name, spec in named.items():
        assignment = assigned(parts, spec)
        assert name in ("full", "public") or budget.fits(assignment)
        assert list(assignment.ranks) == (["public"] if name == "public" else list(EXPERTS))
        assert assignment.active == (1 if name == "public" else min(active or 2, len(EXPERTS)))
        assert spec.active is None or active is not None or name == "public"


@given(seed=_SEED, share=st.floats(0, 1), measure=_MEASURE, active=_ACTIVE)
def test_no_higher_uniform_rank_fits(seed, share, measure, active):
    born = born_ranks(seed)
    parts = parts_of(born_ranks=born)
    budget = budget_at(parts, measure, share)
    spec = baselines(parts, budget, random_spectra(seed, born), active).get("uniform")

    def fits(rank: int | str) -> bool:
        ranks = dict.fromkeys(EXPERTS[1:], rank)
        return budget.fits(assigned(parts, MixtureSpec(ranks=ranks, active=active and min(active, 4))))

    fitting = [rank for rank in range(1, SHAPE.full_rank + 1) if fits(rank)]
    assert (spec is None) == (not fitting)
    if spec is not None:
        expected = MixtureSpec(ranks=dict.fromkeys(EXPERTS[1:], fitting[-1]))
        assert assigned(parts, spec).ranks == assigned(parts, expected).ranks


@settings(max_examples=40)
@given(seed=_SEED, share=st.floats(0, 1), measure=_MEASURE)
def test_no_higher_energy_threshold_fits(seed, share, measure):
    parts, spectra = parts_of(), random_spectra(seed)
    budget = budget_at(parts, measure, share)
    spec = baselines(parts, budget, spectra, None).get("energy")
    shares = {key: np.cumsum(np.square(values)) / np.square(values).sum() for key, values in spectra.items()}

    def ranks(threshold: float) -> dict[MatrixKey, int | str]:
        found = {key: energy_rank(values, threshold) for key, values in spectra.items()}
        return {key: FULL if rank > break_even_rank(SHAPE) else rank for key, rank in found.items()}

    def fits(threshold: float) -> bool:
        chosen = ranks(threshold)
        layers = {
            name: {p: [chosen[MatrixKey(name, layer, p)] for layer in range(2)] for p in PROJECTIONS}
            for name in EXPERTS[1:]
        }
        return budget.fits(assigned(parts, MixtureSpec(ranks=layers)))

    # Ranks change only at the share that some rank keeps: every set of ranks is met at one of these.
    thresholds = sorted({0.0, *(float(value) for kept in shares.values() for value in kept)})
    best = next((t for t in reversed(thresholds) if fits(min(t, 1.0))), None)
    assert (spec is None) == (best is None)
    if spec is not None and best is not None:
        assert {key: assigned(parts, spec).rank(key) for key in spectra} == ranks(min(best, 1.0))


@given(seed=_SEED, share=st.floats(0, 1))
def test_entropy_ranks_are_scaled_by_the_largest_factor_that_fits(seed, share):
    parts, spectra = parts_of(), random_spectra(seed)
    budget = budget_at(parts, "parameters", share)
    spec = baselines(parts, budget, spectra, None).get("entropy")
    effective = {key: entropy_rank(values) for key, values in spectra.items()}

    def total(top: int, bottom: int) -> int:
        scaled = (max(1, top * rank // bottom) for rank in effective.values())
        dense = SHAPE.hidden_size * SHAPE.intermediate_size
        routers = SHAPE.hidden_size * SHAPE.num_layers * (len(EXPERTS) - 1)
        return budget.public_cost + routers + sum(min(rank * 32, dense) for rank in scaled)

    factors = {(top, rank) for rank in set(effective.values()) for top in range(1, rank + 1)} | {(0, 1)}
    fitting = [total(*factor) for factor in factors if total(*factor) <= budget.limit]
    assert (spec is None) == (not fitting)
    if spec is not None:
        assert budget.cost(assigned(parts, spec)) == max(fitting)


@given(seed=_SEED, share=st.floats(0, 1), measure=st.sampled_from(["parameters", "bytes"]))
def test_the_optimal_baseline_discards_least(seed, share, measure):
    """Never more than a baseline without dense matrices; against others within the one step that did not fit."""
    parts, spectra = parts_of(), random_spectra(seed)
    named = baselines(parts, budget_at(parts, measure, share), spectra, None)
    lost = {name: discarded_energy(spectra, assigned(parts, spec)) for name, spec in named.items()}
    assert ("optimal" in named) == ("uniform" in named)
    step = max(float(np.square(values[1:]).sum()) for values in spectra.values())
    for name in ("uniform", "energy", "entropy"):
        if name in named:
            assignment = assigned(parts, named[name])
            some_dense = any(assignment.rank(key) == FULL for key in spectra)
            assert lost["optimal"] <= lost[name] + (step if some_dense else 0) + 1e-9


_PAIRS = [("expert", "projection"), ("expert", "layer"), ("expert", "matrix"), ("projection", "matrix")]
_PAIRS.append(("layer", "matrix"))


@given(
    seed=_SEED,
    share=st.floats(0, 1),
    measure=st.sampled_from(["parameters", "bytes"]),
    pair=st.sampled_from(_PAIRS),
)
def test_a_coarser_granularity_fits_and_never_discards_less(seed, share, measure, pair):
    """Where it has no dense matrices; else within the finer one's step to dense that did not fit."""
    parts, spectra = parts_of(), random_spectra(seed)
    budget = budget_at(parts, measure, share)
    found = [allocate(parts, budget, spectra, "optimal", granularity=granularity) for granularity in pair]
    if None in found:
        assert found == [None, None]
        return
    coarse, fine = (assigned(parts, spec) for spec in found)
    assert budget.fits(coarse)
    assert budget.fits(fine)
    step = 0.0
    for assignment, granularity in ((coarse, pair[0]), (fine, pair[1])):
        groups: dict[tuple[object, ...], list[MatrixKey]] = {}
        for key in spectra:
            name = {"expert": (), "projection": (key.projection,), "layer": (key.layer,)}.get(granularity, (key,))
            groups.setdefault((key.expert, *name), []).append(key)
        assert all(len({assignment.rank(key) for key in keys}) == 1 for keys in groups.values())
        step = max(sum(float(np.square(spectra[key][1:]).sum()) for key in keys) for keys in groups.values())
    dense = any(coarse.rank(key) == FULL for key in spectra)
    lost = discarded_energy(spectra, coarse)
    assert discarded_energy(spectra, fine) <= lost + (step if dense else 0) + 1e-9


@settings(max_examples=20)
@given(
    seed=_SEED,
    share=st.floats(0, 1),
    measure=_MEASURE,
    granularity=st.sampled_from(["expert", "projection", "layer", "matrix"]),
)
def test_a_search_has_the_optimal_ranks_of_its_granularity_beside_those_by_matrix(seed, share, measure, granularity):
    born = born_ranks(seed)
    parts, spectra = parts_of(born_ranks=born), random_spectra(seed, born)
    budget = budget_at(parts, measure, share)
    plain, named = (baselines(parts, budget, spectra, None, g) for g in ("matrix", granularity))
    more = list(named)[len(plain) :]
    assert list(named) == [*plain, *more]
    assert {name: named[name] for name in plain} == plain
    own = allocate(parts, budget, spectra, "optimal", granularity=granularity)
    assert more == ([] if own == plain.get("optimal") else [f"optimal-{granularity}"])
    assert all(named[name] == own and budget.fits(assigned(parts, own)) for name in more)


def test_the_command_knows_every_granularity():
    assert set(GRANULARITIES) == set(get_args(Granularity))


def test_an_unknown_rule():
    parts = parts_of()
    budget = budget_at(parts, "parameters", 0.5)
    with pytest.raises(UsageError, match="rule: unknown 'optimum'; did you mean optimal"):
        allocate(parts, budget, random_spectra(0), "optimum")  # type: ignore[arg-type]


def test_a_budget_below_rank_one_has_only_the_two_extremes():
    parts = parts_of()
    for measure in ("parameters", "active", "bytes"):
        assert list(baselines(parts, budget_at(parts, measure, 0), random_spectra(0), None)) == ORDER[:2]


def test_a_budget_of_the_full_mixture_gives_full_ranks():
    parts = parts_of()
    named = baselines(parts, budget_at(parts, "parameters", 1), random_spectra(0), None)
    full = assigned(parts, named["full"])
    assert list(named) == ORDER
    assert full == assigned(parts, named["uniform"]) == assigned(parts, named["energy"])
    assert full == assigned(parts, named["optimal"])


def test_dense_experts_may_be_cheaper_to_activate_than_corrections():
    """With two active, two dense experts cost less than the public one beside two corrections near break-even."""
    parts = parts_of()
    budget = budget_at(parts, "active", 1)
    high = MixtureSpec(ranks=dict.fromkeys(EXPERTS[1:], break_even_rank(SHAPE)))
    assert not budget.fits(assigned(parts, high))
    assert baselines(parts, budget, random_spectra(0), None)["uniform"].ranks == dict.fromkeys(EXPERTS[1:], FULL)
    less = dataclasses.replace(budget, limit=budget.limit - 1)
    rank = baselines(parts, less, random_spectra(0), None)["uniform"].ranks["math"]
    assert isinstance(rank, int)
    assert rank < break_even_rank(SHAPE)


def test_a_larger_factor_may_fit_where_a_smaller_one_does_not():
    """Two experts of effective rank 12 become dense, at rank 8, and then cost less beside code's than before."""
    parts = parts_of(active=4)
    effective = {"math": 12, "news": 12, "code": 7}
    spectra = {key: (np.arange(12) < effective[key.expert]).astype(float) for key in random_spectra(0)}
    whole = read_budget("1x", "active", parts)

    def cost(ranks: list[int | str]) -> int:
        return whole.cost(assigned(parts, MixtureSpec(ranks=dict(zip(EXPERTS[1:], ranks, strict=True)), active=2)))

    limit = cost([FULL, FULL, 4])
    assert cost([5, 5, 3]) < limit < cost([6, 6, 3]) < cost([7, 7, 4])
    spec = baselines(parts, dataclasses.replace(whole, limit=limit), spectra, 2)["entropy"]
    assert spec.ranks == {"math": FULL, "news": FULL, "code": 4}


def test_what_the_sources_own_mixture_says_does_not_matter():
    spec = MixtureSpec(ranks={"math": 3, "news": DROP}, active=1, mixture_id="0" * 16)
    plain, refined = parts_of(), open_mixture(spec, source=FakeSource(), factors=object())
    for measure in ("parameters", "active"):
        budget = budget_at(plain, measure, 0.4)
        assert read_budget(str(budget.limit), measure, refined) == budget
        named = baselines(refined, budget, random_spectra(3), None)
        assert named == baselines(plain, budget, random_spectra(3), None)


@pytest.mark.parametrize("active", [True, 0, -1, 1.5])
def test_active_experts_are_a_count(active):
    parts = parts_of()
    with pytest.raises(UsageError, match="active: the number of experts per token is an integer >= 1"):
        baselines(parts, budget_at(parts, "parameters", 0.5), random_spectra(0), active)


@given(seed=_SEED, share=st.floats(0, 1), measure=_MEASURE)
def test_an_expert_born_low_rank_without_spectra_stays_as_it_was_made(seed, share, measure):
    born = {key: 2 + key.layer for key in SHAPE.keys("news")}
    parts = parts_of(born_ranks=born)
    spectra = {key: values for key, values in random_spectra(seed).items() if key not in born}
    budget = budget_at(parts, measure, share)
    named = baselines(parts, budget, spectra, None)
    for name, spec in named.items():
        if name != "public":
            assignment = assigned(parts, spec)
            assert all(assignment.rank(key) == rank for key, rank in born.items())
            assert name == "full" or budget.fits(assignment)


def test_the_spectra_of_an_expert_that_has_weights_are_needed():
    parts, spectra = parts_of(), random_spectra(0)
    del spectra[MatrixKey("code", 1, "up_proj")]
    with pytest.raises(AssertionError, match="no spectrum of expert code, layer 1, up_proj"):
        baselines(parts, budget_at(parts, "parameters", 0.5), spectra, None)


def test_a_source_without_domain_experts_has_only_itself():
    parts = parts_of(experts=("public",), active=1)
    assert list(baselines(parts, read_budget("1x", "parameters", parts), {}, None)) == ORDER[:2]


# -------------------------------------------------------------------------------- spread


@given(
    seed=_SEED,
    rank=st.integers(1, SHAPE.full_rank + 3),
    granularity=st.sampled_from(["projection", "layer", "matrix"]),
)
def test_spreading_costs_no_more_and_discards_no_more(seed, rank, granularity):
    born = born_ranks(seed)
    parts, spectra = parts_of(born_ranks=born), random_spectra(seed, born)
    budget = budget_at(parts, "parameters", 1)
    for expert in EXPERTS[1:]:
        found = spread(parts, spectra, expert, rank, granularity)
        assert found == spread(parts, spectra, expert, rank, granularity)
        ours, uniform = (assigned(parts, MixtureSpec(ranks={expert: ranks})) for ranks in (found, rank))
        assert budget.cost(ours) <= budget.cost(uniform)
        assert discarded_energy(spectra, ours) <= discarded_energy(spectra, uniform) * (1 + 1e-12)
        for layer in range(SHAPE.num_layers):
            ranks = {ours.rank(MatrixKey(expert, layer, p)) for p in PROJECTIONS}
            assert granularity != "layer" or len(ranks) == 1 or born
        for p in PROJECTIONS:
            assert granularity != "projection" or len(set(ours.ranks[expert][p])) == 1 or born


@given(seed=_SEED, rank=st.integers(2, 5))
def test_spreading_over_projections_is_the_best_split(seed, rank):
    parts, spectra = parts_of(), random_spectra(seed)
    found = assigned(parts, MixtureSpec(ranks={"math": spread(parts, spectra, "math", rank, "projection")}))
    assume(all(r != FULL for layers in found.ranks["math"].values() for r in layers))
    own = {key: values for key, values in spectra.items() if key.expert == "math"}

    def lost(split: tuple[int, ...]) -> float:
        by_projection = dict(zip(PROJECTIONS, split, strict=True))
        return sum(float(np.square(values[by_projection[key.projection] :]).sum()) for key, values in own.items())

    highest = break_even_rank(SHAPE)
    best = min(
        lost((a, b, 3 * rank - a - b))
        for a in range(1, highest + 1)
        for b in range(1, highest + 1)
        if 1 <= 3 * rank - a - b <= highest
    )
    assert discarded_energy(own, found) == pytest.approx(best)


@pytest.mark.parametrize("rank", [FULL, DROP, {"gate_proj": 1, "up_proj": FULL, "down_proj": [1, 2]}])
def test_what_is_no_single_rank_is_not_spread(rank):
    assert spread(parts_of(), random_spectra(0), "math", rank, "layer") == rank


def test_an_expert_as_a_whole_is_not_spread():
    assert spread(parts_of(), random_spectra(0), "math", 4, "expert") == 4
    assert spread(parts_of(), random_spectra(0), "math", np.int64(4), "expert") == 4


def test_spreading_refuses_what_is_no_rank():
    with pytest.raises(UsageError, match=r"ranks\.math: a rank is an integer >= 1"):
        spread(parts_of(), random_spectra(0), "math", True, "layer")
    with pytest.raises(UsageError, match="granularity: one of"):
        spread(parts_of(), random_spectra(0), "math", 2, "column")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- a real model


def test_baselines_of_a_real_model(tmp_path: Path):
    folder = write(random_model(), tmp_path / "model", dtype=torch.bfloat16)
    parts = open_mixture(MixtureSpec(source=(str(folder),), experts=EXPERTS))
    store = build_store(parts.source, tmp_path / "store")
    keys = [key for name in EXPERTS[1:] for key in parts.source.shape.keys(name)]
    spectra = {key: store.spectrum(key).double().numpy() for key in keys}
    for measure in ("parameters", "active", "bytes"):
        budget = read_budget("0.75x", measure, parts)
        named = baselines(parts, budget, spectra, 3)
        assert list(named) == ORDER
        for name, spec in named.items():
            made = parts.with_spec(spec)
            count = made.count()
            cost = {"parameters": count.total, "active": count.active, "bytes": 2 * count.total}[measure]
            assert cost == budget.cost(made.assignment)
            assert (cost <= budget.limit) == (name != "full")
            spec.save(tmp_path / "mixture.yaml")
            assert parts.with_spec(MixtureSpec.load(tmp_path / "mixture.yaml")).assignment == made.assignment
    larger_below = {key: values * (1 + 2 * key.layer) for key, values in spectra.items()}
    found = assigned(parts, MixtureSpec(ranks={"math": spread(parts, larger_below, "math", 6, "layer")}))
    assert found.rank(MatrixKey("math", 0, "up_proj")) < 6 < found.rank(MatrixKey("math", 1, "up_proj"))
