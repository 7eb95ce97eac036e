"""Healing on several processes: data-parallel workers of Ray Train, on CPUs (gloo) or GPUs (NCCL).

Worker 0 writes the checkpoint, which every worker reads when it starts: a run goes on with another number of workers,
and workers that died are started again from there.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.heal.training import Progress, Team, Texts, Training
from flexmore_ray.placement import Needs, offer
from flexmore_ray.runtime import nodes, on_running_cluster
from flexmore_ray.spec import MatrixKey
from flexmore_ray.spectra import Factors

_train: Any = ray.train  # whose types, for mypy, are those of its first version

MAX_FAILURES = 3
"""Times that workers may die before a run is given up."""
_START_TRIES = 10
"""Minutes that workers may take to find room."""
_LOOK_SECONDS = 0.2


class Workers:
    """Trains experts on workers of the cluster that this process is connected to; see `training.Train`.

    Args:
        count: how many workers; each reserves one CPU.
        gpus: 1 where each trains on a GPU of its own, else 0.

    Raises:
        UsageError: there are no such workers.
    """

    def __init__(self, count: int, gpus: int = 0) -> None:
        self._count, self._needs = count, Needs(num_cpus=1, num_gpus=gpus)
        if count < 1:
            raise UsageError(f"--workers: an integer >= 1 is needed, got {count}")
        if gpus not in (0, 1):
            raise UsageError(f"--gpus: 0 or 1 is needed, as a worker trains on one GPU; got {gpus}")

    def __call__(
        self, training: Training, texts: Texts, recipe: str, progress: Progress | None
    ) -> dict[MatrixKey, Factors]:
        """Train, and read what the workers have written.

        Raises:
            UsageError: the cluster has no room for the workers.
            FlexmoreError: what a worker raised, or workers died too often.
        """
        self._check_room()
        board: Any = ray.remote(num_cpus=0, **_here())(Board).remote()
        with tempfile.TemporaryDirectory(prefix="flexmore-") as folder:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"open": training.elsewhere(), "texts": texts, "recipe": recipe, "board": board},
                scaling_config=_train.ScalingConfig(
                    num_workers=self._count,
                    use_gpu=bool(self._needs.num_gpus),
                    resources_per_worker={"CPU": self._needs.num_cpus},
                ),
                run_config=_train.RunConfig(
                    name="heal",
                    storage_path=folder,
                    failure_config=_train.FailureConfig(
                        max_failures=MAX_FAILURES, controller_failure_limit=_START_TRIES
                    ),
                    logging_config=_train.LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                run = _in_thread(trainer.fit)
                while not run.done():
                    _tell(board, progress)
                    with contextlib.suppress(TimeoutError):
                        run.exception(_LOOK_SECONDS)
                _tell(board, progress)
                error = ray.get(board.error.remote())
            finally:
                ray.kill(board)  # ends workers that would go on without this process
        if error is not None:
            raise error
        try:
            run.result()
        except _train.TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values()) or [error]
            reason = str(failures[0]).strip().splitlines()[-1][:300]
            raise FlexmoreError(
                f"workers failed ({reason}); what was trained is kept, run the command again"
            ) from error
        return training.finished(recipe)

    def _check_room(self) -> None:
        if sum(map(self._needs.capacity, nodes())) < self._count:
            lack = f"{self._count} workers ask for {self._needs} each; the cluster has {offer(nodes())}"
            if not on_running_cluster():
                raise UsageError(f"--workers, --gpus: {lack}; give fewer")
            print(f"note: {lack}; waiting", file=sys.stderr, flush=True)  # an autoscaler may add nodes for them


def _here() -> dict[str, Any]:
    """Options of an actor on the node of this process."""
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    """The result of a call in a thread, which neither an interrupt nor the end of this process waits for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="Ray Train", daemon=True).start()
    return future


def _tell(board: Any, progress: Progress | None) -> None:
    for news in ray.get(board.take.remote()):
        if progress:
            progress(*news)


class Board:
    """Where workers leave what the process that started them is to know."""

    def __init__(self) -> None:
        self._news: list[tuple[str, int, int, float]] = []
        self._error: Exception | None = None

    def note(self, *news: Any) -> None:
        """A step, as `heal.Progress` is told of it."""
        self._news.append(news)

    def take(self) -> list[tuple[str, int, int, float]]:
        """The steps since the last call."""
        news, self._news = self._news, []
        return news

    def fail(self, error: Exception) -> None:
        """Note an error after which no other try is of use."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """The first of these; None if there is none."""
        return self._error


class _RayTeam(Team):
    """The workers of Ray Train, from inside one of them."""

    def __init__(self) -> None:
        context = _train.get_context()
        super().__init__(get_device(), context.get_world_rank(), context.get_world_size())

    def add_up(self, tensor: torch.Tensor) -> None:
        torch.distributed.all_reduce(tensor)


def _work(config: dict[str, Any]) -> None:
    """What each worker does."""
    board, team = config["board"], _RayTeam()
    if ray.get(board.error.remote()) is not None:
        return  # started again after an error that will not go away

    def note(*news: Any) -> None:
        ray.get(board.note.remote(*news))

    try:
        config["open"]().heal(config["texts"], config["recipe"], note if team.number == 0 else None, team)
    except (FlexmoreError, OSError, MemoryError) as error:
        ray.get(board.fail.remote(error))
        raise
