"""What a mixture is, as plain data: experts, rank assignment, active experts, identity.

A rank assignment gives each domain expert one of

    an integer r >= 1    a correction of the public expert of rank r
    "full"               its own dense weights
    "drop"               left out, router row and all

and an integer may be refined: a mapping from projection to a rank, or to one rank per layer.
When the mixture is served, an expert with ``placement: own`` has processes of its own.
Nothing here reads a weight: `MixtureSpec.assignment` needs only the sizes of the matrices.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import numbers
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import yaml

from flexmore_ray.atomic import write_file
from flexmore_ray.errors import UsageError
from flexmore_ray.storage import AnyPath, RemotePath, StorageError, open_path

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FULL: Literal["full"] = "full"
DROP: Literal["drop"] = "drop"

MatrixRank = int | Literal["full"]
"""The rank of one matrix: an integer >= 1, or "full" for its dense weights."""
ExpertRank = int | str | Mapping[str, Any]
"""What a mixture file may say of one expert: see `check_rank`."""

_MIXTURE_KEYS = ("source", "store", "router", "experts", "ranks", "active")
_ENTRY_KEYS = ("rank", "placement", "nodes")
YAML_BYTES = 2**18
"""A mixture, plan or suite file is never larger."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class MatrixKey(NamedTuple):
    """One matrix of a mixture: expert name, layer (from 0), projection (one of `PROJECTIONS`)."""

    expert: str
    layer: int
    projection: str

    def __str__(self) -> str:
        return f"expert {self.expert}, layer {self.layer}, {self.projection}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a FlexOlmo model that parameter counts depend on (names as in its config)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    """Whether the output head shares the embedding matrix."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from a FlexOlmo (or FlexMoRE) ``config.json``.

        Raises:
            KeyError: a required entry is missing.
        """
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def matrix(self, projection: str) -> tuple[int, int]:
        """Rows and columns (out, in) of an expert's projection."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (hidden, inner) if projection == "down_proj" else (inner, hidden)

    def keys(self, expert: str) -> list[MatrixKey]:
        """All matrices of one expert, layer by layer."""
        return [MatrixKey(expert, layer, p) for layer in range(self.num_layers) for p in PROJECTIONS]

    @property
    def full_rank(self) -> int:
        """min(in, out): the rank from which on a truncation is the whole matrix."""
        return min(self.hidden_size, self.intermediate_size)


