"""The report of a search: Markdown, one HTML page and PNG figures. Reads the files of the search, scores nothing.

    OUT/search.json  trials.parquet  front.parquet  final.json
        -> OUT/report.md  report.html  history.png  cost.png  ranks.png  importance.png

Equal files give an equal report, byte for byte. A figure that has nothing to show is left out, and the text says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.report.analysis import RESAMPLES
from flexmore_ray.report.chapters import count, some
from flexmore_ray.report.page import Block, Heading, Image, Items, Table, Text, to_html, to_markdown
from flexmore_ray.spec import FULL, PROJECTIONS
from flexmore_ray.storage import AnyPath, output_folder
from search.ledger import Entry
from search.outcome import (
    FOLDS,
    MEASURES,
    Search,
    describe_ranks,
    rank_importance,
    read_search,
    span,
    trials_needed,
)

MOST_SHOWN = 10
"""Entries in the table and the figure of the best ranks."""

_NO = "-"
_BASELINES = {
    "full": "all experts at full size",
    "public": "the public expert alone",
    "uniform": "one rank for all experts, the highest that the budget allows",
    "energy": "every matrix keeps the same share of its energy, the highest that the budget allows",
    "entropy": "every matrix has the effective rank of its delta (exponential of the entropy of its spectrum), all "
    "scaled down by one factor to the budget",
    "optimal": "the ranks, matrix by matrix, that discard the least energy under the budget",
    "optimal-expert": "the same with one rank for all matrices of an expert",
    "optimal-projection": "the same with one rank for all matrices of an expert's projection",
    "optimal-layer": "the same with one rank for all matrices of an expert's layer",
}


def write_report(out: AnyPath) -> dict[str, Any]:
    """Write the report of a search that has ended into its folder.

    Args:
        out: The search's folder.

    Returns:
        `report`, `html`, and `figures`: the paths of what was written.

    Raises:
        UsageError: There is no search in `out`, or it has not ended.
        FlexmoreError: A file is damaged, or the report cannot be written.
    """
    search = read_search(out)
    source, tasks = search.settings["source"], ", ".join(search.settings["tasks"])
    title = f"Rank search: {source if isinstance(source, str) else ', '.join(source)} on {tasks}"
    try:
        with output_folder(out) as folder:
            blocks = [
                *_verdict(search),
                *_compared(search),
                *_groups(search),
                *_winner(search),
                *_spent(search),
                *_figures(search, folder),
                *_front(search),
                *_methods(search),
                *_files(search),
            ]
            (folder / "report.md").write_text(to_markdown(title, blocks), encoding="utf-8")
            (folder / "report.html").write_text(to_html(title, blocks, folder), encoding="utf-8")
    except OSError as error:
        raise FlexmoreError(f"cannot write the report to {out}: {error.strerror or error}") from None
    figures = [str(out / block.file) for block in blocks if isinstance(block, Image)]
    return {"report": str(out / "report.md"), "html": str(out / "report.html"), "figures": figures}


# what was found


def _verdict(search: Search) -> list[Block]:
    """The answer in plain words: the winner against the full mixture and each baseline."""
    winner = search.winner
    blocks: list[Block] = [Text(search.final["verdict"] or "There is no winner.", lead="Verdict.")]
    if winner is None:
        return [*blocks, Text("No complete entry is within the budget, so that none could win.")]
    compared = [entry for entry in search.final["entries"] if entry["kind"] == "baseline" and entry is not winner]
    compared.sort(key=lambda entry: entry["name"] != FULL)
    if compared:
        blocks += [
            Text(
                f"On the test split {winner['name']} ({search.ratio(winner['cost'])} of the full mixture's "
                f"{MEASURES[search.settings['measure']]}) is, in points and with the 95 % interval of the difference:"
            ),
            Items([_against(entry, search) for entry in compared]),
        ]
    if gain := _gain(search):
        blocks.append(Text(gain))
    return blocks


def _against(entry: Mapping[str, Any], search: Search) -> str:
    found = entry.get("difference") or {}
    words = {"better": "better than {}", "worse": "worse than {}", "equal within noise": "equal to {} within noise"}
    text = words.get(str(found.get("verdict")), "not compared with {}").format(entry["name"])
    over = "" if entry["fits"] else ", over the budget"
    return f"{text} ({search.ratio(entry['cost'])}{over})" + (f": {_points(found)}" if _known(found) else "")


def _gain(search: Search) -> str:
    """How much of the full mixture's gain over the public expert the winner keeps; empty if that is not known."""
    found = search.final["gain"]
    if not _known(found):
        return ""
    low, high = (f"{100 * found[end]:.0f}".replace("-", "\N{MINUS SIGN}") for end in ("low", "high"))
    value = f"{100 * found['value']:.0f}".replace("-", "\N{MINUS SIGN}")
    return (
        f"Of the full mixture's gain over the public expert alone the winner keeps {value} % on the test split "
        f"(95 % interval {low} to {high} %)."
    )


