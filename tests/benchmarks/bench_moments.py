"""What moments cost: gathering beside a plain pass, decomposing in their metric beside the plain one, and memory.

    python -m tests.benchmarks.bench_moments [--quick]

A plain pass is forward and backward of the same two-expert mixture over the same batches, down to the same layer. The
times of a run are those between two batches, so that loading the model and writing the files do not count. Ratios say
how many times as long ours takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmore_ray.mixture import load_mixture
from flexmore_ray.moments import FORMS, MatrixMoments, Moment, decompose_weighted
from flexmore_ray.moments.files import Settings
from flexmore_ray.moments.gather import gather, layer_bytes
from flexmore_ray.pairs import PairExperts, own_mixture, replaced_experts
from flexmore_ray.source import Source, open_source
from flexmore_ray.spectra import decompose
from flexmore_ray.texts import batches, encode, pad_documents, read_documents
from flexmore_ray.zoo.tokenizer import write_tokenizer
from tests.benchmarks.bench_decompose import QUICK_SHAPE, SHAPE, make_delta
from tests.common import random_model, write

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"


def run(quick: bool = False) -> dict[str, Any]:
    """Measure all three and print tables."""
    with tempfile.TemporaryDirectory() as folder:
        wide = wide_model(Path(folder) / "wide")
        rows = [
            row
            for name, source, tokens in (("nano", "zoo://nano", 4096), ("wide", str(wide), 512))
            for row in gathering(name, source, tokens, Path(folder), number=3 if quick else 4)
        ]
        memory = measured_memory(wide, Path(folder))
    shape = QUICK_SHAPE if quick else SHAPE
    result = {
        "gathering": rows,
        "memory": memory,
        "shape": shape,
        "threads": torch.get_num_threads(),
        "decomposing": decomposing(shape, repeats=3 if quick else 1),
    }
    print_tables(result)
    return result


def wide_model(folder: Path) -> Path:
    """A random model that is wider than nano."""
    write(random_model(2, active=2, vocab_size=128, **WIDE), folder, expert_names=["public", "math"])
    write_tokenizer(folder)
    return folder


# ------------------------------------------------------------------------------------- gathering


def gathering(name: str, source: str, tokens: int, folder: Path, number: int) -> list[dict[str, Any]]:
    """Seconds of a batch in each form, and of a plain pass."""
    opened, data = open_source([source]), folder / f"{name}.txt"
    draw, length = random.Random(0), 64
    lines = ["".join(draw.choices(LETTERS, k=length)) for _ in range(number * tokens // length)]
    data.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    plain = plain_pass(opened, data, tokens)
    rows = []
    for form in FORMS:
        marks: list[float] = []
        gather(
            opened,
            {"math": data},
            folder / f"{name}-{form}",
            Settings(form=form),
            batch_tokens=tokens,
            progress=lambda *_, marks=marks: marks.append(time.perf_counter()),
        )
        seconds = statistics.median(b - a for a, b in itertools.pairwise(marks[:-1]))  # files are written in the last
        rows.append({"model": name, "form": form, "seconds": seconds, "plain": plain, "ratio": seconds / plain})
    return rows


def plain_pass(source: Source, data: Path, tokens: int) -> float:
    """Median seconds of forward and backward of a batch, no weight asking for a gradient."""
    mixture = load_mixture(own_mixture(source, "math"), source=source)
    documents = encode(mixture.tokenizer, read_documents(data), 512)
    layers = range(source.shape.num_layers)
    marks = [time.perf_counter()]
    with replaced_experts(mixture.model, {0: _Leaf} | dict.fromkeys(layers[1:], PairExperts)):
        for _, batch in batches(documents, tokens):
            ids, predicted = pad_documents(batch, torch.device("cpu"))
            logits = mixture.model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            (logits.gather(-1, ids[:, 1:, None])[..., 0] * predicted[:, 1:]).sum().backward()
            marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(marks[1:]))


class _Leaf(PairExperts):
    """The experts of the layer at which the backward pass ends."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return super().forward(x.detach().requires_grad_(), *rest)


# ------------------------------------------------------------------------------------- decomposing


def decomposing(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of a weighted and a plain decomposition, in turn."""
    delta, rank = make_delta("power", shape), shape[0] // 8
    moments = {form: _moments(shape, form) for form in ("full", "low-rank+diagonal")}
    rows = []
    for max_rank in (None, rank):
        calls: dict[str, Callable[[], object]] = {"plain": lambda r=max_rank: decompose(delta, r)}
        for form, held in moments.items():
            calls[form] = lambda r=max_rank, held=held: decompose_weighted(delta, held, "both", r)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        plain = statistics.median(times["plain"])
        for form in moments:
            seconds = statistics.median(times[form])
            rows.append({"rank": max_rank, "form": form, "seconds": seconds, "plain": plain, "ratio": seconds / plain})
    return rows


def _moments(shape: tuple[int, int], form: Any) -> MatrixMoments:
    """Moments of a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for size in shape:
        vectors = torch.randn(512, size, generator=generator) * torch.arange(1, size + 1) ** -0.5
        sides.append(Moment.zero(size, form).add(vectors, torch.ones(len(vectors))))
    return MatrixMoments(input=sides[1], output=sides[0], tokens=512)


# ------------------------------------------------------------------------------------- memory


def measured_memory(wide: Path, folder: Path) -> dict[str, Any]:
    """Growth of a fresh process while it gathers one layer at a time, full beside diagonal moments."""
    grown = {}
    for form in ("diagonal", "full"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_moments", "--memory", str(wide), form]
        grown[form] = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout)
    said = layer_bytes(open_source([str(wide)]).shape, Settings())
    return {"said": said, "measured": grown["full"] - grown["diagonal"]}


def measure_memory(wide: str, form: Any) -> int:
    """Bytes by which this process grows at most, from the model being loaded on."""
    source, page = open_source([wide]), os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.txt"
        data.write_text(("ab" * 32 + "\n") * 16, encoding="utf-8")
        with open("/proc/self/statm", encoding="ascii") as file:
            before = int(file.read().split()[1]) * page
        settings = Settings(form=form)
        gather(source, {"math": data}, Path(folder) / "m", settings, memory=layer_bytes(source.shape, settings))
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return peak - before


def print_tables(result: dict[str, Any]) -> None:
    """The rows for people."""
    print(f"seconds of a batch, as a ratio to forward and backward alone, {result['threads']} threads")
    for row in result["gathering"]:
        print(f"{row['model']:6} {row['form']:18} {row['seconds']:8.3f} {row['plain']:8.3f} {row['ratio']:6.2f}x")
    memory = result["memory"]
    print(
        f"full moments of a layer, wide: {memory['said']:,} bytes, {memory['measured'] / memory['said']:.2f}x measured"
    )
    out, inner = result["shape"]
    print(f"weighted (both) beside plain decomposition, {out} x {inner}")
    for row in result["decomposing"]:
        rank = row["rank"] or "full"
        print(f"{rank:>6} {row['form']:18} {row['seconds']:8.2f} {row['plain']:8.2f} {row['ratio']:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small matrices, few repetitions")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(measure_memory(*args.memory) if args.memory else json.dumps(run(quick=args.quick)))


if __name__ == "__main__":
    main()
