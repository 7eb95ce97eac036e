"""Figures of the report, made to be legible at 180 mm, the width of a printed page."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from PIL import Image

from flexmore_ray.report.analysis import LEVEL, Array, Curve, Measure, Method, pareto_front
from flexmore_ray.report.sections import Mixture, Rank
from flexmore_ray.spec import FULL, PROJECTIONS

WIDTH = 180 / 25.4  # inches
DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
"""Palette of Okabe and Ito, which colour-blind readers can tell apart; yellow is left out, it is faint on paper."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.0,
    "figure.constrained_layout.use": True,
}
_MOST_POINTS = 200  # of a line of singular values
_STEPS = 31  # colours of the heat map
_TAIL = 1e-6  # of the largest singular value, below which none is drawn


@dataclasses.dataclass(frozen=True)
class Panel:
    """One group in the figure of score against rank."""

    title: str
    curves: Mapping[str, Curve]
    """Expert -> scores of its two-expert mixtures on the group."""
    bold: Curve | None
    """The curve that is drawn with its band: the domain's own expert, or the mean over experts."""
    own: str | None
    """The domain's own expert; None where `bold` is the mean."""


def score_by_rank(panels: Sequence[Panel], experts: Sequence[str], path: Path) -> None:
    """Scores of two-expert mixtures against log2 rank, a panel per group; bands are bootstrap intervals."""
    with plt.rc_context(STYLE):
        columns = min(4, len(panels) + 1)
        rows = math.ceil((len(panels) + 1) / columns)  # one place is for the legend
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, 1.75 * rows + 0.2), squeeze=False)
        axes = list(grid.flat)
        scale = _Scale([curve for panel in panels for curve in panel.curves.values()])
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel, experts, scale)
        for ax in axes[len(panels) :]:
            ax.axis("off")
        for row, ax in enumerate(grid[:, 0]):
            if row * columns < len(panels):
                ax.set_ylabel("score (%)")
        for i in range(max(0, len(panels) - columns), len(panels)):
            axes[i].set_xlabel("rank")
        _legend_of_experts(axes[-1], panels, experts)
        save(figure, path)


class _Scale:
    """The rank axis: log2 of the rank, the full rank last and marked."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        at: dict[Rank, float] = {}
        for curve in curves:
            at |= {rank: float(x) for rank, x in zip(curve.ranks, curve.x, strict=True)}
        numbers = [x for rank, x in at.items() if rank != FULL]
        self.full = at.get(FULL)
        if self.full is not None and math.isnan(self.full):
            self.full = max(numbers, default=-1.0) + 1
        self.low = min(numbers, default=0.0)
        self.high = max([*numbers, *([] if self.full is None else [self.full])], default=1.0)
        ranks = sorted(rank for rank in at if isinstance(rank, int))
        step = max(1, math.ceil(len(ranks) / 4))
        near = self.high - 0.2 * max(1.0, self.high - self.low)
        shown = [r for r in ranks[::step] if self.full is None or math.log2(r) < near]
        self.ticks = [math.log2(r) for r in shown]
        self.labels = [str(r) for r in shown]
        if self.full is not None:
            self.ticks.append(self.full)
            self.labels.append(FULL)

    def x(self, curve: Curve) -> Array:
        """Places of a curve's points."""
        return np.where(np.isnan(curve.x), math.nan if self.full is None else self.full, curve.x)

    def apply(self, ax: Axes) -> None:
        """Ticks, and a line at the full rank."""
        margin = 0.05 * max(1.0, self.high - self.low)
        ax.set_xticks(self.ticks, self.labels)
        ax.set_xlim(self.low - margin, self.high + margin)
        if self.full is not None:
            ax.axvline(self.full, color="#999999", linewidth=0.8, linestyle=":")


def _draw_panel(ax: Axes, panel: Panel, experts: Sequence[str], scale: _Scale) -> None:
    for expert, curve in panel.curves.items():
        if expert != panel.own:
            colour = COLOURS[experts.index(expert) % len(COLOURS)]
            ax.plot(scale.x(curve), 100 * curve.measure.value, color=colour, linewidth=0.8, alpha=0.75)
    if panel.bold is not None:
        i = None if panel.own is None else experts.index(panel.own)
        colour, marker = ("black", ".") if i is None else (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        low, high = 100 * np.quantile(panel.bold.measure.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        x = scale.x(panel.bold)
        ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
        ax.plot(
            x,
            100 * panel.bold.measure.value,
            color=colour,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            linestyle="--" if i is None else "-",
        )
    scale.apply(ax)
    ax.set_title("\n".join(short(line, 24) for line in textwrap.wrap(panel.title, 24)))


def _legend_of_experts(ax: Axes, panels: Sequence[Panel], experts: Sequence[str]) -> None:
    drawn = [name for name in experts if any(name in panel.curves for panel in panels)]
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=name,
        )
        for i, name in enumerate(experts)
        if name in drawn
    ]
    if any(panel.bold is not None and panel.own is None for panel in panels):
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.8, label="mean of experts"))
    ax.legend(handles=handles, loc="center", frameon=False, title="public expert +")


