"""Expert actors: one Ray actor per domain expert, and the handle that asks them for factors.

    with start_experts(source, "store") as actors:             # a FactorSource, like the store itself
        mixture = load_mixture(spec, factors=actors)           # here, or in any task or actor given `actors`

Actors reserve no CPU, so they run beside whatever works on the same cluster. Ray restarts one that died, on
another node if it must, and repeats the calls that it had in hand; what they gave before comes from the store with
the same bits. One whose node drains finishes the matrix that it decomposes and moves. So the store's folder must be
one that all nodes see.
"""

from __future__ import annotations

import collections
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch import Tensor

from flexmore_ray.build import StoreWriter, check_max_rank, matrix_keys
from flexmore_ray.errors import FlexmoreError, StoreError, UsageError
from flexmore_ray.expert import MEMORY, Expert, Holdings, opener
from flexmore_ray.metrics import ExpertMetrics
from flexmore_ray.moments.files import Metric
from flexmore_ray.placement import Needs, check_room, offer
from flexmore_ray.runtime import move_when_leaving, nodes
from flexmore_ray.spec import MatrixKey, ModelShape, suggest
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import (
    STORE_DTYPES,
    Entry,
    FactorStore,
    WeightSource,
    check_digests,
    joint_recipe,
    open_store,
    read_entries,
)
from flexmore_ray.transport import Place, direct_transport, pack, received, this_place

START_SECONDS = 120.0
"""How long actors may take to come up before starting them counts as failed."""

_THREADS = 32  # calls that an actor has in hand at once; most of them wait, for a decomposition or for each other
_CHUNK = 32 * 2**20  # bytes of factors in one answer, so that no object store must hold a whole expert
_AHEAD = 2  # calls given to an actor at once
_IN_FLIGHT = 256 * 2**20  # bytes asked of all actors at once, so that they fit into the object store of a laptop
_CLOSE_SECONDS = 10.0

ExpertProgress = Callable[[str, int, int, str], None]
"""Called after each matrix with: expert, its matrices done, its matrices in all, what was done."""
Item = TypeVar("Item")


