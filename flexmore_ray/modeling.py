"""The mixture as a transformers model: FlexOlmo whose experts share one public FFN.

    T   tokens             H   hidden size       I   intermediate size
    E   experts            K   experts per token
    R   rank of one matrix of one expert

For token x with chosen experts E(x) and router weights p_e (`norm_topk_prob` false):

    g_e = Wg x + Bg_e (Ag_e x)       u_e = Wu x + Bu_e (Au_e x)       h_e = silu(g_e) * u_e
    y   = Wd (sum_e p_e h_e)  +  sum_e p_e Bd_e (Ad_e h_e)

so the dense products with the public expert's Wg, Wu, Wd are made once per token, however many
low-rank experts are chosen. A full-size expert makes its own three products. Any single matrix of
an expert may be dense or low-rank. Tensor names are those of the FlexMoRE authors' class
(`flex_more`): ``experts.E.gate_proj.weight`` or ``experts.E.gate_proj_{a,b}.weight``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, FlexOlmoConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.flex_olmo.modeling_flex_olmo import (
    FlexOlmoAttention,
    FlexOlmoDecoderLayer,
    FlexOlmoForCausalLM,
    FlexOlmoModel,
    FlexOlmoPreTrainedModel,
    FlexOlmoRMSNorm,
    FlexOlmoRotaryEmbedding,
    FlexOlmoSparseMoeBlock,
    FlexOlmoTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from flexmore_ray.spec import PROJECTIONS

DENSE = 0
"""In ``expert_ranks``: the expert has its own full-size matrices."""


@strict
class FlexMoreConfig(FlexOlmoConfig):
    """FlexOlmo's config with a rank for each expert; the format of the FlexMoRE authors' fork.

    Attributes:
        expert_ranks: rank of each expert, 0 for one that is dense; None means all are dense. An
            expert whose rank varies has its highest rank here.
        expert_alphas: LoRA alpha of each expert; None, or equal to the rank, means no scaling.
        expert_bases: which expert each one corrects; None means expert 0, the public one, for all.
        expert_rank_pattern: for experts whose rank varies, by index (as a string) and projection
            one rank per layer, 0 for dense; None means no expert's rank varies.
        expert_names: names of the experts, the public one first; None means they have none.
    """

    model_type = "flex_more"

    expert_ranks: list[int] | None = None
    expert_alphas: list[int] | list[float] | None = None
    expert_bases: list[int] | None = None
    expert_rank_pattern: dict[str, dict[str, list[int]]] | None = None
    expert_names: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.expert_ranks is None:
            self.expert_ranks = [DENSE] * self.num_experts
        for name in ("expert_ranks", "expert_alphas", "expert_bases", "expert_names"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_experts:
                raise ValueError(f"{name} needs one entry for each of {self.num_experts} experts, got {values}")
        super().__post_init__(**kwargs)

    def matrix_rank(self, expert: int, layer: int, projection: str) -> int:
        """Rank of one matrix; 0 if it is dense."""
        pattern = (self.expert_rank_pattern or {}).get(str(expert))
        if pattern is not None:
            return pattern[projection][layer]
        return self.expert_ranks[expert] if self.expert_ranks else DENSE

    @property
    def is_resolved(self) -> bool:
        """Whether every low-rank expert corrects the public one directly, without scaling."""
        ranks = self.expert_ranks or []
        plain_bases = not any(self.expert_bases or [])
        alphas = self.expert_alphas or ranks
        return plain_bases and all(alpha == rank for alpha, rank in zip(alphas, ranks, strict=True) if rank)


class FlexMoreExpert(nn.Module):
    """One expert's matrices, each dense (`gate_proj`) or a pair of factors (`gate_proj_a`, `gate_proj_b`)."""

    def __init__(self, config: FlexMoreConfig, layer: int, expert: int) -> None:
        super().__init__()
        for projection in PROJECTIONS:
            sizes = (config.hidden_size, config.intermediate_size)
            columns, rows = sizes if projection != "down_proj" else sizes[::-1]
            rank = config.matrix_rank(expert, layer, projection)
            if rank == DENSE:
                setattr(self, projection, nn.Linear(columns, rows, bias=False))
            else:
                setattr(self, f"{projection}_a", nn.Linear(columns, rank, bias=False))
                setattr(self, f"{projection}_b", nn.Linear(rank, rows, bias=False))

    def dense(self, projection: str) -> Tensor | None:
        """The dense matrix (out, in); None if this projection is low-rank."""
        module = self._modules.get(projection)
        return None if module is None else module.weight

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """The factors lora_a (R, in) and lora_b (out, R) of a low-rank projection."""
        return self._modules[f"{projection}_a"].weight, self._modules[f"{projection}_b"].weight

    @torch.no_grad()
    def set_dense(self, projection: str, weight: Tensor) -> None:
        """Use `weight` (out, in) itself, not a copy, as the dense matrix of a projection."""
        for name in (f"{projection}_a", f"{projection}_b"):
            self._modules.pop(name, None)
        self._set(projection, weight)

    @torch.no_grad()
    def set_pair(self, projection: str, lora_a: Tensor, lora_b: Tensor) -> None:
        """Use these factors themselves, not copies: lora_a (R, in), lora_b (out, R)."""
        self._modules.pop(projection, None)
        self._set(f"{projection}_a", lora_a)
        self._set(f"{projection}_b", lora_b)

    def _set(self, name: str, weight: Tensor) -> None:
        linear = self._modules.get(name)
        if linear is None:
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, linear)
        elif linear.weight.device == weight.device and linear.weight.dtype == weight.dtype:
            linear.weight.data = weight
        else:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.__dict__["out_features"], linear.__dict__["in_features"] = weight.shape


