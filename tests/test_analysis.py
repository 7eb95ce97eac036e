"""Intervals, fits, fronts and tests against straightforward references: loops, numpy, scipy, brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm, permutation_test

from flexmore_ray.report.analysis import (
    SUFFICIENT,
    Curve,
    Interval,
    Measure,
    best_rank,
    bootstrap_means,
    fit_quadratic,
    highest_point,
    interval,
    mean,
    mean_curve,
    needed,
    pareto_front,
    permutations,
    sufficient_rank,
)

RANKS = (1, 2, 4, 8, 16, 32, "full")
X = np.array([0, 1, 2, 3, 4, 5, 6.5])


def curve_of(documents: np.ndarray, resamples: int = 300, seed: int = 0) -> Curve:
    """A curve from (ranks, documents) of 0 and 1."""
    draws = bootstrap_means(documents, resamples, np.random.default_rng(seed))
    return Curve(RANKS[: len(documents)], X[: len(documents)], Measure(documents.mean(1), draws))


def curve_with(values: list[float], draws: np.ndarray | None = None) -> Curve:
    value = np.array(values, dtype=np.float64)
    draws = np.tile(value, (5, 1)) if draws is None else draws
    return Curve(RANKS[: len(values)], X[: len(values)], Measure(value, draws))


def answers(probabilities: np.ndarray, documents: int, seed: int, shared: float = 0.9) -> np.ndarray:
    """Right and wrong answers whose difficulty is shared between mixtures: (mixtures, documents) of 0 and 1."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=documents) * math.sqrt(shared)
    noise = noise + rng.normal(size=(len(probabilities), documents)) * math.sqrt(1 - shared)
    return (noise < norm.ppf(probabilities)[:, None]).astype(float)


# --- the bootstrap ----------------------------------------------------------------------------------------


def test_bootstrap_is_a_loop_over_drawn_documents():
    values = np.random.default_rng(3).random((4, 17))
    got = bootstrap_means(values, 50, np.random.default_rng(7))
    drawn = np.random.default_rng(7).integers(17, size=(50, 17))
    expected = [[np.mean([values[m, d] for d in row]) for m in range(4)] for row in drawn]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_bootstrap_spread_is_the_standard_error():
    values = np.random.default_rng(0).random((1, 400))
    draws = bootstrap_means(values, 4000, np.random.default_rng(0))
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.05)


def test_pairing_makes_differences_narrower():
    documents = answers(np.array([0.5, 0.55]), 300, seed=0)
    paired = bootstrap_means(documents, 2000, np.random.default_rng(0))
    other = bootstrap_means(documents, 2000, np.random.default_rng(1))
    measure = Measure(documents.mean(1), paired)
    difference = measure.difference(1, 0)
    unpaired = interval(difference.value, paired[:, 1] - other[:, 0])
    assert difference.high - difference.low < 0.7 * (unpaired.high - unpaired.low)
    assert difference.value == pytest.approx(documents[1].mean() - documents[0].mean())


def test_intervals_cover_the_true_difference():
    truth, hits, runs = 0.08, 0, 300
    for seed in range(runs):
        documents = answers(np.array([0.45, 0.45 + truth]), 150, seed=seed, shared=0.5)
        draws = bootstrap_means(documents, 400, np.random.default_rng(seed))
        found = Measure(documents.mean(1), draws).difference(1, 0)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / runs <= 0.985


def test_verdicts():
    assert Interval(0.1, 0.01, 0.2).verdict == "better"
    assert Interval(-0.1, -0.2, -0.01).verdict == "worse"
    assert Interval(0.1, 0.0, 0.2).verdict == Interval(0.0, 0.0, 0.0).verdict == "equal within noise"
    assert interval(math.nan, np.zeros(3)).verdict == "not known"


def test_means_lack_what_a_part_lacks():
    one, two = Measure(np.array([0.2, 0.4]), np.ones((2, 2))), Measure(np.array([math.nan, 0.6]), np.zeros((2, 2)))
    both = mean([one, two])
    assert math.isnan(both.value[0])
    assert both.value[1] == 0.5
    assert (both.draws == 0.5).all()


