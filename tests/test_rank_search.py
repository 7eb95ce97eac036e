"""The search on Ray, end to end on the embedded mixture, with few documents."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flexmore_ray.__main__ import main
from flexmore_ray.build import build_store
from flexmore_ray.harness import MixtureLM
from flexmore_ray.mixture import load_mixture
from flexmore_ray.results import read_cells, read_samples
from flexmore_ray.scores import load_tasks
from flexmore_ray.source import open_source
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, MixtureSpec
from search.engine import Evaluation, Job
from search.run import run_search
from search.study import MAX_FAILURES
from tests import common
from tests.search_workers import Troubled
from tests.test_results import COMMON, DATA, TASKS

TASK_NAMES = ("nano_arithmetic", "nano_mayors")
LIMIT, TEST_LIMIT, TRIALS = 9, 5, 4
RUNGS = (2, 6, 18)  # documents of both tasks
STANDARD = ["full", "public", "uniform", "energy", "entropy", "optimal"]
BASELINES = [*STANDARD, "optimal-expert"]
FILES = ("search.json", "trials.parquet", "front.parquet", "final.json", "winner.yaml", "journal.log", "report.md")
DOMAINS = ("math", "news", "academic", "code", "creative", "reddit")


def command(out: Path, *more: str) -> list[str]:
    """A small search; what is given again in `more` is what counts."""
    tasks = [part for name in TASK_NAMES for part in ("--tasks", name)]
    sizes = ["--limit", str(LIMIT), "--test-limit", str(TEST_LIMIT), "--trials", str(TRIALS), "--workers", "1"]
    return ["search", "--source", "zoo://nano", *tasks, "--budget", "0.33x", *sizes, "--out", str(out), "--json", *more]


def search(out: Path, *more: str) -> dict[str, Any]:
    """Run a small search; returns what it says at its end."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(command(out, *more)) == 0
    return json.loads(said.getvalue().splitlines()[-1])


