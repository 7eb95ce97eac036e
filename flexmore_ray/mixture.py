"""Build a mixture from its parts and switch its ranks in place.

`open_mixture` finds what a mixture is made of (spec, source, factors) without reading a weight;
`load_mixture` makes the transformers model of it, holding every tensor once: a low-rank matrix is
a view on factors held in memory, so a rank switch moves no weight.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoRotaryEmbedding
from transformers.utils import GENERATION_CONFIG_NAME

from flexmore_ray.budget import ParameterCount, count_parameters
from flexmore_ray.build import build_store
from flexmore_ray.checkpoint import DTYPES, TOKENIZER_FILES, shared_tensors
from flexmore_ray.errors import UsageError
from flexmore_ray.modeling import (
    DENSE,
    ExpertLink,
    FlexMoreConfig,
    FlexMoreExpert,
    FlexMoreForCausalLM,
    FlexMoreRemoteExpert,
)
from flexmore_ray.router import RouterRows
from flexmore_ray.source import Guest, Source, open_source, with_rows
from flexmore_ray.spec import (
    FULL,
    PROJECTIONS,
    Assignment,
    ExpertRank,
    MatrixKey,
    MixtureSpec,
    ModelShape,
    suggest,
)
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, StorageError, open_path
from flexmore_ray.storage.cache import cache_folder, local_folder
from flexmore_ray.store import FactorSource, open_store, parse_device

_OUTPUT_CONFIG = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "hidden_act"),
    *("norm_topk_prob", "attention_bias", "tie_word_embeddings", "max_position_embeddings"),
)
"""Config entries that decide what the same weights compute, or how much they are given to read."""
MixtureLike = str | AnyPath | MixtureSpec


def read_spec(mixture: MixtureLike, experts: Sequence[str] | None = None) -> MixtureSpec:
    """A spec from a mixture file, a SOURCE (every expert full), or a spec.

    Args:
        mixture: the path or URI of a YAML file, a SOURCE string, or a spec.
        experts: names for the experts of an N-expert checkpoint; None keeps what the mixture says.
    """
    if isinstance(mixture, MixtureSpec):
        spec = mixture
    elif str(mixture).endswith((".yaml", ".yml")):
        spec = MixtureSpec.load(mixture)
    else:
        spec = MixtureSpec(source=(str(mixture),))
    return spec if experts is None else dataclasses.replace(spec, experts=tuple(experts))


class CachedFactors:
    """The factors of a source from a store in the cache, decomposed when first asked for.

    Args:
        source: the experts.
        rank: hold factors up to this rank from the first pass on.
        folder: of the store; None means one in the cache, named after the weights.
    """

    dtype = torch.float32
    weighting = "none"

    def __init__(self, source: Source, rank: int, folder: AnyPath | None = None) -> None:
        self.source, self.rank, self._folder = source, rank, folder
        self._store: FactorSource | None = None

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        """Factors of one matrix at `rank`; decomposes the source where that is more than is held."""
        return self._holding(key, rank).factors(key, rank)

    def spectrum(self, key: MatrixKey) -> Tensor:
        """All singular values of one delta; decomposes the source where not all are held."""
        return self._holding(key, self.source.shape.full_rank).spectrum(key)

    def _holding(self, key: MatrixKey, rank: int) -> FactorSource:
        """The store, extended to a rank."""
        if self._store is None or self._store.max_rank(key) < rank:
            self.rank = max(self.rank, rank)
            with tqdm(desc="decomposing", unit="matrix", disable=not sys.stderr.isatty(), leave=False) as bar:

                def told(*_: object) -> None:
                    bar.update()

                self._store = build_store(self.source, self.folder, max_rank=self.rank, progress=told)
        return self._store

    def recipe(self, expert: str) -> str:
        """Nothing besides the weights decides these factors."""
        return ""

    @functools.cached_property
    def folder(self) -> AnyPath:
        """The store's folder."""
        if self._folder is not None:
            return self._folder
        keys = [key for name in self.source.experts for key in self.source.shape.keys(name)]
        content = [self.source.digest(key) for key in keys]
        return cache_folder() / hashlib.sha256("".join([*self.source.experts, *content]).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a mixture is made of; nothing of it is read yet."""

    spec: MixtureSpec
    source: Source
    factors: Any
    assignment: Assignment

    def with_spec(self, spec: MixtureSpec) -> Parts:
        """The same source and factors under another spec."""
        return Parts(spec, self.source, self.factors, _assign(spec, self.source))

    def piece(self, key: MatrixKey, hold: int = 0) -> Tensor | Factors:
        """A matrix of a kept expert: dense, or its factors at its rank (at `hold` if that is more)."""
        rank = self.assignment.rank(key)
        if rank == FULL:
            return self.source.weight(key)
        born = self.source.born_ranks.get(key)
        if rank == born:
            factors = self.source.born_factors(key)
            assert factors is not None
            return factors
        return self.factors.factors(key, min(max(rank, hold), born or self.source.shape.full_rank))

    def matrix_keys(self) -> Iterator[MatrixKey]:
        """All matrices of all kept experts."""
        for name in self.assignment.ranks:
            yield from self.source.shape.keys(name)

    def count(self) -> ParameterCount:
        """Parameters of the mixture, from its configuration alone."""
        return count_parameters(self.source.shape, self.source.experts, self.assignment)

    def identified(self) -> MixtureSpec:
        """The spec with its `mixture_id`, which reads (and hashes) the weights of all kept experts."""
        digests = {name: self.source.expert_digest(name) for name in self.assignment.ranks}
        for name in filter(self.is_cut, digests):
            if recipe := self.factors.recipe(name):
                digests[name] += f" {recipe}"
        others = list(_output_settings(self.source))
        others.append(str(self.factors.dtype) if self.uses_factors else None)
        digests["shared"] = f"{self.source.shared_digest} {json.dumps(others, sort_keys=True)}"
        return dataclasses.replace(self.spec, mixture_id=self.assignment.mixture_id(digests))

    @property
    def weights(self) -> str:
        """Hash of what all experts of the source are corrections of: the shared tensors and the public expert."""
        return self.source.base_digest[:16]

    @property
    def uses_factors(self) -> bool:
        """Whether any matrix is cut to a rank of its decomposition, rather than used as its owner made it."""
        return any(map(self.is_cut, self.assignment.ranks))

    def is_cut(self, name: str) -> bool:
        """Whether any matrix of a kept expert is cut to a rank of its decomposition."""
        born = self.source.born_ranks
        return any(self.assignment.rank(key) not in (FULL, born.get(key)) for key in self.source.shape.keys(name))


def open_mixture(
    mixture: MixtureLike,
    experts: Sequence[str] | None = None,
    *,
    source: Source | None = None,
    factors: FactorSource | None = None,
    guests: Mapping[str, Guest] | None = None,
    verify: bool = True,
) -> Parts:
    """Find what a mixture is made of, and check its rank assignment.

    Args:
        mixture: a mixture file, a SOURCE string, or a spec.
        experts: names for the experts of an N-expert checkpoint; None keeps what the mixture says.
        source: the experts, where they are open already; None opens what the spec names.
        factors: where to take factors from; None means the spec's store, else the cache.
        guests: experts whose matrices stay with their owners; see `open_source`.
        verify: whether to check, by hashing the weights, that the spec's store and router rows were made for them.

    Raises:
        UsageError: the mixture breaks a rule.
        CheckpointError: its source or its router rows cannot be read, or the rows are of another model.
        StoreError: its store cannot be read, or was made from other weights.
    """
    spec = read_spec(mixture, experts)
    store = open_store(spec.store) if spec.store else None
    if source is None and spec.source:
        source = open_source(spec.source, spec.experts, guests)
    elif source is None:
        assert store is not None
        source = open_source(store.sources, spec.experts or store.experts, guests)
    here = source.without(guests) if guests else source
    if store is not None and verify:
        store.check_source(here)
    if spec.router:
        source = with_rows(source, RouterRows.load(spec.router), verify=verify)
    spec = dataclasses.replace(
        spec,
        source=tuple(source.describe()) if spec.source else (),
        store=str(open_path(spec.store).resolve()) if spec.store else None,
        router=str(open_path(spec.router).resolve()) if spec.router else None,
    )
    assignment = _assign(spec, source)
    return Parts(spec, source, factors or store or CachedFactors(here, assignment.highest_rank), assignment)


def check_same_factors(spec: MixtureSpec, parts: Parts, where: str) -> None:
    """Check that what a mixture file cuts would be cut alike with the factors of some parts.

    Args:
        spec: of the file.
        parts: with whose factors it is to be made.
        where: the file's name in errors.

    Raises:
        UsageError: its store has other factors of an expert: of another metric, or healed.
        StoreError: its store cannot be read, or was made from other weights.
    """
    store = open_store(spec.store) if spec.store else None
    if store is not None:
        store.check_source(parts.source)
    variant = parts.with_spec(dataclasses.replace(parts.spec, ranks=spec.ranks, active=1, mixture_id=None))
    for name in filter(variant.is_cut, variant.assignment.ranks):
        theirs = store.recipe(name) if store is not None else ""
        if theirs != parts.factors.recipe(name):
            raise UsageError(
                f"{where}: its factors of {name} are those of {spec.store or 'a plain decomposition'}, other ones than "
                "are used here; give --store that of the file, or run it on its own"
            )


def _assign(spec: MixtureSpec, source: Source) -> Assignment:
    default = int(source.trunk.config.get("num_experts_per_tok") or len(source.experts))
    return spec.assignment(source.experts, source.shape, born=source.born_ranks, default_active=default)


# ------------------------------------------------------------------------------- the model


class Mixture:
    """A mixture in memory: a transformers model, its tokenizer, and its spec.

    Attributes:
        model: the `FlexMoreForCausalLM`; always exactly the current rank assignment.
    """

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
        hold_rank: int = 0,
        remote: Mapping[str, ExpertLink] | None = None,
    ) -> None:
        self._parts = parts
        self._remote = remote or {}
        if unknown := [name for name in self._remote if name not in parts.assignment.ranks]:
            raise UsageError(f"remote: the mixture has no expert {unknown[0]!r}; {suggest(unknown[0], self.experts)}")
        self._device, self._dtype, self._hold_rank = device, dtype, hold_rank
        self._held: dict[MatrixKey, Tensor | Factors] = {}
        self._unordered: set[MatrixKey] = set()  # held factors as their owner made them: no slice of them is a rank
        self._rows: dict[str, list[Tensor]] = {}
        self._experts: dict[str, list[FlexMoreExpert | FlexMoreRemoteExpert]] = {}
        self.model = self._build_trunk()
        self._switch(parts, None)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the source.

        Raises:
            UsageError: the source's folder has none.
        """
        return load_tokenizer(self._parts.source)

    @property
    def spec(self) -> MixtureSpec:
        """The current spec, with its `mixture_id`."""
        if self._parts.spec.mixture_id is None:
            self._parts = dataclasses.replace(self._parts, spec=self._parts.identified())
        return self._parts.spec

    @property
    def given_spec(self) -> MixtureSpec:
        """The current spec as it was given, without the `mixture_id`, which takes reading all weights."""
        return self._parts.spec

    @property
    def weights(self) -> str:
        """Hash of the shared tensors and the public expert; see `Parts.weights`."""
        return self._parts.weights

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return self._parts.source.shape

    @property
    def experts(self) -> tuple[str, ...]:
        """All expert names of the source, the public one first, dropped ones included."""
        return self._parts.source.experts

    @property
    def assignment(self) -> Assignment:
        """The current rank of every matrix."""
        return self._parts.assignment

    def num_parameters(self) -> int:
        """Parameters of the model as it is now."""
        return sum(p.numel() for p in self.model.parameters())

    def count(self) -> ParameterCount:
        """Total, active and per-expert parameters."""
        return self._parts.count()

    def set_ranks(self, ranks: Mapping[str, ExpertRank]) -> None:
        """Give some experts other ranks, in place.

        Up to the rank that is held in memory this moves views and copies no weight; what is not
        held yet is fetched first. On an error the mixture stays as it was.

        Args:
            ranks: by expert name an integer >= 1, "full", "drop", or ranks by projection.

        Raises:
            UsageError: an unknown expert or a rank that breaks its rule.
            StoreError: a rank above what the mixture's store holds.
        """
        self.switch(ranks, self._parts.spec.active)

    def set_active(self, active: int) -> None:
        """Choose `active` experts per token from now on.

        Raises:
            UsageError: not an integer from 1 to the number of kept experts.
        """
        self.switch({}, active)

    def switch(self, ranks: Mapping[str, ExpertRank], active: int | None) -> None:
        """`set_ranks` and `set_active` in one step; None means the checkpoint's own number."""
        spec = dataclasses.replace(self._parts.spec.with_ranks(ranks), active=active)
        self._switch(self._parts.with_spec(spec), self._parts.assignment)

    # The trunk is built once; experts are then put in and out of it by `_switch`.

    def _build_trunk(self) -> FlexMoreForCausalLM:
        source = self._parts.source
        config = FlexMoreConfig(**_trunk_config(source), num_experts=1, num_experts_per_tok=1)
        with torch.device("meta"):
            model = FlexMoreForCausalLM(config).eval()
        model.model.rotary_emb = FlexOlmoRotaryEmbedding(config).to(self._device)
        for name in shared_tensors(source.shape):
            _set_parameter(model, name, self._to(source.shared(name)))
        model.tie_weights()
        model.to(self._dtype).requires_grad_(False)
        if (source.trunk.folder / GENERATION_CONFIG_NAME).exists():  # which may end texts at other tokens
            folder = local_folder(source.trunk.folder, [GENERATION_CONFIG_NAME])
            model.generation_config.eos_token_id = GenerationConfig.from_pretrained(folder).eos_token_id
        return model

    def _switch(self, parts: Parts, before: Assignment | None) -> None:
        """Fetch what is missing, then put the new assignment in place."""
        fresh = {name for name in parts.assignment.ranks if before is None or name not in before.ranks}
        changed = [
            key
            for key in parts.matrix_keys()
            if key.expert in fresh or before is None or before.rank(key) != parts.assignment.rank(key)
        ]
        if elsewhere := [key for key in changed if key.expert in self._remote and before is not None]:
            raise UsageError(f"{elsewhere[0]}: computes elsewhere, so its rank cannot be changed here")
        changed = [key for key in changed if key.expert not in self._remote]
        fetched = {key: self._fetch(parts, key) for key in changed if not self._has(parts, key)}
        for name in fresh - set(self._rows):
            layers = range(parts.source.shape.num_layers)
            self._rows[name] = [self._to(parts.source.router_row(name, layer)) for layer in layers]
            self._experts[name] = [self._new_expert(name, layer) for layer in layers]
        self._held |= fetched
        born = parts.source.born_ranks
        for key in fetched:
            owned = parts.assignment.rank(key) == born.get(key)
            (self._unordered.add if owned else self._unordered.discard)(key)
        for key in changed:
            self._place(key, parts.assignment.rank(key))
        if before is None or list(before.ranks) != list(parts.assignment.ranks):
            self._place_experts(parts.assignment)
        self._parts = parts
        self._update_config(parts.assignment)

    def _new_expert(self, name: str, layer: int) -> FlexMoreExpert | FlexMoreRemoteExpert:
        if name in self._remote:
            return FlexMoreRemoteExpert(self._remote[name], layer)
        with torch.device("meta"):
            return FlexMoreExpert(self.model.config, 0, 0)

    def _has(self, parts: Parts, key: MatrixKey) -> bool:
        held, rank = self._held.get(key), parts.assignment.rank(key)
        if rank == FULL or not isinstance(held, Factors):
            return rank == FULL and isinstance(held, Tensor)
        return held.rank == rank or (held.rank > rank and key not in self._unordered)

    def _fetch(self, parts: Parts, key: MatrixKey) -> Tensor | Factors:
        piece = parts.piece(key, self._hold_rank)
        if isinstance(piece, Factors):
            # lora_b lies row after row, as the product wants it (1.4 times faster on a CPU at few tokens);
            # a lower rank is then a strided view.
            return Factors(a=self._to(piece.a), bt=self._to(piece.bt).T.contiguous().T)
        return self._to(piece)

    def _place(self, key: MatrixKey, rank: int | str) -> None:
        expert, held = self._experts[key.expert][key.layer], self._held[key]
        assert isinstance(expert, FlexMoreExpert)
        if isinstance(held, Factors):
            expert.set_pair(key.projection, held.a[:rank], held.bt[:rank].T)
        else:
            expert.set_dense(key.projection, held)

    def _place_experts(self, assignment: Assignment) -> None:
        names = list(assignment.ranks)
        for layer, decoder in enumerate(self.model.model.layers):
            gate, experts = decoder.mlp.gate, decoder.mlp.experts
            rows = torch.stack([self._rows[name][layer] for name in names])
            gate.weight = nn.Parameter(rows, requires_grad=False)
            gate.num_experts = len(names)
            experts._modules = {str(i): self._experts[name][layer] for i, name in enumerate(names)}

    def _update_config(self, assignment: Assignment) -> None:
        config = self.model.config
        for key, value in rank_config(assignment).items():
            setattr(config, key, value)
        self.model.num_experts = config.num_experts
        self.model.set_active(assignment.active)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


def load_mixture(
    mixture: MixtureLike,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    experts: Sequence[str] | None = None,
    source: Source | None = None,
    factors: FactorSource | None = None,
    hold_rank: int = 0,
    remote: Mapping[str, ExpertLink] | None = None,
) -> Mixture:
    """Load a mixture into memory.

    Args:
        mixture: a mixture file, a SOURCE string (a `flex_more` folder too), or a spec.
        device: where the weights go.
        dtype: what they are held and computed in; None means float32 on the CPU and the
            checkpoint's own dtype elsewhere.
        experts: names for the experts of an N-expert checkpoint; None keeps what the mixture says.
        source: the experts, where they are open already; None opens what the spec names.
        factors: where to take factors from; None means the spec's store, else the cache.
        hold_rank: hold factors up to this rank, so that switches up to it fetch nothing; 0 means
            just what the assignment needs.
        remote: experts that compute elsewhere; of these only the router rows are read. None means none do.

    Raises:
        UsageError, CheckpointError, StoreError: see `open_mixture`.
    """
    place = parse_device(device)
    parts = open_mixture(mixture, experts, source=source, factors=factors)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else parts.source.dtype
    return Mixture(parts, place, parse_dtype(dtype), hold_rank, remote)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that came with a source.

    Raises:
        UsageError: the source's folder has none.
    """
    folder = source.trunk.folder
    try:
        here = local_folder(folder, (*TOKENIZER_FILES, "config.json"))
        return AutoTokenizer.from_pretrained(here, trust_remote_code=False)
    except StorageError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise what it happens to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"{folder}: no tokenizer that transformers can load ({reason})") from error


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype by name.

    Raises:
        UsageError: an unknown name.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"dtype: one of {', '.join(DTYPES)} is needed, got {dtype!r}")
    return DTYPES[dtype]


def rank_config(assignment: Assignment) -> dict[str, Any]:
    """The entries of a `flex_more` config that say which experts are kept and at which ranks."""
    ranks, pattern = [], {}
    for index, layers in enumerate(assignment.ranks.values()):
        as_numbers = {p: [DENSE if r == FULL else int(r) for r in layers[p]] for p in PROJECTIONS}
        values = {r for rs in as_numbers.values() for r in rs}
        ranks.append(max(values))
        if len(values) > 1:
            pattern[str(index)] = as_numbers
    return {
        "num_experts": len(ranks),
        "num_experts_per_tok": assignment.active,
        "expert_ranks": ranks,
        "expert_alphas": list(ranks),
        "expert_bases": [0] * len(ranks),
        "expert_rank_pattern": pattern or None,
        "expert_names": list(assignment.ranks),
    }


@functools.lru_cache(maxsize=8)
def _output_settings(source: Source) -> tuple[Any, ...]:
    """What besides weights and ranks decides the outputs of a source's mixtures."""
    config = FlexMoreConfig(**_trunk_config(source), num_experts=1, num_experts_per_tok=1).to_dict()
    tokenizer = source.trunk.folder / "tokenizer.json"
    text = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else None
    return (*(config.get(key) for key in _OUTPUT_CONFIG), text)


def _trunk_config(source: Source) -> dict[str, Any]:
    left_out = ("model_type", "architectures", "num_experts", "num_experts_per_tok", "expert_names", "dtype")
    return {k: v for k, v in source.config.items() if k not in (*left_out, "torch_dtype")}


def _set_parameter(model: nn.Module, name: str, values: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
