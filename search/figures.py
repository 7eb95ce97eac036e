"""Figures of a search, in the style of the report's, made to be legible at 180 mm."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase

from flexmore_ray.report.analysis import Array
from flexmore_ray.report.figures import COLOURS, STYLE, WIDTH, save, short
from flexmore_ray.spec import DROP, FULL
from search.ledger import Entry
from search.outcome import MEASURES, Importance, Search, parameter_name
from search.space import ACTIVE

_BLUE, _ORANGE, _GREEN, _GREY = COLOURS[0], COLOURS[1], COLOURS[2], "#7F7F7F"
_HOLLOW = ("v", "s", "D", "^", "P", "X")  # markers of the rungs at which trials were stopped
_APART = 0.4  # levels from the first to the last line at the same level
_LINE_HEIGHT = 13  # points
_DISTANCES = (9, 16, 25, 36, 50, 66, 84)  # pixels from a point to its name
_MOST_UPRIGHT = 8  # axes whose names are cut short to stand side by side
_MOST_LETTERS = 90  # that fit side by side


# --- the course of the search -----------------------------------------------------------------------------


def history(search: Search, path: Path) -> None:
    """Score by trial: complete, stopped and failed trials, the best so far, and the baselines.

    Args:
        search: At least one of its trials has a score.
        path: PNG to write.
    """
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 3.5))
        scored = [entry for entry in search.baselines if entry.state == "complete"]
        numbers = [entry.index for entry in search.trials]
        left, right = min(numbers) - 1, max(numbers) + 1
        for entry in scored:
            ax.axhline(100 * entry.value, color=_GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        _draw_trials(ax, search)
        best = best_so_far(search)
        if best:
            x, y = zip(*best, strict=True)
            places = [*(max(left, value) for value in x), right]
            ax.step(places, [*y, y[-1]], where="post", color="black", linewidth=1.4, zorder=4, label="best so far")
        ax.set_xlim(left, right)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("trial")
        ax.set_ylabel("validation score (%)")
        _name_lines(figure, ax, {baseline_label(entry): 100 * entry.value for entry in scored})
        figure.legend(loc="outside upper center", ncols=5, frameon=False, handletextpad=0.5, columnspacing=1.2)
        save(figure, path)


def _draw_trials(ax: Axes, search: Search) -> None:
    complete = [entry for entry in search.trials if entry.state == "complete"]
    ax.scatter(*_places(complete), s=20, color=_BLUE, linewidths=0, zorder=3, label="complete")
    stopped = [entry for entry in search.trials if entry.state == "stopped" and entry.score is not None]
    for rung in sorted({len(entry.rungs) for entry in stopped}):
        at = [entry for entry in stopped if len(entry.rungs) == rung]
        marker = _HOLLOW[(rung - 1) % len(_HOLLOW)]
        label = f"stopped at rung {rung} of {len(search.settings['rungs'])}"
        ax.scatter(
            *_places(at),
            s=20,
            marker=marker,
            facecolors="none",
            edgecolors=_ORANGE,
            linewidths=0.9,
            zorder=2,
            label=label,
        )
    failed = [entry.index for entry in search.trials if entry.state == "failed"]
    if failed:
        low = np.full(len(failed), 0.025)
        ax.scatter(failed, low, s=22, marker="x", color="black", transform=ax.get_xaxis_transform(), label="failed")


def _places(entries: Sequence[Entry]) -> tuple[list[int], list[float]]:
    scored = [(entry.index, 100 * entry.score) for entry in entries if entry.score is not None]
    return [number for number, _ in scored], [score for _, score in scored]


def best_so_far(search: Search) -> list[tuple[float, float]]:
    """Where the best complete score within the budget rises: trial (minus infinity: the baselines) and percent."""
    found: list[tuple[float, float]] = []
    for entry in [*search.baselines, *search.trials]:
        if entry.state == "complete" and entry.fits and (not found or 100 * entry.value > found[-1][1]):
            found.append((-math.inf if entry.kind == "baseline" else entry.index, 100 * entry.value))
    return [step for i, step in enumerate(found) if i + 1 == len(found) or found[i + 1][0] > step[0]]


def baseline_label(entry: Entry) -> str:
    """A baseline's name, and whether it is over the budget."""
    return entry.name if entry.fits else f"{short(entry.name, 16)} (over budget)"


# --- score and cost ---------------------------------------------------------------------------------------


