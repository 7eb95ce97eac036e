"""`flexmore demo`: the whole chain on the embedded mixture, from checkpoint to a report of what rank buys."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tqdm import tqdm

from flexmore_ray.budget import allocate_entropy, allocate_optimal, format_count
from flexmore_ray.build import build_store
from flexmore_ray.errors import FlexmoreError
from flexmore_ray.evaluate import Cell, summarise, use_few_threads
from flexmore_ray.export import export_mixture
from flexmore_ray.grid import Grid, Options, run_grid
from flexmore_ray.mixture import open_mixture
from flexmore_ray.plan import Plan
from flexmore_ray.report import write_report
from flexmore_ray.results import read_cells
from flexmore_ray.source import Source, open_source
from flexmore_ray.spec import DROP, ExpertRank, MixtureSpec
from flexmore_ray.spectra import energy_share
from flexmore_ray.store import FactorStore
from flexmore_ray.tables import columns, markdown

SOURCE = "zoo://nano"
SUITE = "nano"
BUDGETS = (0.33, 0.5)
RANKS = (1, 2, 4, 8, 16, 32, 64)
PAIR_RANKS = (4, 16, 64, "full")
LIMIT = 100
"""Documents per task: half of what the suite has."""
SEARCH_BUDGET = "0.5x"
SEARCH_TRIALS = 16
SEARCH_LIMITS = (27, 50)
"""Documents per task of the search: to choose by, and to report on."""
QUESTIONS = ("fact: main city of Nanin:", ">>> min('cfdih') :", "r/til define z3v0n?")
"""What the served winner is asked: of the test split's documents of a recall, a string and a slang task."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    parameters: int
    ratio: float
    score: float
    groups: Mapping[str, float]


def run_demo(out: Path) -> dict[str, Any]:
    """Decompose, score on a local Ray, report and export; what is already in `out` is not done again.

    Args:
        out: folder for the store, the results, the mixture files, the report and an exported model.
    """
    source = open_source([SOURCE])
    use_few_threads(source.shape.hidden_size)
    print(f"{SOURCE}: {len(source.experts)} experts ({', '.join(source.experts)}), {source.shape.num_layers} layers")
    store = decompose(source, out / "store")
    print(f"\nShare of each delta's energy that a rank keeps (mean over matrices; full rank {source.shape.full_rank})")
    print(columns(energy_table(source, store)))
    specs = mixtures(source, store, out / "store")
    (out / "mixtures").mkdir(parents=True, exist_ok=True)
    for name, spec in specs.items():
        spec.save(out / "mixtures" / f"{name}.yaml")
    rows = score(specs, out)
    table = score_columns(rows)
    print(f"\nScores in percent on {LIMIT} documents of each task of the suite {SUITE} (validation split)")
    print(columns(table))
    (out / "table.md").write_text(markdown(table), encoding="utf-8")
    write_report(out / "results", out / "report")
    chosen = choose(rows, specs)
    model = out / f"model-{chosen}"
    if not model.exists():
        export_mixture(specs[chosen], model, "flex_more")
    found = search(out)
    answers = serve_winner(out)
    say_where_to_look(out, chosen)
    return {
        "out": str(out),
        "chosen": chosen,
        "rows": [dataclasses.asdict(row) for row in rows],
        "search": {name: found[name] for name in ("winner", "verdict", "mixture")},
        "answers": answers,
    }


def decompose(source: Source, folder: Path) -> FactorStore:
    """Decompose every delta of the source into a store, with a bar on a terminal."""
    with tqdm(desc="decomposing", disable=None, leave=False) as bar:
        return build_store(source, folder, progress=lambda done, total, _: advance(bar, done, total))


def advance(bar: tqdm, done: int, total: int) -> None:
    """Move a bar to `done` of `total`."""
    bar.total = total
    bar.update(done - bar.n)


def energy_table(source: Source, store: FactorStore) -> list[list[str]]:
    """Per expert, the mean share of energy that each rank keeps."""
    rows = [["expert", *(f"rank {rank}" for rank in RANKS)]]
    for name in source.experts[1:]:
        spectra = [store.spectrum(key) for key in source.shape.keys(name)]
        shares = [sum(energy_share(s, rank) for s in spectra) / len(spectra) for rank in RANKS]
        rows.append([name, *(f"{100 * share:.1f} %" for share in shares)])
    return rows


def mixtures(source: Source, store: FactorStore, folder: Path) -> dict[str, MixtureSpec]:
    """The mixtures to compare, by name: uniform ranks, allocated ranks, full, public alone."""
    domains = source.experts[1:]
    spectra = {key: store.spectrum(key).numpy() for name in domains for key in source.shape.keys(name)}
    full = open_mixture(SOURCE).count().full_total

    def spec(ranks: Mapping[str, ExpertRank] | ExpertRank, active: int | None = None) -> MixtureSpec:
        by_name = ranks if isinstance(ranks, Mapping) else dict.fromkeys(domains, ranks)
        return MixtureSpec(source=(SOURCE,), store=str(folder.resolve()), ranks=by_name, active=active)

    named = {"public-alone": spec(DROP, 1)}
    named |= {f"rank-{rank}": spec(rank) for rank in RANKS}
    for share in BUDGETS:
        ranks = allocate_optimal(source.shape, source.experts, spectra, int(share * full))
        named[f"energy-{share}x"] = spec(ranks)
    named["entropy"] = spec(allocate_entropy(source.shape, spectra))
    named["full-a2"] = spec({}, 2)
    named["full-a4"] = spec({}, 4)
    named[f"full-a{len(source.experts)}"] = spec({}, len(source.experts))
    return named


