"""What a mixture is scored on, rung by rung: documents, cells, and scores made of parts."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.model import LM

from flexmore_ray.errors import FlexmoreError, TaskError, UsageError
from flexmore_ray.evaluate import cell_key, evaluate
from flexmore_ray.harness import MixtureLM
from flexmore_ray.mixture import load_mixture
from flexmore_ray.plan import PlannedMixture
from flexmore_ray.results import commit_cell, has_cell, read_cells
from flexmore_ray.scores import load_tasks
from flexmore_ray.spec import MixtureSpec
from search.objective import Objective

FEW = ("nano_order", "nano_animals", "nano_arithmetic")
DOCUMENTS = 200
"""Of every split of a nano task."""

MIXTURE = PlannedMixture(
    name="trial-0",
    spec=MixtureSpec(ranks={"math": 4}, active=2, mixture_id="1234"),
    active=2,
    parameters=99,
    full_parameters=999,
    kept=("public", "math"),
    highest_rank=4,
    uses_factors=True,
    pair=None,
    rank=None,
)


class Guesser(LM):
    """Answers by a hash of the request: quick, and the same in every process."""

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(-9 * random.Random(repr(r.args)).random(), random.Random(r.args[1]).random() < 0.3) for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(len(r.args[0])) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return [random.Random(r.args[0]).choice(["cat", "yes", "no", "7", "first"]) for r in requests]


def objective(folder, tasks=FEW, **changes) -> Objective:
    options = {"seed": 1234, "limit": None, "test_limit": None, "rungs": 3, "reduction": 3, "dtype": "float32"}
    return Objective(tasks, results=folder, **(options | changes))


def blocks_of(made: Objective, upto: int | None = None):
    return [block for blocks in made.rungs[:upto] for block in blocks]


def documents_of(made: Objective, task: str, upto: int | None = None) -> list[int]:
    return [d for block in blocks_of(made, upto) if block.task == task for d in block.documents]


def fill(made: Objective, blocks, lm=None, mixture=MIXTURE) -> None:
    """Score some blocks and keep them."""
    for block in blocks:
        made.take(mixture, block, made.task(block).score(lm or Guesser(), block.documents), "w")


# --- documents --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return objective(tmp_path_factory.mktemp("results"), ("nano",))


def test_rungs_of_the_nano_suite(nano):
    assert nano.num_rungs == 3
    assert nano.sizes == [23, 67, 200]
    assert len(nano.sets["validation"].tasks) == 14
    assert [nano.documents(rung) for rung in range(3)] == [14 * size for size in nano.sizes]
    assert nano.test_documents == 14 * DOCUMENTS
    assert nano.halved == []
    for blocks in nano.rungs:
        assert [block.task for block in blocks] == list(nano.sets["validation"].tasks)


def test_tasks_have_orders_of_their_own(nano):
    orders = {tuple(documents_of(nano, task, 1)) for task in nano.sets["test"].tasks}
    assert len(orders) == 14
    assert all(order != tuple(range(23)) for order in orders)


@given(
    limit=st.none() | st.integers(1, 250),
    test_limit=st.none() | st.integers(1, 250),
    rungs=st.integers(1, 6),
    reduction=st.integers(2, 5),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_are_disjoint_nested_and_one_order(nano, tmp_path, limit, test_limit, rungs, reduction, seed):
    made = objective(tmp_path, FEW[:1], limit=limit, test_limit=test_limit, rungs=rungs, reduction=reduction, seed=seed)
    task, last = FEW[0], min(limit or DOCUMENTS, DOCUMENTS)
    chosen = documents_of(made, task)
    assert len(chosen) == len(set(chosen)) == last == made.sizes[-1]
    assert made.num_rungs == len(made.rungs) == min(rungs, max(k for k in range(1, 9) if reduction ** (k - 1) <= last))
    for rung in range(made.num_rungs):
        so_far = documents_of(made, task, rung + 1)
        assert (
            len(so_far)
            == made.documents(rung)
            == made.sizes[rung]
            == -(-last // reduction ** (made.num_rungs - 1 - rung))
        )
        assert len(made.rungs[rung]) <= 1
    longer = documents_of(nano, task, 1)
    assert set(chosen) <= set(longer) or set(longer) <= set(chosen)
    (test,) = made.test
    assert len(test.documents) == made.test_documents == min(test_limit or DOCUMENTS, DOCUMENTS)
    for block in (*blocks_of(made), test):
        assert list(block.documents) == sorted(block.documents)
        whole = len(block.documents) == DOCUMENTS
        assert (block.selection == "") == whole


def test_equal_names_mean_equal_documents(tmp_path):
    """A cell's identity has a block's name, so searches of other limits, rungs and seeds must agree on it."""
    found = {}
    for limit, rungs, reduction, seed in itertools.product((None, 9, 67), (1, 3), (2, 3), (0, 1234)):
        made = objective(tmp_path, FEW[:2], limit=limit, test_limit=limit, rungs=rungs, reduction=reduction, seed=seed)
        for block in (*blocks_of(made), *made.test):
            name = (block.task, block.split, block.selection)
            assert found.setdefault(name, block.documents) == block.documents
    assert len(found) > 30


def test_scores_at_a_rung_are_of_the_same_documents_for_all(tmp_path):
    one, other = objective(tmp_path, limit=50), objective(tmp_path / "else", limit=50, seed=7)
    assert [[b.documents for b in blocks] for blocks in one.rungs] == [
        [b.documents for b in blocks] for blocks in other.rungs
    ]


@pytest.mark.parametrize(("limit", "rungs", "sizes"), [(1, 3, [1]), (2, 3, [2]), (3, 3, [1, 3]), (9, 4, [1, 3, 9])])
def test_tiny_limits_have_fewer_rungs(tmp_path, limit, rungs, sizes):
    made = objective(tmp_path, limit=limit, rungs=rungs)
    assert made.sizes == sizes
    assert [made.documents(rung) for rung in range(made.num_rungs)] == [3 * size for size in sizes]
    assert all(blocks for blocks in made.rungs)


def test_bad_numbers_name_their_option(tmp_path):
    for option, value in {"limit": 0, "test_limit": 0, "rungs": 0, "reduction": 1}.items():
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: at least {value + 1}, got {value}"):
            objective(tmp_path, **{option: value})


def test_unknown_tasks_are_named(tmp_path):
    with pytest.raises(UsageError, match="nano_order"):
        objective(tmp_path, ("nano_ordre",))


# --- cells and scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """The embedded mixture at low ranks, with a harness around it."""
    mixture = load_mixture(
        MixtureSpec(source=("zoo://nano",), ranks={"math": 4, "academic": 1, "news": "drop"}, active=3)
    )
    return mixture, MixtureLM(mixture.model, mixture.tokenizer)


def test_scores_of_blocks_are_the_score_of_the_whole(tmp_path, real):
    _, lm = real
    made = objective(tmp_path, limit=40)
    whole = load_tasks(list(FEW), split="validation")
    for rung, blocks in enumerate(made.rungs):
        fill(made, blocks, lm)
        found = made.scores("1234", rung)
        for name, task in found.tasks.items():
            at_once = whole.tasks[name].score(lm, documents_of(made, name, rung + 1))
            assert (task.value, task.stderr, task.metrics) == (at_once.value, at_once.stderr, at_once.metrics)
            assert task.samples == at_once.samples
            assert task.documents == made.sizes[rung]
            assert 0 <= task.value <= 1
        assert found.score == sum(found.groups.values()) / len(found.groups)
    assert list(found.tasks) == list(FEW)
    assert max(task.value for task in found.tasks.values()) > 0


def test_all_documents_in_one_block_are_the_cell_that_eval_writes(tmp_path, real):
    mixture, lm = real
    made = objective(tmp_path, FEW[:1], rungs=1)
    (block,) = made.rungs[0]
    assert made.task(block).content_hash == load_tasks([FEW[0]], split="validation").tasks[FEW[0]].content_hash
    (cell,) = evaluate(mixture, load_tasks([FEW[0]], split="validation"), tmp_path, lm)
    mixture_id = mixture.spec.mixture_id
    assert made.known(mixture_id, [block])
    found = made.scores(mixture_id, 0).tasks[FEW[0]]
    assert (found.value, found.stderr, found.documents) == (cell.value, cell.stderr, DOCUMENTS)


def test_held_scores_and_cells_are_the_same(tmp_path, real):
    made = objective(tmp_path, limit=30, test_limit=10)
    fill(made, [*blocks_of(made), *made.test], real[1])
    held = [made.scores("1234", rung) for rung in range(3)], made.test_scores("1234")
    made.release("1234")
    again = [made.scores("1234", rung) for rung in range(3)], made.test_scores("1234")
    assert again == held
    fresh = objective(tmp_path, limit=30, test_limit=10)
    assert ([fresh.scores("1234", rung) for rung in range(3)], fresh.test_scores("1234")) == held
    assert len({scores.score for scores in held[0]}) > 1
    assert held[1].tasks[FEW[0]].split == "test"


def test_cells_say_what_they_are(tmp_path):
    made = objective(tmp_path, limit=30)
    fill(made, made.rungs[0])
    rows = read_cells(tmp_path).to_pylist()
    assert len(rows) == 3
    assert {(row["mixture_id"], row["active"], row["parameters"]) for row in rows} == {("1234", 2, 99)}
    assert {row["documents"] for row in rows} == {4}
    assert {row["group"] for row in rows} == {made.task(block).group.name for block in made.rungs[0]}
    assert all('"selection": "random ' in row["versions"] for row in rows)
    assert all(has_cell(tmp_path, made.key("1234", block)) for block in made.rungs[0])


def test_known_means_that_every_cell_is_there(tmp_path):
    made = objective(tmp_path, limit=30)
    first, second = made.rungs[:2]
    assert not made.known("1234", first)
    fill(made, first[:-1])
    assert not made.known("1234", first)
    fill(made, first[-1:])
    assert made.known("1234", first)
    assert not made.known("1234", second)
    assert not made.known("1234", [*first, *second])
    assert not made.known("99", first)
    assert not made.known("1234", made.test)
    assert made.known("1234", [])
    key = made.key("1234", first[0])
    (tmp_path / "samples" / f"{key.cell}.parquet").unlink()
    assert not made.known("1234", first)


def test_a_failed_cell_is_not_known(tmp_path):
    made = objective(tmp_path, limit=30)
    block = made.rungs[0][0]
    commit_cell(tmp_path, made.key("1234", block), None, mixture={}, active=2, parameters=1, error="it broke")
    assert not made.known("1234", [block])


def test_a_search_with_more_documents_uses_no_part_of_another_by_mistake(tmp_path):
    few, many = objective(tmp_path, limit=10), objective(tmp_path, limit=100)
    fill(few, blocks_of(few))
    keys = {few.key("1234", block).cell for block in blocks_of(few)}
    for block in (*blocks_of(many), *many.test):
        if many.key("1234", block).cell in keys:
            assert any(block == other for other in blocks_of(few))
    with pytest.raises(FlexmoreError, match="cells"):
        many.scores("1234", 1)


def test_a_block_of_one_split_is_not_one_of_the_other(tmp_path):
    made = objective(tmp_path, FEW[:1], rungs=1)
    (validation,), (test,) = made.rungs[0], made.test
    assert validation.selection == test.selection == ""
    assert made.key("1", validation).cell != made.key("1", test).cell
    assert made.key("1", validation) == cell_key("1", "float32", made.task(validation))
    assert dataclasses.replace(made.key("1", test), selection="x").cell != made.key("1", test).cell


# --- tasks without one of the splits ----------------------------------------------------------------------

DATA = """
import datasets

