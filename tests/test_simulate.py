"""The simulator: exact small cases, bounds, the real pool, known models, and its commands."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import time
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmore_ray import results
from flexmore_ray.__main__ import main
from flexmore_ray.errors import UsageError
from flexmore_ray.grid import Grid, Options, _Run
from flexmore_ray.placement import Needs
from flexmore_ray.plan import Plan
from flexmore_ray.pool import Pool, Queue
from flexmore_ray.results import commit_cell
from flexmore_ray.scores import TaskScore
from flexmore_ray.simulate import Simulated, Work, capacity, new_unit, simulate
from flexmore_ray.simulate.calibrate import Calibration, Measured, Model, Size, Timing, calibrate, fit, held_out_errors
from flexmore_ray.simulate.forecast import assumptions, duration, forecasts, grid_units, size_of, table
from search.ledger import Entry, Ledger
from search.replay import Recorded, read_search, replay
from tests.actors import Sleeper


def unit(mixture, seconds, tag, **more):
    return new_unit(Work(mixture=mixture, seconds=seconds, **more), tag)


def grid_of(groups):
    """Units with the seconds of each group, tagged by group and place."""
    return [unit(g, seconds, (g, i)) for g, group in enumerate(groups) for i, seconds in enumerate(group)]


GROUPS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=6)
NO_TIME = Timing()


# ------------------------------------------------------------------------------------- exact


def test_one_worker_takes_the_sum_of_everything():
    timing = Timing(start=100, switch=7, unit=0.5, first=0.25, commit=3)
    units = [unit(m, 10, (m, t), documents=4, content=t) for m in range(3) for t in range(5)]
    found = simulate(units, 1, timing)
    assert found.makespan == pytest.approx(100 + 15 * (10 + 0.5) + 2 * 7 + 5 * 4 * 0.25 + 3)
    assert found.held == found.makespan
    assert found.scoring == pytest.approx(found.makespan - 103)


def test_a_start_is_paid_once_where_workers_start_together_and_nobody_starts_in_vain():
    found = simulate(grid_of([[5], [5]]), 8, Timing(start=100))
    assert (found.workers, found.makespan, found.limit) == (2, 105, "start")


def test_a_second_stage_waits_for_the_commits_of_the_first_and_not_for_other_cells():
    units = [unit("pair", 10, "pair", early=True), unit("other", 16, "other"), unit("long", 50, "long")]
    found = simulate(units, 3, Timing(commit=4), [unit("best", 20, "best")])
    spans = {span.tag: (span.begin, span.end) for span in found.spans}
    # a commit that is over is noticed when the next result comes, as in the grid: at 16
    assert spans == {"pair": (0, 10), "other": (0, 16), "long": (0, 50), "best": (16, 36)}
    assert found.makespan == 54
    assert found.bounds["longest unit"] == 50


def test_workers_with_nothing_to_do_for_a_minute_go_and_start_again_for_the_second_stage():
    units = [unit("a", 300, "a", early=True), unit("b", 10, "b", early=True)]
    later = [unit("c", 10, "c"), unit("d", 10, "d")]
    found = simulate(units, 2, Timing(start=30), later)
    assert found.makespan == 330 + 20  # both by the one that is there: another one's start takes longer
    assert found.held == pytest.approx(350 + (30 + 10 + 60) + 20, abs=3)
    short = simulate([unit("a", 60, "a", early=True), units[1]], 2, Timing(start=30), later)
    assert short.makespan == 30 + 60 + 10  # a short pause is waited for


def test_every_worker_waits_for_an_experts_decomposition_and_experts_work_side_by_side():
    units = [unit(f"{e}{i}", 10, (e, i), experts=(e,)) for e in ("math", "code") for i in range(2)]
    assert simulate(units, 4, Timing(decompose=100)).makespan == 110
    assert simulate(units, 1, Timing(decompose=100)).makespan == 100 + 20 + 100 + 20
    assert simulate(units, 4, Timing(decompose=100)).limit == "decomposition"


def test_a_sharded_cell_is_committed_once_when_all_its_parts_are_done():
    units = [unit("m", seconds, "cell") for seconds in (5, 9)]
    assert simulate(units, 2, Timing(commit=1)).makespan == 10


def test_one_driver_and_sixteen_threads_bound_how_fast_cells_are_committed():
    units = grid_of([[0.001] * 40] * 50)
    slow_commits = simulate(units, 500, Timing(commit=1.0))
    assert slow_commits.makespan == pytest.approx(2000 / 16, rel=0.01)
    assert slow_commits.limit == "commits"
    slow_driver = simulate(units, 500, Timing(driver=0.1))
    assert slow_driver.makespan == pytest.approx(2000 * 0.1, rel=0.01)


# ------------------------------------------------------------------------------------- properties


@given(groups=GROUPS, workers=st.integers(1, 8), first=st.integers(0, 5), stages=st.booleans())
def test_every_unit_once_no_worker_at_two_things_and_the_bounds_of_list_scheduling(groups, workers, first, stages):
    units, later = grid_of(groups), []
    if stages:
        units = [unit(u.group, u.arguments[0].seconds, u.tag, early=True) for u in units]
        later = [unit("later", u.arguments[0].seconds, ("later", *u.tag)) for u in units[:first]]
    found = simulate(units, workers, NO_TIME, later)
    assert sorted(map(str, (span.tag for span in found.spans))) == sorted(str(u.tag) for u in (*units, *later))
    for worker in range(found.workers):
        own = sorted((span.begin, span.end) for span in found.spans if span.worker == worker)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(own))
    seconds = [[u.arguments[0].seconds for u in stage] for stage in (units, later)]
    total, longest = sum(map(sum, seconds)), [max(stage, default=0) for stage in seconds]
    assert found.scoring == total
    assert found.makespan >= max(total / workers, sum(longest) if stages else longest[0])
    # a unit begins while all others are busy, or behind one that a worker had taken before it: two units at most
    assert found.makespan <= sum(sum(stage) / workers + 2 * long for stage, long in zip(seconds, longest, strict=True))
    more = simulate(units, workers + 1, NO_TIME, later)
    assert more.makespan <= found.makespan + 2 * sum(longest)


class Plain(Simulated):
    """Goes through `Pool.run` after every round."""

    _collect = Simulated._round


@settings(max_examples=50)
@given(groups=GROUPS, workers=st.integers(1, 8), driver=st.sampled_from([0.0, 0.3]), start=st.sampled_from([0, 2.5]))
def test_skipping_members_whose_hands_are_full_changes_nothing(groups, workers, driver, start):
    spans = []
    for kind in (Simulated, Plain):
        pool = kind(workers, Timing(driver=driver, start=start, switch=1))
        list(pool.run(Queue(grid_of(groups))))
        spans.append(pool.clock.spans)
    assert spans[0] == spans[1]


def test_a_thousand_workers_are_simulated_in_seconds():
    chance = random.Random(0)
    units = [unit(m, chance.uniform(20, 200), (m, t)) for m in range(150) for t in range(120)]
    begin = time.process_time()
    found = simulate(units, 1000, Timing(start=60, driver=0.004, commit=0.01))
    assert time.process_time() - begin < 30
    assert found.busy > 0.9
    assert found.makespan == pytest.approx(60 + found.scoring / 1000, rel=0.1)


# ------------------------------------------------------------------------------------- the real pool


CASES = {
    "help with the largest": [[0.3] * 9, [0.5] * 4, [0.2] * 6],
    "one mixture": [[0.2] * 30],
    "one long unit": [[0.2, 0.2, 1.5], [0.4] * 8],
    "many mixtures": [[0.05 * (1 + (3 * g + t) % 7) for t in range(4)] for g in range(12)],
}


class Threads:
    """What the pool asks of Ray, done by threads: a reference is a future, an actor a thread of its own."""

    @staticmethod
    def wait(references, num_returns, timeout):
        if timeout:
            futures.wait(references, timeout, futures.FIRST_COMPLETED)
        ready = [reference for reference in references if reference.done()][:num_returns]
        return ready, [reference for reference in references if reference not in ready]

    @staticmethod
    def get(reference):
        return reference.result()

    @staticmethod
    def kill(actor):
        actor.thread.shutdown()


class Sleeping:
    """An actor in a thread: sleeps as long as its work says."""

    def __init__(self, start, switch):
        self.thread = futures.ThreadPoolExecutor(1)
        self.seconds, self.switch, self.held = start, switch, None
        self.start, self.run = (
            SimpleNamespace(remote=functools.partial(self.thread.submit, do)) for do in (self._start, self._run)
        )

    def _start(self):
        time.sleep(self.seconds)
        return "node"

    def _run(self, work, tag):
        time.sleep(work.seconds + self.switch * (self.held not in (None, work.mixture)))
        self.held = work.mixture
        return id(self)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_real_pool_takes_as_long_as_the_simulated_one(case, workers, monkeypatch):
    """The policy that is simulated is the one that runs: the pool's own code, with actors that sleep."""
    monkeypatch.setattr("flexmore_ray.pool.ray", Threads)
    monkeypatch.setattr("flexmore_ray.pool.nodes", list)
    monkeypatch.setattr("flexmore_ray.pool.leaving", set)
    units = grid_of(CASES[case])
    pool = Pool(lambda: Sleeping(0.3, 0.1), Needs(), workers)
    begin = time.monotonic()
    done = {u.tag: worker for u, worker in pool.run(Queue(units))}
    taken = time.monotonic() - begin
    pool.close()
    found = simulate(units, workers, Timing(start=0.3, switch=0.1))
    assert done.keys() == {span.tag for span in found.spans}
    assert len(set(done.values())) == found.workers
    assert taken == pytest.approx(found.makespan, rel=0.05, abs=0.15)


