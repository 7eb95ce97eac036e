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

Serving adds two things that cost nothing where they are not used: `Routing` keeps experts from some tokens, exactly
as if they had never been merged, and an expert may compute elsewhere (`ExpertLink`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast

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

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import PROJECTIONS

Activation = Callable[[Tensor], Tensor]
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_NOT_WHEN_RESOLVED = ("device_map", "quantization_config", "subfolder", "tp_plan")
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
        return self._weight(projection) if projection in self._modules else None

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """The factors lora_a (R, in) and lora_b (out, R) of a low-rank projection."""
        return self._weight(f"{projection}_a"), self._weight(f"{projection}_b")

    def _weight(self, name: str) -> Tensor:
        weight = self._modules[name]._parameters["weight"]  # type: ignore[union-attr]
        assert weight is not None
        return weight

    @property
    def is_dense(self) -> bool:
        """Whether no projection is low-rank, so that the expert does not need the public one."""
        return all(projection in self._modules for projection in PROJECTIONS)

    def set_dense(self, projection: str, weight: Tensor) -> None:
        """Use `weight` (out, in) itself, not a copy, as the dense matrix of a projection."""
        for name in (f"{projection}_a", f"{projection}_b"):
            self._modules.pop(name, None)
        self._set(projection, weight)

    def set_pair(self, projection: str, lora_a: Tensor, lora_b: Tensor) -> None:
        """Use these factors themselves, not copies: lora_a (R, in), lora_b (out, R)."""
        self._modules.pop(projection, None)
        self._set(f"{projection}_a", lora_a)
        self._set(f"{projection}_b", lora_b)

    def _set(self, name: str, weight: Tensor) -> None:
        # A 7B mixture has 1,152 factors and switches in milliseconds: no lookup here is idle.
        linear = self._modules.get(name)
        held = None if linear is None else linear._parameters["weight"]
        if linear is None:
            linear = nn.Linear(1, 1, bias=False, device="meta")
            setattr(self, name, linear)
        if held is not None and held.dtype == weight.dtype and held.device == weight.device:
            held.data = weight
        else:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.__dict__["out_features"], linear.__dict__["in_features"] = weight.shape


class ExpertLink(Protocol):
    """An expert that computes elsewhere. Every `send` is followed by its `receive`, in between others may work."""

    def send(self, layer: int, x: Tensor) -> None:
        """Give a layer's tokens (n, H) to the expert."""

    def receive(self) -> Tensor:
        """Its output for them (n, H), before the router's weights."""


class FlexMoreRemoteExpert(nn.Module):
    """The place of an expert whose weights are elsewhere, in one layer."""

    is_dense = True  # it does not need the public expert's products

    def __init__(self, link: ExpertLink, layer: int) -> None:
        super().__init__()
        self._link, self._layer = link, layer

    def send(self, x: Tensor) -> None:
        """Give the expert its tokens (n, H)."""
        self._link.send(self._layer, x)

    def receive(self) -> Tensor:
        """Its output for them (n, H), before the router's weights."""
        return self._link.receive()


Chosen = dict[int, tuple[Tensor | None, Tensor]]
"""For each chosen expert its tokens (n,), None where all T chose it, and their router weights (n, 1)."""


class FlexMoreExperts(nn.ModuleList):
    """All experts of one layer; index 0 is the public expert that low-rank ones correct."""

    act: Activation

    def __init__(self, config: FlexMoreConfig, layer: int) -> None:
        super().__init__(FlexMoreExpert(config, layer, expert) for expert in range(config.num_experts))
        # Not a submodule, so that the list holds experts alone.
        object.__setattr__(self, "act", ACT2FN[config.hidden_act])

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            x: (T, H).
            top_k_index: (T, K) chosen experts; E, the number of experts, stands for none.
            top_k_weights: (T, K) their router weights.

        Returns:
            (T, H).
        """
        experts = cast("list[FlexMoreExpert]", list(self))
        chosen = _group_by_expert(top_k_index, top_k_weights, len(experts))
        remote = {e: chosen.pop(e) for e in list(chosen) if isinstance(experts[e], FlexMoreRemoteExpert)}
        for e, (rows, _) in remote.items():
            cast("FlexMoreRemoteExpert", experts[e]).send(_rows(x, rows))
        y = self._local(experts, x, chosen)
        for e, (rows, weights) in remote.items():
            y = _add_rows(y, rows, cast("FlexMoreRemoteExpert", experts[e]).receive() * weights)
        return y

    def _local(self, experts: list[FlexMoreExpert], x: Tensor, chosen: Chosen) -> Tensor:
        """What the experts whose weights are here add up to (T, H)."""
        sharing = {e: group for e, group in chosen.items() if e == 0 or not experts[e].is_dense}
        y = torch.zeros_like(x)
        for e, (rows, weights) in chosen.items():
            if e not in sharing:
                y = _add_rows(y, rows, _dense_forward(experts[e], _rows(x, rows), weights, self.act))
        if not sharing:
            return y
        # Tokens that chose only full-size experts do not need the public expert.
        base_rows = None if len(sharing) == len(chosen) else _union(sharing, len(x))
        if base_rows is None:
            return y + _shared_forward(experts, x, sharing, self.act)
        place = torch.empty(len(x), dtype=torch.long, device=x.device)
        place[base_rows] = torch.arange(len(base_rows), device=x.device)
        local: Chosen = {e: (None if rows is None else place[rows], w) for e, (rows, w) in sharing.items()}
        return y.index_add(0, base_rows, _shared_forward(experts, x[base_rows], local, self.act))


def _dense_forward(expert: FlexMoreExpert, x: Tensor, weights: Tensor, act: Activation) -> Tensor:
    gate, up, down = (_dense(expert, projection) for projection in PROJECTIONS)
    return F.linear(act(F.linear(x, gate)) * F.linear(x, up), down) * weights


def _shared_forward(experts: list[FlexMoreExpert], x: Tensor, chosen: Chosen, act: Activation) -> Tensor:
    """Experts that use the public expert: its dense products once, corrections per expert."""
    gate, up, down = (_dense(experts[0], projection) for projection in PROJECTIONS)
    base_gate, base_up = F.linear(x, gate), F.linear(x, up)
    inner = None  # (T, I): sum_e p_e h_e of the experts that use the public down projection
    own = None  # (T, H): what experts add in the down projection by themselves
    for e, (rows, weights) in chosen.items():
        expert, xe = experts[e], _rows(x, rows)
        hidden = _project(expert, "gate_proj", xe, _rows(base_gate, rows), is_public=e == 0)
        hidden = act(hidden) * (_project(expert, "up_proj", xe, _rows(base_up, rows), is_public=e == 0) * weights)
        own_down = expert.dense("down_proj")
        if e == 0 or own_down is None:
            inner = _accumulate(inner, base_gate, rows, hidden)
        if e != 0:
            own = _accumulate(own, x, rows, _own_product(expert, hidden, own_down))
    if inner is None:
        assert own is not None
        return own
    y = F.linear(inner, down)
    return y if own is None else y + own


def _project(expert: FlexMoreExpert, projection: str, x: Tensor, base: Tensor, *, is_public: bool) -> Tensor:
    """An expert's gate or up projection of x (n, H), given the public expert's (n, I)."""
    if is_public:
        return base
    dense = expert.dense(projection)
    if dense is not None:
        return F.linear(x, dense)
    lora_a, lora_b = expert.pair(projection)
    return F.linear(F.linear(x, lora_a), lora_b).add_(base)


def _own_product(expert: FlexMoreExpert, hidden: Tensor, dense: Tensor | None) -> Tensor:
    """An expert's own part of the down projection: its dense matrix or its correction."""
    if dense is not None:
        return F.linear(hidden, dense)
    lora_a, lora_b = expert.pair("down_proj")
    return F.linear(F.linear(hidden, lora_a), lora_b)


def _dense(expert: FlexMoreExpert, projection: str) -> Tensor:
    weight = expert.dense(projection)
    assert weight is not None
    return weight


def _group_by_expert(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Chosen:
    num_tokens, k = top_k_index.shape
    chosen, order = top_k_index.flatten().sort(stable=True)
    counts = chosen.bincount(minlength=num_experts).tolist()
    rows = (order // k).split(counts)
    weights = top_k_weights.flatten()[order].unsqueeze(1).split(counts)
    used = enumerate(counts[:num_experts])
    return {e: (None if count == num_tokens else rows[e], weights[e]) for e, count in used if count}


def _union(chosen: Chosen, num_tokens: int) -> Tensor | None:
    """Tokens that chose any of these experts; None where that is every token."""
    rows = [rows for rows, _ in chosen.values() if rows is not None]
    if len(rows) < len(chosen):
        return None
    union = torch.cat(rows).unique()
    return None if len(union) == num_tokens else union


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _add_rows(y: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return y + values if rows is None else y.index_add(0, rows, values)


def _accumulate(total: Tensor | None, like: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if total is None:
        return values if rows is None else torch.zeros_like(like).index_add(0, rows, values)
    return _add_rows(total, rows, values)


@dataclasses.dataclass
class Routing:
    """What all routers of a model are told about the next forward pass, and what they tell of the last one."""

    allowed: Tensor | None = None
    """(T, E) bool: which experts may work on which token; None means all on all."""
    picks: list[tuple[Tensor, Tensor]] | None = None
    """Where each layer's router appends its chosen experts (T, K) and their weights (T, K); None keeps nothing."""


class FlexMoreTopKRouter(FlexOlmoTopKRouter):
    """FlexOlmo's router, which can be told to keep experts from tokens."""

    routing: Routing | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (T, E), and weights and experts (T, K) of the chosen ones."""
        routing = self.routing
        if routing is None:
            return super().forward(hidden_states)
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        if routing.allowed is not None:
            logits = logits.masked_fill(~routing.allowed, -torch.inf)
        weights, experts = logits.softmax(dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if routing.allowed is not None:  # fewer allowed than chosen: the rest is nobody, with weight 0
            experts = experts.masked_fill(~routing.allowed.gather(1, experts), self.num_experts)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if routing.picks is not None:
            routing.picks.append((experts, weights))
        return logits, weights.to(logits.dtype), experts


class FlexMoreSparseMoeBlock(FlexOlmoSparseMoeBlock):
    """FlexOlmo's router over FlexMoRE's experts."""

    def __init__(self, config: FlexMoreConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.gate = FlexMoreTopKRouter(config)
        self.experts = FlexMoreExperts(config, layer)  # type: ignore[assignment]


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
        "router_logits": OutputRecorder(FlexMoreTopKRouter, index=0),
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

    def set_routing(self, routing: Routing | None) -> None:
        """Let all routers follow `routing` from now on; None makes them choose freely and keep nothing."""
        for layer in self.model.layers:
            layer.mlp.gate.routing = routing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a `flex_more` folder; chains of ``expert_bases`` and alphas are resolved on the way."""
        config = kwargs.get("config")
        if not isinstance(config, FlexMoreConfig):
            where = {k: kwargs[k] for k in _HUB_OPTIONS if k in kwargs}
            config = FlexMoreConfig.from_pretrained(pretrained_model_name_or_path, **where)
        if config.is_resolved:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        from flexmore_ray.mixture import load_mixture

        if given := [name for name in _NOT_WHEN_RESOLVED if kwargs.get(name)]:
            raise UsageError(
                f"{pretrained_model_name_or_path}: its experts correct one another and are resolved on loading, which "
                f"does not know {', '.join(given)}; use flexmore_ray.load_mixture"
            )
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
        return load_mixture(str(pretrained_model_name_or_path), dtype=config.dtype if dtype == "auto" else dtype).model


AutoConfig.register("flex_more", FlexMoreConfig)
AutoModelForCausalLM.register(FlexMoreConfig, FlexMoreForCausalLM)
