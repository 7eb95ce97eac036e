"""Run all benchmarks, print their ratios and write everything as JSON.

python -m tests.benchmarks [--quick] [--out bench.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from tests.benchmarks import (
    bench_decompose,
    bench_grid,
    bench_moe,
    bench_moments,
    bench_own_expert,
    bench_scaling,
    bench_scoring,
    bench_search,
    bench_serve,
    bench_simulate,
    bench_switch,
    bench_truncation,
)

BENCHMARKS = {
    "decompose": bench_decompose.run,
    "grid": bench_grid.run,
    "moe_block": bench_moe.run,
    "moments": bench_moments.run,
    "own_expert": bench_own_expert.run,
    "rank_switch": bench_switch.run,
    "scaling": bench_scaling.run,
    "scoring": bench_scoring.run,
    "search": bench_search.run,
    "serve": bench_serve.run,
    "simulate": bench_simulate.run,
    "truncation": bench_truncation.run,
}


def main() -> None:
    """Run the benchmarks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: to see that it runs")
    parser.add_argument("--out", default="bench.json", help="where to write the figures (default: bench.json)")
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark")
    args = parser.parse_args()
    results: dict[str, object] = {
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
    }
    for name, run in BENCHMARKS.items():
        if args.only in (None, name):
            print(f"\n== {name}", flush=True)
            results[name] = run(quick=args.quick)
            Path(args.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
