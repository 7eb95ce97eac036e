"""What GPUs do for the paper's grid at its real size: the page cluster/CAPACITY.md, with its arithmetic.

    python -m flexmore_ray.simulate.capacity > cluster/CAPACITY.md

    symbol   meaning                                   symbol   meaning
    d, f     hidden, intermediate size                 K        active experts
    L        layers                                    r        rank
    unit     parameters of one rank of one expert: 3 (d + f) L      dense    those of a full expert: 3 d f L

Nothing here was measured on a GPU; the page says of every number where it is from.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Sequence

from flexmore_ray.budget import SHAPE_EXPERTS, SHAPES, expert_params, format_count, trunk_params
from flexmore_ray.grid import _WRITERS
from flexmore_ray.pool import Unit
from flexmore_ray.simulate import Work, new_unit, simulate
from flexmore_ray.simulate.calibrate import DRIVER_SECONDS, Timing
from flexmore_ray.simulate.forecast import Forecast, duration, forecasts
from flexmore_ray.spec import FULL, PROJECTIONS
from flexmore_ray.tables import Rows, markdown

NAME = "flexolmo-7x7b"
SHAPE, EXPERTS = SHAPES[NAME], SHAPE_EXPERTS[NAME][1:]
TRUNK = trunk_params(SHAPE)
DENSE = expert_params(SHAPE, dict.fromkeys(PROJECTIONS, (FULL,) * SHAPE.num_layers))
UNIT = expert_params(SHAPE, dict.fromkeys(PROJECTIONS, (1,) * SHAPE.num_layers))
KEY_VALUE_BYTES = 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * 2

# published: NVIDIA H200 Tensor Core GPU datasheet, SXM; its 1,979 TFLOPS in bfloat16 are with sparsity
MEMORY, BANDWIDTH, FLOPS = 141e9, 4.8e12, 989e12
# measured: README, and the folders of its runs
SWITCH, RAY_START = 0.0101, 15.0
# assumed
USED_FLOPS, USED_BANDWIDTH = 0.35, 0.5
PASS_SECONDS = 0.030
BATCH_TOKENS, CACHED_TOKENS = 32768, 4 * 32768
TASKS_START, NODE_READ, STORE_READ = 60.0, 2e9, 100e9
MATRIX_SECONDS = 3.0
MATRICES = SHAPE.num_layers * len(PROJECTIONS)
HIGHEST = 2048
"""Rank below the full expert in the paper's grid."""
COMMITS = {"files": (0.010, (1, 8, 64, 512)), "objects": (0.100, (512,))}
"""Seconds of a commit, and on how many GPUs the page shows it."""
PRICE = 3.50
GPUS_PER_NODE, SHARD = 8, 500


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks of one kind."""

    name: str
    tasks: int
    documents: int
    """Per task."""
    tokens: int
    """Of a document by itself: what all documents of a task share is computed once."""
    generated: int
    """Tokens that the model writes for a document."""


# published: numbers of tasks and documents, at most 1,000 of a task as in the paper's scripts; assumed: tokens
GROUPS = (
    Group("MC9", 9, 1000, 100, 0),
    Group("GEN5", 5, 1000, 400, 30),
    Group("MMLU", 57, 237, 120, 0),
    Group("MMLU-Pro", 14, 796, 250, 0),
    Group("BBH", 27, 241, 120, 200),
    Group("AGIEval", 8, 331, 450, 0),
)


TASKS = sum(group.tasks for group in GROUPS)
DOCUMENTS = sum(group.tasks * group.documents for group in GROUPS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Mixtures that cost the same."""

    name: str
    experts: int
    """Kept ones, the public one included."""
    active: int
    rank: float | str
    """Of every domain expert."""
    number: int = 1
    pair: bool = False

    @property
    def parameters(self) -> float:
        """All of them."""
        each = DENSE if self.rank == FULL else float(self.rank) * UNIT
        return TRUNK + DENSE + (self.experts - 1) * each

    @property
    def used(self) -> float:
        """Parameters multiplied with a token, the output layer left out; the choice of experts is taken as even."""
        domain = self.active * (self.experts - 1) / self.experts
        body = TRUNK - 2 * SHAPE.vocab_size * SHAPE.hidden_size
        if self.rank == FULL:
            return body + self.active * DENSE
        return body + DENSE + domain * float(self.rank) * UNIT


