"""Latency of a truncation from an expert actor, against the store on disk and a plain `ray.get` of as many bytes.

    python -m tests.benchmarks.bench_truncation [--quick]

One matrix of 4096 x 11008 whose factors are random and lie in the store, so that nothing is decomposed. All
three are asked in turn on a Ray cluster of this machine. The plain `ray.get` is the floor: an actor that holds
an array and returns a slice of it, read in place. Ours gives tensors that the caller owns, one copy more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from flexmore_ray.build import StoreWriter
from flexmore_ray.experts import ExpertActors, start_experts
from flexmore_ray.runtime import cluster
from flexmore_ray.spec import MatrixKey, ModelShape
from flexmore_ray.spectra import Decomposition, Factors
from flexmore_ray.store import FactorStore

RANKS = (16, 256, 2048)
KEY = MatrixKey("math", 0, "down_proj")
OUT, IN = 4096, 11008


class DecomposedSource:
    """A source of one domain expert whose weights nobody needs any more."""

    experts = ("public", KEY.expert)
    shape = ModelShape(
        hidden_size=OUT, intermediate_size=IN, num_layers=1, vocab_size=8, num_heads=1, num_kv_heads=1, head_dim=8
    )

    def weight(self, key: MatrixKey) -> torch.Tensor:
        raise AssertionError(f"{key} should come from the store")

    def born_factors(self, key: MatrixKey) -> None:
        return None

    def digest(self, key: MatrixKey) -> str:
        return key.expert

    def describe(self) -> list[str]:
        return ["decomposed=here"]


def fill_store(folder: Path) -> FactorStore:
    """A store with random factors of one matrix up to the highest rank."""
    generator = torch.Generator().manual_seed(0)
    a, bt = (torch.randn(max(RANKS), width, generator=generator) for width in (IN, OUT))
    values = torch.ones(max(RANKS), dtype=torch.float64)
    source, writer = DecomposedSource(), StoreWriter(folder)
    result = Decomposition(
        factors=Factors(a, bt),
        singular_values=values,
        residual_energy=0.0,
        method="randomized",
        rejected=(),
        error_ratio=1.0,
    )
    return writer.commit([writer.put(KEY, result, KEY.expert, "public")], source)


@ray.remote(num_cpus=0)
class Plain:
    """The floor: an actor that returns a slice of an array."""

    def __init__(self, size: int) -> None:
        self.array = np.ones(size, np.uint8)

    def give(self, size: int) -> np.ndarray:
        return self.array[:size]


def run(quick: bool = False) -> dict[str, Any]:
    """Median and 90th percentile milliseconds per rank of all three, and their ratios."""
    with tempfile.TemporaryDirectory() as folder, cluster():
        store = fill_store(Path(folder))
        plain = Plain.remote(4 * max(RANKS) * (IN + OUT))
        with start_experts(DecomposedSource(), folder, max_rank=max(RANKS)) as actors:
            rows = [_compare(rank, actors, store, plain, repeats=_repeats(rank, quick)) for rank in RANKS]
            assert actors.holdings()[KEY.expert].decompositions == 0
    _print(rows)
    return {"shape": [OUT, IN], "dtype": "float32", "rows": rows}


def _repeats(rank: int, quick: bool) -> int:
    return (5 if quick else 15) if rank > 1000 else (20 if quick else 100)


def _compare(rank: int, actors: ExpertActors, store: FactorStore, plain: Any, repeats: int) -> dict[str, Any]:
    size = 4 * rank * (IN + OUT)
    ways: dict[str, Callable[[], Any]] = {
        "actor": lambda: actors.factors(KEY, rank),
        "store": lambda: store.factors(KEY, rank),
        "ray_get": lambda: ray.get(plain.give.remote(size)),
    }
    for _ in range(2):  # the first answer of an actor reads the store, the first of each is slow for everyone
        for way in ways.values():
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            given = way()
            times[name].append(1e3 * (time.perf_counter() - start))
            del given
    row: dict[str, Any] = {"rank": rank, "bytes": size, "repeats": repeats}
    for name, values in times.items():
        p90 = statistics.quantiles(values, n=10, method="inclusive")[-1]
        row |= {f"{name}_ms": statistics.median(values), f"{name}_ms_p90": p90}
    return row | {
        "ratio_to_store": row["actor_ms"] / row["store_ms"],
        "ratio_to_ray_get": row["actor_ms"] / row["ray_get_ms"],
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"truncation of a {OUT} x {IN} matrix, float32, milliseconds (median, 90th percentile)")
    print(f"{'rank':>5} {'MiB':>6} {'actor':>15} {'store':>15} {'plain ray.get':>15} {'/store':>7} {'/ray':>6}")
    for row in rows:
        times = " ".join(f"{row[f'{n}_ms']:7.1f} {row[f'{n}_ms_p90']:7.1f}" for n in ("actor", "store", "ray_get"))
        print(
            f"{row['rank']:>5} {row['bytes'] / 2**20:>6.1f} {times} "
            f"{row['ratio_to_store']:>6.2f}x {row['ratio_to_ray_get']:>5.2f}x"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    print(json.dumps(run(**vars(parser.parse_args()))))