def test_on_ray_itself_too(local_ray):
    actor = ray.remote(num_cpus=1)(Sleeper)
    workers, units = 3, grid_of(CASES["help with the largest"])
    pool = Pool(lambda: actor.remote(0.1), Needs(num_cpus=1), workers)
    warm = [unit(None, 2.0, i) for i in range(workers)]
    assert len(list(pool.run(Queue(warm)))) == workers  # all of them have started, and hold nothing
    for member in pool._members:
        member.group = None
    begin = time.monotonic()
    assert len({u.tag for u, _ in pool.run(Queue(units))}) == len(units)
    taken = time.monotonic() - begin
    pool.close()
    assert taken == pytest.approx(simulate(units, workers, Timing(switch=0.1)).makespan, rel=0.08, abs=0.25)


# ------------------------------------------------------------------------------------- the model

TRUE = Model(tasks={"a": (0.2, 0.01), "b": (0.05, 0.03), "c": (0.5, 0.002)}, weights=(0.3, 0.04, 0.1, 2e-7))
SIZES = [Size(experts=e, active=k, parameters=p) for e, k in ((2, 2), (7, 2), (7, 4), (7, 7)) for p in (9e5, 2e6, 4e6)]


def measured(task, documents, size, model=TRUE, noise=1.0, at=0.0):
    seconds = model.seconds(task, documents, size) * noise
    return Measured(task=task, documents=documents, seconds=seconds, size=size, committed=at, commit=0.0)


