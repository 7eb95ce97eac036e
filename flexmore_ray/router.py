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

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexmore_ray.errors import UsageError
from flexmore_ray.storage import AnyPath, open_path

RIDGE, TEMPERATURE = 1e-5, 0.15
"""Defaults, measured on the nano mixture: a ridge of 1e-2 costs the recall tasks much, a temperature under 0.1 or
over 0.2 costs the reasoning or the recall tasks some."""


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


def fit_rows(moments: Mapping[str, RouterMoments], *, ridge: float = RIDGE, temperature: float = TEMPERATURE) -> Tensor:
    """Router rows of the merged mixture, ``(L, E, H)`` float64, experts in the order of ``moments``.

    Args:
        moments: for each expert, the moments of its owner's data through its owner's model: the two-expert
            mixture of that expert, the public model for the public expert.
        ridge: lambda above, greater than 0.
        temperature: T above, greater than 0; a lower one makes the router more decided.

    Raises:
        UsageError: fewer than two experts, empty or non-finite moments, different shapes, or a ridge or
            temperature that is not above 0.
    """
    if len(moments) < 2:
        raise UsageError(f"fitting router rows needs the moments of at least 2 experts; got {len(moments)}")
    for label, value in (("ridge", ridge), ("temperature", temperature)):
        if not value > 0:
            raise UsageError(f"{label} must be above 0; got {value}")
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


def read_texts(path: str | AnyPath) -> list[str]:
    r"""Documents of a ``--data`` file, empty ones left out.

    A ``.jsonl`` file holds one object with the key ``text`` a line; any other file is UTF-8 text with one document a
    line, in which ``\n`` stands for a line break and ``\\`` for a backslash.

    Raises:
        UsageError: the file cannot be read, a line is no such object, or no document is in it.
    """
    path = open_path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the documents in {path}: {error}") from error
    lines = [line.rstrip("\r") for line in lines]
    if path.suffix == ".jsonl":
        texts = [_jsonl_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        texts = [_unescape(line) for line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError(f"{path} holds no document; one a line is needed")
    return texts


def _jsonl_text(path: AnyPath, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f'{path} line {number} is no JSON object with a "text": {line[:60]!r}') from error
    if not isinstance(text, str):
        raise UsageError(f'{path} line {number}: "text" must be a string, got {type(text).__name__}')
    return text


def _unescape(line: str) -> str:
    return "\\".join(part.replace("\\n", "\n") for part in line.split("\\\\"))


def batch_texts(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64, max_tokens: int = 512) -> Iterable[Any]:
    """Batches for `gather_moments`: ``texts`` in order of length, cut at ``max_tokens``, padded, with their masks."""
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), batch_size):
        part = list(ordered[start : start + batch_size])
        yield tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=max_tokens)
