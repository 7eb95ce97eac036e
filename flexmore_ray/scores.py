"""Score a language model on tasks, with lm-eval's tasks, metrics and standard errors.

    load_tasks(names) -> TaskSet of PreparedTask -> .score(lm) -> Scores of TaskScore of Sample

Tasks are built once (data, prompts, requests) and scored for as many models as there are. A score is
aggregated from the metric values of its documents by lm-eval's own functions, so that scores of disjoint
parts of the documents merge to exactly the score of the whole, standard error included.

The value of a task is its primary metric: the first of `PREFERRED_METRICS` that the task has (FlexMoRE's
rule: accuracy, else exact match), else the task's first; under several filters, the first filter of the task.
The value of a group is the unweighted mean of its tasks, the score the unweighted mean of its groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import logging
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexmore_ray.errors import TaskError, UsageError
from flexmore_ray.suites import Group, Suite, lm_eval_tasks, load_suite, suite_names, task_folders

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Split = Literal["validation", "test"]
PREFERRED_METRICS = ("acc", "exact_match", "em", "exact")
DEFAULT_SEED = 1234
"""lm-eval's own seed for few-shot examples, numpy and torch."""
BOOTSTRAP_ITERS = 100_000
"""Resamples for the standard error of metrics that have no formula for it; lm-eval's own number."""
_PYTHON_SEED = 0  # lm-eval's own seed for Python's random, which some tasks use to order their choices
_LOCAL_DATA = {"arrow", "csv", "json", "parquet", "text"}
_HUB_TIMEOUT = 5.0  # seconds

logger = logging.getLogger(__name__)


