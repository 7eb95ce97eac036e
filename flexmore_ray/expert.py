"""One domain expert at work: holds its factors within a budget, decomposes on demand, writes through to the store.

`Expert` is an ordinary class, safe to call from many threads; `flexmore_ray.experts` makes actors of it.

A request for a truncation is answered from memory where the rows are held. Otherwise they are read from the
store, and where that has none, the matrix is decomposed, written to the store, and then served. So whatever
memory lets go of is on disk already, and an expert that starts again after a kill gives the same bits.
A delta is held as its factors, which at full rank are all of it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import platform
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from flexmore_ray.build import StoreWriter, check_max_rank, decompose_matrix, target_rank
from flexmore_ray.errors import StoreError, UsageError
from flexmore_ray.moments.files import Metric
from flexmore_ray.source import Source, open_source, resolve_folder
from flexmore_ray.spec import MatrixKey
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import (
    STORE_DTYPES,
    Entry,
    WeightSource,
    delta_digests,
    parse_device,
    read_factors,
    read_spectrum,
)

MEMORY = 4 * 2**30
"""Bytes of factors that an expert holds unless told otherwise."""

Observe = Callable[[str, int], object]
"""Told what happened and how often: truncations, cache_hits, cache_misses, decompositions, evictions."""
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdings:
    """What an expert holds, and what it has done since it started."""

    expert: str
    matrices: int
    """Matrices with rows in memory."""
    bytes: int
    """Memory that they take."""
    budget: int
    """Memory that they may take."""
    stored: int
    """Matrices known to be in the store."""
    truncations: int
    cache_hits: int
    """Truncations whose rows were in memory."""
    cache_misses: int
    """Truncations that had to wait for the store or for a decomposition."""
    decompositions: int
    evictions: int
    device: str
    node: str
    """Name of the machine."""
    pid: int


class FactorCache:
    """Factors by matrix within a budget; what was not asked for longest goes first.

    Args:
        budget: bytes to hold at most.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._held: collections.OrderedDict[MatrixKey, Factors] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: MatrixKey, rank: int) -> Factors | None:
        """Factors of a matrix where at least `rank` rows are held; None where they are not."""
        held = self._held.get(key)
        if held is None or held.rank < rank:
            return None
        self._held.move_to_end(key)
        return held

    def put(self, key: MatrixKey, factors: Factors) -> int:
        """Hold factors, unless they alone exceed the budget; returns how many matrices had to go."""
        self._drop(key)
        size = _size(factors)
        if size > self.budget:
            return 0
        evicted = 0
        while self.bytes + size > self.budget:
            self._drop(next(iter(self._held)))
            evicted += 1
        self._held[key] = factors
        self.bytes += size
        return evicted

    def _drop(self, key: MatrixKey) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.bytes -= _size(held)