def score_by_cost(search: Search, path: Path) -> None:
    """Score of complete entries against what the budget counts, with the Pareto front and the budget.

    Args:
        search: At least one of its entries is complete.
        path: PNG to write.
    """
    unit, axis_label = _axis_unit(search)
    shown = [entry for entry in search.entries if entry.state == "complete"]
    cost, score = np.array([e.cost / unit for e in shown]), np.array([100 * e.value for e in shown])
    trial = np.array([entry.kind != "baseline" for entry in shown])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 4.0))
        front = [(entry.cost / unit, 100 * entry.value) for entry in search.front]
        lines: list[Array] = []
        if front:
            x, y = zip(*front, strict=True)
            ax.step(x, y, where="post", color="black", linewidth=1.0, zorder=1, label="Pareto front")
            ax.scatter(x, y, s=52, facecolors="none", edgecolors="black", linewidths=0.9, zorder=3)
            lines.append(np.column_stack([np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]]))
        ax.scatter(cost[trial], score[trial], s=20, color=_BLUE, linewidths=0, zorder=2, label="trials")
        ax.scatter(
            cost[~trial], score[~trial], s=26, marker="D", color=_ORANGE, linewidths=0, zorder=2, label="baselines"
        )
        won = [i for i, entry in enumerate(shown) if entry.name == search.final["winner"]]
        if won:
            label = f"winner: {short(shown[won[0]].name, 24)}"
            look: Any = {"s": 150, "marker": "*", "color": _GREEN, "edgecolors": "black", "linewidths": 0.7}
            ax.scatter(cost[won], score[won], zorder=4, label=label, **look)
        budget = search.settings.get("budget")
        if budget is not None:
            ax.axvline(budget / unit, color="black", linewidth=0.9, linestyle="--", zorder=1, label="budget")
        ax.set_xlabel(axis_label)
        ax.set_ylabel("validation score (%)")
        _log_if_wide(ax, [*cost, *([] if budget is None else [budget / unit])])
        if budget is not None:
            lines.append(np.array([(budget / unit, y) for y in ax.get_ylim()]))
        figure.legend(loc="outside upper center", ncols=5, frameon=False, handletextpad=0.5, columnspacing=1.2)
        names = {i: short(e.name, 30) for i, e in enumerate(shown) if e.kind == "baseline"}
        _name_points(figure, ax, np.column_stack([cost, score]), names, lines)
        save(figure, path)


def _axis_unit(search: Search) -> tuple[float, str]:
    """What one step of the cost axis is, and the name of the axis."""
    measure, cost = search.settings["measure"], search.settings["full_cost"]
    steps = ((1e9, "billions", "GB"), (1e6, "millions", "MB"), (1e3, "thousands", "kB"))
    for unit, word, letters in steps:
        if cost >= 2 * unit:
            return unit, f"size ({letters})" if measure == "bytes" else f"{MEASURES[measure]} ({word})"
    return 1.0, MEASURES[measure]


