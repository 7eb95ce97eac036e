"""Optuna's samplers by name, made to propose only points that fit the budget and are new."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.space import Point, Space

_MODELS = ("tpe", "gp")
SAMPLERS = ("tpe", "gp", "nsga2", "random", "grid")
_STARTUP = 6  # random points before a model is fitted
_LOCAL, _RANDOM = 1 / 2, 1 / 10  # shares of the later points that do not come from the model, see `FeasibleSampler`
_POPULATION = 16
_PROPOSALS = 8  # of the sampler, before its last one is changed until it is new
_STEPS = 2000  # of such changes, before the space counts as exhausted
_GOLDEN = (math.sqrt(5) - 1) / 2


class ExhaustedError(Exception):
    """There is no new point that fits the budget, or none was found."""


class FeasibleSampler(BaseSampler):
    """A sampler whose points fit the budget and were not proposed before.

    What Optuna's sampler proposes is repaired before it becomes the trial's parameters, so that the study holds what
    runs and the sampler learns from it. With the samplers that fit a model (tpe, gp), half of the later points are
    neighbours of the best one and a tenth are random: on a handful of trials a model alone settles too early. A
    sampler begins anew for every trial, from a seed made of the search's seed and the trial's number: a search that
    was interrupted goes on as it would have.

    Args:
        name: one of `SAMPLERS`.
        space: what to sample.
        seed: of the search.
        is_new: whether a point's assignment was not evaluated yet.
        fill: whether the random points of a sampler with a model are raised to the budget, near which the best
            scores are found more often.
    """

    def __init__(
        self, name: str, space: Space, seed: int, is_new: Callable[[Point], bool], *, fill: bool = True
    ) -> None:
        self._name, self._space, self._seed, self._is_new = name, space, seed, is_new
        self._fill = fill
        self._next = 0  # of the grid

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters, whatever the study holds."""
        return dict(self._space.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A new point.

        Raises:
            ExhaustedError: there is none.
        """
        if self._name == "grid":
            return self._of_grid()
        chance = random.Random(self._derive(trial, _PROPOSALS))
        name = self._next_kind(len(study.get_trials(deepcopy=False)), chance)
        best = _best(study, chance) if name == "neighbour" else None
        if best is not None:
            return self._new_neighbour(best, chance)
        for attempt in range(_PROPOSALS):
            sampler = _sampler(self._name if name == "neighbour" else name, self._derive(trial, attempt))
            point = self._space.repair(_propose(sampler, study, trial, search_space))
            if self._fill and name != self._name:
                point = self._space.filled(point)
            if self._is_new(point):
                return dict(point)
        return self._new_neighbour(point, chance)

    def _next_kind(self, trials: int, chance: random.Random) -> str:
        """Where the next point comes from: neighbour, random, or the sampler itself."""
        if self._name not in _MODELS:
            return self._name
        share = chance.random()
        if trials <= _STARTUP or share < _RANDOM:
            return "random"
        return "neighbour" if share < _RANDOM + _LOCAL else self._name

    def _derive(self, trial: FrozenTrial, attempt: int) -> int:
        return int(np.random.SeedSequence([self._seed, trial.number, attempt]).generate_state(1)[0])

    def _new_neighbour(self, point: Point, chance: random.Random) -> Point:
        """The first new point on a random walk."""
        for _ in range(_STEPS):
            point = self._space.neighbour(point, chance)
            if self._is_new(point):
                return dict(point)
        raise ExhaustedError

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Not reached: every parameter is sampled together with the others."""
        raise AssertionError(f"{param_name} is not a parameter of the space")

    def _of_grid(self) -> Point:
        """The next point of the space that fits and is new; points far apart come after each other.

        The steps are a golden section of the space, made coprime to its size, so that all points are met once.
        """
        size = self._space.size
        stride = max(1, round(size * _GOLDEN))
        while math.gcd(stride, size) > 1:
            stride += 1
        while self._next < size:
            point = self._space.at(self._next * stride % size)
            self._next += 1
            if self._space.repair(point) == point and self._is_new(point):
                return point
        raise ExhaustedError


def _best(study: Study, chance: random.Random) -> Point | None:
    """The best complete point, or one of the front's; None before there is one."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    return dict(chance.choice(study.best_trials).params)


def _sampler(name: str, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        makers: Mapping[str, Callable[[], BaseSampler]] = {
            "tpe": lambda: TPESampler(seed=seed, n_startup_trials=_STARTUP),
            "gp": lambda: GPSampler(seed=seed, n_startup_trials=_STARTUP, deterministic_objective=True),
            "nsga2": lambda: NSGAIISampler(seed=seed, population_size=_POPULATION),
            "random": lambda: RandomSampler(seed=seed),
        }
        return makers[name]()


def _propose(sampler: BaseSampler, study: Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> Point:
    """A point of a sampler, in whichever of its two ways it gives one."""
    if isinstance(sampler, NSGAIISampler):
        _recall_parents(sampler, study, trial)
    point = sampler.sample_relative(study, trial, dict(space))
    rest = {
        name: sampler.sample_independent(study, trial, name, bounds)
        for name, bounds in space.items()
        if name not in point
    }
    return {name: int(value) for name, value in (point | rest).items()}


def _recall_parents(sampler: NSGAIISampler, study: Study, trial: FrozenTrial) -> None:
    """Have the study know the parents of all generations: the first time, Optuna gives them in another order."""
    for generation in range(1, sampler.get_trial_generation(study, trial) + 1):
        sampler.get_parent_population(study, generation)
