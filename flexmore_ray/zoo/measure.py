"""Plain scores of a transformers model on the nano suite, used while the mixture is made.

Same prompts, choices and decoding as lm-eval gives for the task files; documents whose contexts have the same
length go through the model together, so there is no padding, and the choices of a question share its context.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import DynamicCache

from flexmore_ray.zoo.tokenizer import EOS_ID, PAD_ID, VOCAB, encode

SUITE = Path(__file__).parents[1] / "suites" / "nano"
GROUPS: dict[str, dict[str, Any]] = yaml.safe_load(SUITE.with_suffix(".yaml").read_text())["groups"]
_NEWLINE = VOCAB["\n"]
_MAX_NEW = 10


def read_rows(task: str, split: str) -> list[dict[str, Any]]:
    """Documents of one split of a task."""
    text = (SUITE / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def few_shot_prompt(task: str) -> str:
    """What comes before every question of a task: its first training documents, or nothing."""
    lines = (SUITE / f"{task}.yaml").read_text().splitlines()
    shots = next(int(line.split(":")[1]) for line in lines if line.startswith("num_fewshot:"))
    rows = read_rows(task, "train")[:shots]
    return "".join(f"{row['context']}{row['answer']}\n\n" for row in rows)


def set_active(model: Any, active: int) -> None:
    """Make the router choose ``active`` experts a token."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = active


@torch.no_grad()
def score_task(model: Any, task: str, split: str, limit: int | None = None) -> float:
    """Share of a task's documents answered right: ``acc`` or ``exact_match``."""
    rows = read_rows(task, split)[:limit]
    prompt = encode(few_shot_prompt(task))
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[len(row["context"])].append(row)
    right = 0
    for group in groups.values():
        contexts = torch.tensor([prompt + encode(row["context"]) for row in group])
        output = model(input_ids=contexts, use_cache=True, past_key_values=DynamicCache(config=model.config))
        step = _choose if "choices" in group[0] else _generate
        answers = step(model, group, output.logits[:, -1], output.past_key_values)
        right += sum(answer == row["answer"] for answer, row in zip(answers, group, strict=True))
    return right / len(rows)


def _choose(model: Any, rows: list[dict[str, Any]], last: Tensor, cache: DynamicCache) -> list[str]:
    per_row = len(rows[0]["choices"])
    choices = [encode(choice) for row in rows for choice in row["choices"]]
    longest = max(map(len, choices))
    ids = torch.tensor([c + [PAD_ID] * (longest - len(c)) for c in choices])
    mask = torch.tensor([[1.0] * len(c) + [0.0] * (longest - len(c)) for c in choices])
    first = last.repeat_interleave(per_row, 0)[:, None]
    logits = first
    if longest > 1:
        cache.batch_repeat_interleave(per_row)
        logits = torch.cat((first, model(input_ids=ids[:, :-1], past_key_values=cache).logits), 1)
    chosen = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    best = (chosen * mask).sum(-1).view(-1, per_row).argmax(-1)
    return [row["choices"][int(index)] for row, index in zip(rows, best, strict=True)]


def _generate(model: Any, rows: list[dict[str, Any]], last: Tensor, cache: DynamicCache) -> list[str]:
    characters = {index: token for token, index in VOCAB.items()}
    texts, open_rows = [""] * len(rows), list(range(len(rows)))
    for _ in range(_MAX_NEW):
        token = last.argmax(-1)
        for row in list(open_rows):
            if int(token[row]) in (_NEWLINE, EOS_ID):
                open_rows.remove(row)
            else:
                texts[row] += characters[int(token[row])]
        if not open_rows:
            break
        last = model(input_ids=token[:, None], past_key_values=cache).logits[:, -1]
    return texts


def score_suite(model: Any, split: str, tasks: Iterable[str] | None = None, limit: int | None = None) -> dict[str, Any]:
    """``score`` (average of group means), ``groups`` and ``tasks`` on one split; tasks None means all."""
    wanted = set(tasks) if tasks is not None else None
    scores: dict[str, float] = {}
    groups: dict[str, float] = {}
    for name, group in GROUPS.items():
        names = [task for task in group["tasks"] if wanted is None or task in wanted]
        values = [score_task(model, task, split, limit) for task in names]
        scores |= dict(zip(names, values, strict=True))
        if values:
            groups[name] = sum(values) / len(values)
    return {"score": sum(groups.values()) / len(groups), "groups": groups, "tasks": scores}
