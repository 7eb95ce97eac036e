"""The simulator: predicted over measured makespan of three grids that it was not calibrated on.

    python -m tests.benchmarks --only simulate [--quick]

Calibrated on two small grids in one folder, with 10 and with 80 documents per task, and as many workers as the three
grids have: many small cells; few cells of many documents, split into shards; and two stages, the second of which waits
for the first. All on `zoo://nano` with a complete store, each on a Ray of its own. A makespan begins when planning is
done and ends with the last commit. How far the machine's speed drifted in between is shown by the same small grid at
the beginning and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.build import build_store
from flexmore_ray.grid import Grid, Options, run_grid
from flexmore_ray.plan import Plan
from flexmore_ray.results import read_cells
from flexmore_ray.simulate import simulate
from flexmore_ray.simulate.calibrate import calibrate, read_measured
from flexmore_ray.simulate.forecast import grid_units
from flexmore_ray.source import open_source
from tests.benchmarks.bench_grid import SOURCE, own_home

WORKERS = 2
Entries = Sequence[dict[str, Any]]
CALIBRATION: Entries = (
    {"pairs": [4, "full"], "of": ["math", "code"]},
    {"uniform": [8, 64], "active": [2, 4, "all"]},
)
SMALL: Entries = ({"pairs": [2, 16, 64]}, {"uniform": [1, 2, 16, 32], "active": [2, 4]})
BIG: Entries = ({"pairs": [8], "of": ["news", "reddit"]}, {"uniform": [2, 32, "full"], "active": [4, "all"]})
STAGED: Entries = ({"pairs": [4, 32]}, {"uniform": ["best", "best2"], "active": [2, 4, "all"]})
BIG_TASKS = ("nano_capitals", "nano_tales", "nano_program", "nano_syllogism")


def planned(
    entries: Entries,
    store: Path,
    results: Path,
    *,
    tasks: Sequence[str] = ("nano",),
    limit: int | None,
    shard: int = 500,
) -> Grid:
    """A grid on the embedded mixture."""
    plan = Plan(name="simulated", source=(SOURCE,), tasks=tuple(tasks), limit=limit, mixtures=tuple(entries))
    return Grid(plan, results, Options(workers=WORKERS, store=store, shard_documents=shard))


def measured(grid: Grid) -> float:
    """Seconds from the beginning of a grid's run to its last commit."""
    began = time.time()
    outcome = run_grid(grid)
    assert not outcome.failed
    return max(path.stat().st_mtime for path in (grid.results / "cells").glob("*.parquet")) - began


def scoring_seconds(results: Path) -> float:
    """What all cells of a folder recorded."""
    return sum(read_cells(results)["seconds"].to_pylist())


def run(*, quick: bool = False) -> dict[str, Any]:
    """Calibrate, predict, run, compare."""
    small, large = (3, 9) if quick else (10, 80)
    grids: dict[str, dict[str, Any]] = {
        "many small cells": {"entries": SMALL, "limit": 2 if quick else 20},
        "few big cells in shards": {
            "entries": BIG,
            "tasks": BIG_TASKS,
            "limit": 16 if quick else None,
            "shard": 8 if quick else 50,
        },
        "two stages": {"entries": STAGED, "limit": 2 if quick else 40},
    }
    result: dict[str, Any] = {"workers": WORKERS, "grids": {}}
    with own_home() as home:
        store, learned = home / "store", home / "calibration"
        build_store(open_source([SOURCE]), store)
        for limit in (small, large):
            measured(planned(CALIBRATION, store, learned, limit=limit))
        calibration = calibrate(learned)
        result["timing"] = vars(calibration.timing)
        result["held_out_errors"] = dict(calibration.errors)
        for name, settings in grids.items():
            grid = planned(settings.pop("entries"), store, home / name, **settings)
            units, later = grid_units(grid, calibration)
            predicted = simulate(units, WORKERS, calibration.timing, later)
            taken = measured(grid)
            assert calibration.timing.start < taken
            result["grids"][name] = {
                "cells": grid.total,
                "units": len(units) + len(later),
                "predicted": predicted.makespan,
                "measured": taken,
                "ratio": predicted.makespan / taken,
                "predicted_scoring": sum(unit.arguments[0].seconds for unit in (*units, *later)),
                "measured_scoring": scoring_seconds(grid.results),
            }
        again = home / "again"
        measured(planned(CALIBRATION, store, again, limit=small))
        first = sum(cell.seconds for cell in read_measured(learned) if cell.documents == small)
        result["drift"] = scoring_seconds(again) / first
    for name, found in result["grids"].items():
        print(
            f"{name}: {found['cells']} cells, predicted {found['predicted']:.1f} s, "
            f"measured {found['measured']:.1f} s; ratio {found['ratio']:.2f} (of the seconds in cells alone "
            f"{found['predicted_scoring'] / found['measured_scoring']:.2f})"
        )
    worst = max(abs(found["ratio"] - 1) for found in result["grids"].values())
    print(
        f"within {100 * worst:.0f} %; the machine's speed at the end against the beginning: {1 / result['drift']:.2f}"
    )
    return result | {"worst": worst}
