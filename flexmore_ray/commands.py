"""What the commands of `flexmore` do: call the library, print, and return what ``--json`` prints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from flexmore_ray.errors import UsageError
from flexmore_ray.tables import columns

if TYPE_CHECKING:
    from flexmore_ray.moments.files import Metric
    from flexmore_ray.simulate import Outcome
    from flexmore_ray.source import Source
    from flexmore_ray.spec import Assignment, ExpertRank, MixtureSpec, ModelShape
    from flexmore_ray.storage import AnyPath
    from flexmore_ray.store import FactorStore

Item = TypeVar("Item")
Result = dict[str, Any]


def progress(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    """Show a bar on a terminal; quiet elsewhere."""
    return tqdm(items, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


def run_inspect(args: argparse.Namespace) -> Result:
    """Say what a source holds, reading every tensor once to check it."""
    from flexmore_ray.budget import break_even_rank, count_parameters, format_count
    from flexmore_ray.source import open_source
    from flexmore_ray.spec import MixtureSpec

    source = open_source(args.source, args.experts)
    for _ in progress(source.check(), 1 + len(source.experts), "reading"):
        pass
    shape = source.shape
    everything = MixtureSpec(active=1).assignment(source.experts, shape, born=source.born_ranks)
    count = count_parameters(shape, source.experts, everything)
    result = {
        "experts": list(source.experts),
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "active": source.trunk.config.get("num_experts_per_tok"),
        "layout": source.trunk.layout,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": count.total,
        "break_even_rank": break_even_rank(shape),
        "ranks": {name: everything.summary(name) for name in source.experts},
    }
    for key, value in result.items():
        if key == "parameters":
            value = f"{value:,} ({format_count(count.total)})"
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {rank}" for name, rank in value.items())
        print(f"{key.replace('_', ' '):<18} {value}")
    return result


def run_params(args: argparse.Namespace) -> Result:
    """Count a mixture's parameters from its configuration alone."""
    from flexmore_ray.budget import count_parameters, format_count

    if (args.shape is None) == (not args.mixture):
        raise UsageError("params: give a MIXTURE, SOURCEs, or --shape, and only one of them")
    shape, experts, assignment, width = _shape_to_count(args) if args.shape else _files_to_count(args)
    count = count_parameters(shape, experts, assignment)
    rows = [[name, str(assignment.summary(name)), f"{params:,}"] for name, params in count.experts.items()]
    print(columns([["expert", "rank", "parameters"], *rows]))
    print(
        f"\ntotal {count.total:,} ({format_count(count.total)}, {count.ratio:.3f} of the full mixture's "
        f"{format_count(count.full_total)}), at most {format_count(count.active)} active per token "
        f"with {assignment.active} experts, {format_count(count.total * width)} bytes at {width} each"
    )
    by_expert = {name: {"rank": assignment.summary(name), "params": n} for name, n in count.experts.items()}
    totals = {"total": count.total, "active": count.active, "bytes": count.total * width}
    return totals | {"full_total": count.full_total, "ratio": count.ratio, "experts": by_expert}


Counted = tuple["ModelShape", tuple[str, ...], "Assignment", int]
"""What `params` counts: shape, all expert names, ranks, and bytes of one parameter."""


def _shape_to_count(args: argparse.Namespace) -> Counted:
    from flexmore_ray.budget import SHAPE_EXPERTS, SHAPES
    from flexmore_ray.spec import MixtureSpec, check_names

    shape, experts = SHAPES[args.shape], SHAPE_EXPERTS[args.shape]
    if args.experts and len(args.experts) != len(experts):
        raise UsageError(f"--experts: {args.shape} has {len(experts)} experts, got {len(args.experts)} names")
    if args.experts:
        experts = check_names(args.experts, where="--experts")
    spec = MixtureSpec(ranks=_ranks_asked(args, experts), active=args.active)
    _say_what_ranks_mean(spec, shape)
    return shape, experts, spec.assignment(experts, shape, default_active=len(experts)), 2