class ExpertActors:
    """Factors from expert actors; a `FactorSource`. Copies of it may be sent to tasks and actors.

    Used as a context manager where the actors were started, it ends them.

    Args:
        actors: the actor of each domain expert, by its name.
        source: the experts; None in a copy, which cannot write the store's manifest.
        shape: sizes of the matrices.
        folder: the store that actors write through to.
        dtype: of the factors, a key of `STORE_DTYPES`.
        transport: chooses Ray's direct transport from an actor to a receiver; None where the actors have none.
        metric: in which deltas are decomposed; None means that of the folder's store.
    """

    def __init__(
        self,
        actors: Mapping[str, Any],
        source: WeightSource | None,
        shape: ModelShape,
        folder: AnyPath,
        dtype: str,
        transport: Callable[[Place, Place], str | None] | None = None,
        metric: Metric | None = None,
    ) -> None:
        self.folder, self._metric = folder, metric
        self._actors, self._source, self._shape, self._dtype = dict(actors), source, shape, dtype
        self._choose_transport = transport
        self._places: dict[str, Place] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertActors, (
            self._actors,
            None,
            self._shape,
            self.folder,
            self._dtype,
            self._choose_transport,
            self._metric,
        )

    def __enter__(self) -> ExpertActors:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the domain experts that have an actor."""
        return tuple(self._actors)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return STORE_DTYPES[self._dtype]

    def recipe(self, expert: str) -> str:
        """What decided an expert's factors besides its weights: empty, but for a weighted store's."""
        if self._metric is None and StoreWriter(self.folder, self._dtype).committed:
            return open_store(self.folder).recipe(expert)
        recipes = [self._metric.recipe(key) for key in self._shape.keys(expert)] if self._metric else []
        return joint_recipe(recipes)

    # ---- a FactorSource

    def max_rank(self, key: MatrixKey) -> int:
        """Highest rank that `factors` gives for this delta.

        Raises:
            StoreError: no actor has it.
        """
        return self._ask(key.expert, self._actor(key).max_rank.remote(key))

    def spectrum(self, key: MatrixKey) -> Tensor:
        """Singular values of one delta, float64, largest first; decomposes it where that was not done."""
        return torch.from_numpy(self._ask(key.expert, self._actor(key).spectrum_array.remote(key)).copy())

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        """Factors of one delta at a rank, in memory of their own; decomposes it where that was not done.

        Raises:
            UsageError: the rank is not positive.
            StoreError: the rank is above `max_rank(key)`, no actor has the matrix, or the store cannot be written.
            CheckpointError: the weights cannot be read, or hold NaN or infinity.
            FlexmoreError: the actor cannot be started any more.
        """
        self._actor(key)
        return self._receive(key.expert, {key: rank}, self._request(key.expert, {key: rank}))[key]

    def truncations(self, ranks: Mapping[MatrixKey, int]) -> dict[MatrixKey, Factors]:
        """Factors of many deltas, each at its own rank: a layer, an expert, or several experts at once.

        Ranks nest: for several ranks of a matrix ask for the highest, and `Factors.truncate` cuts the others.

        Args:
            ranks: the rank of each matrix; see `keys`.

        Raises:
            as `factors`.
        """
        queues: dict[str, list[dict[MatrixKey, int]]] = {}
        for key, rank in ranks.items():
            self._actor(key)
            chunks = queues.setdefault(key.expert, [{}])
            if self._bytes(chunks[-1]) >= _CHUNK:
                chunks.append({})
            chunks[-1][key] = rank
        largest = max((self._bytes(chunk) for chunks in queues.values() for chunk in chunks), default=0)
        at_once = max(1, _IN_FLIGHT // (_AHEAD * max(1, largest)))
        got: dict[MatrixKey, Factors] = {}
        for expert, asked, reference in _work_off(queues, self._request, ahead=_AHEAD, experts_at_once=at_once):
            got |= self._receive(expert, asked, reference)
        return {key: got[key] for key in ranks}

    def keys(self, expert: str, layer: int | None = None) -> list[MatrixKey]:
        """The matrices of one expert, or of one of its layers."""
        return [key for key in self._shape.keys(expert) if layer is None or key.layer == layer]

    # ---- the actors

    def holdings(self) -> dict[str, Holdings]:
        """What each actor holds and has done since it started."""
        references = {name: _reporting(actor.holdings).remote() for name, actor in self._actors.items()}
        return {name: self._ask(name, reference) for name, reference in references.items()}

    def places(self) -> dict[str, Place]:
        """Where each actor runs now."""
        references = {name: _reporting(actor.place).remote() for name, actor in self._actors.items()}
        return {name: self._ask(name, reference) for name, reference in references.items()}

    def complete(
        self, progress: ExpertProgress | None = None, *, thorough: bool = False, at_once: int | None = None
    ) -> FactorStore:
        """Decompose what is missing, each actor its own expert, and write the store's manifest.

        Args:
            progress: told of every matrix.
            thorough: read files that the manifest names in full to see whether they are still good.
            at_once: experts that may decompose at the same time; None means all.

        Raises:
            StoreError: the store is of other weights, cannot be written, or is not seen by all nodes.
        """
        source = self._owned_source()
        writer = StoreWriter(self.folder, self._dtype, self._metric)
        if writer.committed:
            check_digests(self.folder, read_entries(writer.committed), source)
        queues = {name: self._shape.keys(name) for name in self._actors}
        entries: dict[MatrixKey, Entry] = {}
        done, decomposed = collections.Counter[str](), 0

        def submit(expert: str, key: MatrixKey) -> Any:
            return self._actors[expert].ensure.remote(key, thorough=thorough)

        for expert, key, reference in _work_off(queues, submit, ahead=1, experts_at_once=at_once):
            entries[key], action = self._ask(expert, reference)
            decomposed += action != "kept"
            done[expert] += 1
            if progress:
                progress(expert, done[expert], len(queues[expert]), f"{action} {key}")
        store = self._commit(writer, [entries[key] for key in matrix_keys(source)], source)
        store.decomposed = decomposed
        return store

    def commit(self) -> FactorStore | None:
        """Write the store's manifest if every actor has been asked for all its matrices since it started.

        The context does so at its end. Without a manifest the next actors find the files nevertheless.

        Returns:
            The store; None where an actor does not know of all its matrices.
        """
        references = [_reporting(actor.entries).remote() for actor in self._actors.values()]
        try:
            entries = [entry for found in ray.get(references, timeout=_CLOSE_SECONDS) for entry in found]
        except (GetTimeoutError, RayActorError):
            return None
        source = self._owned_source()
        if {entry.key for entry in entries} != set(matrix_keys(source)):
            return None
        writer = StoreWriter(self.folder, self._dtype, self._metric)
        known = {entry.file for entry in read_entries(writer.committed or {"entries": []})}
        if {entry.file for entry in entries} <= known:
            return open_store(self.folder)
        return self._commit(writer, entries, source)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)

    # ---- inside

    def _actor(self, key: MatrixKey) -> Any:
        if key.expert not in self._actors:
            known = ", ".join(self.experts)
            raise StoreError(f"{self.folder}: holds no factors of {key}; its domain experts are {known}")
        return self._actors[key.expert]

    def _ask(self, expert: str, reference: Any) -> Any:
        """The answer to a call; the actor's errors as they were raised there."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayActorError as error:
            raise FlexmoreError(f"expert {expert}: its actor has ended ({_line(error)}); start it again") from None

    def _request(self, expert: str, ranks: Mapping[MatrixKey, int]) -> Any:
        transport = self._transport(expert)
        if transport is None:
            return self._actors[expert].packed.remote(dict(ranks))
        return self._actors[expert].truncations.options(tensor_transport=transport).remote(dict(ranks))

    def _receive(self, expert: str, ranks: Mapping[MatrixKey, int], reference: Any) -> dict[MatrixKey, Factors]:
        try:
            return received(self._ask(expert, reference), self.dtype)
        except FlexmoreError:
            raise
        except (RayError, RuntimeError, ValueError):
            if self._places.pop(expert, None) is None:
                raise
            # The actor died before its memory was read, or now runs where it cannot be read directly.
            return received(self._ask(expert, self._actors[expert].packed.remote(dict(ranks))), self.dtype)

    def _transport(self, expert: str) -> str | None:
        if self._choose_transport is None:
            return None
        if expert not in self._places:
            self._places[expert] = self._ask(expert, _reporting(self._actors[expert].place).remote())
        return self._choose_transport(self._places[expert], this_place())

    def _bytes(self, ranks: Mapping[MatrixKey, int]) -> int:
        return sum(rank * sum(self._shape.matrix(key.projection)) for key, rank in ranks.items()) * self.dtype.itemsize

    def _owned_source(self) -> WeightSource:
        if self._source is None:
            raise UsageError("experts: a copy of the handle cannot finish the store; do it where they were started")
        return self._source

    def _commit(self, writer: StoreWriter, entries: Sequence[Entry], source: WeightSource) -> FactorStore:
        for entry in entries:
            if not (self.folder / entry.file).exists():
                raise StoreError(
                    f"{self.folder}: {entry.key} was written on another node and is not seen here; "
                    "name a folder that all nodes share"
                )
        return writer.commit(entries, source)


