"""Where the workers of a run on Ray take their factors from: expert actors, or on one machine a complete store."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping

from flexmore_ray.errors import StoreError
from flexmore_ray.experts import start_experts
from flexmore_ray.mixture import CachedFactors, Parts, open_mixture
from flexmore_ray.placement import Needs, check_room
from flexmore_ray.runtime import nodes, on_running_cluster
from flexmore_ray.source import Source
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import FactorSource, FactorStore, open_store


def open_parts(spec: MixtureSpec, store: str | AnyPath | None) -> tuple[Parts, AnyPath]:
    """The parts of a mixture, and the folder in which its factors are kept.

    Args:
        spec: the mixture.
        store: the folder, which need not exist; None means one in the cache.

    Raises:
        UsageError, CheckpointError, StoreError: see `open_mixture`.
    """
    if store and (open_path(store) / "manifest.json").exists():  # its dtype is part of every mixture's identity
        spec = dataclasses.replace(spec, store=str(store))
    parts = open_mixture(spec)
    if spec.source:
        parts = dataclasses.replace(parts, spec=dataclasses.replace(parts.spec, store=None))
    folder = open_path(store).resolve() if store else CachedFactors(parts.source, 1).folder
    if isinstance(parts.factors, CachedFactors):
        parts = dataclasses.replace(parts, factors=CachedFactors(parts.source, 1, folder))
    return parts, folder


def base_spec(parts: Parts, folder: AnyPath) -> MixtureSpec:
    """The source of some parts with every expert full, as a worker anywhere opens it.

    Args:
        parts: what `open_parts` found.
        folder: the store that it found.
    """
    experts = parts.spec.experts or (None if parts.spec.source else open_store(folder).experts)
    return MixtureSpec(source=tuple(parts.source.describe()), experts=experts, router=parts.spec.router)


@contextlib.contextmanager
def serve_factors(
    parts: Parts,
    folder: AnyPath,
    max_rank: int,
    worker: Needs | None,
    *,
    expert_gpus: float = 0,
    pin: Mapping[str, str] | None = None,
    run: str,
) -> Iterator[FactorSource]:
    """Factors of every delta, for as long as the block runs; Ray must be initialised.

    Args:
        parts: what the factors are of.
        folder: the store that they are read from and written to.
        max_rank: the highest rank to serve, inclusive.
        worker: what one worker of the run asks of a node, next to the expert actors; None where an autoscaler may add
            nodes for them.
        expert_gpus: GPUs of one expert actor; fractions are allowed.
        pin: by expert, the nodes that its actor may run on; see `start_experts`.
        run: what the factors are for, in words, for the actors' names and metrics.

    Raises:
        UsageError: no node has what an actor asks for.
        FlexmoreError: the actors do not come up.
    """
    source, dtype = parts.source, parts.factors.dtype
    if not on_running_cluster() and len(nodes()) == 1:
        store = _complete_store(folder, source, max_rank)
        if store is not None and store.dtype == dtype:
            yield store
            return
    experts = {name: Needs(num_gpus=expert_gpus, pin=(pin or {}).get(name)) for name in source.experts[1:]}
    beside = {"worker": worker} if worker else {}
    check_room(beside | {f"expert {name}": needs for name, needs in experts.items()}, nodes())
    actors = start_experts(
        source,
        folder,
        num_gpus=expert_gpus,
        max_rank=max_rank,
        pin=pin,
        dtype=str(dtype).removeprefix("torch."),
        run=run,
    )
    try:
        yield actors
        actors.commit()
    except StoreError as error:  # the results are safe; what is lost is a store to use again
        print(f"note: the store is not complete: {error}", file=sys.stderr)
    finally:
        actors.close()


def _complete_store(folder: AnyPath, source: Source, max_rank: int) -> FactorStore | None:
    """The store in a folder, if it has every factor of a source up to a rank."""
    try:
        store = open_store(folder)
        store.check_source(source)
    except StoreError:
        return None
    held, born = set(store.keys()), source.born_ranks
    keys = [key for name in source.experts[1:] for key in source.shape.keys(name)]
    needed = {key: min(max_rank, born.get(key, max_rank)) for key in keys}
    complete = all(key in held and store.max_rank(key) >= rank for key, rank in needed.items())
    return store if complete else None
