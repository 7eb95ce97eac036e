"""What a search leaves on disk: identity, entries, tables, journal."""

from __future__ import annotations

import copy
import json
import math
import os
import re

import optuna
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from flexmore_ray.atomic import alone, remove_abandoned
from flexmore_ray.errors import FlexmoreError, UsageError
from search import ledger as ledgers
from search.ledger import STUDY, TRIAL_SCHEMA, Entry, Journal, Ledger
from tests.search_problem import PROBLEM, run, score, some_problem, study_of, varied


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


# --- the ledger -------------------------------------------------------------------------------------------

IDENTITY = {"budget": 10, "sampler": "tpe", "weights": {"shared": "x" * 90, "math": "1"}, "limit": None}


def test_a_folder_belongs_to_one_search(tmp_path):
    ledger = Ledger(tmp_path / "new")
    ledger.claim(IDENTITY, {"trials": 3})
    ledger.claim(copy.deepcopy(IDENTITY), {"trials": 30})
    saved = json.loads((tmp_path / "new" / "search.json").read_text())
    assert saved == {"format": "flexmore-search-1", "trials": 30, "identity": IDENTITY}
    ledger.write_json("trials/00000.json", {})
    for name, value in {"budget": 11, "sampler": "gp", "weights": {"shared": "y"}, "limit": 5, "more": 1}.items():
        with pytest.raises(UsageError) as caught:
            ledger.claim({**IDENTITY, name: value}, {})
        said = str(caught.value)
        assert f"whose {name} is " in said
        assert "choose another folder, or repeat that search's options" in said
        assert len(said) < 300 + len(str(tmp_path))
    assert json.loads((tmp_path / "new" / "search.json").read_text()) == saved
    (tmp_path / "new" / "trials" / "00000.json").unlink()
    ledger.claim({**IDENTITY, "limit": 5}, {})  # nothing was evaluated yet: nothing binds


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"number": 1}', '{"number": 1, "strange": 2}'])
def test_a_damaged_entry_is_named(tmp_path, text):
    problem, ledger = some_problem(), Ledger(tmp_path)
    run(study_of(problem, trials=2, ledger=ledger), problem)
    path = tmp_path / "trials" / "00003.json"
    assert path.exists()
    path.write_text(text)
    with pytest.raises(FlexmoreError, match=re.escape(str(path))) as caught:
        study_of(problem, trials=2, ledger=ledger)
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "\x00"])
def test_a_damaged_identity_is_named(tmp_path, text):
    (tmp_path / "search.json").write_text(text)
    Ledger(tmp_path).write_json("trials/00000.json", {})
    with pytest.raises(FlexmoreError, match=r"search\.json"):
        Ledger(tmp_path).claim(IDENTITY, {})


def test_entries_read_back_as_written(tmp_path):
    problem, ledger = PROBLEM, Ledger(tmp_path)
    study = run(study_of(problem, sampler="nsga2", trials=12, ledger=ledger), problem, varied, rungs=3)
    assert ledger.read() == study.entries
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == [f"{i:05d}.json" for i in range(15)]
    (tmp_path / "trials" / ".00016.json.tmp").write_text("{")
    assert ledger.read() == study.entries


def test_an_entry_is_on_disk_before_it_runs_and_whole_when_it_ended(tmp_path):
    problem, ledger = some_problem(), Ledger(tmp_path)
    study = study_of(problem, ledger=ledger)
    entry = study.next()
    assert [(e.name, e.state, e.rungs) for e in ledger.read()] == [("full", "running", [])]
    study.report(entry, 0.25, {"g": 0.25}, 10, 1.5)
    study.report(entry, 0.5, {"g": 0.5}, 30, 2.0)
    study.finish(entry, "complete")
    (found,) = ledger.read()
    assert (found.state, found.rungs, found.groups, found.documents) == ("complete", [0.25, 0.5], {"g": 0.5}, 30)
    assert (found.score, found.value, found.seconds) == (0.5, 0.5, 3.5)
    assert found.started <= found.finished


def test_tables_have_every_ended_entry_once(tmp_path):
    problem, ledger = PROBLEM, Ledger(tmp_path)
    study = study_of(problem, trials=12, ledger=ledger)
    for _ in range(9):
        score(study, problem, study.next(), varied, rungs=3)
    running = study.next()
    for _ in range(2):
        ledger.write_tables(study.entries)
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table.schema.equals(TRIAL_SCHEMA)
    names = table["name"].to_pylist()
    assert len(set(names)) == len(names) == 9
    assert running.name not in names
    run(study_of(problem, trials=12, ledger=ledger), problem, varied, rungs=3)
    ledger.write_tables(ledger.read())
    found = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["number"] for row in found] == list(range(15))
    for row, entry in zip(found, ledger.read(), strict=True):
        assert json.loads(row["ranks"]) == entry.ranks
        assert (row["score"], row["rungs"], row["state"]) == (entry.score, entry.rungs, entry.state)
        assert (row["point"] and json.loads(row["point"])) == entry.point


