"""Evaluate a search's entries with Ray Tune: reused actors that keep a mixture and switch its ranks in place.

Tune asks the study for entries (`Asker`), runs each in an actor (`Evaluation`), gives every rung's scores back
(`Halving`, ASHA) and stops the hopeless. Tune's own `OptunaSearch` is not used: it can neither repair a point before
it runs nor leave out one that was tried, a metric that is not a number leaves its trial running for ever, and
`Tuner.restore` fails after a kill. What Tune itself writes is not read again: the ledger and the cells are the truth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.placement import Needs
from flexmore_ray.runtime import leaving, place_of, staying
from flexmore_ray.scores import TaskScore
from flexmore_ray.worker import Worker
from search.objective import Block

_IDLE = "idle"
_IDLE_SECONDS = 0.1
_LOOK_SECONDS = 1.0  # how often an actor looks whether its node drains, at most
_RETRIES = 3  # of a trial whose actor died, on a node that lived on
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the search at once, as everywhere
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # no snapshots of Tune's: they cannot be trusted after a kill
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": str(10**9),
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the source says how many; else actors would start one after the other
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are the source's to tell
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_NO_TUNE: Any = None  # what the scheduler is given in place of Tune's controller, which it does not use
_TIME, _METRIC = "resource", "merit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One mixture to evaluate."""

    name: str
    ranks: Mapping[str, Any]
    """Of every domain expert."""
    active: int
    rungs: Sequence[Sequence[Block]]
    """What to score, rung by rung."""
    known: int = 0
    """Rungs from the first whose scores are there already: they are not computed."""
    may_stop: bool = True
    """Whether it may be stopped early."""


class Source(Protocol):
    """Where jobs come from and where their results go."""

    def next(self) -> Job | None:
        """The next job; None where there is none now."""
        ...

    @property
    def idle(self) -> bool:
        """Whether there is no job now, but will be one when others have ended."""
        ...

    @property
    def ended(self) -> bool:
        """Whether no job is left or will come."""
        ...

    def receive(self, job: Job, rung: int, scores: Mapping[Block, TaskScore], seconds: float) -> float | None:
        """Take in a rung's scores, none for one that is known.

        Returns:
            What early stopping compares; None where nothing is compared with this.

        Raises:
            ScoreError: a score is not a number; the job is finished with it.
        """
        ...

    def finish(self, job: Job, error: str | None, *, stopped: bool) -> None:
        """Take note that a job ended: with an error (one line), stopped early, or complete."""
        ...


