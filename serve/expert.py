"""One expert of a mixture by itself, for a process that has nothing else of the model.

T   tokens        H   hidden size        I   intermediate size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import Parts
from flexmore_ray.spec import PROJECTIONS, MatrixKey, suggest
from flexmore_ray.spectra import Factors


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

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """y (T, H) of x (T, H), before the router's weight: what the model computes of a full-size expert."""
        gate, up, down = self._layers[layer]
        return F.linear(self._act(F.linear(x, gate)) * F.linear(x, up), down)


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
