"""What a mixture is scored on, rung by rung, and the cells that keep the scores.

The documents of every task stand in one random order, the same for all mixtures and searches. Rung k of K scores the
first reduction^(k - K + 1) of a task's documents (k from 0), so trials that reached the same rung are compared on the
same documents, and each rung adds a block to the ones before. A block's score is a cell of its own; the score at a
rung is made of the documents of all its blocks together, by lm-eval's own functions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from flexmore_ray.errors import TaskError, UsageError
from flexmore_ray.evaluate import cell_key
from flexmore_ray.plan import PlannedMixture
from flexmore_ray.results import CellKey, commit_cell, done_cells, parse_samples, read_cell, read_samples
from flexmore_ray.scores import PreparedTask, Scores, Split, TaskScore, TaskSet, load_tasks
from flexmore_ray.storage import AnyPath

_ORDER_SEED = 20260208
"""Of the order of documents: fixed, so that searches on the same weights share their cells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Some documents of one task."""

    task: str
    split: Split
    """Which of the objective's two task sets it is of."""
    documents: tuple[int, ...]
    selection: str
    """Names the documents in a cell's identity; empty: all of the task."""


class Objective:
    """Scores on the validation split by rungs, and on the test split.

    Args:
        tasks: what `load_suite` accepts.
        seed: of few-shot examples; see `load_tasks`.
        limit: documents per task to choose by, >= 1; None: all of the validation split.
        test_limit: documents per task to report on, >= 1; None: all of the test split.
        rungs: K, >= 1; fewer where a task's documents are fewer than reduction^(K - 1).
        reduction: how many times more documents each rung has than the one before, >= 2.
        results: folder of the cells.
        dtype: name of the dtype that models compute in.

    Raises:
        UsageError: an unknown task, a task without a validation split, or a number that breaks its rule.
        TaskError: a task's data cannot be had.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        limit: int | None,
        test_limit: int | None,
        rungs: int,
        reduction: int,
        results: AnyPath,
        dtype: str,
    ) -> None:
        for name, value, low in (
            ("limit", limit, 1),
            ("test-limit", test_limit, 1),
            ("rungs", rungs, 1),
            ("reduction", reduction, 2),
        ):
            if value is not None and value < low:
                raise UsageError(f"--{name}: at least {low}, got {value}")
        self.results, self.dtype = results, dtype
        self.sets: dict[Split, TaskSet] = {
            "validation": _load_validation(tasks, seed),
            "test": load_tasks(list(tasks), split="test", seed=seed),
        }
        self.halved = [n for n, task in self.sets["test"].tasks.items() if task.split == "validation"]
        """Tasks without a test split: the second half of their validation documents is kept for the end."""
        orders = {name: self._order(task) for name, task in self.sets["validation"].tasks.items()}
        largest = max(min(limit or len(order), len(order)) for order in orders.values())
        self.num_rungs = min(rungs, 1 + math.floor(math.log(largest, reduction) + 1e-9))
        self.sizes = [_size(largest, rung, self.num_rungs, reduction) for rung in range(self.num_rungs)]
        self.rungs = [
            [block for name, order in orders.items() for block in self._block(name, order, limit, rung, reduction)]
            for rung in range(self.num_rungs)
        ]
        """Per rung, the blocks that it adds."""
        self.test = [self._test_block(task, test_limit) for task in self.sets["test"].tasks.values()]
        """The blocks of the test split."""
        self._held: dict[str, dict[Block, TaskScore]] = {}

    def documents(self, rung: int) -> int:
        """Documents of all tasks up to a rung."""
        return sum(len(block.documents) for blocks in self.rungs[: rung + 1] for block in blocks)

    @property
    def test_documents(self) -> int:
        """Documents of all tasks on the test split."""
        return sum(len(block.documents) for block in self.test)

    def task(self, block: Block) -> PreparedTask:
        """The task that a block is of."""
        return self.sets[block.split].tasks[block.task]

    def key(self, mixture_id: str, block: Block) -> CellKey:
        """The identity of a block's cell."""
        return dataclasses.replace(cell_key(mixture_id, self.dtype, self.task(block)), selection=block.selection)

    def known(self, mixture_id: str, blocks: Sequence[Block]) -> bool:
        """Whether the cells of all blocks are there."""
        cells = {self.key(mixture_id, block).cell for block in blocks}
        return done_cells(self.results, cells) == cells

    def take(self, mixture: PlannedMixture, block: Block, score: TaskScore, weights: str) -> None:
        """Keep a block's score: commit its cell, and hold it until `release`."""
        self._held.setdefault(mixture.mixture_id, {})[block] = score
        commit_cell(
            self.results,
            self.key(mixture.mixture_id, block),
            score,
            mixture=mixture.spec.to_dict(),
            active=mixture.active,
            parameters=mixture.parameters,
            weights=weights,
            group=self.task(block).group.name,
        )

    def release(self, mixture_id: str) -> None:
        """Forget what is held of a mixture; its cells stay."""
        self._held.pop(mixture_id, None)

    def scores(self, mixture_id: str, rung: int) -> Scores:
        """Scores on all documents up to a rung, whose blocks are held or committed."""
        parts: dict[str, list[TaskScore]] = {}
        for block in (block for blocks in self.rungs[: rung + 1] for block in blocks):
            parts.setdefault(block.task, []).append(self._score(mixture_id, block))
        tasks = self.sets["validation"]
        return tasks.collect([tasks.tasks[name].merge(scores) for name, scores in parts.items()])

    def test_scores(self, mixture_id: str) -> Scores:
        """Scores on the test split, whose blocks are held or committed."""
        return self.sets["test"].collect([self._score(mixture_id, block) for block in self.test])

    def _score(self, mixture_id: str, block: Block) -> TaskScore:
        held = self._held.setdefault(mixture_id, {})
        if block not in held:
            key = self.key(mixture_id, block)
            row = read_cell(self.results, key)
            samples = parse_samples(read_samples(self.results, [key.cell]))
            held[block] = self.task(block).aggregate(samples, row["seconds"])
        return held[block]

    def _order(self, task: PreparedTask) -> list[int]:
        """The documents to choose by, in their order; those kept for the end are not among them."""
        order = _shuffled(task)
        return order[: max(1, len(order) // 2)] if task.name in self.halved else order

    def _block(self, name: str, order: list[int], limit: int | None, rung: int, reduction: int) -> list[Block]:
        last = min(limit or len(order), len(order))
        low = _size(last, rung - 1, self.num_rungs, reduction) if rung else 0
        high = _size(last, rung, self.num_rungs, reduction)
        return [_block(self.sets["validation"].tasks[name], "validation", order, low, high)] if low < high else []

    def _test_block(self, task: PreparedTask, limit: int | None) -> Block:
        order = _shuffled(task)
        low = max(1, len(order) // 2) if task.name in self.halved else 0
        if low == len(order):
            raise UsageError(f"task {task.name}: one document is too few to choose by and to report on; leave it out")
        high = len(order) if limit is None else min(low + limit, len(order))
        return _block(task, "test", order, low, high)


def _size(last: int, rung: int, rungs: int, reduction: int) -> int:
    """Documents up to a rung, of a task with `last` up to the last one."""
    return math.ceil(last / reduction ** (rungs - 1 - rung))


def _shuffled(task: PreparedTask) -> list[int]:
    name = int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:8])
    return np.random.default_rng([_ORDER_SEED, name]).permutation(list(task.documents)).tolist()


def _block(task: PreparedTask, split: Split, order: Sequence[int], low: int, high: int) -> Block:
    everything = low == 0 and high == len(task.documents)
    selection = "" if everything else f"random {_ORDER_SEED} {low}:{high}"
    return Block(task=task.name, split=split, documents=tuple(sorted(order[low:high])), selection=selection)


def _load_validation(tasks: Sequence[str], seed: int) -> TaskSet:
    try:
        return load_tasks(list(tasks), split="validation", seed=seed)
    except TaskError as error:
        if "no validation split" not in str(error):
            raise
        name = str(error).split()[1]
        raise UsageError(
            f"task {name} has no validation split, and a search must not choose by its test split; leave it out, or "
            "give the task a validation_split (a part of its training data) in a task file of your own"
        ) from None
