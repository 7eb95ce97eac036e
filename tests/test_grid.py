"""The grid on Ray: the same rows as in one process, once each, and what it does with failures."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmore_ray.__main__ import main
from flexmore_ray.build import build_store
from flexmore_ray.errors import FlexmoreError, StoreError, UsageError
from flexmore_ray.evaluate import evaluate
from flexmore_ray.export import export_mixture
from flexmore_ray.grid import Grid, Options, run_grid
from flexmore_ray.mixture import load_mixture
from flexmore_ray.plan import Plan, best_ranks
from flexmore_ray.report import write_report
from flexmore_ray.results import read_cells, read_samples
from flexmore_ray.scores import load_tasks
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from tests import common
from tests.test_results import COMMON, DATA, TASKS

NANO = ("nano_arithmetic", "nano_mayors")
KINDS = ("sums", "spoken", "last_word")  # multiple choice, generation, log-likelihood


def small_plan(**changes: object) -> Plan:
    mixtures = ({"pairs": [2, "full"]}, {"uniform": [2, "best", "best2"], "active": [2, "all"]})
    entries = {"name": "small", "source": ("zoo://nano",), "tasks": NANO, "limit": 5, "mixtures": mixtures}
    return Plan(**entries | changes)


def rows(results: Path) -> list[dict]:
    """Cells and samples without what a run may change: the time it took."""
    cells = read_cells(results).drop_columns(["seconds"]).to_pylist()
    samples = sorted(read_samples(results).to_pylist(), key=lambda row: (row["cell"], row["doc_id"]))
    return cells + samples


@pytest.fixture(scope="module")
def grid(local_ray, tmp_path_factory) -> Grid:
    grid = Grid(small_plan(), tmp_path_factory.mktemp("grid") / "results", Options(workers=2))
    before = grid.summary()
    assert (before["mixtures"], before["distinct_mixtures"], before["missing"]) == (18, 18, 36)
    outcome = run_grid(grid)
    assert outcome.failed == {}
    assert outcome.computed == len(grid.cells) == read_cells(grid.results).num_rows
    return grid


def test_cells_equal_those_of_one_process(grid, tmp_path):
    chosen = [m for m in grid.mixtures if m.name in ("pair-code-r2", "uniform-r2-a7", "best2-a2")]
    tasks = load_tasks(list(NANO), limit=5)
    for mixture in chosen:
        assert all(list(evaluate(load_mixture(mixture.spec), tasks, tmp_path)))
    alone = rows(tmp_path)
    of_grid = {(row["cell"], row.get("doc_id")): row for row in rows(grid.results)}
    assert len(alone) == 3 * 2 * (1 + 5)
    for row in alone:
        theirs = of_grid[row["cell"], row.get("doc_id")]
        if "mixture" in row:  # the file may spell out ranks that a user left to their default
            assert row.pop("mixture")
            theirs = {key: value for key, value in theirs.items() if key != "mixture"}
        assert row == theirs


def test_the_second_stage_is_what_the_results_say(grid):
    scores: dict[str, dict[str, float]] = {}
    for row in read_cells(grid.results).to_pylist():
        scores.setdefault(row["mixture_id"], {})[row["task"]] = row["value"]
    expected = best_ranks("best", grid.pairs, scores, grid.tasks.suite.groups)
    best = next(mixture for mixture in grid.mixtures if mixture.name == "best-a7")
    assert best.spec.ranks == expected
    (record,) = (grid.results / "plans").glob("*.json")
    assert {"best-a7", "best2-a2"} <= {m["name"] for m in json.loads(record.read_text())["mixtures"]}


def test_only_what_is_missing_is_computed(grid):
    again = Grid(small_plan(), grid.results, Options(workers=1))
    assert (again.missing, again.waiting) == ({}, [])
    assert run_grid(again).computed == 0
    lost = next(iter(again.cells))
    before = rows(grid.results)
    (grid.results / "cells" / f"{lost}.parquet").unlink()
    assert run_grid(Grid(small_plan(), grid.results, Options(workers=1))).computed == 1
    assert rows(grid.results) == before


def test_a_wider_plan_computes_the_difference(grid):
    wider = Grid(small_plan(tasks=(*NANO, "nano_order")), grid.results, Options())
    assert not set(wider.missing) & set(grid.cells)
    assert {cell.task for cell in wider.missing.values()} == {"nano_order"}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "data.py").write_text(DATA)
    for name in KINDS:
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{TASKS[name]}")
    return folder


def test_sharded_equals_unsharded_equals_lm_eval(local_ray, task_folder, tmp_path):
    """Three tasks of different kinds, values and standard errors, on a checkpoint that transformers loads."""
    mixture = {"name": "m", "ranks": dict.fromkeys(("math", "news", "academic", "code", "creative", "reddit"), 8)}
    plan = small_plan(tasks=(str(task_folder),), limit=None, split="test", mixtures=({**mixture, "active": 4},))
    for name, options in {"whole": Options(workers=1), "parts": Options(workers=2, shard_documents=5)}.items():
        assert run_grid(Grid(plan, tmp_path / name, options)).failed == {}
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for row, other in zip(whole, parts, strict=True):  # a log-likelihood's last digits depend on the batch
        ours, theirs = json.loads(row.pop("responses", "[]")), json.loads(other.pop("responses", "[]"))
        assert row == other
        for one, two in zip(ours, theirs, strict=True):
            assert one == two if isinstance(one, str) else one == [pytest.approx(two[0], abs=1e-4), two[1]]

    spec = MixtureSpec(source=("zoo://nano",), ranks=mixture["ranks"], active=4)
    dense = export_mixture(spec, tmp_path / "dense", "flexolmo", dtype="float32")
    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(dense).eval(),
        tokenizer=AutoTokenizer.from_pretrained(dense),
        batch_size=8,
    )
    manager = TaskManager(include_defaults=False, include_path=str(task_folder))
    theirs = lm_eval.simple_evaluate(model=reference, tasks=list(KINDS), task_manager=manager)["results"]
    for row in read_cells(tmp_path / "parts").to_pylist():
        filters = {"spoken": "digits"}.get(row["task"], "none")
        assert row["value"] == theirs[row["task"]][f"{row['metric']},{filters}"]
        assert row["stderr"] == theirs[row["task"]][f"{row['metric']}_stderr,{filters}"]


def test_a_document_that_fails_fails_its_cell_alone(local_ray, task_folder, tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    broken = "\n\ndef process(doc, results):\n    return {'acc': 1 / len(doc['question'].strip('0123456789') == '+')}\n"
    (folder / "data.py").write_text((task_folder / "data.py").read_text() + broken)
    (folder / "good.yaml").write_text(f"task: good\n{COMMON}{TASKS['sums']}")
    (folder / "bad.yaml").write_text(f"task: bad\n{COMMON}{TASKS['sums']}process_results: !function data.process\n")
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"source: zoo://nano\ntasks: {folder}\nlimit: 3\nmixtures: [{{uniform: [1, full], active: 2}}]\n")
    command = ["grid", str(plan), "--results", str(tmp_path / "results"), "--workers", "1", "--json"]
    for _ in range(2):  # the second run tries the failed cells again, and only those
        assert main(command) == 1
        out = capsys.readouterr().out
        assert "failed: uniform-r1-a2 on bad: TaskError: task bad, document 0" in out
        summary = json.loads(out.splitlines()[-1])
        assert (summary["done"], summary["missing"], len(summary["failed"])) == (2, 2, 2)
    status = read_cells(tmp_path / "results").select(["task", "status", "error"]).to_pylist()
    assert [row["status"] for row in status if row["task"] == "good"] == ["done"] * 2
    assert all("document 0" in row["error"] for row in status if row["status"] == "failed")


def test_results_of_other_weights_are_refused(grid, tmp_path):
    (record,) = (grid.results / "plans").glob("*.json")
    changed = json.loads(record.read_text())
    changed["digests"]["code"] = "0" * 16
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / record.name).write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"other weights .*expert code\); choose another folder"):
        Grid(small_plan(), tmp_path, Options())


def test_one_grid_at_a_time_writes_to_a_folder(grid):
    with open(grid.results / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another grid is running"):
            run_grid(grid)


def test_dry_run_counts_and_computes_nothing(tmp_path, capsys):
    command = ["grid", "--preset", "paper", "--source", "zoo://nano", "--tasks", ",".join(NANO), "--limit", "3"]
    assert main([*command, "--results", str(tmp_path / "results"), "--dry-run", "--json"]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert (summary["mixtures"], summary["distinct_mixtures"]) == (150, 78)
    assert (summary["cells"], summary["done"], summary["missing"]) == (156, 0, 156)
    assert "6 wait for the results of the pairs" in out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a plan file or --preset"),
        (["--preset", "paper", "--tasks", "nano"], "its source or its store"),
        (["--preset", "paper", "--source", "zoo://nano", "--tasks", "nano_arithmetics"], "close matches: nano_arith"),
        (["--preset", "paper", "--source", "zoo://nan", "--tasks", "nano"], "nano"),
        (["--preset", "paper", "--source", "zoo://nano", "--tasks", "nano", "--workers", "0"], "--workers: at least 1"),
        (["--preset", "paper", "--source", "zoo://nano", "--tasks", "nano", "--dtype", "int3"], "dtype: one of"),
    ],
)
def test_bad_use_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert main(["grid", *arguments, "--results", str(tmp_path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_gpu_that_is_not_there_is_refused_and_nothing_hangs(local_ray, tmp_path, capsys):
    command = ["grid", "--preset", "paper", "--source", "zoo://nano", "--tasks", "nano_order", "--limit", "1"]
    assert main([*command, "--results", str(tmp_path), "--gpus", "1"]) == 2
    assert "asks for 1 CPU and 1 GPU on one node; the cluster has 1 node: CPU 4" in capsys.readouterr().err


def test_a_store_of_another_dtype_makes_other_mixtures(tmp_path):
    source = open_source(["zoo://nano"])
    build_store(source, tmp_path / "half", max_rank=2, dtype="bfloat16")
    rounded = Grid(small_plan(), tmp_path / "results", Options(store=tmp_path / "half"))
    exact = Grid(small_plan(), tmp_path / "results", Options())
    names = {mixture.mixture_id: mixture.name for mixture in exact.mixtures}
    same = {names[mixture.mixture_id] for mixture in rounded.mixtures if mixture.mixture_id in names}
    assert same == {name for name in names.values() if "full" in name}  # no factors in those
    assert rounded.parts.spec.store is None  # which store it was does not matter


def test_a_store_of_other_weights_is_refused_before_anything_is_computed(tmp_path):
    model = common.random_model()
    other = open_source([str(common.write(model, tmp_path / "model", expert_names=list(common.NAMES)))])
    build_store(other, tmp_path / "store", max_rank=2)
    with pytest.raises(StoreError, match="other weights"):
        Grid(small_plan(), tmp_path / "results", Options(store=tmp_path / "store"))
    assert not (tmp_path / "results").exists()


def test_experts_that_were_born_low_rank(local_ray, tmp_path):
    """A rank at or above its own is the expert as its owner made it, in plan, results and second stage."""
    spec = MixtureSpec(source=("zoo://nano",), ranks={"math": {"gate_proj": 8, "up_proj": 8, "down_proj": 16}})
    adapters = export_mixture(spec, tmp_path / "adapters", "peft")
    build_store(open_source(["zoo://nano"]), tmp_path / "store", max_rank=4)  # without the new expert
    plan = small_plan(
        source=("zoo://nano", f"law={adapters / 'math'}"),
        tasks=("nano_order",),
        limit=2,
        mixtures=({"pairs": [4, 64, "full"]}, {"uniform": ["best"], "active": "all"}),
    )
    grid = Grid(plan, tmp_path / "results", Options(workers=1))
    law = {mixture.name: mixture for mixture in grid.pairs if mixture.pair == "law"}
    assert law["pair-law-r64"].mixture_id == law["pair-law-full"].mixture_id != law["pair-law-r4"].mixture_id
    assert [law[f"pair-law-{rank}"].rank for rank in ("r4", "r64", "full")] == [4, "full", "full"]
    assert run_grid(grid).failed == {}
    best = next(mixture for mixture in grid.mixtures if mixture.name == "best-a8")
    assert best.spec.ranks["law"] in (4, "full")
    assert write_report(grid.results, tmp_path / "report")["sections"]


def test_a_source_without_tokenizer_ends_the_run_at_once(local_ray, tmp_path):
    folder = common.write(common.random_model(), tmp_path / "model", expert_names=list(common.NAMES))
    plan = small_plan(source=(str(folder),), tasks=("nano_order",), limit=1, mixtures=({"uniform": ["full"]},))
    with pytest.raises(FlexmoreError, match=r"a worker cannot start: UsageError: .*no tokenizer"):
        run_grid(Grid(plan, tmp_path / "results", Options(workers=1)))


def test_results_without_their_samples_are_computed_again(grid):
    lost = next(iter(grid.cells))
    before = rows(grid.results)
    (grid.results / "samples" / f"{lost}.parquet").unlink()
    again = Grid(small_plan(), grid.results, Options(workers=1))
    assert list(again.missing) == [lost]
    assert run_grid(again).computed == 1
    assert rows(grid.results) == before
