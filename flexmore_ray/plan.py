"""What a grid computes: a plan names mixtures and tasks; here it is read, expanded, identified and counted.

A plan is a YAML file, or a preset with a source and tasks. Mixture files in it are found relative to the plan, all
other paths relative to the working directory.

    source: zoo://nano                     # or store: DIR, or a list of name=FOLDER
    router: new.router.safetensors         # optional: router rows of all its mixtures, as flexmore refit writes them
    experts: [public, math, ...]           # optional: names for an N-expert checkpoint
    tasks: nano                            # a suite, a task, or a list of them
    split: validation                      # or test
    limit: 100                             # documents per task; left out: all
    mixtures:
      - pairs: [1, 4, 16, full]            # each domain expert alone with the public one, at each rank, active 2
        of: [math, code]                   # optional: only these experts
      - uniform: [1, 16, full, best, best2]  # all experts at one rank, for each number of active experts
        active: [2, 4, all]
      - {name: mine, ranks: {math: 16, news: drop}, active: 4}
      - winner.yaml                        # a mixture file of the same source
      - curve: weighted, optimal           # a method of choosing ranks: its name in the report
        allocation: optimal                # or uniform; see `allocate_optimal`, `allocate_uniform`
        granularity: matrix                # optional, of optimal: expert, projection, layer or matrix share one rank
        budgets: [0.25x, 0.33x, 0.5x, 1x]  # total parameters, as counts or ratios; 1x is the full mixture
        active: 4                          # optional

A curve has one mixture for each budget, called "CURVE BUDGET". `optimal` goes by the spectra of the plan's store; where
there is none yet, planning decomposes the experts into it. To compare stores, run a plan for each into one results
folder: the report puts their curves side by side. So it does with plans of other router rows.

`best` and `best2` are decided by the plan's own pairs: `best` gives each expert the rank with the highest
average over all groups among its two-expert mixtures, `best2` the highest on the groups of its own domain (an
expert without such groups takes the rank of `best`); of equal scores the lower rank wins. The publication of
the grid (arXiv 2602.08818) names these mixtures without their rule, so the rule is ours.

Nothing here runs a model: planning reads weights only to hash them or for spectra, and results only to count them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from flexmore_ray.budget import OptimalRanks, allocate_uniform, parse_budget
from flexmore_ray.errors import UsageError
from flexmore_ray.evaluate import cell_key
from flexmore_ray.mixture import Parts, check_same_factors
from flexmore_ray.results import CellKey
from flexmore_ray.router import RouterRows
from flexmore_ray.scores import Split, TaskSet
from flexmore_ray.source import open_source
from flexmore_ray.spec import DROP, FULL, ExpertRank, MixtureSpec, check_matrix_rank, read_yaml, suggest
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import joint_recipe, open_store
from flexmore_ray.suites import Group

RULES = ("best", "best2")
"""Ranks that results decide."""
PAPER_RANKS = (*(2**k for k in range(15)), FULL)
PRESETS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "paper": ({"pairs": [*PAPER_RANKS]}, {"uniform": [*PAPER_RANKS, *RULES], "active": [2, 4, "all"]}),
}
"""Grids by name; `paper` is that of arXiv 2602.08818: 96 two-expert mixtures and 54 of all seven experts."""
_PLAN_KEYS = ("name", "source", "store", "router", "experts", "tasks", "split", "limit", "seed", "mixtures")
_ENTRY_KEYS = {
    "pairs": ("pairs", "of"),
    "uniform": ("uniform", "active"),
    "ranks": ("name", "ranks", "active"),
    "curve": ("curve", "allocation", "granularity", "budgets", "active"),
}
_ALLOCATIONS = ("uniform", "optimal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan as it was written: nothing of it is opened yet."""

    name: str
    source: tuple[str, ...] = ()
    """SOURCE strings; empty where the store says what it was made from."""
    store: str | None = None
    router: str | None = None
    """File of router rows for all mixtures; None: the experts' own."""
    experts: tuple[str, ...] | None = None
    tasks: tuple[str, ...]
    split: Split = "validation"
    limit: int | None = None
    """Documents per task, the first of the split; None: all."""
    seed: int = 1234
    mixtures: tuple[Mapping[str, Any] | str, ...]
    """Entries as in the YAML file."""
    preset: str | None = None
    """The preset it was made from; None for any other."""
    folder: AnyPath = Path()
    """What relative paths of mixture files are relative to."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise UsageError(f"plan: its name is a word, got {self.name!r}")
        if not self.tasks:
            raise UsageError(f"plan {self.name}: tasks is a suite, a task or a list of them, got none; see --tasks")
        if self.split not in get_args(Split):
            raise UsageError(f"plan {self.name}: split is one of {', '.join(get_args(Split))}, got {self.split!r}")
        for key, low in (("limit", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UsageError(f"plan {self.name}: {key} is an integer >= {low}, got {value!r}")
        if not self.mixtures:
            raise UsageError(f"plan {self.name}: mixtures is a list with at least one entry, got none")

    def spec(self) -> MixtureSpec:
        """The source with every expert full, which all mixtures of the plan are variants of."""
        data = {"source": list(self.source), "store": self.store, "experts": self.experts and list(self.experts)}
        known = {k: v for k, v in data.items() if v} | ({} if self.router is None else {"router": self.router})
        return MixtureSpec.from_dict(known, where=f"plan {self.name}")


def read_plan(path: str | AnyPath | None = None, preset: str | None = None, **given: Any) -> Plan:
    """A plan from a YAML file or a preset.

    Args:
        path: the file; None for a preset.
        preset: a name of `PRESETS`; None for a file.
        given: entries that go before those of the file, None for no such: source, store, experts, tasks, split,
            limit, seed.

    Raises:
        UsageError: both or neither are named, an unknown key, or a value that breaks its rule.
    """
    if (path is None) == (preset is None):
        raise UsageError(f"grid: give a plan file or --preset ({', '.join(PRESETS)}), and only one of them")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset: unknown preset {preset!r}; {suggest(preset, list(PRESETS))}")
    data: dict[str, Any] = (
        _read_file(open_path(path)) if path is not None else {"name": preset, "mixtures": list(PRESETS[preset or ""])}
    )
    where = str(path) if path is not None else f"preset {preset}"
    for key in data:
        if key not in _PLAN_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}; {suggest(str(key), _PLAN_KEYS)}")
    if given.get("source") or given.get("store"):
        data = {k: v for k, v in data.items() if k not in ("source", "store")}
    data = {"name": open_path(path or "").stem or "plan"} | data | {k: v for k, v in given.items() if v is not None}
    if not data.get("source") and not data.get("store"):
        raise UsageError(f"{where}: a plan names its source or its store, got neither; see --source")
    for key in ("source", "tasks"):
        data[key] = _strings(data.get(key), f"{where}: {key}")
    if not isinstance(data.get("mixtures", []), list):
        raise UsageError(f"{where}: mixtures is a list of entries, got {data['mixtures']!r}")
    data["mixtures"] = tuple(data.get("mixtures") or ())
    experts = data.get("experts")
    data["experts"] = None if experts is None else tuple(_strings(experts, f"{where}: experts"))
    return Plan(**data, preset=preset, folder=open_path(path).parent if path is not None else Path())


def _read_file(path: AnyPath) -> dict[str, Any]:
    data = read_yaml(path, "plan file")
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a plan is a mapping with keys {', '.join(_PLAN_KEYS)}")
    return data


def _strings(value: Any, where: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value or []
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise UsageError(f"{where} is a string or a list of strings, got {value!r}")
    return tuple(items)


# ------------------------------------------------------------------- from entries to mixtures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A mixture as the plan names it."""

    name: str
    ranks: Mapping[str, ExpertRank]
    """Rank of every domain expert; empty where `rule` decides."""
    active: int | None
    """Experts per token; None: as the checkpoint says."""
    pair: str | None = None
    """The domain expert of a two-expert mixture of `pairs`; None for any other."""
    rule: str | None = None
    """One of `RULES` where results decide the ranks; None where the plan does."""
    curve: str | None = None
    """The curve that it is a point of; None for any other."""
    budget: str | None = None
    """Its budget on the curve, as the plan says it."""


