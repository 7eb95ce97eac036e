"""How factors cross between processes: through shared memory, or straight from GPU to GPU.

On the CPU factors cross as numpy arrays: Ray writes those into its shared-memory object store with one copy and
reads them in place, while a torch tensor would go through pickle. The receiver copies them once, since what it reads
is read-only and would occupy the object store for as long as a mixture holds it.

Between actors that have a GPU each, Ray's direct transport moves tensors without the CPU:

| transport | where | needs |
|---|---|---|
| `cuda_ipc` | sender and receiver share a GPU, as fractions of one do | nothing |
| `nixl` | any two GPUs | the package `nixl` on both nodes |

Both are one-sided: the receiver reads, so it may come and go. NCCL is two-sided and needs a group of actors that is
fixed beforehand, which workers that join and leave are not. Which one serves is known only where both run, so it is
chosen there; where none does, factors take the way through shared memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from flexmore_ray.spec import MatrixKey
from flexmore_ray.spectra import Factors

Packed = dict[MatrixKey, tuple[np.ndarray, np.ndarray]]
"""Factors as bytes: (rank, in * itemsize) and (rank, out * itemsize)."""


def pack(factors: Mapping[MatrixKey, Factors]) -> Packed:
    """Factors as arrays in CPU memory; a view where they are there already."""
    return {key: (_bytes(pair.a), _bytes(pair.bt)) for key, pair in factors.items()}


def received(answer: Packed | Mapping[MatrixKey, Factors], dtype: torch.dtype) -> dict[MatrixKey, Factors]:
    """Factors in memory of their own, from arrays in shared memory or from tensors in the sender's.

    Args:
        answer: what `pack` made, or factors that came over a direct transport.
        dtype: of the factors.
    """
    return {key: _pair(pair, dtype) for key, pair in answer.items()}


def _pair(pair: tuple[np.ndarray, np.ndarray] | Factors, dtype: torch.dtype) -> Factors:
    if isinstance(pair, Factors):
        return Factors(pair.a.clone(), pair.bt.clone())
    return Factors(*(torch.from_numpy(array.copy()).view(dtype) for array in pair))


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs, as far as transports care."""

    node: str
    gpus: tuple[str, ...] = ()
    """GPUs that Ray gave it, by their ids on the node."""
    nixl: bool = False
    """Whether it can import `nixl`."""
    actor: bool = True
    """Whether it is an actor; others cannot receive directly."""


def this_place() -> Place:
    """The place of this process, which Ray started or which is connected to it."""
    import ray

    context = ray.get_runtime_context()
    return Place(
        node=context.get_node_id(),
        gpus=tuple(context.get_accelerator_ids().get("GPU", ())),
        nixl=importlib.util.find_spec("nixl") is not None,
        actor=context.get_actor_id() is not None,
    )


def direct_transport(sender: Place, receiver: Place) -> str | None:
    """Name of Ray's transport from GPU to GPU between two places; None where there is none."""
    if not (sender.gpus and receiver.gpus and receiver.actor):
        return None
    if sender.node == receiver.node and set(sender.gpus) <= set(receiver.gpus):
        return "cuda_ipc"
    return "nixl" if sender.nixl and receiver.nixl else None