class Expert:
    """Truncations of one domain expert's deltas. Nothing is opened before the first request.

    Args:
        name: the domain expert.
        weights: opens the source that holds it.
        folder: the store that everything is written through to.
        dtype: of the factors: float32, bfloat16 or float16.
        max_rank: highest rank to decompose to and to serve, inclusive; None means all.
        memory: bytes of factors to hold at most. One larger matrix is served from the store, row by row.
        device: where to decompose and hold; None means a GPU where there is one.
        metric: in which to decompose; None means that of the folder's store, the plain one of a new store.
        observe: told of events as they happen.

    Raises:
        UsageError: a rank, a budget or a dtype that breaks its rule.
    """

    def __init__(
        self,
        name: str,
        weights: Callable[[], WeightSource],
        folder: str | AnyPath,
        *,
        dtype: str = "float32",
        max_rank: int | None = None,
        memory: int = MEMORY,
        device: str | None = None,
        metric: Metric | None = None,
        observe: Observe | None = None,
    ) -> None:
        check_max_rank(max_rank)
        if memory < 0:
            raise UsageError(f"memory: bytes to hold at most, 0 or more, got {memory}")
        self.name = name
        self._weights, self._folder, self._dtype, self._max_rank = weights, open_path(folder), dtype, max_rank
        self._asked_device, self._metric, self._observe = device, metric, observe
        self._cache = FactorCache(memory)
        self._counts: collections.Counter[str] = collections.Counter()
        self._entries: dict[MatrixKey, Entry] = {}
        self._max_ranks: dict[MatrixKey, int] = {}
        self._lock = threading.Lock()  # of cache, counts and entries; held for moments only
        self._matrix_locks: collections.defaultdict[MatrixKey, threading.Lock] = collections.defaultdict(threading.Lock)
        self._opening = threading.Lock()
        self._computing = threading.Lock()  # one decomposition at a time, or their temporaries fill the memory
        self._writing = threading.Lock()  # likewise one file, while the next matrix is decomposed
        self._opened: tuple[WeightSource, StoreWriter, torch.device] | None = None

    def __repr__(self) -> str:
        return f"expert:{self.name}"

    # ---- answers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return STORE_DTYPES[self._dtype]

    def max_rank(self, key: MatrixKey) -> int:
        """Highest rank that `factors` gives for this delta.

        Raises:
            StoreError: the matrix is not this expert's.
        """
        if key not in self._max_ranks:
            source, _, _ = self._open()
            if key not in source.shape.keys(self.name):
                raise StoreError(f"{self._folder}: holds no factors of {key}; asked of expert {self.name}")
            self._max_ranks[key] = target_rank(source, key, self._max_rank)
        return self._max_ranks[key]

    def spectrum(self, key: MatrixKey) -> Tensor:
        """Singular values of one delta, float64, largest first; all, or as many as are known."""
        self.max_rank(key)
        with self._matrix_lock(key):
            return self._reading(key, read_spectrum)

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        """Factors of one delta at a rank, as views on what is held: not to be written to.

        Raises:
            UsageError: the rank is not positive.
            StoreError: the rank is above `max_rank(key)`, or the store cannot be written.
            CheckpointError: the weights cannot be read, or hold NaN or infinity.
        """
        return self.truncations({key: rank})[key]

    def truncations(self, ranks: Mapping[MatrixKey, int]) -> dict[MatrixKey, Factors]:
        """Factors of several deltas, each at its own rank; see `factors`."""
        for key, rank in ranks.items():
            self._check_rank(key, rank)
        return {key: self._truncation(key, rank) for key, rank in ranks.items()}

    def ensure(self, key: MatrixKey, *, thorough: bool = False) -> tuple[Entry, str]:
        """Make sure that the store has one delta.

        Args:
            key: the matrix.
            thorough: read its file in full to see whether it is still good.

        Returns:
            What the store has, and what was done: "kept", or "decomposed (METHOD)".
        """
        self.max_rank(key)
        with self._matrix_lock(key):
            if thorough or key not in self._entries:
                entry, made = self._obtain(key, thorough=thorough)
                return entry, "kept" if made is None else f"decomposed ({entry.method})"
            return self._entries[key], "kept"

    def entries(self) -> list[Entry]:
        """What is known to be in the store: what was asked for, so far."""
        with self._lock:
            return list(self._entries.values())

    def holdings(self) -> Holdings:
        """What is held and was done; answers at once whatever else is going on."""
        with self._lock:
            names = ("truncations", "cache_hits", "cache_misses", "decompositions", "evictions")
            return Holdings(
                expert=self.name,
                matrices=len(self._cache),
                bytes=self._cache.bytes,
                budget=self._cache.budget,
                stored=len(self._entries),
                device=str(self._opened[2] if self._opened else self._asked_device or ""),
                node=platform.node(),
                pid=os.getpid(),
                **{name: self._counts[name] for name in names},
            )

    def rest(self) -> None:
        """Take up no decomposition any more; returns when what was under way is in the store."""
        self._computing.acquire()
        self._writing.acquire()

    # ---- from memory, from the store, from the weights

    def _check_rank(self, key: MatrixKey, rank: int) -> None:
        if rank < 1:
            raise UsageError(f"a rank is an integer >= 1, got {rank} for {key}")
        if rank > self.max_rank(key):
            raise StoreError(
                f"{self._folder}: rank {rank} asked for {key}, but expert {self.name} goes up to rank "
                f"{self.max_rank(key)}; start it with a higher max_rank"
            )

    def _truncation(self, key: MatrixKey, rank: int) -> Factors:
        with self._lock:
            held = self._cache.get(key, rank)
        self._count("cache_misses" if held is None else "cache_hits")
        if held is None:
            held = self._fetch(key, rank)
        self._count("truncations")
        return held.truncate(rank)

    def _fetch(self, key: MatrixKey, rank: int) -> Factors:
        """Bring rows into memory: all of a matrix that is decomposed now, else just those asked for."""
        with self._matrix_lock(key):
            with self._lock:
                held = self._cache.get(key, rank)
            if held is None and key not in self._entries:
                _, held = self._obtain(key)
            if held is None:
                held = _converted(self._reading(key, lambda path: read_factors(path, rank)), self._open()[2])
                self._hold(key, held)
            return held

    def _reading(self, key: MatrixKey, read: Callable[[AnyPath], Value]) -> Value:
        """Read from a matrix's file; once more where another run replaced it, or where it was damaged."""
        entry = self._entries.get(key) or self._obtain(key)[0]
        try:
            return read(self._folder / entry.file)
        except StoreError:
            entry, _ = self._obtain(key, thorough=True)
            return read(self._folder / entry.file)

    def _obtain(self, key: MatrixKey, *, thorough: bool = False) -> tuple[Entry, Factors | None]:
        """A matrix's entry in the store; its factors too, where it had to be decomposed for it."""
        source, writer, device = self._open()
        digests = delta_digests(source, key)
        entry, factors = writer.find(key, self.max_rank(key), *digests, thorough=thorough), None
        if entry is None:
            with self._computing:
                result = decompose_matrix(source, key, self._max_rank, device, writer.recipe)
                self._writing.acquire()
            try:
                factors = _converted(result.factors, self.dtype)
                entry = writer.put(key, dataclasses.replace(result, factors=factors), *digests)
            finally:
                self._writing.release()
            self._count("decompositions")
            self._hold(key, factors)
        with self._lock:
            self._entries[key] = entry
        return entry, factors

    def _hold(self, key: MatrixKey, factors: Factors) -> None:
        with self._lock:
            evicted = self._cache.put(key, factors)
        if evicted:
            self._count("evictions", evicted)

    def _count(self, event: str, number: int = 1) -> None:
        with self._lock:
            self._counts[event] += number
        if self._observe:
            self._observe(event, number)

    def _matrix_lock(self, key: MatrixKey) -> threading.Lock:
        with self._lock:
            return self._matrix_locks[key]

    def _open(self) -> tuple[WeightSource, StoreWriter, torch.device]:
        """The source, the store and the device, opened by the first request, so that it is told what is wrong."""
        with self._opening:
            if self._opened is None:
                device = self._asked_device or ("cuda" if torch.cuda.is_available() else "cpu")
                place, writer = parse_device(device), StoreWriter(self._folder, self._dtype, self._metric)
                self._opened = self._weights(), writer, place
            return self._opened


