"""Sources: named experts over one shared trunk, put together from checkpoints and adapters.

A SOURCE string is a folder (or its URI), ``zoo://nano``, a hub id, or ``name=FOLDER`` repeated; `open_source`
opens them as one `Source`, checking bit for bit what its parts must share.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmore_ray.checkpoint import (
    TOKENIZER_FILES,
    Adapter,
    Checkpoint,
    digest,
    expert_tensor,
    router_tensor,
    shared_tensors,
)
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.router import RouterRows
from flexmore_ray.spec import PROJECTIONS, MatrixKey, ModelShape, check_names
from flexmore_ray.spectra import Factors, decompose_factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.zoo import zoo_path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Guest:
    """What a mixture is told of an expert whose matrices stay with its owner; see `Source.guest`."""

    shape: ModelShape
    """The sizes of its model."""
    base: str
    """`Source.base_digest` where it lives."""
    digest: str
    """`Source.expert_digest` of it."""
    rows: tuple[Tensor, ...]
    """Its router row (hidden,) in each layer."""
    born_ranks: Mapping[MatrixKey, int]
    """As in `Source.born_ranks`."""


Slot = tuple[Checkpoint, int] | Adapter | Guest
"""Where an expert lives: a checkpoint and its index there, an adapter, or with its owner."""


class Source:
    """Named experts over one shared trunk, from one or more checkpoints and adapters.

    Attributes:
        experts: expert names, the public one first.
        shape: the model's sizes.
        trunk: the checkpoint that shared tensors, public expert and tokenizer come from.
    """

    def __init__(self, trunk: Checkpoint, slots: Mapping[str, Slot], origin: Sequence[str]):
        self.trunk = trunk
        self.shape = trunk.shape
        self.experts = tuple(slots)
        self._slots = dict(slots)
        self._origin = list(origin)
        self._digests: dict[MatrixKey, str] = {}
        self._expert_digests: dict[str, str] = {}

    @property
    def config(self) -> dict[str, Any]:
        """FlexOlmo config of the full mixture."""
        flexmore_only = ("expert_ranks", "expert_alphas", "expert_bases", "expert_rank_pattern")
        config = {k: v for k, v in self.trunk.config.items() if k not in flexmore_only}
        config |= {"model_type": "flex_olmo", "architectures": ["FlexOlmoForCausalLM"]}
        return config | {"num_experts": len(self.experts), "expert_names": list(self.experts)}

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the public expert."""
        return self.trunk.dtype

    @functools.cached_property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every tensor of every part without loss; from the headers alone."""
        here = (slot for slot in self._slots.values() if not isinstance(slot, Guest))
        folders = [self.trunk, *(s if isinstance(s, Adapter) else s[0] for s in here)]
        found = {folder.tensors.dtype(name) for folder in folders for name in folder.tensors.names()}
        return functools.reduce(torch.promote_types, found)

    def describe(self) -> list[str]:
        """The SOURCE strings that open this source again from anywhere."""
        return list(self._origin)

    def shared(self, name: str) -> Tensor:
        """A tensor that all experts share."""
        return self.trunk.shared(name)

    def weight(self, key: MatrixKey) -> Tensor:
        """Dense matrix (out, in) in its stored dtype."""
        slot = self._held(key.expert)
        if isinstance(slot, Adapter):
            base = self.weight(key._replace(expert=self.experts[0]))
            return (base.float() + slot.factors(key.layer, key.projection).dense()).to(base.dtype)
        checkpoint, index = slot
        return checkpoint.weight(index, key.layer, key.projection)

    def born_factors(self, key: MatrixKey) -> Factors | None:
        """Factors of a matrix that was low-rank from the start, as its owner made them; None if it is dense.

        Factors of more rows than the matrix has are brought to as many as it has, which is exact.
        """
        factors = self._own_factors(key)
        if factors is None or factors.rank <= self.shape.full_rank:
            return factors
        return decompose_factors(factors.a, factors.bt).factors

    def _own_factors(self, key: MatrixKey) -> Factors | None:
        slot = self._held(key.expert)
        if isinstance(slot, Adapter):
            return slot.factors(key.layer, key.projection)
        checkpoint, index = slot
        return checkpoint.factors(index, key.layer, key.projection)

    @functools.cached_property
    def born_ranks(self) -> dict[MatrixKey, int]:
        """Own ranks of the matrices that were low-rank from the start."""
        out: dict[MatrixKey, int] = {}
        for expert in self.experts[1:]:
            slot = self._slot(expert)
            if isinstance(slot, Guest):
                out |= slot.born_ranks
                continue
            for key in self.shape.keys(expert):
                if isinstance(slot, Adapter):
                    rank: int | None = slot.rank(key.layer, key.projection)
                else:
                    rank = slot[0].rank(slot[1], key.layer, key.projection)
                if rank is not None:
                    out[key] = min(rank, self.shape.full_rank)
        return out

    def router_row(self, expert: str, layer: int) -> Tensor:
        """Router row (hidden,) of one expert in one layer.

        Raises:
            CheckpointError: the expert is an adapter that came without one.
        """
        slot = self._slot(expert)
        if isinstance(slot, Guest):
            return slot.rows[layer]
        if not isinstance(slot, Adapter):
            return slot[0].router(layer)[slot[1]]
        row = slot.router_row(layer)
        if row is None:
            raise CheckpointError(
                f"{slot.folder}: adapter {expert} has no router row; fit one with: flexmore merge ... --router ridge"
            )
        return row

    def has_router_row(self, expert: str) -> bool:
        """Whether an expert came with a router row; a plain PEFT adapter does not."""
        slot = self._slot(expert)
        return not isinstance(slot, Adapter) or slot.router_row(0) is not None

    def router(self, layer: int, experts: Sequence[str] | None = None) -> Tensor:
        """Router rows (experts, hidden) of one layer; None means all experts of the source."""
        rows = [self.router_row(name, layer) for name in experts or self.experts]
        widest = functools.reduce(torch.promote_types, (row.dtype for row in rows))
        return torch.stack([row.to(widest) for row in rows])

    def digest(self, key: MatrixKey) -> str:
        """SHA-256 of one matrix's content: dtype, shape and bytes, whatever the layout."""
        if key not in self._digests:
            factors = self._own_factors(key)
            tensors = [self.weight(key)] if factors is None else [factors.a, factors.bt]
            self._digests[key] = digest(tensors)
        return self._digests[key]

    @property
    def with_own_rows(self) -> Source:
        """The same experts with the router rows that they came with; itself but for `with_rows`."""
        return self

    @property
    def rows_digest(self) -> str:
        """SHA-256 of the router rows that `with_rows` has put in place of the experts' own; empty where none were."""
        return ""

    @functools.cached_property
    def shared_digest(self) -> str:
        """SHA-256 of all shared tensors."""
        return digest(self.shared(name) for name in shared_tensors(self.shape))

    @property
    def base_digest(self) -> str:
        """SHA-256 of what all experts are corrections of: the shared tensors and the public expert."""
        content = [self.shared_digest, self.expert_digest(self.experts[0])]
        return hashlib.sha256("".join(content).encode()).hexdigest()

    def expert_digest(self, name: str) -> str:
        """SHA-256 of one expert: its matrices and router rows."""
        slot = self._slot(name)
        if isinstance(slot, Guest):
            return slot.digest
        if name not in self._expert_digests:
            rows = digest(self.router_row(name, layer) for layer in range(self.shape.num_layers))
            matrices = [self.digest(key) for key in self.shape.keys(name)]
            self._expert_digests[name] = hashlib.sha256("".join([rows, *matrices]).encode()).hexdigest()
        return self._expert_digests[name]

    def guest(self, name: str) -> Guest:
        """What a mixture elsewhere needs of an expert whose matrices do not leave; reads (and hashes) it."""
        return Guest(
            shape=self.shape,
            base=self.base_digest,
            digest=self.expert_digest(name),
            rows=tuple(self.router_row(name, layer).clone() for layer in range(self.shape.num_layers)),
            born_ranks={key: rank for key, rank in self.born_ranks.items() if key.expert == name},
        )

    def without(self, names: Collection[str]) -> Source:
        """The same source without some of its domain experts."""
        slots = {name: slot for name, slot in self._slots.items() if name not in names}
        rest = Source(self.trunk, slots, [text for text in self._origin if text.partition("=")[0] not in names])
        rest._digests, rest._expert_digests = self._digests, self._expert_digests
        return rest

    def check(self) -> Iterator[str]:
        """Read every tensor once, checking that it is finite; yields the name of each part done.

        Raises:
            CheckpointError: names the first damaged tensor.
        """
        for name in shared_tensors(self.shape):
            self.shared(name)
        for layer in range(self.shape.num_layers):
            for expert in filter(self.has_router_row, self.experts):
                self.router_row(expert, layer)
        yield "shared"
        for expert in self.experts:
            for key in self.shape.keys(expert):
                if self.born_factors(key) is None:
                    self.weight(key)
            yield expert

    def _slot(self, expert: str) -> Slot:
        return self._slots[expert]

    def _held(self, expert: str) -> tuple[Checkpoint, int] | Adapter:
        slot = self._slot(expert)
        if isinstance(slot, Guest):
            raise CheckpointError(f"expert {expert}: its matrices stay with its owner and cannot be read here")
        return slot