def test_a_model_is_found_again_from_its_own_cells():
    cells = [measured(task, n, size) for task in TRUE.tasks for n in (10, 80) for size in SIZES]
    found = fit(cells)
    for task in TRUE.tasks:
        for n in (5, 40, 300):
            for size in (*SIZES, Size(experts=4, active=3, parameters=3e6)):
                assert found.seconds(task, n, size) == pytest.approx(TRUE.seconds(task, n, size), rel=1e-3)
    assert max(map(abs, held_out_errors(cells).values())) < 1e-3


def test_noise_averages_out_and_shows_in_the_error():
    chance = random.Random(1)
    cells = [
        measured(task, n, size, noise=chance.lognormvariate(0, 0.2), at=chance.random())
        for task in TRUE.tasks
        for n in (10, 80)
        for size in SIZES * 3
    ]
    found = fit(cells)
    total = sum(cell.seconds for cell in cells)
    predicted = sum(found.seconds(cell.task, cell.documents, cell.size) for cell in cells)
    assert predicted == pytest.approx(total, rel=0.03)
    assert 0.001 < max(map(abs, held_out_errors(cells).values())) < 0.2


def test_one_number_of_documents_is_taken_in_proportion():
    found = fit([measured("b", 50, size) for size in SIZES])
    size = SIZES[3]
    assert found.tasks["b"][0] == 0
    assert found.seconds("b", 100, size) == pytest.approx(2 * found.seconds("b", 50, size))