def _work_off(
    queues: Mapping[str, Iterable[Item]],
    submit: Callable[[str, Item], Any],
    *,
    ahead: int,
    experts_at_once: int | None = None,
) -> Iterator[tuple[str, Item, Any]]:
    """Give each expert's actor its items, `ahead` of them at once; yields expert, item and the finished call."""
    waiting = collections.deque((name, iter(items)) for name, items in queues.items())
    running: dict[Any, tuple[str, Item, Iterator[Item]]] = {}
    in_hand: collections.Counter[str] = collections.Counter()

    def fill(expert: str, items: Iterator[Item]) -> None:
        while in_hand[expert] < ahead:
            try:
                item = next(items)
            except StopIteration:
                return
            running[submit(expert, item)] = (expert, item, items)
            in_hand[expert] += 1

    while waiting or running:
        while waiting and (experts_at_once is None or sum(n > 0 for n in in_hand.values()) < experts_at_once):
            fill(*waiting.popleft())
        if not running:
            continue
        (reference,), _ = ray.wait(list(running), fetch_local=False)
        expert, item, items = running.pop(reference)
        in_hand[expert] -= 1
        fill(expert, items)
        yield expert, item, reference


def _reporting(method: Any) -> Any:
    """A method called so that it is answered while all other threads of the actor wait."""
    return method.options(concurrency_group="report")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ------------------------------------------------------------------------------------- starting


