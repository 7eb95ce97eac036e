"""A results folder in sections: the cells that may be compared with each other, and what is missing of them.

A section has one set of weights and sources, one split, number of documents, seed and dtype; its mixtures and groups
come from the plans that the grid left in `plans/`, or, for single evaluations, from the cells themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.results import DONE, read_cells
from flexmore_ray.spec import DROP, FULL
from flexmore_ray.storage import AnyPath, StorageError, matching, open_path
from flexmore_ray.suites import Group

Rank = int | str
"""An integer >= 1, "full", "drop", or "8-64" where the rank differs between matrices."""

PLAN_FORMAT = "flexmore-plan-1"
LOWER_IS_BETTER = frozenset({"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"})
"""Metrics of lm-eval that are better when lower."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What two results must have in common to be compared."""

    weights: str
    """Hash of the weights that all experts are corrections of; empty in results of older versions."""
    sources: tuple[str, ...]
    """SOURCE strings of the experts."""
    split: str
    limit: int | None
    """Documents per task from the start of the split; None: all."""
    seed: int
    dtype: str

    def describe(self) -> str:
        """One line for a heading."""
        documents = "all documents" if self.limit is None else f"first {self.limit} documents"
        what = f"{self.split} split, {documents}, seed {self.seed}, {self.dtype}"
        return f"{', '.join(self.sources) or 'unknown source'}: {what}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """One mixture of a section."""

    names: tuple[str, ...]
    """The names that a plan gives it, or one made of its ranks."""
    mixture_id: str
    ranks: Mapping[str, Rank]
    """Of every domain expert, in canonical form."""
    active: int
    parameters: int
    full_parameters: int | None = None
    """Of the same source with all experts full; None: not known."""
    factors: str | None = None
    """What decides it besides weights and ranks: "WEIGHTING:HASH" of its factors, "router:HASH" of its router rows, or
    both with a "+" between them; empty for plain factors, or none, and the experts' own rows, None where not known."""
    curves: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Curve -> its budgets there, of the curves that it is a point of."""

    @property
    def name(self) -> str:
        """All names as one, without those that only spell the full rank as a number."""
        full = {name for name in self.names if re.search(r"-full(-|$)", name)}
        shown = [n for n in self.names if n in full or re.sub(r"-r\d+(?=-|$)", "-full", n) not in full]
        return " = ".join(shown)

    @property
    def kept(self) -> tuple[str, ...]:
        """Domain experts that are not dropped."""
        return tuple(name for name, rank in self.ranks.items() if rank != DROP)

    @property
    def pair(self) -> tuple[str, Rank] | None:
        """Expert and rank of a two-expert mixture: the public and one domain expert, both active."""
        if len(self.kept) != 1 or self.active != 2:
            return None
        rank = self.ranks[self.kept[0]]
        return (self.kept[0], rank) if isinstance(rank, int) or rank == FULL else None

    @property
    def is_full(self) -> bool:
        """Whether every expert has its own dense weights; the mixture that others are compared with."""
        return set(self.ranks.values()) <= {FULL}

    @property
    def family(self) -> str:
        """full, uniform, two experts, public only, or heterogeneous."""
        if self.is_full:
            return "full"
        if not self.kept:
            return "public only"
        if self.pair:
            return "two experts"
        ranks = set(self.ranks.values())
        return "uniform" if len(ranks) == 1 and isinstance(next(iter(ranks)), int) else "heterogeneous"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What a committed cell says, as far as the report needs it."""

    cell: str
    mixture_id: str
    ranks: Mapping[str, Any]
    sources: tuple[str, ...]
    experts: tuple[str, ...]
    """Names of all experts, the public one first; empty where the mixture does not list them."""
    active: int
    parameters: int
    task: str
    group: str
    metric: str | None
    value: float | None
    seconds: float
    done: bool
    error: str | None
    setting: Setting
    edition: tuple[str, int, str]
    """Version, few-shot examples and content hash of the task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid plan as the grid wrote it, or several of the same tasks and experts."""

    names: tuple[str, ...]
    setting: Setting
    experts: tuple[str, ...]
    full_rank: int | None
    full_ranks: Mapping[str, int]
    """Expert -> own rank, of experts that were low-rank from the start."""
    store: str | None
    groups: tuple[Group, ...]
    mixtures: tuple[Mixture, ...]
    unresolved: tuple[str, ...]
    """Mixtures whose ranks depend on results that are not there yet."""
    editions: Mapping[str, str]
    """Task -> content hash; empty where the plan does not say, and any is taken."""
    digests: Mapping[str, str]
    """Expert -> hash of its weights; empty where the plan does not say."""
    factors: str | None
    """As `Mixture.factors`, of its mixtures that use factors."""
    curves: tuple[str, ...]
    """Names of its curves, in its order."""

    def takes(self, cell: Cell) -> bool:
        """Whether a cell may be compared with this plan's mixtures.

        A task without a test split is tested on its validation split: the content hash, where the plan has it,
        tells the documents apart better than the split's name does.
        """
        if not any(cell.task in group.tasks for group in self.groups):
            return False
        wanted = self.setting
        if any(cell.mixture_id == mixture.mixture_id for mixture in self.mixtures):
            wanted = dataclasses.replace(wanted, weights=cell.setting.weights, sources=cell.setting.sources)
        if cell.task in self.editions:
            wanted = dataclasses.replace(wanted, split=cell.setting.split)
        return cell.setting == wanted and cell.edition[2] == self.editions.get(cell.task, cell.edition[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Results that may be compared with each other, and what is missing of them."""

    setting: Setting
    plans: tuple[str, ...]
    """Names of the plans; none for results of single evaluations."""
    experts: tuple[str, ...]
    """Domain experts."""
    full_rank: int | None
    """Rank from which on an expert is full; None: not known."""
    full_ranks: Mapping[str, int]
    """Expert -> own rank, of experts that were low-rank from the start: there they are full."""
    store: str | None
    """Folder of the factors; None: not known."""
    groups: tuple[Group, ...]
    mixtures: tuple[Mixture, ...]
    curves: tuple[str, ...]
    """Names of the curves of score against parameters, the baseline first."""
    cells: Mapping[tuple[str, str], Cell]
    """(mixture_id, task) -> cell that is done."""
    failed: tuple[Cell, ...]
    missing: Mapping[str, tuple[str, ...]]
    """Name of a planned mixture -> tasks without a result, failed ones not counted."""
    unresolved: tuple[str, ...]
    left_out: Mapping[str, str]
    """Task -> its metric, for tasks whose metric is better when lower."""
    other_splits: Mapping[str, str]
    """Task -> split that it was scored on, where that is not the setting's."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, group by group."""
        return tuple(task for group in self.groups for task in group.tasks)

    def name_of(self, mixture_id: str) -> str:
        """The name of a mixture."""
        return next(mixture.name for mixture in self.mixtures if mixture.mixture_id == mixture_id)

    def full(self, active: int) -> int | None:
        """Column of the mixture with all experts full at so many active ones; None if it was not scored."""
        found = (i for i, m in enumerate(self.mixtures) if m.is_full and m.active == active)
        return next(found, None)

    def public(self) -> int | None:
        """Column of the public expert alone; None if it was not scored."""
        return next((i for i, m in enumerate(self.mixtures) if m.family == "public only"), None)


def read_sections(results: str | AnyPath) -> list[Section]:
    """Everything in a results folder, in sections that may each be compared within themselves.

    Raises:
        UsageError: There is no such folder, or no cell in it.
        FlexmoreError: A file is damaged, or a task is there in two editions in one section.
    """
    root = open_path(results)
    if not root.is_dir():
        raise UsageError(f"no results folder {root}; make one with flexmore grid or flexmore eval --results")
    if (root / "search.json").exists():
        raise UsageError(f"{root} is of a search: its report is {root}/report.md, its results are in {root}/results")
    rows = [row for row in read_cells(root).to_pylist() if "selection" not in json.loads(row["versions"])["identity"]]
    if not rows:
        raise UsageError(f"{root} holds no results: no score in {root / 'cells'}; run flexmore grid or flexmore eval")
    plans = _order(_read_plan(path) for path in matching(root / "plans", "*.json"))
    homes = {mixture.mixture_id: plan for plan in reversed(plans) for mixture in plan.mixtures}
    cells = [_read_cell(row, homes.get(row["mixture_id"])) for row in rows]
    sections: list[Section] = []
    used: set[str] = set()
    for plan in _merge_plans(plans):
        taken = _comparable(plan, cells)
        used.update(cell.cell for cell in taken)
        sections.append(_section(plan, taken))
    rest: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.cell not in used:
            rest.setdefault(repr(cell.setting), []).append(cell)
    sections += [_section(_unplanned(found), found) for _, found in sorted(rest.items())]
    return sections


def _read_cell(row: Mapping[str, Any], home: Plan | None) -> Cell:
    """A row of the cells; `home` is a plan that names its mixture, None if there is none."""
    versions, mixture = json.loads(row["versions"]), json.loads(row["mixture"])
    identity = versions["identity"]
    setting = Setting(
        weights=versions.get("weights") or (home.setting.weights if home else ""),
        sources=home.setting.sources if home else _strings(mixture.get("source")),
        **{name: identity[name] for name in ("split", "limit", "seed", "dtype")},
    )
    return Cell(
        ranks=mixture.get("ranks", {}),
        sources=setting.sources,
        experts=home.experts if home else tuple(mixture.get("experts") or ()),
        group=row["group"] or row["task"],
        seconds=row["seconds"] or 0.0,
        done=row["status"] == DONE,
        setting=setting,
        edition=(identity["task_version"], identity["num_fewshot"], identity["task_hash"]),
        **{n: row[n] for n in ("cell", "mixture_id", "active", "parameters", "task", "metric", "value", "error")},
    )


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _read_plan(path: AnyPath) -> Plan:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != PLAN_FORMAT:
            raise ValueError(f"format {data['format']!r}, not {PLAN_FORMAT!r}")
        setting = Setting(
            sources=_strings(data["source"]),
            **{name: data[name] for name in ("weights", "split", "limit", "seed", "dtype")},
        )
        resolved = [entry for entry in data["mixtures"] if entry.get("mixture_id")]
        return Plan(
            names=(data["name"],),
            setting=setting,
            experts=tuple(data["experts"]),
            full_rank=data["full_rank"],
            full_ranks=data.get("full_ranks", {}),
            store=data.get("store"),
            groups=tuple(Group(**group | {"tasks": tuple(group["tasks"])}) for group in data["groups"]),
            mixtures=_join(_plan_mixture(entry, data) for entry in resolved),
            unresolved=tuple(entry["name"] for entry in data["mixtures"] if not entry.get("mixture_id")),
            editions={name: task["hash"] for name, task in data.get("tasks", {}).items()},
            digests=data.get("digests", {}),
            factors=data.get("factors"),
            curves=tuple(dict.fromkeys(entry["curve"] for entry in resolved if "curve" in entry)),
        )
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FlexmoreError(f"plan {path} cannot be read ({what}); start the grid again to write it anew") from error


def _plan_mixture(entry: Mapping[str, Any], data: Mapping[str, Any]) -> Mixture:
    ranks = _canonical(entry["ranks"], data["experts"][1:], data["full_rank"])
    curves = {entry["curve"]: (entry["budget"],)} if "curve" in entry else {}
    ends_curves = curves and set(ranks.values()) <= {FULL}  # it is the end of every curve: one name is enough
    return Mixture(
        names=(f"full-a{entry['active']}" if ends_curves else entry["name"],),
        mixture_id=entry["mixture_id"],
        ranks=ranks,
        active=entry["active"],
        parameters=entry["parameters"],
        full_parameters=entry.get("full_parameters"),
        factors=data.get("factors") if _uses_factors(ranks) else _router(data.get("factors")),
        curves=curves,
    )


def _uses_factors(ranks: Mapping[str, Rank]) -> bool:
    return not set(ranks.values()) <= {FULL, DROP}


def _router(factors: str | None) -> str:
    """The part of `Mixture.factors` that is of the router rows."""
    return next((part for part in (factors or "").split("+") if part.startswith("router:")), "")


def _order(plans: Iterable[Plan]) -> list[Plan]:
    """Plans of plain factors first, then by name; curves of one name that are not the same told apart.

    What a plan of an older version does not say of a mixture's factors, another plan with the mixture may.
    """
    plans = sorted(plans, key=lambda plan: (plan.factors or "", plan.names))
    factors = {m.mixture_id: m.factors for plan in plans for m in plan.mixtures if m.factors is not None}
    kinds: dict[str, set[tuple[str | None, int]]] = {}
    for plan in plans:
        for mixture in plan.mixtures:
            for curve in mixture.curves:
                kinds.setdefault(curve, set()).add((plan.factors, mixture.active))

    words = _factor_words(plan.factors for plan in plans)

    def label(curve: str, plan: Plan, active: int) -> str:
        stores, actives = (len(set(values)) for values in zip(*kinds[curve], strict=True))
        apart = [words[plan.factors]] * (stores > 1) + [f"a{active}"] * (actives > 1)
        return f"{curve} ({', '.join(apart)})" if apart else curve

    out = []
    for plan in plans:
        mixtures = tuple(
            dataclasses.replace(
                m,
                factors=factors.get(m.mixture_id),
                curves={label(curve, plan, m.active): budget for curve, budget in m.curves.items()},
            )
            for m in plan.mixtures
        )
        labels = (label(curve, plan, m.active) for curve in plan.curves for m in plan.mixtures if curve in m.curves)
        out.append(dataclasses.replace(plan, mixtures=mixtures, curves=tuple(dict.fromkeys(labels))))
    return out


def _canonical(ranks: Mapping[str, Any], experts: Iterable[str], full_rank: int | None) -> dict[str, Rank]:
    """One rank per expert: those at or above full are full, those that differ by matrix are "low-high"."""
    out: dict[str, Rank] = {}
    for name in experts:
        given = ranks.get(name, FULL)
        parts = itertools.chain.from_iterable(
            part if isinstance(part, list) else [part]
            for part in (given.values() if isinstance(given, Mapping) else [given])
        )
        high = math.inf if full_rank is None else full_rank
        values = {FULL if isinstance(part, int) and part >= high else part for part in parts}
        numbers = sorted(value for value in values if isinstance(value, int))
        out[name] = (
            next(iter(values)) if len(values) == 1 else f"{numbers[0]}-{FULL if FULL in values else numbers[-1]}"
        )
    return out


def _factor_words(factors: Iterable[str | None]) -> dict[str | None, str]:
    """What to call factors: plain, or their weighting and router, or all of it where several have these."""
    known = set(factors)
    short = {text: re.sub(r":\w+", "", text) for text in known if text}
    times = Counter(short.values())
    return {text: (short[text] if times[short[text]] == 1 else text) if text else "plain" for text in known}


def _join(mixtures: Iterable[Mixture]) -> tuple[Mixture, ...]:
    """Each mixture once, with all names it has and all curves it is on."""
    found: dict[str, Mixture] = {}
    for mixture in mixtures:
        known = found.setdefault(mixture.mixture_id, mixture)
        names = tuple(dict.fromkeys(known.names + mixture.names))
        curves = {
            name: tuple(dict.fromkeys(known.curves.get(name, ()) + mixture.curves.get(name, ())))
            for name in {**known.curves, **mixture.curves}
        }
        found[mixture.mixture_id] = dataclasses.replace(known, names=names, curves=curves)
    return tuple(found.values())


def _merge_plans(plans: Iterable[Plan]) -> list[Plan]:
    """Plans of the same tasks, experts and setting as one, unless their mixtures contradict each other.

    Two-expert mixtures of other factors or router rows stay apart: each have best ranks of their own.
    """
    merged: list[Plan] = []
    for plan in plans:
        for i, other in enumerate(merged):
            same = all(
                getattr(plan, name) == getattr(other, name)
                for name in ("setting", "experts", "full_rank", "full_ranks", "groups", "editions")
            )
            same = same and all(plan.digests.get(name, hash_) == hash_ for name, hash_ in other.digests.items())
            mixtures = _join(other.mixtures + plan.mixtures)
            pairs = {mixture.factors for mixture in mixtures if mixture.pair and _uses_factors(mixture.ranks)}
            routers = {_router(mixture.factors) for mixture in mixtures if mixture.pair}
            if same and len(pairs) < 2 and len(routers) < 2 and _contradiction(mixtures) is None:
                resolved = {name for mixture in mixtures for name in mixture.names}
                merged[i] = dataclasses.replace(
                    other,
                    names=tuple(dict.fromkeys(other.names + plan.names)),
                    mixtures=mixtures,
                    unresolved=tuple(n for n in dict.fromkeys(other.unresolved + plan.unresolved) if n not in resolved),
                    store=other.store or plan.store,
                    digests={**plan.digests, **other.digests},
                    curves=tuple(dict.fromkeys(other.curves + plan.curves)),
                )
                break
        else:
            merged.append(plan)
    return merged


def _assignment(mixture: Mixture) -> str:
    """What decides a mixture but for its weights and factors; ranks that differ by matrix are not told apart by it."""
    simple = all(isinstance(rank, int) or rank in (FULL, DROP) for rank in mixture.ranks.values())
    return json.dumps([mixture.ranks, mixture.active], sort_keys=True) if simple else mixture.mixture_id


def _contradiction(mixtures: Iterable[Mixture]) -> tuple[Mixture, Mixture] | None:
    """Two mixtures of the same ranks whose factors, as far as they are known, are the same too; None if none are."""
    by_ranks: dict[str, list[Mixture]] = {}
    for mixture in mixtures:
        others = by_ranks.setdefault(_assignment(mixture), [])
        for other in others:
            if other.factors is None or mixture.factors in (None, other.factors):
                return other, mixture
        others.append(mixture)
    return None


def _comparable(plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
    """Cells of planned mixtures, and of others that do not claim the same ranks under another identity."""
    known = {mixture.mixture_id for mixture in plan.mixtures}
    taken = {_assignment(mixture) for mixture in plan.mixtures}
    cells = [cell for cell in cells if plan.takes(cell)]
    strange = {m.mixture_id for m in _others(plan, cells) if m.mixture_id not in known and _assignment(m) in taken}
    return [cell for cell in cells if cell.mixture_id not in strange]


def _unplanned(cells: Sequence[Cell]) -> Plan:
    """What a plan would have said of cells that no plan names."""
    tasks: dict[str, set[str]] = {}
    for cell in cells:
        tasks.setdefault(cell.group, set()).add(cell.task)
    names = dict.fromkeys(name for cell in cells for name in cell.experts[1:])
    names |= dict.fromkeys(sorted({name for cell in cells for name in cell.ranks}))
    return Plan(
        names=(),
        setting=cells[0].setting,
        experts=("public", *(name for name in names if name != "public")),
        full_rank=None,
        full_ranks={},
        store=None,
        groups=tuple(Group(name=name, tasks=tuple(sorted(found))) for name, found in sorted(tasks.items())),
        mixtures=(),
        unresolved=(),
        editions={},
        digests={},
        factors=None,
        curves=(),
    )


def _section(plan: Plan, cells: Sequence[Cell]) -> Section:
    done = [cell for cell in cells if cell.done]
    _check_editions(done)
    left_out = {cell.task: cell.metric or "" for cell in done if cell.metric in LOWER_IS_BETTER}
    groups = tuple(
        dataclasses.replace(group, tasks=tuple(task for task in group.tasks if task not in left_out))
        for group in plan.groups
    )
    by_key = {(cell.mixture_id, cell.task): cell for cell in done if cell.task not in left_out}
    failed = tuple(cell for cell in cells if not cell.done and (cell.mixture_id, cell.task) not in by_key)
    attempted = set(by_key) | {(cell.mixture_id, cell.task) for cell in failed}
    kept = tuple(group for group in groups if group.tasks)
    tasks = [task for group in kept for task in group.tasks]
    mixtures = _name_apart(plan.mixtures + _others(plan, cells))
    planned = mixtures[: len(plan.mixtures)]
    missing = {m.name: tuple(t for t in tasks if (m.mixture_id, t) not in attempted) for m in planned}
    _check_identities(mixtures, plan.setting)
    return Section(
        setting=plan.setting,
        plans=plan.names,
        experts=plan.experts[1:],
        full_rank=plan.full_rank,
        full_ranks=plan.full_ranks,
        store=plan.store,
        groups=kept,
        mixtures=_with_full_parameters(mixtures),
        curves=plan.curves,
        cells=by_key,
        failed=tuple(sorted(failed, key=lambda cell: (cell.task, cell.mixture_id))),
        missing={name: found for name, found in missing.items() if found},
        unresolved=plan.unresolved,
        left_out=left_out,
        other_splits={cell.task: cell.setting.split for cell in done if cell.setting.split != plan.setting.split},
    )


def _check_editions(cells: Sequence[Cell]) -> None:
    """One task, one version: scores on different documents or prompts are not compared."""
    by_task: dict[str, Counter[tuple[str, int, str]]] = {}
    for cell in cells:
        by_task.setdefault(cell.task, Counter())[cell.edition] += 1
    for task, editions in sorted(by_task.items()):
        if len(editions) > 1:
            (rare, count), *_ = sorted(editions.items(), key=lambda item: (item[1], item[0]))
            example = next(cell.cell for cell in cells if cell.task == task and cell.edition == rare)
            raise FlexmoreError(
                f"task {task} is in these results in {len(editions)} editions (version, few-shot examples or content "
                f"differ), which cannot be compared; the rarest, version {rare[0]}, {rare[1]} examples, has {count} "
                f"cells, such as cells/{example}.parquet: move them to another folder"
            )


def _check_identities(mixtures: Sequence[Mixture], setting: Setting) -> None:
    """Equal ranks and factors under two identities mean that an expert's weights are not the same."""
    if found := _contradiction(mixtures):
        one, other = found
        raise FlexmoreError(
            f"mixtures {one.mixture_id} and {other.mixture_id} of {', '.join(setting.sources) or 'one source'} "
            f"have the same ranks ({other.name}) but other weights, store or router, which cannot be compared; "
            "move the cells of one of them to another folder"
        )


def _others(plan: Plan, cells: Sequence[Cell]) -> tuple[Mixture, ...]:
    """Mixtures that the plan does not name, called by their ranks."""
    known = {mixture.mixture_id for mixture in plan.mixtures}
    found = {}
    for cell in cells:
        if cell.mixture_id not in known:
            ranks = _canonical(cell.ranks, plan.experts[1:], plan.full_rank)
            found[cell.mixture_id] = Mixture(
                names=(_name(ranks, cell.active, cell.mixture_id),),
                mixture_id=cell.mixture_id,
                ranks=ranks,
                active=cell.active,
                parameters=cell.parameters,
                factors=None if _uses_factors(ranks) else "",
            )
    return tuple(sorted(found.values(), key=lambda m: (m.active, m.parameters, m.name, m.mixture_id)))


def _name_apart(mixtures: tuple[Mixture, ...]) -> tuple[Mixture, ...]:
    """Mixtures of other than plain factors with these behind a name that several have."""
    times = Counter(name for mixture in mixtures for name in mixture.names)
    words = _factor_words(mixture.factors for mixture in mixtures)

    def named(name: str, factors: str | None) -> str:
        return f"{name} ({words[factors]})" if factors and times[name] > 1 else name

    return tuple(dataclasses.replace(m, names=tuple(named(name, m.factors) for name in m.names)) for m in mixtures)


def _name(ranks: Mapping[str, Rank], active: int, mixture_id: str) -> str:
    """A name for a mixture that no plan names, in the manner of the preset's names."""
    kept = {name: f"r{rank}" if isinstance(rank, int) else rank for name, rank in ranks.items() if rank != DROP}
    if not kept:
        return f"public-a{active}" if ranks else f"full-a{active}"
    if len(kept) == len(ranks) and len(set(kept.values())) == 1 and "-" not in next(iter(kept.values())):
        return f"uniform-{next(iter(kept.values()))}-a{active}"
    if len(kept) == 1 and active == 2 and "-" not in next(iter(kept.values())):
        return "-".join(["pair", *kept, *kept.values()])
    words = [f"{name} {rank}" for name, rank in kept.items()]
    varied = any("-" in rank for rank in kept.values())  # the ranks of single matrices are not in the name
    return ", ".join([*words, f"a{active}", *([mixture_id[:6]] if varied else [])])


def _with_full_parameters(mixtures: tuple[Mixture, ...]) -> tuple[Mixture, ...]:
    """Parameters of the full mixture for those whose plan does not say, where it is among them."""
    stated = (mixture.full_parameters or (mixture.parameters if mixture.is_full else None) for mixture in mixtures)
    full = next((number for number in stated if number), None)
    return tuple(
        mixture if mixture.full_parameters else dataclasses.replace(mixture, full_parameters=full)
        for mixture in mixtures
    )
