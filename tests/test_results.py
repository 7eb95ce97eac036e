"""Scores against `lm_eval.simple_evaluate`, and results on disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
from pathlib import Path

import lm_eval
import pyarrow.parquet as pq
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from flexmore_ray import results
from flexmore_ray.errors import FlexmoreError, TaskError, UsageError
from flexmore_ray.results import CellKey, commit_cell, has_cell, parse_samples, read_cell, read_cells, read_samples
from flexmore_ray.scores import PREFERRED_METRICS, iter_shards, load_tasks, score

DATA = """
import random
import datasets

def load(seed=0, splits=("train", "validation", "test"), **_):
    def split(name):
        rng = random.Random(f"{seed} {name}")
        rows = []
        for i in range(24):
            a, b = rng.randrange(50), rng.randrange(50)
            wrong = [a + b + d for d in (1, 10, 7)]
            choices = [str(c) for c in [a + b, *wrong]]
            label = rng.randrange(4)
            choices[0], choices[label] = choices[label], choices[0]
            rows.append({"question": f"{a}+{b}", "choices": choices, "label": label, "answer": str(a + b)})
        return datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({name: split(name) for name in splits})

def either(doc):
    return [f"{doc['question']} is {c}" for c in doc["choices"]]
"""

SPLITS = "training_split: train\nvalidation_split: validation\ntest_split: test\n"
COMMON = "dataset_path: local\ncustom_dataset: !function data.load\nmetadata: {version: 3}\n"
CHOICES = (
    'output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\ndoc_to_text: "Q: {{question}}\\nA:"\n'
)
METRIC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
TASKS = {
    "sums": SPLITS + CHOICES + "num_fewshot: 2\nfewshot_split: train\nmetric_list:\n"
    "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    "  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}\n",
    "contexts": SPLITS + "output_type: multiple_choice\ndoc_to_text: label\ndoc_to_choice: !function data.either\n"
    "doc_to_target: '!'\n" + METRIC,
    "spoken": SPLITS + "output_type: generate_until\ndoc_to_text: '{{question}}='\ndoc_to_target: answer\n"
    "num_fewshot: 3\nfewshot_config: {sampler: first_n, split: train}\nrepeats: 1\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 6}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]\n"
    "filter_list:\n  - {name: digits, filter: [{function: regex, regex_pattern: '([0-9])'}, {function: take_first}]}\n"
    "  - {name: raw, filter: [{function: take_first}]}\n",
    "last_word": SPLITS + "output_type: loglikelihood\ndoc_to_text: '{{question}} ='\ndoc_to_target: ' {{answer}}'\n"
    "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
    "held_out": "validation_split: validation\ndataset_kwargs: {splits: [validation]}\nnum_fewshot: 1\n"
    + CHOICES
    + METRIC,
    "sampled": "validation_split: validation\ntest_split: test\nnum_fewshot: 1\n" + CHOICES + METRIC,
    "only_test": "test_split: test\ndataset_kwargs: {splits: [test]}\n" + CHOICES + METRIC,
    "surprise": "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: question\n"
    "metric_list: [{metric: byte_perplexity}]\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of lm-eval tasks of every kind, with data made in memory."""
    path = tmp_path_factory.mktemp("suite")
    (path / "data.py").write_text(DATA)
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{text}")
    return path


def pick(folder, *names):
    return [folder / f"{name}.yaml" for name in names]


