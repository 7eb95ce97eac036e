"""The `flexmore` command: parse, call, print.

Exit status 0 (done), 1 (failed), 2 (bad use). Errors are one line on stderr; `--debug` shows the
traceback. With `--json` the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flexmore_ray import allocate, commands
from flexmore_ray.cluster import commands as cluster_commands
from flexmore_ray.cluster import doctor
from flexmore_ray.errors import FlexmoreError, UsageError

_LONGEST = 2_000  # characters of an error: a value in it may come from a file, and be of any length


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after an interrupt
    try:
        _quiet_libraries()
        result = args.run(args)
        if args.json:
            print(json.dumps(result), flush=True)
        return 1 if result.get("failed") else 0
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
    text = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
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


def _parser() -> argparse.ArgumentParser:
    import search.__main__
    import serve.__main__

    parser = _Parser(prog="flexmore", description="FlexMoRE on Ray: mixtures of experts of chosen ranks.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=f"{help}.")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = command("demo", commands.run_demo, "the whole chain on the embedded mixture, in minutes on two CPU cores")
    demo.add_argument("--out", default="demo", help="folder for what it writes (default: demo)")

    inspect = command("inspect", commands.run_inspect, "what a source holds; every tensor is read once and checked")
    inspect.add_argument("source", nargs="+", metavar="SOURCE")

    params = command("params", commands.run_params, "parameters of a mixture, from its configuration alone")
    params.add_argument("mixture", nargs="*", metavar="MIXTURE or SOURCE")
    params.add_argument("--shape", choices=["flexolmo-7x7b"], help="a released shape instead of files")
    params.add_argument("--rank", action="append", metavar="NAME=R", help="rank of one expert: integer, full, drop")
    params.add_argument("--all-ranks", metavar="R", help="rank of every domain expert that --rank does not name")
    params.add_argument("--active", type=int, metavar="K", help="experts per token")

    merge = command("merge", commands.run_merge, "two-expert checkpoints into one FlexOlmo checkpoint")
    merge.add_argument("source", nargs="+", metavar="name=FOLDER")
    merge.add_argument("--router", choices=["keep", "ridge"], default="keep", help="rows as trained, or fitted")
    merge.add_argument("--data", nargs="+", action="extend", metavar="name=FILE", help="text of each owner, public too")
    merge.add_argument("--ridge", type=float, metavar="X", help="regularisation of the fit (default: the router's own)")
    merge.add_argument("--temperature", type=float, metavar="X", help="rows are divided by it (default: likewise)")
    merge.add_argument("--active", type=int, metavar="K", help="experts per token to write into the config")
    merge.add_argument("--out", required=True, metavar="DIR")

    moments = command(
        "moments",
        commands.run_moments,
        "second moments of experts on their owners' texts, for decompose; resumable",
    )
    moments.add_argument("source", nargs="+", metavar="SOURCE")
    moments.add_argument(
        "--data", nargs="+", action="extend", required=True, metavar="name=FILE", help="texts of each owner"
    )
    moments.add_argument("--out", required=True, metavar="DIR", help="folder of the moments; texts are added to it")
    moments.add_argument(
        "--at", metavar="MIXTURE", help="a mixture file: at its ranks of the experts (default: at the full experts)"
    )
    moments.add_argument(
        "--moments", default="full", metavar="FORM", help="full (default), diagonal or low-rank+diagonal"
    )
    moments.add_argument(
        "--sketch-rows", type=int, default=256, metavar="N", help="of low-rank+diagonal (default: 256)"
    )
    moments.add_argument("--max-tokens", type=int, default=512, metavar="N", help="cut documents there (default: 512)")
    moments.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="of one pass (default: 4096)")
    moments.add_argument("--memory", default="4GiB", metavar="B", help="of moments held at once (default: 4GiB)")
    moments.add_argument("--device", default="cpu", metavar="D", help="where to compute (default: cpu)")
    moments.add_argument("--dtype", metavar="D", help="compute dtype (default: float32 on the CPU)")

    decompose = command(
        "decompose", commands.run_decompose, "spectra and factors of all deltas, into a store; resumable"
    )
    decompose.add_argument("source", nargs="+", metavar="SOURCE")
    decompose.add_argument("--store", required=True, metavar="DIR")
    decompose.add_argument("--max-rank", type=int, metavar="R", help="highest rank to hold (default: all)")
    decompose.add_argument("--dtype", default="float32", metavar="D", help="float32 (default), bfloat16 or float16")
    decompose.add_argument("--verify", action="store_true", help="read every stored file and replace damaged ones")
    decompose.add_argument("--device", default="cpu", metavar="D", help="where to compute (default: cpu)")
    decompose.add_argument(
        "--weighting", default="none", metavar="SIDES", help="metric: none (default), input, output or both"
    )
    decompose.add_argument(
        "--moments", nargs="+", action="extend", metavar="DIR", help="of flexmore moments; several add up"
    )
    decompose.add_argument(
        "--damping", type=float, default=1e-2, metavar="X", help="of moments with mean eigenvalue 1 (default: 0.01)"
    )
    healer = command("heal", commands.run_heal, "train a store's factors on their owners' texts; resumable")
    healer.add_argument("source", nargs="+", metavar="SOURCE")
    healer.add_argument("--store", required=True, metavar="DIR", help="where training begins")
    healer.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="name=FILE",
        help="texts of each owner; public=FILE keeps other tokens from harm",
    )
    healer.add_argument("--out", required=True, metavar="DIR", help="the healed store")
    healer.add_argument(
        "--moments",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="of flexmore moments: train in the coordinates of their metric",
    )
    healer.add_argument("--steps", type=int, default=2000, metavar="N", help="for each expert (default: 2000)")
    healer.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="of one step (default: 1024)")
    healer.add_argument(
        "--learning-rate",
        type=float,
        default=0.02,
        metavar="X",
        help="at its peak, relative to each row (default: 0.02)",
    )
    healer.add_argument("--max-rank", type=int, metavar="R", help="highest rank of the factors (default: the store's)")
    healer.add_argument("--max-tokens", type=int, default=512, metavar="N", help="cut documents there (default: 512)")
    healer.add_argument("--seed", type=int, default=0, metavar="K", help="of batches and ranks (default: 0)")
    healer.add_argument("--device", default="cpu", metavar="D", help="where to train (default: cpu)")
    healer.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="of Ray Train, for each expert; all nodes must see SOURCE, --store, --moments and --out (default: 1)",
    )
    healer.add_argument(
        "--gpus", type=int, metavar="N", help="of each worker of Ray Train: 1, or 0 (default: by --device)"
    )

    refit = command("refit", commands.run_refit, "router rows of a mixture fitted again, at its ranks")
    refit.add_argument("mixture", metavar="MIXTURE")
    refit.add_argument(
        "--data", nargs="+", action="extend", required=True, metavar="name=FILE", help="texts of each owner, public too"
    )
    refit.add_argument("--out", required=True, metavar="NEW.yaml", help="the mixture file; its rows go beside it")
    refit.add_argument("--ridge", type=float, metavar="X", help="regularisation of the fit (default: the router's own)")
    refit.add_argument("--temperature", type=float, metavar="X", help="rows are divided by it (default: likewise)")
    refit.add_argument("--device", default="cpu", metavar="D", help="where to compute (default: cpu)")

    decompose.add_argument("--gpus", type=float, metavar="N", help="on a cluster: GPUs of each expert, or a fraction")
    evaluate = command("eval", commands.run_eval, "scores of one mixture")
    evaluate.add_argument("mixture", metavar="MIXTURE")
    evaluate.add_argument("--tasks", required=True, metavar="SUITE_OR_TASKS")
    evaluate.add_argument("--split", choices=["validation", "test"], default="validation")
    evaluate.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    evaluate.add_argument(
        "--results", default="results", metavar="DIR", help="folder for cells and samples (default: results)"
    )
    evaluate.add_argument("--device", default="cpu", metavar="D")
    evaluate.add_argument("--dtype", metavar="D", help="compute dtype (default: float32 on the CPU)")

    allocation = command("allocate", allocate.run, "ranks under a budget by a rule, as a mixture file")
    allocate.add_options(allocation)

    grid = command("grid", commands.run_grid, "all missing cells of mixtures x tasks, on Ray")
    grid.add_argument("plan", nargs="?", metavar="PLAN", help="a YAML file; or --preset")
    grid.add_argument("--preset", metavar="NAME", help="paper: the 150 mixtures of arXiv 2602.08818")
    grid.add_argument("--source", action="append", metavar="S", help="SOURCE, for a preset or before the plan's")
    grid.add_argument("--tasks", metavar="T", help="suite or tasks, before the plan's")
    grid.add_argument("--split", choices=["validation", "test"], help="before the plan's (default: validation)")
    grid.add_argument("--limit", type=int, metavar="N", help="documents per task, before the plan's (default: all)")
    grid.add_argument("--results", required=True, metavar="DIR", help="folder for cells and samples")
    grid.add_argument("--dry-run", action="store_true", help="count mixtures and cells, and compute nothing")
    grid.add_argument(
        "--shard-documents", type=int, default=500, metavar="N", help="documents of one unit of work (default: 500)"
    )

    simulation = command("simulate", commands.run_simulate, "time and cost of a grid or a search on other clusters")
    simulation.add_argument("plan", nargs="?", metavar="PLAN", help="a YAML file; or --preset, or --search")
    simulation.add_argument("--preset", metavar="NAME", help="paper: the 150 mixtures of arXiv 2602.08818")
    simulation.add_argument("--search", metavar="DIR", help="the --out of a search, whose recorded times are replayed")
    simulation.add_argument("--source", action="append", metavar="S", help="SOURCE, for a preset or before the plan's")
    simulation.add_argument("--tasks", metavar="T", help="suite or tasks, before the plan's")
    simulation.add_argument("--split", choices=["validation", "test"], help="before the plan's (default: validation)")
    simulation.add_argument("--limit", type=int, metavar="N", help="documents per task, before the plan's")
    simulation.add_argument("--shard-documents", type=int, default=500, metavar="N", help="as for grid (default: 500)")
    simulation.add_argument("--results", metavar="DIR", help="cells that are there need not be computed")
    simulation.add_argument("--calibrate", metavar="DIR", help="results of a run, whose times are learned from")
    simulation.add_argument("--workers", default="1,8,64,1000", metavar="N,N,...", help="(default: 1,8,64,1000)")
    simulation.add_argument("--trials", type=int, metavar="N", help="of a search (default: as many as it had)")
    simulation.add_argument("--price", type=float, metavar="X", help="of one worker for an hour")
    simulation.add_argument("--start-seconds", type=float, metavar="S", help="until workers work (default: measured)")
    simulation.add_argument(
        "--document-seconds", type=float, metavar="S", help="assumed for tasks not measured (default: refuse them)"
    )

    searcher = command("search", commands.run_search, "the best ranks under a budget, with Ray Tune and Optuna")
    search.__main__.add_options(searcher)

    report = command("report", commands.run_report, "tables, regression and figures of a results folder")
    report.add_argument("results", metavar="RESULTS")
    report.add_argument("--out", required=True, metavar="DIR")

    export = command("export", commands.run_export, "a mixture as a folder that other tools read")
    export.add_argument("mixture", metavar="MIXTURE")
    export.add_argument("--format", required=True, metavar="F", help="flex_more, flexolmo or peft")
    export.add_argument("--dtype", metavar="D", help="dtype to write (default: loses nothing)")
    export.add_argument("--out", required=True, metavar="DIR")

    server = command("serve", serve.__main__.run, "a mixture over HTTP, OpenAI-compatible, on Ray Serve")
    serve.__main__.add_options(server)

    cluster_commands.add_options(command("cluster", None, "a Ray cluster of this machine: up, status, env, down"))
    doctor.add_options(command("doctor", doctor.run, "what is wrong with this machine, or the cluster that it uses"))

    for sub in (grid, searcher):
        sub.add_argument("--workers", type=int, metavar="N", help="workers (default: as many as the nodes can hold)")
        sub.add_argument("--cpus", type=float, default=1, metavar="X", help="CPUs of one worker (default: 1)")
        sub.add_argument("--gpus", type=float, default=0, metavar="X", help="GPUs of one worker (default: 0)")
        sub.add_argument("--expert-gpus", type=float, default=0, metavar="X", help="GPUs of one expert actor")
        sub.add_argument("--dtype", metavar="D", help="compute dtype (default: float32 on the CPU)")
        sub.add_argument("--store", metavar="DIR", help="folder of the factors (default: in the cache)")
    for sub in (decompose, grid, searcher):
        sub.add_argument(
            "--pin",
            action="append",
            metavar="EXPERT=NODES",
            help="on a cluster: nodes of an expert, as LABEL=VALUE or the name of a custom resource",
        )
    for sub in (
        inspect,
        params,
        merge,
        moments,
        decompose,
        healer,
        allocation,
        refit,
        evaluate,
        grid,
        simulation,
        searcher,
        export,
        server,
    ):
        sub.add_argument("--experts", type=lambda text: text.split(","), metavar="A,B,...", help="expert names")
    return parser


if __name__ == "__main__":
    sys.exit(main())