def expand(plan: Plan, parts: Parts) -> list[Wanted]:
    """All mixtures that a plan names, in its order, pairs first; names are unique.

    Raises:
        UsageError: an entry with unknown keys or values, a rule without pairs, or one name for two mixtures.
        StoreError: a curve needs spectra that the store does not hold.
    """
    domains = parts.source.experts[1:]
    wanted = [item for index, entry in enumerate(plan.mixtures) for item in _expand(plan, index, entry, parts)]
    by_name: dict[str, Wanted] = {}
    for item in wanted:
        if by_name.setdefault(item.name, item) != item:
            raise UsageError(f"plan {plan.name}: two mixtures are called {item.name!r}; give one another name")
    first = sorted(by_name.values(), key=lambda item: item.pair is None)
    if any(item.rule for item in first) and {item.pair for item in first} - {None} != set(domains):
        raise UsageError(
            f"plan {plan.name}: best and best2 choose among two-expert mixtures of every expert; add an entry pairs"
        )
    return first


def _expand(plan: Plan, index: int, entry: Any, parts: Parts) -> Iterator[Wanted]:
    where = f"plan {plan.name}: mixtures[{index}]"
    domains = parts.source.experts[1:]
    if isinstance(entry, str):
        yield _from_file(plan, entry, parts)
        return
    kind = next((kind for kind in _ENTRY_KEYS if isinstance(entry, Mapping) and kind in entry), None)
    if kind is None:
        raise UsageError(f"{where}: an entry is a mixture file or has one of {', '.join(_ENTRY_KEYS)}; got {entry!r}")
    for key in entry:
        if key not in _ENTRY_KEYS[kind]:
            raise UsageError(f"{where}: unknown key {key!r} beside {kind}; {suggest(str(key), _ENTRY_KEYS[kind])}")
    if kind == "ranks":
        name = entry.get("name", f"mixture-{index}")
        if not isinstance(name, str) or not isinstance(entry["ranks"], Mapping):
            raise UsageError(f"{where}: name is a word and ranks a mapping from expert to rank, got {entry!r}")
        ranks = {str(k): v for k, v in entry["ranks"].items()}
        yield Wanted(name=name, ranks=dict.fromkeys(domains, FULL) | ranks, active=entry.get("active"))
    elif kind == "pairs":
        chosen = _strings(entry.get("of", list(domains)), f"{where}.of")
        if not chosen:
            raise UsageError(f"{where}.of: a list of experts is needed, got an empty one")
        for expert in chosen:
            if expert not in domains:
                raise UsageError(f"{where}.of: unknown expert {expert!r}; {suggest(expert, list(domains))}")
            for rank in _ranks(entry["pairs"], f"{where}.pairs"):
                ranks = dict.fromkeys(domains, DROP) | {expert: rank}
                yield Wanted(name=f"pair-{expert}-{_word(rank)}", ranks=ranks, active=2, pair=expert)
    elif kind == "curve":
        yield from _curve(plan, entry, where, parts)
    else:
        yield from _uniform(plan, entry, where, parts)