class _EqualRows(Source):
    """A source in which an expert without a router row has the public expert's, so that both weigh the same."""

    def router_row(self, expert: str, layer: int) -> Tensor:
        return super().router_row(expert if self.has_router_row(expert) else self.experts[0], layer)


def with_missing_rows(source: Source) -> Source:
    """The same experts; one that came without a router row weighs as much as the public expert."""
    equal = _EqualRows(source.trunk, source._slots, source.describe())
    equal._digests = source._digests
    return equal


class _GivenRows(Source):
    """A source whose router rows come from a file; all else is that of the source with its experts' own rows."""

    def __init__(self, own: Source, router: RouterRows) -> None:
        super().__init__(own.trunk, own._slots, own.describe())
        self._own, self._router = own, router
        self._digests = own._digests

    @functools.cached_property
    def widest_dtype(self) -> torch.dtype:
        return torch.promote_types(super().widest_dtype, self._router.rows.dtype)

    @property
    def with_own_rows(self) -> Source:
        return self._own

    @property
    def rows_digest(self) -> str:
        return self._router.digest

    def router_row(self, expert: str, layer: int) -> Tensor:
        if expert not in self._router.experts:
            raise CheckpointError(
                f"{self._router.where}: no router row of expert {expert}, only of {', '.join(self._router.experts)}; "
                "drop it, or fit rows of a mixture that keeps it with flexmore refit"
            )
        return self._router.row(expert, layer)

    def has_router_row(self, expert: str) -> bool:
        return expert in self._router.experts

    @property
    def base_digest(self) -> str:
        return self._own.base_digest

    def expert_digest(self, name: str) -> str:
        row = digest(self.router_row(name, layer) for layer in range(self.shape.num_layers))
        return hashlib.sha256(f"{self._own.expert_digest(name)}{row}".encode()).hexdigest()

    def without(self, names: Collection[str]) -> Source:
        return with_rows(self._own.without(names), self._router, verify=False)


