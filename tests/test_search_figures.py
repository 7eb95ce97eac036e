"""The figures of a search and the importance of ranks, from the synthetic searches of `test_search_report`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.text import Text

from search import figures
from search.outcome import rank_importance, read_search
from search.report import write_report
from tests.test_search_report import (
    EXPERTS,
    LEVELS,
    TOP,
    baselines,
    drawn,
    entry,
    line_of,
    searched,
    size,
    text_of,
    texts_of,
    write_search,
)  # fmt: skip

__all__ = ["drawn"]


def test_history_draws_every_entry_and_a_best_that_only_rises(tmp_path, drawn):
    entries = write_search(tmp_path)
    write_report(tmp_path)
    figure = drawn["history.png"]
    best = line_of(figure, "best so far").get_ydata()
    assert (np.diff(best) >= 0).all()
    fitting = [e.score for e in entries if e.state == "complete" and e.fits]
    assert best[-1] == pytest.approx(100 * max(fitting))
    assert best[0] == pytest.approx(100 * max(e.score for e in entries if e.kind == "baseline" and e.fits))
    shown = {c.get_label(): c.get_offsets() for c in figure.axes[0].collections}
    for label, state, rungs in (
        ("complete", "complete", 3), ("stopped at rung 1 of 3", "stopped", 1), ("stopped at rung 2 of 3", "stopped", 2)
    ):  # fmt: skip
        wanted = [(e.index, 100 * e.score) for e in entries[6:] if (e.state, len(e.rungs)) == (state, rungs)]
        np.testing.assert_allclose(shown[label], wanted)
    assert [x for x, _ in shown["failed"]] == [26]
    names = ["full (over budget)", "public", "uniform", "energy", "entropy", "optimal"]
    assert sorted(texts_of(figure)) == sorted(names)


def test_the_front_that_is_drawn_is_that_of_the_file(tmp_path, drawn):
    entries = write_search(tmp_path)
    write_report(tmp_path)
    figure = drawn["cost.png"]
    line = line_of(figure, "Pareto front")
    rows = pq.read_table(tmp_path / "front.parquet").sort_by("cost").to_pylist()
    assert len(rows) > 3
    np.testing.assert_allclose(line.get_xdata(), [row["cost"] / 1e6 for row in rows])
    np.testing.assert_allclose(line.get_ydata(), [100 * row["score"] for row in rows])
    assert line.get_drawstyle() == "steps-post"
    assert sorted(texts_of(figure)) == sorted(e.name for e in entries[:6])
    np.testing.assert_allclose(line_of(figure, "budget").get_xdata(), 2.2)
    winner = next(e for e in entries if e.name == json.loads((tmp_path / "final.json").read_text())["winner"])
    (star,) = [c for c in figure.axes[0].collections if str(c.get_label()).startswith("winner")]
    np.testing.assert_allclose(star.get_offsets(), [(winner.cost / 1e6, 100 * winner.score)])


def test_names_do_not_lie_on_each_other(tmp_path, drawn):
    for experts, trials in ((EXPERTS, 40), (tuple(f"expert-with-a-long-name-{i}" for i in range(30)), 60)):
        write_search(tmp_path, experts=experts, trials=trials, budget=size(dict.fromkeys(experts, 4)) + 400_000)
        write_report(tmp_path)
        for name in ("history.png", "cost.png", "ranks.png"):
            figure = drawn[name]
            figure.canvas.draw()
            ax = figure.axes[0]
            ticks = [tick for tick in ax.get_xticklabels() if tick.get_text()]
            for texts in (ax.texts, ticks, figure.legends[0].get_texts() if figure.legends else []):
                boxes = [Text.get_window_extent(text) for text in texts]  # without the line to the point
                assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), (name, len(experts))


@pytest.mark.parametrize("wanted", [[1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.1, 5.2, 9.0], [0.0, 0.9, 1.8]])
def test_apart_keeps_the_order_the_gap_and_the_middle(wanted):
    found = figures.apart(wanted, 1.0)
    assert (np.diff(found) >= 1 - 1e-9).all()
    assert np.mean(found) == pytest.approx(np.mean(wanted))
    assert found[0] <= wanted[0] + 1e-9
    if min(np.diff(wanted), default=1.0) >= 1:
        assert found == wanted


def test_parallel_coordinates_show_the_ranks_and_the_winner_bold(tmp_path, drawn):
    entries = write_search(tmp_path)
    write_report(tmp_path)
    lines = {line.get_label(): line for line in drawn["ranks.png"].axes[0].get_lines()}
    winner = json.loads((tmp_path / "final.json").read_text())["winner"]
    best = read_search(tmp_path).best(10)
    assert "optimal" in [e.name for e in best]  # its ranks differ by projection
    assert "optimal" not in lines
    assert "Not drawn, because their ranks are not levels of the search: optimal." in text_of(tmp_path)
    by_name = {e.name: e for e in entries}
    for e in best:
        if e.name != "optimal":
            levels = [LEVELS.index(rank) - 1 for rank in by_name[e.name].ranks.values()]
            assert np.abs(lines[e.name].get_ydata() - levels).max() <= 0.2
            assert (lines[e.name].get_linewidth() > 2) == (e.name == winner)


def test_finer_granularity_draws_the_levels_of_the_points(tmp_path, drawn):
    entries = [*baselines(EXPERTS, 2_200_000), *searched(EXPERTS, 2_200_000, 30, actives=(2, 3, 4))]
    for e in entries:
        e.ranks = {
            name: r if r in ("drop", "full") else {"gate_proj": r, "down_proj": 1} for name, r in e.ranks.items()
        }
    write_search(tmp_path, entries=entries, granularity="projection", actives=(2, 3, 4))
    write_report(tmp_path)
    figure = drawn["ranks.png"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    some = next(e for e in read_search(tmp_path).best(10) if e.kind == "trial")
    assert (
        np.abs(lines[some.name].get_ydata()[:-1] - [some.point[f"log2_rank.{name}"] for name in EXPERTS]).max() <= 0.2
    )
    assert lines[some.name].get_ydata()[-1] == pytest.approx(-1 + (some.active - 2) / 2 * (TOP + 1), abs=0.2)
    assert not {"uniform", "energy"} & set(lines)
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "active experts"
    assert "one level per expert" in text_of(tmp_path)


# --- importance -------------------------------------------------------------------------------------------


def independent(number, seed=0):
    """Complete trials at random levels, budget or not, without noise."""
    rng = np.random.default_rng(seed)
    return [
        entry(6 + i, f"trial-{6 + i}", {name: int(rng.integers(-1, TOP + 1)) for name in EXPERTS}, budget=10**9)
        for i in range(number)
    ]


def test_importance_finds_what_matters(tmp_path, drawn):
    entries = [*baselines(EXPERTS, 10**9), *independent(60)]
    write_search(tmp_path, entries=entries, budget=10**9)
    found = rank_importance(read_search(tmp_path))
    assert [importance.name for importance in found[:2]] == ["math", "news"]
    assert sum(importance.value for importance in found) == pytest.approx(1)
    assert all(importance.low <= importance.value <= importance.high for importance in found)
    assert Path(write_report(tmp_path)["figures"][-1]).name == "importance.png"
    widths = [bar.get_width() for bar in drawn["importance.png"].axes[0].patches]
    np.testing.assert_allclose(widths, [100 * importance.value for importance in found])


def test_importance_of_few_or_equal_trials_is_not_drawn(tmp_path):
    entries = [*baselines(EXPERTS, 10**9), *independent(29)]
    write_search(tmp_path, entries=entries, budget=10**9)
    assert len(write_report(tmp_path)["figures"]) == 3
    assert "Not estimated: 29 complete trials, at least 30 are needed." in text_of(tmp_path)
    entries = [*baselines(EXPERTS, 10**9), *independent(40)]
    for e in entries[6:]:
        e.rungs = [0.5, 0.5, 0.5]
    write_search(tmp_path, entries=entries, budget=10**9)
    assert len(write_report(tmp_path)["figures"]) == 3
    assert "all complete trials have the same score" in text_of(tmp_path)