def heat_map(rows: Sequence[tuple[str, str, Curve]], path: Path) -> None:
    """Scores of tasks by rank: the number is the score in percent, the colour its distance from the full expert.

    Args:
        rows: Task, whose curve, and the curve.
        path: PNG to write.
    """
    ranks = sorted(
        {rank for _, _, curve in rows for rank in curve.ranks}, key=lambda r: r if isinstance(r, int) else 1e99
    )
    values = np.full((len(rows), len(ranks)), np.nan)
    for i, (_, _, curve) in enumerate(rows):
        values[i, [ranks.index(rank) for rank in curve.ranks]] = 100 * curve.measure.value
    base = values[:, -1:] if ranks[-1] == FULL else np.nanmean(values, axis=1, keepdims=True)
    distance = values - base
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, ax = plt.subplots(figsize=(WIDTH, 0.85 + 0.19 * len(rows)))
        limit = max(1.0, float(np.nanmax(np.abs(distance), initial=0)))
        image = ax.imshow(
            distance,
            cmap=matplotlib.colormaps["PuOr"].resampled(_STEPS),
            norm=TwoSlopeNorm(0, -limit, limit),
            aspect="auto",
        )
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                dark = abs(distance[i, j]) > 0.62 * limit
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks], rotation=45 if len(ranks) > 11 else 0)
        ax.set_yticks(range(len(rows)), [f"{short(task, 36)} ({whose})" for task, whose, _ in rows])
        ax.set_xlabel("rank of the expert in its two-expert mixture")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=ax, pad=0.015, fraction=0.05, aspect=max(8, 1.1 * len(rows)))
        bar.set_label("points above full" if ranks[-1] == FULL else "points above the mean of the row")
        save(figure, path)


