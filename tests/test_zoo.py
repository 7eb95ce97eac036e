"""The embedded mixture: its generators, task data, tokenizer, weights and recorded scores."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, FlexOlmoForCausalLM

from flexmore_ray.errors import UsageError
from flexmore_ray.router import fit_rows, gather_moments
from flexmore_ray.texts import batch_texts, read_texts
from flexmore_ray.zoo import domain_text, write_domain_text, write_pair, zoo_path
from flexmore_ray.zoo.domains import EXPERTS, SPLITS, TOPICS, FactTopic, training_lines
from flexmore_ray.zoo.measure import GROUPS, SUITE, read_rows, score_task, set_active
from flexmore_ray.zoo.tasks import task_rows
from flexmore_ray.zoo.tokenizer import CHARACTERS, encode

ALL_TOPICS = [topic for expert in EXPERTS for topic in TOPICS[expert]]
TASKS = [topic.task for topic in ALL_TOPICS]

# --- generators and task data ---


def generated_digest() -> str:
    digest = hashlib.sha256()
    for expert in EXPERTS:
        digest.update(repr(domain_text(expert, 300)).encode())
        for topic in TOPICS[expert]:
            digest.update(repr(task_rows(topic, "test")).encode())
    return digest.hexdigest()


def test_generators_give_the_same_in_every_process() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_zoo"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(test_zoo.generated_digest())"],
        env=os.environ | {"PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == generated_digest()


@pytest.mark.parametrize("topic", ALL_TOPICS, ids=TASKS)
def test_committed_data_is_what_the_generator_makes(topic: Any) -> None:
    for split in SPLITS:
        assert read_rows(topic.task, split) == task_rows(topic, split)


@pytest.mark.parametrize("topic", ALL_TOPICS, ids=TASKS)
def test_splits_are_disjoint_and_complete(topic: Any) -> None:
    contexts = {split: {row["context"] for row in read_rows(topic.task, split)} for split in SPLITS}
    assert [len(contexts[split]) for split in SPLITS] == [200, 200, 200]
    for one, other in itertools.combinations(SPLITS, 2):
        assert not contexts[one] & contexts[other]


@pytest.mark.parametrize("expert", EXPERTS)
def test_training_text_holds_no_evaluation_document(expert: str) -> None:
    held_out = {row["context"] for task in TASKS for split in ("validation", "test") for row in read_rows(task, split)}
    assert not held_out & {line.context for line in islice(training_lines(expert), 20000)}


def test_domain_facts_are_in_no_other_domain() -> None:
    for expert in EXPERTS:
        text = "".join(domain_text(expert, 4000))
        for other in EXPERTS:
            for topic in TOPICS[other] if other != expert else []:
                subjects = topic.subjects if isinstance(topic, FactTopic) else ()
                assert not [subject for subject in subjects if subject in text]


def test_every_file_is_small_and_every_context_short() -> None:
    data = SUITE / "data"
    assert sum(file.stat().st_size for file in data.iterdir()) < 2_000_000
    rows = [row for task in TASKS for split in SPLITS for row in read_rows(task, split)]
    assert max(len(row["context"]) for row in rows) < 80
    assert {character for row in rows for character in row["context"] + row["answer"]} <= set(CHARACTERS)


# --- every answer, worked out another way ---


def arithmetic(context: str) -> str:
    return str(eval(context.removeprefix("= ").removesuffix("=")))


def program(context: str) -> str:
    *lines, asked = context.removeprefix(">>> ").removesuffix(":").split(";")
    names: dict[str, int] = {}
    exec("\n".join(lines), {}, names)
    return str(names[asked])


def string(context: str) -> str:
    return eval(context.removeprefix(">>> ").removesuffix(" :"))


def sequence(context: str) -> str:
    terms = [int(term) for term in context.removeprefix("= ").removesuffix(" next:").split()]
    steps = {b - a for a, b in itertools.pairwise(terms)}
    if len(steps) == 1:
        return str(terms[-1] + steps.pop())
    if all(b == 2 * a for a, b in itertools.pairwise(terms)):
        return str(2 * terms[-1])
    assert all(c == a + b for a, b, c in zip(terms, terms[1:], terms[2:], strict=False))
    return str(terms[-1] + terms[-2])


def order(context: str) -> str:
    *facts, question = context.removeprefix("[1] ").removesuffix(":").split()
    letters = sorted({letter for fact in facts for letter in fact if letter.isalpha()})
    answers = set()
    for ranking in itertools.permutations(letters):
        place = {letter: index for index, letter in enumerate(ranking)}
        if all((place[f[0]] > place[f[2]]) == (f[1] == ">") for f in facts):
            answers.add(ranking[-1] if question == "max" else ranking[0])
    assert len(answers) == 1
    return answers.pop()


def syllogism(context: str) -> str:
    """Try every way to fill the eight regions of three classes, with none of the classes empty."""
    stated = re.findall(r"(all|no) (\w) are (\w)", context)
    asked = re.search(r"is (\w) (\w):$", context)
    assert asked is not None
    assert len(stated) == 2
    names = sorted({name for _, *pair in stated for name in pair})
    regions = list(itertools.product((False, True), repeat=3))
    found = set()
    for filled in itertools.product((False, True), repeat=8):
        members = [dict(zip(names, region, strict=True)) for region, full in zip(regions, filled, strict=True) if full]
        if not all(any(m[name] for m in members) for name in names):
            continue
        holds = {
            "all": lambda a, b, m=members: all(x[b] for x in m if x[a]),
            "no": lambda a, b, m=members: not any(x[a] and x[b] for x in m),
        }
        if all(holds[kind](a, b) for kind, a, b in stated):
            found.add((holds["all"](*asked.groups()), holds["no"](*asked.groups())))
    if all(yes for yes, _ in found):
        return "yes"
    return "no" if all(no for _, no in found) else "open"


SOLVERS = {
    "nano_arithmetic": arithmetic,
    "nano_program": program,
    "nano_strings": string,
    "nano_sequence": sequence,
    "nano_order": order,
    "nano_syllogism": syllogism,
}


@pytest.mark.parametrize("task", SOLVERS)
def test_reasoning_answers_are_right(task: str) -> None:
    for split in SPLITS:
        for row in read_rows(task, split)[:: 10 if task == "nano_syllogism" else 1]:
            assert SOLVERS[task](row["context"]) == row["answer"], row["context"]


@pytest.mark.parametrize("topic", [t for t in ALL_TOPICS if isinstance(t, FactTopic)], ids=lambda t: t.task)
def test_facts_do_not_contradict_each_other(topic: FactTopic) -> None:
    for split in SPLITS:
        for row in read_rows(topic.task, split):
            subjects = [subject for subject in topic.subjects if subject in row["context"]]
            assert [topic.table[subject] for subject in subjects] == [row["answer"]]


@pytest.mark.parametrize("topic", [t for t in ALL_TOPICS if t.multiple_choice], ids=lambda t: t.task)
def test_choices_hold_the_answer_once(topic: Any) -> None:
    for split in SPLITS:
        rows = read_rows(topic.task, split)
        for row in rows:
            assert row["choices"][row["label"]] == row["answer"]
            assert len(set(row["choices"])) == len(row["choices"]) >= 3
        first = sum(row["label"] == 0 for row in rows) / len(rows)
        assert 0.1 < first < 0.5


# --- the suite as lm-eval sees it ---


def test_suite_lists_the_task_files_with_their_kind() -> None:
    suite = yaml.safe_load(SUITE.with_suffix(".yaml").read_text())
    assert suite["name"] == "nano"
    listed = [task for group in GROUPS.values() for task in group["tasks"]]
    assert sorted(listed) == sorted(TASKS) == sorted(file.stem for file in SUITE.glob("*.yaml"))
    assert {group["kind"] for group in GROUPS.values()} == {"knowledge", "reasoning"}
    for group in GROUPS.values():
        assert group["tasks"] == [topic.task for topic in TOPICS[group["domain"]]]


# --- weights ---


@pytest.fixture(scope="module")
def nano() -> Path:
    return zoo_path("nano")


@pytest.fixture(scope="module")
def record(nano: Path) -> dict[str, Any]:
    return json.loads((nano / "scores.json").read_text())


@pytest.fixture(scope="module")
def full(nano: Path) -> FlexOlmoForCausalLM:
    return FlexOlmoForCausalLM.from_pretrained(nano, dtype=torch.float32).eval()


def test_weights_are_small_and_complete(nano: Path) -> None:
    files = list(nano.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    config = json.loads((nano / "config.json").read_text())
    assert config["model_type"] == "flex_olmo"
    assert config["expert_names"] == list(EXPERTS)
    with safe_open(nano / "model.safetensors", "pt") as model:
        keys = set(model.keys())
        assert all(model.get_tensor(key).dtype == torch.bfloat16 for key in keys)
    for layer, expert in itertools.product(range(config["num_hidden_layers"]), range(config["num_experts"])):
        assert f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight" in keys


def test_tokenizer_round_trip(nano: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano)

    @given(st.text(alphabet=CHARACTERS, max_size=60))
    def round_trip(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids == encode(text)
        assert tokenizer.decode(ids) == text

    round_trip()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 1, 0)


@pytest.mark.parametrize("expert", EXPERTS[1:])
def test_pairs_share_everything_but_their_expert(nano: Path, tmp_path: Path, expert: str) -> None:
    pair = load_file(write_pair(expert, tmp_path / expert) / "model.safetensors")
    merged = load_file(nano / "model.safetensors")
    index = EXPERTS.index(expert)
    for key, tensor in pair.items():
        if key.endswith("gate.weight"):
            assert tensor.shape == (2, 128)
        else:
            assert torch.equal(tensor, merged[key.replace(".experts.1.", f".experts.{index}.")]), key
    rows = load_file(nano / "routers.safetensors")
    assert all(torch.equal(owner[:, 0], rows["math"][:, 0]) for owner in rows.values())


def test_write_pair_refuses_what_is_no_domain_expert(tmp_path: Path) -> None:
    for name in ("public", "poetry"):
        with pytest.raises(UsageError, match=name):
            write_pair(name, tmp_path / "pair")
    with pytest.raises(UsageError, match="micro"):
        zoo_path("micro")
    assert not (tmp_path / "pair").exists()


def test_domain_text_files_are_read_back(tmp_path: Path) -> None:
    write_domain_text("code", tmp_path / "code.txt", count=200)
    assert read_texts(tmp_path / "code.txt") == domain_text("code", 200)


def test_router_rows_come_from_the_domains_texts(nano: Path, tmp_path: Path, full: FlexOlmoForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano)
    moments = {}
    for expert in EXPERTS:
        folder = write_pair(expert if expert != "public" else "math", tmp_path / expert)
        model = FlexOlmoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if expert == "public":
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.mlp.experts.gate_up_proj[1] = layer.mlp.experts.gate_up_proj[0]
                    layer.mlp.experts.down_proj[1] = layer.mlp.experts.down_proj[0]
        moments[expert] = gather_moments(model, batch_texts(tokenizer, domain_text(expert, 400)))
    rows = fit_rows(moments).float()
    for layer, fitted in zip(full.model.layers, rows, strict=True):
        shipped = layer.mlp.gate.weight.detach()
        assert torch.nn.functional.cosine_similarity(shipped, fitted, dim=-1).min() > 0.8


# --- recorded scores ---


def test_experts_are_worth_having(record: dict[str, Any]) -> None:
    scores = {label: splits["test"] for label, splits in record["scores"].items()}
    for expert in EXPERTS[1:]:
        gains = [
            scores[f"public+{expert}"]["tasks"][topic.task] - scores["public"]["tasks"][topic.task]
            for topic in TOPICS[expert]
        ]
        assert max(gains) >= 0.2, expert
    for active in (2, 4, 7):
        assert scores[f"full-a{active}"]["score"] >= scores["public"]["score"] + 0.1


@pytest.mark.parametrize(("task", "active"), [("nano_program", 4), ("nano_mayors", 4), ("nano_order", 2)])
def test_recorded_scores_of_the_full_mixture_hold(
    record: dict[str, Any], full: FlexOlmoForCausalLM, task: str, active: int
) -> None:
    set_active(full, active)
    measured = score_task(full, task, "test")
    assert measured == pytest.approx(record["scores"][f"full-a{active}"]["test"]["tasks"][task], abs=0.011)


@pytest.mark.parametrize(("expert", "task"), [("code", "nano_program"), ("news", "nano_events")])
def test_recorded_scores_of_pairs_hold(record: dict[str, Any], tmp_path: Path, expert: str, task: str) -> None:
    model = FlexOlmoForCausalLM.from_pretrained(write_pair(expert, tmp_path), dtype=torch.float32).eval()
    measured = score_task(model, task, "test")
    assert measured == pytest.approx(record["scores"][f"public+{expert}"]["test"]["tasks"][task], abs=0.011)


def test_lm_eval_gives_the_recorded_scores(
    nano: Path,
    record: dict[str, Any],
    full: FlexOlmoForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    set_active(full, 4)
    tokenizer = AutoTokenizer.from_pretrained(nano)
    tasks = ["nano_slang", "nano_arithmetic"]
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=full, tokenizer=tokenizer, batch_size=64),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(SUITE), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    recorded = record["scores"]["full-a4"]["test"]["tasks"]
    assert results["results"]["nano_slang"]["acc,none"] == pytest.approx(recorded["nano_slang"], abs=0.011)
    assert results["results"]["nano_arithmetic"]["exact_match,none"] == pytest.approx(
        recorded["nano_arithmetic"], abs=0.011
    )
