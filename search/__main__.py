"""The command `flexmore search`, also as `python -m search`: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

OBJECTIVES = ("score", "front")
MEASURES = ("parameters", "active", "bytes")
GRANULARITIES = ("expert", "projection", "layer", "matrix")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the search itself; how to run it has the grid's."""
    add = parser.add_argument
    add("--source", action="append", required=True, metavar="S", help="SOURCE; name=FOLDER more than once")
    add("--tasks", action="append", required=True, metavar="T", help="a suite, or a task, more than once")
    add("--budget", required=True, metavar="B", help="a count such as 10.75B, or a ratio of the full mixture: 0.33x")
    add("--measure", choices=MEASURES, default="parameters", help="what the budget counts (default: parameters)")
    add("--trials", type=int, required=True, metavar="N", help="assignments to try in all, baselines not counted")
    add("--out", required=True, metavar="DIR", help="folder of the search; the same command goes on there")
    add("--results", metavar="DIR", help="folder of the cells, shared by searches (default: results in --out)")
    add("--seed", type=int, default=0, metavar="K", help="of the sampler (default: 0)")
    add("--limit", type=int, metavar="N", help="documents per task to choose by (default: all of the validation split)")
    add("--test-limit", type=int, metavar="N", help="documents per task to report on (default: all of the test split)")
    add("--active", type=_active, metavar="K", help="experts per token, or search (default: as the checkpoint says)")
    add("--granularity", choices=GRANULARITIES, default="expert", help="what shares one rank (default: expert)")
    add("--max-rank", type=int, metavar="R", help="highest rank to try below full (default: all powers of two)")
    add("--sampler", default="tpe", metavar="NAME", help="tpe (default), gp, nsga2, random or grid")
    add("--objective", choices=OBJECTIVES, default="score", help="score (default), or front: score against size")
    add("--rungs", type=int, default=3, metavar="N", help="steps of documents; 1: no early stopping (default: 3)")
    add("--reduction", type=int, default=3, metavar="N", help="one trial in N goes on to N times the documents")
    add("--finalists", type=int, default=3, metavar="N", help="best entries that are scored on the test split")
    add("--include", action="append", metavar="FILE", help="a mixture file to compare with")


def _active(text: str) -> int | str:
    if text == "search":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number of experts, or search, got {text!r}") from None


def run(args: argparse.Namespace, options: Any) -> dict[str, Any]:
    """Run a search and print how it ended.

    Args:
        args: what `add_options` parsed.
        options: how to run it, `flexmore_ray.grid.Options`.
    """
    from flexmore_ray.storage import open_path
    from search.plan import Search, Settings
    from search.run import run_search

    settings = Settings(
        source=tuple(args.source),
        experts=None if args.experts is None else tuple(args.experts),
        tasks=tuple(args.tasks),
        budget=args.budget,
        include=tuple(args.include or ()),
        **{
            name: getattr(args, name)
            for name in (
                *("measure", "trials", "seed", "limit", "test_limit", "active", "granularity", "max_rank"),
                *("sampler", "objective", "rungs", "reduction", "finalists"),
            )
        },
    )
    out = open_path(args.out).resolve()
    if "working_dir_files" in out.parts:
        note = f"note: --out: {out} is in the job's own copy of the working directory; an absolute path stays"
        print(note, file=sys.stderr)
    search = Search(settings, out, options, open_path(args.results).resolve() if args.results else None)
    print(describe(search), flush=True)
    result = run_search(search)
    print(summary(result))
    failed = result.pop("failed")  # of a command's result, means that the command failed
    return result | {"failed_trials": failed}


def describe(search: Any) -> str:
    """What a search is about to do, as text."""
    from flexmore_ray.budget import format_count

    budget, objective, settings = search.budget, search.objective, search.settings
    rungs = ", ".join(f"{objective.documents(rung):,}" for rung in range(objective.num_rungs))
    ratio = budget.limit / budget.full_cost
    lines = [
        f"budget  {format_count(budget.limit)} {settings.measure}, {ratio:.2f}x of the full mixture "
        f"({format_count(budget.full_cost)}); the public expert alone has {format_count(budget.public_cost)}",
        f"trials  {settings.trials} by {settings.sampler}, after the baselines; documents up to each rung: {rungs}",
    ]
    if objective.halved:
        names = ", ".join(objective.halved)
        lines.append(f"note    no test split: {names}; half of the validation documents is kept for the end")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """How a search ended, as text."""
    from flexmore_ray.budget import format_count
    from flexmore_ray.tables import columns

    rows = [["mixture", "cost", "validation", "test", "95 % interval", "winner minus it"]]
    for entry in result["entries"]:
        test, difference = entry["test"], entry.get("difference")
        marks = {"winner": entry["name"] == result["winner"], "warm start": entry.get("warm")}
        said = ", ".join(mark for mark, holds in (marks | {"over budget": not entry["fits"]}).items() if holds)
        rows.append(
            [
                f"{entry['name']} ({said})" if said else entry["name"],
                format_count(entry["cost"]),
                f"{100 * entry['validation']:.1f}",
                f"{100 * test['value']:.1f}",
                f"{100 * test['low']:.1f} to {100 * test['high']:.1f}",
                "" if difference is None else f"{100 * difference['value']:+.1f} {difference['verdict']}",
            ]
        )
    if len(result["front"]) > 1 and result["objective"] == "front":
        points = [[e["name"], format_count(e["cost"]), f"{100 * e['value']:.1f}"] for e in result["front"]]
        front = ["", "Pareto front, validation split", columns([["mixture", "cost", "validation"], *points])]
    else:
        front = []
    files = f"{result['mixture']}, {result['html']}"
    return "\n".join(["", columns(rows), *front, "", *result["notes"], result["verdict"], files])


def main() -> int:
    """The command on its own."""
    from flexmore_ray.__main__ import main as flexmore

    return flexmore(["search", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
