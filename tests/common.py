"""A tiny real FlexOlmo model on disk, in every layout that checkpoints are found in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from flexmore_ray.export import export_mixture
from flexmore_ray.source import Source
from flexmore_ray.spec import PROJECTIONS, MixtureSpec

NAMES = ("public", "math", "news", "code")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def random_model(num_experts: int = 4, active: int = 2, seed: int = 0, **sizes: object) -> FlexOlmoForCausalLM:
    """A random FlexOlmo model whose experts are all different and whose router decides."""
    torch.manual_seed(seed)
    config = FlexOlmoConfig(**(SIZES | sizes), num_experts=num_experts, num_experts_per_tok=active)
    model = FlexOlmoForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def state(model: FlexOlmoForCausalLM) -> dict[str, torch.Tensor]:
    """Per-expert state of a FlexOlmo model (in memory transformers holds experts fused)."""
    inner = model.config.intermediate_size
    out = {}
    for name, values in model.state_dict().items():
        stem, _, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":
            for e in range(values.shape[0]):
                out[f"{stem}.experts.{e}.gate_proj.weight"] = values[e, :inner].clone()
                out[f"{stem}.experts.{e}.up_proj.weight"] = values[e, inner:].clone()
        elif leaf == "down_proj":
            for e in range(values.shape[0]):
                out[f"{stem}.experts.{e}.down_proj.weight"] = values[e].clone()
        else:
            out[name] = values.clone()
    return out


def write(
    model: FlexOlmoForCausalLM,
    folder: Path,
    *,
    layout: str = "per-expert",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Write a model as a checkpoint folder by hand, independent of the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict()) if layout == "fused" else state(model)
    tensors = {name: values.to(dtype).contiguous().clone() for name, values in tensors.items()}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def truncated(model: FlexOlmoForCausalLM, ranks: dict[int, object]) -> FlexOlmoForCausalLM:
    """The independent reference: experts replaced by reconstructions with plain torch.linalg.svd.

    `ranks` maps an expert's index to one rank, or to a function of (layer, projection) -> rank or None.
    """
    inner = model.config.intermediate_size
    reference = FlexOlmoForCausalLM(model.config).eval().requires_grad_(False)
    reference.load_state_dict(model.state_dict())
    for index, layer in enumerate(reference.model.layers):
        experts = layer.mlp.experts
        parts = {
            "gate_proj": experts.gate_up_proj[:, :inner],
            "up_proj": experts.gate_up_proj[:, inner:],
            "down_proj": experts.down_proj,
        }
        for e, rank in ranks.items():
            for projection in PROJECTIONS:
                r = rank(index, projection) if callable(rank) else rank
                if r is None:
                    continue
                public, own = parts[projection][0].double(), parts[projection][e].double()
                u, s, vh = torch.linalg.svd(own - public, full_matrices=False)
                parts[projection][e].copy_(public + (u[:, :r] * s[:r]) @ vh[:r])
    return reference


def without(model: FlexOlmoForCausalLM, dropped: set[int]) -> FlexOlmoForCausalLM:
    """The independent reference for dropped experts: a FlexOlmo model that never had them."""
    kept = [e for e in range(model.config.num_experts) if e not in dropped]
    values = model.config.to_dict() | {"num_experts": len(kept)}
    config = FlexOlmoConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    smaller = FlexOlmoForCausalLM(config).eval().requires_grad_(False)
    tensors = {}
    for name, tensor in model.state_dict().items():
        of_experts = ".mlp.experts." in name or name.endswith("mlp.gate.weight")
        tensors[name] = tensor[kept] if of_experts else tensor
    smaller.load_state_dict(tensors)
    return smaller


def set_active(model: FlexOlmoForCausalLM, active: int) -> None:
    """Experts per token of a transformers FlexOlmo model."""
    model.config.num_experts_per_tok = active
    for layer in model.model.layers:
        layer.mlp.gate.top_k = active


def adapter_without_row(source: Source, expert: str, rank: int, folder: Path) -> Path:
    """A domain expert as a PEFT adapter, born at a rank and with no router row, as others write them."""
    ranks = dict.fromkeys(source.experts[1:], "drop") | {expert: rank}
    export_mixture(MixtureSpec(source=tuple(source.describe()), ranks=ranks), folder, "peft")
    (folder / expert / "router.safetensors").unlink()
    return folder / expert