def suggest(name: str, known: Sequence[str]) -> str:
    """The known names, closest first, for the end of an error message."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def check_names(names: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Check expert names: at least the public one, unique, made of letters, digits and ``_ . -``.

    Raises:
        UsageError: a name is malformed or repeated, or there is none.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: expert names are a list of words, got {names!r}")
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: an expert name has only letters, digits, '_', '.', '-', got {name!r}")
    if not names or len(set(names)) != len(names):
        raise UsageError(f"{where}: expert names must be unique and at least one, got {list(names)}")
    return tuple(names)


def check_matrix_rank(rank: Any, *, where: str) -> MatrixRank:
    """Check the rank of one matrix: an integer >= 1 or "full".

    Raises:
        UsageError: anything else, booleans and fractions included.
    """
    if rank == FULL:
        return FULL
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        hint = "to leave an expert out write drop" if rank == 0 else "for its dense weights write full"
        raise UsageError(f"{where}: a rank is an integer >= 1, full or drop, got {rank!r}; {hint}")
    return int(rank)


def check_rank(rank: Any, num_layers: int | None = None, *, where: str) -> ExpertRank:
    """Check what a mixture file says of one expert.

    Args:
        rank: an integer >= 1, "full", "drop", or a mapping with one entry per projection, each
            an integer >= 1, "full", or a list of these with one entry per layer.
        num_layers: the length that such a list must have; None leaves it unchecked.
        where: what to call the entry in an error, such as ``ranks.math``.

    Raises:
        UsageError: any rule above is broken; the message has the key, the rule and the value.
    """
    if rank == DROP:
        return DROP
    if not isinstance(rank, Mapping):
        return check_matrix_rank(rank, where=where)
    for projection in rank:
        if projection not in PROJECTIONS:
            raise UsageError(f"{where}: unknown projection {projection!r}; known: {', '.join(PROJECTIONS)}")
    if missing := [projection for projection in PROJECTIONS if projection not in rank]:
        raise UsageError(f"{where}: a rank for every projection is needed, missing: {', '.join(missing)}")
    return {p: _check_layers(rank[p], num_layers, where=f"{where}.{p}") for p in PROJECTIONS}


def _check_layers(rank: Any, num_layers: int | None, *, where: str) -> MatrixRank | list[MatrixRank]:
    if not isinstance(rank, list | tuple):
        return check_matrix_rank(rank, where=where)
    if num_layers is not None and len(rank) != num_layers:
        raise UsageError(f"{where}: a list has one rank per layer ({num_layers}), got {len(rank)}")
    return [check_matrix_rank(r, where=f"{where}[{layer}]") for layer, r in enumerate(rank)]


def parse_rank(text: str, *, where: str) -> ExpertRank:
    """Read a rank from the command line: ``64``, ``full``, ``drop``, or a YAML mapping by projection."""
    try:
        rank = yaml.safe_load(text)
    except yaml.YAMLError:
        rank = text
    return check_rank(rank, where=where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Plain-data description of a mixture; what a mixture file holds.

    Raises:
        UsageError: a field breaks its rule.
    """

    source: tuple[str, ...] = ()
    """SOURCE strings of the experts; empty where the mixture is described without weights."""
    store: str | None = None
    """Folder of a store to take factors from; None means the store of the source in the cache."""
    router: str | None = None
    """File of router rows that take the place of the experts' own (`flexmore refit`); None keeps their own."""
    experts: tuple[str, ...] | None = None
    """Names for an N-expert checkpoint, the public expert first; None means the checkpoint's own."""
    ranks: Mapping[str, ExpertRank] = dataclasses.field(default_factory=dict)
    """Rank of each domain expert; one that is not named stays full."""
    active: int | None = None
    """Experts chosen per token; None means as many as the checkpoint says, or all that are kept if fewer."""
    own: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Experts that are served by processes of their own, and where those may run: "LABEL=VALUE" for a node label,
    the name of a custom resource, or None for any node. It changes no output."""
    mixture_id: str | None = None
    """Stable hash of everything that decides the outputs; None until the weights are known."""

    def __post_init__(self) -> None:
        active = self.active
        if active is not None and (isinstance(active, bool) or not isinstance(active, int) or active < 1):
            raise UsageError(f"active: the number of experts per token is an integer >= 1, got {active!r}")
        if self.store is not None and not isinstance(self.store, str):
            raise UsageError(f"store: the folder of a store is a string, got {self.store!r}")
        if self.router is not None and (not isinstance(self.router, str) or not self.router):
            raise UsageError(f"router: the name of a file of router rows is needed, got {self.router!r}")
        if not isinstance(self.ranks, Mapping):
            raise UsageError(f"ranks: a mapping from expert to rank is needed, got {self.ranks!r}")
        if self.experts is not None:
            object.__setattr__(self, "experts", check_names(self.experts, where="experts"))
        ranks = {name: check_rank(rank, where=f"ranks.{name}") for name, rank in self.ranks.items()}
        object.__setattr__(self, "ranks", ranks)
        for name, nodes in self.own.items():
            if nodes is not None and (not isinstance(nodes, str) or not nodes):
                raise UsageError(f"ranks.{name}.nodes: LABEL=VALUE or the name of a resource is needed, got {nodes!r}")

    def with_ranks(self, ranks: Mapping[str, ExpertRank]) -> MixtureSpec:
        """The same mixture with some experts' ranks replaced."""
        if not isinstance(ranks, Mapping):
            raise UsageError(f"ranks: a mapping from expert to rank is needed, got {ranks!r}")
        return dataclasses.replace(self, ranks={**self.ranks, **ranks}, mixture_id=None)

    def assignment(
        self,
        experts: Sequence[str],
        shape: ModelShape,
        *,
        born: Mapping[MatrixKey, int] | None = None,
        default_active: int = 1,
    ) -> Assignment:
        """The rank of every matrix of every kept expert, in canonical form.

        Args:
            experts: all expert names of the source, the public one first.
            shape: the model's sizes.
            born: own ranks of matrices that were low-rank from the start; such a matrix keeps
                its own rank where a higher one, or "full", is asked. None means there are none.
            default_active: experts per token where the mixture does not say.

        Raises:
            UsageError: an unknown expert, a rank for the public expert, more active than kept.
        """
        for name in self.ranks:
            if name not in experts:
                raise UsageError(f"ranks: unknown expert {name!r}; {suggest(name, list(experts[1:]))}")
            if name == experts[0] and self.ranks[name] != FULL:
                raise UsageError(f"ranks.{name}: the public expert is the base of all corrections and stays full")
        for name in self.own:
            if name == experts[0] or self.ranks.get(name, FULL) == DROP:
                raise UsageError(f"ranks.{name}.placement: own is for a domain expert that is kept, not for {name}")
        kept = {}
        for name in experts:
            rank = check_rank(self.ranks.get(name, FULL), shape.num_layers, where=f"ranks.{name}")
            if rank != DROP:
                kept[name] = _expand(name, rank, shape, born or {})
        active = min(default_active, len(kept)) if self.active is None else self.active
        if active > len(kept):
            raise UsageError(
                f"active: {active} experts per token asked, but the mixture keeps only {len(kept)} "
                f"({', '.join(kept)}); lower active or drop fewer experts"
            )
        return Assignment(ranks=kept, active=active)

    def to_dict(self) -> dict[str, Any]:
        """The mixture file's content; entries that hold their default are left out."""
        out: dict[str, Any] = {}
        if self.store is not None:
            out["store"] = self.store
        if self.source:
            out["source"] = self.source[0] if len(self.source) == 1 else list(self.source)
        if self.router is not None:
            out["router"] = self.router
        if self.experts is not None:
            out["experts"] = list(self.experts)
        out["ranks"] = {name: dict(r) if isinstance(r, Mapping) else r for name, r in self.ranks.items()}
        for name, nodes in self.own.items():
            entry = {"rank": out["ranks"].get(name, FULL), "placement": "own"}
            out["ranks"][name] = entry if nodes is None else entry | {"nodes": nodes}
        return out if self.active is None else out | {"active": self.active}

    def save(self, path: str | AnyPath) -> None:
        """Write the mixture file (YAML)."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        write_file(open_path(path), lambda file: file.write(text.encode()))

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "mixture") -> MixtureSpec:
        """Read a mixture file's content; `where` names it in errors.

        Raises:
            UsageError: an unknown key or a value that breaks its rule.
        """
        if not isinstance(data, Mapping):
            raise UsageError(f"{where}: a mixture file is a mapping with keys {', '.join(_MIXTURE_KEYS)}")
        for key in data:
            if key not in _MIXTURE_KEYS:
                raise UsageError(f"{where}: unknown key {key!r}; {suggest(str(key), _MIXTURE_KEYS)}")
        source = data.get("source", ())
        source = [source] if isinstance(source, str) else source or []
        if not isinstance(source, list | tuple) or not all(isinstance(item, str) for item in source):
            raise UsageError(f"{where}: source is a string or a list of name=FOLDER strings, got {source!r}")
        if not source and not data.get("store"):
            raise UsageError(f"{where}: a mixture file names its source or its store, got neither")
        try:
            ranks, own = _read_entries(data.get("ranks"))
            return cls(
                source=tuple(source),
                store=data.get("store"),
                router=data.get("router"),
                experts=data.get("experts"),
                ranks=ranks,
                active=data.get("active"),
                own=own,
            )
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | AnyPath) -> MixtureSpec:
        """Read a mixture file; relative paths in it are relative to the file.

        Raises:
            UsageError: the file is missing, is not YAML, or breaks a rule.
        """
        path = open_path(path)
        spec = cls.from_dict(read_yaml(path, "mixture file"), where=str(path))
        source = tuple(_relative_to(item, path.parent) for item in spec.source)
        store, router = (item and _relative_to(item, path.parent) for item in (spec.store, spec.router))
        return dataclasses.replace(spec, source=source, store=store, router=router)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """A rank for every matrix of every kept expert: the canonical form of a rank assignment.

    Two mixture files with the same weights and equal assignments are the same mixture: a rank at
    or above the full one is written "full", and an expert that is dropped does not appear.
    """

    ranks: Mapping[str, Mapping[str, tuple[MatrixRank, ...]]]
    """expert -> projection -> one rank per layer; the public expert is always full."""
    active: int
    """Experts chosen per token."""

    def rank(self, key: MatrixKey) -> MatrixRank:
        """The rank of one matrix of a kept expert."""
        return self.ranks[key.expert][key.projection][key.layer]

    @property
    def highest_rank(self) -> int:
        """The highest rank of any low-rank matrix; 1 if there is none."""
        ranks = (r for layers in self.ranks.values() for rs in layers.values() for r in rs)
        return max((r for r in ranks if isinstance(r, int)), default=1)

    def summary(self, name: str) -> MatrixRank | str:
        """One word for a table: the expert's rank, "full", "drop", or "min-max" where it varies."""
        if name not in self.ranks:
            return DROP
        values = {rank for layers in self.ranks[name].values() for rank in layers}
        if len(values) == 1:
            return values.pop()
        numbers = sorted(r for r in values if isinstance(r, int))
        return f"{numbers[0]}-{FULL if FULL in values else numbers[-1]}"

    def compact(self, name: str) -> ExpertRank:
        """The shortest way a mixture file can say this expert's ranks."""
        if name not in self.ranks:
            return DROP
        by_projection = {p: rs[0] if len(set(rs)) == 1 else list(rs) for p, rs in self.ranks[name].items()}
        values = list(by_projection.values())
        same = all(not isinstance(v, list) and v == values[0] for v in values)
        return values[0] if same and not isinstance(values[0], list) else by_projection

    def mixture_id(self, digests: Mapping[str, str]) -> str:
        """Stable hash of everything that decides the mixture's outputs.

        Args:
            digests: content hash of the shared tensors under "shared", and of each kept expert's
                matrices and router rows under its name.
        """
        experts = [[digests[name], {p: list(r) for p, r in layers.items()}] for name, layers in self.ranks.items()]
        content = {"shared": digests["shared"], "experts": experts, "active": self.active}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_entries(entries: Any) -> tuple[Any, dict[str, str | None]]:
    """Ranks by expert, and the placement of those whose entry is a mapping with ``placement``."""
    ranks: Any = {} if entries is None else entries
    own: dict[str, str | None] = {}
    if not isinstance(ranks, Mapping):
        return ranks, own
    for name, entry in ranks.items():
        if not isinstance(entry, Mapping) or not set(entry) & set(_ENTRY_KEYS):
            continue
        for key in entry:
            if key not in _ENTRY_KEYS:
                raise UsageError(f"ranks.{name}: unknown key {key!r}; {suggest(str(key), _ENTRY_KEYS)}")
        if entry.get("placement") != "own":
            raise UsageError(f"ranks.{name}.placement: own is the only one to ask for, got {entry.get('placement')!r}")
        own[name] = entry.get("nodes")
    return {name: ranks[name].get("rank", FULL) if name in own else rank for name, rank in ranks.items()}, own