def with_rows(source: Source, router: RouterRows, *, verify: bool = True) -> Source:
    """The same experts with router rows of a file in place of their own.

    Args:
        source: the experts.
        router: the rows; of experts that the source has not they are left aside.
        verify: whether to check, by hashing what all experts share, that the rows were fitted for these.

    Raises:
        CheckpointError: the rows are of another shape, or of experts of another public model.
    """
    own, shape = with_missing_rows(source.with_own_rows), source.shape
    layers, _, hidden = router.rows.shape
    if (layers, hidden) != (shape.num_layers, shape.hidden_size):
        raise CheckpointError(
            f"{router.where}: router rows of {layers} layers of width {hidden}, but {source.trunk.folder} has "
            f"{shape.num_layers} of width {shape.hidden_size}; fit rows for it with flexmore refit"
        )
    if verify and router.base != own.base_digest:
        raise CheckpointError(
            f"{router.where}: router rows for experts of another public model than {source.trunk.folder}; shared "
            "tensors and public expert must be the same bit for bit; fit rows for it with flexmore refit"
        )
    return _GivenRows(own, router)


def open_source(
    sources: Sequence[str], names: Sequence[str] | None = None, guests: Mapping[str, Guest] | None = None
) -> Source:
    """Open one or more SOURCE strings as one set of named experts.

    Args:
        sources: a folder, ``zoo://nano``, a hub id, or ``name=FOLDER`` repeated (two-expert
            checkpoints that share all but their own expert, or PEFT adapters).
        names: names for the experts of an N-expert checkpoint; None means its own.
        guests: by name, experts whose ``name=FOLDER`` is not opened, as it is on their owner's nodes; None means none.

    Raises:
        UsageError: the strings do not make sense together.
        CheckpointError: a folder cannot be read, or parts that must be equal differ.
    """
    if names is not None:
        check_names(names, where="--experts")
    guests = guests or {}
    parts = [_split_source(text, guests) for text in sources]
    plain = [(text, path) for text, (name, path) in zip(sources, parts, strict=True) if name is None]
    named = [(name, path) for name, path in parts if name is not None]
    if len(plain) > 1 or not parts:
        raise UsageError(f"source: give one folder, or name=FOLDER for each expert, got {list(sources)}")
    slots: dict[str, Slot] = {}
    if plain:
        trunk = Checkpoint(plain[0][1])
        for index, name in enumerate(_names_of(trunk, names)):
            slots[name] = (trunk, index)
    opened = [(name, guests.get(name) or _open_expert(path)) for name, path in named]
    if names is not None and not plain and (len(names) != 1 + len(named) or list(names[1:]) != [n for n, _ in named]):
        raise UsageError(
            f"--experts: the sources hold a public expert, {', '.join(n for n, _ in named)}; got {', '.join(names)}"
        )
    if not plain:
        trunk = _first_checkpoint(opened)
        slots["public" if names is None else names[0]] = (trunk, 0)
    for name, expert in opened:
        check_names([*slots, name], where="source")
        if isinstance(expert, Adapter):
            expert.check(trunk.shape)
            slots[name] = expert
        elif isinstance(expert, Guest):
            slots[name] = expert
        else:
            _check_pair(name, expert, trunk)
            slots[name] = (expert, 1)
    source = Source(trunk, slots, [_absolute(text, guests) for text in sources])
    for name, guest in guests.items():
        if guest.shape != trunk.shape or guest.base != source.base_digest:
            raise CheckpointError(
                f"expert {name}: trained from another public model than {trunk.folder}; shared tensors and public "
                "expert must be the same bit for bit"
            )
    return source