class Guesser(LM):
    """Answers by a hash of the request: quick, the same in every process, right now and then."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += len(requests)
        return [(-9 * random.Random(repr(r.args)).random(), random.Random(r.args[1]).random() < 0.3) for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(len(r.args[0])) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return [str(random.Random(r.args[0]).choice([3, 47, 50, 61])) for r in requests]


FOUR = ("sums", "contexts", "spoken", "last_word")


@pytest.mark.parametrize("limit", [None, 7])
def test_scores_equal_simple_evaluate(folder, limit):
    ours = score(Guesser(), pick(folder, *FOUR), split="test", limit=limit)
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    theirs = lm_eval.simple_evaluate(model=Guesser(), tasks=list(FOUR), task_manager=manager, limit=limit)
    assert list(ours.tasks) == list(FOUR)
    for name, task in ours.tasks.items():
        expected = theirs["results"][name]
        for (metric, key), (value, stderr) in task.metrics.items():
            assert value == expected[f"{metric},{key}"]
            assert (stderr if stderr is not None else "N/A") == expected[f"{metric}_stderr,{key}"]
        assert task.documents == theirs["n-samples"][name]["effective"]
        correct = [sample["exact_match" if name == "spoken" else "acc"] for sample in theirs["samples"][name]]
        assert [float(sample.correct) for sample in task.samples] == correct[: task.documents]


def test_primary_metric_filter_groups_and_score(folder):
    scores = score(Guesser(), pick(folder, *FOUR), split="validation")
    assert {name: (task.metric, task.filter) for name, task in scores.tasks.items()} == {
        "sums": ("acc", "none"),
        "contexts": ("acc", "none"),
        "spoken": ("exact_match", "digits"),
        "last_word": ("acc", "none"),
    }
    assert PREFERRED_METRICS[0] == "acc"
    means = [task.value for task in scores.tasks.values()]
    assert scores.score == pytest.approx(sum(means) / 4)
    summary = json.loads(json.dumps(scores.to_json()))
    assert summary["tasks"]["sums"] == scores.tasks["sums"].value
    assert summary["groups"] == scores.groups
    assert "average of groups" in scores.table()


def test_groups_are_means_of_tasks_whatever_their_number(folder, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "groups:\n  one: {kind: knowledge, tasks: [sums]}\n  two: {kind: reasoning, tasks: [contexts, spoken]}\n"
    )
    (tmp_path / "s").symlink_to(folder)
    scores = load_tasks(tmp_path / "s.yaml").score(Guesser())
    values = {name: task.value for name, task in scores.tasks.items()}
    assert scores.groups == {"one": values["sums"], "two": (values["contexts"] + values["spoken"]) / 2}
    assert scores.score == sum(scores.groups.values()) / 2
    assert scores.kinds == {"one": "knowledge", "two": "reasoning"}


def test_splits_differ_and_are_named(folder):
    loaded = {split: load_tasks(pick(folder, "sums"), split=split).tasks["sums"] for split in ("validation", "test")}
    hashes = {split: set(task.hashes.values()) for split, task in loaded.items()}
    assert not hashes["validation"] & hashes["test"]
    assert {split: task.split for split, task in loaded.items()} == {"validation": "validation", "test": "test"}
    assert loaded["test"].content_hash != loaded["validation"].content_hash
    assert load_tasks(pick(folder, "held_out"), split="test").tasks["held_out"].split == "validation"


@pytest.mark.parametrize("name", ["held_out", "sampled"])
def test_few_shot_examples_never_hold_the_document(folder, name):
    task = load_tasks(pick(folder, name)).tasks[name]
    for requests in task.documents.values():
        doc = requests[0].doc
        assert requests[0].args[0].count("Q: ") == 2
        assert requests[0].args[0].count(f"Q: {doc['question']}\n") == 1


def test_shards_merge_to_the_whole_exactly(folder):
    tasks = load_tasks(pick(folder, *FOUR)).tasks
    for task in tasks.values():
        whole = task.score(Guesser())
        for shards in (1, 3, 24):
            parts = [task.score(Guesser(), ids) for ids in iter_shards(task, shards)]
            assert len(parts) == shards
            merged = task.merge(parts[::-1])
            assert dataclasses.replace(merged, seconds=0) == dataclasses.replace(whole, seconds=0)
        with pytest.raises(TaskError, match="disjoint"):
            task.merge([whole, whole])
        with pytest.raises(TaskError, match="documents 0 to 23"):
            task.score(Guesser(), [24])


def test_tasks_built_once_score_often(folder):
    tasks, lm = load_tasks(pick(folder, "sums")), Guesser()
    first, second = tasks.score(lm), tasks.score(lm)
    assert first.tasks["sums"].samples == second.tasks["sums"].samples
    assert lm.asked == 2 * 24 * 4


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("only_test", "validation", "has no validation split, only test: use --split test"),
        ("surprise", "test", "lower is better"),
    ],
)
def test_tasks_that_cannot_be_scored_say_why(folder, name, split, message):
    with pytest.raises(TaskError, match=message):
        load_tasks(pick(folder, name), split=split)


@pytest.mark.parametrize("bad", [{"split": "train"}, {"limit": 0}])
def test_bad_selections_are_refused(folder, bad):
    with pytest.raises(UsageError, match="must be"):
        load_tasks(pick(folder, "sums"), **bad)


def test_too_few_examples_are_noticed(folder, monkeypatch):
    from lm_eval.api.samplers import FirstNSampler

    monkeypatch.setattr(FirstNSampler, "sample", lambda self, n, **_: self.df[: n - 1])
    with pytest.raises(TaskError, match=r"3 examples asked for, lm-eval used \[2\]"):
        load_tasks(pick(folder, "spoken"))


def test_a_failing_document_is_named(folder):
    task = load_tasks(pick(folder, "sums")).tasks["sums"]
    broken = {**task.documents, 5: task.documents[5][:3]}
    with pytest.raises(TaskError, match="task sums, document 5: "):
        dataclasses.replace(task, documents=broken).score(Guesser())


# --- files ---


def key_of(**changes) -> CellKey:
    fields = {"mixture_id": "m", "dtype": "float32", "task": "sums", "task_version": "3", "num_fewshot": 2}
    return CellKey(**(fields | {"split": "test", "limit": None, "seed": 1} | changes))


def commit(root, scored, key=None, **changes):
    options = {"mixture": {"ranks": {"a": 4}}, "active": 2, "parameters": 10} | changes
    return commit_cell(root, key or key_of(), scored, **options)


@pytest.fixture
def scored(folder):
    return load_tasks(pick(folder, "sums"), split="test").tasks["sums"].score(Guesser())


def test_a_cell_reads_back_as_written(tmp_path, scored):
    key = key_of()
    assert not has_cell(tmp_path, key)
    assert read_cells(tmp_path).num_rows == 0
    assert commit(tmp_path, scored) == key.cell
    assert has_cell(tmp_path, key)
    row = read_cell(tmp_path, key)
    assert row == read_cells(tmp_path).to_pylist()[0]
    assert list(row) == results.CELL_SCHEMA.names
    assert (row["value"], row["stderr"], row["documents"], row["status"]) == (scored.value, scored.stderr, 24, "done")
    assert json.loads(row["mixture"]) == {"ranks": {"a": 4}}
    assert json.loads(row["versions"])["identity"] == key.to_dict()
    samples = read_samples(tmp_path).to_pylist()
    assert [sample["doc_id"] for sample in samples] == list(range(24))
    for sample, origin in zip(samples, scored.samples, strict=True):
        assert json.loads(sample["responses"]) == origin.responses
        assert {(m, f): value for m, f, value in json.loads(sample["metrics"])} == origin.metrics
        assert (sample["correct"], sample["target"]) == (origin.correct, origin.target)


def test_every_part_of_the_identity_counts():
    cells = {key_of().cell}
    for name in (field.name for field in dataclasses.fields(CellKey)):
        value = getattr(key_of(), name)
        cells.add(key_of(**{name: f"{value}x" if isinstance(value, str) else (value or 0) + 1}).cell)
    assert len(cells) == 1 + len(dataclasses.fields(CellKey))
    assert key_of().cell == "462382e67e896954f6daf2cf65dffe95"


def test_a_selection_is_named_only_where_there_is_one():
    whole, part = key_of(), key_of(selection="random 7 0:9")
    assert "selection" not in whole.to_dict()
    assert {**whole.to_dict(), "selection": ""} == dataclasses.asdict(whole)
    assert part.to_dict() == dataclasses.asdict(part)
    assert len({whole.cell, part.cell, key_of(selection="random 7 0:10").cell}) == 3


def test_a_part_is_a_cell_of_its_own(tmp_path, folder, scored):
    part = load_tasks(pick(folder, "sums"), split="test").tasks["sums"].score(Guesser(), [3, 4, 20])
    key = key_of(selection="some")
    commit(tmp_path, part, key)
    assert not has_cell(tmp_path, key_of())
    commit(tmp_path, scored)
    assert {row["documents"] for row in read_cells(tmp_path).to_pylist()} == {3, 24}
    assert json.loads(read_cell(tmp_path, key)["versions"])["identity"]["selection"] == "some"
    assert parse_samples(read_samples(tmp_path, [key.cell])) == part.samples


@pytest.mark.parametrize("name", FOUR)
def test_samples_read_back_make_the_same_score(folder, tmp_path, name):
    task = load_tasks(pick(folder, name), split="test").tasks[name]
    whole = task.score(Guesser())
    parts = []
    for i, ids in enumerate(iter_shards(task, 3)):
        key = key_of(task=name, selection=str(i))
        commit(tmp_path, task.score(Guesser(), ids), key)
        parts.append(task.aggregate(parse_samples(read_samples(tmp_path, [key.cell])), 1.0))
    found = task.merge(parts)
    assert found.samples == whole.samples
    assert found.metrics == whole.metrics
    assert (found.value, found.stderr, found.documents) == (whole.value, whole.stderr, 24)
    assert [list(sample.metrics) for sample in found.samples] == [list(sample.metrics) for sample in whole.samples]


def test_samples_with_infinite_numbers_and_strange_texts_read_back(tmp_path, scored):
    strange = [[-math.inf, False], "\u2028 \U0001f600 \x00 \n", 1e-300]
    samples = [dataclasses.replace(sample, responses=strange, correct=None) for sample in scored.samples]
    cell = commit(tmp_path, dataclasses.replace(scored, samples=samples))
    assert parse_samples(read_samples(tmp_path, [cell])) == samples
    assert parse_samples(read_samples(tmp_path, [])) == []


def test_failed_cells_are_kept_but_not_done(tmp_path, scored):
    commit(tmp_path, None, group="g", error="it broke")
    assert not has_cell(tmp_path, key_of())
    row = read_cell(tmp_path, key_of())
    assert (row["status"], row["error"], row["group"], row["value"]) == ("failed", "it broke", "g", None)
    assert read_samples(tmp_path).num_rows == 0
    commit(tmp_path, scored)
    assert has_cell(tmp_path, key_of())
    assert read_cells(tmp_path).num_rows == 1


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_before_a_rename_leaves_no_cell(tmp_path, scored, monkeypatch, renames):
    """Killed before the samples (0) or the cell (1) get their names: nothing is visible."""
    rename, done = results.os.replace, []

    class Killed(BaseException):
        pass

    def dying(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(results.os, "replace", dying)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not clean up
    with pytest.raises(Killed):
        commit(tmp_path, scored)
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.tmp"))
    assert not has_cell(tmp_path, key_of())
    assert read_cells(tmp_path).num_rows == read_samples(tmp_path).num_rows == 0
    commit(tmp_path, scored)
    assert read_samples(tmp_path).num_rows == 24


def test_a_full_disk_ends_in_one_line_and_no_file(tmp_path, scored, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(FlexmoreError, match="No space left on device") as caught:
        commit(tmp_path, scored)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_is_a_file_is_refused(tmp_path, scored):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FlexmoreError, match="cannot write results to"):
        commit(tmp_path / "taken", scored)


def test_a_damaged_file_is_named(tmp_path, scored):
    cell = commit(tmp_path, scored)
    path = tmp_path / "cells" / f"{cell}.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FlexmoreError, match=cell):
        read_cells(tmp_path)


def test_files_are_plain_parquet(tmp_path, scored):
    cell = commit(tmp_path, scored)
    assert pq.read_table(tmp_path / "samples" / f"{cell}.parquet").num_rows == 24
    assert math.isfinite(pq.read_table(tmp_path / "cells")["value"][0].as_py())
