"""Score mixtures on tasks into a results folder, doing only what is missing there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from flexmore_ray.harness import MixtureLM
from flexmore_ray.mixture import Mixture
from flexmore_ray.results import CellKey, commit_cell, has_cell, read_cell
from flexmore_ray.scores import PreparedTask, TaskSet
from flexmore_ray.storage import AnyPath

SMALL_HIDDEN_SIZE = 512


def use_few_threads(hidden_size: int) -> None:
    """Compute with one thread in this process if the model is small.

    Two threads gain little on small matrices, and where another process wants the same cores they
    spend their time waiting for each other: five times slower was seen.
    """
    if hidden_size < SMALL_HIDDEN_SIZE:
        torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The committed score of one mixture on one task."""

    task: str
    group: str
    metric: str
    value: float
    stderr: float | None
    documents: int


def cell_key(mixture_id: str, dtype: str, task: PreparedTask) -> CellKey:
    """The identity of a cell: everything that decides its result."""
    return CellKey(
        mixture_id=mixture_id,
        dtype=dtype,
        task=task.name,
        task_version=task.version,
        num_fewshot=task.num_fewshot,
        split=task.split,
        limit=task.limit,
        seed=task.seed,
        task_hash=task.content_hash,
    )


def evaluate(mixture: Mixture, tasks: TaskSet, results: AnyPath, lm: MixtureLM | None = None) -> Iterator[Cell]:
    """Score a mixture on every task, committing each cell; cells that are there already are read.

    Args:
        mixture: the mixture, at the ranks that it has now.
        tasks: what `load_tasks` made.
        results: the results folder; made if missing.
        lm: the harness around the mixture's model, to be used again for the next mixture; None
            makes one.

    Raises:
        TaskError: a task fails on a document; the cells before it are kept.
        FlexmoreError: the folder cannot be written.
    """
    lm = lm or MixtureLM(mixture.model, mixture.tokenizer)
    mixture_id, dtype = mixture.spec.mixture_id, str(mixture.model.dtype).removeprefix("torch.")
    assert mixture_id is not None
    for task in tasks.tasks.values():
        key = cell_key(mixture_id, dtype, task)
        if not has_cell(results, key):
            commit_cell(
                results,
                key,
                task.score(lm),
                mixture=mixture.spec.to_dict(),
                active=mixture.assignment.active,
                parameters=mixture.count().total,
                weights=mixture.weights,
            )
        row = read_cell(results, key)
        yield Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


def summarise(cells: Iterable[Cell]) -> dict[str, Any]:
    """`score` (average of group means), `groups.{NAME}` and `tasks.{NAME}`, each in [0, 1]."""
    cells = list(cells)
    groups: dict[str, list[float]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell.value)
    means = {name: sum(values) / len(values) for name, values in groups.items()}
    return {
        "score": sum(means.values()) / len(means),
        "groups": means,
        "tasks": {cell.task: cell.value for cell in cells},
    }


def score_table(cells: Iterable[Cell], kinds: Mapping[str, str | None]) -> str:
    """Scores in percent as text: the tasks of each group under its mean."""
    cells = list(cells)
    summary = summarise(cells)
    width = max(len(cell.task) + 2 for cell in cells)
    lines = []
    for group, mean in summary["groups"].items():
        lines.append(f"{group:<{width}}  {100 * mean:6.2f}  {kinds.get(group) or ''}".rstrip())
        for cell in (cell for cell in cells if cell.group == group):
            error = "" if cell.stderr is None else f" +- {100 * cell.stderr:.2f}"
            what = f"{cell.metric}, {cell.documents} documents"
            lines.append(f"  {cell.task:<{width - 2}}  {100 * cell.value:6.2f}{error}  {what}")
    return "\n".join([*lines, f"{'average of groups':<{width}}  {100 * summary['score']:6.2f}"])