def _uniform(plan: Plan, entry: Mapping[str, Any], where: str, parts: Parts) -> Iterator[Wanted]:
    domains = parts.source.experts[1:]
    for active in _actives(entry.get("active"), plan, where, parts):
        for rank in _ranks(entry["uniform"], f"{where}.uniform", RULES):
            if rank in RULES:
                yield Wanted(name=f"{rank}-a{active}", ranks={}, active=active, rule=str(rank))
            else:
                ranks = dict.fromkeys(domains, rank)
                yield Wanted(name=f"uniform-{_word(rank)}-a{active}", ranks=ranks, active=active)


def _curve(plan: Plan, entry: Mapping[str, Any], where: str, parts: Parts) -> Iterator[Wanted]:
    """The mixtures of a curve, smallest budget first."""
    name, allocation, budgets = entry["curve"], entry.get("allocation"), entry.get("budgets")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}.curve: its name is a word or several, got {name!r}")
    if allocation not in _ALLOCATIONS:
        raise UsageError(f"{where}.allocation: one of {', '.join(_ALLOCATIONS)} is needed, got {allocation!r}")
    if allocation == "uniform" and "granularity" in entry:
        raise UsageError(f"{where}.granularity: it is of optimal, uniform has one rank for all; leave it out")
    if not isinstance(budgets, list) or not budgets:
        raise UsageError(f"{where}.budgets: a list of counts or ratios such as 0.33x is needed, got {budgets!r}")
    if born := [key.expert for key in parts.source.born_ranks]:
        raise UsageError(
            f"{where}: expert {born[0]} was low-rank from the start, and a curve chooses ranks for full-size experts "
            "only; name its mixtures by ranks"
        )
    actives = _actives(entry.get("active"), plan, where, parts)
    if len(actives) > 1:
        raise UsageError(f"{where}.active: a curve has one number of active experts, got {entry['active']!r}")
    full = parts.count().full_total
    try:
        counts = {str(budget): parse_budget(budget, full) for budget in budgets}
        allocate = _allocation(entry, parts)
        for budget in sorted(counts, key=lambda text: counts[text]):
            dense = counts[budget] >= full
            ranks = dict.fromkeys(parts.source.experts[1:], FULL) if dense else allocate(counts[budget])
            yield Wanted(name=f"{name} {budget}", ranks=ranks, active=actives[0], curve=name, budget=budget)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _allocation(entry: Mapping[str, Any], parts: Parts) -> Callable[[int], dict[str, ExpertRank]]:
    """From a budget in total parameters to ranks."""
    shape, experts = parts.source.shape, parts.source.experts
    if entry["allocation"] == "uniform":
        return functools.partial(allocate_uniform, shape, experts)
    keys = [key for name in experts[1:] for key in shape.keys(name)]
    spectra = {key: parts.factors.spectrum(key).numpy() for key in keys}
    return OptimalRanks(shape, experts, spectra, entry.get("granularity", "matrix")).allocate