def score(specs: Mapping[str, MixtureSpec], out: Path) -> list[Row]:
    """Score all mixtures, and each expert alone at some ranks for the report, as one grid on a local Ray."""
    named = [{"name": name, "ranks": dict(spec.ranks), "active": spec.active} for name, spec in specs.items()]
    entries: tuple[dict[str, Any], ...] = (*named, {"pairs": list(PAIR_RANKS)})
    plan = Plan(name="demo", source=(SOURCE,), tasks=(SUITE,), limit=LIMIT, mixtures=entries)
    grid = Grid(plan, out / "results", Options(store=out / "store"))
    counts = grid.summary()
    print(
        f"\ngrid: {counts['mixtures']} mixtures ({counts['distinct_mixtures']} distinct) x {len(counts['documents'])} "
        f"tasks = {counts['cells']} cells, {counts['missing']} of them to compute"
    )
    outcome = run_grid(grid)
    if outcome.failed:
        raise FlexmoreError(f"cells failed: {outcome.failed}")
    print(f"{outcome.computed} cells computed in {outcome.seconds:.0f} s")
    cells: dict[str, list[Cell]] = {}
    for row in read_cells(grid.results, grid.cells).to_pylist():
        cell = Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})
        cells.setdefault(row["mixture_id"], []).append(cell)
    order = {name: index for index, name in enumerate(grid.tasks.tasks)}
    rows = []
    for mixture in (mixture for mixture in grid.mixtures if mixture.name in specs):
        of_mixture = sorted(cells[mixture.mixture_id], key=lambda cell: order.get(cell.task, len(order)))
        summary = summarise(of_mixture)
        ratio = mixture.parameters / mixture.full_parameters
        rows.append(Row(mixture.name, mixture.parameters, ratio, summary["score"], summary["groups"]))
    return rows


def score_columns(rows: Sequence[Row]) -> list[list[str]]:
    """The table of mixtures: parameters, ratio to full, score, score by group."""
    groups = list(rows[0].groups)
    lines = [["mixture", "parameters", "ratio", "score", *groups]]
    for row in rows:
        scores = [f"{100 * value:.1f}" for value in (row.score, *row.groups.values())]
        lines.append([row.name, format_count(row.parameters), f"{row.ratio:.2f}x", *scores])
    return lines


def choose(rows: Sequence[Row], specs: Mapping[str, MixtureSpec]) -> str:
    """The best-scoring mixture with at most half the parameters of the full one."""
    small = [row for row in rows if row.ratio <= max(BUDGETS) and row.name in specs]
    return max(small, key=lambda row: row.score).name


def search(out: Path) -> dict[str, Any]:
    """Search the best ranks at half size, in a few trials, on a local Ray."""
    from search.__main__ import describe, summary
    from search.plan import Search, Settings
    from search.run import run_search

    limit, test_limit = SEARCH_LIMITS
    settings = Settings(
        source=(SOURCE,),
        tasks=(SUITE,),
        budget=SEARCH_BUDGET,
        trials=SEARCH_TRIALS,
        limit=limit,
        test_limit=test_limit,
    )
    short = Search(settings, out.resolve() / "search", Options(store=out / "store"))
    print(f"\nA short search for the best ranks\n{describe(short)}", flush=True)
    result = run_search(short)
    print(summary(result))
    return result


def serve_winner(out: Path) -> dict[str, str]:
    """Serve the search's winner over HTTP, ask it something, and shut the service down."""
    from serve.__main__ import serving
    from serve.app import build_app
    from serve.settings import read_settings

    winner = out.resolve() / "search" / "winner.yaml"
    settings = read_settings({"mixture": str(winner)})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print(f"\nServing {winner.name} on Ray Serve", flush=True)
    with serving(build_app(settings), settings, "127.0.0.1", port) as url:
        print(f"{url}/v1/completions")
        answers = {}
        for question in QUESTIONS:
            body = {"model": "winner", "prompt": question, "max_tokens": 10, "temperature": 0, "stop": "\n"}
            request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urlopen(request, timeout=60) as reply:
                content = json.load(reply)
            answers[question] = content["choices"][0]["text"]
            shares = sorted(content["usage"]["experts"].items(), key=lambda item: -item[1])
            worked = ", ".join(f"{name} {share:.0%}" for name, share in shares[:3])
            print(f"  {question} {answers[question]:<12} ({worked})", flush=True)
    return answers


def say_where_to_look(out: Path, chosen: str) -> None:
    """Close with what was written, and with commands to go on with."""
    mixture = out / "mixtures" / f"{chosen}.yaml"
    print(
        f"""
Written
  {out}/report/        report.html: the analysis with figures (also report.md)
  {out}/table.md       this table
  {out}/mixtures/      a mixture file for each row
  {out}/store/         spectra and factors of every expert
  {out}/results/       cells/ one row per mixture and task, samples/ one row per document (Parquet)
  {out}/model-{chosen}/   the best of these at half size or less, as a flex_more folder for transformers
  {out}/search/        winner.yaml: what the search found; report.html: how, and how sure it is

Next
  flexmore eval {mixture} --tasks {SUITE} --split test
  flexmore grid --preset paper --source {SOURCE} --tasks {SUITE} --results grid   (six minutes: the whole 150 mixtures)
  flexmore search --source {SOURCE} --tasks {SUITE} --budget 0.33x --trials 42 --limit 54 --out search
  flexmore serve {out}/search/winner.yaml          (then open http://127.0.0.1:8000)
  flexmore export {out}/search/winner.yaml --format flexolmo --out dense"""
    )
