"""Reports of small results folders whose answers are known: planted best ranks, gaps, mixed settings, bad input."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy.stats import norm

from flexmore_ray import results as results_module
from flexmore_ray.build import build_store
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.report import write_report
from flexmore_ray.report.analysis import compare_kinds, compare_methods, fit_quadratic, own_curve, resample
from flexmore_ray.report.sections import read_sections
from flexmore_ray.results import CellKey, commit_cell
from flexmore_ray.scores import Sample, TaskScore
from flexmore_ray.source import open_source
from tests.common import random_model, write

EXPERTS = ("public", "math", "news")
RANKS = (1, 2, 4, 8, 16, 32, "full")
FULL_RANK = 64
GROUPS = [
    {"name": "sums", "tasks": ["add", "multiply"], "kind": "reasoning", "domain": "math"},
    {"name": "towns", "tasks": ["mayors"], "kind": "knowledge", "domain": "news"},
]
BEST = {"add": 4.5, "multiply": 4.5, "mayors": 2.0}
"""log2 of the best rank that is planted in each task's own expert."""
DOCUMENTS = 120


@pytest.fixture(autouse=True, scope="module")
def _no_fsync():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_module.os, "fsync", lambda _: None)
        yield


def mixture(name, ranks, active, **more):
    ranks = {"math": "drop", "news": "drop"} | ranks
    size = sum(
        {"full": 400, "drop": 0}.get(str(rank), 5 * rank if isinstance(rank, int) else 99) for rank in ranks.values()
    )
    text = json.dumps([ranks, active])
    known = {"mixture_id": f"id{sum(map(ord, text))}-{len(text)}-{hash_of(text)}", "full_parameters": 1800}
    return {"name": name, "ranks": ranks, "active": active, "parameters": 1000 + size} | known | more


def hash_of(text):
    return int.from_bytes(text.encode()) % 99_991


def paper_like():
    """Two-expert mixtures at all ranks, mixtures of all experts at two of them, a heterogeneous one."""
    word = {rank: "full" if rank == "full" else f"r{rank}" for rank in RANKS}
    pairs = [mixture(f"pair-{e}-{word[r]}", {e: r}, 2) for e in EXPERTS[1:] for r in RANKS]
    uniform = [mixture(f"uniform-{word[r]}-a3", {"math": r, "news": r}, 3) for r in (4, "full")]
    return [*pairs, *uniform, mixture("best-a3", {"math": 16, "news": 4}, 3)]


def chance(what, task):
    """Probability of a right answer: a parabola in log2 rank for the task's own expert."""
    rank = what["ranks"]["news" if task == "mayors" else "math"]
    if rank == "drop" or isinstance(rank, dict):
        return 0.2
    x = np.log2(FULL_RANK if rank == "full" else rank)
    return 0.75 - 0.025 * (x - BEST[task]) ** 2


def answer(what, task, documents=DOCUMENTS):
    """0 and 1 per document; difficulty is shared by mixtures."""
    shared = np.random.default_rng(hash_of(task)).normal(size=documents)
    own = np.random.default_rng([hash_of(task), hash_of(what["mixture_id"])]).normal(size=documents)
    return (0.95 * shared + np.sqrt(1 - 0.95**2) * own < norm.ppf(chance(what, task))).astype(float)


def commit(root, what, task, values=None, *, metric="acc", error=None, group=None, weights="w1", source="here", **key):
    identity = {"task_version": "1", "num_fewshot": 0, "split": "validation", "seed": 1, "task_hash": f"h-{task}"} | key
    identity = CellKey(mixture_id=what["mixture_id"], task=task, **{"dtype": "float32"} | identity)
    score = None
    if error is None:
        values = answer(what, task) if values is None else values
        samples = [
            Sample(
                doc_id=i,
                doc_hash=f"{identity.task_hash}{i}",
                target="t",
                responses=["r"],
                correct=bool(v) if v in (0, 1) else None,
                metrics={("other", "none"): 0.5, (metric, "none"): float(v)},
            )
            for i, v in enumerate(values)
        ]
        score = TaskScore(
            task=task, group="", split=identity.split, metric=metric, filter="none", value=float(np.mean(values)),
            stderr=None, metrics={}, num_fewshot=0, version="1", seconds=2.0, samples=samples,
        )  # fmt: skip
    commit_cell(
        root,
        identity,
        score,
        mixture={"source": source, "ranks": what["ranks"], "experts": list(EXPERTS), "active": what["active"]},
        active=what["active"],
        parameters=what["parameters"],
        group=group or next(g["name"] for g in GROUPS if task in g["tasks"]),
        weights=weights,
        error=error,
    )