def _actives(value: Any, plan: Plan, where: str, parts: Parts) -> list[int]:
    """Numbers of active experts of an entry `uniform` or `curve`, each once."""
    experts = len(parts.source.experts)
    items = value if isinstance(value, list) else [parts.assignment.active if value is None else value]
    numbers = [experts if item == "all" else item for item in items]
    if not numbers:
        raise UsageError(f"{where}.active: a number of experts, or a list of them, is needed, got an empty one")
    if plan.preset:  # on a mixture of fewer experts than the publication's
        numbers = [number for number in numbers if number <= experts]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= experts:
            raise UsageError(f"{where}.active: integers from 1 to the {experts} experts, or all; got {number!r}")
    return list(dict.fromkeys(numbers))


def _ranks(value: Any, where: str, words: Sequence[str] = ()) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UsageError(f"{where}: a list of ranks is needed, got an empty one")
    if DROP in items:
        raise UsageError(f"{where}: drop leaves out an expert that an entry with ranks names; here all have one rank")
    return [item if item in words else check_matrix_rank(item, where=where) for item in items]


def _word(rank: Any) -> str:
    return FULL if rank == FULL else f"r{rank}"


def _from_file(plan: Plan, file: str, parts: Parts) -> Wanted:
    path = plan.folder / file
    spec = MixtureSpec.load(path)
    store = open_store(spec.store) if spec.store else None
    source = spec.source or (store.sources if store else ())
    ours, theirs = parts.source.describe(), open_source(source, spec.experts).describe()
    if theirs != ours:
        raise UsageError(f"plan {plan.name}: {path} is of {', '.join(theirs)}, the plan of {', '.join(ours)}")
    check_same_factors(spec, parts, f"plan {plan.name}: {path}")
    theirs_rows = RouterRows.load(spec.router).digest if spec.router else ""
    if theirs_rows != parts.source.rows_digest:
        own = "those that its experts came with"
        raise UsageError(
            f"plan {plan.name}: {path} has the router rows {spec.router or own}, the plan {parts.spec.router or own}"
        )
    ranks = dict.fromkeys(parts.source.experts[1:], FULL) | dict(spec.ranks)
    return Wanted(name=path.stem, ranks=ranks, active=spec.active)