class Evaluation(tune.Trainable):
    """The actor: scores one rung in every step, and takes the next mixture without being started again."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        """Load what all trials share.

        Args:
            config: of Tune: the job under "job".
            shared: "worker", not started yet, "contents": by (split, task), the content hash that the documents
                must have, and "name": of the actor in Ray's dashboard.
        """
        self._name: str = shared.get("name", "search")
        self._worker: Worker = shared["worker"]
        self._contents: Mapping[tuple[str, str], str] = shared["contents"]
        self._unable: str | None = None
        self._looked = time.monotonic()
        try:
            self._worker.start()
        except Exception as failure:  # whatever it is, a new actor would not start either
            self._unable = f"a worker cannot start: {type(failure).__name__}: {_line(failure)}"
        self.reset_config(config)

    def __repr__(self) -> str:
        return self._name

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another job in this actor."""
        self._job: Job = new_config["job"]
        self._rung = 0
        return True

    def step(self) -> dict[str, Any]:
        """Score the next rung's blocks; an error is a result, so that the actor lives on."""
        self._move()
        job, rung, start = self._job, self._rung, time.monotonic()
        if not job.rungs:
            time.sleep(_IDLE_SECONDS)
            return {_METRIC: 0.0}
        scores: dict[Block, TaskScore] = {}
        error = self._unable
        try:
            for block in job.rungs[rung] if rung >= job.known and not error else ():
                scores[block] = self._score(job, block)
        except FlexmoreError as failure:
            error = _line(failure)
        self._rung += 1
        seconds = time.monotonic() - start
        return {_METRIC: 0.0, "rung": rung, "scores": list(scores.items()), "error": error, "took": seconds}

    def _move(self) -> None:
        """End where this node drains: Tune, which has all results so far, goes on with the trial on another one."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            if ray.get_runtime_context().get_node_id() in leaving():
                os.kill(os.getpid(), signal.SIGKILL)

    def _score(self, job: Job, block: Block) -> TaskScore:
        content = self._contents[block.split, block.task]
        return self._worker.run(job.ranks, job.active, block.split, block.task, content, block.documents)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _Live:
    """Tune pickles what it is given for a restore that never is: such an object leaves nothing in the file."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Asker(_Live, Searcher):
    """Tune's side of a source: gives its jobs as Tune's trials, as many as there is room for."""

    def __init__(self, source: Source, room: Callable[[], int]) -> None:
        super().__init__(metric=_METRIC, mode="max")
        self._source, self._room = source, room
        self.failure: BaseException | None = None
        """What ended the search before its time."""
        self.jobs: dict[str, Job] = {}
        """By Tune's trial id, what runs."""

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next trial, None where there is no room for one now, or FINISHED."""
        with self.guard():
            if not self._source.ended and len(self.jobs) >= self._room():
                return None
            job = self._source.next()
            if job is None and self._source.idle:  # Tune ends an actor that has nothing to do
                job = Job(name=_IDLE, ranks={}, active=1, rungs=())
            if job is not None:
                self.jobs[trial_id] = job
                return {"job": job}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over; one that is still among the jobs did not end by the scheduler's word."""
        job = self.jobs.pop(trial_id, None)
        if job is not None and job.rungs and self.failure is None:
            with self.guard():
                self._source.finish(job, f"its actor died {_RETRIES + 1} times; out of memory?", stopped=False)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Keep an error of the source for the end: Tune would take it for one of the trial, and try again."""
        try:
            yield
        except Exception as error:  # whatever it is, it is raised again by `run_jobs`
            self.failure = error

    def save(self, checkpoint_path: str) -> None:
        """Write what a later run needs, which is nothing: the ledger has it."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Take over nothing; see `save`."""


class Halving(_Live, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) on the merit that the source makes of every rung's scores.

    Args:
        source: takes the scores in.
        asker: knows which job a trial runs.
        rungs: number of rungs.
        reduction: of the trials at a rung, one in so many goes on.
    """

    def __init__(self, source: Source, asker: Asker, rungs: int, reduction: int) -> None:
        self._source, self._asker, self._last = source, asker, rungs - 1
        top = reduction**self._last
        # a trial at the last rung is not the scheduler's any more: it is complete
        super().__init__(time_attr=_TIME, metric=_METRIC, mode="max", max_t=top + 1, reduction_factor=reduction)
        self._scale = reduction

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Take in a rung, and decide whether the trial goes on."""
        with self._asker.guard():
            return self._take(trial, result)
        return str(TrialScheduler.STOP)

    def _take(self, trial: Any, result: dict[str, Any]) -> str:
        job = self._asker.jobs[trial.trial_id]
        if not job.rungs:
            if self._source.idle:
                return str(TrialScheduler.CONTINUE)
            del self._asker.jobs[trial.trial_id]
            return str(TrialScheduler.STOP)
        if result["error"]:
            return self._end(trial, job, result["error"])
        rung = result["rung"]
        try:
            merit = self._source.receive(job, rung, dict(result["scores"]), result["took"])
        except ScoreError as error:
            return self._end(trial, job, str(error))
        job = self._asker.jobs[trial.trial_id] = trial.config["job"] = dataclasses.replace(
            job, known=max(job.known, rung + 1)
        )
        if rung + 1 == len(job.rungs):
            self._record(trial, rung, merit)
            return self._end(trial, job, None)
        if self._record(trial, rung, merit) == TrialScheduler.STOP and job.may_stop:
            return self._end(trial, job, None, stopped=True)
        return str(TrialScheduler.CONTINUE)

    def recall(self, number: int, merits: Sequence[float]) -> None:
        """Take over the merits of an entry of an earlier run, rung by rung."""
        trial: Any = _Recalled(f"entry-{number}")
        self.on_trial_add(_NO_TUNE, trial)
        for rung, merit in enumerate(merits):
            self._record(trial, rung, merit)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Everything is noted when a result comes."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Likewise."""

    def _record(self, trial: Any, rung: int, merit: float | None) -> str:
        if merit is None:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(_NO_TUNE, trial, {_TIME: self._scale**rung, _METRIC: merit}))

    def _end(self, trial: Any, job: Job, error: str | None, *, stopped: bool = False) -> str:
        del self._asker.jobs[trial.trial_id]
        self._source.finish(job, error, stopped=stopped)
        return str(TrialScheduler.STOP)