# --- results ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model did on one document."""

    doc_id: int
    """Place of the document in its split, from 0."""
    doc_hash: str
    """SHA-256 of the document's content."""
    target: str
    """The right answer as lm-eval has it: a text, or the index of a choice."""
    responses: list[Any]
    """Per request: [log-likelihood, is greedy], a log-likelihood, or a text."""
    correct: bool | None
    """Whether the primary metric is 1 rather than 0; None where it is neither."""
    metrics: dict[tuple[str, str], Any]
    """(metric, filter) -> value for this document, as numbers, texts and lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one task, and what it was computed from."""

    task: str
    group: str
    split: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    """None where lm-eval has no standard error for the metric, or for a single document."""
    metrics: dict[tuple[str, str], tuple[float, float | None]]
    """(metric, filter) -> (value, standard error), for all metrics of the task."""
    num_fewshot: int
    version: str
    seconds: float
    samples: list[Sample]

    @property
    def documents(self) -> int:
        """Number of documents scored."""
        return len(self.samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one model on a set of tasks, in the order of the suite."""

    tasks: dict[str, TaskScore]
    kinds: dict[str, str | None]
    """Group -> knowledge, reasoning, or None for a task named alone."""

    @property
    def groups(self) -> dict[str, float]:
        """Unweighted mean of the values of each group's tasks."""
        values: dict[str, list[float]] = defaultdict(list)
        for score in self.tasks.values():
            values[score.group].append(score.value)
        return {group: sum(v) / len(v) for group, v in values.items()}

    @property
    def score(self) -> float:
        """Unweighted mean of the group means, in [0, 1] for the usual metrics."""
        groups = self.groups
        return sum(groups.values()) / len(groups)

    def to_json(self) -> dict[str, Any]:
        """`score`, `groups.{NAME}`, `tasks.{NAME}` as numbers, `details.{NAME}` with the rest."""
        fields = (
            "group",
            "split",
            "metric",
            "filter",
            "stderr",
            "documents",
            "num_fewshot",
            "version",
            "seconds",
        )
        return {
            "score": self.score,
            "groups": self.groups,
            "tasks": {name: task.value for name, task in self.tasks.items()},
            "details": {name: {field: getattr(task, field) for field in fields} for name, task in self.tasks.items()},
        }

    def table(self) -> str:
        """The scores as text, a line per task under its group, in percent."""
        width = max(len("average of groups"), *(len(name) + 2 for name in self.tasks))
        lines = []
        for group, mean in self.groups.items():
            kind = f"  ({self.kinds[group]})" if self.kinds.get(group) else ""
            lines.append(f"{group:<{width}}  {100 * mean:6.2f}{kind}")
            lines.extend(_table_line(task, width) for task in self.tasks.values() if task.group == group)
        return "\n".join([*lines, f"{'average of groups':<{width}}  {100 * self.score:6.2f}"])


def _table_line(task: TaskScore, width: int) -> str:
    error = "" if task.stderr is None else f" +- {100 * task.stderr:.2f}"
    return f"  {task.task:<{width - 2}}  {100 * task.value:6.2f}{error}  {task.metric}, {task.documents} documents"


# --- tasks ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """An lm-eval task on a chosen split and selection of documents, its requests built."""

    task: Task
    name: str
    group: Group
    split: str
    """The split really used: a task without a test split is tested on its validation split."""
    limit: int | None
    seed: int
    num_fewshot: int
    version: str
    documents: dict[int, list[Instance]]
    """Document id -> its requests."""
    hashes: dict[int, str]
    """Document id -> SHA-256 of its content."""

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of documents and requests: changes with data, prompts, examples and their number."""
        digest = hashlib.sha256()
        for doc_id, requests in self.documents.items():
            asked = [[request.request_type, request.arguments] for request in requests]
            digest.update(json.dumps([doc_id, self.hashes[doc_id], asked], default=str).encode())
        return digest.hexdigest()

    def score(self, lm: LM, documents: Iterable[int] | None = None) -> TaskScore:
        """Score a model.

        Args:
            lm: A model behind lm-eval's interface, such as `MixtureLM`.
            documents: Document ids, a part of this task's; None: all of them.

        Raises:
            TaskError: A document id is not of this task, or lm-eval fails on a document (named).
        """
        start = time.perf_counter()
        ids = list(self.documents) if documents is None else sorted(set(documents))
        if not ids or not set(ids) <= set(self.documents):
            raise TaskError(f"task {self.name} has documents 0 to {len(self.documents) - 1}, asked for {ids[:9]}")
        _seed_everything(self.seed)
        instances = [instance for doc_id in ids for instance in self.documents[doc_id]]
        self._respond(lm, instances)
        samples = [self._sample(doc_id) for doc_id in ids]
        return self.aggregate(samples, time.perf_counter() - start)

    def merge(self, parts: Sequence[TaskScore]) -> TaskScore:
        """The score of several disjoint parts of the documents together, as if scored at once.

        Raises:
            TaskError: A document is in two parts, or a part is of another task.
        """
        samples = sorted((s for part in parts for s in part.samples), key=lambda s: s.doc_id)
        ids = [sample.doc_id for sample in samples]
        if len(set(ids)) < len(ids) or {part.task for part in parts} != {self.name}:
            raise TaskError(f"task {self.name}: parts to merge must be of this task and disjoint")
        return self.aggregate(samples, sum(part.seconds for part in parts))

    def _respond(self, lm: LM, instances: Sequence[Instance]) -> None:
        """Fill in the model's responses, then apply the task's filters."""
        by_type: dict[str, list[Instance]] = defaultdict(list)
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
            by_type[instance.request_type].extend([instance] * (instance.repeats or 1))
        for request_type, requests in by_type.items():
            responses = getattr(lm, request_type)(requests)
            for instance, response in zip(requests, responses, strict=True):
                instance.resps.append(response)
        self.task._instances = list(instances)
        self.task.apply_filters()

    def _sample(self, doc_id: int) -> Sample:
        requests = self.documents[doc_id]
        doc = requests[0].doc
        metrics: dict[tuple[str, str], Any] = {}
        try:
            for key in requests[0].filtered_resps:
                values = self.task.process_results(doc, [request.filtered_resps[key] for request in requests])
                metrics.update({(metric, key): _plain(value) for metric, value in values.items()})
            target = str(self.task.doc_to_target(doc))
        except Exception as error:
            raise TaskError(f"task {self.name}, document {doc_id}: {type(error).__name__}: {_line(error)}") from error
        value = metrics[_primary(metrics)] if metrics else None
        return Sample(
            doc_id=doc_id,
            doc_hash=self.hashes[doc_id],
            target=target,
            responses=[_plain(response) for request in requests for response in request.resps],
            correct=bool(value) if isinstance(value, int | float) and value in (0, 1) else None,
            metrics=metrics,
        )

    def aggregate(self, samples: list[Sample], seconds: float) -> TaskScore:
        """The score that some documents make together.

        Raises:
            TaskError: There is no metric.
        """
        values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for sample in samples:
            for key, value in sample.metrics.items():
                values[key].append(value)
        if not values:
            raise TaskError(f"task {self.name}: lm-eval returned no metric")
        metrics = {key: self._combine(key[0], items) for key, items in values.items()}
        metric, filter_name = _primary(metrics)
        value, stderr = metrics[metric, filter_name]
        return TaskScore(
            task=self.name,
            group=self.group.name,
            split=self.split,
            metric=metric,
            filter=filter_name,
            value=value,
            stderr=stderr,
            metrics=metrics,
            num_fewshot=self.num_fewshot,
            version=self.version,
            seconds=seconds,
            samples=samples,
        )

    def _combine(self, metric: str, items: list[Any]) -> tuple[float, float | None]:
        """Value and standard error over documents, by lm-eval's functions."""
        from lm_eval.api.metrics import mean, stderr_for_metric

        function = self.task.aggregation().get(metric, mean)
        costly = metric in ("bleu", "chrf", "chrf++", "ter")  # lm-eval resamples these 100 times only
        stderr = stderr_for_metric(metric=function, bootstrap_iters=100 if costly else BOOTSTRAP_ITERS)
        known = stderr is not None and len(items) > 1
        return float(function(items)), float(stderr(items)) if known else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Tasks that are ready to be scored, again and again."""

    suite: Suite
    tasks: dict[str, PreparedTask]

    def score(self, lm: LM, *, progress: bool = False) -> Scores:
        """Score a model on all tasks.

        Args:
            lm: A model behind lm-eval's interface, such as `MixtureLM`.
            progress: Draw a bar over tasks, if standard error is a terminal.
        """
        from tqdm import tqdm

        hidden = not (progress and sys.stderr.isatty())
        tasks = tqdm(self.tasks.values(), desc="scoring", unit="task", disable=hidden)
        return self.collect([task.score(lm) for task in tasks])

    def collect(self, scores: Iterable[TaskScore]) -> Scores:
        """Scores of some of the tasks as one object, in the order of the suite."""
        by_name = {score.task: score for score in scores}
        return Scores(
            tasks={name: by_name[name] for name in self.tasks if name in by_name},
            kinds={group.name: group.kind for group in self.suite.groups},
        )


def score(
    lm: LM,
    tasks: str | Path | Suite | Sequence[str | Path],
    *,
    split: Split = "validation",
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    progress: bool = False,
) -> Scores:
    """Load tasks and score one model on them; see `load_tasks` and `TaskSet.score`."""
    return load_tasks(tasks, split=split, limit=limit, seed=seed).score(lm, progress=progress)


# --- loading ----------------------------------------------------------------------------------------------


def load_tasks(
    tasks: str | Path | Suite | Sequence[str | Path],
    *,
    split: Split = "validation",
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    run_code: bool = False,
) -> TaskSet:
    """Load tasks and build their requests.

    Args:
        tasks: What `load_suite` accepts.
        split: `validation` for choosing, `test` for reporting. As in lm-eval, a task without a test split is
            tested on its validation split; `PreparedTask.split` says which was used.
        limit: Number of documents, the first of the split, >= 1. None: all.
        seed: Chooses few-shot examples, where the task samples them, and seeds generation that samples.
        run_code: Whether tasks may run programs that the model wrote.

    Raises:
        UsageError: An unknown name (close matches are given), split or limit.
        TaskError: A task's data cannot be had, it lacks the split, or lm-eval did something else than asked.
    """
    if split not in ("validation", "test"):
        raise UsageError(f"split must be validation or test, got {split!r}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 document, got {limit}")
    suite = load_suite(tasks)
    manager = _task_manager(_folders_needed(suite))
    prepared = {}
    for name in suite.tasks:
        _seed_everything(seed)
        task = _load_task(manager, name)
        _check_runnable(task, name, run_code)
        prepared[name] = _prepare(task, name, suite.group_of(name), split, limit, seed)
    return TaskSet(suite=suite, tasks=prepared)


def _folders_needed(suite: Suite) -> tuple[Path, ...]:
    """Folders of the files that define the suite's tasks; its own folders win over lm-eval's."""
    known = task_folders(suite.folders)
    if not set(suite.tasks) <= set(known):
        known = {**lm_eval_tasks(), **known}
    unknown = [name for name in suite.tasks if name not in known]
    if unknown:
        ours = [name for suite in suite_names() for name in (suite, *load_suite(suite).tasks)]
        close = difflib.get_close_matches(unknown[0], dict.fromkeys([*ours, *known]), n=3)
        hint = f"close matches: {', '.join(close)}" if close else f"suites: {', '.join(suite_names())}"
        raise UsageError(f"unknown task or suite {', '.join(map(repr, unknown))}; {hint}")
    return tuple(dict.fromkeys(known[name] for name in suite.tasks))


@functools.lru_cache(maxsize=8)
def _task_manager(folders: tuple[Path, ...]) -> TaskManager:
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task relies on
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=not sys.stderr.isatty(), leave=False)
    environment = lm_eval.utils.env
    if not hasattr(environment.from_string, "cache_info"):
        # lm-eval compiles a task's templates anew for every document, the larger part of its own time
        environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)
    return TaskManager(include_defaults=False, include_path=list(folders))


def _load_task(manager: TaskManager, name: str) -> Task:
    settings = manager.task_index[name].cfg or {}
    where = settings.get("dataset_path")
    if where == "pandas":
        raise TaskError(f"task {name}: its data are pickled, which can run code when read; store them as Parquet")
    on_hub = where and "custom_dataset" not in settings and where not in _LOCAL_DATA and not Path(where).exists()
    if on_hub:
        _go_offline_if_unreachable()
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:
        raise TaskError(_explain(name, where, error)) from error


def _explain(name: str, where: str | None, error: Exception) -> str:
    data = "its data" if where is None else f"its data {where}"
    if where not in (None, *_LOCAL_DATA):
        data += " of the Hugging Face hub"
    reason = f"{type(error).__name__}: {_line(error)}"
    if "scripts are no longer supported" in str(error):
        return f"task {name}: {data} needs a loading script, which datasets >= 4 refuses; leave it out"
    if isinstance(error, OSError) or "offline" in str(error).lower():
        way_out = "load it once with a network, or copy it into the cache that HF_HOME names"
        return f"task {name}: {data} cannot be had ({reason}); {way_out}"
    if isinstance(error, ImportError):
        return f"task {name} needs a package that is not installed ({reason})"
    return f"task {name} cannot be loaded ({reason})"


@functools.lru_cache(maxsize=1)
def _go_offline_if_unreachable() -> None:
    """Ask the hub once; without an answer use cached data only, where `datasets` would retry for minutes."""
    import datasets
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:  # whatever the HTTP client raises: there is no connection
        logger.info("the Hugging Face hub does not answer (%s): using cached data only", _line(error))
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def _check_runnable(task: Task, name: str, run_code: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not run_code:
        raise TaskError(f"task {name} runs programs that the model wrote; allow it (run_code) in a sandbox only")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"task {name} needs images or sound, which these models do not read; leave it out")
    directions = task.higher_is_better()
    if directions and directions.get(_preferred(list(directions))) is False:
        metric = _preferred(list(directions))
        raise TaskError(f"task {name} is measured by {metric}, where lower is better: it cannot enter an average")


def _prepare(task: Task, name: str, group: Group, split: Split, limit: int | None, seed: int) -> PreparedTask:
    used = _select_split(task, name, split)
    num_fewshot = task.get_config("num_fewshot") or 0
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(seed)
    drawn = _watch_sampler(task)
    task.build_all_requests(limit=limit)
    if num_fewshot and set(drawn) - {num_fewshot}:
        raise TaskError(f"task {name}: {num_fewshot} examples asked for, lm-eval used {sorted(set(drawn))}")
    documents: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    expected = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    if len(documents) != expected:
        raise TaskError(f"task {name}: {expected} documents asked for, lm-eval built {len(documents)}")
    for requests in documents.values():
        requests.sort(key=lambda request: request.idx)
    return PreparedTask(
        task=task,
        name=name,
        group=group,
        split=used,
        limit=limit,
        seed=seed,
        num_fewshot=num_fewshot,
        version=str(task.VERSION),
        documents=dict(documents),
        hashes={doc_id: _hash_document(requests[0].doc) for doc_id, requests in documents.items()},
    )


def _select_split(task: Task, name: str, split: Split) -> str:
    """Make lm-eval use the split asked for; it always takes the test split of a task that has one."""
    has_test, has_validation = task.has_test_docs(), task.has_validation_docs()
    if split == "test":
        return "test" if has_test else "validation"
    if not has_validation:
        raise TaskError(f"task {name} has no validation split, only test: use --split test, or leave it out")
    if has_test:
        validation = task.get_config("validation_split")
        sampled_by_default = not task.has_training_docs() and task.fewshot_cfg.split is None
        if sampled_by_default and task.fewshot_cfg.samples is None:
            task.fewshot_cfg.split = validation  # lm-eval then leaves the document itself out of its examples
        task.set_config("test_split", validation)
        task.test_docs = task.validation_docs
    return "validation"


def _watch_sampler(task: Task) -> list[int]:
    """A list to which the number of few-shot examples really drawn is added for each document."""
    drawn: list[int] = []
    sampler = getattr(task, "sampler", None)
    if sampler is not None:
        draw = sampler.sample

        def counted(*args: Any, **kwargs: Any) -> Sequence[Any]:
            examples = draw(*args, **kwargs)
            drawn.append(len(examples))
            return examples

        sampler.sample = counted
    return drawn


def _seed_everything(seed: int) -> None:
    """What `lm_eval.simple_evaluate` seeds at its start; here before each task, so that order is free."""
    import numpy as np
    import torch

    random.seed(_PYTHON_SEED)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- values -----------------------------------------------------------------------------------------------


def _preferred(metrics: Sequence[str]) -> str:
    return next((metric for metric in PREFERRED_METRICS if metric in metrics), metrics[0])


def _primary(keys: Mapping[tuple[str, str], Any]) -> tuple[str, str]:
    """The primary (metric, filter) among those of a task, in the order lm-eval gave them."""
    metric = _preferred([metric for metric, _ in keys])
    return next(key for key in keys if key[0] == metric)


def _plain(value: Any) -> Any:
    """Numpy and torch numbers and arrays, tuples: as Python numbers and lists, exactly."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _hash_document(doc: Any) -> str:
    from lm_eval.utils import handle_non_serializable, hash_string

    return hash_string(json.dumps(doc, sort_keys=True, default=handle_non_serializable, ensure_ascii=False))


def _line(error: BaseException) -> str:
    """The message of an error on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def iter_shards(task: PreparedTask, shards: int) -> Iterator[list[int]]:
    """Split a task's documents into nearly equal runs of document ids, none empty."""
    ids = list(task.documents)
    bounds = [len(ids) * i // shards for i in range(shards + 1)]
    yield from (ids[low:high] for low, high in itertools.pairwise(bounds) if low < high)