# --- ranks ------------------------------------------------------------------------------------------------


def test_fit_is_polyfit_in_every_resample():
    documents = answers(np.array([0.2, 0.35, 0.5, 0.55, 0.56, 0.5, 0.4]), 200, seed=2)
    curve = curve_of(documents)
    fit = fit_quadratic(curve)
    assert fit is not None
    np.testing.assert_allclose(fit.coefficients, np.polyfit(X, curve.measure.value, 2)[::-1], rtol=1e-8)
    for row, best in zip(curve.measure.draws[:40], fit.draws[:40], strict=True):
        c2, c1, c0 = np.polyfit(X, row, 2)
        found = minimize_scalar(lambda x, c=(c0, c1, c2): -(c[0] + c[1] * x + c[2] * x**2), bounds=(0, 6.5))
        assert best == pytest.approx(found.x, abs=2e-3)
    residual = curve.measure.value - np.polyval(fit.coefficients[::-1], X)
    assert fit.r_squared == pytest.approx(1 - residual.var() / curve.measure.value.var(), rel=1e-6)
    assert fit.where == "inside"
    assert fit.best.low < fit.best.value < fit.best.high


@pytest.mark.parametrize(
    ("values", "best", "where"),
    [
        ([1 - 0.02 * (x - 3.3) ** 2 for x in X], 3.3, "inside"),
        ([0.1 + 0.1 * x for x in X], 6.5, "highest rank"),
        ([0.9 - 0.1 * x for x in X], 0.0, "lowest rank"),
        ([0.2 + 0.01 * (x - 3) ** 2 for x in X], 6.5, "highest rank"),
        ([1 - 0.002 * (x - 9) ** 2 for x in X], 6.5, "highest rank"),
        ([0.25] * 7, 0.0, "flat"),
    ],
)
def test_best_rank_of_known_curves(values, best, where):
    fit = fit_quadratic(curve_with(values))
    assert fit is not None
    assert fit.best.value == pytest.approx(best)
    assert fit.where == where


def test_no_fit_through_three_ranks_or_at_an_unknown_full_rank():
    assert fit_quadratic(curve_with([0.1, 0.2, 0.3])) is None
    assert fit_quadratic(None) is None
    curve = curve_with([0.1, 0.3, 0.2, 0.1])
    unknown = Curve(("1", "2", "4", "full"), np.array([0, 1, 2, math.nan]), curve.measure)
    assert fit_quadratic(unknown) is None
    assert fit_quadratic(curve) is not None


@given(st.tuples(*[st.floats(-1, 1)] * 3), st.floats(-2, 2), st.floats(0.5, 9))
def test_highest_point_is_the_highest_of_a_fine_grid(coefficients, low, width):
    place = float(highest_point(np.array(coefficients), low, low + width))
    grid = np.linspace(low, low + width, 2001)
    heights = np.polyval(coefficients[::-1], grid)
    assert low <= place <= low + width
    assert np.polyval(coefficients[::-1], place) >= heights.max() - 1e-6


def test_best_of_measured_ranks_takes_the_lowest_of_equals():
    best = best_rank(curve_with([0.1, 0.4, 0.3, 0.4, 0.2, 0.1, 0.3]))
    assert (best.rank, best.score, best.full) == (2, 0.4, 0.3)
    assert best.gain.value == pytest.approx(0.1)
    assert (best.low, best.high, best.optimism) == (2, 2, 0.0)


def test_optimism_is_what_picking_the_best_really_adds():
    """All ranks are equally good; what the best one shows beyond that is luck."""
    estimated, luck = [], []
    for seed in range(60):
        documents = answers(np.full(7, 0.5), 200, seed=seed, shared=0.3)
        best = best_rank(curve_of(documents, resamples=200, seed=seed))
        estimated.append(best.optimism)
        luck.append(best.score - 0.5)
    assert np.mean(luck) > 0.02
    assert np.mean(estimated) == pytest.approx(np.mean(luck), rel=0.35)


