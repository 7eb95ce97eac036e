r"""Router rows in closed form, from statistics that every owner computes alone (DUME, arXiv 2603.29765).

| symbol | meaning                                                                        | shape     |
|--------|--------------------------------------------------------------------------------|-----------|
| L      | decoder layers                                                                 |           |
| H      | hidden size                                                                    |           |
| E      | experts, the public one included; owner ``e`` holds expert ``e`` and its data  |           |
| n_e    | tokens in the data of owner ``e``                                              |           |
| x      | input of a MoE block at one token                                              | (H,)      |
| G_e    | ``gram``: sum of x x^T over the tokens of owner ``e``, gathered with its model | (L, H, H) |
| t_e    | ``total``: sum of x over the same tokens                                       | (L, H)    |
| lambda | ``ridge``, a share of the mean diagonal of the averaged Gram matrix            |           |
| T      | ``temperature``                                                                |           |
| W      | router rows, one for each expert                                               | (L, E, H) |

Ridge regression from x to the one-hot owner, every owner with the same total weight, no intercept; per layer

    C = sum_e G_e / n_e
    W^T = (C + lambda tr(C)/H I)^-1 [t_0/n_0, ..., t_{E-1}/n_{E-1}] / T

Both statistics are sums over tokens: those of two data sets add up, and no owner hands over a text or a weight.
DUME adds a bias column and normalises each expert's column; FlexOlmo's router has no bias, and the columns keep
their length here, because it says how well a domain can be told apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from flexmore_ray.atomic import write_file
from flexmore_ray.checkpoint import DTYPES, digest, open_safetensors
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.spec import check_names
from flexmore_ray.storage import AnyPath, open_path

RIDGE, TEMPERATURE = 1e-5, 0.15
"""Defaults, measured on the nano mixture: a ridge of 1e-2 costs the recall tasks much, a temperature under 0.1 or
over 0.2 costs the reasoning or the recall tasks some."""
FORMAT = "flexmore-router-1"


@dataclass(frozen=True, eq=False)
class RouterMoments:
    """First and second moments of the MoE inputs over one owner's tokens. They add up.

    Attributes:
        gram: sum of outer products, ``(L, H, H)``, float64.
        total: sum of inputs, ``(L, H)``, float64.
        count: number of tokens.
    """

    gram: Tensor
    total: Tensor
    count: int

    def __post_init__(self) -> None:
        layers, hidden = self.total.shape if self.total.dim() == 2 else (-1, -1)
        if self.gram.shape != (layers, hidden, hidden):
            raise UsageError(
                f"router moments need gram (L, H, H) and total (L, H); got {tuple(self.gram.shape)} and "
                f"{tuple(self.total.shape)}"
            )

    def __add__(self, other: RouterMoments) -> RouterMoments:
        """Moments of both owners' tokens together.

        Raises:
            UsageError: the two come from models of different shape.
        """
        if not isinstance(other, RouterMoments):
            return NotImplemented
        if self.gram.shape != other.gram.shape:
            raise UsageError(
                f"router moments of different models cannot be added: gram {tuple(self.gram.shape)} and "
                f"{tuple(other.gram.shape)}"
            )
        return RouterMoments(self.gram + other.gram, self.total + other.total, self.count + other.count)

    def save(self, path: str | Path) -> None:
        """Write the moments to a safetensors file."""
        tensors = {"gram": self.gram.contiguous(), "total": self.total.contiguous()}
        save_file(tensors | {"count": torch.tensor(self.count)}, path)

    @classmethod
    def load(cls, path: str | Path) -> RouterMoments:
        """Read moments written by `save`.

        Raises:
            UsageError: the file is missing, damaged or holds something else.
        """
        try:
            tensors = load_file(path)
            return cls(tensors["gram"], tensors["total"], int(tensors["count"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(f"{path} holds no router moments ({error}); gather them again") from error


def gather_moments(model: nn.Module, token_batches: Iterable[Any]) -> RouterMoments:
    """Moments of the inputs of every MoE block while ``model`` reads some tokens.

    Args:
        model: a FlexOlmo-like transformers model; its blocks are the modules named ``...layers.N.mlp``.
        token_batches: token ids ``(B, T)``, or mappings with ``input_ids`` and, optionally, ``attention_mask``
            (both ``(B, T)``), as a tokenizer returns them. Tokens whose mask is 0 are not counted.

    Raises:
        UsageError: the model has no such block, or the batches hold no token.
    """
    blocks = [m for name, m in model.named_modules() if name.split(".")[-1] == "mlp" and ".layers." in f".{name}"]
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no module named layers.N.mlp to gather router moments from")
    mask: Tensor | None = None
    grams: list[Tensor | int] = [0] * len(blocks)
    totals: list[Tensor | int] = [0] * len(blocks)
    count = 0

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            x = x if mask is None else x[mask.reshape(-1).to(x.device)]
            grams[index] = grams[index] + x.T @ x
            totals[index] = totals[index] + x.sum(0)

        return hook

    handles = [block.register_forward_pre_hook(watch(index)) for index, block in enumerate(blocks)]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for batch in token_batches:
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                ids = inputs["input_ids"].to(device)
                attention = inputs.get("attention_mask")
                mask = None if attention is None else attention.bool()
                kept = None if attention is None else attention.to(device)
                model(input_ids=ids, attention_mask=kept, use_cache=False)
                count += ids.numel() if mask is None else int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise UsageError("router moments need at least one token; the data is empty")
    return RouterMoments(torch.stack(grams).cpu(), torch.stack(totals).cpu(), count)  # type: ignore[arg-type]


def check_settings(ridge: float, temperature: float) -> None:
    """Check what a fit is told.

    Raises:
        UsageError: one is not above 0 and finite.
    """
    if not (0 < ridge < float("inf") and 0 < temperature < float("inf")):
        raise UsageError(f"--ridge and --temperature: above 0 and finite are needed, got {ridge} and {temperature}")


def fit_rows(moments: Mapping[str, RouterMoments], *, ridge: float = RIDGE, temperature: float = TEMPERATURE) -> Tensor:
    """Router rows of the merged mixture, ``(L, E, H)`` float64, experts in the order of ``moments``.

    Args:
        moments: for each expert, the moments of its owner's data through its owner's model: the two-expert
            mixture of that expert, the public model for the public expert.
        ridge: lambda above, greater than 0.
        temperature: T above, greater than 0; a lower one makes the router more decided.

    Raises:
        UsageError: fewer than two experts, empty or non-finite moments, different shapes, or a ridge or
            temperature that is not above 0 and finite.
    """
    if len(moments) < 2:
        raise UsageError(f"fitting router rows needs the moments of at least 2 experts; got {len(moments)}")
    check_settings(ridge, temperature)
    first = next(iter(moments.values()))
    for name, owner in moments.items():
        if owner.count <= 0:
            raise UsageError(f"the router moments of {name} cover no token; give it data")
        if owner.gram.shape != first.gram.shape:
            raise UsageError(
                f"router moments differ in shape: {name} has gram {tuple(owner.gram.shape)}, "
                f"{next(iter(moments))} has {tuple(first.gram.shape)}"
            )
        if not (owner.gram.isfinite().all() and owner.total.isfinite().all()):
            raise UsageError(f"the router moments of {name} hold NaN or infinity; check its weights and data")
    gram = reduce(add, [owner.gram.double() / owner.count for owner in moments.values()])
    means = torch.stack([owner.total.double() / owner.count for owner in moments.values()], dim=-1)
    hidden = gram.shape[-1]
    mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    penalty = ridge * mean_diagonal[:, None, None] * torch.eye(hidden, dtype=torch.float64)
    return torch.linalg.solve(gram + penalty, means).transpose(-2, -1) / temperature


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterRows:
    """Router rows in a file of their own, which a mixture file names as ``router``.

    The file is safetensors: one tensor ``rows``, and format, experts (a JSON list) and base as its metadata.

    Attributes:
        rows: ``(L, E, H)``, of a dtype that checkpoints have.
        experts: their names, in the order of the rows.
        base: `Source.base_digest` of the model that they were fitted for.
        where: the file, for errors.

    Raises:
        CheckpointError: names, shape and values are not those of router rows.
    """

    rows: Tensor
    experts: tuple[str, ...]
    base: str
    where: str

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "experts", check_names(self.experts, where="experts"))
        except UsageError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        if self.rows.dim() != 3 or self.rows.shape[1] != len(self.experts) or self.rows.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{self.where}: rows has shape (layers, experts, hidden), dtype {' or '.join(DTYPES)}, and "
                f"{len(self.experts)} experts are named, got {tuple(self.rows.shape)} of {self.rows.dtype}"
            )
        if not self.rows.isfinite().all():
            raise CheckpointError(f"{self.where}: the router rows hold NaN or infinity; fit them again")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and rows."""
        return hashlib.sha256(json.dumps([self.experts, digest([self.rows])]).encode()).hexdigest()

    def row(self, expert: str, layer: int) -> Tensor:
        """Row (hidden,) of one expert in one layer."""
        return self.rows[layer, self.experts.index(expert)]

    def save(self, path: AnyPath) -> None:
        """Write the file whole."""
        about = {"format": FORMAT, "experts": json.dumps(self.experts), "base": self.base}
        content = save({"rows": self.rows.contiguous()}, about)
        write_file(path, lambda file: file.write(content))

    @classmethod
    def load(cls, path: str | AnyPath) -> RouterRows:
        """Read a file of router rows.

        Raises:
            CheckpointError: it is missing, damaged or something else.
        """
        path = open_path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file of router rows; flexmore refit writes one")
        with open_safetensors(path) as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or "rows" not in set(file.keys()):
                raise CheckpointError(f"{path}: no file of router rows (format {FORMAT}); flexmore refit writes one")
            rows = file.get_tensor("rows")
        try:
            experts = json.loads(about.get("experts", ""))
        except (ValueError, RecursionError):
            experts = None
        return cls(rows=rows, experts=experts, base=about.get("base", ""), where=str(path))