def trials(out: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    return [row | {name: json.loads(row[name]) for name in ("ranks", "groups")} for row in rows]


def written(*folders: Path) -> dict[str, tuple[int, int]]:
    """By path, what changes when a file is written again."""
    files = [path for folder in folders for path in folder.iterdir()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def ledger(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "trials").iterdir()}


def documents(out: Path, split: str) -> dict[str, dict[str, list[str]]]:
    """By mixture and task, the documents of a split that were scored, by their hashes."""
    cells = {row["cell"] for row in read_cells(out / "results").to_pylist() if row["split"] == split}
    found: dict[str, dict[str, list[str]]] = {}
    for row in read_samples(out / "results").to_pylist():
        if row["cell"] in cells:
            found.setdefault(row["mixture_id"], {}).setdefault(row["task"], []).append(row["doc_hash"])
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All factors, so that no search here waits for expert actors."""
    folder = tmp_path_factory.mktemp("factors") / "store"
    build_store(open_source(["zoo://nano"]), folder)
    return folder


@pytest.fixture(scope="module")
def first(local_ray, store, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A search that has ended: its folder, and what it said."""
    out = tmp_path_factory.mktemp("search") / "first"
    return out, search(out, "--store", str(store))


def test_winner_and_files(first, capsys):
    out, result = first
    assert all((out / name).is_file() for name in (*FILES, "report.html"))
    rows = trials(out)
    assert [row["number"] for row in rows] == list(range(len(BASELINES) + TRIALS))
    assert [row["name"] for row in rows] == BASELINES + [f"trial-{i}" for i in range(TRIALS)]
    assert len({row["mixture_id"] for row in rows}) == len(rows)
    assert rows[len(BASELINES)]["warm"] == "optimal-expert"
    limit = json.loads((out / "search.json").read_text())["budget"]
    assert all(row["fits"] == (row["cost"] <= limit) for row in rows)
    assert [row["name"] for row in rows if not row["fits"]] == ["full"]
    best = max((row for row in rows if row["state"] == "complete" and row["fits"]), key=lambda row: row["score"])
    winner = next(row for row in rows if row["name"] == result["winner"])
    assert winner["score"] == best["score"]
    spec = MixtureSpec.load(out / "winner.yaml")
    assert (dict(spec.ranks), spec.active) == (winner["ranks"], winner["active"])
    assert main(["params", str(out / "winner.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["total"] == winner["cost"] <= limit


def test_scores_equal_an_independent_evaluation(first, store):
    out, result = first
    rows = {row["name"]: row for row in trials(out)}
    entries = {entry["name"]: entry for entry in result["entries"]}
    for name in dict.fromkeys((result["winner"], "energy", "public")):
        row, entry = rows[name], entries[name]
        spec = MixtureSpec(source=("zoo://nano",), store=str(store), ranks=row["ranks"], active=row["active"])
        mixture = load_mixture(spec)
        lm = MixtureLM(mixture.model, mixture.tokenizer)
        for split, expected, size in (
            ("validation", {"": row["score"]} | row["groups"], LIMIT),
            ("test", {"": entry["test"]["value"]} | {n: g["value"] for n, g in entry["groups"].items()}, TEST_LIMIT),
        ):
            scored = documents(out, split)[row["mixture_id"]]
            values = {}
            for task, prepared in load_tasks(list(TASK_NAMES), split=split).tasks.items():
                ids = [number for number, key in prepared.hashes.items() if key in scored[task]]
                assert len(ids) == len(scored[task]) == size
                values[task] = prepared.score(lm, ids).value
            assert expected == pytest.approx({"": sum(values.values()) / len(values)} | values)


def test_all_are_compared_on_the_same_documents(first):
    out, _ = first
    complete = [row["mixture_id"] for row in trials(out) if row["state"] == "complete"]
    chosen = documents(out, "validation")
    one = {task: sorted(found) for task, found in chosen[complete[0]].items()}
    assert all({task: sorted(found) for task, found in chosen[other].items()} == one for other in complete)
    tested = documents(out, "test")
    assert not {key for found in one.values() for key in found} & {
        key for tasks in tested.values() for found in tasks.values() for key in found
    }


def test_the_same_command_computes_nothing(first, store):
    out, result = first
    files = {name: (out / name).read_bytes() for name in ("winner.yaml", "trials.parquet", "front.parquet")}
    before = written(out / "trials", out / "results" / "cells")
    assert search(out, "--store", str(store)) == result
    assert written(out / "trials", out / "results" / "cells") == before
    assert {name: (out / name).read_bytes() for name in files} == files


def test_more_trials_keep_the_old_ones(first, store, tmp_path):
    """An extension, in a copy of the folder, and not one that was there is run again."""
    out, before = first
    kept, cells = ledger(out), written(out / "results" / "cells")
    old = trials(out)
    result = search(out, "--store", str(store), "--trials", str(TRIALS + 2))
    assert {name: data for name, data in ledger(out).items() if name in kept} == kept
    assert cells.items() <= written(out / "results" / "cells").items()
    rows = trials(out)
    assert rows[: len(old)] == old
    assert [row["name"] for row in rows[len(old) :]] == [f"trial-{TRIALS}", f"trial-{TRIALS + 1}"]
    assert max(e["validation"] for e in result["entries"]) >= max(e["validation"] for e in before["entries"])


def test_another_search_on_the_same_cells(first, store, tmp_path, capsys):
    """Layer by layer, with a budget of bytes and a mixture of the user's, and the cells of the first search."""
    out, _ = first
    mine = tmp_path / "mine.yaml"
    theirs = {"math": 16, "news": DROP, "code": {"gate_proj": 4, "up_proj": [2, 2, 4, FULL], "down_proj": 8}}
    mine.write_text(json.dumps({"source": "zoo://nano", "ranks": theirs, "active": 2}))
    cells = out / "results" / "cells"
    before, earlier = written(cells), {row["mixture_id"]: row for row in trials(out)}
    counted = {row["cell"]: row["mixture_id"] for row in read_cells(out / "results").to_pylist()}
    more = ("--granularity", "layer", "--measure", "bytes", "--include", str(mine), "--trials", "2")
    search(tmp_path / "other", "--store", str(store), "--results", str(out / "results"), *more)
    rows = trials(tmp_path / "other")
    assert [row["name"] for row in rows] == [*STANDARD, "optimal-layer", "mine", "trial-0", "trial-1"]
    assert rows[7]["ranks"] == dict.fromkeys(DOMAINS, FULL) | theirs
    assert (rows[7]["kind"], rows[7]["active"]) == ("baseline", 2)
    assert [row["warm"] for row in rows[:9]] == [None] * 8 + ["optimal-layer"]
    lists = [rank for row in rows[8:] for rank in row["ranks"].values() if isinstance(rank, dict)]
    assert any(isinstance(rank[name], list) for rank in lists for name in PROJECTIONS)
    width = open_source(["zoo://nano"]).dtype.itemsize
    assert all(row["cost"] == width * row["parameters"] for row in rows)
    assert before.items() <= written(cells).items()
    shared = {row["mixture_id"] for row in rows} & {i for i, row in earlier.items() if row["state"] == "complete"}
    assert len(shared) >= len(STANDARD)
    new = [row for row in read_cells(out / "results").to_pylist() if row["cell"] not in counted]
    assert new
    assert not shared & {row["mixture_id"] for row in new}
    assert not (tmp_path / "other" / "results").exists()


def test_a_front_over_ranks_and_active_experts(local_ray, store, tmp_path, capsys):
    out = tmp_path / "front"
    more = ("--objective", "front", "--active", "search", "--measure", "active", "--budget", "0.5x")
    search(out, "--store", str(store), *more)
    rows = trials(out)
    points = [json.loads(row["point"]) for row in rows if row["kind"] == "trial"]
    assert all(1 <= point["active"] <= 1 + len(DOMAINS) for point in points)
    assert all(row["state"] == "failed" or row["fits"] or row["name"] == "full" for row in rows)
    found = pq.read_table(out / "front.parquet").to_pylist()
    complete = [(row["cost"], row["score"], row["number"]) for row in rows if row["state"] == "complete"]
    expected = {
        number
        for cost, score, number in complete
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s, _ in complete)
    }
    assert {row["number"] for row in found} <= expected
    assert {(row["cost"], row["score"]) for row in found} == {(c, s) for c, s, n in complete if n in expected}
    trial = next(row for row in rows if row["kind"] == "trial")
    spec = MixtureSpec(source=("zoo://nano",), ranks=trial["ranks"], active=trial["active"])
    spec.save(tmp_path / "trial.yaml")
    capsys.readouterr()
    assert main(["params", str(tmp_path / "trial.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["active"] == trial["cost"]


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_stopped_early_dead_or_not_a_number(local_ray, store, tmp_path, monkeypatch, capsys):
    """The hopeless cost the documents of one rung, an actor that dies is tried again, and NaN fails its trial alone,
    but ten in a row end the search."""
    worker = functools.partial(Troubled, tmp_path)
    monkeypatch.setattr("search.run.run_search", functools.partial(run_search, worker=worker))
    out, many = tmp_path / "out", TRIALS + MAX_FAILURES + 5
    assert main(command(out, "--store", str(store), "--trials", str(many))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    nan = "task nano_arithmetic: its score is nan, not a number"
    assert line.startswith(f"flexmore: {MAX_FAILURES} trials in a row failed, the last with: {nan}; what was finished")
    assert (tmp_path / "died").exists()
    rows = trials(out)
    stopped, failed = (RUNGS[0], 1, "stopped", None), (0, 0, "failed", nan)
    expected = [(RUNGS[-1], 3, "complete", None)] * len(BASELINES)
    expected += [stopped, failed, stopped, stopped, *[failed] * MAX_FAILURES]
    assert [(row["documents"], len(row["rungs"]), row["state"], row["error"]) for row in rows] == expected
    assert [row["score"] is None for row in rows] == [row["state"] == "failed" for row in rows]
    chosen = documents(out, "validation")
    for row in rows:
        assert sum(map(len, chosen.get(row["mixture_id"], {}).values())) == row["documents"]


def test_failed_trials_do_not_fail_the_command(first, monkeypatch, capsys):
    out, result = first
    done = {name: value for name, value in result.items() if name != "failed_trials"}
    monkeypatch.setattr("search.run.run_search", lambda search: done | {"failed": 2})
    assert search(out)["failed_trials"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0.19x"], "give at least the public expert alone (880,000) and at most the full mixture (4,4"),
        (["--budget", "5M"], "5M is 5,000,000 parameters; give at least the public expert alone (880,000) and at mo"),
        (["--trials", "0"], "--trials: at least 1, got 0"),
        (["--finalists", "0"], "--finalists: at least 1, got 0"),
        (["--max-rank", "0"], "--max-rank: at least 1, got 0"),
        (["--rungs", "0"], "--rungs: at least 1, got 0"),
        (["--reduction", "1"], "--reduction: at least 2, got 1"),
        (["--limit", "0"], "--limit: at least 1, got 0"),
        (["--test-limit", "0"], "--test-limit: at least 1, got 0"),
        (["--sampler", "tpee"], "--sampler: did you mean tpe?"),
        (["--tasks", "nano_arithmetics"], "close matches: nano_arithmetic"),
        (["--active", "9"], "--active: a number from 1 to the 7 experts, or search; got 9"),
        (["--pin", "maths=RACK"], "--pin"),
        (["--workers", "0"], "--workers: at least 1, got 0"),
    ],
)
def test_bad_use_is_one_line_and_status_2(more, message, tmp_path, capsys):
    assert main(command(tmp_path / "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--active", "few"], ["--measure", "watts"], ["--trials", "many"]])
def test_bad_words_are_one_line_and_status_2(more, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path / "out", *more))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_task_without_validation_split(tmp_path, capsys):
    (tmp_path / "data.py").write_text(DATA)
    splits = "training_split: train\nvalidation_split: validation\n"
    only_test = TASKS["sums"].replace(splits, "training_split: train\n")
    assert only_test != TASKS["sums"]
    (tmp_path / "exam.yaml").write_text(f"task: exam\n{COMMON}{only_test}")
    assert main(command(tmp_path / "out", "--tasks", str(tmp_path / "exam.yaml"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "task exam has no validation split" in line
    assert "give the task a validation_split" in line


def test_a_mixture_of_another_source(tmp_path, capsys):
    common.write(common.random_model(), tmp_path / "model", expert_names=list(common.NAMES))
    (tmp_path / "mine.yaml").write_text(f"source: {tmp_path / 'model'}\nranks: {{math: 2}}\n")
    assert main(command(tmp_path / "out", "--include", str(tmp_path / "mine.yaml"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--include: {tmp_path / 'mine.yaml'} is of {tmp_path / 'model'}, the search of zoo://nano" in line


@pytest.mark.parametrize("name", ["full", "trial-0"])
def test_a_mixture_by_a_name_that_is_taken(name, tmp_path, capsys):
    (tmp_path / f"{name}.yaml").write_text("source: zoo://nano\nranks: {math: 2}\n")
    assert main(command(tmp_path / "out", "--include", str(tmp_path / f"{name}.yaml"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"a mixture of the search is called {name}; rename the file" in line


def test_a_worker_that_cannot_start_fails_its_jobs_with_the_reason():
    class Unable:
        def start(self):
            raise FileNotFoundError("/nowhere/source")

    actor = object.__new__(Evaluation)
    job = Job(name="full", ranks={}, active=1, rungs=[()])
    actor.setup({"job": job}, worker=Unable(), contents={})
    assert actor.step()["error"] == "a worker cannot start: FileNotFoundError: /nowhere/source"


@pytest.mark.parametrize(
    ("more", "differs"), [(["--seed", "5"], "seed is 0, not 5"), (["--budget", "0.5x"], "budget is 1459265, not ")]
)
def test_the_folder_of_another_search(more, differs, first, store, capsys):
    out, _ = first
    before = ledger(out)
    assert main(command(out, "--store", str(store), *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"holds another search, whose {differs}" in line
    assert ledger(out) == before


def test_more_gpus_than_there_are(local_ray, tmp_path, capsys):
    assert main(command(tmp_path / "out", "--gpus", "2")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "asks for 1 CPU and 2 GPU" in line
