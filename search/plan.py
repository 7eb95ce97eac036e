"""What a search is: its settings on the weights and tasks that they name, and the mixtures that it can make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from flexmore_ray.budget import Granularity, Spectra
from flexmore_ray.errors import UsageError
from flexmore_ray.factors import open_parts
from flexmore_ray.grid import Options
from flexmore_ray.mixture import check_same_factors, read_spec
from flexmore_ray.plan import PlannedMixture, Wanted, identify
from flexmore_ray.rules import Measure, read_budget
from flexmore_ray.scores import DEFAULT_SEED
from flexmore_ray.source import open_source
from flexmore_ray.spec import FULL, ExpertRank, MixtureSpec, suggest
from flexmore_ray.storage import AnyPath
from search.baselines import baselines, spread
from search.objective import Objective
from search.samplers import SAMPLERS
from search.space import Space
from search.study import RESERVED

Goal = Literal["score", "front"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to search; how to run it is in `flexmore_ray.grid.Options`."""

    source: tuple[str, ...]
    """SOURCE strings."""
    experts: tuple[str, ...] | None = None
    """Names for an N-expert checkpoint; None: its own."""
    tasks: tuple[str, ...]
    """A suite, or tasks."""
    budget: str
    """A count or a ratio of the full mixture; see `read_budget`."""
    measure: Measure = "parameters"
    trials: int
    """Points to try in all, baselines not counted."""
    seed: int = 0
    """Of the sampler."""
    limit: int | None = None
    """Documents per task to choose by; None: all of the validation split."""
    test_limit: int | None = None
    """Documents per task to report on; None: all of the test split."""
    active: int | Literal["search"] | None = None
    """Experts per token; None: as the checkpoint says."""
    granularity: Granularity = "expert"
    """Which matrices share one rank; finer than expert, the least discarded energy spreads an expert's share."""
    max_rank: int | None = None
    """Highest rank to try below full; None: all powers of two."""
    sampler: str = "tpe"
    objective: Goal = "score"
    """The best score under the budget, or the whole front of score against cost."""
    rungs: int = 3
    """Rungs of documents; 1: no early stopping."""
    reduction: int = 3
    """How many times more documents each rung has, and one trial in how many goes on to it."""
    finalists: int = 3
    """Best entries that are scored on the test split."""
    include: tuple[str, ...] = ()
    """Mixture files of the same source to compare with."""

    def __post_init__(self) -> None:
        for name, low in (("trials", 1), ("seed", 0), ("finalists", 1), ("max_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')}: at least {low}, got {value}")
        choices: Mapping[str, Sequence[str]] = {
            "sampler": SAMPLERS,
            "objective": get_args(Goal),
            "granularity": get_args(Granularity),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name}: {suggest(getattr(self, name), known)}")

    @property
    def front(self) -> bool:
        """Whether it looks for the whole front."""
        return self.objective == "front"


class Search:
    """A search on the weights and tasks that it names.

    Args:
        settings: what to search.
        out: folder of the search.
        options: how to run it.
        results: folder of the cells; None: `results` in `out`. Searches on the same weights share one.

    Raises:
        UsageError, CheckpointError, StoreError, TaskError: the settings, the source or the tasks are no good.
    """

    def __init__(self, settings: Settings, out: AnyPath, options: Options, results: AnyPath | None = None) -> None:
        self.settings, self.options = settings, options
        self.out = out
        self.parts, self.store = open_parts(
            MixtureSpec(source=settings.source, experts=settings.experts), options.store
        )
        options.check_experts(self.parts.source.experts)
        if len(self.parts.source.experts) < 2:
            raise UsageError(f"{', '.join(settings.source)}: a search needs a domain expert beside the public one")
        self.budget = read_budget(settings.budget, settings.measure, self.parts)
        self.actives = self._actives()
        self.objective = Objective(
            settings.tasks,
            seed=DEFAULT_SEED,
            limit=settings.limit,
            test_limit=settings.test_limit,
            rungs=settings.rungs,
            reduction=settings.reduction,
            results=results or out / "results",
            dtype=options.compute_dtype(self.parts),
        )
        self.included: dict[str, MixtureSpec] = {}
        for file in settings.include:
            name = Path(file).stem
            if name in (*RESERVED, *self.included) or name.startswith("trial-"):
                raise UsageError(f"--include: {file}: a mixture of the search is called {name}; rename the file")
            self.included[name] = self._read(file)

    def _actives(self) -> tuple[int, ...]:
        asked, experts = self.settings.active, len(self.parts.source.experts)
        if asked == "search":
            return tuple(range(1, experts + 1))
        number = self.parts.assignment.active if asked is None else asked
        if not 1 <= number <= experts:
            raise UsageError(f"--active: a number from 1 to the {experts} experts, or search; got {number}")
        return (number,)

    def _read(self, file: str) -> MixtureSpec:
        """A mixture file of the user, as a variant of this source."""
        spec = read_spec(file)
        if spec.router:
            raise UsageError(
                f"--include: {file} has router rows of its own, {spec.router}; a search compares mixtures with the "
                "rows that their experts came with: leave out its router, or score it with flexmore eval"
            )
        theirs = open_source(spec.source, spec.experts).describe() if spec.source else []
        if theirs != self.parts.source.describe():
            ours = ", ".join(self.parts.source.describe())
            raise UsageError(f"--include: {file} is of {', '.join(theirs) or 'a store'}, the search of {ours}")
        check_same_factors(spec, self.parts, f"--include: {file}")
        ranks = dict.fromkeys(self.experts, FULL) | dict(spec.ranks)
        return dataclasses.replace(self.parts.spec, ranks=ranks, active=spec.active)

    @property
    def experts(self) -> tuple[str, ...]:
        """The domain experts."""
        return self.parts.source.experts[1:]

    @functools.cached_property
    def weights(self) -> str:
        """Hash of what all experts are corrections of."""
        return self.parts.weights

    def identity(self) -> dict[str, Any]:
        """What must stay equal for a search to go on."""
        fields = ("measure", "seed", "limit", "active", "granularity", "max_rank", "sampler", "objective")
        digests = {name: self.parts.source.expert_digest(name)[:16] for name in self.parts.source.experts}
        tasks = self.objective.sets["validation"].tasks
        return {
            "budget": self.budget.limit,
            **{name: getattr(self.settings, name) for name in fields},
            "rungs": self.objective.num_rungs,
            "reduction": self.settings.reduction,
            "dtype": self.objective.dtype,
            "weights": {"shared": self.weights, **digests},
            "tasks": {name: task.content_hash for name, task in tasks.items()},
        }

    def notes(self) -> dict[str, Any]:
        """The rest of `search.json`."""
        settings, suite = self.settings, self.objective.sets["validation"].suite
        return {
            "source": self.parts.source.describe(),
            "experts": list(self.parts.source.experts),
            "weights": self.weights,
            "tasks": list(settings.tasks),
            "budget": self.budget.limit,
            "measure": settings.measure,
            "full_cost": self.budget.full_cost,
            "public_cost": self.budget.public_cost,
            "full_parameters": self.parts.count().full_total,
            "granularity": settings.granularity,
            "levels": list(self.space(lambda ranks, active: True).levels),
            "actives": list(self.actives),
            "objective": settings.objective,
            "sampler": settings.sampler,
            "seed": settings.seed,
            "limit": settings.limit,
            "rungs": self.objective.sizes,
            "trials": settings.trials,
            "groups": [
                {"name": group.name, "tasks": list(group.tasks), "kind": group.kind, "domain": group.domain}
                for group in suite.groups
            ],
            "halved_tasks": self.objective.halved,
        }

    def space(self, fits: Callable[[Mapping[str, ExpertRank], int], bool]) -> Space:
        """What to try, of what fits."""
        return Space(
            experts=self.experts,
            full_rank=self.parts.source.shape.full_rank,
            max_rank=self.settings.max_rank,
            actives=self.actives,
            fits=fits,
        )


class Mixtures:
    """Makes mixtures of ranks, each with its identity and cost.

    Args:
        search: the search.
        spectra: singular values of every delta, which spread an expert's rank over its matrices.
    """

    def __init__(self, search: Search, spectra: Spectra) -> None:
        self._search, self._spectra = search, spectra
        self._made: dict[tuple[Any, ...], PlannedMixture] = {}
        self._spread: dict[tuple[str, ExpertRank], ExpertRank] = {}

    def of_point(self, name: str, ranks: Mapping[str, ExpertRank], active: int) -> PlannedMixture:
        """A mixture of the space: one rank per expert, spread as the granularity says."""
        key = (*ranks.values(), active)
        if key not in self._made:
            self._made[key] = self.named(name, {n: self._refined(n, rank) for n, rank in ranks.items()}, active)
        return dataclasses.replace(self._made[key], name=name)

    def named(self, name: str, ranks: Mapping[str, ExpertRank], active: int | None) -> PlannedMixture:
        """A mixture of any ranks."""
        return identify([Wanted(name=name, ranks=ranks, active=active)], self._search.parts)[0]

    def cost(self, mixture: PlannedMixture) -> int:
        """What the budget measures of it."""
        return self._search.budget.cost(self._search.parts.with_spec(mixture.spec).assignment)

    def fits(self, ranks: Mapping[str, ExpertRank], active: int) -> bool:
        """Whether a mixture of the space is within the budget."""
        return self.cost(self.of_point("point", ranks, active)) <= self._search.budget.limit

    def baselines(self) -> dict[str, PlannedMixture]:
        """What every search is compared with, and what the user gave."""
        search = self._search
        active = search.actives[0] if len(search.actives) == 1 else None
        granularity = search.settings.granularity
        specs = baselines(search.parts, search.budget, self._spectra, active, granularity) | search.included
        return {name: self.named(name, spec.ranks, spec.active) for name, spec in specs.items()}

    def _refined(self, expert: str, rank: ExpertRank) -> ExpertRank:
        assert not isinstance(rank, Mapping)
        key = (expert, rank)
        if key not in self._spread:
            search = self._search
            self._spread[key] = spread(search.parts, self._spectra, expert, rank, search.settings.granularity)
        return self._spread[key]
