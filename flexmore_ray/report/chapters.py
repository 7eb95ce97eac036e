"""The tables and sentences of the report: best ranks, mixtures against the full one, regression, kinds of groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from flexmore_ray.report.analysis import (
    BestRank,
    Estimates,
    Fit,
    Interval,
    KindComparison,
    Measure,
    best_rank,
    compare_kinds,
    curve,
    fit_quadratic,
    own_curve,
    pooled_curve,
)
from flexmore_ray.report.page import Block, Heading, Items, Table, Text
from flexmore_ray.report.sections import Mixture, Section

_FEW_DOCUMENTS = 30
_MOST_LISTED = 12
_NO = "-"


# --- words and numbers ------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A score in percent."""
    return _NO if math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of scores in points; a rounded zero has no sign."""
    if math.isnan(value):
        return _NO
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def span_of(found: Interval) -> str:
    """A difference of scores and its interval, in points."""
    if math.isnan(found.value):
        return _NO
    return f"{points(found.value)} ({points(found.low)} to {points(found.high)})"


def size(number: int) -> str:
    """A number of parameters."""
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return f"{number:,}"


def _log2_range(found: Interval) -> str:
    """A difference of log2 ranks and its interval."""
    low, value, high = (f"{v:+.2f}" if abs(v) >= 0.005 else "0.00" for v in (found.low, found.value, found.high))
    return f"{value} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def _rank_at(x: float, section: Section) -> str:
    """A log2 rank as a rank; "full" where it is the full one."""
    if section.full_rank is not None and math.isclose(x, math.log2(section.full_rank)):
        return "full"
    rank = 2.0**x
    return f"{rank:.0f}" if rank >= 10 or math.isclose(rank, round(rank), abs_tol=0.05) else f"{rank:.1f}"


def _rank_range(found: Interval, section: Section) -> str:
    return f"{_rank_at(found.low, section)} to {_rank_at(found.high, section)}"


def some(items: Sequence[str]) -> str:
    """A few of the items and how many more there are."""
    rest = len(items) - _MOST_LISTED
    return ", ".join(items[:_MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def count(number: int, noun: str) -> str:
    """A number and its noun in the right number."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def gap_counts(section: Section) -> str:
    """How much of a section is failed or missing, one sentence; empty if nothing is."""
    missing = sum(len(tasks) for tasks in section.missing.values())
    parts = [
        *([f"{count(len(section.failed), 'cell')} failed"] if section.failed else []),
        *([f"{count(missing, 'cell')} of the plan {'is' if missing == 1 else 'are'} missing"] if missing else []),
        *([f"{count(len(section.unresolved), 'mixture')} not chosen yet"] if section.unresolved else []),
    ]
    return f"Not complete: {', '.join(parts)}." if parts else ""


