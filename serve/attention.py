"""Attention of many sequences in one step, each over its own keys alone, where no flash kernel is at hand.

    N   query tokens of the step     KV   keys of the step, sequence after sequence     D   head size
    G   query heads                  g    key heads

transformers packs a step into one sequence and masks what is another's, so its cost grows with the square of the
sequences: at 32 of them attention took as long as all matrix products. Here sequences that get one token are computed
as a batch, in groups of similar length; the parts of prompts one by one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache

NAME = "flexmore_varlen"
MAX_PADDING = 2.0
"""Sequences that get one token make one group if padding all of them to one length makes no more keys than so."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences with one query each, with keys padded to one length."""

    queries: Tensor
    """(n,) places of the queries in the step."""
    keys: Tensor
    """(n * longest,) places of the keys in the cache."""
    mask: Tensor | None
    """(n, 1, 1, longest) bool, False where a key is padding; None where none is."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of one prompt."""

    queries: slice
    """Places of its queries in the step."""
    keys: Tensor | None
    """Places of all its keys in the cache; None where the prompt begins here, so that its keys are the step's."""
    mask: Tensor | None
    """(queries, keys) bool; None with keys None: the plain causal mask."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """Which queries and keys of a step belong together."""

    groups: list[Group]
    parts: list[Part]

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], read: Tensor) -> Segments:
        """Segments of a step.

        Args:
            queries: how many each sequence has, at least 1.
            keys: how many each sequence has, the queries' own among them.
            read: (KV,) places of all keys in the cache, sequence after sequence; empty where every prompt begins.
        """
        parts: list[Part] = []
        singles: dict[int, list[tuple[int, int, int]]] = {}
        query = key = 0
        for num_queries, num_keys in zip(queries, keys, strict=True):
            here = slice(query, query + num_queries)
            if num_queries == num_keys:
                parts.append(Part(here, None, None))
            elif num_queries == 1:
                singles.setdefault(num_keys.bit_length(), []).append((query, key, num_keys))
            else:
                mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=read.device)
                parts.append(Part(here, read[key : key + num_keys], mask.tril(num_keys - num_queries)))
            query, key = query + num_queries, key + num_keys
        everyone = [member for members in singles.values() for member in members]
        lengths = [length for _, _, length in everyone]
        if len(everyone) * max(lengths, default=0) <= MAX_PADDING * sum(lengths):
            singles = {0: everyone} if everyone else {}
        return cls([_group(members, read) for members in singles.values()], parts)


def _group(members: list[tuple[int, int, int]], read: Tensor) -> Group:
    queries, starts, lengths = torch.tensor(members, device=read.device).unbind(1)
    longest = max(length for _, _, length in members)
    place = torch.arange(longest, device=read.device)
    keys = read[starts[:, None] + place.minimum(lengths[:, None] - 1)]
    padded = any(length < longest for _, _, length in members)
    return Group(queries, keys.flatten(), (place < lengths[:, None])[:, None, None] if padded else None)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cache: PagedAttentionCache,
    segments: Segments,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: write keys and values to the cache, attend to each sequence's own.

    Args:
        module: the attention layer.
        query: (1, G, N, D).
        key: (1, g, N, D).
        value: (1, g, N, D).
        attention_mask: not used: sequences are causal.
        scaling: of the products.
        cache: where keys and values are kept.
        segments: what belongs together, the same in all layers.

    Returns:
        (1, N, G, D), and no attention weights.
    """
    queries, keys, values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    old_keys, old_values = _write(cache, int(module.layer_idx), keys, values, kwargs)  # type: ignore[arg-type]
    attend = functools.partial(
        F.scaled_dot_product_attention, scale=scaling, enable_gqa=queries.shape[1] != keys.shape[1]
    )
    out = torch.empty_like(queries)
    for group in segments.groups:
        n = len(group.queries)
        k, v = (x.index_select(0, group.keys).view(n, -1, *x.shape[1:]) for x in (old_keys, old_values))
        q = queries[group.queries].unsqueeze(2)
        y = attend(q, k.transpose(1, 2), v.transpose(1, 2), group.mask)
        out[group.queries] = y.squeeze(2)
    for part in segments.parts:
        if part.keys is None:
            k, v = keys[part.queries], values[part.queries]
        else:
            k, v = old_keys.index_select(0, part.keys), old_values.index_select(0, part.keys)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (queries[part.queries], k, v))
        y = attend(q, k, v, part.mask, is_causal=part.mask is None)
        out[part.queries] = y.squeeze(0).transpose(0, 1)
    return out.unsqueeze(0), None


def _write(
    cache: PagedAttentionCache, layer: int, keys: Tensor, values: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write a step's keys and values (N, heads, D); returns all that the cache has of the layer (places, heads, D)."""
    allocator = cache.layer_to_allocator[layer]
    old_keys, old_values = allocator._kv_token_views[layer]  # type: ignore[attr-defined]
    place = kwargs["write_index"][allocator.index]
    old_keys.index_copy_(0, place, keys)
    old_values.index_copy_(0, place, values)
    return old_keys, old_values


AttentionInterface.register(NAME, varlen_attention)
