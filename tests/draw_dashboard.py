"""Draw panels of our Grafana dashboard from what Prometheus has: the dashboard's own queries, without Grafana.

python -m tests.draw_dashboard http://127.0.0.1:9090 dashboard.png --minutes 15 --panels 2 8 9 17 30
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, date2num
from matplotlib.ticker import FuncFormatter

BOARD = Path(__file__).parent.parent / "cluster" / "monitoring" / "grafana-dashboard.json"
VALUES = {"session": ".+", "grid": ".*", "search": ".*", "application": ".*", "cpu_price": "0", "gpu_price": "0"}
COLUMNS = 3
POINTS = 240


def series(url: str, query: str, start: float, end: float) -> list[dict[str, Any]]:
    """What a query gives between two times."""
    asked = re.sub(r"\$(\w+)", lambda match: VALUES[match[1]], query)
    parameters = {"query": asked, "start": start, "end": end, "step": (end - start) / POINTS}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with its labels filled in."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def formatted(unit: str) -> FuncFormatter:
    """Numbers in a Grafana unit."""

    def text(value: float, _: object = None) -> str:
        if unit == "percentunit":
            return f"{100 * value:.3g} %"
        if unit == "bytes":
            power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
            return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
        return f"{value:.4g}" + {"s": " s", "percent": " %", "h": " h", "reqps": "/s"}.get(unit, "")

    return FuncFormatter(text)


def draw(axes: Axes, panel: Mapping[str, Any], url: str, start: float, end: float) -> None:
    """One panel."""
    axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    defaults = panel["fieldConfig"]["defaults"]
    lines = [
        (named(target["legendFormat"], found["metric"]), [(float(at), float(value)) for at, value in found["values"]])
        for target in panel["targets"]
        for found in series(url, target["expr"], start, end)
    ]
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    if stacked:
        times = sorted({at for _, points in lines for at, _ in points})
        rows = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
        axes.stackplot(list(map(day, times)), rows, labels=[name for name, _ in lines], alpha=0.7)
    for name, points in () if stacked else lines:
        whole = unbroken(points, 3 * (end - start) / POINTS)
        axes.plot([day(at) for at, _ in whole], [value for _, value in whole], label=name, linewidth=1.2)
    axes.set_xlim(day(start), day(end))
    axes.set_ylim(bottom=defaults.get("min"))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axes.yaxis.set_major_formatter(formatted(defaults["unit"]))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if 0 < len(lines) <= 12:
        axes.legend(fontsize=6, ncols=2, loc="upper left", framealpha=0.6)


def unbroken(points: Sequence[tuple[float, float]], longest: float) -> list[tuple[float, float]]:
    """Points with a hole where there is none for so many seconds."""
    found = list(points[:1])
    for (before, _), point in itertools.pairwise(points):
        found += [(before, math.nan), point] if point[0] - before > longest else [point]
    return found


def day(seconds: float) -> float:
    """Unix time as Matplotlib counts it."""
    return float(date2num(0)) + seconds / 86400


def main(argv: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description="Panels of the dashboard from what Prometheus has.")
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("out", help="the picture")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--until", type=float, help="Unix time (default: now)")
    parser.add_argument("--panels", type=int, nargs="+", required=True, help="their ids")
    args = parser.parse_args(argv)
    panels = {panel["id"]: panel for panel in json.loads(BOARD.read_text())["panels"]}
    end = args.until or time.time()
    rows = -(-len(args.panels) // COLUMNS)
    figure, places = plt.subplots(rows, COLUMNS, figsize=(4.6 * COLUMNS, 2.5 * rows), squeeze=False)
    for axes, number in zip(places.flat, args.panels, strict=False):
        draw(axes, panels[number], args.url, end - 60 * args.minutes, end)
    for axes in places.flat[len(args.panels) :]:
        axes.set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