def by_layer(spectra: Mapping[str, Mapping[str, Sequence[Array]]], label: str, path: Path, *, log_values: bool) -> None:
    """Curves over ranks for every expert (columns) and projection (rows), one line per layer.

    Args:
        spectra: expert -> projection -> per layer the values at ranks 1, 2, ... (NaN where not known).
        label: What the values are, with their unit.
        path: PNG to write.
        log_values: Whether the vertical axis is logarithmic.
    """
    experts = list(spectra)
    layers = max(len(lines) for by in spectra.values() for lines in by.values())
    everything = [values for by in spectra.values() for lines in by.values() for values in lines]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, layers))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(PROJECTIONS), len(experts), figsize=(WIDTH, 4.6), sharex=True, sharey=True, squeeze=False
        )
        for (row, column), ax in np.ndenumerate(grid):
            for layer, values in enumerate(spectra[experts[column]][PROJECTIONS[row]]):
                picked = _thin(len(values))
                ax.plot(picked + 1, values[picked], color=colours[layer], linewidth=0.9)
            ax.set_xscale("log", base=2)
            if log_values:
                ax.set_yscale("log")
                lowest = min(float(values.min()) for values in everything)
                ax.set_ylim(bottom=max(lowest, _TAIL * max(float(values.max()) for values in everything)) * 0.8)
            if row == 0:
                ax.set_title(short(experts[column], 14))
            if column == 0:
                ax.set_ylabel(f"{PROJECTIONS[row]}\n{label}")
        longest = math.log2(max(len(values) for values in everything))
        powers = range(0, int(longest) + 1, max(2, math.ceil(longest / (3 if longest < 10 else 2))))
        grid[0, 0].set_xticks([2.0**p for p in powers], [str(2**p) for p in powers])
        grid[0, 0].xaxis.set_minor_locator(NullLocator())
        figure.supxlabel("rank (number of leading singular values)", fontsize=8)
        scale = matplotlib.cm.ScalarMappable(
            matplotlib.colors.BoundaryNorm(np.arange(-0.5, layers + 0.5), layers),
            matplotlib.colors.ListedColormap(colours),
        )
        bar = figure.colorbar(scale, ax=grid, pad=0.01, fraction=0.03, aspect=40)
        bar.set_ticks(sorted({*range(0, layers, max(1, layers // 6)), layers - 1}) if layers < 8 else [0, layers - 1])
        bar.set_label("layer", labelpad=2)
        save(figure, path)


def _thin(number: int) -> Array:
    """Indices of at most `_MOST_POINTS` of so many values, dense on a logarithmic axis."""
    return np.unique(np.round(np.geomspace(1, number, _MOST_POINTS)).astype(int)) - 1


def score_by_size(mixtures: Sequence[Mixture], scores: Array, baselines: Sequence[int], path: Path) -> None:
    """Average of group means against total parameters, with the Pareto front.

    Args:
        mixtures: M mixtures.
        scores: (M,), in [0, 1]; NaN is not drawn.
        baselines: Columns that are named in the figure.
        path: PNG to write.
    """
    parameters = np.array([mixture.parameters for mixture in mixtures], dtype=np.float64)
    unit, word = _unit(parameters)
    size, score = parameters / unit, 100 * np.asarray(scores)
    actives = sorted({mixture.active for mixture in mixtures})
    looks = [_look(mixture, actives) for mixture in mixtures]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 3.6))
        for look in sorted(set(looks)):
            label, marker, colour, points = look
            picked = [j for j, other in enumerate(looks) if other == look]
            ax.scatter(
                size[picked], score[picked], s=points, marker=marker, color=colour, linewidths=0, label=label, zorder=2
            )
        front = np.flatnonzero(pareto_front(parameters, scores))
        front = front[np.argsort(size[front])]
        ax.step(size[front], score[front], where="post", color="black", linewidth=1.0, zorder=1, label="Pareto front")
        ax.scatter(size[front], score[front], s=52, facecolors="none", edgecolors="black", linewidths=0.9, zorder=3)
        ax.set_xlabel(f"total parameters ({word})")
        ax.set_ylabel("average of group means (%)")
        shown = size[~np.isnan(score)]
        if shown.max() > 3 * shown.min():
            _log_size(ax)
        _name_points(ax, size, score, [(i, mixtures[i].name) for i in baselines if not math.isnan(score[i])])
        figure.legend(loc="outside upper center", ncols=4, frameon=False, handletextpad=0.4, columnspacing=1.2)
        save(figure, path)


def _unit(parameters: Array) -> tuple[float, str]:
    return (1e9, "billions") if np.median(parameters) > 3e8 else (1e6, "millions")


def _log_size(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(NullLocator())


def score_by_method(
    mixtures: Sequence[Mixture], average: Measure, methods: Sequence[Method], public: int | None, path: Path
) -> None:
    """Average of group means against total parameters, a line per method with its bootstrap band.

    The band is that of the difference to the full mixture, around the full mixture's score; without one, of the score.

    Args:
        mixtures: M mixtures.
        average: their scores.
        methods: at least one.
        public: column of the public expert alone; None where it was not scored.
        path: PNG to write.
    """
    parameters = np.array([mixture.parameters for mixture in mixtures], dtype=np.float64)
    unit, word = _unit(parameters[[i for method in methods for i in method.columns]])
    fulls = {method.full: f"full, a{method.active}" for method in methods if method.full is not None}
    lines = fulls | ({} if public is None else {public: "public alone"})
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 3.6))
        for number, method in enumerate(methods):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            x, points = parameters[list(method.columns)] / unit, average[method.columns]
            draws = points.draws
            if method.full is not None and not math.isnan(average.value[method.full]):
                draws = draws - average.draws[:, [method.full]] + average.value[method.full]
            low, high = 100 * np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            for edge in (low, high):
                ax.plot(x, edge, color=colour, linewidth=0.6, alpha=0.7)
            label = short(method.name, 40)
            ax.plot(x, 100 * points.value, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        for column, name in lines.items():
            if not math.isnan(average.value[column]):
                level = 100 * float(average.value[column])
                ax.axhline(level, color="#555555", linewidth=0.9, linestyle="--", zorder=1)
                ax.annotate(name, (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        _log_size(ax)
        ax.set_xlabel(f"total parameters ({word})")
        ax.set_ylabel("average of group means (%)")
        figure.legend(loc="outside upper center", ncols=2 if len(methods) < 5 else 3, frameon=False, columnspacing=1.2)
        save(figure, path)


def _look(mixture: Mixture, actives: Sequence[int]) -> tuple[str, str, str, int]:
    """Label, marker, colour and size of a mixture's point: the marker says its kind, the colour how many are active."""
    if mixture.pair:
        return "public + one expert, a2", "P", "#9a9a9a", 16
    kinds = {"full": ("s", 30), "uniform": ("o", 22), "heterogeneous": ("D", 24), "public only": ("*", 45)}
    marker, points = kinds[mixture.family]
    label = f"{mixture.family}, a{mixture.active}"
    return label, marker, COLOURS[actives.index(mixture.active) % len(COLOURS)], points


def _name_points(ax: Axes, size: Array, score: Array, named: Sequence[tuple[int, str]]) -> None:
    """Write names in a column on the right, apart from each other, each with a line to its point."""
    if not named:
        return
    low, high = float(np.nanmin(score)), float(np.nanmax(score))
    gap = (high - low or 1.0) / 13
    order = sorted(named, key=lambda item: score[item[0]])
    places: list[float] = []
    for i, _ in order:
        places.append(max(float(score[i]), places[-1] + gap if places else -math.inf))
    wanted = [float(score[i]) for i, _ in order]
    shift = max(0.0, float(np.mean(np.subtract(places, wanted))))
    places = [place - shift for place in places]
    for (i, name), place in zip(order, places, strict=True):
        ax.annotate(
            short(name, 30),
            (size[i], score[i]),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": "#777777",
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def short(text: str, length: int) -> str:
    """A name as matplotlib draws it letter for letter, cut to a length."""
    cut = text if len(text) <= length else f"{text[: length - 1]}…"
    return cut.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size, that holds no date and no version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        path, format="PNG", optimize=True, dpi=(DPI, DPI)
    )