@given(st.lists(st.integers(0, 100), min_size=4, max_size=7))
def test_sufficient_rank_is_the_first_of_a_fine_grid(hundredths):
    values = [h / 100 for h in hundredths]
    found, draws = sufficient_rank(curve_with(values))
    target = values[0] + SUFFICIENT * (max(values) - values[0])
    grid = np.linspace(0, X[len(values) - 1], 40_001)
    reached = grid[np.interp(grid, X[: len(values)], values) >= target - 1e-6][0]
    assert found == pytest.approx(reached, abs=1e-3)
    np.testing.assert_allclose(draws, found)


def test_mean_curves_have_the_common_ranks():
    long, short = curve_with([0.1, 0.2, 0.3, 0.4, 0.5]), curve_with([0.3, 0.6])
    found = mean_curve([long, short])
    assert found.ranks == (1, 2)
    np.testing.assert_allclose(found.measure.value, [0.2, 0.4])


# --- what a method needs ----------------------------------------------------------------------------------


def scanned(parameters, values, target):
    """The first of many places, along the straight lines between points, where a target is reached."""
    x = np.linspace(np.log(parameters[0]), np.log(parameters[-1]), 200_001)
    reached = np.flatnonzero(np.interp(x, np.log(parameters), values) >= target - 1e-6)
    return math.exp(x[reached[0]]) if reached.size else math.inf


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    scores=st.lists(st.integers(0, 20), min_size=7, max_size=7),
    share=st.sampled_from([0.9, 0.95, 1.0]),
)
def test_needed_is_the_first_place_that_reaches_the_share(steps, scores, share):
    parameters = 100.0 + np.cumsum(steps)
    values = np.array(scores) / 20
    rows = np.stack([values, np.roll(values, 1), values[::-1]])
    draws, few = rows[:, : len(steps)], rows[:, -2:]
    value, found = needed(parameters, Measure(draws[0], draws), Measure(few[0], few), share)
    for place, line, (public, full) in zip(found, draws, few, strict=True):
        assert place == pytest.approx(scanned(parameters, line, public + share * (full - public)), rel=1e-5)
    assert value == found[0]


def test_needed_by_hand():
    curve = Measure(np.array([0.5, 0.7, 0.8]), np.array([[0.5, 0.7, 0.8], [0.75, 0.7, 0.7]]))
    ends = Measure(np.array([0.2, 0.8]), np.array([[0.2, 0.8], [0.2, 0.8]]))
    value, draws = needed(np.array([1000.0, 2000.0, 4000.0]), curve, ends, 0.9)
    assert value == pytest.approx(2000 * 2**0.4)  # 0.74 lies at 0.4 of the way from 0.7 to 0.8
    np.testing.assert_allclose(draws, [2000 * 2**0.4, 1000])  # the second is there from the start
    value, draws = needed(np.array([1000.0, 2000.0, 4000.0]), curve, ends, 1.0)
    np.testing.assert_allclose([value, *draws], [4000, 4000, math.inf])


# --- groups, fronts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_permutations_are_scipys(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 5, 3).astype(float), rng.integers(1, 7, 4).astype(float)
    found = permutations(first, second)
    assert found is not None
    assert found[1] == 35
    reference = permutation_test(
        (first, second), lambda a, b: abs(a.mean() - b.mean()), n_resamples=np.inf, alternative="greater"
    )
    assert found[0] / found[1] == pytest.approx(reference.pvalue)


def test_permutations_need_two_of_each_and_an_end():
    assert permutations([1.0], [2.0, 3.0]) is None
    assert permutations(list(range(20)), list(range(20))) is None


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan])), max_size=12))
def test_front_is_brute_force(points):
    parameters = np.array([p for p, _ in points], dtype=np.float64)
    scores = np.array([s for _, s in points])
    got = pareto_front(parameters, scores)
    for i, (size, score) in enumerate(points):
        beaten = any(p <= size and s >= score and (p < size or s > score) for p, s in points)
        assert got[i] == (not beaten and not math.isnan(score))