def absent_experts(sources: Sequence[str], names: Collection[str]) -> list[str]:
    """Those of `names` whose ``name=FOLDER`` has an absolute folder that is missing or not readable here."""
    parts = (text.partition("=") for text in sources)
    folders = {name: open_path(path) for name, _, path in parts if name in names}
    here = {name: path.expanduser() for name, path in folders.items() if isinstance(path, Path)}
    return [name for name, path in here.items() if path.is_absolute() and not os.access(path, os.R_OK | os.X_OK)]


def resolve_folder(text: str) -> AnyPath:
    """The folder that a SOURCE string without a name points to, here or by URI; a hub id is downloaded.

    Raises:
        CheckpointError: there is no such folder, embedded mixture or hub repository.
    """
    if text.startswith("zoo://"):
        return zoo_path(text.removeprefix("zoo://"))
    if not text:
        raise UsageError("source: a folder, a hub id or zoo://nano is needed, got an empty text")
    if "://" in text:
        return open_path(text)
    folder = Path(text).expanduser()
    # What looks like a hub id but starts with a folder that is here is a mistyped path.
    if folder.exists() or not _HUB_ID.fullmatch(text) or folder.parent.exists():
        return folder
    return _download(text)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
    except Exception as error:  # the hub client raises its own, the HTTP client's and OS errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{repo}: no such folder here, and as a hub id it cannot be had ({reason}); check the path, or the network"
        ) from error