def write_plan(root, mixtures, **more):
    plan = {
        "format": "flexmore-plan-1", "name": "small", "source": ["here"], "experts": list(EXPERTS),
        "full_rank": FULL_RANK, "weights": "w1", "dtype": "float32", "split": "validation", "limit": None, "seed": 1,
        "store": None, "groups": GROUPS, "mixtures": mixtures,
    } | more  # fmt: skip
    (root / "plans").mkdir(parents=True, exist_ok=True)
    (root / "plans" / f"{more.get('name', 'small')}.json").write_text(json.dumps(plan))


def fill(root, mixtures, tasks=tuple(BEST), **more):
    for what in mixtures:
        for task in tasks:
            commit(root, what, task, **more)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Factors of a tiny random model with the experts of these tests."""
    folder = tmp_path_factory.mktemp("model")
    write(random_model(num_experts=3), folder / "m")
    build_store(open_source([str(folder / "m")], list(EXPERTS)), folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def full_results(tmp_path_factory, store):
    root = tmp_path_factory.mktemp("results")
    write_plan(root, paper_like(), store=str(store))
    fill(root, paper_like())
    return root


@pytest.fixture(scope="module")
def full_report(full_results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, write_report(full_results, out)


def text_of(out):
    return (out / "report.md").read_text()


# --- a whole report ---------------------------------------------------------------------------------------


def test_planted_best_ranks_are_recovered(full_results):
    (section,) = read_sections(full_results)
    estimates = resample(section, full_results)
    for group in section.groups:
        for task in group.tasks:
            fit = fit_quadratic(own_curve(section, estimates.tasks[task], group))
            assert fit is not None
            assert fit.where == "inside"
            assert fit.best.value == pytest.approx(BEST[task], abs=0.5)
            assert fit.best.low <= BEST[task] <= fit.best.high
    kinds = compare_kinds(section, estimates, "own")
    assert kinds is not None
    assert kinds.difference.low <= 2.5 <= kinds.difference.high
    assert kinds.difference.low > 0


def test_numbers_are_those_of_the_files(full_results, full_report):
    out, found = full_report
    (section,) = found["sections"]
    by_name = {what["name"]: what for what in paper_like()}
    for name, what in by_name.items():
        sums = (answer(what, "add").mean() + answer(what, "multiply").mean()) / 2
        assert section["scores"][name] == pytest.approx((sums + answer(what, "mayors").mean()) / 2)
    best = section["against_full"]["best-a3"]
    assert best["difference"] == pytest.approx(section["scores"]["best-a3"] - section["scores"]["uniform-full-a3"])
    assert best["low"] < best["difference"] < best["high"]
    assert best["verdict"] == "better"
    assert set(section["against_full"]) == {"best-a3", "uniform-r4-a3"}
    text = text_of(out)
    row = next(line for line in text.splitlines() if line.startswith("| best-a3 ") and "better" in line)
    assert f"{100 * section['scores']['best-a3']:.1f}" in row
    assert f"{by_name['best-a3']['parameters'] / 1800:.3f}" in row
    assert "Picked on the same documents." in text
    assert "in line with the paper" in text
    assert (section["cells"], section["failed"], section["missing"]) == (17 * 3, 0, 0)
    assert "Not complete" not in text


def test_the_report_is_the_same_twice(full_results, full_report, tmp_path):
    out, _ = full_report
    write_report(full_results, tmp_path)
    for path in sorted(out.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


class Page(HTMLParser):
    """What the tests look at in a page."""

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
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_needs_nothing_else(full_report):
    out, found = full_report
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://|@import|<script|<link", text)
    assert len(page.all("img")) == len(found["figures"]) == 5
    for image, path in zip(page.all("img"), found["figures"], strict=True):
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == Path(path).read_bytes()
        assert len(image["alt"]) > 20
    targets = {a["id"] for tag, a in page.tags if tag in ("h2", "h3")}
    assert {a["href"] for a in page.all("a")} == {f"#{target}" for target in targets}
    assert len(page.all("table")) == len(page.all("caption")) == text_of(out).count("\n| --- |")
    assert {a.get("scope") for a in page.all("th")} == {"row", "col"}
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert "@media print" in text


def test_figures_are_small_pngs_with_something_on_them(full_report):
    for path in map(Path, full_report[1]["figures"]):
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == 1062
        assert path.stat().st_size < 200_000
        assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9, path


# --- what is missing --------------------------------------------------------------------------------------


def test_failed_and_missing_cells_are_named(tmp_path):
    mixtures = paper_like()
    write_plan(tmp_path, [*mixtures, {"name": "best2-a3", "mixture_id": None, "ranks": None, "active": 3}])
    fill(tmp_path, mixtures[:-2])
    commit(tmp_path, mixtures[-2], "add", error="document 7: <b>a|b</b>")
    commit(tmp_path, mixtures[-2], "mayors")
    commit(tmp_path, mixtures[-1], "add", error="first try")
    commit(tmp_path, mixtures[-1], "add")
    found = write_report(tmp_path, tmp_path / "out")["sections"][0]
    assert (found["failed"], found["missing"]) == (1, 3)
    assert found["scores"]["uniform-full-a3"] is found["scores"]["best-a3"] is None
    assert found["against_full"] == {}
    text = text_of(tmp_path / "out")
    assert "| add | uniform-full-a3 | document 7: \\<b\\>a\\|b\\</b\\> |" in text
    assert "| best-a3 | 2 | multiply, mayors |" in text
    assert "2 mixtures without all tasks of a group" in text
    assert "Ranks not chosen yet, for want of results: best2-a3." in text
    assert "nothing is compared" not in text
    assert "store" not in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>a|b</b>" in Page(page).text
    assert "<b>" not in page


def test_a_part_of_failures_only_is_still_reported(tmp_path):
    commit(tmp_path, paper_like()[0], "add", error="no data")
    assert write_report(tmp_path, tmp_path / "out")["sections"][0]["failed"] == 1
    assert "No cell of this part is done." in text_of(tmp_path / "out")


def test_results_without_a_plan(tmp_path):
    whole = [mixture("", {"math": m, "news": n}, 3) for m, n in (("full", "full"), (8, 8), (8, 2))]
    others = [mixture("", {"math": 8}, 2), mixture("", {}, 1)]
    fill(tmp_path, [*whole, *others])
    found = write_report(tmp_path, tmp_path / "out")["sections"][0]
    assert set(found["scores"]) == {
        "uniform-full-a3", "uniform-r8-a3", "math r8, news r2, a3", "pair-math-r8", "public-a1",
    }  # fmt: skip
    assert set(found["against_full"]) == {"uniform-r8-a3", "math r8, news r2, a3"}
    text = text_of(tmp_path / "out")
    assert "four are needed" in text
    assert "Not compared: it needs groups of both kinds" in text
    ratio = whole[2]["parameters"] / whole[0]["parameters"]
    assert f"{ratio:.3f}" in next(line for line in text.splitlines() if line.startswith("| math r8, news r2, a3 |"))


# --- what must not be mixed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"split": "test"}, {"limit": 5}, {"seed": 2}, {"dtype": "bfloat16"}, {"weights": "w2"}, {"source": "there"}],
)
def test_other_settings_have_their_own_part(tmp_path, other):
    mixtures = paper_like()
    write_plan(tmp_path, mixtures)
    fill(tmp_path, mixtures[:2])
    strange = [dict(m, mixture_id=f"{m['mixture_id']}x") for m in mixtures[:2]]
    fill(tmp_path, strange, ("mayors",), values=np.ones(9), **other)
    planned, apart = read_sections(tmp_path)
    assert (planned.plans, apart.plans) == (("small",), ())
    assert (len(planned.cells), len(apart.cells)) == (6, 2)
    assert {cell.value for cell in apart.cells.values()} == {1.0}
    assert all(cell.value < 0.9 for cell in planned.cells.values())
    assert planned.setting.describe() != apart.setting.describe() or planned.setting.weights != apart.setting.weights


def test_cells_without_a_weights_hash_belong_to_the_plan_of_their_mixture(tmp_path):
    mixtures = paper_like()
    write_plan(tmp_path, mixtures)
    fill(tmp_path, mixtures[:2], weights="", source="elsewhere")
    (section,) = read_sections(tmp_path)
    assert section.plans == ("small",)
    assert len(section.cells) == 6


def test_two_editions_of_a_task_are_refused(tmp_path):
    mixtures = paper_like()
    write_plan(tmp_path, mixtures)
    fill(tmp_path, mixtures)
    commit(tmp_path, mixtures[0], "mayors", task_version="2", task_hash="new")
    with pytest.raises(
        FlexmoreError, match=r"task mayors .* 2 editions .* version 2, 0 examples, has 1 cells"
    ) as caught:
        write_report(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_knows_its_tasks_keeps_other_editions_apart(tmp_path):
    """Its own content hash decides: also for a task without a test split, which is tested on its validation split."""
    mixtures = paper_like()[:3]
    write_plan(tmp_path, mixtures, split="test", tasks={t: {"version": "1", "hash": f"h-{t}"} for t in BEST})
    fill(tmp_path, mixtures, ("add", "multiply"), split="test")
    fill(tmp_path, mixtures, ("mayors",), split="validation")
    fill(tmp_path, mixtures, ("mayors",), split="test", task_hash="old", values=np.ones(9))
    planned, other = read_sections(tmp_path)
    assert planned.other_splits == {"mayors": "validation"}
    assert len(planned.cells) == 9
    assert {cell.value for cell in other.cells.values()} == {1.0}
    found = write_report(tmp_path, tmp_path / "out")["sections"]
    assert [part["cells"] for part in found] == [9, 3]
    text = text_of(tmp_path / "out")
    assert "Scored on another split, as the plan says: mayors (validation)." in text
    assert "The results are of 2 kinds that must not be compared" in text


def test_equal_ranks_of_other_weights_are_refused(tmp_path):
    what = paper_like()[0]
    fill(tmp_path, [what, dict(what, mixture_id="retrained")])
    with pytest.raises(FlexmoreError, match=r"have the same ranks \(pair-math-r1\) but other weights"):
        read_sections(tmp_path)


def test_ranks_by_matrix_are_not_taken_for_equal(tmp_path):
    refined = [{"gate_proj": 2, "up_proj": [2, 8], "down_proj": 8}, {"gate_proj": 8, "up_proj": 8, "down_proj": 2}]
    fill(tmp_path, [mixture("", {"math": r, "news": "full"}, 3) for r in refined])
    (section,) = read_sections(tmp_path)
    names = [m.name for m in section.mixtures]
    assert len(set(names)) == 2
    assert all(name.startswith("math 2-8, news full, a3, id") for name in names)


def test_mixtures_scored_on_other_documents_are_refused(tmp_path):
    mixtures = paper_like()[:2]
    commit(tmp_path, mixtures[0], "add", task_hash="")
    commit(tmp_path, mixtures[1], "add", np.ones(7), task_hash="")
    with pytest.raises(FlexmoreError, match="task add: mixtures were scored on different documents"):
        write_report(tmp_path, tmp_path / "out")


def test_names_of_one_mixture_are_joined(tmp_path):
    mixtures = paper_like()
    full = next(m for m in mixtures if m["name"] == "uniform-full-a3")
    twins = [dict(full, name="uniform-r128-a3", ranks={"math": 128, "news": 128}), dict(full, name="best2-a3")]
    write_plan(tmp_path, [*mixtures, *twins])
    write_plan(tmp_path, mixtures[:3], name="again")
    (section,) = read_sections_of(tmp_path, mixtures)
    assert len(section.mixtures) == len(mixtures)
    assert [m.name for m in section.mixtures if m.is_full] == ["uniform-full-a3 = best2-a3"]
    assert set(section.plans) == {"again", "small"}


def read_sections_of(root, mixtures):
    fill(root, mixtures[:1])
    return read_sections(root)


# --- methods compared -------------------------------------------------------------------------------------

PARAMETERS = {"0.25x": 1000, "0.5x": 2000, "1x": 4000}


def point(curve, budget, ranks, active=3, **more):
    """A mixture of a curve, of so many parameters as its budget; the one at 1x is full."""
    name = f"{curve} {budget}"
    ranks = {"math": "full", "news": "full"} if budget == "1x" else ranks
    size = {"parameters": PARAMETERS[budget], "full_parameters": 4000}
    return mixture(name, ranks, active, curve=curve, budget=budget, **size, **more)


def curves(names, budgets, **more):
    """Curves of two ranks below the full one; those of other factors are other mixtures."""
    suffix = more.pop("id", "")
    found = []
    for n, name in enumerate(names):
        for rank, budget in enumerate(budgets, 2):
            made = point(name, budget, {"math": rank + 10 * n, "news": rank + 10 * n}, **more)
            found.append(made if budget == "1x" else made | {"mixture_id": f"{made['mixture_id']}{suffix}"})
    return found


PUBLIC = mixture("public", {"math": "drop", "news": "drop"}, 1, parameters=600)


def fill_with(root, scores):
    """Each mixture right on the first documents of every task: a share of them."""
    for what, score in scores:
        for task in BEST:
            commit(root, what, task, (np.arange(100) < round(100 * score)).astype(float))


def test_methods_of_two_stores_are_compared_in_one_section(tmp_path):
    plain = curves(["plain"], PARAMETERS)
    weighted = curves(["weighted"], PARAMETERS, id="w")
    assert plain[0]["ranks"] == weighted[0]["ranks"]
    assert plain[2]["mixture_id"] == weighted[2]["mixture_id"]
    write_plan(tmp_path, [PUBLIC, *weighted], name="a", factors="both:12345678")
    write_plan(tmp_path, [PUBLIC, *plain], name="b", factors="")
    fill_with(tmp_path, [(PUBLIC, 0.2), *zip(plain, (0.5, 0.7, 0.8), strict=True)])
    fill_with(tmp_path, zip(weighted[:2], (0.5, 0.77), strict=True))
    (section,) = read_sections(tmp_path)
    assert section.curves == ("plain", "weighted")  # plain factors first, though their plan's name is not
    assert [m.name for m in section.mixtures if m.is_full] == ["full-a3"]
    found = write_report(tmp_path, tmp_path / "out")["sections"][0]["curves"]
    assert list(found) == ["plain", "weighted"]
    by_hand = {"plain": (2000 * 2**0.4, 2000 * 2**0.7, 4000), "weighted": (1000 * 2 ** (8 / 9), 2000, 4000)}
    for name, places in by_hand.items():
        assert [p["parameters"] for p in found[name]["points"]] == [1000, 2000, 4000]
        for share, place in zip(("0.9", "0.95", "1"), places, strict=True):
            told = found[name]["needed"][share]
            assert told["value"] == pytest.approx(place, rel=1e-4)
            assert told["low"] <= told["value"] * (1 + 1e-9)
            assert told["value"] <= told["high"] * (1 + 1e-9)
    assert found["weighted"]["against_baseline"]["value"] == pytest.approx(2**-0.7, rel=1e-4)
    assert found["plain"]["against_baseline"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    text = text_of(tmp_path / "out")
    assert "The baseline is plain" in text
    assert f"| weighted | 3 | 1,852, {2 ** (8 / 9) / 4:.3f}x (" in text
    assert re.search(r"\| weighted \| 0.5x \| 2,000 \| 0.500 \| 77.0 \| \+7.0 \(\+.* \| better \|", text)
    assert "| weighted | 1x | 4,000 | 1.000 | 80.0 | the same | - |" in text
    assert (tmp_path / "out" / "1-methods.png").exists()


def test_a_share_that_is_not_reached_or_reached_at_once_is_said(tmp_path):
    low, high = curves(["low"], ("0.25x", "0.5x")), curves(["low", "high"], ("0.25x", "0.5x"))[2:]
    full = mixture("whole", {"math": "full", "news": "full"}, 3, parameters=4000, full_parameters=4000)
    write_plan(tmp_path, [PUBLIC, full, *low, *high], factors="")
    fill_with(tmp_path, [(PUBLIC, 0.0), (full, 0.8), *zip([*low, *high], (0.1, 0.2, 0.9, 0.95), strict=True)])
    found = write_report(tmp_path, tmp_path / "out")["sections"][0]["curves"]
    assert found["low"]["needed"]["0.9"] == {"value": None, "low": None, "high": None}
    assert found["high"]["needed"]["0.9"]["value"] == pytest.approx(1000)
    assert found["high"]["against_baseline"]["value"] is None
    text = text_of(tmp_path / "out")
    assert "| low | 3 | not reached | not reached | not reached | baseline |" in text
    assert "| high | 3 | ≤ 0.250x | ≤ 0.250x | " in text


def test_without_the_full_mixture_nothing_is_said_of_its_gain(tmp_path):
    made = curves(["one", "two"], ("0.25x", "0.5x"))
    write_plan(tmp_path, made, factors="")
    fill_with(tmp_path, zip(made[:3], (0.4, 0.5, 0.6), strict=True))
    found = write_report(tmp_path, tmp_path / "out")["sections"][0]["curves"]
    assert [len(curve["points"]) for curve in found.values()] == [2, 1]
    assert not any(curve["needed"] for curve in found.values())
    assert "Not known here: it takes both mixtures, and a gain" in text_of(tmp_path / "out")


def test_reports_without_curves_say_nothing_of_methods(full_report):
    out, found = full_report
    assert found["sections"][0]["curves"] == {}
    assert "Methods compared" not in text_of(out)


def test_mixtures_of_one_name_and_other_factors_are_told_apart(tmp_path):
    plain = [*curves(["optimal"], PARAMETERS), mixture("uniform-r4-a3", {"math": 4, "news": 4}, 3)]
    plans = {"a": ("", ""), "b": ("w", "both:1"), "c": ("v", "input:2"), "d": ("u", "input:3")}
    for name, (suffix, factors) in plans.items():
        own = [m if "full" in str(m["ranks"]) else dict(m, mixture_id=m["mixture_id"] + suffix) for m in plain]
        write_plan(tmp_path, own, name=name, factors=factors)
        fill_with(tmp_path, [(m, 0.5) for m in own])
    (section,) = read_sections(tmp_path)
    named = [m.name for m in section.mixtures if 4 in m.ranks.values()]
    assert named == ["uniform-r4-a3", *(f"uniform-r4-a3 ({word})" for word in ("both", "input:2", "input:3"))]
    assert len({m.name for m in section.mixtures}) == len(section.mixtures) == 4 * 3 + 1
    assert section.curves == tuple(f"optimal ({word})" for word in ("plain", "both", "input:2", "input:3"))
    assert all(sum(curve in m.curves for m in section.mixtures) == 3 for curve in section.curves)


def test_other_router_rows_make_full_and_public_mixtures_others_too(tmp_path):
    plain = [*curves(["optimal"], PARAMETERS), PUBLIC]
    plans = {"a": ("", "both:1"), "b": ("x", "both:1+router:2"), "c": ("y", "router:3"), "d": ("", "")}
    for name, (suffix, factors) in plans.items():
        own = [dict(m, mixture_id=m["mixture_id"] + suffix) for m in plain]
        if name == "d":  # plain factors: other mixtures where experts are cut, the same where none is
            own = [m if {"full", "drop"} & set(m["ranks"].values()) else m | {"mixture_id": m["name"]} for m in own]
        write_plan(tmp_path, own, name=name, factors=factors)
        fill_with(tmp_path, [(m, 0.5) for m in own])
    (section,) = read_sections(tmp_path)
    assert section.curves == tuple(f"optimal ({word})" for word in ("plain", "both", "both+router", "router"))
    words = {"full-a3": ("", "router:2", "router:3"), "public": ("", "router:2", "router:3")}
    for name, found in words.items():
        named = {m.name: m.factors for m in section.mixtures if m.name.startswith(name)}
        assert named == {f"{name} ({text})" if text else name: text for text in found}
    assert section.mixtures[section.full(3)].factors == section.mixtures[section.public()].factors == ""
    assert all(sum(curve in m.curves for m in section.mixtures) == 3 for curve in section.curves)


def test_curves_of_one_name_and_other_active_experts_are_told_apart(tmp_path):
    for active in (2, 3):
        made = curves(["a"], PARAMETERS, active=active)
        write_plan(tmp_path, made, name=f"plan-{active}", factors="")
        fill_with(tmp_path, [(m, 0.5) for m in made])
    (section,) = read_sections(tmp_path)
    assert section.curves == ("a (a2)", "a (a3)")
    assert [m.curves for m in section.mixtures if m.is_full] == [{"a (a2)": ("1x",)}, {"a (a3)": ("1x",)}]


def test_budgets_that_make_the_same_mixture_are_each_a_point_of_the_table(tmp_path):
    made = curves(["a"], PARAMETERS)
    again = dict(next(m for m in made if m["budget"] != "1x"), budget="0.9999x", name="again")
    write_plan(tmp_path, [*made, again], factors="")
    fill_with(tmp_path, [(m, 0.5) for m in made])
    (section,) = read_sections(tmp_path)
    (found,) = [m.curves["a"] for m in section.mixtures if "0.9999x" in m.curves.get("a", ())]
    assert len(found) == 2
    (method,) = compare_methods(section, resample(section, tmp_path))
    assert [budget for budget, _ in method.points()].count("0.9999x") == 1
    assert len({column for _, column in method.points()}) == len(made)


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ({"factors": ""}, {"factors": ""}, False),  # equal ranks and factors: other weights
        ({}, {}, False),  # records of older versions do not say
        ({}, {"factors": "both:1"}, False),
        ({"factors": "", "digests": {"math": "m"}}, {"factors": "both:1", "digests": {"math": "other"}}, False),
        ({"factors": ""}, {"factors": "both:1"}, True),  # best ranks of each are a chapter of its own
        ({"factors": ""}, {"factors": "router:1"}, True),
    ],
)
def test_what_may_not_be_compared_stays_apart(tmp_path, first, second, pairs):
    plain = curves(["a"], PARAMETERS) + ([mixture("pair-math-r2", {"math": 2}, 2)] if pairs else [])
    other = [m if "full" in str(m["ranks"]) else dict(m, mixture_id=f"{m['mixture_id']}x") for m in plain]
    write_plan(tmp_path, plain, name="a", **first)
    write_plan(tmp_path, other, name="b", **second)
    fill_with(tmp_path, [(m, 0.5) for m in [*plain, *other]])
    one, two = read_sections(tmp_path)
    assert {one.plans, two.plans} == {("a",), ("b",)}
    assert len(one.mixtures) == len(two.mixtures) == len(plain)


def test_unplanned_cells_of_another_store_stay_apart(tmp_path):
    made = curves(["a"], PARAMETERS)
    stray = dict(made[0], mixture_id="stray")
    write_plan(tmp_path, made, factors="both:1")
    fill_with(tmp_path, [(m, 0.5) for m in [*made, stray]])
    planned, apart = read_sections(tmp_path)
    assert (len(planned.mixtures), [m.mixture_id for m in apart.mixtures]) == (3, ["stray"])


def test_an_older_record_learns_its_factors_from_a_newer_one(tmp_path):
    plain, weighted = curves(["plain"], PARAMETERS), curves(["weighted"], PARAMETERS, id="w")
    older = [{key: value for key, value in m.items() if key not in ("curve", "budget")} for m in weighted]
    write_plan(tmp_path, older, name="a")
    write_plan(tmp_path, plain, name="b", factors="")
    write_plan(tmp_path, weighted, name="c", factors="both:1")
    fill_with(tmp_path, [(m, 0.5) for m in [*plain, *weighted]])
    (section,) = read_sections(tmp_path)
    assert set(section.plans) == {"a", "b", "c"}
    assert len(section.mixtures) == 5


# --- metrics ----------------------------------------------------------------------------------------------


def test_graded_metrics_are_resampled_and_others_held_fixed(tmp_path):
    mixtures = paper_like()[:2]
    graded = np.linspace(0, 1, 50)
    for i, what in enumerate(mixtures):
        commit(tmp_path, what, "add", graded**i, metric="f1")
        commit(tmp_path, what, "mayors", graded, metric="word_perplexity")
        commit(tmp_path, what, "multiply", np.full(50, 0.3), metric="f1")
    cells = tmp_path / "cells"
    for path in cells.iterdir():
        table = results_module.pq.read_table(path)
        if table["task"][0].as_py() == "multiply":
            column = table.schema.get_field_index("value")
            results_module.pq.write_table(table.set_column(column, "value", [[0.9]]), path)
    (section,) = read_sections(tmp_path)
    estimates = resample(section, tmp_path, resamples=50)
    assert estimates.held_fixed == ("multiply",)
    assert (estimates.tasks["multiply"].draws == np.float32(0.9)).all()
    columns = [[m.mixture_id for m in section.mixtures].index(what["mixture_id"]) for what in mixtures]
    np.testing.assert_allclose(estimates.tasks["add"].value[columns], [1.0, 0.5])
    assert estimates.tasks["add"].draws[:, columns[1]].std() > 0.01
    write_report(tmp_path, tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert "not a mean over documents: multiply." in text
    assert "lower is better in their metric: mayors (word_perplexity)" in text


# --- bad input --------------------------------------------------------------------------------------------


def test_missing_or_empty_folders_are_one_line(tmp_path):
    for folder, words in ((tmp_path / "none", "no results folder"), (tmp_path, "holds no results")):
        with pytest.raises(UsageError, match=words) as caught:
            write_report(folder, tmp_path / "out")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "flexmore-plan-1"}'])
def test_a_damaged_plan_is_named(tmp_path, text):
    commit(tmp_path, paper_like()[0], "add")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "x.json").write_text(text)
    with pytest.raises(FlexmoreError, match=r"plan .*x\.json cannot be read") as caught:
        write_report(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_out_that_cannot_be_written_is_named(tmp_path):
    commit(tmp_path, paper_like()[0], "add")
    (tmp_path / "taken").write_text("")
    with pytest.raises(FlexmoreError, match="cannot write the report to"):
        write_report(tmp_path, tmp_path / "taken")


def test_a_store_that_is_gone_is_said(tmp_path):
    write_plan(tmp_path, paper_like(), store=str(tmp_path / "gone"))
    fill(tmp_path, paper_like()[:2])
    found = write_report(tmp_path, tmp_path / "out")
    assert not any("spectra" in path for path in found["figures"])
    assert "Left out: the store of the factors cannot be read" in text_of(tmp_path / "out")