def entries_of(costs_and_scores, states=("complete",) * 25):
    return [
        Entry(
            number=i,
            name=f"trial-{i}",
            kind="trial",
            ranks={"a": 4},
            active=2,
            mixture_id=str(i),
            parameters=cost,
            cost=cost,
            fits=True,
            state=state,
            rungs=[value] if state != "failed" else [],
        )
        for i, ((cost, value), state) in enumerate(zip(costs_and_scores, states, strict=False))
    ]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25),
    st.lists(st.sampled_from(["complete", "complete", "stopped", "failed"]), min_size=25, max_size=25),
)
def test_the_front_has_every_entry_that_no_other_beats(pairs, states):
    entries = entries_of([(cost, value / 10) for cost, value in pairs], states)
    complete = [entry for entry in entries if entry.state == "complete"]

    def beats(one, other):
        return (
            one.cost <= other.cost and one.value >= other.value and (one.cost < other.cost or one.value > other.value)
        )

    expected = [entry for entry in complete if not any(beats(other, entry) for other in complete)]
    found = ledgers.front(entries)
    assert {entry.number for entry in found} == {entry.number for entry in expected}
    assert [entry.cost for entry in found] == sorted(entry.cost for entry in expected)


def test_the_front_is_a_table_of_the_same_columns(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write_tables(entries_of([(1, 0.5), (2, 0.4), (3, 0.6)]))
    table = pq.read_table(tmp_path / "front.parquet")
    assert table.schema.equals(TRIAL_SCHEMA)
    assert table["name"].to_pylist() == ["trial-0", "trial-2"]
    ledger.write_tables([])
    assert pq.read_table(tmp_path / "front.parquet").num_rows == 0
    assert pq.read_table(tmp_path / "trials.parquet").schema.equals(TRIAL_SCHEMA)


# --- one search in a folder -------------------------------------------------------------------------------


def test_a_folder_has_one_search_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with alone(folder, "search"):
        with (
            pytest.raises(UsageError, match=f"another search is running on {re.escape(str(folder))}; wait"),
            alone(folder, "search"),
        ):
            pytest.fail("two at once")
        with alone(tmp_path / "other", "search"):
            pass
    with pytest.raises(KeyError), alone(folder, "search"):
        raise KeyError
    with alone(folder, "search"):
        pass


def test_files_that_killed_runs_left_are_removed_when_they_are_old(tmp_path):
    ledger = Ledger(tmp_path)
    run(study_of(some_problem(), trials=1, ledger=ledger), some_problem())
    there = sorted(tmp_path.rglob("*"))
    old, new = (tmp_path / "trials" / f".{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1, 1))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*there, new])


# --- Optuna's journal -------------------------------------------------------------------------------------


def open_journal(path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(path))))


@pytest.mark.parametrize("front", [False, True])
def test_the_journal_is_a_study_that_optuna_opens(tmp_path, front):
    problem, ledger, path = PROBLEM, Ledger(tmp_path), tmp_path / "journal.log"
    for trials in (8, 14):  # made anew when a search goes on
        journal = Journal(path, front=front)
        study = study_of(problem, trials=trials, front=front, ledger=ledger, journal=journal)
        run(study, problem, varied, rungs=3)
    shown = open_journal(path)
    assert len(shown.directions) == 1 + front
    assert [trial.user_attrs["name"] for trial in shown.trials] == [entry.name for entry in study.entries]
    states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    for entry, trial in zip(study.entries, shown.trials, strict=True):
        assert trial.state == states[entry.state]
        assert trial.constraints == {"budget": entry.cost - math.floor(problem.budget)}
        assert (trial.constraints["budget"] <= 0) == entry.fits
        assert trial.params == (entry.point or {})
        if entry.state == "complete":
            assert trial.values == [entry.value, entry.cost][: 1 + front]
        if not front:
            assert trial.intermediate_values == dict(enumerate(entry.rungs))
    full = shown.trials[0]
    assert full.user_attrs["name"] == "full"
    assert full.constraints["budget"] > 0
    if front:
        assert all(trial.constraints["budget"] <= 0 for trial in shown.best_trials)
    else:
        assert full.value > shown.best_trial.value
        assert shown.best_trial.user_attrs["name"] == study.best.name
