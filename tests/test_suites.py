"""Suites as data, their names against lm-eval's registry, and tasks that cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from flexmore_ray.errors import TaskError, UsageError
from flexmore_ray.scores import _go_offline_if_unreachable, load_tasks
from flexmore_ray.suites import KINDS, lm_eval_tasks, load_suite, suite_names

SIZES = {"mc9": 9, "gen5": 5, "mmlu": 57, "mmlu_pro": 14, "bbh": 27, "agieval": 8}
TASK = "task: {}\ndataset_path: json\noutput_type: multiple_choice\n"


def write_tasks(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.yaml").write_text(TASK.format(name))
    return folder


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_published_suites_have_their_size(name, size):
    suite = load_suite(name)
    assert [group.name for group in suite.groups] == [name]
    assert len(suite.tasks) == len(set(suite.tasks)) == size


def test_paper_has_120_tasks_in_6_groups():
    suite = load_suite("paper")
    assert {group.name: len(group.tasks) for group in suite.groups} == SIZES
    assert len(set(suite.tasks)) == 120


def test_every_group_of_every_suite_has_a_kind():
    for name in suite_names():
        assert {group.kind for group in load_suite(name).groups} <= set(KINDS), name


def test_lm_eval_knows_every_published_name():
    from lm_eval.tasks import TaskManager

    registered = set(TaskManager().all_subtasks)
    for name in set(suite_names()) - {"nano"}:
        suite = load_suite(name)
        assert set(suite.tasks) <= registered, name
        assert not set(suite.missing) & registered, name
    assert registered <= set(lm_eval_tasks())  # the quick look-up finds what the slow index finds


def test_importing_the_suites_does_not_import_lm_eval():
    code = "import sys, flexmore_ray.suites as s; s.load_suite('paper'); sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_suites_tasks_and_duplicates_join():
    suite = load_suite("agieval, gsm8k,agieval_sat_math, mc9")
    assert [(group.name, len(group.tasks), group.kind) for group in suite.groups] == [
        ("agieval", 8, "reasoning"),
        ("gsm8k", 1, "reasoning"),
        ("mc9", 9, "knowledge"),
    ]
    assert load_suite(["agieval", "gsm8k,agieval_sat_math", "mc9"]).groups == suite.groups


def test_folders_task_files_and_suite_files(tmp_path):
    folder = write_tasks(tmp_path / "mine", "task_b", "task_a")
    (folder / "note.yaml").write_text("group: g\ntask:\n  - task_a\n")
    assert load_suite(folder).groups[0].tasks == ("task_a", "task_b")
    assert load_suite(str(folder / "task_b.yaml")).tasks == ("task_b",)
    (tmp_path / "mine.yaml").write_text(
        "include: [agieval]\ngroups: {x: {kind: reasoning, domain: math, tasks: [task_a, gsm8k]}}\n"
    )
    suite = load_suite(tmp_path / "mine.yaml")
    assert (suite.name, [group.name for group in suite.groups]) == ("mine", ["agieval", "x"])
    assert (suite.groups[1].domain, suite.groups[1].tasks) == ("math", ("task_a", "gsm8k"))
    assert folder.resolve() in suite.folders


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: {x: {kind: hard, tasks: [a]}}", "kind must be one of"),
        ("groups: {x: {kind: reasoning}}", "needs 'tasks'"),
        ("groups: {x: {kind: reasoning, tasks: [a], weight: 2}}", "knows"),
        ("tusks: [a]", "needs 'groups' or 'include'"),
        ("[a, b]", "got list"),
        ("groups: {", "not a YAML suite file"),
    ],
)
def test_bad_suite_files_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_suite(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("", "no tasks named"),
        ("no/such/folder", "no such suite file, task file or folder"),
        ("gsm8kk", "close matches: gsm8k"),
        ("nano_mayor", "close matches: nano_mayors"),
        ("mmlu_pr", "close matches: .*mmlu_pro"),
    ],
)
def test_unknown_names_are_refused_on_one_line(what, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_tasks(what)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no lm-eval task in folder"):
        load_suite(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    """A hub that does not answer, and no cached data."""
    import datasets
    import huggingface_hub

    def no_session():
        raise ConnectionError("no network")

    for module, flag in [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]:
        monkeypatch.setattr(module, flag, False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", no_session)
    _go_offline_if_unreachable.cache_clear()
    yield
    _go_offline_if_unreachable.cache_clear()


def test_missing_data_is_said_at_once(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    start = time.perf_counter()
    with pytest.raises(TaskError, match=r"task openbookqa: its data allenai/openbookqa .*cannot be had") as caught:
        load_tasks("openbookqa")
    assert "\n" not in str(caught.value)
    assert "HF_HOME" in str(caught.value)
    assert time.perf_counter() - start < 15