def _compared(search: Search) -> list[Block]:
    """The winner, the other finalists and the baselines, in one table."""
    actives = {entry["active"] for entry in search.final["entries"]}
    counts = search.settings["measure"] != "parameters"
    header = [
        "mixture",
        "role",
        "ranks",
        *(["active"] if len(actives) > 1 else []),
        MEASURES[search.settings["measure"]],
    ]
    header += ["share of full", *(["total parameters"] if counts else [])]
    header += ["validation", "test (95 %)", "winner minus it (95 %)", "winner is"]
    rows = [header]
    for entry in _ordered(search):
        own = entry["name"] == search.final["winner"]
        found = entry.get("difference") or {}
        rows.append(
            [
                entry["name"],
                _role(entry, own),
                describe_ranks(entry["ranks"], search.experts),
                *([str(entry["active"])] if len(actives) > 1 else []),
                search.amount(entry["cost"]),
                search.ratio(entry["cost"]),
                *([f"{entry['parameters']:,}"] if counts else []),
                _percent(entry["validation"]),
                _percent_range(entry.get("test")),
                _NO if own else _points(found),
                _NO if own else str(found.get("verdict") or "not known"),
            ]
        )
    if len(rows) == 1:
        return []
    return [
        Heading(2, "Winner, finalists and baselines"),
        Table(
            "Scores in percent, differences in points",
            rows,
            f"{_budget(search)} The winner was chosen by the validation score. The test scores of the finalists are "
            "reported; nothing was chosen by them.",
            texts=3,
        ),
    ]


def _budget(search: Search) -> str:
    budget, measure = search.settings.get("budget"), MEASURES[search.settings["measure"]]
    if budget is None:
        return f"No budget was set; the full mixture has {search.amount(search.settings['full_cost'])} ({measure})."
    return (
        f"Budget: {search.amount(budget)} ({measure}), {search.ratio(budget)} of the full mixture's "
        f"{search.amount(search.settings['full_cost'])}."
    )


def _ordered(search: Search) -> list[Mapping[str, Any]]:
    """The entries of `final.json`: the winner, the finalists by validation score, the baselines as they come."""

    def place(entry: Mapping[str, Any]) -> tuple[bool, bool, float]:
        baseline = entry["kind"] == "baseline"
        return entry["name"] != search.final["winner"], baseline, 0.0 if baseline else -_value(entry["validation"])

    return sorted(search.final["entries"], key=place)


def _role(entry: Mapping[str, Any], winner: bool) -> str:
    parts = [
        *(["winner"] if winner else ["finalist"] if entry["finalist"] else []),
        *(["baseline"] if entry["kind"] == "baseline" else []),
        *([f"warm start from {entry['warm']}"] if entry.get("warm") else []),
        *([] if entry["fits"] else ["over budget"]),
    ]
    return ", ".join(parts) or entry["kind"]


def _groups(search: Search) -> list[Block]:
    names = list(dict.fromkeys(name for entry in search.final["entries"] for name in entry.get("groups") or {}))
    if not names:
        return []
    rows = [["mixture", *names]]
    for entry in _ordered(search):
        rows.append([entry["name"], *(_percent_range((entry.get("groups") or {}).get(name)) for name in names)])
    known = {group["name"]: group for group in search.settings.get("groups", [])}
    said = [f"{name} ({known[name]['kind']})" for name in names if known.get(name, {}).get("kind")]
    note = f"Kinds of groups: {', '.join(said)}." if said else ""
    return [Heading(3, "Scores by group"), Table("Test split, percent (95 %)", rows, note)]