class FlexMoreExperts(nn.ModuleList):
    """All experts of one layer; index 0 is the public expert that low-rank ones correct."""

    def __init__(self, config: FlexMoreConfig, layer: int) -> None:
        super().__init__(FlexMoreExpert(config, layer, expert) for expert in range(config.num_experts))
        # Not a submodule, so that the list holds experts alone.
        object.__setattr__(self, "act", ACT2FN[config.hidden_act])

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            x: (T, H).
            top_k_index: (T, K) chosen experts.
            top_k_weights: (T, K) their router weights.

        Returns:
            (T, H).
        """
        groups = _group_by_expert(top_k_index, top_k_weights, len(self))
        sharing = [e for e in groups if e == 0 or any(self[e].dense(p) is None for p in PROJECTIONS)]
        y = torch.zeros_like(x)
        for e in groups:
            if e not in sharing:
                rows, weights = groups[e]
                y = _add_rows(y, rows, self._dense_forward(e, _rows(x, rows), weights))
        if not sharing:
            return y
        # Tokens that chose only full-size experts do not need the public expert.
        base_rows = None if len(sharing) == len(groups) else _union(groups, sharing, len(x))
        if base_rows is None:
            return y + self._shared_forward(x, {e: groups[e] for e in sharing})
        place = torch.empty(len(x), dtype=torch.long, device=x.device)
        place[base_rows] = torch.arange(len(base_rows), device=x.device)
        local = {e: (place if groups[e][0] is None else place[groups[e][0]], groups[e][1]) for e in sharing}
        return y.index_add(0, base_rows, self._shared_forward(x[base_rows], local))

    def _shared_forward(self, x: Tensor, groups: dict[int, tuple[Tensor | None, Tensor]]) -> Tensor:
        """Experts that use the public expert: its dense products once, corrections per expert."""
        base_gate = F.linear(x, self[0].gate_proj.weight)
        base_up = F.linear(x, self[0].up_proj.weight)
        inner = None
        low = None
        for e, (rows, weights) in groups.items():
            xe = _rows(x, rows)
            gate = self._project(e, "gate_proj", xe, _rows(base_gate, rows))
            up = self._project(e, "up_proj", xe, _rows(base_up, rows))
            hidden = self.act(gate) * (up * weights)
            down = self[e].dense("down_proj")
            if e == 0 or down is None:
                inner = _accumulate(inner, base_gate, rows, hidden)
            if e != 0:
                low = _accumulate(low, x, rows, _product(hidden, down, self[e]))
        if inner is None:
            return low
        y = F.linear(inner, self[0].down_proj.weight)
        return y if low is None else y + low

    def _project(self, e: int, projection: str, x: Tensor, base: Tensor) -> Tensor:
        """An expert's gate or up projection of x (T, H), from the public expert's (T, I)."""
        if e == 0:
            return base
        dense = self[e].dense(projection)
        if dense is not None:
            return F.linear(x, dense)
        lora_a, lora_b = self[e].pair(projection)
        return torch.addmm(base, F.linear(x, lora_a), lora_b.T)

    def _dense_forward(self, e: int, x: Tensor, weights: Tensor) -> Tensor:
        expert = self[e]
        hidden = self.act(F.linear(x, expert.gate_proj.weight)) * F.linear(x, expert.up_proj.weight)
        return F.linear(hidden, expert.down_proj.weight) * weights


def _product(hidden: Tensor, dense: Tensor | None, expert: FlexMoreExpert) -> Tensor:
    """An expert's own part of the down projection: its dense matrix or its correction."""
    if dense is not None:
        return F.linear(hidden, dense)
    lora_a, lora_b = expert.pair("down_proj")
    return F.linear(F.linear(hidden, lora_a), lora_b)


