"""The `flexmore` command: parse, call, print.

Exit status 0 (done), 1 (failed), 2 (bad use). Errors are one line on stderr; `--debug` shows the
traceback. With `--json` the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tqdm import tqdm

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.tables import columns

if TYPE_CHECKING:
    from flexmore_ray.source import Source
    from flexmore_ray.spec import Assignment, ExpertRank, MixtureSpec, ModelShape
    from flexmore_ray.store import FactorStore

Item = TypeVar("Item")
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after an interrupt
    try:
        _quiet_libraries()
        result = args.run(args)
        if args.json:
            print(json.dumps(result), flush=True)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", 1)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (FlexmoreError, OSError, MemoryError) as error:
        if args.debug:
            raise
        return _fail(error, 2 if isinstance(error, UsageError) else 1)


def _fail(error: object, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"flexmore: {text}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of our output."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def progress(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    """Show a bar on a terminal; quiet elsewhere."""
    return tqdm(items, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


# ------------------------------------------------------------------------------- commands


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
        Path(args.out),
        names=args.experts,
        data=data if args.router == "ridge" else None,
        active=args.active,
        **{k: v for k in ("ridge", "temperature") if (v := getattr(args, k)) is not None},
    )
    print(f"{args.out}: {len(source.experts)} experts ({', '.join(source.experts)}), router rows: {args.router}")
    return {"out": str(args.out), "experts": list(source.experts), "router": args.router}


def run_decompose(args: argparse.Namespace) -> Result:
    """Decompose every delta of a source into a store."""
    from flexmore_ray.source import open_source
    from flexmore_ray.store import build_store

    source = open_source(args.source, args.experts)
    with tqdm(desc="decomposing", unit="matrix", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        store = build_store(
            source,
            Path(args.store),
            max_rank=args.max_rank,
            dtype=args.dtype,
            device=args.device,
            thorough=args.verify,
            progress=advance,
        )
    return _describe_store(store, source)


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
    results = Path(args.results)
    cells = list(progress(evaluate(mixture, tasks, results), len(tasks.tasks), "scoring"))
    count = mixture.count()
    print(score_table(cells, {group.name: group.kind for group in tasks.suite.groups}))
    print(
        f"\n{count.total:,} parameters ({count.ratio:.3f} of full), {mixture.assignment.active} active; "
        f"samples in {results}/samples"
    )
    identity = {"mixture_id": mixture.spec.mixture_id, "parameters": count.total, "split": args.split}
    return summarise(cells) | identity | {"results": str(results)}


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


# -------------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexmore", description="FlexMoRE on Ray: mixtures of experts of chosen ranks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=f"{help}.")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = command("demo", run_demo, "the whole chain on the embedded mixture, in minutes on two CPU cores")
    demo.add_argument("--out", default="demo", help="folder for what it writes (default: demo)")

    inspect = command("inspect", run_inspect, "what a source holds; every tensor is read once and checked")
    inspect.add_argument("source", nargs="+", metavar="SOURCE")

    params = command("params", run_params, "parameters of a mixture, from its configuration alone")
    params.add_argument("mixture", nargs="*", metavar="MIXTURE or SOURCE")
    params.add_argument("--shape", choices=["flexolmo-7x7b"], help="a released shape instead of files")
    params.add_argument("--rank", action="append", metavar="NAME=R", help="rank of one expert: integer, full, drop")
    params.add_argument("--all-ranks", metavar="R", help="rank of every domain expert that --rank does not name")
    params.add_argument("--active", type=int, metavar="K", help="experts per token")

    merge = command("merge", run_merge, "two-expert checkpoints into one FlexOlmo checkpoint")
    merge.add_argument("source", nargs="+", metavar="name=FOLDER")
    merge.add_argument("--router", choices=["keep", "ridge"], default="keep", help="rows as trained, or fitted")
    merge.add_argument("--data", nargs="+", action="extend", metavar="name=FILE", help="text of each owner, public too")
    merge.add_argument("--ridge", type=float, metavar="X", help="regularisation of the fit (default: the router's own)")
    merge.add_argument("--temperature", type=float, metavar="X", help="rows are divided by it (default: likewise)")
    merge.add_argument("--active", type=int, metavar="K", help="experts per token to write into the config")
    merge.add_argument("--out", required=True, metavar="DIR")

    decompose = command("decompose", run_decompose, "spectra and factors of every delta, into a store; resumable")
    decompose.add_argument("source", nargs="+", metavar="SOURCE")
    decompose.add_argument("--store", required=True, metavar="DIR")
    decompose.add_argument("--max-rank", type=int, metavar="R", help="highest rank to hold (default: all)")
    decompose.add_argument("--dtype", default="float32", metavar="D", help="float32 (default), bfloat16 or float16")
    decompose.add_argument("--verify", action="store_true", help="read every stored file and replace damaged ones")
    decompose.add_argument("--device", default="cpu", metavar="D", help="where to compute (default: cpu)")

    evaluate = command("eval", run_eval, "scores of one mixture")
    evaluate.add_argument("mixture", metavar="MIXTURE")
    evaluate.add_argument("--tasks", required=True, metavar="SUITE_OR_TASKS")
    evaluate.add_argument("--split", choices=["validation", "test"], default="validation")
    evaluate.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    evaluate.add_argument(
        "--results", default="results", metavar="DIR", help="folder for cells and samples (default: results)"
    )
    evaluate.add_argument("--device", default="cpu", metavar="D")
    evaluate.add_argument("--dtype", metavar="D", help="compute dtype (default: float32 on the CPU)")

    export = command("export", run_export, "a mixture as a folder that other tools read")
    export.add_argument("mixture", metavar="MIXTURE")
    export.add_argument("--format", required=True, metavar="F", help="flex_more, flexolmo or peft")
    export.add_argument("--dtype", metavar="D", help="dtype to write (default: loses nothing)")
    export.add_argument("--out", required=True, metavar="DIR")

    for sub in (inspect, params, merge, decompose, evaluate, export):
        sub.add_argument("--experts", type=lambda text: text.split(","), metavar="A,B,...", help="expert names")
    return parser


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


def _named_files(items: Sequence[str]) -> dict[str, Path]:
    files = {}
    for text in items:
        name, equals, path = text.partition("=")
        if not equals:
            raise UsageError(f"--data: name=FILE is needed, got {text!r}")
        if name in files:
            raise UsageError(f"--data: {name} is given twice")
        files[name] = Path(path)
    return files


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
