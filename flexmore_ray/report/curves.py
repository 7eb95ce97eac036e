"""The chapter on methods of choosing ranks: each a curve of score against parameters, and what each needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.report.analysis import SHARES, SUFFICIENT, Estimates, Interval, Method, compare_methods
from flexmore_ray.report.chapters import count, percent, ratio, size, some, span_of
from flexmore_ray.report.page import Block, Heading, Image, Table, Text
from flexmore_ray.report.sections import Section

_NO = "-"


def methods_compared(section: Section, estimates: Estimates, path: Path) -> list[Block]:
    """Figure and tables of a section's curves; empty where it has none with results.

    Args:
        section: The section.
        estimates: Its measures.
        path: PNG to write.
    """
    from flexmore_ray.report.figures import score_by_method

    methods = compare_methods(section, estimates)
    if not methods:
        return []
    score_by_method(section.mixtures, estimates.average, methods, section.public(), path)
    return [
        Heading(3, "Methods compared"),
        Text(
            f"Each method of choosing ranks or factors is a curve over budgets of total parameters. The baseline is "
            f"{methods[0].name}: the first curve of the plans, those of plain factors first, then by the plans' names."
        ),
        Image(
            path.name,
            f"Score against parameters, a line for each of {count(len(methods), 'method')}, with bands.",
            "Average of group means against total parameters (log scale). Bands: 95 % of the difference to the full "
            "mixture, paired by documents, around its score; where that was not scored, of the score itself. Dashed: "
            "the full mixture and the public expert alone, where they were scored. Two curves may differ though their "
            "bands overlap: the last table compares them.",
        ),
        _needs(section, methods),
        _points(section, estimates, methods),
    ]


def _needs(section: Section, methods: Sequence[Method]) -> Block:
    """Parameters that each method needs for a share of the full mixture's gain."""
    if not any(method.needed for method in methods):
        return Text(
            "How many parameters a method needs is told by shares of the full mixture's gain over the public expert "
            "alone. Not known here: it takes both mixtures, and a gain. A budget of 1x is the full mixture; the "
            "public expert alone is a mixture in which every expert is dropped."
        )
    rows = [
        [
            method.name,
            str(method.active),
            *(_need_cell(section, method, share) for share in SHARES),
            "baseline" if method is methods[0] else _times(method.against_baseline),
        ]
        for method in methods
    ]
    shares = [f"{100 * share:.0f} %" for share in SHARES]
    header = ["method", "active", *shares, f"{100 * SUFFICIENT:.0f} %: of the baseline's"]
    return Table(
        "Parameters needed for a share of the full mixture's gain over the public expert alone",
        [header, *rows],
        "Where the curve first reaches the share, linear in log parameters between its points; in brackets the 95 % "
        "interval, the gain and the curve resampled together; x: times the parameters of the full mixture. ≤: the "
        "smallest budget reaches it already. The gain is that at the same number of active experts. The last column "
        "is the ratio to what the baseline needs: below 1 is better.",
    )


def _need_cell(section: Section, method: Method, share: float) -> str:
    found = method.needed.get(share)
    if found is None:
        return _NO
    smallest, full = (
        section.mixtures[method.columns[0]].parameters,
        section.mixtures[method.columns[0]].full_parameters,
    )

    def place(parameters: float) -> str:
        if math.isinf(parameters):
            return "not reached"
        sign = "≤ " if math.isclose(parameters, smallest) else ""
        return sign + (f"{parameters / full:.3f}x" if full else size(round(parameters)))

    low, high = place(found.low), place(found.high)
    if low == high == place(found.value):
        return low
    counted = "" if math.isinf(found.value) or not full else f"{size(round(found.value))}, "
    return f"{counted}{place(found.value)} ({low} to {high})"


def _times(found: Interval) -> str:
    if math.isnan(found.value):
        return _NO
    low, high = (_NO if math.isinf(end) else f"{end:.2f}" for end in (found.low, found.high))
    return f"{found.value:.2f} ({low} to {high})"


def _points(section: Section, estimates: Estimates, methods: Sequence[Method]) -> Table:
    """All points of all curves, each against the baseline's at the same budget."""
    baseline = dict(methods[0].points())
    rows = []
    for method in methods:
        for budget, i in method.points():
            mixture, other = section.mixtures[i], baseline.get(budget)
            found = None if other is None else estimates.average.difference(i, other)
            same = "baseline" if method is methods[0] else "the same"
            rows.append(
                [
                    method.name,
                    budget,
                    size(mixture.parameters),
                    ratio(mixture),
                    percent(estimates.average.value[i]),
                    _NO if found is None else same if i == other else span_of(found),
                    _NO if found is None or i == other else found.verdict,
                ]
            )
    header = ["method", "budget", "parameters", "ratio", "average", "difference (95 %)", "verdict"]
    lacking = sorted({budget for method in methods for budget, _ in method.points() if budget not in baseline})
    note = f" The baseline was not scored at {some(lacking)}." if lacking else ""
    return Table(
        "Methods at each budget",
        [header, *rows],
        f"Difference: to {methods[0].name} at the same budget, paired by documents.{note}",
        texts=2,
    )


def summarise_methods(section: Section, estimates: Estimates) -> dict[str, Any]:
    """By curve, the baseline first, what the chapter says, for programs; scores in [0, 1], None: not reached."""

    def numbers(found: Interval) -> dict[str, float | None]:
        ends = {"value": found.value, "low": found.low, "high": found.high}
        return {name: float(value) if math.isfinite(value) else None for name, value in ends.items()}

    return {
        method.name: {
            "active": method.active,
            "points": [
                {"budget": budget, "parameters": section.mixtures[i].parameters}
                | numbers(estimates.average.interval(i))
                for budget, i in method.points()
            ],
            "needed": {f"{share:g}": numbers(found) for share, found in method.needed.items()},
            "against_baseline": numbers(method.against_baseline),
        }
        for method in compare_methods(section, estimates)
    }