# ------------------------------------------------------------------------------- results folders


@pytest.fixture(scope="module")
def nano_grid(tmp_path_factory):
    """A grid of the embedded mixture with a second stage, not run."""
    entries = ({"pairs": [4, 32]}, {"uniform": [8, "full", "best"], "active": [2, "all"]})
    plan = Plan(name="p", source=("zoo://nano",), tasks=("nano_order", "nano_strings"), limit=30, mixtures=entries)
    return Grid(plan, tmp_path_factory.mktemp("none"), Options(shard_documents=12))


def committed(folder, grid, *, workers=2, start=20.0, between=0.01):
    """Write a folder as a run of a grid with the times of `TRUE` would have, by the clock of an hour ago."""
    began = time.time() - 3600
    units, ends = [], {}
    for name, cell in grid.cells.items():
        task, mixture = grid.tasks.tasks[cell.task], cell.mixture
        seconds = TRUE.seconds("a" if cell.task == "nano_order" else "b", len(task.documents), size_of(mixture))
        units.append(unit(mixture.mixture_id, seconds, name))
    for span in simulate(units, workers, Timing(start=start, unit=between)).spans:
        ends[span.tag] = began + span.end - between
    folder.mkdir(exist_ok=True)
    for item in units:
        cell = grid.cells[item.tag]
        task = grid.tasks.tasks[cell.task]
        score = TaskScore(
            task=cell.task,
            group="g",
            split="validation",
            metric="acc",
            filter="none",
            value=0.5,
            stderr=None,
            metrics={},
            num_fewshot=0,
            version="0",
            seconds=item.arguments[0].seconds,
            samples=[None] * len(task.documents),
        )
        write(folder, cell, score)
        for kind, delay in (("samples", -0.002), ("cells", 0.0)):
            os.utime(folder / kind / f"{item.tag}.parquet", (ends[item.tag] + delay,) * 2)
    (folder / ".lock").touch()
    os.utime(folder / ".lock", (began, began))
    return max(ends.values()) - began