# the winner


def _winner(search: Search) -> list[Block]:
    winner = search.winner
    if winner is None:
        return []
    rows = [["expert", *_rank_header(winner["ranks"])]]
    rows.append([search.settings["experts"][0], *["full"] * (len(rows[0]) - 1)])
    rows += [[name, *_rank_cells(winner["ranks"].get(name, FULL), len(rows[0]) - 1)] for name in search.experts]
    note = "The public expert is always kept whole." + (
        " Where ranks differ by layer the cell shows the lowest, the mean and the highest; winner.yaml has all."
        if any(" mean " in cell for row in rows for cell in row)
        else ""
    )
    about = (
        f"{winner['name']}: {search.amount(winner['cost'])} ({MEASURES[search.settings['measure']]}), "
        f"{search.ratio(winner['cost'])} of the full mixture, {winner['active']} experts active per token."
    )
    return [Heading(2, "The winner"), Text(about), Table("Ranks of the winner", rows, note)]


def _rank_header(ranks: Mapping[str, Any]) -> list[str]:
    return list(PROJECTIONS) if any(isinstance(rank, Mapping) for rank in ranks.values()) else ["rank"]


def _rank_cells(rank: Any, columns: int) -> list[str]:
    parts = [rank.get(name, FULL) for name in PROJECTIONS] if isinstance(rank, Mapping) else [rank] * columns
    return [_layers(part) for part in parts]


def _layers(rank: Any) -> str:
    """The rank of a projection, or of its layers."""
    if not isinstance(rank, list | tuple):
        return str(rank)
    numbers = [r for r in rank if r != FULL]
    if len(numbers) < len(rank):
        return span(rank)
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}, mean {sum(numbers) / len(numbers):.1f}"


# what it cost


def _spent(search: Search) -> list[Block]:
    documents, states = search.final["documents"], Counter(entry.state for entry in search.trials)
    each = documents.get("per_full_trial") or 0
    worth = f", as many as {documents['trials'] / each:.1f} trials without early stopping" if each else ""
    seconds = search.final["seconds"]
    took = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
    blocks: list[Block] = [
        Heading(2, "What the search cost"),
        Items(
            [
                f"{count(len(search.trials), 'trial')}: {states['complete']} on all documents, {states['stopped']} "
                f"stopped early, {states['failed']} failed. {count(len(search.baselines), 'baseline')}.",
                f"{count(documents['trials'], 'document')} evaluated in trials{worth}; "
                f"{documents['baselines']:,} for the baselines; {documents['test']:,} on the test split"
                + (f". A full evaluation is {count(each, 'document')}." if each else "."),
                f"Scoring took {took}, summed over workers.",
                *search.final.get("notes", ()),
            ]
        ),
    ]
    failed = [[entry.name, entry.error or "no error given"] for entry in search.entries if entry.state == "failed"]
    if failed:
        blocks.append(Table("Failed entries", [["entry", "error"], *failed], texts=2))
    return blocks


# --- figures ----------------------------------------------------------------------------------------------


def _figures(search: Search, out: Path) -> list[Block]:
    from search import figures

    blocks: list[Block] = [Heading(2, "How the search went")]
    if any(entry.score is not None for entry in search.trials):
        figures.history(search, out / "history.png")
        rungs = ", ".join(f"{number:,}" for number in search.settings["rungs"])
        caption = (
            "Score on the validation split by trial. Filled: complete. Hollow: stopped early; the score is that of the "
            f"documents seen, and the marker says at which rung (documents of the largest task at the rungs: {rungs}). "
            "Rungs score different numbers of documents. Line: best complete entry within the budget so far. Named: "
            "baselines."
        )
        alt = f"Validation score of {count(len(search.trials), 'trial')} in order, with the best so far and baselines."
        blocks += [Image("history.png", alt, caption)]
    else:
        blocks.append(Text("No trial has a score: there is no history to draw."))
    blocks += [Heading(3, "Score and size")]
    if any(entry.state == "complete" for entry in search.entries):
        figures.score_by_cost(search, out / "cost.png")
        caption = (
            f"Validation score against {MEASURES[search.settings['measure']]}, complete entries only. Circled, joined "
            "by the line: entries that no other one beats in both, by their scores alone, noise not considered: "
            f"{some([entry.name for entry in search.front])}."
        )
        blocks.append(
            Image("cost.png", "Scatter plot of score against size, with front, baselines and budget.", caption)
        )
    else:
        blocks.append(Text("No entry is complete: there is nothing to compare by size."))
    return [*blocks, *_best(search, out), *_importance(search, out)]


