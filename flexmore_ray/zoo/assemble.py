"""Put separately trained experts side by side, fit the router, write the checkpoint and record its scores."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import FlexOlmoForCausalLM

from flexmore_ray.router import fit_rows, gather_moments
from flexmore_ray.zoo import domain_text
from flexmore_ray.zoo.domains import EXPERTS
from flexmore_ray.zoo.measure import GROUPS, score_suite
from flexmore_ray.zoo.tokenizer import PAD_ID, encode, write_tokenizer
from flexmore_ray.zoo.train import HIDDEN, LAYERS, backbone, public_model

ACTIVE = (2, 4, 7)
DEFAULT_ACTIVE = 4
MOMENT_DOCUMENTS = 2000

State = dict[str, Tensor]


def side_by_side(public: State, experts: Mapping[str, State], rows: Tensor, active: int) -> FlexOlmoForCausalLM:
    """A float32 mixture of the public expert and ``experts`` with router rows ``(L, 1 + len(experts), H)``."""
    model = backbone(public, 1 + len(experts), active)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            name = f"model.layers.{index}.mlp"
            gate_up = [public[f"{name}.gate_up"], *(state[f"{index}.gate_up"] for state in experts.values())]
            down = [public[f"{name}.down"], *(state[f"{index}.down"] for state in experts.values())]
            layer.mlp.experts.gate_up_proj.copy_(torch.stack(gate_up))
            layer.mlp.experts.down_proj.copy_(torch.stack(down))
            layer.mlp.gate.weight.copy_(rows[index])
    return model


def isolated_rows(state: State) -> Tensor:
    """Rows of one two-expert mixture, ``(L, 2, H)``."""
    return torch.stack([state[f"{index}.rows"] for index in range(LAYERS)])


def pair_model(public: State, expert: str, state: State) -> FlexOlmoForCausalLM:
    """The two-expert mixture of one domain as it was trained."""
    return side_by_side(public, {expert: state}, isolated_rows(state), active=2)


def text_batches(expert: str, seed: int) -> list[dict[str, Tensor]]:
    """Batches of a domain's texts for the router's moments."""
    texts = sorted(domain_text(expert, MOMENT_DOCUMENTS, seed), key=len)
    batches = []
    for start in range(0, len(texts), 64):
        ids = [encode(text) for text in texts[start : start + 64]]
        longest = max(map(len, ids))
        padded = torch.tensor([i + [PAD_ID] * (longest - len(i)) for i in ids])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
        batches.append({"input_ids": padded, "attention_mask": mask})
    return batches


def ridge_rows(public: State, experts: Mapping[str, State], seed: int) -> Tensor:
    """Rows of the merged router, ``(L, E, H)``, rounded to bfloat16: each owner's texts through its own model."""
    moments = {"public": gather_moments(public_model(public), text_batches("public", seed))}
    for expert, state in experts.items():
        moments[expert] = gather_moments(pair_model(public, expert, state), text_batches(expert, seed))
    return fit_rows(moments).to(torch.bfloat16)


def write_mixture(folder: Path, public: State, experts: Mapping[str, State], rows: Tensor) -> None:
    """Write checkpoint, tokenizer and the isolated router rows."""
    model = side_by_side(public, experts, rows.float(), DEFAULT_ACTIVE)
    model.bfloat16()
    model.config.expert_names = list(EXPERTS)
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    save_file(
        {name: isolated_rows(state).contiguous() for name, state in experts.items()},
        folder / "routers.safetensors",
    )
    write_tokenizer(folder)


def record_scores(
    folder: Path,
    public: State,
    experts: Mapping[str, State],
    rows: Tensor,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Score public, every two-expert mixture and the full one on validation and test; write ``scores.json``."""
    began = time.monotonic()
    jobs: dict[str, tuple[State, dict[str, State], Tensor, int]] = {
        "public": (public, {}, torch.zeros(LAYERS, 1, HIDDEN), 1)
    }
    jobs |= {f"public+{name}": (public, {name: state}, isolated_rows(state), 2) for name, state in experts.items()}
    jobs |= {f"full-a{active}": (public, dict(experts), rows.float(), active) for active in ACTIVE}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        scores = dict(zip(jobs, pool.map(_score_mixture, jobs.values()), strict=True))
    record = {
        **facts,
        "scoring_seconds": round(time.monotonic() - began, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "groups": GROUPS,
        "scores": scores,
    }
    (folder / "scores.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _score_mixture(job: tuple[State, dict[str, State], Tensor, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = side_by_side(*job)
    return {split: score_suite(model, split) for split in ("validation", "test")}