def _size(factors: Factors) -> int:
    """Bytes of both factors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (factors.a, factors.bt))


def _converted(factors: Factors, target: torch.dtype | torch.device) -> Factors:
    """The same factors in another dtype or on a device, in memory of just their size, as a budget needs them."""
    return Factors(*(_exact(tensor.to(target)) for tensor in (factors.a, factors.bt)))


def _exact(tensor: Tensor) -> Tensor:
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def opener(source: WeightSource, expert: str) -> Callable[[], WeightSource]:
    """What opens a source for one expert in another process; it can be sent there.

    A `Source` is opened again from its SOURCE strings, without the folders of other experts; anything else is
    sent as it is.
    """
    if not isinstance(source, Source):
        return functools.partial(_itself, source)
    texts = source.describe()
    named = {text.partition("=")[0]: text for text in texts if "=" in text and "/" not in text.partition("=")[0]}
    plain = [text for text in texts if text not in named.values()]
    own_text = [named[expert]] if expert in named else []
    if plain:
        return functools.partial(open_source, [*plain, *own_text], source.experts[: len(source.experts) - len(named)])
    trunk = next(name for name, text in named.items() if _folder_of(text) == source.trunk.folder.resolve())
    names = dict.fromkeys([trunk, expert])
    return functools.partial(open_source, [named[name] for name in names], [source.experts[0], *names])


def _folder_of(text: str) -> AnyPath:
    return resolve_folder(text.partition("=")[2]).resolve()


def _itself(source: WeightSource) -> WeightSource:
    return source
