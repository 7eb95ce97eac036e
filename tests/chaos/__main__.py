"""Try faults on a simulated cluster of several hosts, and print what they cost.

    python -m tests.chaos [--times N] [--only NAME] [--stage NAME] [--seed N] [--out FILE.json]

Needs iproute2, unshare and the right to make network namespaces. Each fault hits a running command at a random
moment; afterwards its result must equal that of an undisturbed run, no committed file may have been written again,
and no process may be left. Seconds to recover run from the fault to the next commit, or to the end of failures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.hosts import available, isolated


def main() -> int:
    """Run the scenarios one after the other; 1 if anything was lost, done twice or left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="how often each fault is tried on each stage (default: 3)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="faults whose name contains this; may be repeated"
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="what they hit; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of moments and hosts (default: 0)")
    parser.add_argument("--out", type=Path, help="where to write the figures, added to those that are there")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    args = parser.parse_args()
    if reason := available():
        parser.error(reason)
    isolated(["-m", "tests.chaos", *sys.argv[1:]])
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from tests.chaos.faults import Outcome, attempt, scenarios
    from tests.chaos.serving import attempt_serving

    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcomes: list[Outcome] = []
    for scenario in scenarios():
        for stage in scenario.stages:
            if not any(name in scenario.fault for name in args.only or [""]) or stage not in (args.stage or [stage]):
                continue
            started, scratch = time.monotonic(), base / f"{len(outcomes)}"
            print(f"== {scenario.fault}, {stage}", flush=True)
            outcome = Outcome(fault=scenario.fault, stage=stage)
            outcomes.append(outcome)
            try:
                (attempt_serving if stage == "serve" else attempt)(scenario, outcome, args.times, args.seed, scratch)
            except Exception as error:  # whatever it is, the other scenarios are worth trying
                traceback.print_exc()
                outcome.lost += 1
                outcome.notes.append(f"did not come to its end: {type(error).__name__}: {error}")
            print(f"   {row(outcomes[-1])} in {time.monotonic() - started:.0f} s", flush=True)
            if not args.keep:
                shutil.rmtree(scratch, ignore_errors=True)
            if args.out:
                _write(args.out, outcomes[-1])
    print(table(outcomes))
    return int(any(outcome.lost or outcome.duplicated or outcome.orphans for outcome in outcomes))


def _write(path: Path, outcome: object) -> None:
    known = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*known, dataclasses.asdict(outcome)], indent=1) + "\n")


def row(outcome: object) -> str:
    """A row of the table."""
    seconds = outcome.recovered or [0.0]
    spread = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
    names = ("fault", "stage", "times", "lost", "duplicated", "orphans")
    return "| " + " | ".join(str(getattr(outcome, name)) for name in names) + f" | {spread} |"


def table(outcomes: list) -> str:
    """All that was tried, in Markdown."""
    lines = ["| fault | stage | times | lost | twice | orphans | seconds to recover: median | max |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|", *map(row, outcomes)]
    return "\n".join([*lines, f"{sum(outcome.times for outcome in outcomes)} faults in all"])


if __name__ == "__main__":
    sys.exit(main())