# --- tables -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chapters:
    """What the report says in words and tables of one section that has results."""

    section: Section
    estimates: Estimates

    # what was scored, and what was found

    def scope(self) -> list[Block]:
        """What was scored, and what the numbers leave out."""
        section, estimates = self.section, self.estimates
        scored = {mixture_id for mixture_id, _ in section.cells}
        seconds = sum(cell.seconds for cell in section.cells.values())
        documents = sorted(set(estimates.documents.values()))
        span = f"{documents[0]:,}" if len(documents) == 1 else f"{documents[0]:,} to {documents[-1]:,}"
        spent = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
        notes = [
            f"{count(len(scored), 'mixture')}, {count(len(section.tasks), 'task')} in "
            f"{count(len(section.groups), 'group')}, {count(len(section.cells), 'cell')}. {span} documents per task. "
            f"Scoring took {spent} of worker time."
        ]
        if documents[0] < _FEW_DOCUMENTS:
            notes.append(f"With fewer than {_FEW_DOCUMENTS} documents in a task, its intervals are rough.")
        if estimates.held_fixed:
            notes.append(
                f"Not resampled, because the metric is not a mean over documents: {some(estimates.held_fixed)}. "
                "The intervals leave out their part of the noise."
            )
        if section.left_out:
            named = [f"{task} ({metric})" for task, metric in sorted(section.left_out.items())]
            notes.append(f"Left out, because lower is better in their metric: {some(named)}.")
        if section.other_splits:
            named = [f"{task} ({split})" for task, split in sorted(section.other_splits.items())]
            notes.append(f"Scored on another split, as the plan says: {some(named)}.")
        partial = [
            m.name for i, m in enumerate(section.mixtures) if m.mixture_id in scored and self._unfinished(i)
        ]  # fmt: skip
        if partial:
            notes.append(
                f"{count(len(partial), 'mixture')} without all tasks of a group, "
                f"left out of that group's mean and of the average: {some(partial)}."
            )
        return [Text(note) for note in notes]

    def _unfinished(self, column: int) -> bool:
        return bool(np.isnan(self.estimates.average.value[column]))

    def findings(self) -> list[Block]:
        """The main results in sentences."""
        items = []
        for active, rows in self.compared().items():
            full = self.section.full(active)
            assert full is not None
            verdicts = [found.verdict for _, found in rows]
            items.append(
                f"{active} active: the full mixture scores {percent(self.estimates.average.value[full])}. Of "
                f"{count(len(rows), 'other mixture')}, {verdicts.count('better')} better, "
                f"{verdicts.count('equal within noise')} equal within noise and {verdicts.count('worse')} worse."
            )
            smallest = min(
                (
                    (self.section.mixtures[i], found)
                    for i, found in rows
                    if found.verdict in ("better", "equal within noise")
                ),
                key=lambda row: row[0].parameters,
                default=None,
            )
            if smallest:
                mixture, found = smallest
                items[-1] += (
                    f" The smallest one that is not worse is {mixture.name}: {ratio(mixture)} of the parameters, "
                    f"{span_of(found)} points."
                )
        kinds = (compare_kinds(self.section, self.estimates, scope) for scope in ("own", "pooled"))
        items += [self._verdict(found) for found in kinds if found][:1]
        gaps = gap_counts(self.section)
        items += [gaps] if gaps else []
        return [Heading(3, "Findings"), Items(items)] if items else []

    def compared(self) -> dict[int, list[tuple[int, Interval]]]:
        """Active experts -> the columns that can be compared with the full mixture, smallest first."""
        average, out = self.estimates.average, {}
        for active in sorted({mixture.active for mixture in self.section.mixtures}):
            full = self.section.full(active)
            if full is None or np.isnan(average.value[full]):
                continue
            rows = [
                (i, average.difference(i, full))
                for i in self._columns(active)
                if i != full and not np.isnan(average.value[i])
            ]
            if rows:
                out[active] = rows
        return out

    def _columns(self, active: int) -> list[int]:
        """Mixtures of several experts at so many active ones, smallest first."""
        alone = len(self.section.experts) == 1
        picked = [
            i
            for i, m in enumerate(self.section.mixtures)
            if m.active == active and m.family != "public only" and (alone or not m.pair)
        ]
        return sorted(picked, key=lambda i: (self.section.mixtures[i].parameters, i))

    # best ranks

    def best_ranks(self) -> list[Block]:
        """Best rank per expert and group over the two-expert mixtures."""
        section = self.section
        measures = {**self.estimates.groups, "average": self.estimates.average}
        best = {
            expert: {
                name: best_rank(found) for name, m in measures.items() if (found := curve(section, m, expert)).ranks
            }
            for expert in section.experts
        }
        best = {expert: row for expert, row in best.items() if row}
        domains = {group.name: group.domain for group in section.groups}
        header = ["expert", *measures]
        short = [[e, *(_best_cell(row.get(n), domains.get(n) == e) for n in measures)] for e, row in best.items()]
        long = [
            [expert, name, str(b.rank), f"{b.low} to {b.high}", *_score_cells(b)]
            for expert, row in best.items()
            for name, b in row.items()
        ]
        columns = ["expert", "group", "best rank", "95 % of resamples", "score", "full", "gain (95 %)", "optimism"]
        return [
            Heading(3, "Best rank of each expert"),
            Text(
                "Over the two-expert mixtures of the public expert and one domain expert, both active. Ranks at or "
                "above the full one are the full expert and stand here once, as full."
            ),
            Table(
                "Best rank per expert and group",
                [header, *short],
                "In brackets: points above the full expert; * where the 95 % interval leaves out zero. † marks the "
                "expert's own domain. Of equal scores the lowest rank is shown.",
            ),
            Table(
                "The same with scores and intervals",
                [columns, *long],
                "95 % of resamples: where the best rank falls when the documents are drawn again. The interval of the "
                "gain does not allow for the choice of the best; compare the gain with the optimism.",
                texts=2,
            ),
        ]

    # mixtures against the full one

    def against_full(self) -> list[Block]:
        """Mixtures of several experts against the full one at the same number of active experts."""
        blocks: list[Block] = []
        for active in sorted({mixture.active for mixture in self.section.mixtures}):
            columns = self._columns(active)
            if columns:
                blocks.append(self._comparison(active, columns))
        if not blocks:
            return []
        names = [name for mixture in self.section.mixtures for name in mixture.names]
        notes: list[Block] = []
        if any(name.startswith("best") for name in names):
            notes.append(
                Text(
                    "The ranks of best and best2 were picked by scores on these same documents. Their scores are "
                    "therefore too high, by an amount that the intervals do not show. For an unbiased number score "
                    "them on the test split. The same holds for whoever picks the best row of a table.",
                    "Picked on the same documents.",
                )
            )
        return [Heading(3, "Mixtures against the full one"), *blocks, *notes, *self._assignments()]

    def _comparison(self, active: int, columns: Sequence[int]) -> Table:
        section, estimates, full = self.section, self.estimates, self.section.full(active)
        header = ["mixture", "parameters", "ratio", *estimates.groups, "average", "difference (95 %)", "verdict"]
        rows = []
        for i in ([full] if full is not None else []) + [i for i in columns if i != full]:
            mixture = section.mixtures[i]
            nothing = full is None or i == full
            found = Interval(*[math.nan] * 3) if full is None else estimates.average.difference(i, full)
            rows.append(
                [
                    mixture.name,
                    size(mixture.parameters),
                    ratio(mixture),
                    *(_group_cell(measure, i, None if i == full else full) for measure in estimates.groups.values()),
                    percent(estimates.average.value[i]),
                    _NO if nothing else span_of(found),
                    "baseline" if i == full else _NO if nothing else found.verdict,
                ]
            )
        missing = "" if full is not None else " The full mixture was not scored at this number, so nothing is compared."
        arrows = (
            "↑ and ↓: the 95 % interval of the difference to the full mixture is above or below zero in that group."
        )
        return Table(f"{active} active experts", [header, *rows], (arrows if full is not None else "") + missing)

    def _assignments(self) -> list[Block]:
        section = self.section
        picked = [
            m for m in section.mixtures if m.family == "heterogeneous" or any(n.startswith("best") for n in m.names)
        ]
        rows = [[m.name, str(m.active), *(str(m.ranks[e]) for e in section.experts)] for m in picked]
        if not rows:
            return []
        return [Table("Ranks of the heterogeneous mixtures", [["mixture", "active", *section.experts], *rows])]

    def regression(self) -> list[Block]:
        """Quadratics in log2 rank per task."""
        rows: dict[str, list[list[str]]] = {"own": [], "pooled": []}
        for group in self.section.groups:
            for task in group.tasks:
                measure = self.estimates.tasks[task]
                own = fit_quadratic(own_curve(self.section, measure, group))
                pooled = fit_quadratic(pooled_curve(self.section, measure))
                label = [task, group.name, group.kind or _NO]
                rows["own"] += [[*label, str(group.domain), *self._fit_cells(own)]] if own else []
                rows["pooled"] += [[*label, *self._fit_cells(pooled)]] if pooled else []
        header = ["ranks", "best rank", "95 % interval", "where", "R²"]
        note = (
            "Where: inside the measured range (vertex), or the end of the range that is higher; flat: the score is the "
            "same at all ranks. R²: share of the variance between ranks that the quadratic explains."
        )
        blocks: list[Block] = [
            Heading(3, "Regression from rank to score"),
            Text(
                "Per task a quadratic in log2 rank, once for the expert whose domain the task is, and once pooled: "
                "fitted to the mean over all experts, which is one regression over the experts with a constant of its "
                "own for each. A quadratic is a coarse shape: where a score rises and then stays, its best rank "
                "depends on how many ranks lie on the level part."
            ),
        ]
        if rows["own"]:
            head = ["task", "group", "kind", "expert", *header]
            blocks.append(Table("Regression, own domain's expert", [head, *rows["own"]], note, texts=4))
        if rows["pooled"]:
            head = ["task", "group", "kind", *header]
            blocks.append(Table("Regression, pooled over experts", [head, *rows["pooled"]], note, texts=3))
        if len(blocks) == 2:
            blocks.append(
                Text("Too few ranks were scored for it: four are needed, full counts where its rank is known.")
            )
        return blocks

    def _fit_cells(self, fit: Fit) -> list[str]:
        best = _NO if fit.where == "flat" else _rank_at(fit.best.value, self.section)
        span = _NO if fit.where == "flat" else _rank_range(fit.best, self.section)
        r_squared = _NO if math.isnan(fit.r_squared) else f"{fit.r_squared:.2f}"
        return [str(len(fit.x)), best, span, fit.where, r_squared]

    def kinds(self) -> list[Block]:
        """Best ranks on knowledge-heavy and on reasoning-heavy groups."""
        found = [compare_kinds(self.section, self.estimates, scope) for scope in ("own", "pooled")]
        rows, verdicts = [], []
        for comparison in found:
            if comparison is None:
                continue
            scope = "own domain" if comparison.scope == "own" else "pooled"
            for kind, fit in comparison.kinds.items():
                groups = [f"{n} {_rank_at(f.best.value, self.section)}" for n, f in comparison.groups[kind].items()]
                sufficient = comparison.sufficient[kind]
                span = f"{_rank_at(sufficient.value, self.section)} ({_rank_range(sufficient, self.section)})"
                rows.append([scope, kind, ", ".join(groups), *self._fit_cells(fit)[1:], span])
            verdicts.append(Text(f"{self._verdict(comparison)} {self._caveats(comparison)}".strip(), "Verdict."))
        heading = Heading(3, "Knowledge-heavy against reasoning-heavy groups")
        if not rows:
            return [heading, Text("Not compared: it needs groups of both kinds with four ranks each.")]
        header = ["scope", "kind", "groups, each with its best rank", "best rank", "95 % interval", "where", "R²"]
        header.append("sufficient (95 %)")
        return [
            heading,
            Text(
                "The quadratic of a kind is fitted to the mean of its groups. Own domain: each group with the expert "
                "whose domain it is. Pooled: all groups of the kind, each with the mean over experts. Sufficient: the "
                "lowest rank with 95 % of the gain from the lowest to the best rank, linear between measured ranks; it "
                "assumes no shape and is our addition."
            ),
            Table("Best rank by kind", [header, *rows], texts=3),
            *verdicts,
        ]

    def _verdict(self, found: KindComparison) -> str:
        knowledge, reasoning = (found.kinds[kind].best.value for kind in ("knowledge", "reasoning"))
        difference = found.difference
        scope = "the own domain's expert" if found.scope == "own" else "the mean over experts"
        text = (
            f"With {scope}, the best rank is {_rank_at(reasoning, self.section)} on reasoning-heavy and "
            f"{_rank_at(knowledge, self.section)} on knowledge-heavy groups, a difference of "
            f"{_log2_range(difference)} in log2 rank. "
        )
        if difference.low == difference.high == 0:
            text += "Both are at the same end of the measured range: by the quadratic, no difference."
        elif difference.low > 0:
            text += "Reasoning-heavy groups do best at the higher rank, in line with the paper's finding."
        elif difference.high < 0:
            text += "Knowledge-heavy groups do best at the higher rank, the opposite of the paper's finding."
        else:
            text += "The interval holds zero: not significant, these documents do not tell."
        return f"{text} {self._sufficient(found)}"

    def _sufficient(self, found: KindComparison) -> str:
        """What the ranks that suffice say, for which no shape is assumed."""
        knowledge, reasoning = (_rank_at(found.sufficient[k].value, self.section) for k in ("knowledge", "reasoning"))
        difference = found.sufficient_difference
        verdict = "not significant"
        if difference.low > 0 or difference.high < 0:
            verdict = f"{'reasoning' if difference.low > 0 else 'knowledge'}-heavy groups need the higher rank"
        return (
            f"Without assuming a shape, the sufficient rank is {reasoning} on reasoning-heavy and {knowledge} on "
            f"knowledge-heavy groups, a difference of {_log2_range(difference)}: {verdict}."
        )

    def _caveats(self, found: KindComparison) -> str:
        """What qualifies a verdict: best ranks at an end of the range, few groups."""
        parts = []
        ends = [kind for kind, fit in found.kinds.items() if fit.where in ("lowest rank", "highest rank")]
        if ends:
            parts.append(f"The best rank of {' and of '.join(ends)} lies at an end of the measured range.")
        if found.permutations and found.difference.low * found.difference.high > 0:
            extreme, ways = found.permutations
            parts.append(
                f"With groups instead of documents as the unit: of {ways} ways to label the groups, {extreme} "
                f"{'gives' if extreme == 1 else 'give'} mean best log2 ranks at least as far apart "
                f"(exact permutation test, p = {extreme / ways:.2f})."
            )
            if extreme > 0.05 * ways:
                parts.append("Whether other groups of these kinds would show the same is open.")
        return " ".join(parts)


def ratio(mixture: Mixture) -> str:
    """Parameters over those of the full mixture."""
    return f"{mixture.parameters / mixture.full_parameters:.3f}" if mixture.full_parameters else _NO


def _best_cell(best: BestRank | None, own: bool) -> str:
    if best is None:
        return _NO
    sign = "*" if best.gain.verdict in ("better", "worse") else ""
    gain = "" if math.isnan(best.full) or best.rank == "full" else f" ({points(best.gain.value)}{sign})"
    return f"{best.rank}{gain}{' †' if own else ''}"


def _score_cells(best: BestRank) -> list[str]:
    gain = _NO if best.rank == "full" else span_of(best.gain)
    return [percent(best.score), percent(best.full), gain, points(best.optimism)]


def _group_cell(measure: Measure, column: int, full: int | None) -> str:
    text = percent(measure.value[column])
    if full is None or text == _NO:
        return text
    return text + {"better": " ↑", "worse": " ↓"}.get(measure.difference(column, full).verdict, "")
