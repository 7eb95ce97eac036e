"""The grid: seconds per cell against the scripts' way, overhead per cell, and one against two workers.

    python -m tests.benchmarks --only grid [--quick]

The scripts' way is that of the grid's publication: write a checkpoint per rank, then a process of lm-eval per mixture,
with both cores. The grid's time holds all it does: planning, starting Ray, workers and expert actors, decomposing,
committing; one time more without its start, from the first commit to the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flexmore_ray.export import export_mixture
from flexmore_ray.grid import Grid, Options, run_grid
from flexmore_ray.plan import Plan
from flexmore_ray.results import read_cells
from flexmore_ray.scores import TaskScore
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.suites import load_suite
from flexmore_ray.worker import Worker

SOURCE = "zoo://nano"
DOMAINS = ("math", "news", "academic", "code", "creative", "reddit")
RANKS = (1, 2, 4, 8, 16, 32, 64)
ACTIVE = (2, 4)


@contextlib.contextmanager
def own_home() -> Iterator[Path]:
    """A home for Ray's token and a cache for factors that end with the benchmark."""
    before = {name: os.environ.get(name) for name in ("HOME", "FLEXMORE_CACHE", "RAY_AUTH_MODE")}
    folder = Path(tempfile.mkdtemp())
    os.environ |= {"HOME": str(folder), "FLEXMORE_CACHE": str(folder / "cache"), "RAY_AUTH_MODE": "disabled"}
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def plan(limit: int | None) -> Plan:
    """All experts at some uniform ranks, on the test split of the nano suite, which is what lm-eval takes."""
    entry = {"uniform": list(RANKS), "active": list(ACTIVE)}
    return Plan(name="bench", source=(SOURCE,), tasks=("nano",), split="test", limit=limit, mixtures=(entry,))


def timed_grid(limit: int | None, folder: Path, workers: int) -> tuple[float, float, int]:
    """Seconds in all, seconds between the first and the last commit, and cells."""
    start = time.perf_counter()
    outcome = run_grid(Grid(plan(limit), folder, Options(workers=workers)))
    seconds = time.perf_counter() - start
    assert not outcome.failed
    commits = sorted(path.stat().st_mtime for path in (folder / "cells").iterdir())
    return seconds, commits[-1] - commits[0], outcome.computed


def scripts_way(limit: int | None, rank: int, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds and scores (mixture and task -> value) of a rank: write its checkpoint, score it with lm-eval's command.

    One process per mixture, as the scripts do; `HFLM` at the batch size that is best in `bench_scoring`, both cores.
    """
    suite = load_suite("nano")
    scores, start = {}, time.perf_counter()
    spec = MixtureSpec(source=(SOURCE,), ranks=dict.fromkeys(DOMAINS, rank), active=2)
    dense = export_mixture(spec, folder / f"r{rank}", "flexolmo", dtype="float32")
    for active in ACTIVE:
        config = json.loads((dense / "config.json").read_text()) | {"num_experts_per_tok": active}
        (dense / "config.json").write_text(json.dumps(config))
        out = folder / f"scores-{rank}-{active}"
        command = [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={dense},dtype=float32",
        ]
        command += [
            "--tasks",
            ",".join(suite.tasks),
            "--batch_size",
            "64",
            "--device",
            "cpu",
            "--output_path",
            str(out),
        ]
        command += ["--include_path", str(suite.folders[0])]
        command += ["--limit", str(limit)] if limit else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        (found,) = out.glob("**/results_*.json")
        for task, values in json.loads(found.read_text())["results"].items():
            scores[f"{rank} {active} {task}"] = values.get("acc,none", values.get("exact_match,none"))
    return time.perf_counter() - start, scores


class Empty(Worker):
    """Scores at once what it is asked to score: what is left is the machinery."""

    def run(self, ranks: Any, active: int, split: Any, task: str, content: str, documents: Any) -> TaskScore:
        if self._mixture is None:
            self._switch(ranks, active)
            self._score = self._tasks[split][task].score(self._lm)
        return self._score


def overhead(cells: int, folder: Path) -> dict[str, float]:
    """Milliseconds per cell of a grid of empty cells: planning, running with two workers, planning again."""
    chance = random.Random(0)
    mixtures = tuple(
        {"name": f"m{i}", "ranks": {name: chance.randint(1, 127) for name in DOMAINS}, "active": 2}
        for i in range(cells)
    )
    entries = Plan(name="empty", source=(SOURCE,), tasks=("nano_order",), limit=1, mixtures=mixtures)
    start = time.perf_counter()
    grid = Grid(entries, folder, Options(workers=2))
    planned = time.perf_counter()
    outcome = run_grid(grid, Empty)
    done = time.perf_counter()
    assert outcome.computed == len(grid.cells)
    commits = sorted(path.stat().st_mtime for path in (folder / "cells").iterdir())
    again = Grid(entries, folder, Options())
    assert not again.missing
    times = {
        "planning_ms": planned - start,
        "running_ms": commits[-1] - commits[0],
        "all_ms": done - start,
        "planning_again_ms": time.perf_counter() - done,
    }
    return {"cells": len(grid.cells)} | {name: 1000 * seconds / cells for name, seconds in times.items()}


def run(*, quick: bool = False) -> dict[str, Any]:
    """All three, with their ratios."""
    limit, repeats = (5, 1) if quick else (100, 1)
    result: dict[str, Any] = {}
    torch.set_num_threads(2)
    with own_home() as folder:
        grids = [timed_grid(limit, folder / f"two-{i}", workers=2) for i in range(repeats)]
        single = [timed_grid(limit, folder / f"one-{i}", workers=1) for i in range(repeats)]
        speed_up = statistics.median(s[1] for s in single) / statistics.median(g[1] for g in grids)
        timed = [scripts_way(limit, rank, folder) for rank in (RANKS[:1] if quick else RANKS[::2])]
        seconds, theirs = sum(t[0] for t in timed), {name: score for t in timed for name, score in t[1].items()}
        ours_per_cell = statistics.median(g[0] for g in grids) / grids[0][2]
        result = {
            "cells": grids[0][2],
            "ours_seconds_per_cell": ours_per_cell,
            "ours_steady_seconds_per_cell": statistics.median(g[1] for g in grids) / grids[0][2],
            "scripts_seconds_per_cell": seconds / len(theirs),
            "largest_score_difference": max(differences(folder / "two-0", theirs)),
            "two_workers_speed_up": speed_up,
            "overhead": overhead(500 if quick else 10_000, folder / "empty"),
        }
        result["ratio"] = result["scripts_seconds_per_cell"] / ours_per_cell
        result["steady_ratio"] = result["scripts_seconds_per_cell"] / result["ours_steady_seconds_per_cell"]
    print(f"seconds per cell: ours {ours_per_cell:.3f}, scripts {result['scripts_seconds_per_cell']:.3f}")
    print(f"ratio {result['ratio']:.1f}, without our start {result['steady_ratio']:.1f}")
    print(f"two workers against one: {speed_up:.2f}")
    print("overhead per cell: " + ", ".join(f"{name} {value:.2f}" for name, value in result["overhead"].items()))
    return result


def differences(results: Path, theirs: dict[str, float]) -> Iterator[float]:
    """Between the scores of both ways, by cell."""
    for row in read_cells(results).to_pylist():
        rank = json.loads(row["mixture"])["ranks"]["math"]
        if (value := theirs.get(f"{rank} {row['active']} {row['task']}")) is not None:
            yield abs(row["value"] - value)