def start_experts(
    source: WeightSource,
    folder: str | AnyPath,
    *,
    num_gpus: float = 0,
    device: str | None = None,
    memory: int = MEMORY,
    pin: Mapping[str, str] | None = None,
    max_rank: int | None = None,
    dtype: str = "float32",
    metric: Metric | None = None,
    wait: float = START_SECONDS,
    run: str = "decompose",
) -> ExpertActors:
    """Start one actor for each domain expert of a source, spread over the nodes.

    Ray must be initialised. The actors end with the handle's context, or with the process that started them.
    While a pinned expert's nodes are away, requests to it wait for one of them to come back.

    Args:
        source: the experts. A `Source` is opened again where its actor runs, from its SOURCE strings and without
            the folders of other experts; anything else is sent there.
        folder: the store to look into and to write through to, on storage that all nodes share.
        num_gpus: GPUs of each actor; a fraction shares one.
        device: where to decompose and hold; None means the GPU where `num_gpus` gives one, else the CPU.
        memory: bytes of factors that each actor holds at most.
        pin: by expert, nodes that its actor may run on: "LABEL=VALUE" for a node label, or the name of a custom
            resource that these nodes have.
        max_rank: highest rank to decompose to and to serve, inclusive; None means all.
        dtype: of the factors: float32, bfloat16 or float16.
        metric: in which to decompose, its folders on storage that all nodes share; None means that of the folder's
            store, the plain one of a new store.
        wait: seconds that the actors may take to come up.
        run: what they belong to, in words, for their names and metrics.

    Raises:
        UsageError: no node has what an actor asks for, `pin` names an unknown expert, or an option breaks its rule.
        StoreError: the folder cannot be written, or holds a store of another dtype.
        FlexmoreError: an actor did not come up in time.
    """
    folder, names = open_path(folder).resolve(), source.experts[1:]
    for name in pin or {}:
        if name not in names:
            raise UsageError(f"pin: no domain expert is called {name!r}; {suggest(name, names)}")
    check_max_rank(max_rank)
    writer = StoreWriter(folder, dtype, metric)
    if writer.committed:
        check_digests(folder, read_entries(writer.committed), source)
    needs = {name: Needs(num_gpus=num_gpus, pin=(pin or {}).get(name)) for name in names}
    check_room({f"expert {name}": need for name, need in needs.items()}, nodes())
    unique = uuid.uuid4().hex[:4]
    settings = {
        "dtype": dtype,
        "metric": metric,
        "max_rank": max_rank,
        "memory": memory,
        "device": device or ("cuda" if num_gpus else "cpu"),
        "threads": max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, len(names))),
        "run": run,
    }
    actor, transport = actor_class(direct=num_gpus > 0), direct_transport if num_gpus else None
    actors = {
        name: actor.options(name=f"expert:{name}:{run}:{unique}", **needs[name].options()).remote(
            name, opener(source, name), folder, **settings
        )
        for name in names
    }
    handle = ExpertActors(actors, source, source.shape, folder, dtype, transport, metric)
    try:
        _wait_for(actors, needs, wait)
    except BaseException:
        handle.close()
        raise
    return handle


def decompose_on_cluster(
    source: WeightSource,
    folder: str | AnyPath,
    *,
    max_rank: int | None = None,
    dtype: str = "float32",
    num_gpus: float = 0,
    device: str | None = None,
    pin: Mapping[str, str] | None = None,
    thorough: bool = False,
    metric: Metric | None = None,
    progress: ExpertProgress | None = None,
) -> FactorStore:
    """Decompose every delta of a source's domain experts into a store, like `build_store`, on all nodes.

    Args:
        source, folder, max_rank, dtype, num_gpus, device, pin, metric: see `start_experts`.
        thorough: read files that the manifest names in full to see whether they are still good.
        progress: told of every matrix.

    Raises:
        as `start_experts` and `build_store`.
    """
    with start_experts(
        source,
        folder,
        num_gpus=num_gpus,
        device=device,
        memory=0,
        pin=pin,
        max_rank=max_rank,
        dtype=dtype,
        metric=metric,
    ) as actors:
        cpus = None if num_gpus else max(1, int(ray.cluster_resources().get("CPU", 1)))
        return actors.complete(progress, thorough=thorough, at_once=cpus)


def _wait_for(actors: Mapping[str, Any], needs: Mapping[str, Needs], seconds: float) -> None:
    waiting = {_reporting(actor.place).remote(): name for name, actor in actors.items()}
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=seconds, fetch_local=False)
    if late:
        names = ", ".join(f"{waiting[reference]} ({needs[waiting[reference]]})" for reference in late)
        raise FlexmoreError(
            f"experts: no actor came up within {seconds:g} s for {names}; the cluster has {offer(nodes())}, "
            "and other jobs may occupy it"
        )
    try:
        ray.get(ready)
    except RayError as error:
        raise FlexmoreError(f"experts: an actor could not start ({_line(error)})") from None


class ExpertActor(Expert):
    """An expert whose answers are made for sending, and who reports to Ray's metrics."""

    def __init__(self, name: str, *arguments: Any, threads: int, run: str, **settings: Any) -> None:
        metrics = ExpertMetrics(run, name)
        super().__init__(name, *arguments, observe=metrics.happened, **settings)
        metrics.watch(lambda: (self._cache.bytes, self._cache.budget))
        torch.set_num_threads(threads)
        move_when_leaving(self.rest)

    def packed(self, ranks: Mapping[MatrixKey, int]) -> Any:
        """`truncations`, for the object store."""
        return pack(self.truncations(ranks))

    def spectrum_array(self, key: MatrixKey) -> Any:
        """`spectrum`, for the object store."""
        return self.spectrum(key).numpy()

    def place(self) -> Place:
        """Where this actor runs."""
        return this_place()


def actor_class(*, direct: bool = False) -> Any:
    """The expert as a class of Ray actors.

    Args:
        direct: whether its tensors may cross by Ray's direct transport, which takes the actor two more threads.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": _THREADS,
        "concurrency_groups": {"report": 1},
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {"FLEXMORE_LIGHT": "1"}},  # it runs no model, and starts in half the time
    }
    if direct:
        options["enable_tensor_transport"] = True
    return ray.remote(**options)(ExpertActor)