# ----------------------------------------------------------------------- identities and cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedMixture:
    """A mixture with its identity."""

    name: str
    spec: MixtureSpec
    """With a rank for every domain expert, and its `mixture_id`."""
    active: int
    parameters: int
    full_parameters: int
    kept: tuple[str, ...]
    """Names of the kept experts."""
    highest_rank: int
    """Highest rank of a low-rank matrix."""
    uses_factors: bool
    """Whether any expert is cut to a rank of its decomposition."""
    pair: str | None
    rank: Any
    """Canonical rank of the expert of a pair, as a mixture file says it; None for any other mixture."""
    curve: str | None = None
    budget: str | None = None
    """The curve that it is a point of, and its budget there; None for any other mixture."""

    @property
    def mixture_id(self) -> str:
        """Hash of everything that decides its outputs."""
        assert self.spec.mixture_id is not None
        return self.spec.mixture_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One (mixture, task) pair to compute."""

    mixture: PlannedMixture
    task: str
    key: CellKey


def identify(wanted: Sequence[Wanted], parts: Parts) -> list[PlannedMixture]:
    """Mixtures with their identities; hashes the weights of the experts.

    Raises:
        UsageError: an unknown expert, a rank or a number of active experts that breaks its rule (the mixture
            is named).
    """
    planned = []
    for item in wanted:
        try:
            spec = dataclasses.replace(parts.spec.with_ranks(item.ranks), active=item.active)
            variant = parts.with_spec(spec)
        except UsageError as error:
            raise UsageError(f"mixture {item.name}: {error}") from None
        count, identified = variant.count(), variant.identified()
        ranks = {name: canonical_rank(name, variant, parts) for name in parts.source.experts[1:]}
        planned.append(
            PlannedMixture(
                name=item.name,
                spec=dataclasses.replace(identified, ranks=ranks),
                active=variant.assignment.active,
                parameters=count.total,
                full_parameters=count.full_total,
                kept=tuple(variant.assignment.ranks),
                highest_rank=variant.assignment.highest_rank,
                uses_factors=variant.uses_factors,
                pair=item.pair,
                rank=ranks[item.pair] if item.pair else None,
                curve=item.curve,
                budget=item.budget,
            )
        )
    return planned


def canonical_rank(expert: str, variant: Parts, full: Parts) -> ExpertRank:
    """An expert's rank in a mixture, in the shortest way; "full" where it is as its owner made it, low-rank or not."""
    rank = variant.assignment.compact(expert)
    return FULL if rank == full.assignment.compact(expert) else rank


def plan_cells(mixtures: Sequence[PlannedMixture], tasks: TaskSet, dtype: str) -> dict[str, Cell]:
    """The distinct cells of some mixtures on all tasks, by hash, in the order in which to compute them.

    Mixtures that keep the same experts follow each other, so that a worker keeps what it holds.
    """
    families = list(dict.fromkeys(mixture.kept for mixture in mixtures))
    ordered = sorted(mixtures, key=lambda mixture: families.index(mixture.kept))
    cells: dict[str, Cell] = {}
    for mixture in ordered:
        for task in tasks.tasks.values():
            key = cell_key(mixture.mixture_id, dtype, task)
            cells.setdefault(key.cell, Cell(mixture=mixture, task=task.name, key=key))
    return cells


# -------------------------------------------------------------------------------- best, best2


def resolve(
    waiting: Sequence[Wanted],
    pairs: Sequence[PlannedMixture],
    scores: Mapping[str, Mapping[str, float]],
    groups: Sequence[Group],
) -> list[Wanted]:
    """The mixtures whose ranks results decide, with their ranks; see this module's head for the rules.

    Args:
        waiting: mixtures with a rule.
        pairs: the plan's two-expert mixtures.
        scores: mixture_id -> task -> score; a pair without a score for every task takes no part.
        groups: the groups of the tasks.

    Raises:
        UsageError: an expert has no pair with scores for every task.
    """
    chosen = {rule: best_ranks(rule, pairs, scores, groups) for rule in {item.rule for item in waiting} if rule}
    return [dataclasses.replace(item, ranks=chosen[item.rule]) for item in waiting if item.rule]