def _group_by_expert(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int
) -> dict[int, tuple[Tensor | None, Tensor]]:
    """For every chosen expert its tokens (None where all chose it) and their weights (n, 1)."""
    num_tokens, k = top_k_index.shape
    chosen, order = top_k_index.flatten().sort(stable=True)
    counts = chosen.bincount(minlength=num_experts).tolist()
    rows = (order // k).split(counts)
    weights = top_k_weights.flatten()[order].unsqueeze(1).split(counts)
    return {e: (None if count == num_tokens else rows[e], weights[e]) for e, count in enumerate(counts) if count}


def _union(groups: dict[int, tuple[Tensor | None, Tensor]], experts: list[int], num_tokens: int) -> Tensor | None:
    """Tokens that chose any of these experts; None where that is every token."""
    rows = [groups[e][0] for e in experts]
    if any(r is None for r in rows):
        return None
    union = torch.cat([r for r in rows if r is not None]).unique()
    return None if len(union) == num_tokens else union


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _add_rows(y: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return y + values if rows is None else y.index_add(0, rows, values)


def _accumulate(total: Tensor | None, like: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if total is None:
        return values if rows is None else torch.zeros_like(like).index_add(0, rows, values)
    return _add_rows(total, rows, values)


class FlexMoreSparseMoeBlock(FlexOlmoSparseMoeBlock):
    """FlexOlmo's router over FlexMoRE's experts."""

    def __init__(self, config: FlexMoreConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.gate = FlexOlmoTopKRouter(config)
        self.experts = FlexMoreExperts(config, layer)


class FlexMoreDecoderLayer(FlexOlmoDecoderLayer):
    """FlexOlmo's decoder layer with FlexMoRE's experts."""

    def __init__(self, config: FlexMoreConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = FlexOlmoAttention(config=config, layer_idx=layer_idx)
        self.mlp = FlexMoreSparseMoeBlock(config, layer_idx)
        self.post_attention_layernorm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class FlexMorePreTrainedModel(FlexOlmoPreTrainedModel):
    """Base of the FlexMoRE models."""

    config: FlexMoreConfig
    config_class = FlexMoreConfig
    _no_split_modules = ["FlexMoreDecoderLayer"]
    # Which experts get tokens depends on the data, so the graph cannot be captured whole.
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(FlexOlmoTopKRouter, index=0),
        "hidden_states": FlexMoreDecoderLayer,
        "attentions": FlexOlmoAttention,
    }


class FlexMoreModel(FlexMorePreTrainedModel, FlexOlmoModel):
    """The decoder; its forward is FlexOlmo's."""

    def __init__(self, config: FlexMoreConfig) -> None:
        FlexMorePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FlexMoreDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = FlexOlmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class FlexMoreForCausalLM(FlexMorePreTrainedModel, FlexOlmoForCausalLM):
    """The language model; its forward and generation are FlexOlmo's."""

    def __init__(self, config: FlexMoreConfig) -> None:
        FlexMorePreTrainedModel.__init__(self, config)
        self.model = FlexMoreModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def set_active(self, active: int) -> None:
        """Choose `active` experts per token from now on."""
        self.config.num_experts_per_tok = self.num_experts_per_tok = active
        for layer in self.model.layers:
            layer.mlp.gate.top_k = active

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a `flex_more` folder; chains of ``expert_bases`` and alphas are resolved on the way."""
        config = kwargs.get("config")
        if not isinstance(config, FlexMoreConfig):
            config = FlexMoreConfig.from_pretrained(pretrained_model_name_or_path)
        if config.is_resolved:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        from flexmore_ray.mixture import load_mixture

        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        return load_mixture(str(pretrained_model_name_or_path), dtype=None if dtype == "auto" else dtype).model


AutoConfig.register("flex_more", FlexMoreConfig)
AutoModelForCausalLM.register(FlexMoreConfig, FlexMoreForCausalLM)