def _best(search: Search, out: Path) -> list[Block]:
    """The best ranks, in a table and as parallel coordinates."""
    from search import figures

    best = search.best(MOST_SHOWN)
    blocks: list[Block] = [Heading(3, "The best ranks")]
    if not best:
        return [*blocks, Text("No complete entry is within the budget.")]
    title = f"The best {len(best)} within the budget by validation score"
    blocks.append(_listed(title, best, search, "Equal mixtures are listed once."))
    lines, hidden = figures.lines_of(best, search)
    if len(figures.axes_of(search)) < 2:
        return [*blocks, Text("With one parameter searched there are no parallel coordinates to draw.")]
    if not lines:
        return blocks
    figures.parallel_ranks(lines, search, out / "ranks.png")
    finer = (
        " The search sets one level per expert; matrices get theirs by discarded energy."
        if search.settings["granularity"] != "expert"
        else ""
    )
    left = f" Not drawn, because their ranks are not levels of the search: {some(hidden)}." if hidden else ""
    bold = "; bold, with white dots: the winner" if any(line.winner for line in lines) else ""
    caption = (
        f"Ranks of the best entries, a line each, colour by validation score{bold}. "
        f"Lines at the same level are drawn a little apart, the best on top.{finer}{left}"
    )
    return [*blocks, Image("ranks.png", f"Parallel coordinates of the ranks of {len(lines)} entries.", caption)]


def _importance(search: Search, out: Path) -> list[Block]:
    from search import figures

    blocks: list[Block] = [Heading(3, "Which rank matters")]
    complete = search.complete_trials
    wanted = trials_needed(search)
    if len(complete) < wanted:
        few = f"{count(len(complete), 'complete trial')}, at least {wanted} are needed"
        return [*blocks, Text(f"Not estimated: {few}. Stopped trials were scored on fewer documents and do not count.")]
    found = rank_importance(search)
    if not found:
        return [*blocks, Text("Not estimated: all complete trials have the same score.")]
    figures.importances(found, out / "importance.png")
    caption = (
        f"Share of the variation in validation score that each parameter explains by itself, over {len(complete)} "
        "complete trials: main effects of fANOVA (Hutter, Hoos, Leyton-Brown 2014) from Optuna, scaled to a sum of 100 "
        f"%. Whiskers: lowest and highest of this and {FOLDS} repetitions, each without one in "
        f"{FOLDS} trials. "
        "The trials are where the sampler looked, under a budget that ties the ranks to each other, and only those "
        "that were not stopped: this describes the search and is no proof of cause."
    )
    return [*blocks, Image("importance.png", f"Bar chart of the importance of {len(found)} parameters.", caption)]


def _front(search: Search) -> list[Block]:
    """The front as a table, where it was what the search was after."""
    if search.settings["objective"] != "front" or not search.front:
        return []
    note = "By the validation scores alone. Each is the best of several on the same documents, so they are optimistic."
    return [
        Heading(2, "The front of score and size"),
        _listed("Entries that no other one beats in both", search.front, search, note),
    ]


def _listed(title: str, entries: Sequence[Entry], search: Search, note: str) -> Table:
    rows = [["mixture", "ranks", "active", MEASURES[search.settings["measure"]], "share of full", "validation"]]
    for e in entries:
        ranks = describe_ranks(e.ranks, search.experts)
        name = f"{e.name} (warm start)" if e.warm else e.name
        rows.append([name, ranks, str(e.active), search.amount(e.cost), search.ratio(e.cost), _percent(e.score)])
    return Table(title, rows, note, texts=2)