def _log_if_wide(ax: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > 3 * min(values):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(NullLocator())


# --- names ------------------------------------------------------------------------------------------------


def _name_lines(figure: Figure, ax: Axes, heights: Mapping[str, float]) -> None:
    """Write names right of horizontal lines, moved apart where lines are close."""
    low, high = ax.get_ylim()
    gap = _LINE_HEIGHT / (figure.get_size_inches()[1] * 72 * 0.7) * (high - low)
    order = sorted(heights, key=lambda name: heights[name])
    for name, place in zip(order, apart([heights[name] for name in order], gap), strict=True):
        ax.annotate(
            name,
            (1, heights[name]),
            xycoords=("axes fraction", "data"),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _GREY,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in the same order, at least `gap` apart, that move as little as possible in squared distance.

    Args:
        wanted: Ascending.
        gap: Least distance.
    """
    blocks: list[list[float]] = []  # of neighbours that touch: what each would have as its first one's place
    for i, value in enumerate(wanted):
        blocks.append([value - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [float(np.mean(block)) for block in blocks for _ in block]
    return [level + i * gap for i, level in enumerate(levels)]


def _name_points(figure: Figure, ax: Axes, points: Array, names: Mapping[int, str], lines: Sequence[Array]) -> None:
    """Write the names of some of the points next to them, where they cover least.

    Args:
        figure: Where the axes are.
        ax: Final but for the names.
        points: (P, 2), places of all points; names keep off these.
        names: Index of a point -> its name.
        lines: (C, 2) each, corners of lines that names keep off.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame, to_points = ax.get_window_extent(), 72 / figure.dpi
    at = ax.transData.transform(points)
    markers = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in at]
    taken: list[BboxBase] = [*markers]
    taken += [_dot(*dot) for line in lines for dot in _along(ax.transData.transform(line))]
    written: list[BboxBase] = []
    for i, name in sorted(names.items(), key=lambda item: (-at[item[0], 1], item[1])):
        look: Any = {"arrowstyle": "-", "color": "#555555", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        place: Any = {"textcoords": "offset points", "va": "center", "ha": "center", "zorder": 6, "arrowprops": look}
        text = ax.annotate(name, tuple(points[i]), (0, 0), **place)
        size = Text.get_window_extent(text)  # without its line
        x, y = at[i] - (size.width / 2, size.height / 2)
        own = Bbox.from_bounds(x, y, size.width, size.height)
        shifts = [_shift(own, distance, angle) for distance in _DISTANCES for angle in range(0, 360, 30)]
        others = [marker for j, marker in enumerate(markers) if np.hypot(*(at[j] - at[i])) > 8]
        leaders = [[_dot(*dot) for dot in _along(np.array([at[i], at[i] + shift]))] for shift in shifts]
        cost = [
            _covered(own.translated(*shift), taken, frame)
            + 30 * own.translated(*shift).count_overlaps(written)
            + 3 * sum(dot.count_overlaps(written) > 0 for dot in leader)
            + sum(dot.count_overlaps(others) > 0 for dot in leader)
            + 0.004 * math.hypot(*shift)
            for shift, leader in zip(shifts, leaders, strict=True)
        ]
        best = int(np.argmin(cost))
        text.set_position((shifts[best][0] * to_points, shifts[best][1] * to_points))
        written.append(own.translated(*shifts[best]).padded(3))
        taken += [written[-1], *leaders[best]]


def _dot(x: float, y: float) -> Bbox:
    return Bbox.from_bounds(x - 2, y - 2, 4, 4)


def _along(corners: Array) -> Array:
    """Places on a line, a few pixels apart."""
    parts = [
        np.linspace(start, end, 1 + int(np.hypot(*(end - start)) / 4)) for start, end in itertools.pairwise(corners)
    ]
    return np.concatenate([corners[:1], *parts])


def _shift(box: BboxBase, distance: float, angle: float) -> tuple[float, float]:
    """How far a box centred on a point moves to stand beside it, in pixels."""
    x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return x * (distance + box.width / 2), y * (distance + box.height / 2)


def _covered(box: BboxBase, taken: Sequence[BboxBase], frame: BboxBase) -> float:
    """How many of the boxes it touches, and much more where it leaves the frame."""
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    return box.count_overlaps(taken) + 100 * outside


# --- ranks of the best ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RankLine:
    """One entry in the parallel coordinates."""

    entry: Entry
    levels: tuple[float, ...]
    """Per expert: -1 for drop, log2 of the rank, the top level for full."""
    winner: bool


def axes_of(search: Search) -> list[str]:
    """The names of the parallel axes: the experts, and the number of active experts where it was searched."""
    return [*search.experts, *([parameter_name(ACTIVE)] if len(search.settings["actives"]) > 1 else [])]


def lines_of(entries: Sequence[Entry], search: Search) -> tuple[list[RankLine], list[str]]:
    """The entries whose ranks are levels, as lines, and the names of the others.

    At granularity "expert" the ranks themselves are drawn; at the finer ones the levels that the sampler chose,
    which baselines do not have.
    """
    lines, hidden = [], []
    for entry in entries:
        levels = _levels(entry, search)
        if levels is None:
            hidden.append(entry.name)
        else:
            lines.append(RankLine(entry, levels, entry.name == search.final["winner"]))
    return lines, hidden


def _levels(entry: Entry, search: Search) -> tuple[float, ...] | None:
    if search.settings["granularity"] != "expert":
        point = {parameter_name(name): float(value) for name, value in (entry.point or {}).items()}
        return tuple(point[name] for name in search.experts) if point else None
    ranks = [entry.ranks.get(name, FULL) for name in search.experts]
    if not all(isinstance(rank, int | str) for rank in ranks):
        return None
    return tuple(_place(rank, search.top) for rank in ranks)


def _place(rank: int | str, top: int) -> float:
    """Where a rank stands on its axis; one above the highest level below full stands just below full."""
    return -1.0 if rank == DROP else float(top) if rank == FULL else min(math.log2(int(rank)), top - 0.25)


def parallel_ranks(lines: Sequence[RankLine], search: Search, path: Path) -> None:
    """Ranks of the best entries as parallel coordinates, one axis per expert.

    Args:
        lines: At least one, the best first.
        search: Gives the levels, and whether the number of active experts was searched.
        path: PNG to write.
    """
    names, actives, top = axes_of(search), search.settings["actives"], search.top
    scores = [100 * line.entry.value for line in lines]
    margin = 0.0 if max(scores) > min(scores) else 0.5
    norm = Normalize(min(scores) - margin, max(scores) + margin)
    colours = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.08, 1, 256)))
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, ax = plt.subplots(figsize=(WIDTH, 3.7))
        for i, line in reversed(list(enumerate(lines))):
            shift = _APART * (0.5 - (i + 0.5) / len(lines))
            y = [level + shift for level in line.levels]
            if len(actives) > 1:
                y.append(_active_place(line.entry.active, actives, top) + shift)
            colour = colours(norm(scores[i]))
            if line.winner:
                ax.plot(range(len(y)), y, color="black", linewidth=4.4, zorder=4)
                look: Any = _BOLD | {"markersize": 6 if len(names) <= _MOST_UPRIGHT else 4}
            else:
                look = _THIN
            ax.plot(range(len(y)), y, color=colour, label=line.entry.name, **look)
        _draw_axes(ax, names, search)
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=ax, pad=0.02, fraction=0.04, aspect=30)
        bar.set_label("validation score (%)")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(6))
        save(figure, path)


