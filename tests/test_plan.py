"""Plans: what they name, how often, and what they refuse. No model runs here."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmore_ray.budget import Granularity, allocate_optimal, allocate_uniform, parse_budget
from flexmore_ray.errors import UsageError
from flexmore_ray.factors import open_parts
from flexmore_ray.mixture import Parts, open_mixture
from flexmore_ray.plan import (
    PRESETS,
    Wanted,
    best_ranks,
    expand,
    identify,
    plan_cells,
    plan_record,
    read_plan,
    record_name,
    resolve,
)
from flexmore_ray.scores import TaskSet, load_tasks
from flexmore_ray.spec import MatrixKey, MixtureSpec
from flexmore_ray.store import open_store
from tests.common import random_model
from tests.common import write as write_model

DOMAINS = ("math", "news", "academic", "code", "creative", "reddit")
GRANULARITIES = get_args(Granularity)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return open_mixture(MixtureSpec(source=("zoo://nano",)))


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    return load_tasks(["nano_arithmetic", "nano_capitals", "nano_program"], limit=2)


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(f"source: zoo://nano\ntasks: [nano_arithmetic, nano_program]\n{text}\n")
    return path


def names(text: str, folder: Path, parts: Parts) -> list[str]:
    return [item.name for item in expand(read_plan(write(folder, text)), parts)]


def test_the_paper_preset_is_the_papers_grid(parts):
    wanted = expand(read_plan(preset="paper", source=["zoo://nano"], tasks="nano"), parts)
    assert len({item.name for item in wanted}) == len(wanted) == 150
    pairs = [item for item in wanted if item.pair]
    assert len(pairs) == 96
    assert {(item.pair, *item.ranks.values()).count("drop") for item in pairs} == {5}
    assert [item.active for item in wanted if not item.pair].count(7) == 18
    assert {item.rule for item in wanted} == {None, "best", "best2"}
    planned = identify([item for item in wanted if not item.rule], parts)
    full_rank = parts.source.shape.full_rank
    ranks_below_full = [2**k for k in range(15) if 2**k < full_rank]
    assert len({item.mixture_id for item in planned}) == (6 + 3) * (len(ranks_below_full) + 1)


def test_equal_assignments_under_different_names_are_one_mixture(parts, tasks, tmp_path):
    text = """mixtures:
  - {name: by-hand, ranks: {math: 4, news: 4, academic: 4, code: 4, creative: 4, reddit: 4}, active: 2}
  - uniform: [4, 128, 300, full]
    active: [2, 4]
  - {name: whole, ranks: {}, active: 4}"""
    planned = identify(expand(read_plan(write(tmp_path, text)), parts), parts)
    same = {}
    for mixture in planned:
        same.setdefault(mixture.mixture_id, set()).add(mixture.name)
    assert sorted(map(sorted, same.values())) == [
        ["by-hand", "uniform-r4-a2"],
        ["uniform-full-a2", "uniform-r128-a2", "uniform-r300-a2"],
        ["uniform-full-a4", "uniform-r128-a4", "uniform-r300-a4", "whole"],
        ["uniform-r4-a4"],
    ]
    assert len(plan_cells(planned, tasks, "float32")) == 4 * 3


def test_mixtures_that_keep_the_same_experts_follow_each_other(parts, tasks, tmp_path):
    text = """mixtures:
  - {name: a, ranks: {math: drop}, active: 2}
  - {name: b, ranks: {math: 2}, active: 2}
  - {name: c, ranks: {math: drop, news: 3}, active: 2}"""
    planned = identify(expand(read_plan(write(tmp_path, text)), parts), parts)
    cells = plan_cells(planned, tasks, "float32").values()
    assert [name for name, _ in itertools.groupby(cell.mixture.name for cell in cells)] == ["a", "c", "b"]


def test_a_mixture_file_beside_the_plan(parts, tmp_path):
    MixtureSpec(source=("zoo://nano",), ranks={"math": 3}, active=2).save(tmp_path / "mine.yaml")
    (mine,) = expand(read_plan(write(tmp_path, "mixtures: [mine.yaml]")), parts)
    assert (mine.name, mine.ranks["math"], mine.ranks["news"], mine.active) == ("mine", 3, "full", 2)


def test_what_is_given_goes_before_the_file(tmp_path):
    path = write(tmp_path, "limit: 5\nsplit: test\nmixtures: [{uniform: 4}]")
    plan = read_plan(path, tasks="nano", limit=7)
    assert (plan.tasks, plan.limit, plan.split, plan.name) == (("nano",), 7, "test", "plan")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixture: []", "unknown key 'mixture'; did you mean mixtures"),
        ("mixtures: []", "at least one entry"),
        ("", "at least one entry"),
        ("mixtures: {pairs: [1]}", "mixtures is a list"),
        ("mixtures: [3]", "an entry is a mixture file or has one of"),
        ("mixtures: [{pairs: []}]", "empty"),
        ("mixtures: [{pairs: [0]}]", "integer >= 1"),
        ("mixtures: [{pairs: [best]}]", "integer >= 1"),
        ("mixtures: [{uniform: [drop]}]", "drop leaves out an expert"),
        ("mixtures: [{pairs: [1], of: []}]", "of: a list of experts is needed"),
        ("mixtures: [{uniform: [1], active: []}]", "active: a number of experts"),
        ("name: 2026\nmixtures: [{uniform: [1]}]", "its name is a word, got 2026"),
        ("name: paper\nmixtures: [{uniform: [1], active: 9}]", "from 1 to the 7 experts"),
        ("limit: 3\nlimit: 4\nmixtures: [{uniform: [1]}]", "key 'limit' is given twice"),
        ("mixtures: [{pairs: [1], active: 2}]", "unknown key 'active' beside pairs"),
        ("mixtures: [{pairs: [1], of: [maths]}]", "unknown expert 'maths'; did you mean math"),
        ("mixtures: [{uniform: [1], active: 8}]", "from 1 to the 7 experts"),
        ("mixtures: [{uniform: [1], active: [yes]}]", "from 1 to the 7 experts"),
        ("mixtures: [{uniform: [best]}]", "add an entry pairs"),
        ("mixtures: [{pairs: [1], of: [math]}, {uniform: [best]}]", "add an entry pairs"),
        ("mixtures: [{ranks: {maths: 3}}]", "mixture mixture-0: ranks: unknown expert 'maths'"),
        ("mixtures: [{ranks: {math: drop}, active: 7}]", "7 experts per token asked"),
        ("mixtures: [{name: a, ranks: {}}, {name: a, ranks: {math: 1}}]", "two mixtures are called 'a'"),
        ("mixtures: [no.yaml]", "no such mixture file"),
        ("split: train\nmixtures: [{uniform: 1}]", "split is one of validation, test"),
        ("limit: 0\nmixtures: [{uniform: 1}]", "limit is an integer >= 1, got 0"),
        ("mixtures: [", "not a YAML plan"),
    ],
)
def test_bad_plans_are_refused_in_one_line(text, message, parts, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        identify(expand(read_plan(write(tmp_path, text)), parts), parts)
    assert "\n" not in str(caught.value)


def test_plan_or_preset_but_not_both(tmp_path):
    path = write(tmp_path, "mixtures: [{uniform: 1}]")
    for arguments in ({}, {"path": path, "preset": "paper"}):
        with pytest.raises(UsageError, match="only one of them"):
            read_plan(**arguments)
    with pytest.raises(UsageError, match="did you mean paper"):
        read_plan(preset="papr", source=["zoo://nano"], tasks="nano")
    with pytest.raises(UsageError, match="its source or its store"):
        read_plan(preset="paper", tasks="nano")
    with pytest.raises(UsageError, match="tasks is a suite"):
        read_plan(preset="paper", source=["zoo://nano"])
    with pytest.raises(UsageError, match="no such plan file"):
        read_plan(tmp_path / "none.yaml")
    assert set(PRESETS) == {"paper"}


RANKS = (1, 4, 32, "full")


@given(data=st.data())
def test_best_is_what_its_definition_says(parts, tasks, data):
    wanted = [
        Wanted(name=f"{e}-{r}", ranks={**dict.fromkeys(DOMAINS, "drop"), e: r}, active=2, pair=e)
        for e in DOMAINS
        for r in RANKS
    ]
    pairs = identify(wanted, parts)
    value = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # few values, so that ties are common
    scores = {pair.mixture_id: {task: data.draw(value) for task in tasks.tasks} for pair in pairs}
    groups = tasks.suite.groups
    for rule in ("best", "best2"):
        found = best_ranks(rule, pairs, scores, groups)
        for expert in DOMAINS:
            own = [group for group in groups if group.domain == expert]
            of = own if rule == "best2" and own else groups
            by_rank = {}
            for pair in pairs:
                if pair.pair == expert:
                    by_rank[pair.rank] = sum(scores[pair.mixture_id][g.tasks[0]] for g in of) / len(of)
            assert found[expert] == next(rank for rank in RANKS if by_rank[rank] == max(by_rank.values()))


def test_a_pair_without_all_scores_takes_no_part(parts, tasks):
    wanted = [
        Wanted(name=f"{e}-{r}", ranks={**dict.fromkeys(DOMAINS, "drop"), e: r}, active=2, pair=e)
        for e in DOMAINS
        for r in (1, 4)
    ]
    pairs = identify(wanted, parts)
    scores = {pair.mixture_id: dict.fromkeys(tasks.tasks, 1.0 if pair.rank == 4 else 0.5) for pair in pairs}
    del scores[next(p.mixture_id for p in pairs if p.pair == "math" and p.rank == 4)]["nano_program"]
    waiting = [Wanted(name="best-a4", ranks={}, active=4, rule="best")]
    (best,) = resolve(waiting, pairs, scores, tasks.suite.groups)
    assert best.ranks == {name: 1 if name == "math" else 4 for name in DOMAINS}
    with pytest.raises(UsageError, match="no two-expert mixture of math"):
        resolve(waiting, pairs, {}, tasks.suite.groups)


def test_the_record_keeps_its_name_through_both_stages(parts, tasks, tmp_path):
    plan = read_plan(write(tmp_path, "mixtures: [{uniform: [1, 2]}]"))
    planned = identify(expand(plan, parts), parts)
    record = plan_record(plan, parts, tasks, "float32", planned)
    assert record_name(record) == record_name(plan_record(plan, parts, tasks, "float32", planned[:1]))
    assert record_name(record) != record_name(record | {"weights": "other"})
    assert json.loads(json.dumps(record))["mixtures"][0]["ranks"] == dict.fromkeys(DOMAINS, 1)


# --- curves -----------------------------------------------------------------------------------------------


class SomeSpectra:
    """Factors of which only the spectra are known: random ones, of one kind for each seed."""

    weighting = "none"
    dtype = torch.float32

    def __init__(self, seed: int, recipe: str = "") -> None:
        self._seed, self._recipe = seed, recipe

    def spectrum(self, key: MatrixKey) -> torch.Tensor:
        draw = np.random.default_rng([self._seed, key.layer, *map(ord, key.expert + key.projection)])
        return torch.from_numpy(draw.gamma(2.0) * np.arange(1.0, 129.0) ** -draw.uniform(0.2, 2.0))

    def recipe(self, expert: str) -> str:
        return self._recipe


CURVE = "mixtures: [{{curve: a b, allocation: {}, budgets: [{}], active: 3}}]"
RATIOS = st.lists(st.sampled_from([round(0.22 + 0.02 * i, 2) for i in range(40)]), min_size=2, max_size=5, unique=True)


@settings(max_examples=30)
@given(allocation=st.sampled_from(["uniform", "optimal", *("optimal, granularity: " + g for g in GRANULARITIES)]),
       ratios=RATIOS, seed=st.integers(0, 99))  # fmt: skip
def test_mixtures_of_a_curve_keep_to_their_budgets_and_grow_with_them(
    parts, tmp_path_factory, allocation, ratios, seed
):
    parts = dataclasses.replace(parts, factors=SomeSpectra(seed))
    text = CURVE.format(allocation, ", ".join(f"{ratio}x" for ratio in ratios))
    wanted = expand(read_plan(write(tmp_path_factory.mktemp("plan"), text)), parts)
    assert [item.name for item in wanted] == [f"a b {ratio}x" for ratio in sorted(ratios)]
    assert {(item.curve, item.active) for item in wanted} == {("a b", 3)}
    source, full = parts.source, parts.count().full_total
    made = [parts.with_spec(MixtureSpec(ranks=item.ranks, active=3)) for item in wanted]
    for item, variant in zip(wanted, made, strict=True):
        assert variant.count().total <= parse_budget(item.budget, full)
        if allocation == "uniform":
            assert item.ranks == allocate_uniform(source.shape, source.experts, parse_budget(item.budget, full))
        else:
            words = allocation.split(": ")[1:]
            spectra = {key: SomeSpectra(seed).spectrum(key).numpy() for e in DOMAINS for key in source.shape.keys(e)}
            budget = parse_budget(item.budget, full)
            assert item.ranks == allocate_optimal(source.shape, source.experts, spectra, budget, *words)
    keys = [key for name in DOMAINS for key in source.shape.keys(name)]
    for one, other in itertools.pairwise(variant.assignment for variant in made):
        ranks = [(one.rank(key), other.rank(key)) for key in keys]
        if not any("full" in pair for pair in ranks):
            assert all(low <= high for low, high in ranks)
            assert ranks != [(rank, rank) for rank, _ in ranks] or allocation != "optimal"


def test_a_curve_ends_at_the_full_mixture_and_its_budgets_are_sorted(parts, tmp_path):
    text = CURVE.format("optimal", "1x, 1000000, 0.5x, 2x")
    wanted = expand(read_plan(write(tmp_path, text)), dataclasses.replace(parts, factors=SomeSpectra(1)))
    assert [item.budget for item in wanted] == ["1000000", "0.5x", "1x", "2x"]
    assert wanted[2].ranks == wanted[3].ranks == dict.fromkeys(DOMAINS, "full")
    assert "full" not in wanted[0].ranks.values()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("curve: a, allocation: uniform, budgets: [0.5x], rank: 3", r"mixtures\[0\]: unknown key 'rank' beside curve"),
        ("curve: '', allocation: uniform, budgets: [0.5x]", "its name is a word or several"),
        ("curve: a, budgets: [0.5x]", "allocation: one of uniform, optimal is needed, got None"),
        ("curve: a, allocation: best, budgets: [0.5x]", "one of uniform, optimal is needed, got 'best'"),
        ("curve: a, allocation: uniform, granularity: matrix, budgets: [0.5x]", "granularity: it is of optimal"),
        ("curve: a, allocation: optimal, granularity: row, budgets: [0.5x]", "granularity: one of expert.* got 'row'"),
        ("curve: a, allocation: uniform", "budgets: a list of counts or ratios"),
        ("curve: a, allocation: uniform, budgets: 0.5x", "budgets: a list of counts or ratios"),
        ("curve: a, allocation: uniform, budgets: [half]", r"mixtures\[0\]: budget: a count such as .* got 'half'"),
        ("curve: a, allocation: uniform, budgets: [yes]", "budget: a count such as"),
        ("curve: a, allocation: uniform, budgets: [0.5x, 0.1x]", r"mixtures\[0\]: budget: .* fewer than the public"),
        ("curve: a, allocation: optimal, budgets: [0.1x]", r"mixtures\[0\]: budget: .* fewer than the public"),
        ("curve: a, allocation: uniform, budgets: [0.5x], active: 8", "from 1 to the 7 experts"),
        ("curve: a, allocation: uniform, budgets: [0.5x], active: [2, 4]", "a curve has one number of active"),
    ],
)
def test_bad_curves_are_refused_in_one_line(text, message, parts, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        names(f"mixtures: [{{{text}}}]", tmp_path, dataclasses.replace(parts, factors=SomeSpectra(1)))
    assert "\n" not in str(caught.value)


def test_a_curve_of_experts_that_were_born_low_rank_is_refused(parts, tmp_path):
    class Born:
        born_ranks: ClassVar = {MatrixKey("news", 0, "up_proj"): 4}

        def __getattr__(self, name):
            return getattr(parts.source, name)

    with pytest.raises(UsageError, match="expert news was low-rank from the start"):
        names(CURVE.format("uniform", "0.5x"), tmp_path, dataclasses.replace(parts, source=Born()))


def test_planning_decomposes_into_the_store_what_it_needs(tmp_path):
    write_model(random_model(num_experts=3), tmp_path / "m")
    path = tmp_path / "plan.yaml"
    path.write_text(f"source: {tmp_path / 'm'}\ntasks: nano\n{CURVE.format('optimal', '0.8x')}")
    plan = read_plan(path)
    parts, folder = open_parts(plan.spec(), tmp_path / "store")
    assert not folder.exists()
    (wanted,) = expand(plan, parts)
    store, source = open_store(tmp_path / "store"), parts.source
    for key in (key for e in source.experts[1:] for key in source.shape.keys(e)):
        change = source.weight(key).double() - source.weight(key._replace(expert=source.experts[0])).double()
        torch.testing.assert_close(store.spectrum(key), torch.linalg.svdvals(change), rtol=1e-4, atol=1e-6)
    (again,) = expand(plan, open_parts(plan.spec(), tmp_path / "store")[0])
    assert again == wanted


def test_a_record_knows_curves_and_factors(parts, tasks, tmp_path):
    plan = read_plan(write(tmp_path, CURVE.format("uniform", "0.5x, 1x") + "\n"))
    records = []
    for recipe in ("", "both:123"):
        variant = dataclasses.replace(parts, factors=SomeSpectra(1, recipe))
        variant.factors.weighting = "both" if recipe else "none"
        records.append(plan_record(plan, variant, tasks, "float32", identify(expand(plan, variant), variant)))
    plain, weighted = (json.loads(json.dumps(record)) for record in records)
    assert [(m["name"], m["curve"], m["budget"]) for m in plain["mixtures"]] == [
        ("a b 0.5x", "a b", "0.5x"), ("a b 1x", "a b", "1x"),
    ]  # fmt: skip
    assert plain["factors"] == ""
    assert re.fullmatch(r"both:[0-9a-f]{8}", weighted["factors"])
    ids = [[m["mixture_id"] for m in record["mixtures"]] for record in (plain, weighted)]
    assert ids[0][0] != ids[1][0]
    assert ids[0][1] == ids[1][1]  # the full mixture uses no factors
    assert record_name(plain) != record_name(weighted)
    older = {key: value for key, value in plain.items() if key != "factors"}
    text = json.dumps({k: v for k, v in older.items() if k not in ("mixtures", "store")}, sort_keys=True)
    assert record_name(plain).startswith(hashlib.sha256(text.encode()).hexdigest()[:16])