def best_ranks(
    rule: str,
    pairs: Sequence[PlannedMixture],
    scores: Mapping[str, Mapping[str, float]],
    groups: Sequence[Group],
) -> dict[str, Any]:
    """By domain expert, the rank that `best` or `best2` gives it."""
    tasks = {task for group in groups for task in group.tasks}
    ranks: dict[str, Any] = {}
    for expert in dict.fromkeys(pair.pair for pair in pairs if pair.pair):
        own = [group for group in groups if group.domain == expert]
        judged_by = own if rule == "best2" and own else groups
        candidates = [pair for pair in pairs if pair.pair == expert and tasks <= set(scores.get(pair.mixture_id, ()))]
        if not candidates:
            raise UsageError(f"{rule}: no two-expert mixture of {expert} has a score for every task")
        by_size = sorted(candidates, key=lambda pair: pair.parameters)
        ranks[expert] = max(by_size, key=lambda pair: _average(scores[pair.mixture_id], judged_by)).rank
    return ranks


def _average(scores: Mapping[str, float], groups: Sequence[Group]) -> float:
    """Average of group means."""
    return sum(sum(scores[task] for task in group.tasks) / len(group.tasks) for group in groups) / len(groups)


# ----------------------------------------------------------------------------------- the record


def plan_record(
    plan: Plan,
    parts: Parts,
    tasks: TaskSet,
    dtype: str,
    mixtures: Sequence[PlannedMixture],
    waiting: Sequence[Wanted] = (),
) -> dict[str, Any]:
    """What `results/plans/` keeps of a plan: the names of its mixtures, its groups, and what it was made from."""
    full = {name: parts.assignment.summary(name) for name in parts.source.experts[1:]}
    own = parts.source.with_own_rows  # plans of the same weights share a folder, whatever their router rows
    digests = {name: own.expert_digest(name)[:16] for name in own.experts}
    return {
        "format": "flexmore-plan-1",
        "name": plan.name,
        "source": parts.source.describe(),
        "experts": list(parts.source.experts),
        "full_rank": parts.source.shape.full_rank,
        "full_ranks": {name: rank for name, rank in full.items() if isinstance(rank, int)},
        "weights": parts.weights,
        "digests": digests,
        "factors": describe_factors(parts),
        "dtype": dtype,
        "split": plan.split,
        "limit": plan.limit,
        "seed": plan.seed,
        "entries": list(plan.mixtures),
        "groups": [
            {"name": group.name, "tasks": list(group.tasks), "kind": group.kind, "domain": group.domain}
            for group in tasks.suite.groups
        ],
        "tasks": {name: {"version": task.version, "hash": task.content_hash} for name, task in tasks.tasks.items()},
        "mixtures": [
            {
                "name": mixture.name,
                "mixture_id": mixture.mixture_id,
                "ranks": dict(mixture.spec.ranks),
                "active": mixture.active,
                "parameters": mixture.parameters,
                "full_parameters": mixture.full_parameters,
                **({"curve": mixture.curve, "budget": mixture.budget} if mixture.curve else {}),
            }
            for mixture in mixtures
        ]
        + [{"name": item.name} for item in waiting],
    }


def describe_factors(parts: Parts) -> str:
    """What decides mixtures of some parts besides weights and ranks; empty for plain factors and the experts' own rows.

    It is "WEIGHTING:HASH" of the factors, "router:HASH" of router rows from a file, or both with a "+" between them.
    """
    recipe = joint_recipe(map(parts.factors.recipe, parts.source.experts[1:]))
    hashes = {parts.factors.weighting: recipe, "router": parts.source.rows_digest}
    return "+".join(f"{what}:{hash_[:8]}" for what, hash_ in hashes.items() if hash_)


def record_name(record: Mapping[str, Any]) -> str:
    """File name of a record: the same for a plan before and after its second stage, another for other factors."""
    left_out = ("mixtures", "store", *(() if record["factors"] else ("factors",)))
    content = {key: value for key, value in record.items() if key not in left_out}
    return f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]}.json"
