"""Decomposition against `torch.linalg.svd`: seconds, ratio, memory.

    python -m tests.benchmarks.bench_decompose [--quick]

Both run in turn in one process on the same delta, so that whatever else the machine does weighs on
both; the medians are compared. A ratio above 1 says how many times faster `decompose` is, its
check included. Errors are against the singular values of a float64 SVD.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexmore_ray.spectra import decompose

SHAPE = (2048, 5504)
QUICK_SHAPE = (512, 1376)
GOAL = 4.0
"""Times faster than `torch.linalg.svd` at full rank and SHAPE that is aimed at."""


def make_delta(spectrum: str, shape: tuple[int, int]) -> Tensor:
    """A delta with random singular vectors: "gaussian", or "power", decaying as i^-0.7 into noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    if spectrum == "gaussian":
        return noise
    size = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in shape)
    return (u * torch.arange(1, size + 1) ** -0.7) @ v.T + 1e-4 * noise


def run(quick: bool = False) -> dict[str, Any]:
    """Measure every spectrum and rank and print a table; `quick` takes a small matrix and few repeats."""
    shape, repeats = (QUICK_SHAPE, 3) if quick else (SHAPE, 3)
    ranks = (None, 64, 16) if quick else (None, 256, 64)
    rows = [row for spectrum in ("power", "gaussian") for row in _compare(spectrum, shape, ranks, repeats)]
    result = {
        "benchmark": "decompose",
        "shape": shape,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "goal": GOAL,
        "rows": rows,
        "ratio_full_rank": min(row["ratio"] for row in rows if row["max_rank"] is None),
    }
    print_table(result)
    return result


def _compare(
    spectrum: str, shape: tuple[int, int], ranks: tuple[int | None, ...], repeats: int
) -> list[dict[str, Any]]:
    delta = make_delta(spectrum, shape)
    reference = torch.linalg.svdvals(delta.double()).square()
    seconds: dict[Any, list[float]] = {"svd": [], **{rank: [] for rank in ranks}}
    results = {}
    for _ in range(repeats):
        seconds["svd"].append(_seconds(lambda: torch.linalg.svd(delta, full_matrices=False))[0])
        for rank in ranks:
            took, results[rank] = _seconds(lambda rank=rank: decompose(delta, rank))
            seconds[rank].append(took)
    baseline = statistics.median(seconds["svd"])
    rows = []
    for rank in ranks:
        result, median = results[rank], statistics.median(seconds[rank])
        cut = max(1, result.factors.rank - 1)
        factors = result.factors.truncate(cut)
        error = float((delta - factors.dense()).double().square().sum())
        rows.append(
            {
                "spectrum": spectrum,
                "max_rank": rank,
                "method": result.method,
                "svd_seconds": baseline,
                "seconds": median,
                "ratio": baseline / median,
                "all_seconds": seconds[rank],
                "all_svd_seconds": seconds["svd"],
                "verified_error_ratio": result.error_ratio,
                "error_ratio_at": cut,
                "error_ratio": error / float(reference[cut:].sum()),
                "memory_multiple": _memory_multiple(spectrum, shape, rank),
            }
        )
    return rows


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _memory_multiple(spectrum: str, shape: tuple[int, int], rank: int | None) -> float:
    """Peak memory beside the delta, result included, in multiples of the delta, in a fresh process."""
    arguments = json.dumps([spectrum, shape, rank])
    command = [sys.executable, "-m", "tests.benchmarks.bench_decompose", "--memory", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _measure_memory(spectrum: str, shape: tuple[int, int], rank: int | None) -> float:
    """Run once in this process, on a delta that takes no more memory to make than it has itself."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(shape, generator=generator)
    if spectrum == "power":
        delta *= torch.arange(1, shape[0] + 1)[:, None] ** -0.7
    decompose(delta[:300, :400].contiguous(), rank)
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm", encoding="ascii") as file:
        before = int(file.read().split()[1]) * page
    decompose(delta, rank)
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return (peak - before) / (delta.numel() * delta.element_size())


def print_table(result: dict[str, Any]) -> None:
    """The rows for people."""
    out, inner = result["shape"]
    print(f"decompose against torch.linalg.svd, {out} x {inner} float32, {result['threads']} threads")
    print(f"{'spectrum':10} {'rank':>5} {'method':11} {'svd s':>7} {'s':>7} {'ratio':>6} {'error':>8} {'memory':>7}")
    for row in result["rows"]:
        print(
            f"{row['spectrum']:10} {row['max_rank'] or 'full':>5} {row['method']:11} {row['svd_seconds']:7.2f} "
            f"{row['seconds']:7.2f} {row['ratio']:5.1f}x {row['error_ratio']:8.5f} {row['memory_multiple']:6.1f}x"
        )
    print(f"full rank: {result['ratio_full_rank']:.1f} times faster (goal {result['goal']:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Decomposition against torch.linalg.svd.")
    parser.add_argument("--quick", action="store_true", help="a small matrix, few repetitions")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        spectrum, shape, rank = json.loads(args.memory)
        print(_measure_memory(spectrum, tuple(shape), rank))
        return
    print(json.dumps(run(quick=args.quick)))


if __name__ == "__main__":
    main()
