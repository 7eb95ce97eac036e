"""One expert of a mixture by itself, for a process that has nothing else of the model.

T   tokens        H   hidden size        I   intermediate size

An expert whose folder is on its owner's nodes alone is a guest of the mixture: everything else is made of what
`introduce` finds out there, once, when the application is built. Its matrices are read by its own replicas only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from flexmore_ray.errors import CheckpointError, FlexmoreError, UsageError
from flexmore_ray.mixture import CachedFactors, Parts, open_mixture
from flexmore_ray.source import Guest, absent_experts, resolve_folder
from flexmore_ray.spec import FULL, PROJECTIONS, MatrixKey, MixtureSpec, suggest
from flexmore_ray.spectra import Factors
from flexmore_ray.store import open_store


class Expert(Protocol):
    """What `serve.remote.ExpertServer` needs of an expert."""

    num_layers: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """y (T, H) of x (T, H), before the router's weight."""


class ExpertMatrices:
    """The FFN of one expert, dense in every layer: y = Wd (act(Wg x) * (Wu x)).

    Args:
        layers: for each layer Wg (I, H), Wu (I, H) and Wd (H, I), all of one dtype and on one device.
        act: the activation.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor, Tensor]], act: Callable[[Tensor], Tensor]) -> None:
        self._layers, self._act = layers, act
        self.num_layers, self.hidden_size = len(layers), layers[0][0].shape[1]
        self.dtype, self.device = layers[0][0].dtype, layers[0][0].device
        self.num_bytes = sum(matrix.nbytes for layer in layers for matrix in layer)

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """y (T, H) of x (T, H), before the router's weight: what the model computes of a full-size expert."""
        gate, up, down = self._layers[layer]
        return F.linear(self._act(F.linear(x, gate)) * F.linear(x, up), down)


def open_shared(spec: MixtureSpec, guests: Mapping[str, Guest], *, verify: bool) -> Parts:
    """What a mixture is made of, for a process that reads no matrix of an expert placed on its own.

    Args:
        spec: the mixture.
        guests: those of these experts whose folder is on their owner's nodes.
        verify: see `open_mixture`.
    """
    parts = open_mixture(spec, guests=guests, verify=verify)
    if not spec.own or spec.store:
        return parts
    rest = parts.source.without(spec.own)
    return dataclasses.replace(parts, factors=CachedFactors(rest, parts.assignment.highest_rank))


def open_expert(spec: MixtureSpec, name: str, guest: Guest | None = None) -> Parts:
    """What an expert placed on its own is made of; of one in a two-expert checkpoint no other folder is opened.

    Args:
        spec: the mixture.
        name: of the expert.
        guest: what the mixture was told of it; None where it is not a guest.

    Raises:
        UsageError, CheckpointError, StoreError: see `open_mixture`.
        CheckpointError: the mixture was told of other weights.
    """
    store = open_store(spec.store) if spec.store else None
    sources, names = given_sources(spec), spec.experts or (store.experts if store and not spec.source else None)
    own = next((text for text in sources if text.startswith(f"{name}=")), None)
    if own is not None and not (resolve_folder(own.partition("=")[2]) / "adapter_config.json").exists():
        sources, names = [own], names and (names[0], name)
    else:
        absent = absent_experts(sources, spec.own)
        sources = [text for text in sources if text.partition("=")[0] not in absent]
        names = names and tuple(other for other in names if other not in absent)
    alone = MixtureSpec(
        source=tuple(sources),
        experts=names,
        ranks={name: spec.ranks.get(name, FULL)},
        store=spec.store if store and name in store.experts else None,
    )
    parts = open_mixture(alone, verify=guest is not None)
    if guest is not None and parts.source.expert_digest(name) != guest.digest:
        raise CheckpointError(f"expert {name}: other weights than the application was deployed with; deploy it again")
    if alone.store:
        return parts
    rest = parts.source.without([other for other in parts.source.experts[1:] if other != name])
    return dataclasses.replace(parts, factors=CachedFactors(rest, parts.assignment.highest_rank))


def given_sources(spec: MixtureSpec) -> Sequence[str]:
    """The SOURCE strings of a mixture, which may be its store's."""
    return spec.source or (open_store(spec.store).sources if spec.store else ())


def introduce(spec: MixtureSpec, name: str) -> Guest | FlexmoreError:
    """What the mixture has to know of a guest, or why it cannot be told; for a task on its owner's nodes."""
    try:
        return open_expert(spec, name).source.guest(name)
    except FlexmoreError as error:
        return error


def load_expert(parts: Parts, name: str, *, device: str | torch.device, dtype: torch.dtype) -> ExpertMatrices:
    """Read one expert of a mixture, a low-rank one too: its corrections are added to the public expert's matrices.

    Args:
        parts: what the mixture is made of; only this expert's matrices are read, and the public ones it corrects.
        name: a kept expert.
        device: where the matrices go.
        dtype: of the mixture; sums are made in float32.

    Raises:
        UsageError: the mixture has no such expert.
        CheckpointError, StoreError: the matrices cannot be read.
    """
    if name not in parts.assignment.ranks:
        raise UsageError(f"{name}: the mixture keeps no such expert; {suggest(name, list(parts.assignment.ranks))}")
    matrices = [_dense(parts, key).to(device=device, dtype=dtype) for key in parts.source.shape.keys(name)]
    gate, up, down = (matrices[i :: len(PROJECTIONS)] for i in range(len(PROJECTIONS)))
    return ExpertMatrices(list(zip(gate, up, down, strict=True)), ACT2FN[parts.source.config.get("hidden_act", "silu")])


def _dense(parts: Parts, key: MatrixKey) -> Tensor:
    piece = parts.piece(key)
    if not isinstance(piece, Factors):
        return piece
    public = parts.source.weight(MatrixKey(parts.source.experts[0], key.layer, key.projection))
    return torch.addmm(public.float(), piece.lora_b.float(), piece.lora_a.float())