class ScoreError(FlexmoreError):
    """A score is not a number."""


@dataclasses.dataclass(frozen=True)
class _Recalled:
    """What the scheduler needs of a trial that ran before."""

    trial_id: str


class _Failed(_Live, tune.Stopper):
    """Ends the run once the source has failed."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether to end."""
        return self._asker.failure is not None


class _Forgive(_Live, tune.Callback):
    """Counts no failure against a trial whose actor died with its node, or left one that drains.

    An actor's end is often known before that of its node, so all nodes of a trial are looked at after each.
    """

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._places: dict[str, list[str]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._actors[trial.trial_id] = trial.temporary_state.ray_actor

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        places = self._places.setdefault(trial.trial_id, [])
        actor = self._actors.pop(trial.trial_id, None)
        places.append(place_of(actor) if actor is not None else "")
        there = {"", *(node["NodeID"] for node in staying())}
        trial.run_metadata.num_failures = sum(place in there for place in places)


class _Forget(_Live, tune.Callback):
    """Drops scores from Tune's own records once they are taken in; says how the search goes after every event."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        result.pop("scores", None)
        self._tell()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._tell()


def run_jobs(
    source: Source,
    worker: Worker,
    contents: Mapping[tuple[str, str], str],
    needs: Needs,
    *,
    rungs: int,
    reduction: int,
    workers: int | None = None,
    recalled: Mapping[int, Sequence[float]] | None = None,
    tell: Callable[[], None] = lambda: None,
    name: str = "search",
) -> None:
    """Run all jobs of a source on Ray, which must be initialised.

    Args:
        source: the jobs.
        worker: scores them; sent to the actors as it is.
        contents: (split, task) -> content hash that the documents must have.
        needs: what one actor asks of a node.
        rungs: number of rungs of the jobs that may be stopped early.
        reduction: of the jobs at a rung, one in so many goes on.
        workers: actors; None: as many as the nodes can hold at any time.
        recalled: by number, merits of the entries of earlier runs.
        tell: called after every event.
        name: of the actors in Ray's dashboard.

    Raises:
        FlexmoreError: a job that nothing can go on without failed, or Tune did.
    """
    asker = Asker(source, lambda: workers or max(1, int(sum(map(needs.capacity, staying())))))
    halving = Halving(source, asker, rungs, reduction)
    for number, merits in (recalled or {}).items():
        halving.recall(number, merits)
    trainable = tune.with_resources(
        tune.with_parameters(Evaluation, worker=worker, contents=dict(contents), name=name),
        {"cpu": needs.num_cpus, "gpu": needs.num_gpus},
    )
    with _tune_folder() as folder:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=asker,
                scheduler=halving,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["job"].name,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
                stop=_Failed(asker),
                callbacks=[_Forgive(), _Forget(tell)],
                verbose=0,
            ),
        )
        with _noting_interrupts(asker):
            tuner.fit()
    if asker.failure is not None:
        raise asker.failure


@contextlib.contextmanager
def _noting_interrupts(asker: Asker) -> Iterator[None]:
    """End the search after an interrupt that came within a callback of Ray's, where its exception is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: object) -> None:
        asker.failure = KeyboardInterrupt()
        raise asker.failure

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_abandoned() -> None:
    """Remove what killed searches of this machine left; what is another user's stays."""
    for folder in Path(tempfile.gettempdir()).glob("flexmore-tune-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _tune_folder() -> Iterator[Path]:
    """A folder for what Tune writes, with Tune's settings for as long as the block runs."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    handler = signal.getsignal(signal.SIGTERM)
    os.environ |= _SETTINGS
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=f"flexmore-tune-{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
