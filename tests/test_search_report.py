"""The report of a search, from synthetic files whose answers are known."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexmore_ray.errors import FlexmoreError, UsageError
from search import figures
from search.ledger import TRIAL_SCHEMA, front
from search.outcome import Entry, describe_ranks
from search.report import write_report

EXPERTS = ("math", "news", "code", "reddit", "academic", "creative")
LEVELS = ["drop", 1, 2, 4, 8, 16, 32, "full"]
TOP = len(LEVELS) - 2
GROUPS = [
    {"name": "sums", "tasks": ["add"], "kind": "reasoning", "domain": "math"},
    {"name": "towns", "tasks": ["mayors"], "kind": "knowledge", "domain": "news"},
]
PUBLIC, FULL_EXPERT, PER_RANK = 880_000, 590_000, 9_000
RUNGS = (12, 34, 100)


# --- synthetic searches -----------------------------------------------------------------------------------


def size(levels):
    return PUBLIC + sum(
        0 if level < 0 else FULL_EXPERT if level == TOP else PER_RANK * 2**level for level in levels.values()
    )


def quality(levels):
    """A score that saturates in every level; the first experts matter most."""
    weights = np.geomspace(20, 1, len(levels)) / np.geomspace(20, 1, len(levels)).sum() * 0.25
    return 0.35 + sum(w * (1 - 2.0 ** (-(level + 1) / 2)) for w, level in zip(weights, levels.values(), strict=True))


def entry(number, name, levels, *, budget, kind="trial", state="complete", rungs=3, noise=0.0, active=4, **more):
    score = quality(levels) + noise
    steps = [score + shift for shift in (0.03, -0.01, 0.0)][:rungs]
    if state == "complete":
        steps = [*steps[:-1], score]
    ranks = {name: LEVELS[level + 1] for name, level in levels.items()}
    point = {f"log2_rank.{name}": level for name, level in levels.items()}
    fields = {
        "number": number, "name": name, "kind": kind, "state": state, "rungs": steps, "cost": size(levels),
        "parameters": size(levels), "fits": size(levels) <= budget, "ranks": ranks, "active": active,
        "mixture_id": json.dumps([ranks, active]), "point": point if kind == "trial" else None,
        "groups": {"sums": score, "towns": score}, "documents": 10, "seconds": 1.0, "started": 0.0, "finished": 1.0,
        "error": "out of memory" if state == "failed" else None,
    }  # fmt: skip
    return Entry(**fields | more)


def baselines(experts, budget, **more):
    """One assignment for each baseline, that of optimal by projection."""
    step = max((level for level in range(-1, TOP) if size(dict.fromkeys(experts, level)) <= budget), default=-1)
    uniform = dict.fromkeys(experts, step)
    known = {
        "full": dict.fromkeys(experts, TOP),
        "public": dict.fromkeys(experts, -1),
        "uniform": uniform,
        "energy": uniform | {experts[0]: max(step - 1, -1)},
        "entropy": uniform | {experts[-1]: -1},
        "optimal": uniform | {experts[-1]: max(step - 1, -1)},
    }
    made = [
        entry(i, name, levels, budget=budget, kind="baseline", noise=0.001 * i, **more)
        for i, (name, levels) in enumerate(known.items())
    ]
    refined = {"gate_proj": [4, 8], "up_proj": 16, "down_proj": "full"}
    made[-1].ranks = dict(made[-1].ranks) | {experts[0]: refined}
    return made


def searched(experts, budget, number, *, actives=(4,), seed=0):
    """Trials as a search makes them: random, then around the best; a third stopped at rung 1 or 2, one failed."""
    rng = np.random.default_rng(seed)
    trials, best = [], None
    while len(trials) < number:
        levels = {name: int(rng.integers(-1, TOP + 1)) for name in experts}
        if best is not None and rng.random() < 0.7:
            levels = {name: int(np.clip(best[name] + rng.integers(-1, 2), -1, TOP)) for name in experts}
        if size(levels) > budget:
            continue
        place = len(trials)
        stopped = best is not None and quality(levels) < quality(best) - 0.02
        what = {"state": "stopped", "rungs": 1 + place % 2} if stopped else {}
        what = {"state": "failed", "rungs": 0} if place == number // 2 and number > 5 else what
        active = int(rng.choice(actives))
        noise = float(rng.normal(0, 0.006))
        trials.append(entry(6 + place, f"trial-{6 + place}", levels, budget=budget, noise=noise, active=active, **what))
        if len(actives) > 1:
            trials[-1].point = dict(trials[-1].point or {}) | {"active": active}
        if not what and (best is None or quality(levels) > quality(best)):
            best = levels
    return trials


def estimate(value):
    return {"value": value, "low": value - 0.013, "high": value + 0.013}


def difference(value):
    verdict = "better" if value > 0.013 else "worse" if value < -0.013 else "equal within noise"
    return estimate(value) | {"verdict": verdict}


def final(entries, experts):
    fitting = sorted((e for e in entries if e.state == "complete" and e.fits), key=lambda e: -e.value)
    finalists = fitting[:3]
    winner = finalists[0] if finalists else None
    shown = [e for e in entries if (e in finalists or e.kind == "baseline") and e.state == "complete"]
    rows = []
    for e in shown:
        test = e.value - 0.008
        row = {name: getattr(e, name) for name in ("name", "kind", "warm", "fits", "cost", "parameters", "active")}
        row |= {"ranks": dict(e.ranks), "finalist": e in finalists, "validation": e.value}
        row |= {"groups_validation": dict(e.groups), "test": estimate(test)}
        row |= {"groups": {group["name"]: estimate(test) for group in GROUPS}}
        if winner is not None and e is not winner:
            row["difference"] = difference(winner.value - e.value)
        rows.append(row)
    return {
        "winner": winner and winner.name,
        "entries": rows,
        "gain": estimate(0.94) if winner else None,
        "verdict": f"{winner.name} is equal to the full mixture within noise." if winner else "No entry could win.",
        "documents": {"trials": 1234, "baselines": 600, "test": 1800, "per_full_trial": 100},
        "stopped": sum(e.state == "stopped" for e in entries),
        "failed": sum(e.state == "failed" for e in entries),
        "seconds": 345.6,
    }


def write_tables(out, entries):
    for name, rows in (("trials", entries), ("front", front(entries))):
        pq.write_table(pa.Table.from_pylist([e.row() for e in rows], schema=TRIAL_SCHEMA), out / f"{name}.parquet")


def write_search(out, *, experts=EXPERTS, budget=2_200_000, trials=40, entries=None, actives=(4,), **settings):
    """The files of a search in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    if entries is None:
        entries = [*baselines(experts, budget), *searched(experts, budget, trials, actives=actives)]
    full = size(dict.fromkeys(experts, TOP))
    identity = {
        "format": "flexmore-search-1", "source": ["zoo://nano"], "experts": ["public", *experts], "weights": "w1",
        "tasks": ["nano"], "budget": budget, "measure": "parameters", "full_cost": full, "public_cost": PUBLIC,
        "full_parameters": full, "granularity": "expert", "levels": LEVELS, "actives": list(actives),
        "objective": "score", "sampler": "tpe", "seed": 0, "limit": None, "rungs": list(RUNGS), "groups": GROUPS,
    } | settings  # fmt: skip
    (out / "search.json").write_text(json.dumps(identity))
    (out / "final.json").write_text(json.dumps(final(entries, experts)))
    write_tables(out, entries)
    return entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A realistic search: 6 experts, 8 levels, 40 trials; its folder, what was returned, its entries."""
    out = tmp_path_factory.mktemp("search")
    entries = write_search(out)
    return out, write_report(out), entries


@pytest.fixture
def drawn(monkeypatch):
    """File name -> the figure as it was when it was saved."""
    found, save = {}, figures.save

    def keep(figure, path):
        found[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    return found


def text_of(out):
    return (out / "report.md").read_text()


def section(text, heading):
    return text.split(f" {heading}\n")[1].split("\n#")[0]


def line_of(figure, label):
    return next(line for line in figure.axes[0].get_lines() if line.get_label() == label)


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


# --- the words --------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_and_names_every_baseline(whole):
    out, _, entries = whole
    first = text_of(out).split("\n## ")[0]
    assert first.index("**Verdict.**") < 60
    for e in entries[1:6]:
        said = rf"^- (better than|worse than|equal to) {e.name}\b.*: \S+ \(\S+\d\.\d to \S+\d\.\d\)$"
        assert re.search(said, first, re.M), e.name
    assert "- equal to full within noise (1.000x, over the budget): " in first
    assert "keeps 94 %" in first


def test_the_table_has_the_numbers_of_the_files(whole):
    out, _, entries = whole
    found = json.loads((out / "final.json").read_text())
    rows = [line.split(" | ") for line in section(text_of(out), "Winner, finalists and baselines").splitlines()]
    rows = {row[0].removeprefix("| "): row for row in rows if len(row) > 5}
    order = sorted(found["entries"], key=lambda e: 0 if e["kind"] == "baseline" else -e["validation"])
    assert list(rows)[2:] == [e["name"] for e in order]
    by_name = {e.name: e for e in entries}
    for e in found["entries"]:
        row = rows[e["name"]]
        assert row[4] == f"{e['cost'] / by_name['full'].cost:.3f}x"
        assert row[5] == f"{100 * by_name[e['name']].score:.1f}"
        assert row[6] == "{value:.1f} ({low:.1f} to {high:.1f})".format(**{k: 100 * v for k, v in e["test"].items()})
        assert row[1].startswith("winner") == (e["name"] == found["winner"])
        assert ("over budget" in row[1]) == (e["name"] == "full")
    assert rows["public"][2] == "all drop"
    assert rows["optimal"][2].startswith("math 4 to full, news ")


def test_a_warm_start_is_said_to_be_one(tmp_path):
    entries = [*baselines(EXPERTS, 2_200_000), *searched(EXPERTS, 2_200_000, 40)]
    best = max((e for e in entries if e.state == "complete" and e.fits and e.point), key=lambda e: e.value)
    best.warm = "optimal"
    write_search(tmp_path, entries=entries)
    write_report(tmp_path)
    text = text_of(tmp_path)
    assert re.search(rf"\| {best.name} \| (winner|finalist), warm start from optimal \|", text)
    assert f"| {best.name} (warm start) |" in section(text, "The best ranks")
    assert text.count("warm start from") == 1


def test_it_says_what_was_spent_and_where_the_files_are(whole):
    out, _, entries = whole
    text = text_of(out)
    states = [e.state for e in entries[6:]]
    assert f"40 trials: {states.count('complete')} on all documents, {states.count('stopped')} stopped early" in text
    assert "1,234 documents evaluated in trials, as many as 12.3 trials without early stopping" in text
    assert "| trial-26 | out of memory |" in text
    for name in ("winner.yaml --tasks nano", "flexmore export winner.yaml", "optuna-dashboard journal.log"):
        assert name in text
    for name in ("full", "public", "uniform", "energy", "entropy", "optimal"):
        assert f"{name}: " in section(text, "How the numbers were made")


def test_no_missing_number_is_written_as_one(whole, tmp_path):
    write_search(tmp_path)
    data = json.loads((tmp_path / "final.json").read_text())
    data["gain"] = {"value": math.nan, "low": None, "high": math.nan}
    for e in data["entries"]:
        e["test"] = {"value": None, "low": None, "high": None}
        e["groups"] = {"sums": None, "towns": {"value": math.nan, "low": math.nan, "high": math.nan}}
        e["difference"] = {"value": math.nan, "low": math.nan, "high": math.nan, "verdict": "not known"}
    (tmp_path / "final.json").write_text(json.dumps(data))
    write_report(tmp_path)
    for out in (whole[0], tmp_path):
        for name in ("report.md", "report.html"):
            words = re.sub(r"base64,[^\"]+|<style>.*</style>", "", (out / name).read_text(), flags=re.DOTALL)
            assert not re.search(r"\b(nan|none|null|inf)\b", words, re.I)
    assert "not compared with full" in text_of(tmp_path)
    assert "gain over" not in text_of(tmp_path)


def test_equal_files_give_equal_reports(whole, tmp_path):
    _, found, _ = whole
    write_search(tmp_path)
    write_report(tmp_path)
    for name in [*found["figures"], found["report"], found["html"]]:
        assert Path(name).read_bytes() == (tmp_path / Path(name).name).read_bytes(), name


def test_descriptions_of_ranks():
    experts = ["a", "b", "c"]
    assert describe_ranks({"a": 4, "b": "drop"}, experts) == "a 4, b drop, c full"
    assert describe_ranks(dict.fromkeys(experts, 8), experts) == "all 8"
    assert describe_ranks({"a": {"gate_proj": [2, 16], "up_proj": 4}}, ["a"]) == "a 2 to 16"
    many = [f"e{i}" for i in range(30)]
    ranks = {name: [64, "drop", 8][i % 3] for i, name in enumerate(many)}
    assert describe_ranks(ranks, many) == "10 * drop, 10 * 8, 10 * 64".replace("*", "\N{MULTIPLICATION SIGN}")
    assert describe_ranks({}, []) == "-"


# --- the page ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags of a page, checked to be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_shows_names_as_they_are(tmp_path, drawn):
    strange = "<b>$x_1$|&"
    entries = write_search(tmp_path)
    entries[2].name = strange
    entries[20].error = "<script>alert(1)</script>"
    entries[20].state, entries[20].rungs = "failed", []
    write_search(tmp_path, entries=entries)
    found = write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://|@import|<script|<link|<b>", text)
    assert strange in page.text
    assert "<script>alert(1)</script>" in page.text
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    for source, path in zip(images, found["figures"], strict=True):
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == Path(path).read_bytes()
    assert r"<b>\$x_1\$|&" in texts_of(drawn["cost.png"])


# --- the figures ------------------------------------------------------------------------------------------


def test_figures_are_small_pngs_with_something_on_them(whole):
    _, found, _ = whole
    assert [Path(name).name for name in found["figures"]] == ["history.png", "cost.png", "ranks.png"]
    for path in map(Path, found["figures"]):
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == 1062
        assert path.stat().st_size < 200_000
        assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9, path


# --- unusual searches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_no_trial_complete(tmp_path, state):
    entries = [*baselines(EXPERTS, 2_200_000), *searched(EXPERTS, 2_200_000, 4)]
    for e in entries[6:]:
        e.state, e.rungs, e.error = state, [] if state == "failed" else [0.4], "metric is not a number"
    write_search(tmp_path, entries=entries)
    found = [Path(name).name for name in write_report(tmp_path)["figures"]]
    assert found == [*(["history.png"] if state == "stopped" else []), "cost.png", "ranks.png"]
    assert "0 complete trials" in text_of(tmp_path)


def test_nothing_complete(tmp_path):
    entries = searched(EXPERTS, 2_200_000, 3)
    for e in entries:
        e.state, e.rungs, e.error = "failed", [], "no data"
    write_search(tmp_path, entries=entries)
    assert write_report(tmp_path)["figures"] == []
    text = text_of(tmp_path)
    assert "No entry could win." in text
    assert "flexmore eval winner.yaml" not in text


def test_one_trial_and_one_expert(tmp_path):
    write_search(tmp_path, experts=("math",), budget=1_000_000, trials=1)
    found = [Path(name).name for name in write_report(tmp_path)["figures"]]
    assert found == ["history.png", "cost.png"]
    assert "With one parameter searched" in text_of(tmp_path)


def test_one_expert_and_active_is_drawn(tmp_path):
    write_search(tmp_path, experts=("math",), budget=1_000_000, trials=5, actives=(1, 2))
    assert "ranks.png" in [Path(name).name for name in write_report(tmp_path)["figures"]]


@pytest.mark.parametrize(
    ("measure", "words", "unit"), [("bytes", "bytes", "2.20 MB"), ("active", "active parameters", "2.20M")]
)
def test_measures_and_fronts(tmp_path, measure, words, unit):
    entries = write_search(tmp_path, measure=measure, objective="front", actives=(1, 2, 3))
    write_report(tmp_path)
    text = text_of(tmp_path)
    assert f"Budget: {unit} ({words})" in text
    table = section(text, "The front of score and size")
    assert [line.split(" ")[1] for line in table.splitlines() if line.startswith("| ")][2:] == [
        e.name for e in sorted(front(entries), key=lambda e: e.cost)
    ]


def test_many_experts_with_long_names_and_baselines_of_the_user(tmp_path, drawn):
    experts = tuple(f"expert-{'with-a-long-name-' * 3}{i}" for i in range(30))
    budget = 9_000_000
    entries = [*baselines(experts, budget), *searched(experts, budget, 30)]
    own = entry(
        99, "the-mixture-that-i-made-by-hand-last-year", dict.fromkeys(experts, 3), budget=budget, kind="baseline"
    )
    write_search(tmp_path, experts=experts, budget=budget, entries=[*entries[:6], own, *entries[6:]])
    write_report(tmp_path)
    assert "given by the user: the-mixture-that-i-made-by-hand-last-year" in text_of(tmp_path)
    assert any(text.startswith("the-mixture-that") for text in texts_of(drawn["history.png"]))
    labels = [label.get_text() for label in drawn["ranks.png"].axes[0].get_xticklabels()]
    assert len(set(labels)) == 30


# --- bad input --------------------------------------------------------------------------------------------


def test_a_folder_without_a_search_and_one_that_goes_on(tmp_path):
    with pytest.raises(UsageError, match="no search in"):
        write_report(tmp_path)
    write_search(tmp_path)
    (tmp_path / "final.json").unlink()
    with pytest.raises(UsageError, match=r"has not ended: it has no final\.json; start the same search again"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("search.json", b"{"), ("final.json", b"{}"), ("trials.parquet", b"PAR"), ("front.parquet", None)],
)
def test_damaged_files_are_named(tmp_path, name, content):
    write_search(tmp_path)
    if content is None:
        pq.write_table(pa.table({"number": [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexmoreError, match=re.escape(name)):
        write_report(tmp_path)
