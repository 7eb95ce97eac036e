"""The worker of a grid: an ordinary class, which the grid runs as a Ray actor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ray
import torch

from flexmore_ray.errors import FlexmoreError, TaskError, UsageError
from flexmore_ray.evaluate import use_few_threads
from flexmore_ray.harness import MixtureLM
from flexmore_ray.mixture import Mixture, load_mixture, load_tokenizer
from flexmore_ray.scores import PreparedTask, Split, TaskScore, load_tasks
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.store import FactorSource


class Worker:
    """Scores mixtures on tasks; holds one mixture in memory and switches its ranks in place.

    Args:
        base: the spec of the source, every expert full.
        tasks: by split, the arguments of `load_tasks`.
        factors: where factors come from; None where no mixture needs any.
        device: where to compute.
        dtype: what to compute in.
        hold_rank: ranks up to this one are a slice of what is held.
    """

    def __init__(
        self,
        base: MixtureSpec,
        tasks: Mapping[Split, Mapping[str, Any]],
        factors: FactorSource | None,
        device: str,
        dtype: str,
        hold_rank: int,
    ) -> None:
        self._base, self._task_arguments, self._factors = base, tasks, factors
        self._device, self._dtype, self._hold_rank = device, dtype, hold_rank
        self._mixture: Mixture | None = None
        self._tasks: dict[Split, dict[str, PreparedTask]] = {}

    def start(self) -> str:
        """Load the tasks and open the source; returns the id of the node."""
        source = open_source(self._base.source, self._base.experts)
        load_tokenizer(source)
        use_few_threads(source.shape.hidden_size)
        if self._device == "cuda" and not torch.cuda.is_available():
            raise UsageError("a worker was given a GPU, but PyTorch sees none; install its CUDA build on the nodes")
        self._source = source
        for split, arguments in self._task_arguments.items():
            self._tasks[split] = load_tasks(**arguments, split=split).tasks
        return str(ray.get_runtime_context().get_node_id())

    def run(
        self, ranks: Mapping[str, Any], active: int, split: Split, task: str, content: str, documents: Any
    ) -> TaskScore:
        """Score a mixture on a task of a split, or on some of its documents (ids; None: all).

        Raises:
            FlexmoreError: the mixture cannot be made, the task fails on a document, or this node has other documents
                under the task's name than the driver.
        """
        prepared = self._tasks[split][task]
        if prepared.content_hash != content:
            raise UsageError(f"task {task}: this node has other documents than the driver; use the same data on all")
        try:
            self._switch(ranks, active)
            return prepared.score(self._lm, documents)
        except FlexmoreError:
            raise
        except Exception as error:  # of a library; not every such exception can be sent
            raise TaskError(f"task {task}: {type(error).__name__}: {error}") from None

    def _switch(self, ranks: Mapping[str, Any], active: int) -> None:
        if self._mixture is None:
            spec = dataclasses.replace(self._base, ranks=dict(ranks), active=active)
            mixture = load_mixture(
                spec,
                device=self._device,
                dtype=self._dtype,
                source=self._source,
                factors=self._factors,
                hold_rank=self._hold_rank,
            )
            self._lm = MixtureLM(mixture.model, mixture.tokenizer)
            self._mixture = mixture
        else:
            self._mixture.switch(ranks, active)
