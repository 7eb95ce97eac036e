"""Counting parameters and allocating ranks, against the paper's figures and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmore_ray.budget import (
    SHAPE_EXPERTS,
    SHAPES,
    OptimalRanks,
    allocate_energy,
    allocate_entropy,
    allocate_optimal,
    allocate_uniform,
    break_even_rank,
    collect_ranks,
    count_parameters,
    discarded_energy,
    entropy_rank,
    expert_params,
    matrix_params,
    parse_budget,
)
from flexmore_ray.errors import UsageError
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, MatrixKey, MixtureSpec, ModelShape

BIG, BIG_EXPERTS = SHAPES["flexolmo-7x7b"], SHAPE_EXPERTS["flexolmo-7x7b"]
TINY = ModelShape(
    hidden_size=4, intermediate_size=6, num_layers=1, vocab_size=5, num_heads=1, num_kv_heads=1, head_dim=4
)
TINY_EXPERTS = ("public", "math", "news")


def _count(ranks: dict[str, object], active: int = 1):
    return count_parameters(BIG, BIG_EXPERTS, MixtureSpec(ranks=ranks, active=active).assignment(BIG_EXPERTS, BIG))


def test_the_papers_figures():
    """FlexMoRE (arXiv 2602.08818): 33.27B full, 10.75B heterogeneous; the rest from the shapes."""
    assert _count({}).total == 33_270_665_216
    assert _count(dict.fromkeys(BIG_EXPERTS[1:], 1)).total - 6 * 1_449_984 == 7_299_534_848
    assert _count({"math": 2}).total - _count({"math": 1}).total == 1_449_984
    mixed = _count(dict(zip(BIG_EXPERTS[1:], (2048, 256, 64, 8, 4, 1), strict=True)))
    assert round(mixed.total / 1e9, 2) == 10.75
    assert mixed.ratio == mixed.total / 33_270_665_216
    assert break_even_rank(BIG) == 2985
    assert [round(_count({}, k).active / 1e9, 2) for k in (2, 4, 7)] == [11.63, 20.29, 33.27]


_RANK = st.one_of(st.integers(1, 8), st.sampled_from([FULL, DROP]))


@given(ranks=st.fixed_dictionaries(dict.fromkeys(("math", "news", "code"), _RANK)), data=st.data())
def test_active_parameters_are_the_costliest_choice(ranks, data):
    experts = ("public", "math", "news", "code")
    kept = [name for name in experts if ranks.get(name) != DROP]
    active = data.draw(st.integers(1, len(kept)))
    assignment = MixtureSpec(ranks=ranks, active=active).assignment(experts, TINY)
    count = count_parameters(TINY, experts, assignment)
    base = count.total - sum(count.experts.values())

    def cost(chosen: tuple[str, ...]) -> int:
        shares = any(name == "public" or assignment.summary(name) != FULL for name in chosen)
        own = sum(count.experts[name] for name in chosen if name != "public")
        return base + own + (count.experts["public"] if shares else 0)

    assert count.active == max(cost(chosen) for chosen in itertools.combinations(kept, active))


def _spectra(values: list[list[float]]):
    keys = [key for name in TINY_EXPERTS[1:] for key in TINY.keys(name)]
    return {key: np.sort(np.array(v))[::-1] for key, v in zip(keys, values, strict=True)}


_SPECTRA = st.lists(st.lists(st.floats(0.01, 10), min_size=4, max_size=4), min_size=6, max_size=6).map(_spectra)


def _discarded(spectra, ranks) -> float:
    lost = 0.0
    for key, values in spectra.items():
        rank = ranks[key.expert] if not isinstance(ranks[key.expert], dict) else ranks[key.expert][key.projection]
        lost += 0.0 if rank == FULL else float(np.square(values[rank:]).sum())
    return lost


def _total(ranks) -> int:
    return count_parameters(TINY, TINY_EXPERTS, MixtureSpec(ranks=ranks).assignment(TINY_EXPERTS, TINY)).total


@settings(max_examples=40, deadline=None)
@given(spectra=_SPECTRA, share=st.floats(0, 1), granularity=st.sampled_from(["expert", "matrix", "projection"]))
def test_optimal_allocation_is_within_budget_and_no_exact_budget_is_beaten(spectra, share, granularity):
    low = _total(dict.fromkeys(TINY_EXPERTS[1:], 1))
    budget = low + int(share * (_total({}) - low))
    ranks = allocate_optimal(TINY, TINY_EXPERTS, spectra, budget, granularity)
    spent = _total(ranks)
    assert spent <= budget
    choices = [1, 2, FULL]  # break-even is 2: a pair of rank 3 costs more than the dense matrix
    assert break_even_rank(TINY) == 2
    groups = {"expert": 1, "projection": 3, "matrix": 3}[granularity]
    best = np.inf
    for picks in itertools.product(choices, repeat=2 * groups):
        named = {}
        for i, name in enumerate(TINY_EXPERTS[1:]):
            part = picks[i * groups : (i + 1) * groups]
            named[name] = part[0] if groups == 1 else dict(zip(PROJECTIONS, part, strict=True))
        if _total(named) <= spent:
            best = min(best, _discarded(spectra, named))
    step = max(float(np.square(values).sum()) for values in spectra.values()) * (3 if groups == 1 else 1)
    assert _discarded(spectra, ranks) <= best + step  # a knapsack's greedy bound: at most one step away


def test_optimal_allocation_is_exact_where_steps_fill_the_budget():
    rng = np.random.default_rng(0)
    spectra = {k: np.sort(rng.random(4096))[::-1] for name in BIG_EXPERTS[1:3] for k in BIG.keys(name)}
    experts = BIG_EXPERTS[:3]
    base = _base(experts)
    unit = matrix_params(BIG, "gate_proj", 1)
    wanted = base + unit * 50_000
    ranks = allocate_optimal(BIG, experts, spectra, wanted)
    assignment = MixtureSpec(ranks=ranks).assignment(experts, BIG)
    assert count_parameters(BIG, experts, assignment).total == wanted
    chosen = {k: assignment.rank(k) for k in spectra}
    assert all(rank != FULL for rank in chosen.values())
    kept_least = min(spectra[k][r - 1] for k, r in chosen.items() if r > 1)
    lost_most = max(spectra[k][r] for k, r in chosen.items())
    assert kept_least >= lost_most


@given(spectra=_SPECTRA, share=st.floats(0, 1), ranks=st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_no_choice_without_dense_matrices_discards_less(spectra, share, ranks):
    low = _total(dict.fromkeys(TINY_EXPERTS[1:], 1))
    budget = low + int(share * (_total({}) - low))
    grouped = iter(ranks)
    named = {name: {p: next(grouped) for p in PROJECTIONS} for name in TINY_EXPERTS[1:]}
    assignment = MixtureSpec(ranks=named).assignment(TINY_EXPERTS, TINY)
    if count_parameters(TINY, TINY_EXPERTS, assignment).total > budget:
        return
    best = MixtureSpec(ranks=OptimalRanks(TINY, TINY_EXPERTS, spectra).allocate(budget))
    lost = discarded_energy(spectra, best.assignment(TINY_EXPERTS, TINY))
    assert lost <= discarded_energy(spectra, assignment) * (1 + 1e-9)


def test_a_budget_short_of_dense_still_buys_ranks():
    """Of a flat spectrum the dense matrix is the best buy from the start; where it does not fit, ranks are."""
    shape = ModelShape(
        hidden_size=20, intermediate_size=30, num_layers=1, vocab_size=5, num_heads=1, num_kv_heads=1, head_dim=4
    )
    experts = ("public", "math")
    rule = OptimalRanks(shape, experts, {key: np.ones(20) for key in shape.keys("math")})
    dense = matrix_params(shape, "up_proj", FULL)
    assert rule.allocate(rule.least + 49) == {"math": 1}
    assert rule.allocate(rule.least + 9 * 50) == {"math": {"gate_proj": 1, "up_proj": 1, "down_proj": 10}}
    one = rule.least + dense - 50
    assert rule.allocate(one) == {"math": {"gate_proj": 1, "up_proj": 1, "down_proj": FULL}}
    assert rule.allocate(one + 4 * 50) == {"math": {"gate_proj": 5, "up_proj": 1, "down_proj": FULL}}
    assert rule.allocate(one + 2 * (dense - 50)) == {"math": FULL}


@pytest.mark.parametrize("granularity", ["layers", "", "drop"])
def test_an_unknown_granularity(granularity):
    with pytest.raises(UsageError, match="granularity: one of expert, projection, layer, matrix is needed"):
        OptimalRanks(TINY, TINY_EXPERTS, {}, granularity)


def test_discarded_energy_counts_what_is_beyond_the_ranks_and_all_of_a_dropped_expert():
    spectra = {key: np.array([3.0, 2.0, 1.0]) for name in TINY_EXPERTS[1:] for key in TINY.keys(name)}
    ranks = {"math": {"gate_proj": 1, "up_proj": FULL, "down_proj": 2}, "news": DROP}
    assignment = MixtureSpec(ranks=ranks).assignment(TINY_EXPERTS, TINY)
    assert discarded_energy(spectra, assignment) == (4 + 1) + 0 + 1 + 3 * 14


def test_a_rank_that_costs_as_much_as_dense_is_collected_as_full():
    keys = [MatrixKey("math", 0, p) for p in PROJECTIONS]
    assert collect_ranks(TINY, dict(zip(keys, (1, 2, 3), strict=True))) == {
        "math": {"gate_proj": 1, "up_proj": 2, "down_proj": FULL}
    }


def _base(experts: tuple[str, ...]) -> int:
    assignment = MixtureSpec(ranks=dict.fromkeys(experts[1:], 1)).assignment(experts, BIG)
    count = count_parameters(BIG, experts, assignment)
    return count.total - sum(count.experts[name] for name in experts[1:])


def test_uniform_allocation_is_the_highest_that_fits():
    ranks = allocate_uniform(BIG, BIG_EXPERTS, 10_750_000_000)
    assert set(ranks.values()) == {396}  # papers.md: about 397
    assert _count(ranks).total <= 10_750_000_000 < _count(dict.fromkeys(ranks, 397)).total
    assert set(allocate_uniform(BIG, BIG_EXPERTS, 33_270_665_216).values()) == {FULL}
    with pytest.raises(UsageError, match=r"7,300,000,000 parameters are fewer than .* need \(7,308,234,752\)"):
        allocate_uniform(BIG, BIG_EXPERTS, 7_300_000_000)


def test_energy_and_entropy_rules_choose_by_matrix():
    keys = [key for name in TINY_EXPERTS[1:] for key in TINY.keys(name)]
    flat, steep = np.ones(4), np.array([10.0, 0.1, 0.1, 0.1])
    spectra = {key: flat if key.expert == "math" else steep for key in keys}
    assert allocate_energy(TINY, spectra, 0.9) == {"math": FULL, "news": 1}
    assert allocate_entropy(TINY, spectra)["math"] == FULL
    assert entropy_rank(flat) == 4
    assert entropy_rank(np.zeros(4)) == 1
    assert entropy_rank(steep) == 2


def test_expert_params_of_a_refined_assignment():
    ranks = {"gate_proj": (3,), "up_proj": (FULL,), "down_proj": (1,)}
    assert expert_params(TINY, ranks) == 3 * 10 + 24 + 10


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("10.75B", 10_750_000_000), ("4.2M", 4_200_000), ("800000", 800_000), ("0.5x", 500), ("1.25 t", 1.25e12)),
        *(("0.29x", 290), ("1x", 1000), (" 12k ", 12_000), ("0", 0), ("0x", 0)),  # int(0.29 * 100 * 10) would be 289
        ("9" * 30 + "T", int("9" * 30) * 10**12),
    ],
)
def test_budgets(text, count):
    assert parse_budget(text, 1000) == count
    assert parse_budget(text, 1000, in_bytes=True) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("3.2GB", 3.2e9), ("800MB", 8e8), ("1.5GiB", 1.5 * 2**30), ("2 kib", 2048), ("1TB", 1e12), ("1TiB", 2**40)],
)
def test_budgets_of_bytes(text, count):
    assert parse_budget(text, 1000, in_bytes=True) == count
    with pytest.raises(UsageError, match=r"a count such as 10\.75B"):
        parse_budget(text, 1000)


_BAD = ["", "x", "-3", "10 percent", "1e9", "nan", "inf", "-inf", "True", "1,000", "3.B", ".5x", "9" * 400, "4 xx"]


@pytest.mark.parametrize("text", _BAD)
def test_bad_budgets(text):
    with pytest.raises(UsageError, match="a count such as"):
        parse_budget(text, 1000)
    with pytest.raises(UsageError, match=r"a count such as 3\.2GB"):
        parse_budget(text, 1000, in_bytes=True)