def _split_source(text: str, guests: Collection[str] = ()) -> tuple[str | None, AnyPath]:
    name, equals, path = text.partition("=")
    if equals and name in guests:
        return name, open_path(path)
    if not equals or "/" in name or Path(text).exists():
        return None, resolve_folder(text)
    check_names([name], where=f"source {text}")
    return name, resolve_folder(path)


def _absolute(text: str, guests: Collection[str]) -> str:
    name, path = _split_source(text, guests)
    if name in guests or text.rpartition("=")[2].startswith("zoo://"):
        return text
    return str(path.resolve()) if name is None else f"{name}={path.resolve()}"


def _names_of(checkpoint: Checkpoint, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return check_names(checkpoint.names, where=str(checkpoint.folder))
    if len(names) != checkpoint.num_experts:
        raise UsageError(
            f"--experts: {checkpoint.folder} has {checkpoint.num_experts} experts, got {len(names)} names "
            f"({', '.join(names)})"
        )
    return check_names(names, where="--experts")


def _open_expert(folder: AnyPath) -> Checkpoint | Adapter:
    if (folder / "adapter_config.json").exists():
        return Adapter(folder)
    checkpoint = Checkpoint(folder)
    if checkpoint.num_experts != 2:
        raise CheckpointError(f"{folder}: name=FOLDER takes a two-expert checkpoint, this has {checkpoint.num_experts}")
    return checkpoint


def _first_checkpoint(opened: Sequence[tuple[str, Checkpoint | Adapter | Guest]]) -> Checkpoint:
    for _, expert in opened:
        if isinstance(expert, Checkpoint):
            return expert
    raise UsageError("source: adapters alone have no public expert; add a checkpoint here that holds it")


def _check_pair(name: str, pair: Checkpoint, trunk: Checkpoint) -> None:
    """Check bit for bit that a two-expert checkpoint has the trunk's shared tensors and public expert."""
    if pair is trunk:
        return
    if pair.shape != trunk.shape:
        raise CheckpointError(f"{pair.folder}: expert {name} has other sizes than {trunk.folder}: {pair.shape}")
    for tensor in shared_tensors(trunk.shape):
        _check_equal(tensor, pair, pair.shared(tensor), trunk, trunk.shared(tensor))
    for layer in range(trunk.shape.num_layers):
        row, reference = pair.router(layer)[0], trunk.router(layer)[0]
        _check_equal(f"{router_tensor(layer)} row 0", pair, row, trunk, reference)
        for p in PROJECTIONS:
            values, reference = pair.weight(0, layer, p), trunk.weight(0, layer, p)
            _check_equal(expert_tensor(layer, 0, p), pair, values, trunk, reference)


def _check_equal(name: str, pair: Checkpoint, values: Tensor, trunk: Checkpoint, reference: Tensor) -> None:
    if values.dtype == reference.dtype and torch.equal(values, reference):
        return
    difference = (values.double() - reference.double()).abs().max().item()
    raise CheckpointError(
        f"{pair.folder}: tensor {name} must equal that of {trunk.folder} bit for bit: largest difference "
        f"{difference:.3g}, dtypes {values.dtype} and {reference.dtype}; were they trained from one public model?"
    )


def flexolmo_plan(source: Source, rows: Tensor | None = None) -> dict[str, Callable[[], Tensor]]:
    """Tensors of a source as one plain FlexOlmo checkpoint in the per-expert layout.

    Args:
        source: the experts.
        rows: router rows (layers, experts, hidden) to write; None keeps the source's own.
    """
    plan: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(source.shared, name) for name in shared_tensors(source.shape)
    }
    for layer in range(source.shape.num_layers):
        if rows is None:
            plan[router_tensor(layer)] = functools.partial(source.router, layer)
        else:
            plan[router_tensor(layer)] = functools.partial(rows[layer].to, source.dtype)
        for index, expert in enumerate(source.experts):
            for p in PROJECTIONS:
                key = MatrixKey(expert, layer, p)
                plan[expert_tensor(layer, index, p)] = functools.partial(source.weight, key)
    return plan
