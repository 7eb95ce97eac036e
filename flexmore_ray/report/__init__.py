"""The report of a results folder: Markdown, one HTML page and PNG figures. Reads files, computes no score.

    OUT/report.md  report.html  1-rank.png  1-heatmap.png  1-spectra.png  1-energy.png  1-size.png  1-methods.png  2-...

Each number before a figure's name is a section: results that may be compared with each other. Equal results give
equal files, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flexmore_ray.errors import FlexmoreError, StoreError
from flexmore_ray.report.analysis import (
    RESAMPLES,
    Array,
    Curve,
    Estimates,
    Interval,
    Measure,
    compare_kinds,
    curve,
    own_curve,
    pareto_front,
    pooled_curve,
    resample,
)
from flexmore_ray.report.chapters import Chapters, count, gap_counts, some
from flexmore_ray.report.curves import methods_compared, summarise_methods
from flexmore_ray.report.page import Block, Heading, Image, Items, Table, Text, to_html, to_markdown
from flexmore_ray.report.sections import Section, read_sections
from flexmore_ray.spec import PROJECTIONS, MatrixKey
from flexmore_ray.storage import AnyPath, StorageError, output_folder

TITLE = "Ranks of experts: scores, best ranks and sizes"
_HEAT_ROWS = 40  # tasks in one heat map


def write_report(results: AnyPath, out: AnyPath) -> dict[str, Any]:
    """Write the report of a results folder.

    Args:
        results: Folder of `flexmore grid` or `flexmore eval`.
        out: Where the report goes; made if missing.

    Returns:
        `report`, `html`, `figures`, and `sections` with the main numbers of each, scores in [0, 1].

    Raises:
        UsageError: There is no such folder, or nothing in it.
        FlexmoreError: A file is damaged, results contradict each other, or `out` cannot be written.
    """
    sections = read_sections(results)
    with _writing(out), output_folder(out) as folder:
        parts = []
        total = sum(len(section.tasks) for section in sections)
        with tqdm(total=total, desc="resampling", unit="task", disable=not sys.stderr.isatty(), leave=False) as bar:
            for number, section in enumerate(sections, 1):
                estimates = resample(section, results, advance=bar.update) if section.cells else None
                parts.append(_Part(number, section, estimates, folder))
        blocks = [*_introduction(sections), *(block for part in parts for block in part.blocks()), *_methods()]
        (folder / "report.md").write_text(to_markdown(TITLE, blocks), encoding="utf-8")
        (folder / "report.html").write_text(to_html(TITLE, blocks, folder), encoding="utf-8")
    figures = [block.file for block in blocks if isinstance(block, Image)]
    return {
        "report": str(out / "report.md"),
        "html": str(out / "report.html"),
        "figures": [str(out / name) for name in figures],
        "sections": [part.summary() for part in parts],
    }


@contextlib.contextmanager
def _writing(out: AnyPath) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise FlexmoreError(
            f"cannot write the report to {out}: {error.strerror or error}; choose another --out"
        ) from None


# --- the document -----------------------------------------------------------------------------------------


def _introduction(sections: Sequence[Section]) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "Scores are in percent, differences in points. A group's score is the unweighted mean of its tasks, the "
            "average the unweighted mean of the groups. Intervals hold 95 % and come from drawing the documents "
            "again; how is said at the end."
        )
    ]
    if len(sections) > 1:
        blocks.append(
            Text(
                f"The results are of {len(sections)} kinds that must not be compared (other weights, tasks, split, "
                "number of documents, seed or dtype). Each has a part of its own below."
            )
        )
    return blocks


def _methods() -> list[Block]:
    return [
        Heading(2, "How the numbers were made"),
        Items(
            [
                f"Intervals: percentile bootstrap, {RESAMPLES:,} resamples. The documents of each task are drawn with "
                "replacement, the same draw for all mixtures, so that differences are paired. The intervals cover the "
                "choice of documents, not the choice of tasks, prompts or seeds of training.",
                "Verdicts: better or worse where the 95 % interval of the difference lies on one side of zero, else "
                "equal within noise, before rounding. This does not prove equality. There is no correction for the "
                "number of comparisons: of 20 comparisons without any true difference one is expected to look real.",
                "Best of several: the score of the best of several ranks is too high, because it was picked on the "
                "documents that it is reported on. The column optimism estimates by how much (Efron's bootstrap "
                "estimate). It is not subtracted.",
                "Regression: score = c0 + c1 x + c2 x², x = log2 rank, least squares over the two-expert mixtures, one "
                "point per rank, each with equal weight. The full expert stands at the log2 of the full rank. The best "
                "rank is the vertex if that is a maximum inside the measured range, else the higher end of the range. "
                "The fit is repeated in every resample.",
                "The paper (FlexMoRE, arXiv 2602.08818) states its finding on rank and kind of task in the abstract "
                "and does not publish the form of its regression. This form is ours.",
                "best and best2: per expert the rank with the best average over all groups among its two-expert "
                "mixtures, and the best on the groups of its own domain (an expert without such groups takes the "
                "former); ties go to the lowest rank. The paper does not publish its rule. This one is ours.",
            ]
        ),
    ]


@dataclasses.dataclass
class _Part:
    """One section of the results as a part of the document."""

    number: int
    section: Section
    estimates: Estimates | None
    out: Path

    def blocks(self) -> list[Block]:
        """Everything the document says of the section; draws its figures."""
        section = self.section
        blocks: list[Block] = [Heading(2, section.setting.describe())]
        if section.plans:
            blocks.append(Text(f"Plan: {', '.join(section.plans)}."))
        if self.estimates is None:
            return [*blocks, Text("No cell of this part is done."), *self._gaps()]
        chapters = Chapters(section, self.estimates)
        pairs = any(mixture.pair for mixture in section.mixtures)
        blocks += [*chapters.scope(), *chapters.findings()]
        blocks += methods_compared(section, self.estimates, self._file("methods"))
        blocks += chapters.best_ranks() if pairs else []
        blocks += [*chapters.against_full(), *self._size_figure()]
        if pairs:
            blocks += [*self._rank_figures(), *chapters.regression(), *chapters.kinds()]
        return [*blocks, *self._spectra(), *self._gaps()]

    @property
    def _known(self) -> Estimates:
        assert self.estimates is not None
        return self.estimates

    def _file(self, name: str) -> Path:
        return self.out / f"{self.number}-{name}.png"

    def _size_figure(self) -> list[Block]:
        from flexmore_ray.report.figures import score_by_size

        section, average = self.section, self._known.average.value
        if np.count_nonzero(~np.isnan(average)) < 2:
            return []
        baselines = [
            i
            for i, m in enumerate(section.mixtures)
            if m.is_full or m.family == "public only" or any(n.startswith("best") for n in m.names)
        ]
        path = self._file("size")
        score_by_size(section.mixtures, average, baselines, path)
        front = np.flatnonzero(pareto_front(np.array([m.parameters for m in section.mixtures]), average))
        on_front = sorted((section.mixtures[i] for i in front), key=lambda m: m.parameters)
        caption = (
            "Average of group means against total parameters. Circled, joined by the line: mixtures that no other one "
            f"beats in both, by their scores alone, noise not considered: {some([m.name for m in on_front])}."
        )
        alt = f"Scatter plot of score against parameters for {count(len(average), 'mixture')}, with the Pareto front."
        return [Heading(3, "Score and size"), Image(path.name, alt, caption)]

    # rank and score

    def _rank_figures(self) -> list[Block]:
        from flexmore_ray.report.figures import Panel, heat_map, score_by_rank

        section = self.section
        panels, rows = [], []
        for group in section.groups:
            curves = self._curves(self._known.groups[group.name])
            own = own_curve(section, self._known.groups[group.name], group)
            if not curves:
                continue
            kind = f" ({group.kind})" if group.kind else ""
            bold = own or pooled_curve(section, self._known.groups[group.name])
            panels.append(Panel(group.name + kind, curves, bold, str(group.domain) if own else None))
            rows += [(task, *self._task_curve(task, group.name)) for task in group.tasks]
        if not panels:
            return []
        path = self._file("rank")
        score_by_rank(panels, section.experts, path)
        blocks: list[Block] = [
            Heading(3, "Score against rank"),
            Image(
                path.name,
                f"Score against rank in {count(len(panels), 'panel')}, one per group, a line per expert.",
                "Two-expert mixtures: score of each group against the rank of the domain expert (log scale; the dotted "
                "line marks the full expert). Bold, with its 95 % band: the expert whose domain the group is, or, "
                "dashed, the mean over experts where there is no such expert.",
            ),
        ]
        drawn = [(task, whose, found) for task, whose, found in rows if found is not None]
        for start in range(0, len(drawn), _HEAT_ROWS):
            path = self._file("heatmap" if len(drawn) <= _HEAT_ROWS else f"heatmap-{start // _HEAT_ROWS + 1}")
            heat_map(drawn[start : start + _HEAT_ROWS], path)
            blocks.append(
                Image(
                    path.name,
                    f"Heat map of {count(min(_HEAT_ROWS, len(drawn) - start), 'task')} by rank.",
                    "Tasks by rank. In brackets whose two-expert mixtures: the expert of the task's domain, or the "
                    "mean over experts where there is none. Numbers: score in percent. Colour: points above or below "
                    "the full expert of the same row.",
                )
            )
        return blocks

    def _curves(self, measure: Measure) -> dict[str, Curve]:
        found = {expert: curve(self.section, measure, expert) for expert in self.section.experts}
        return {expert: c for expert, c in found.items() if c.ranks}

    def _task_curve(self, task: str, group_name: str) -> tuple[str, Curve | None]:
        """Whose curve a task has, and the curve."""
        group = next(group for group in self.section.groups if group.name == group_name)
        own = own_curve(self.section, self._known.tasks[task], group)
        if own is not None:
            return str(group.domain), own
        pooled = pooled_curve(self.section, self._known.tasks[task])
        return "mean", pooled if pooled is not None and pooled.ranks else None

    # spectra

    def _spectra(self) -> list[Block]:
        heading = Heading(3, "Spectra and energy of the experts")
        if self.section.store is None:
            return [heading, Text("Left out: the results do not say where the factors are.")]
        try:
            spectra, energy = _read_spectra(self.section.store, self.section.experts)
        except (StoreError, StorageError) as error:
            return [heading, Text(f"Left out: the store of the factors cannot be read ({error}).")]
        from flexmore_ray.report.figures import by_layer

        paths = [self._file("spectra"), self._file("energy")]
        by_layer(spectra, "singular value", paths[0], log_values=True)
        by_layer(energy, "energy (%)", paths[1], log_values=False)
        what = "by expert (columns), projection (rows) and layer (colour)"
        return [
            heading,
            Image(paths[0].name, f"Spectra {what}.", f"Singular values of the deltas {what}, in units of the weights."),
            Image(
                paths[1].name,
                f"Energy {what}.",
                f"Energy that a rank keeps, {what}: share of the squared singular values up to it.",
            ),
        ]

    # what is not there

    def _gaps(self) -> list[Block]:
        section = self.section
        counts = gap_counts(self.section)
        if not counts:
            return []
        blocks: list[Block] = [Heading(3, "Failed and missing cells"), Text(counts)]
        if section.failed:
            rows = [[c.task, section.name_of(c.mixture_id), c.error or "no error given"] for c in section.failed]
            blocks.append(Table("Failed cells", [["task", "mixture", "error"], *rows], texts=3))
        if section.missing:
            rows = [[name, str(len(tasks)), some(tasks)] for name, tasks in section.missing.items()]
            blocks.append(Table("Missing cells", [["mixture", "cells", "tasks"], *rows], texts=3))
        if section.unresolved:
            blocks.append(Text(f"Ranks not chosen yet, for want of results: {', '.join(section.unresolved)}."))
        if section.plans:
            blocks.append(Text("Start the same grid again to compute them."))
        return blocks

    # for programs

    def summary(self) -> dict[str, Any]:
        """The main numbers of the section, scores in [0, 1]."""
        section = self.section
        setting = dataclasses.asdict(section.setting) | {"sources": list(section.setting.sources)}
        out: dict[str, Any] = {"setting": setting, "plans": list(section.plans), "cells": len(section.cells)}
        out |= {"failed": len(section.failed), "missing": sum(map(len, section.missing.values()))}
        if self.estimates is None:
            return out
        average = self._known.average
        out["scores"] = {m.name: _number(average.value[i]) for i, m in enumerate(section.mixtures)}
        out["against_full"] = {
            section.mixtures[i].name: {"parameters": section.mixtures[i].parameters, **_numbers(found)}
            | {"verdict": found.verdict}
            for rows in Chapters(section, self._known).compared().values()
            for i, found in rows
        }
        out["curves"] = summarise_methods(section, self._known)
        comparisons = [compare_kinds(section, self._known, scope) for scope in ("own", "pooled")]
        out["kinds"] = {
            found.scope: {kind: _number(2**fit.best.value) for kind, fit in found.kinds.items()}
            | {"difference_log2": _numbers(found.difference)}
            | {"sufficient": {kind: _number(2**at.value) for kind, at in found.sufficient.items()}}
            | {"sufficient_difference_log2": _numbers(found.sufficient_difference)}
            for found in comparisons
            if found
        }
        return out


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _numbers(found: Interval) -> dict[str, float | None]:
    return {"difference": _number(found.value), "low": _number(found.low), "high": _number(found.high)}


_BySpectrum = dict[str, dict[str, list[Array]]]


def _read_spectra(folder: str, experts: Sequence[str]) -> tuple[_BySpectrum, _BySpectrum]:
    """Singular values, and energy in percent by rank, of every expert that a store holds, by projection and layer."""
    from flexmore_ray.store import open_store

    store = open_store(folder)
    held: dict[tuple[str, str], list[MatrixKey]] = {}
    for key in sorted(store.keys()):
        if key.expert in experts:
            held.setdefault((key.expert, key.projection), []).append(key)
    if not held:
        raise StoreError(f"{folder}: holds none of {', '.join(experts)}")
    spectra: _BySpectrum = {name: {p: [] for p in PROJECTIONS} for name in experts if (name, PROJECTIONS[0]) in held}
    energy: _BySpectrum = {name: {p: [] for p in PROJECTIONS} for name in spectra}
    for (expert, projection), keys in held.items():
        for key in keys:
            values = store.spectrum(key).numpy()
            total = float(np.sum(values**2)) + store.residual_energy(key)
            spectra[expert][projection].append(values)
            energy[expert][projection].append(100 * np.cumsum(values**2) / (total or 1.0))
    return spectra, energy