def kinds() -> list[Kind]:
    """The mixtures of `--preset paper`: ranks from 4,096 on are the full expert, so 123 of the 150 are distinct."""
    levels: list[int | str] = [*(2**k for k in range(12)), FULL]
    pairs = [Kind(f"pair at {rank}", 2, 2, rank, number=len(EXPERTS), pair=True) for rank in levels]
    uniform = [Kind(f"uniform {rank}, {k} active", 7, k, rank) for k in (2, 4, 7) for rank in levels]
    best = [Kind(f"best, {k} active", 7, k, 2380 / len(EXPERTS), number=2) for k in (2, 4, 7)]
    return [*pairs, *uniform, *best]


DISTINCT = sum(kind.number for kind in kinds())
CELLS = DISTINCT * TASKS


def unit_seconds(kind: Kind, group: Group, documents: int) -> float:
    """Seconds of some documents of a task on one GPU."""
    read = documents * group.tokens * 2 * kind.used / (FLOPS * USED_FLOPS)
    passes = -(-documents * group.tokens // BATCH_TOKENS)
    written = 0.0
    if group.generated:
        batch = max(1, BATCH_TOKENS // (group.tokens + group.generated))
        written = -(-documents // batch) * group.generated * step_seconds(kind)
    return read + passes * PASS_SECONDS + written


def step_seconds(kind: Kind) -> float:
    """Seconds of one step of generation: all weights are read once, or the host is slower."""
    return max(PASS_SECONDS, 2 * kind.parameters / (BANDWIDTH * USED_BANDWIDTH))


def grid_units() -> tuple[list[Unit], list[Unit]]:
    """The units of the grid, and of its second stage."""
    first: list[Unit] = []
    later: list[Unit] = []
    for kind in kinds():
        for number in range(kind.number):
            units = later if kind.name.startswith("best") else first
            units += _mixture_units(kind, number)
    return first, later


def _mixture_units(kind: Kind, number: int) -> Iterator[Unit]:
    cut = kind.rank != FULL
    experts = ((EXPERTS[number],) if kind.pair else EXPERTS) if cut else ()
    for group in GROUPS:
        parts = -(-group.documents // SHARD)
        documents = -(-group.documents // parts)
        seconds = unit_seconds(kind, group, documents)
        for task in range(group.tasks):
            for part in range(parts):
                work = Work(
                    mixture=(kind.name, number),
                    seconds=seconds,
                    documents=documents,
                    content=(group.name, task, part),
                    experts=experts,
                    early=kind.pair,
                )
                yield new_unit(work, (kind.name, number, group.name, task))


def timing(workers: int, commit: float, *, decomposed: bool) -> Timing:
    """What a run takes beside its cells; the experts decompose side by side."""
    nodes = -(-workers // GPUS_PER_NODE)
    full = 2 * (TRUNK + 7 * DENSE)
    load = max(full / NODE_READ, nodes * full / STORE_READ)
    return Timing(
        start=RAY_START + TASKS_START + load,
        decompose=0.0 if decomposed else MATRICES * MATRIX_SECONDS,
        switch=SWITCH,
        driver=DRIVER_SECONDS,
        commit=commit,
    )


def predictions(commit: float, *, clusters: Sequence[int], decomposed: bool = False) -> list[Forecast]:
    """The grid on clusters of so many GPUs, one worker on each."""
    first, later = grid_units()
    return forecasts(
        lambda workers: simulate(first, workers, timing(workers, commit, decomposed=decomposed), later), clusters, PRICE
    )


# ------------------------------------------------------------------------------------- the page


def page() -> str:
    """cluster/CAPACITY.md."""
    return "\n\n".join([_head(), _memory(), _speed(), _start(), _grid()])


def _text(*sentences: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(sentences), width=118, break_long_words=False, break_on_hyphens=False)


def _table(rows: Rows) -> str:
    return markdown(rows).rstrip()


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def _head() -> str:
    title = "# Capacity: the paper's grid at 7B size"
    about = _text(
        "150 mixtures x 120 tasks of [FlexMoRE](https://arxiv.org/abs/2602.08818) on NVIDIA H200 GPUs, one worker on",
        "each. Written by `python -m flexmore_ray.simulate.capacity`; a test compares. (p) published, (m) measured by",
        "us, (a) assumed, (c) computed from these. **Nothing here was measured on a GPU**: put a run of your own and",
        "`flexmore simulate` in place of what is assumed.",
    )
    gpu = _text(
        f"One H200 (p: NVIDIA H200 datasheet, SXM): {_gb(MEMORY)} of memory, {BANDWIDTH / 1e12:.1f} TB/s,",
        f"{FLOPS / 1e12:.0f} TFLOPS in dense bfloat16 (the datasheet's 1,979 are with sparsity). Of these (a)",
        f"{100 * USED_FLOPS:.0f} % of the TFLOPS when prompts are read and {100 * USED_BANDWIDTH:.0f} % of the",
        "bandwidth",
        f"when text is written; and no forward pass takes less than {1000 * PASS_SECONDS:.0f} ms, for the host groups",
        f"tokens by expert in each of {SHAPE.num_layers} layers.",
    )
    return "\n\n".join([title, about, gpu])


def _memory() -> str:
    full, held = 2 * (TRUNK + 7 * DENSE), 2 * len(EXPERTS) * HIGHEST * UNIT
    free, cached = MEMORY - full - held, f"{KEY_VALUE_BYTES / 1e6:.3f} MB"
    rows = [
        ["bytes in bfloat16", "arithmetic", ""],
        ["seven full experts", f"2 x ({format_count(TRUNK)} + 7 x {format_count(DENSE)})", _gb(full)],
        [f"six experts' factors up to rank {HIGHEST:,}", f"2 x 6 x {HIGHEST:,} x {format_count(UNIT)}", _gb(held)],
        ["left for keys, values, activations", f"{_gb(MEMORY)} - {_gb(full)} - {_gb(held)}", _gb(free)],
        ["keys and values of a position", f"2 x 2 x {SHAPE.num_layers} x {SHAPE.hidden_size:,}", cached],
        ["those that the harness holds at most", f"{CACHED_TOKENS:,} x {cached}", _gb(CACHED_TOKENS * KEY_VALUE_BYTES)],
    ]
    fits = _text(
        f"All that the grid visits fits on one GPU, so ranks are switched in place ({1000 * SWITCH:.1f} ms, m).",
        "What is",
        f"left holds {free / KEY_VALUE_BYTES:,.0f} positions, fewer than the harness may hold where documents",
        "share long",
        "prompts: there run the full experts in a grid apart from the high ranks. In the shared-base form at 10.75B",
        f"parameters (ranks that add up to 2,380) the weights are {_gb(2 * (TRUNK + DENSE + 2380 * UNIT))}.",
    )
    store = len(EXPERTS) * UNIT
    disk = _text(
        f"The store has {_gb(4 * 4096 * store)} with all ranks in float32 (6 x 4,096 x {format_count(UNIT)} x 4",
        "bytes),",
        f"{_gb(2 * 4096 * store)} in bfloat16, {_gb(2 * HIGHEST * store)} up to rank {HIGHEST:,} in bfloat16,",
        "which is all",
        "that this grid needs. Results take 12 KB a cell and 100 bytes a document (m):",
        f"{_gb(CELLS * 12e3 + DOCUMENTS * DISTINCT * 100)} in all.",
    )
    return "\n\n".join(["## Weights and disk (c)", _table(rows), fits, disk])


def _speed() -> str:
    rows = [["mixture", "parameters", "used per token", "tokens read/s", "documents/s", "its 120 tasks"]]
    for kind in (kind for kind in kinds() if kind.name in _SHOWN):
        seconds = sum(unit_seconds(kind, group, group.documents) * group.tasks for group in GROUPS)
        counts = [format_count(round(kind.parameters)), format_count(round(kind.used))]
        speeds = [f"{FLOPS * USED_FLOPS / (2 * kind.used):,.0f}", f"{DOCUMENTS / seconds:,.0f}"]
        rows.append([kind.name, *counts, *speeds, duration(seconds)])
    groups = [["group", "tasks (p)", "documents each (p)", "own tokens (a)", "written tokens (a)"]]
    groups += [[g.name, *(f"{n:,}" for n in (g.tasks, g.documents, g.tokens, g.generated))] for g in GROUPS]
    how = _text(
        f"{DOCUMENTS:,} documents a mixture, at most 1,000 of a task as in the paper's scripts. What the",
        "documents of a",
        f"task share is read once, and left out here. Tokens read per second: {FLOPS / 1e12:.0f} TFLOPS x",
        f"{USED_FLOPS} /",
        "(2 x used parameters); the public expert counts once per token however many corrections are chosen. A step of",
        f"writing reads all weights, 2 x parameters / ({BANDWIDTH / 1e12:.1f} TB/s x {USED_BANDWIDTH}), and takes",
        f"{1000 * PASS_SECONDS:.0f} ms at least, which is more. Attention scores and the output layer are left",
        "out: a few",
        "percent.",
    )
    return "\n\n".join(["## Speed of one GPU (c)", _table(groups), how, _table(rows)])


_SHOWN = (
    *("pair at 1", "pair at 2048", "pair at full", "uniform 64, 4 active", "best, 4 active"),
    *("uniform full, 2 active", "uniform full, 4 active", "uniform full, 7 active"),
)


def _start() -> str:
    full, gram = 2 * (TRUNK + 7 * DENSE), 2 * SHAPE.hidden_size**2 * SHAPE.intermediate_size
    one, many = timing(1, 0, decomposed=False), timing(512, 0, decomposed=False)
    size = f"{SHAPE.hidden_size:,} x {SHAPE.intermediate_size:,}"
    once = _text(
        f"Once per store: {MATRICES} matrices of {size} an expert, {MATRIX_SECONDS:.0f} s each (a: its two",
        "large products",
        f"take {2 * gram / 1e12:.2f} TFLOP; the rest is an eigendecomposition of {SHAPE.hidden_size:,} x",
        f"{SHAPE.hidden_size:,}, the check, and writing {_gb(4 * 4096 * UNIT / MATRICES)}).",
        f"{duration(one.decompose)} an",
        f"expert; {duration(len(EXPERTS) * one.decompose)} where one GPU does them one after the other. The",
        "grid asks for",
        "an expert when a mixture first needs it; `flexmore decompose` does all of them side by side before it.",
    )
    load = _text(
        f"A worker starts in {one.start:.0f} s: {RAY_START:.0f} s (m: Ray, processes, libraries, on two CPU cores) +",
        f"{TASKS_START:.0f} s (a: 120 tasks) + {_gb(full)} read once per node at {NODE_READ / 1e9:.0f} GB/s",
        "(a). 64 nodes",
        f"read {64 * full / 1e12:.1f} TB: {many.start - RAY_START - TASKS_START:.0f} s at",
        f"{STORE_READ / 1e9:.0f} GB/s of",
        "their storage in all (a). From then on the network carries results alone.",
    )
    return "\n\n".join(["## Decomposition and start", once, load])


def _grid() -> str:
    first, later = grid_units()
    rows = [["GPUs", "nodes", "results in", "makespan", "busy", "limited by", "GPU hours", f"at ${PRICE:.2f} (a)"]]
    for place, (commit, clusters) in COMMITS.items():
        for found in predictions(commit, clusters=clusters):
            counts = [f"{found.workers:,}", f"{-(-found.workers // GPUS_PER_NODE)}", place]
            times = [duration(found.outcome.makespan), f"{100 * found.outcome.busy:.0f} %", found.outcome.limit]
            rows.append([*counts, *times, f"{found.worker_hours:,.1f}", f"${found.cost or 0:,.0f}"])
    (files, _), (objects, _) = COMMITS.values()
    (again,) = predictions(files, decomposed=True, clusters=(8,))
    how = _text(
        f"150 mixtures, of which {DISTINCT} are distinct (ranks from 4,096 on are the full expert), x 120 tasks",
        f"= {CELLS:,}",
        f"cells in {len(first) + len(later):,} units of up to {SHARD} documents; start and decomposition included; the",
        f"cost is that of the GPUs while they are held. A commit takes {1000 * files:.0f} ms in files and",
        f"{1000 * objects:.0f} ms in an object store (a), in {_WRITERS} threads of one driver, which needs",
        f"{1000 * DRIVER_SECONDS:.0f} ms a cell itself (m).",
    )
    end = _text(
        f"With a store that is there already 8 GPUs take {duration(again.outcome.makespan)}. At 64 nodes a grid",
        "of this",
        "size costs more than it saves: start and decomposition take as long as the work. One driver commits to an",
        f"object store no faster than {CELLS:,} x {objects} s / {_WRITERS} = {duration(CELLS * objects / _WRITERS)}.",
    )
    return "\n\n".join(["## The grid, simulated with its own scheduler", how, _table(rows), end])


if __name__ == "__main__":
    sys.stdout.write(page() + "\n")
