"""Switching the ranks of a 7B-shaped mixture in place, against loading a checkpoint.

    python -m tests.benchmarks.bench_switch

The mixture has the released shapes and 10.75B parameters. Its tensors are allocated and never
written, so it takes address space but hardly any memory, while a switch handles the same 576
matrices as a real one. Loading is measured on a file with one layer's tensors, times 32.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmore_ray.budget import SHAPE_EXPERTS, SHAPES, count_parameters
from flexmore_ray.checkpoint import shared_tensors
from flexmore_ray.mixture import Mixture, Parts
from flexmore_ray.spec import MatrixKey, MixtureSpec, ModelShape
from flexmore_ray.spectra import Factors

RANKS = (2048, 256, 64, 8, 4, 1)
OTHER = (1024, 1024, 256, 64, 8, 1)
HELD = 2048


class UnwrittenSource:
    """A source whose tensors have the right shapes and no content."""

    def __init__(self, shape: ModelShape, experts: tuple[str, ...]) -> None:
        self.shape, self.experts, self.dtype = shape, experts, torch.bfloat16
        self.born_ranks: dict[MatrixKey, int] = {}
        self.config = {
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "vocab_size": shape.vocab_size,
        }
        self.trunk = SimpleNamespace(config={"num_experts_per_tok": 4}, folder=Path("unwritten"))

    def shared(self, name: str) -> Tensor:
        return torch.empty(shared_tensors(self.shape)[name], dtype=self.dtype)

    def weight(self, key: MatrixKey) -> Tensor:
        return torch.empty(self.shape.matrix(key.projection), dtype=self.dtype)

    def router_row(self, expert: str, layer: int) -> Tensor:
        return torch.empty(self.shape.hidden_size, dtype=self.dtype)

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        out, columns = self.shape.matrix(key.projection)
        # lora_b in the layout that a mixture gives it, so that nothing has to be written.
        return Factors(torch.empty(rank, columns, dtype=self.dtype), torch.empty(out, rank, dtype=self.dtype).T)


def run(quick: bool = False) -> dict[str, object]:
    """Median milliseconds of a switch of all six experts, memory it took, and the ratio to loading."""
    shape, experts = SHAPES["flexolmo-7x7b"], SHAPE_EXPERTS["flexolmo-7x7b"]
    source = UnwrittenSource(shape, experts)
    first, second = (dict(zip(experts[1:], ranks, strict=True)) for ranks in (RANKS, OTHER))
    spec = MixtureSpec(ranks=first)
    assignment = spec.assignment(experts, shape, default_active=4)
    mixture = Mixture(Parts(spec, source, source, assignment), torch.device("cpu"), torch.bfloat16, hold_rank=HELD)
    total = count_parameters(shape, experts, assignment).total
    before = _storages(mixture), _resident()
    times = []
    for turn in range(6 if quick else 40):
        start = time.perf_counter()
        mixture.set_ranks((second, first)[turn % 2])
        times.append(1e3 * (time.perf_counter() - start))
    copied = _storages(mixture) != before[0]
    per_layer = _load_seconds(total // shape.num_layers // (64 if quick else 1)) * (64 if quick else 1)
    result = {
        "parameters": total,
        "switch_ms": statistics.median(times),
        "switch_ms_max": max(times),
        "storages_changed": copied,
        "resident_mib_more": (_resident() - before[1]) / 2**20,
        "load_seconds": per_layer * shape.num_layers,
        "ratio": per_layer * shape.num_layers * 1e3 / statistics.median(times),
    }
    print(
        f"rank switch of six experts, {total / 1e9:.2f}B parameters: {result['switch_ms']:.1f} ms median, "
        f"{result['switch_ms_max']:.1f} ms worst; loading the checkpoint {result['load_seconds']:.1f} s: "
        f"{result['ratio']:.0f}x; tensors copied: {'yes' if copied else 'none'}"
    )
    return result


def _storages(mixture: Mixture) -> set[int]:
    return {p.untyped_storage().data_ptr() for name, p in mixture.model.named_parameters() if "gate.weight" not in name}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _load_seconds(parameters: int) -> float:
    """Median seconds of loading this many bfloat16 parameters into memory, from a file in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file({f"t{i}": torch.ones(parameters // 8, dtype=torch.bfloat16) for i in range(8)}, path)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            held = {name: values.clone() for name, values in load_file(path).items()}  # the file itself is mapped
            assert len(held) == 8
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(run()))