def _files_to_count(args: argparse.Namespace) -> Counted:
    from flexmore_ray.mixture import open_mixture
    from flexmore_ray.spec import MixtureSpec

    single = len(args.mixture) == 1
    mixture = args.mixture[0] if single else MixtureSpec(source=tuple(args.mixture))
    parts = open_mixture(mixture, args.experts, verify=False)
    source = parts.source
    spec = parts.spec.with_ranks(_ranks_asked(args, source.experts))
    if args.active is not None:
        spec = dataclasses.replace(spec, active=args.active)
    _say_what_ranks_mean(spec, source.shape)
    return source.shape, source.experts, parts.with_spec(spec).assignment, source.dtype.itemsize


def _say_what_ranks_mean(spec: MixtureSpec, shape: ModelShape) -> None:
    """Note ranks that are the full expert, or cost more than it."""
    from flexmore_ray.budget import break_even_rank

    for name, rank in spec.ranks.items():
        if isinstance(rank, int) and rank >= shape.full_rank:
            _note(f"ranks.{name}: {rank} is at or above min(in, out) = {shape.full_rank}, so it is the full expert")
        elif isinstance(rank, int) and rank > break_even_rank(shape):
            _note(f"ranks.{name}: above {break_even_rank(shape)} a pair has more parameters than the full expert")


def run_merge(args: argparse.Namespace) -> Result:
    """Merge two-expert checkpoints into one FlexOlmo checkpoint."""
    from flexmore_ray.merge import merge

    data = _named_files(args.data or [])
    if data and args.router == "keep":
        raise UsageError("--data: only --router ridge uses data; leave it out, or choose --router ridge")
    source = merge(
        args.source,
        _place(args.out),
        names=args.experts,
        data=data if args.router == "ridge" else None,
        active=args.active,
        **{k: v for k in ("ridge", "temperature") if (v := getattr(args, k)) is not None},
    )
    print(f"{args.out}: {len(source.experts)} experts ({', '.join(source.experts)}), router rows: {args.router}")
    return {"out": str(args.out), "experts": list(source.experts), "router": args.router}