def write(folder, cell, score):
    """Commit a cell without samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_sample_table", lambda key, samples: results.SAMPLE_SCHEMA.empty_table())
        commit_cell(
            folder,
            cell.key,
            score,
            mixture=cell.mixture.spec.to_dict(),
            active=cell.mixture.active,
            parameters=cell.mixture.parameters,
        )


def test_a_results_folder_tells_start_workers_and_what_lies_between_cells(tmp_path, nano_grid):
    taken = committed(tmp_path, nano_grid, workers=2)
    found = calibrate(tmp_path)
    assert found.workers == 2
    assert found.timing.start == pytest.approx(20, abs=0.02)
    assert found.timing.unit == pytest.approx(0.01, abs=0.005)
    assert found.timing.commit == pytest.approx(0.004, abs=1e-3)
    assert max(map(abs, found.errors.values())) < 0.02
    units = [
        unit(c.mixture.mixture_id, found.seconds(c.task, 30, size_of(c.mixture)), name)
        for name, c in nano_grid.cells.items()
    ]
    assert simulate(units, 2, found.timing).makespan == pytest.approx(taken, rel=0.02)
    assert calibrate(tmp_path, start=7).timing.start == 7


def test_what_a_folder_does_not_tell_has_to_be_stated(tmp_path, nano_grid):
    with pytest.raises(UsageError, match="holds no finished cell; run a small grid first"):
        calibrate(tmp_path)
    committed(tmp_path, nano_grid)
    (tmp_path / ".lock").touch()  # a later run that had nothing to do
    with pytest.raises(UsageError, match=r"the last run in .* committed nothing; give --start-seconds"):
        calibrate(tmp_path)
    assert calibrate(tmp_path, start=9).workers is None
    with pytest.raises(UsageError, match="--start-seconds: seconds >= 0, got -1"):
        calibrate(tmp_path, start=-1)


# ------------------------------------------------------------------------------------- a plan


def known(sizes=(30, 30), **more):
    """A calibration for the tasks of `nano_grid`."""
    tasks = {"nano_order": (0.2, 0.01), "nano_strings": (0.05, 0.03)}
    return Calibration(
        model=Model(tasks=tasks, weights=(1.0, 0.0, 0.0, 0.0)),
        timing=Timing(),
        workers=2,
        cells=99,
        errors={"nano_order": 0.02, "nano_strings": -0.05},
        sizes=dict.fromkeys(tasks, sizes),
        largest=Size(experts=7, active=7, parameters=1e9),
        **more,
    )


def test_a_grids_units_are_those_that_it_runs(nano_grid):
    run = object.__new__(_Run)
    run._grid = nano_grid
    real = list(run._units(nano_grid.missing))
    units, later = grid_units(nano_grid, known())
    assert [(u.group, u.tag, u.arguments[0].documents) for u in units] == [
        (u.group, u.tag, len(u.arguments[-1])) for u in real
    ]
    assert len(later) == 2 * 2 * 3  # best, at 2 numbers of active experts, on 2 tasks in 3 parts each
    early = {u.group for u in units if u.arguments[0].early}
    assert early == {mixture.mixture_id for mixture in nano_grid.pairs}
    assert {u.arguments[0].seconds for u in later} == {0.2 + 0.1, 0.05 + 0.3}
    cut = {u.arguments[0].experts for u in units}
    assert () in cut  # the full mixture
    assert ("math",) in cut


def test_what_was_not_measured_is_refused_or_said(nano_grid):
    calibration = known()
    del calibration.model.tasks["nano_strings"]
    with pytest.raises(UsageError, match=r"no cell of task nano_strings was measured .* state --document-seconds"):
        grid_units(nano_grid, calibration)
    stated = known(document_seconds=0.5)
    del stated.model.tasks["nano_strings"]
    units, _ = grid_units(nano_grid, stated)
    assert {round(u.arguments[0].seconds, 9) for u in units} == {0.3, 5.0}
    assert "not measured, 0.5 s per document as stated: nano_strings" in assumptions(nano_grid, stated)
    notes = " | ".join(assumptions(nano_grid, known(sizes=(9, 9))))
    assert "in proportion: nano_order, nano_strings" in notes
    assert "ranks not known before the pairs are done, taken as average ones: best-a2, best-a7" in notes
    small = " | ".join(assumptions(nano_grid, _smaller(known())))
    assert "larger than any mixture that was measured: uniform-r8-a7" in small


def _smaller(calibration):
    return dataclasses.replace(calibration, largest=Size(experts=7, active=2, parameters=1e9))


def test_a_table_of_forecasts():
    found = forecasts(lambda n: simulate(grid_of([[3600.0] * 6]), n, NO_TIME), [1, 4], price=2.5)
    assert [forecast.cost for forecast in found] == [15.0, pytest.approx(2.5 * found[1].outcome.held / 3600)]
    lines = table(found).splitlines()
    assert lines[0].split() == ["workers", "makespan", "busy", "worker", "hours", "cost", "limited", "by"]
    assert lines[1].split() == ["1", "6.0", "h", "100", "%", "6.00", "15.00", "work"]
    assert [duration(s) for s in (3.21, 119, 121, 7300, 200000)] == ["3.2 s", "119.0 s", "2.0 min", "2.0 h", "2.3 days"]
    with pytest.raises(UsageError, match="--workers: at least 1, got 0"):
        forecasts(lambda n: simulate([], n, NO_TIME), [0])
    with pytest.raises(UsageError, match="--price: at least 0"):
        forecasts(lambda n: simulate([], n, NO_TIME), [1], price=-1)


def test_the_command_says_time_cost_and_limit(tmp_path, nano_grid, capsys):
    committed(tmp_path / "results", nano_grid)
    plan = tmp_path / "plan.yaml"
    plan.write_text("source: zoo://nano\ntasks: [nano_order, nano_strings]\nlimit: 60\nmixtures: [{uniform: [2, 4]}]\n")
    command = ["simulate", str(plan), "--calibrate", str(tmp_path / "results"), "--json"]
    assert main([*command, "--workers", "1,50", "--price", "3"]) == 0
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    one, many = said["forecasts"]
    assert said["cells"] == said["units"] == 4
    assert one["limit"] == many["limit"] == "start"
    assert one["seconds"] > many["seconds"] > 20
    assert one["cost"] == pytest.approx(3 * one["worker_hours"])
    assert "in proportion: nano_order, nano_strings" in out
    assert main([*command, "--workers", "two"]) == 2
    assert main(["simulate", "--workers", "2"]) == 2
    assert main(["simulate", str(plan)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--workers: numbers with commas between them" in errors[0]
    assert "give a plan file, --preset or --search" in errors[1]
    assert "--calibrate: the results folder of a run is needed" in errors[2]


# ------------------------------------------------------------------------------------- a search


def entry(number, kind, seconds, started, **more):
    return Entry(
        number=number,
        name=f"{kind}-{number}",
        kind=kind,
        ranks={},
        active=2,
        mixture_id=str(number),
        parameters=1,
        cost=1,
        fits=True,
        state="complete",
        seconds=seconds,
        started=started,
        finished=started + seconds + 0.25,
        **more,
    )


def test_a_search_is_replayed_stage_by_stage():
    recorded = Recorded(start=10, stages=[[4, 2], [3, 3, 3, 9], []])
    assert replay(recorded, 1).makespan == 10 + 24
    assert replay(recorded, 2).makespan == 10 + 4 + 12
    assert replay(recorded, 99).makespan == 10 + 4 + 9
    assert replay(recorded, 99).bounds == {"work": pytest.approx(24 / 99), "start": 10, "longest unit": 13}
    with pytest.raises(UsageError, match="--workers: at least 1"):
        replay(recorded, 0)


def test_a_search_folder_tells_its_times(tmp_path):
    ledger, began = Ledger(tmp_path), time.time() - 500
    for item in (
        entry(0, "baseline", 4.0, began + 20),
        entry(1, "trial", 2.0, began + 30),
        entry(2, "trial", 3.0, began + 35),
    ):
        ledger.write(item)
    (tmp_path / ".lock").touch()
    os.utime(tmp_path / ".lock", (began, began))
    found = read_search(tmp_path)
    assert found.start == pytest.approx(20.25)
    assert found.stages == [[4.25], [2.25, 3.25], []]
    assert "another folder" in found.assumed[-1]
    assert read_search(tmp_path, trials=5).stages[1] == [2.25, 3.25, 2.25, 3.25, 2.25]
    (tmp_path / ".lock").touch()
    with pytest.raises(UsageError, match="does not tell its start; give --start-seconds"):
        read_search(tmp_path)
    assert read_search(tmp_path, start=3).start == 3
    assert main(["simulate", "--search", str(tmp_path), "--start-seconds", "3", "--workers", "1,2"]) == 0
    with pytest.raises(UsageError, match="holds no trial that ended"):
        read_search(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------- the page


def test_the_capacity_page_is_what_the_command_writes():
    page = Path(__file__).parents[1] / "cluster" / "CAPACITY.md"
    assert page.read_text(encoding="utf-8") == capacity.page() + "\n"


def test_the_arithmetic_of_the_page():
    assert pytest.approx(2 * 33.27, abs=0.02) == 2 * (capacity.TRUNK + 7 * capacity.DENSE) / 1e9
    assert pytest.approx(142, abs=1) == 4 * 6 * 4096 * capacity.UNIT / 1e9  # README: all ranks in float32
    mixtures = capacity.kinds()
    assert sum(kind.number for kind in mixtures if kind.pair) == 6 * 13
    assert capacity.DISTINCT == 78 + 39 + 6
    full = next(kind for kind in mixtures if kind.name == "uniform full, 7 active")
    assert full.parameters / 1e9 == pytest.approx(33.27, abs=0.01)
    best = next(kind for kind in mixtures if kind.name.startswith("best"))
    assert best.parameters / 1e9 == pytest.approx(10.75, abs=0.01)
