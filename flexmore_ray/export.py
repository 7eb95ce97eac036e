"""Write a mixture as a folder that other tools read: `flex_more`, `flexolmo` or `peft`.

Every export is made under another name, read back and compared with what was meant, and only then
given its name, or sent to its object store.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flexmore_ray.checkpoint import expert_tensor, router_tensor, shared_tensors
from flexmore_ray.checkpoint.writing import (
    TensorPlan,
    check_new,
    copy_tokenizer,
    new_folder,
    verify_tensors,
    write_config,
    write_tensors,
)
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import MixtureLike, Parts, open_mixture, parse_dtype, rank_config
from flexmore_ray.source import open_source
from flexmore_ray.spec import FULL, PROJECTIONS, MatrixKey
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, open_path

EXPORT_FORMATS = ("flex_more", "flexolmo", "peft")


def export_mixture(
    mixture: MixtureLike,
    out: str | AnyPath,
    format: str,
    *,
    dtype: str | torch.dtype | None = None,
    experts: Sequence[str] | None = None,
) -> AnyPath:
    """Write a mixture as a folder that other tools read, and read it back before calling it done.

    Args:
        mixture: a mixture file, a SOURCE string, or a spec.
        out: the folder to make; it appears only when it is complete.
        format: "flex_more" (factors, for this package and the FlexMoRE authors' fork), "flexolmo"
            (dense reconstruction, for any tool that knows FlexOlmo) or "peft" (one LoRA adapter
            on the public model's MLP per low-rank expert).
        dtype: what to write weights in; None loses nothing: the widest of checkpoints and factors.
        experts: names for the experts of an N-expert checkpoint; None keeps what the mixture says.

    Raises:
        UsageError: an unknown format, a folder that exists, a mixture without low-rank experts.
        CheckpointError: the folder cannot be written, or reads back different.
    """
    if format not in EXPORT_FORMATS:
        raise UsageError(f"--format: one of {', '.join(EXPORT_FORMATS)} is needed, got {format!r}")
    out = open_path(out)
    check_new(out)
    parts = open_mixture(mixture, experts)
    with new_folder(out) as folder:
        if format == "peft":
            _export_peft(parts, folder, dtype)
        else:
            to = _export_dtype(parts, dtype)
            pieces = _flex_more_pieces if format == "flex_more" else _dense_pieces
            plan = _model_plan(parts, pieces, to)
            write_tensors(folder, plan)
            write_config(folder, _export_config(parts, format, to))
            open_source([str(folder)])
        copy_tokenizer(parts.source.trunk.folder, folder)
        parts.spec.save(folder / "mixture.yaml")
    return out


def _export_dtype(parts: Parts, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return parse_dtype(dtype)
    widest = parts.source.widest_dtype
    return torch.promote_types(widest, parts.factors.dtype) if parts.uses_factors else widest


def _export_config(parts: Parts, format: str, dtype: torch.dtype) -> dict[str, Any]:
    ranks = rank_config(parts.assignment)
    if format == "flexolmo":
        ranks = {k: ranks[k] for k in ("num_experts", "num_experts_per_tok", "expert_names")}
        kind = {"model_type": "flex_olmo", "architectures": ["FlexOlmoForCausalLM"]}
    else:
        ranks = {k: v for k, v in ranks.items() if v is not None}
        kind = {"model_type": "flex_more", "architectures": ["FlexMoreForCausalLM"]}
    config = {k: v for k, v in parts.source.config.items() if k != "torch_dtype"}
    return config | kind | ranks | {"dtype": str(dtype).removeprefix("torch.")}


def _model_plan(parts: Parts, pieces: Callable[[Parts, MatrixKey, int], TensorPlan], dtype: torch.dtype) -> TensorPlan:
    source, names = parts.source, list(parts.assignment.ranks)
    plan: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(source.shared, name) for name in shared_tensors(source.shape)
    }
    for layer in range(source.shape.num_layers):
        plan[router_tensor(layer)] = functools.partial(source.router, layer, names)
        for index, name in enumerate(names):
            for projection in PROJECTIONS:
                plan |= pieces(parts, MatrixKey(name, layer, projection), index)
    return {name: functools.partial(_converted, make, dtype) for name, make in plan.items()}


def _flex_more_pieces(parts: Parts, key: MatrixKey, index: int) -> TensorPlan:
    name = functools.partial(expert_tensor, key.layer, index, key.projection)
    if parts.assignment.rank(key) == FULL:
        return {name(): functools.partial(parts.source.weight, key)}
    return {name("_a"): lambda: _factors(parts, key).lora_a, name("_b"): lambda: _factors(parts, key).lora_b}


def _dense_pieces(parts: Parts, key: MatrixKey, index: int) -> TensorPlan:
    def make() -> Tensor:
        piece = parts.piece(key)
        if isinstance(piece, Tensor):
            return piece
        base = parts.source.weight(key._replace(expert=parts.source.experts[0]))
        return base.float() + piece.dense()

    return {expert_tensor(key.layer, index, key.projection): make}


def _factors(parts: Parts, key: MatrixKey) -> Factors:
    piece = parts.piece(key)
    assert isinstance(piece, Factors)
    return piece


def _factor(parts: Parts, key: MatrixKey, which: str, dtype: torch.dtype) -> Tensor:
    return getattr(_factors(parts, key), which).to(dtype)


def _converted(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().to(dtype)


def _export_peft(parts: Parts, folder: Path, dtype: str | torch.dtype | None) -> None:
    """One adapter folder per low-rank expert; an expert with a dense matrix has none."""
    public = parts.source.experts[0]
    low_rank = [
        name
        for name, ranks in parts.assignment.ranks.items()
        if name != public and all(r != FULL for layers in ranks.values() for r in layers)
    ]
    if not low_rank:
        raise UsageError(
            "--format peft: no expert of this mixture is low-rank throughout; give one a rank, or export flex_more"
        )
    to = _export_dtype(parts, dtype)
    for name in low_rank:
        (folder / name).mkdir()
        _write_adapter(parts, name, folder / name, to)


def _write_adapter(parts: Parts, name: str, folder: Path, dtype: torch.dtype) -> None:
    plan: dict[str, Callable[[], Tensor]] = {}
    ranks = {}
    for key in parts.source.shape.keys(name):
        module = f"model.layers.{key.layer}.mlp.{key.projection}"
        ranks[module] = int(parts.assignment.rank(key))
        stem = f"base_model.model.{module}"
        plan[f"{stem}.lora_A.weight"] = functools.partial(_factor, parts, key, "lora_a", dtype)
        plan[f"{stem}.lora_B.weight"] = functools.partial(_factor, parts, key, "lora_b", dtype)
    write_tensors(folder, plan, stem="adapter_model")
    config = _adapter_config(parts, ranks)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rows = torch.stack([parts.source.router_row(name, layer) for layer in range(parts.source.shape.num_layers)])
    save_file({"router": rows.contiguous()}, folder / "router.safetensors")
    verify_tensors(folder, {"router": lambda: rows}, stem="router")


def _adapter_config(parts: Parts, ranks: Mapping[str, int]) -> dict[str, Any]:
    highest = max(ranks.values())
    varying = {module: rank for module, rank in ranks.items() if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(parts.source.trunk.config.get("_name_or_path") or ""),
        "inference_mode": True,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": varying,
        "alpha_pattern": varying,
        "target_modules": list(PROJECTIONS),
        "lora_dropout": 0.0,
        "bias": "none",
    }