def run_moments(args: argparse.Namespace) -> Result:
    """Gather the second moments of experts' matrices on their owners' texts."""
    from flexmore_ray.budget import parse_budget
    from flexmore_ray.evaluate import use_few_threads
    from flexmore_ray.moments.files import Settings
    from flexmore_ray.moments.gather import gather
    from flexmore_ray.source import open_source

    source = open_source(args.source, args.experts)
    use_few_threads(source.shape.hidden_size)
    settings = Settings(form=args.moments, rows=args.sketch_rows, max_tokens=args.max_tokens)
    with tqdm(desc="gathering", unit="document", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(expert: str, done: int, total: int) -> None:
            bar.set_description(expert, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        tokens = gather(
            source,
            _named_files(args.data),
            _place(args.out),
            settings,
            at=args.at,
            memory=parse_budget(args.memory, 0, in_bytes=True, where="--memory"),
            batch_tokens=args.batch_tokens,
            device=args.device,
            dtype=args.dtype,
            progress=advance,
        )
    rows = [[name, f"{tokens[name]:,}" if name in tokens else "left full"] for name in _named_files(args.data)]
    print(columns([["expert", "predicted tokens"], *rows]))
    others = "" if args.at is None else "DIR "  # those at the full experts
    command = f"flexmore decompose ... --weighting both --moments {others}{args.out}"
    print(f"\n{args.out}: {settings.form} moments; next: {command}")
    return {"out": str(args.out), "moments": settings.form, "tokens": tokens}


def run_decompose(args: argparse.Namespace) -> Result:
    """Decompose every delta of a source into a store: here, or on the cluster that this process belongs to."""
    from flexmore_ray.moments.files import Metric
    from flexmore_ray.source import open_source

    metric = Metric(weighting=args.weighting, folders=_folders(args.moments), damping=args.damping)
    source = open_source(args.source, args.experts)
    metric.check(source, source.experts[1:])
    decompose = _decompose_on_cluster if _on_cluster() else _decompose_here
    return _describe_store(decompose(args, source, metric), source)


def _folders(moments: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(str(_place(folder).resolve()) for folder in moments or [])


def run_heal(args: argparse.Namespace) -> Result:
    """Train factors of a store into one of their own."""
    from flexmore_ray.evaluate import use_few_threads
    from flexmore_ray.heal import heal
    from flexmore_ray.heal.training import OTHERS_EVERY, STEP_DAMPING, Settings
    from flexmore_ray.moments.files import Metric
    from flexmore_ray.source import open_source
    from flexmore_ray.store import open_store

    source, data = open_source(args.source, args.experts), _named_files(args.data)
    use_few_threads(source.shape.hidden_size)
    names = ("steps", "batch_tokens", "learning_rate", "max_rank", "max_tokens", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names})
    metric = None
    if args.moments:
        metric = Metric(weighting="both", folders=_folders(args.moments), damping=STEP_DAMPING)
        metric.check(source, [name for name in data if name in source.experts[1:]])
    losses: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        train = None
        if args.workers != 1 or args.gpus is not None:
            from flexmore_ray.heal.workers import Workers
            from flexmore_ray.runtime import cluster

            on_gpus = args.device.startswith("cuda")
            if on_gpus and args.gpus == 0:
                raise UsageError(f"--gpus: workers with --device {args.device} need 1, got 0; leave one of them out")
            train = Workers(args.workers, int(on_gpus) if args.gpus is None else args.gpus)
            stack.enter_context(cluster(runs=f"heal {Path(args.out).name}"))
        bar = stack.enter_context(tqdm(desc="healing", unit="step", disable=not sys.stderr.isatty(), leave=False))

        def advance(expert: str, done: int, total: int, loss: float) -> None:
            if done % OTHERS_EVERY:  # of the owner's own texts
                losses[expert] = loss if expert not in losses else 0.9 * losses[expert] + 0.1 * loss
                bar.set_description(f"{expert}, {losses[expert]:.3f} nats", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        store = heal(
            source,
            open_store(_place(args.store)),
            data,
            _place(args.out),
            settings,
            metric=metric,
            device=args.device,
            progress=advance,
            train=train,
        )
    healed = [name for name in data if name != source.experts[0]]
    rows = [[name, f"{losses[name]:.4f}" if name in losses else "was done"] for name in healed]
    print(columns([["expert", "loss on its texts at the end, nats a token"], *rows]))
    print(f"\n{store.folder}: healed factors of {', '.join(healed)}; the other experts' as they were")
    return {"store": str(store.folder), "healed": healed, "loss": losses}


def run_refit(args: argparse.Namespace) -> Result:
    """Fit the router rows of a mixture again, at its ranks."""
    from flexmore_ray.refit import refit

    settings = {key: value for key in ("ridge", "temperature") if (value := getattr(args, key)) is not None}
    with tqdm(desc="reading", unit="document", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(expert: str, done: int, total: int) -> None:
            bar.set_description(expert, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        data, out = _named_files(args.data), _place(args.out)
        made = refit(args.mixture, data, out, experts=args.experts, device=args.device, progress=advance, **settings)
    print(columns([["expert", "tokens"], *([name, f"{count:,}"] for name, count in made.tokens.items())]))
    print(f"\n{made.mixture}: the mixture with the router rows of {made.router.name}, {made.mixture_id}")
    identity = {"mixture": str(made.mixture), "router": str(made.router), "mixture_id": made.mixture_id}
    return identity | {"tokens": dict(made.tokens)}


def _on_cluster() -> bool:
    """Whether a Ray cluster was named, or this process is connected to one."""
    started = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return started or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def _decompose_here(args: argparse.Namespace, source: Source, metric: Metric) -> FactorStore:
    from flexmore_ray.build import build_store

    if args.gpus is not None or args.pin:
        raise UsageError("--gpus, --pin: for the actors of a Ray cluster; name one with RAY_ADDRESS, or leave them out")
    with tqdm(desc="decomposing", unit="matrix", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_store(
            source,
            _place(args.store),
            max_rank=args.max_rank,
            dtype=args.dtype,
            device=args.device,
            thorough=args.verify,
            metric=metric,
            progress=advance,
        )


def _decompose_on_cluster(args: argparse.Namespace, source: Source, metric: Metric) -> FactorStore:
    """One actor and one bar per expert."""
    from flexmore_ray.experts import decompose_on_cluster
    from flexmore_ray.runtime import cluster

    pin = _pins(args)
    gpus = args.gpus if args.gpus is not None else float(args.device.startswith("cuda"))
    with contextlib.ExitStack() as stack:
        bars = {
            name: stack.enter_context(
                tqdm(desc=name, unit="matrix", position=row, disable=not sys.stderr.isatty(), leave=False)
            )
            for row, name in enumerate(source.experts[1:])
        }

        def advance(expert: str, done: int, total: int, _: str) -> None:
            bars[expert].total = total
            bars[expert].update(done - bars[expert].n)

        stack.enter_context(cluster(runs=f"decompose {Path(args.store).name}"))
        return decompose_on_cluster(
            source,
            _place(args.store),
            max_rank=args.max_rank,
            dtype=args.dtype,
            device="cuda" if gpus else args.device,
            num_gpus=gpus,
            pin=pin,
            thorough=args.verify,
            metric=metric,
            progress=advance,
        )


def _describe_store(store: FactorStore, source: Source) -> Result:
    """Print what a store holds: per expert the ranks, effective ranks, energies and methods."""
    from flexmore_ray.budget import entropy_rank
    from flexmore_ray.spectra import energy_share

    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for name in source.experts[1:]:
        keys = source.shape.keys(name)
        spectra = [store.spectrum(key) for key in keys]
        held = min(store.max_rank(key) for key in keys)
        half = [
            energy_share(s, max(1, held // 2), store.residual_energy(key)) for key, s in zip(keys, spectra, strict=True)
        ]
        effective = [entropy_rank(s.numpy()) for s in spectra]
        result[name] = {"matrices": len(keys), "max_rank": held, "mean_effective_rank": sum(effective) / len(keys)}
        mean = f"{result[name]['mean_effective_rank']:.1f}"
        rows.append([name, str(len(keys)), str(held), mean, f"{100 * sum(half) / len(half):.1f} %"])
    print(columns([["expert", "matrices", "rank held", "effective rank", "energy at half of it"], *rows]))
    print(f"\n{store.folder}: {store.decomposed} matrices decomposed now, {len(store.keys())} held, complete")
    return {"store": str(store.folder), "decomposed": store.decomposed, "experts": result}


def run_eval(args: argparse.Namespace) -> Result:
    """Score one mixture; cells that the results folder has already are not computed again."""
    from flexmore_ray.evaluate import evaluate, score_table, summarise, use_few_threads
    from flexmore_ray.mixture import load_mixture
    from flexmore_ray.scores import load_tasks

    tasks = load_tasks(args.tasks, split=args.split, limit=args.limit)
    mixture = load_mixture(args.mixture, device=args.device, dtype=args.dtype, experts=args.experts)
    _say_what_ranks_mean(mixture.given_spec, mixture.shape)
    use_few_threads(mixture.shape.hidden_size)
    results = _place(args.results)
    cells = list(progress(evaluate(mixture, tasks, results), len(tasks.tasks), "scoring"))
    count = mixture.count()
    print(score_table(cells, {group.name: group.kind for group in tasks.suite.groups}))
    print(
        f"\n{count.total:,} parameters ({count.ratio:.3f} of full), {mixture.assignment.active} active; "
        f"samples in {results}/samples"
    )
    identity = {"mixture_id": mixture.spec.mixture_id, "parameters": count.total, "split": args.split}
    return summarise(cells) | identity | {"results": str(results)}


def run_grid(args: argparse.Namespace) -> Result:
    """Compute all missing cells of a plan on Ray; with --dry-run say what there is to do."""
    from flexmore_ray.grid import Grid, Options, run_grid
    from flexmore_ray.plan import read_plan

    given = {key: getattr(args, key) for key in ("source", "tasks", "split", "limit", "experts")}
    plan = read_plan(args.plan, args.preset, **given)
    options = Options(**_how_to_run(args), shard_documents=args.shard_documents)
    grid = Grid(plan, _place(args.results).resolve(), options)
    if "working_dir_files" in grid.results.parts:
        _note(f"--results: {grid.results} is in the job's own copy of the working directory; an absolute path stays")
    summary = grid.summary()
    print(_describe_grid(summary))
    if args.dry_run:
        return summary
    outcome = run_grid(grid)
    for name, error in outcome.failed.items():
        print(f"failed: {name}: {error}")
    result = grid.summary() | {"computed": outcome.computed, "failed": outcome.failed, "results": str(grid.results)}
    computed = f"{outcome.computed:,} cells computed in {outcome.seconds:,.0f} s"
    print(f"\n{computed}, {result['done']:,} of {result['cells']:,} done")
    print(f"next: flexmore report {args.results} --out report")
    return result


def run_simulate(args: argparse.Namespace) -> Result:
    """Say what a grid or a search would take and cost on so many workers."""
    from flexmore_ray.simulate.forecast import forecasts, table

    given = [name for name in ("plan", "preset", "search") if getattr(args, name)]
    if len(given) != 1:
        raise UsageError("simulate: give a plan file, --preset or --search, and only one of them")
    try:
        workers = [int(text) for text in args.workers.split(",")]
    except ValueError:
        raise UsageError(f"--workers: numbers with commas between them are needed, got {args.workers!r}") from None
    run, described = _recorded_search(args) if args.search else _calibrated_grid(args)
    found = forecasts(run, workers, args.price)
    print(table(found))
    for note in described["assumed"]:
        print(f"assumed: {note}")
    return described | {"forecasts": [forecast.to_dict() for forecast in found]}


def _calibrated_grid(args: argparse.Namespace) -> tuple[Callable[[int], Outcome], Result]:
    """A grid on so many workers, and what is said of it."""
    from flexmore_ray.grid import Grid, Options
    from flexmore_ray.plan import read_plan
    from flexmore_ray.simulate import simulate
    from flexmore_ray.simulate.calibrate import calibrate
    from flexmore_ray.simulate.forecast import assumptions, describe, grid_units

    if not args.calibrate:
        raise UsageError("--calibrate: the results folder of a run is needed, such as that of a small grid")
    calibration = calibrate(_place(args.calibrate), start=args.start_seconds, document_seconds=args.document_seconds)
    plan = read_plan(
        args.plan, args.preset, **{key: getattr(args, key) for key in ("source", "tasks", "split", "limit", "experts")}
    )
    with tempfile.TemporaryDirectory() as nothing:
        grid = Grid(plan, _place(args.results or nothing), Options(shard_documents=args.shard_documents))
    units, later = grid_units(grid, calibration)
    count = len(units) + len(later)
    print(f"{describe(calibration)}\nplan      {grid.left:,} cells to compute, in {count:,} units of work\n")
    described = {"cells": grid.left, "units": count, "timing": dataclasses.asdict(calibration.timing)}
    described |= {"errors": dict(calibration.errors), "assumed": assumptions(grid, calibration)}
    return lambda number: simulate(units, number, calibration.timing, later), described


def _recorded_search(args: argparse.Namespace) -> tuple[Callable[[int], Outcome], Result]:
    """A search on so many workers, and what is said of it."""
    from search.replay import read_search, replay

    recorded = read_search(_place(args.search), trials=args.trials, start=args.start_seconds)
    baselines, trials, tests = map(len, recorded.stages)
    print(f"recorded  {baselines} baselines, {trials} trials, {tests} mixtures on the test split\n")
    described = {"baselines": baselines, "trials": trials, "tests": tests, "assumed": recorded.assumed}
    return lambda number: replay(recorded, number), described


def run_search(args: argparse.Namespace) -> Result:
    """Search the best ranks under a budget."""
    from flexmore_ray.grid import Options
    from search.__main__ import run

    return run(args, Options(**_how_to_run(args)))


def _how_to_run(args: argparse.Namespace) -> dict[str, Any]:
    """What the options that grid and search share say of `Options`."""
    return {
        "workers": args.workers,
        "num_cpus": args.cpus,
        "num_gpus": args.gpus,
        "expert_gpus": args.expert_gpus,
        "pin": _pins(args),
        "dtype": args.dtype,
        "store": args.store and _place(args.store),
    }


def _describe_grid(summary: Result) -> str:
    """What a grid has to do, as text."""
    from flexmore_ray.budget import format_count

    waiting, size = summary["waiting"], summary["bytes"]
    distinct = f"{summary['distinct_mixtures']:,} distinct"
    if waiting:
        distinct += f", of which {len(waiting)} wait for the results of the pairs ({', '.join(waiting)})"
    seconds = summary["seconds"]
    rows = [
        ["mixtures", f"{summary['mixtures']:,}: {distinct}"],
        ["tasks", f"{len(summary['documents']):,} with {sum(summary['documents'].values()):,} documents"],
        ["cells", f"{summary['cells']:,}: {summary['done']:,} done, {summary['missing']:,} missing"],
        [
            "time",
            "known once a cell is done" if seconds is None else f"about {seconds / 60:,.1f} minutes of one worker",
        ],
        ["bytes", ", ".join(f"{format_count(count)} {name}" for name, count in size.items())],
    ]
    return "\n".join(f"{label:<10} {text}" for label, text in rows)


def run_report(args: argparse.Namespace) -> Result:
    """Write the analysis of a results folder."""
    from flexmore_ray.report import write_report

    result = write_report(_place(args.results), _place(args.out))
    print(f"{args.out}: report.md, report.html and figures")
    return result


def run_export(args: argparse.Namespace) -> Result:
    """Write a mixture as a folder that other tools read."""
    from flexmore_ray.export import export_mixture

    out = export_mixture(args.mixture, args.out, args.format, dtype=args.dtype, experts=args.experts)
    print(f"{out}: {args.format}, read back and verified")
    return {"out": str(out), "format": args.format}


def run_demo(args: argparse.Namespace) -> Result:
    """Run the whole chain on the embedded mixture."""
    from flexmore_ray.demo import run_demo as demo

    return demo(Path(args.out))


def _ranks_asked(args: argparse.Namespace, experts: Sequence[str]) -> dict[str, ExpertRank]:
    """Ranks by expert name from --all-ranks and --rank, the latter going before."""
    from flexmore_ray.spec import parse_rank

    ranks: dict[str, ExpertRank] = {}
    named: dict[str, ExpertRank] = {}
    if args.all_ranks is not None:
        ranks = dict.fromkeys(experts[1:], parse_rank(args.all_ranks, where="--all-ranks"))
    for text in args.rank or []:
        name, equals, rank = text.partition("=")
        if not equals:
            raise UsageError(f"--rank: NAME=R is needed, got {text!r}")
        if name in named:
            raise UsageError(f"--rank: {name} is given twice")
        named[name] = parse_rank(rank, where=f"--rank {name}")
    return ranks | named


def _pins(args: argparse.Namespace) -> dict[str, str]:
    """By expert, the nodes that --pin names for it."""
    pairs = [text.partition("=")[::2] for text in args.pin or []]
    if bad := [text for text, (_, nodes) in zip(args.pin or [], pairs, strict=True) if not nodes]:
        raise UsageError(f"--pin: EXPERT=LABEL=VALUE or EXPERT=RESOURCE is needed, got {bad[0]!r}")
    return dict(pairs)


def _named_files(items: Sequence[str]) -> dict[str, AnyPath]:
    files: dict[str, AnyPath] = {}
    for text in items:
        name, _, path = text.partition("=")
        if not (name and path):
            raise UsageError(f"--data: name=FILE is needed, got {text!r}")
        if name in files:
            raise UsageError(f"--data: {name} is given twice")
        files[name] = _place(path)
    return files


def _place(text: str) -> AnyPath:
    """What a user named: a path or a URI."""
    from flexmore_ray.storage import open_path

    return open_path(text)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