def load(count=24, splits=("train", "validation", "test"), **_):
    def split(name):
        rows = [{"question": f"{name} {i}", "choices": ["a", "b", "c"], "label": i % 3} for i in range(count)]
        return datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({name: split(name) for name in splits})
"""
TASK = """
task: {name}
dataset_path: local
custom_dataset: !function data.load
dataset_kwargs: {{count: {count}, splits: [{splits}]}}
{splits_as}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def write_task(folder, name, splits, count=24):
    (folder / "data.py").write_text(DATA)
    splits_as = "\n".join(f"{'training' if s == 'train' else s}_split: {s}" for s in splits)
    text = TASK.format(name=name, count=count, splits=", ".join(splits), splits_as=splits_as)
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


@pytest.mark.parametrize("count", [2, 3, 24, 25])
@pytest.mark.parametrize("limit", [None, 1, 7, 99])
def test_without_a_test_split_the_validation_documents_are_halved(tmp_path, count, limit):
    file = write_task(tmp_path, "held_out", ["validation"], count)
    made = objective(tmp_path / "r", [file], limit=limit, test_limit=limit)
    assert made.halved == ["held_out"]
    chosen, (test,) = documents_of(made, "held_out"), made.test
    assert not set(chosen) & set(test.documents)
    assert set(chosen) | set(test.documents) <= set(range(count))
    assert len(chosen) == min(limit or count, count // 2)
    assert len(test.documents) == min(limit or count, count - count // 2)
    assert all(block.selection for block in (*blocks_of(made), test))
    everything = objective(tmp_path / "r", [file], rungs=2)
    assert set(documents_of(everything, "held_out")) | set(everything.test[0].documents) == set(range(count))
    assert set(test.documents) <= set(everything.test[0].documents)
    fill(made, [*blocks_of(made), test])
    last = made.num_rungs - 1
    assert [s.doc_id for s in made.scores("1234", last).tasks["held_out"].samples] == sorted(chosen)
    assert [s.doc_id for s in made.test_scores("1234").tasks["held_out"].samples] == list(test.documents)


def test_one_document_is_too_few(tmp_path):
    file = write_task(tmp_path, "held_out", ["validation"], 1)
    with pytest.raises(UsageError, match="task held_out: one document is too few to choose by and to report on"):
        objective(tmp_path / "r", [file])


def test_one_document_per_split_is_enough(tmp_path):
    file = write_task(tmp_path, "tiny", ["validation", "test"], 1)
    made = objective(tmp_path / "r", [file])
    assert (made.num_rungs, made.documents(0), made.test_documents) == (1, 1, 1)


def test_tasks_of_different_sizes_share_rungs(tmp_path):
    sizes = {"small": 2, "middle": 9, "large": 90}
    files = [write_task(tmp_path, name, ["validation", "test"], count) for name, count in sizes.items()]
    (tmp_path / "data.py").write_text(DATA)
    made = objective(tmp_path / "r", files)
    assert made.sizes == [10, 30, 90]
    for name, count in sizes.items():
        found = [len(documents_of(made, name, rung + 1)) for rung in range(3)]
        assert found == [-(-count // 9), -(-count // 3), count]
        assert sorted(documents_of(made, name)) == list(range(count))
    assert [block.task for block in made.rungs[1]] == ["middle", "large"]
    fill(made, blocks_of(made))
    for rung in range(3):
        assert list(made.scores("1234", rung).tasks) == list(sizes)


def test_without_a_validation_split_the_way_out_is_said(tmp_path):
    files = [write_task(tmp_path, "fine", ["validation", "test"]), write_task(tmp_path, "only_test", ["test"])]
    with pytest.raises(UsageError) as caught:
        objective(tmp_path / "r", files)
    said = str(caught.value)
    assert said.startswith("task only_test has no validation split, and a search must not choose by its test split")
    assert "validation_split" in said
    assert "leave it out" in said


def test_other_errors_of_tasks_stay_what_they_are(tmp_path):
    path = write_task(tmp_path, "broken", ["validation"])
    path.write_text(path.read_text().replace("data.load", "data.gone"))
    with pytest.raises(TaskError, match="task broken"):
        objective(tmp_path / "r", [path])