# --- how it was made, and where things are ----------------------------------------------------------------


def _methods(search: Search) -> list[Block]:
    winner = search.winner
    own = (
        f" ({_percent(winner['validation'])} for {winner['name']}, which has "
        f"{_percent(winner['test']['value'])} on the test split)"
        if winner and winner.get("test")
        else ""
    )
    given = [entry.name for entry in search.baselines if entry.name not in _BASELINES]
    there = {entry.name for entry in search.baselines}
    definitions = [f"{name}: {what}" for name, what in _BASELINES.items() if name in there]
    halved = search.settings.get("halved_tasks") or []
    definitions += [f"given by the user: {some(given)}"] if given else []
    return [
        Heading(2, "How the numbers were made"),
        Items(
            [
                "Scores: a group's score is the unweighted mean of its tasks, the average the unweighted mean of the "
                "groups.",
                "Choice: trials were compared, stopped and chosen on the validation split only. The winner is the "
                "finalist with the highest validation score; finalists are the best entries within the budget that "
                "saw all documents. The finalists' test scores are reported, and nothing was chosen by them.",
                *(
                    [f"No test split: of {some(halved)} half of the validation documents were kept for the end."]
                    if halved
                    else []
                ),
                f"Optimism: the winner's validation score{own} is too high on average, because the winner was picked "
                "by it. The test score is not picked.",
                "Early stopping: the documents of all tasks stand in one seeded random order, the same for all "
                "entries; each rung scores a longer beginning of it, and the hopeless are stopped between rungs "
                "(asynchronous successive halving). Baselines run first and are never stopped; the first trials are "
                "warm starts, the points of the space that are nearest to the baselines.",
                f"Intervals: percentile bootstrap, {RESAMPLES:,} resamples of the documents of each test task, with "
                "the same draw for all mixtures, so that differences are paired. They cover the choice of documents, "
                "not the choice of tasks, prompts or seeds.",
                "Verdicts: better or worse where the 95 % interval of the difference lies on one side of zero, else "
                "equal within noise, which does not prove equality. There is no correction for the number of "
                "comparisons: of 20 without any true difference one is expected to look real.",
                f"Baselines: {'; '.join(definitions)}.",
            ]
        ),
    ]


def _files(search: Search) -> list[Block]:
    tasks = ",".join(search.settings["tasks"])
    winner = [
        "winner.yaml: the winner as a mixture file. Score it with: flexmore eval winner.yaml --tasks "
        f"{tasks} --split test. Turn it into a model folder with: flexmore export winner.yaml --format flex_more --out "
        "DIR. Serve it with: flexmore serve winner.yaml."
    ]
    return [
        Heading(2, "Files"),
        Items(
            [
                *(winner if search.winner else []),
                f"trials.parquet: one row per entry ({len(search.entries)}), with ranks, cost and the score at each "
                "rung.",
                f"front.parquet: the complete entries that no other one beats in score and size ({len(search.front)}).",
                "journal.log: the trials for Optuna's dashboard, a separate program: optuna-dashboard journal.log.",
                "search.json and final.json: the settings, and the numbers of this report.",
            ]
        ),
    ]


# --- numbers ----------------------------------------------------------------------------------------------


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def _known(found: Mapping[str, Any] | None) -> bool:
    """Whether an estimate and its interval are there."""
    return found is not None and not any(math.isnan(_value(found.get(name))) for name in ("value", "low", "high"))


def _percent(value: float | None) -> str:
    return _NO if math.isnan(_value(value)) else f"{100 * _value(value):.1f}"


def _percent_range(found: Mapping[str, Any] | None) -> str:
    if not found or not _known(found):
        return _percent(found.get("value")) if found else _NO
    return f"{_percent(found['value'])} ({_percent(found['low'])} to {_percent(found['high'])})"


def _points(found: Mapping[str, Any] | None) -> str:
    """A difference in points and its interval; a rounded zero has no sign."""
    if not found or not _known(found):
        return _NO
    value, low, high = (
        "0.0" if abs(100 * found[name]) < 0.05 else f"{100 * found[name]:+.1f}".replace("-", "\N{MINUS SIGN}")
        for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"