def _expand(
    name: str, rank: ExpertRank, shape: ModelShape, born: Mapping[MatrixKey, int]
) -> dict[str, tuple[MatrixRank, ...]]:
    by_projection = rank if isinstance(rank, Mapping) else dict.fromkeys(PROJECTIONS, rank)
    out = {}
    for projection in PROJECTIONS:
        value = by_projection[projection]
        layers = value if isinstance(value, list) else [value] * shape.num_layers
        keys = [MatrixKey(name, layer, projection) for layer in range(shape.num_layers)]
        out[projection] = tuple(_canonical(r, shape, born.get(key)) for r, key in zip(layers, keys, strict=True))
    return out


def _canonical(rank: MatrixRank, shape: ModelShape, born: int | None) -> MatrixRank:
    if born is not None:
        return born if rank == FULL else min(rank, born)
    return FULL if rank == FULL or rank >= shape.full_rank else rank


def _relative_to(item: str, folder: AnyPath) -> str:
    """A place that a mixture file names as an absolute path, read relative to the file if it exists there."""
    name, equals, path = item.rpartition("=")
    if "://" in path or (isinstance(folder, RemotePath) and path.startswith(("/", "~"))):
        return item
    if not (folder / path).exists():
        return item
    return f"{name}{equals}{(folder / path).resolve()}"


