"""The order of a search and its ledger, with synthetic scores: the planted problem, resuming, what is written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.spec import DROP, FULL
from search.samplers import SAMPLERS
from search.study import Study
from tests.search_problem import (
    PROBLEM,
    MemoryJournal,
    MemoryLedger,
    Problem,
    rows,
    run,
    score,
    some_problem,
    study_of,
    varied,
)


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


# --- the planted problem ----------------------------------------------------------------------------------

PLANTED_EXPERTS, PLANTED_RANK, PLANTED_TRIALS, PLANTED_SEEDS = 6, 2**14, 150, 10


def planted(seed: int, share: float = 0.3) -> Problem:
    """A problem of 6 experts at 16 levels.

    An expert's gain saturates with its rank r as 1 - exp(-r / tau), and falls a little beyond that. It costs its
    rank, or seven tenths of the full one if that is less.
    """
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(PLANTED_EXPERTS, 1.5))
    tau = 2.0 ** rng.uniform(1, 12, (PLANTED_EXPERTS, 1))
    penalty = rng.uniform(0, 0.1, (PLANTED_EXPERTS, 1))
    ranks = np.array([0, *(2**k for k in range(14)), PLANTED_RANK])
    beyond = np.maximum(0, np.log2(np.maximum(ranks, 1) / tau)) / 4
    gains = weights[:, None] * (1 - np.exp(-ranks / tau) - penalty * beyond)
    costs = np.tile(np.minimum(ranks, 0.7 * PLANTED_RANK), (PLANTED_EXPERTS, 1))
    names = tuple(f"expert{i}" for i in range(PLANTED_EXPERTS))
    return Problem(names, PLANTED_RANK, gains, costs, share * PLANTED_EXPERTS * 0.7 * PLANTED_RANK)


def optimum(problem: Problem) -> float:
    """The highest sum of gains within the budget: the best pair of one half of the experts and the other."""
    middle = len(problem.experts) // 2
    halves = []
    for half in (slice(0, middle), slice(middle, None)):
        cost, gain = np.zeros(1), np.zeros(1)
        for own_cost, own_gain in zip(problem.costs[half], problem.gains[half], strict=True):
            cost, gain = np.add.outer(cost, own_cost).ravel(), np.add.outer(gain, own_gain).ravel()
        order = np.argsort(cost, kind="stable")
        halves.append((cost[order], gain[order]))
    (cost, gain), (other_cost, other_gain) = halves
    place = np.searchsorted(other_cost, problem.budget - cost, side="right") - 1
    best = gain + np.where(place >= 0, np.maximum.accumulate(other_gain)[place], -np.inf)
    return float(best.max())


def gain_of(problem: Problem, ranks) -> float:
    return float(problem.sum(problem.gains, ranks))


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_the_best_of_all_assignments(seed):
    problem = some_problem(seed, experts=4, full_rank=16, share=(0.1, 0.3, 0.7)[seed % 3])
    every = (
        dict(zip(problem.experts, ranks, strict=True)) for ranks in itertools.product(problem.space.levels, repeat=4)
    )
    assert optimum(problem) == pytest.approx(max(gain_of(problem, ranks) for ranks in every if problem.fits(ranks, 9)))


def planted_share(sampler: str, seed: int) -> float:
    """The best trial of a whole search, as a share of the optimum."""
    problem = planted(seed)
    assert len(problem.space.levels) == 16
    study = run(study_of(problem, sampler=sampler, seed=seed, trials=PLANTED_TRIALS), problem)
    assert len(study.trials) == PLANTED_TRIALS
    assert all(problem.fits(entry.ranks, entry.active) for entry in study.trials)
    return max(gain_of(problem, entry.ranks) for entry in study.trials) / optimum(problem)


def test_the_planted_optimum_is_found():
    tpe, uninformed = ([planted_share(name, seed) for seed in range(PLANTED_SEEDS)] for name in ("tpe", "random"))
    table = "\n".join(
        ["share of the optimum in 150 trials", "seed     tpe  random"]
        + [f"{i:4}  {a:.4f}  {b:.4f}" for i, (a, b) in enumerate(zip(tpe, uninformed, strict=True))]
    )
    assert max(*tpe, *uninformed) <= 1 + 1e-12, table
    assert sum(share >= 0.99 for share in tpe) >= 9, table
    assert np.mean(tpe) > np.mean(uninformed), table


# --- the order of a search --------------------------------------------------------------------------------


def test_baselines_come_first_and_end_before_the_first_trial():
    problem = some_problem()
    study = study_of(problem, trials=3)
    started = [study.next() for _ in range(3)]
    assert [(entry.name, entry.kind, entry.state) for entry in started] == [
        (name, "baseline", "running") for name in ("full", "public", "uniform")
    ]
    for entry in started:
        assert study.next() is None
        assert not study.ready
        assert not study.ended
        score(study, problem, entry)
    first = study.next()
    assert (first.name, first.kind, first.number) == ("trial-0", "trial", 3)
    assert [entry.fits for entry in study.entries] == [False, True, True, True]


def test_no_more_trials_than_wanted_run_at_any_time():
    problem = some_problem()
    study = study_of(problem, trials=4)
    for _ in range(3):
        score(study, problem, study.next())
    trials = [study.next() for _ in range(4)]
    assert study.next() is None
    assert len({entry.mixture_id for entry in study.entries}) == 7
    for entry in reversed(trials):
        assert not study.ended
        score(study, problem, entry)
    assert study.ended
    assert [entry.name for entry in study.trials] == [f"trial-{i}" for i in range(4)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_assignment_is_evaluated_twice_and_all_fit(sampler):
    rank = 2 if sampler == "gp" else 8
    baselines = ("full", "public", "energy")
    actives = (2,) if sampler == "gp" else (1, 2, 3)
    problem = some_problem(experts=2, full_rank=rank, share=0.6, actives=actives, baselines=baselines)
    study = run(study_of(problem, sampler=sampler, trials=500), problem)
    every = {
        problem.identify("", dict(zip("ab", ranks, strict=True)), active).mixture_id
        for ranks in itertools.product(problem.space.levels, repeat=2)
        for active in actives
        if problem.fits(dict(zip("ab", ranks, strict=True)), active)
    }
    ids = [entry.mixture_id for entry in study.entries]
    assert len(set(ids)) == len(ids)
    assert set(ids) == every | {ids[0]}
    assert all(entry.fits == (entry.cost <= problem.budget) for entry in study.entries)
    assert all(entry.fits for entry in study.trials)
    assert study.reason == "every assignment within the budget has been tried"


def test_a_search_with_nothing_to_try_ends_with_its_baselines():
    problem = some_problem(share=0.0, baselines=("full", "public"))
    study = run(study_of(problem), problem)
    assert [entry.name for entry in study.entries] == ["full", "public"]
    assert study.reason
    assert study.best.name == "public"


class Warm(Problem):
    """A problem whose baselines are mostly between the points of the space."""

    UNEVEN = {
        "uniform": {"a": 6, "b": 6, "c": 6},
        "energy": {"a": 5, "b": 17, "c": 3},
        "optimal": {"a": 9, "b": 9, "c": 5},
        "optimal-expert": {"a": 9, "b": 3, "c": 9},
        "optimal-layer": {"a": 3, "b": 9, "c": 3},
    }

    def mixture(self, baseline):
        ranks = self.UNEVEN.get(baseline)
        return self.identify(baseline, ranks, 9) if ranks else super().mixture(baseline)

    def sum(self, table, ranks):
        sizes = [0, *(2**k for k in range(table.shape[1] - 2)), self.full_rank]
        numbers = [{DROP: 0, FULL: self.full_rank}.get(ranks[name], ranks[name]) for name in self.experts]
        return sum(float(np.interp(number, sizes, row)) for number, row in zip(numbers, table, strict=True))


def warm_problem(*more: str) -> Warm:
    base = some_problem(experts=3, full_rank=32, share=0.5)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return Warm(**fields | {"baselines": ("full", "public", "uniform", "energy", "optimal", *more)})


@pytest.mark.parametrize("own", [(), ("optimal-expert",), ("optimal-layer",)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_first_trials_are_the_points_nearest_to_the_baselines(sampler, own):
    problem = warm_problem(*own)
    study = run(study_of(problem, sampler=sampler, trials=6), problem)
    wanted = {name: problem.space.nearest(problem.UNEVEN[name], 9) for name in (*own, "optimal", "uniform", "energy")}
    assert len({tuple(point.items()) for point in wanted.values()}) == len(wanted)
    warm = study.trials[: len(wanted)]
    assert [(entry.warm, entry.point) for entry in warm] == list(wanted.items())
    assert all(entry.fits and entry.name == f"trial-{i}" for i, entry in enumerate(warm))
    assert len(study.trials) == 6
    others = [entry for entry in study.entries if entry not in warm]
    assert all(entry.warm is None and entry.point not in wanted.values() for entry in others)


def test_a_baseline_in_the_space_is_no_trial_again():
    problem = warm_problem("optimal-expert")
    near = problem.space.assignment(problem.space.nearest(problem.UNEVEN["optimal-expert"], 9))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Warm.UNEVEN, "optimal-expert", near)
        study = run(study_of(problem, trials=4), problem)
    told = next(entry for entry in study.entries if entry.name == "optimal-expert")
    assert problem.space.assignment(told.point)[0] == near
    assert [told.value] in [trial.values for trial in study._study.trials]
    assert [entry.warm for entry in study.trials] == ["optimal", "uniform", "energy", None]


@pytest.mark.parametrize("writes", [7, 9, 11, 13, 16, 20, 27])
def test_a_search_that_was_begun_without_a_baseline_goes_on_with_it(writes):
    """As one of an earlier version: what it tried stays; the new baseline and its point come next."""
    old, ledger = warm_problem(), MemoryLedger()
    run(study_of(old, trials=10, ledger=ledger), old, varied, rungs=3)
    ledger = MemoryLedger(ledger.writes[:writes])
    ended = [entry for entry in ledger.read() if entry.state != "running"]
    new = warm_problem("optimal-expert")
    study = run(study_of(new, trials=10, ledger=ledger), new, varied, rungs=3)
    after = {row["number"]: row for row in rows(study.entries)}
    assert [after[entry.number] for entry in ended] == rows(ended)
    assert [entry.name for entry in study.entries if entry.kind == "baseline"].count("optimal-expert") == 1
    assert len(study.trials) == 10
    assert [entry.warm for entry in study.trials].count("optimal-expert") == 1


@given(own=st.sampled_from([(), ("optimal-expert",)]), cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
@settings(max_examples=10)
def test_warm_starts_are_the_same_after_a_kill(own, cuts):
    problem, ledger = warm_problem(*own), MemoryLedger()
    expected = run(study_of(problem, trials=8, ledger=ledger), problem, varied, rungs=3)
    for cut in cuts:
        ledger = MemoryLedger(ledger.writes[: round(cut * len(ledger.writes))])
        study = run(study_of(problem, trials=8, ledger=ledger), problem, varied, rungs=3)
        assert rows(study.entries) == rows(ledger.read()) == rows(expected.entries)


def test_a_baseline_in_the_space_teaches_the_sampler_and_one_over_budget_does_not():
    problem = some_problem()
    study = run(study_of(problem, trials=1), problem)
    by_name = {entry.name: entry for entry in study.entries}
    assert by_name["full"].point is None
    assert set(by_name["public"].point.values()) == {-1}
    assert problem.space.assignment(by_name["uniform"].point)[0] == by_name["uniform"].ranks
    assert len(study._study.trials) == 3
    assert [trial.values for trial in study._study.trials[:2]] == [[by_name[n].value] for n in ("public", "uniform")]


# --- failures ---------------------------------------------------------------------------------------------


def test_a_failed_baseline_ends_the_search():
    problem = some_problem()
    study = study_of(problem)
    score(study, problem, study.next())
    entry = study.next()
    with pytest.raises(FlexmoreError, match="baseline public: no data; what was finished is kept"):
        study.finish(entry, "failed", "no data")
    assert study.entries[1].state == "running"  # as in the ledger: the same command tries it again


class Endings:
    """Failed or complete, trial after trial."""

    def __init__(self, text: str) -> None:
        self._left = iter(text)

    def __call__(self, entry) -> str:
        return "complete" if entry.kind == "baseline" or next(self._left) == "." else "failed"


@pytest.mark.parametrize(
    ("endings", "trials"),
    [("x" * 30, 10), ("x" * 9 + "." + "x" * 30, 20), ("." + "x" * 30, 11), ("xxxxxxxxx." * 3, 30)],
)
def test_ten_failures_in_a_row_end_a_search(endings, trials):
    problem = some_problem()
    study = run(study_of(problem, trials=30), problem, Endings(endings))
    assert len(study.trials) == trials
    if trials < 30:
        assert study.reason == "10 trials in a row failed, the last with: it broke"
        assert study.next() is None
    else:
        assert study.reason is None


def test_failures_count_across_runs():
    problem, ledger = some_problem(), MemoryLedger()
    run(study_of(problem, trials=6, ledger=ledger), problem, Endings("x" * 6))
    study = run(study_of(problem, trials=30, ledger=ledger), problem, Endings("x" * 30))
    assert len(study.trials) == 10
    assert study.reason


def test_a_failed_trial_does_not_rank():
    problem = some_problem()
    study = run(study_of(problem, trials=30), problem, varied, rungs=3)
    assert {entry.state for entry in study.trials} == {"complete", "stopped", "failed"}
    expected = sorted(
        (entry for entry in study.entries if entry.state == "complete" and entry.fits),
        key=lambda entry: entry.value,
        reverse=True,
    )
    assert [entry.value for entry in study.ranking] == [entry.value for entry in expected]
    assert study.best is study.ranking[0]
    assert "full" not in [entry.name for entry in study.ranking]


def test_of_equal_scores_the_cheapest_is_best():
    problem = some_problem()
    flat = dataclasses.replace(problem, gains=np.zeros_like(problem.gains), actives=(2,))
    study = run(study_of(flat, trials=10), flat)
    fitting = [entry for entry in study.entries if entry.fits and entry.active == 2]
    assert study.ranking[0].cost <= min(entry.cost for entry in fitting)
    for one, other in itertools.pairwise(study.ranking):
        assert (-one.value, one.cost, one.number) < (-other.value, other.cost, other.number)


# --- going on ---------------------------------------------------------------------------------------------

RESUMED = {"tpe": 24, "random": 20, "nsga2": 40, "gp": 9, "grid": 20}


@functools.cache
def undisturbed(sampler: str, front: bool, trials: int | None = None) -> tuple[MemoryLedger, Study]:
    ledger = MemoryLedger()
    study = study_of(PROBLEM, sampler=sampler, trials=trials or RESUMED[sampler], front=front, ledger=ledger)
    return ledger, run(study, PROBLEM, varied, rungs=3)


def check_going_on(sampler: str, front: bool, cuts: Sequence[float]) -> None:
    """A search that was killed after some of its writes, again and again, ends as if it had not been."""
    whole, expected = undisturbed(sampler, front)
    ledger = whole
    for cut in cuts:
        ledger = MemoryLedger(ledger.writes[: round(cut * len(ledger.writes))])
        before = {entry.number for entry in ledger.read() if entry.state != "running"}
        journal = MemoryJournal()
        study = study_of(PROBLEM, sampler=sampler, trials=RESUMED[sampler], front=front, ledger=ledger, journal=journal)
        asked = len(ledger.writes)
        run(study, PROBLEM, varied, rungs=3)
        repeated = {json.loads(text)["number"] for text in ledger.writes[asked:]} & before
        assert not repeated
        assert rows(study.entries) == rows(expected.entries)
        assert rows(ledger.read()) == rows(expected.entries)
        assert [entry.name for entry in study.ranking] == [entry.name for entry in expected.ranking]
        assert study.reason == expected.reason
        assert sorted(t.user_attrs["name"] for t in journal.trials) == sorted(e.name for e in study.entries)


@given(
    sampler=st.sampled_from(["tpe", "random", "grid"]),
    front=st.booleans(),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@settings(max_examples=25)
def test_a_killed_search_goes_on_as_it_would_have(sampler, front, cuts):
    check_going_on(sampler, front, cuts)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("cut", [0.05, 0.37, 0.5, 0.735, 0.8, 0.93, 0.995])
def test_a_killed_evolution_goes_on_as_it_would_have(front, cut):
    writes = len(undisturbed("nsga2", front)[0].writes)
    for shift in (0, 1 / writes):
        check_going_on("nsga2", front, [cut + shift])


@pytest.mark.parametrize("cut", [0.76, 0.93])
def test_a_killed_search_with_a_gaussian_process_goes_on_as_it_would_have(cut):
    writes = len(undisturbed("gp", False)[0].writes)
    check_going_on("gp", False, [cut])
    check_going_on("gp", False, [cut + 1 / writes])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_trials_later_are_the_same_as_more_at_once(sampler):
    ledger = MemoryLedger()
    for trials in (RESUMED[sampler] // 2, RESUMED[sampler]):
        study = study_of(PROBLEM, sampler=sampler, trials=trials, ledger=ledger)
        run(study, PROBLEM, varied, rungs=3)
    assert rows(study.entries) == rows(undisturbed(sampler, False)[1].entries)


def test_fewer_trials_later_keep_what_is_there():
    ledger = MemoryLedger(undisturbed("random", False)[0].writes)
    study = run(study_of(PROBLEM, sampler="random", trials=2, ledger=ledger), PROBLEM)
    assert rows(study.entries) == rows(undisturbed("random", False)[1].entries)


@given(
    sampler=st.sampled_from(["tpe", "nsga2", "random", "grid"]),
    slots=st.integers(2, 4),
    seed=st.integers(0, 2**16),
    kills=st.lists(st.integers(1, 25), max_size=3),
)
@settings(max_examples=25)
def test_trials_side_by_side_and_kills_lose_and_repeat_nothing(sampler, slots, seed, kills):
    chance, ledger, wanted = random.Random(seed), MemoryLedger(), 15
    for events in [*kills, None]:
        journal = MemoryJournal()
        study = study_of(PROBLEM, sampler=sampler, trials=wanted, ledger=ledger, journal=journal)
        running = []
        for _ in itertools.count() if events is None else range(events):
            if study.ended:
                break
            can_end = bool(running)
            if len(running) < slots and (not can_end or chance.random() < 0.6):
                entry = study.next()
                if entry is not None:
                    if entry.kind == "trial":
                        assert all(e.state == "complete" for e in study.entries if e.kind == "baseline")
                    assert not entry.rungs
                    running.append(entry)
                    continue
            assert running
            score(study, PROBLEM, running.pop(chance.randrange(len(running))), varied, rungs=3)
    assert study.ended
    entries = ledger.read()
    assert rows(entries) == rows(study.entries)
    assert [entry.number for entry in entries] == list(range(3 + wanted))
    assert sorted(entry.name for entry in study.trials) == sorted(f"trial-{i}" for i in range(wanted))
    assert len({entry.mixture_id for entry in entries}) == len(entries)
    assert all(entry.state != "running" for entry in entries)
    assert all(entry.state == varied(entry) for entry in entries)
    assert all(entry.fits for entry in study.trials)
    assert len(journal.trials) == len(entries)


@pytest.mark.parametrize("lost", [1, 5, 12])
def test_a_lost_entry_is_made_up_for_and_overwrites_no_other(lost):
    """As after a damaged file of the ledger was deleted."""
    whole, _ = undisturbed("tpe", False)
    kept = [text for text in whole.writes if json.loads(text)["number"] != lost]
    ledger = MemoryLedger(kept)
    before = {entry.number: rows([entry]) for entry in ledger.read()}
    study = run(study_of(PROBLEM, trials=RESUMED["tpe"], ledger=ledger), PROBLEM, varied, rungs=3)
    after = {entry.number: rows([entry]) for entry in ledger.read()}
    assert {number: after[number] for number in before} == before
    assert len(after) == len(study.entries) == len(before) + 1
    assert len({entry.name for entry in study.entries}) == len(study.entries)
    assert len({entry.mixture_id for entry in study.entries}) == len(study.entries)
    assert set(study.mixtures) == set(after)


class Refined(Problem):
    """A problem whose mixtures have ranks per projection, as a finer granularity makes them of a point."""

    def identify(self, name, ranks, active):
        assert all(isinstance(rank, int | str) for rank in ranks.values()), "a point's ranks are needed"
        made = super().identify(name, ranks, active)
        finer = {
            n: r if isinstance(r, str) else dict.fromkeys(("gate_proj", "up_proj", "down_proj"), r)
            for n, r in ranks.items()
        }
        return dataclasses.replace(made, spec=dataclasses.replace(made.spec, ranks=finer))

    def recalled(self, name, ranks, active):
        return self.identify(name, {n: r["up_proj"] if isinstance(r, Mapping) else r for n, r in ranks.items()}, active)

    def sum(self, table, ranks):
        return super().sum(table, {n: r["up_proj"] if isinstance(r, Mapping) else r for n, r in ranks.items()})


def test_finer_ranks_than_the_space_has_are_taken_over():
    base = some_problem()
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    problem, ledger = Refined(**fields), MemoryLedger()
    run(study_of(problem, trials=5, ledger=ledger), problem)
    assert any(isinstance(rank, Mapping) for entry in ledger.read() for rank in entry.ranks.values())
    again = study_of(problem, trials=8, ledger=MemoryLedger(ledger.writes))
    run(again, problem)
    assert rows(again.entries) == rows(run(study_of(problem, trials=8), problem).entries)


# --- the front --------------------------------------------------------------------------------------------


def test_a_search_for_the_front_learns_from_cost_too():
    journal = MemoryJournal()
    study = run(study_of(PROBLEM, trials=20, front=True, journal=journal), PROBLEM, varied, rungs=3)
    assert all(len(t.values) == 2 for t in journal.trials if t.state == TrialState.COMPLETE)
    found = {t.user_attrs["name"]: t for t in journal.trials}
    for entry in study.entries:
        if entry.state == "complete":
            assert found[entry.name].values == [entry.value, entry.cost]
    assert [direction.name for direction in study._study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_merit_is_the_score_or_what_it_is_above_the_baselines_at_its_cost():
    study = run(study_of(PROBLEM, trials=3), PROBLEM, rungs=3)
    assert [study.merit(study.trials[0], rung) for rung in range(3)] == study.trials[0].rungs
    study = run(study_of(PROBLEM, trials=6, front=True), PROBLEM, rungs=3)
    for entry in study.trials:
        for rung in range(3):
            below = [e.rungs[rung] for e in study.entries[:3] if e.cost <= entry.cost]
            assert study.merit(entry, rung) == entry.rungs[rung] - max(below)