_THIN: Any = {"linewidth": 1.2, "zorder": 2, "marker": "o", "markersize": 3}
_BOLD: Any = {
    "linewidth": 2.8,
    "zorder": 4,
    "marker": "o",
    "markerfacecolor": "white",
    "markeredgewidth": 1.2,
    "markeredgecolor": "black",
}


def _active_place(active: int, actives: Sequence[int], top: int) -> float:
    """The lowest number of active experts stands level with drop, the highest with full."""
    return -1 + (active - actives[0]) / (actives[-1] - actives[0]) * (top + 1)


def _draw_axes(ax: Axes, names: Sequence[str], search: Search) -> None:
    actives, top = search.settings["actives"], search.top
    for position in range(len(names)):
        ax.axvline(position, color="#c4c4c4", linewidth=0.8, zorder=1)
    ax.hlines(range(-1, top + 1), 0, len(search.experts) - 1, color="#ebebeb", linewidth=0.6, zorder=0)
    ax.set_yticks(range(-1, top + 1), [str(level) for level in search.settings["levels"]])
    ax.set_ylabel("rank")
    ax.set_ylim(-1.45, top + 0.45)
    ax.set_xlim(-0.15, len(names) - 0.85)
    longest = 18 if len(names) <= _MOST_UPRIGHT else 22
    tight = sum(len(_elided(name, longest)) + 2 for name in names) > _MOST_LETTERS
    turned: Any = {"rotation": 30 if len(names) <= 12 else 90, "ha": "right" if len(names) <= 12 else "center"}
    ax.set_xticks(range(len(names)), [_elided(name, longest) for name in names], **(turned if tight else {}))
    ax.tick_params(axis="x", length=0)
    ax.spines[:].set_visible(False)
    if len(actives) > 1:
        right = ax.secondary_yaxis("right")
        right.set_yticks([_active_place(active, actives, top) for active in actives], [str(a) for a in actives])
        right.spines[:].set_visible(False)


def _elided(name: str, length: int) -> str:
    """A name cut in the middle, so that names that differ at their ends stay apart."""
    half = length // 2
    return short(name if len(name) <= length else f"{name[:half]}…{name[1 - length + half :]}", length)


# --- importance -------------------------------------------------------------------------------------------


def importances(found: Sequence[Importance], path: Path) -> None:
    """Share of the variation in score that each parameter explains by itself, with whiskers.

    Args:
        found: At least one, the most important first.
        path: PNG to write.
    """
    values = 100 * np.array([importance.value for importance in found])
    spread = 100 * np.array([[i.value - i.low for i in found], [i.high - i.value for i in found]])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 0.7 + 0.22 * max(3, len(found))))
        style = {"ecolor": "black", "elinewidth": 0.9, "capsize": 2.5}
        ax.barh(range(len(found)), values, height=0.62, color=_BLUE, xerr=spread, error_kw=style)
        ax.set_yticks(range(len(found)), [_elided(importance.name, 30) for importance in found])
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.set_xlim(0, 1.04 * max(100 * importance.high for importance in found))
        ax.set_xlabel("share of the explained variation in validation score (%)")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        save(figure, path)