def read_yaml(path: AnyPath, what: str) -> Any:
    """The content of a YAML file in which no key is given twice.

    Args:
        path: the file.
        what: what to call it in an error, such as "mixture file".

    Raises:
        UsageError: it is missing, cannot be read, is not such YAML, or larger than such a file ever is.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(YAML_BYTES + 1)
        return parse_yaml(raw.decode(), where=str(path), what=what)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a YAML {what}: {error}") from None
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot read the {what}: {error.strerror}") from None


def parse_yaml(text: str, *, where: str, what: str) -> Any:
    """The content of YAML text, as `read_yaml` takes it.

    Raises:
        UsageError: it is not such YAML, nested too deeply, or larger than such a file ever is.
    """
    if len(text) > YAML_BYTES:
        raise UsageError(f"{where}: a {what} has at most {YAML_BYTES:,} bytes, and this one has more")
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none, or of too long a number
        raise UsageError(f"{where}: not a YAML {what}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{where}: not a YAML {what}: nested too deeply") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a choice of the last, and which grows by no reference."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of which can stand for gigabytes
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a reference (*name) is not taken; write it out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for node_of_key, _ in node.value:
            key = self.construct_object(node_of_key, deep=True)
            if isinstance(key, Hashable):  # any other is refused below
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)
