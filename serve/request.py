"""What an ingress asks of a mixture replica, and what comes back: plain data that is cheap to send.

    Request    prompts and how to go on from them          ingress -> mixture replica
    Delta      the next piece of one sequence              mixture replica -> ingress
    Usage      what the whole request took                 mixture replica -> ingress, last

A request has a sequence for every prompt and copy: sequence ``i`` is copy ``i % n`` of prompt ``i // n``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from flexmore_ray.errors import FlexmoreError

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Prompts, and how to go on from them."""

    id: str
    """Unique; what cancels the request and names it in logs."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt, at least one each."""
    n: int = 1
    """Sequences for each prompt."""
    max_tokens: int = 16
    """Tokens to generate at most; 0 scores the prompts and generates nothing."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample among the fewest tokens that together have this probability, in (0, 1]."""
    seed: int = 0
    """Sequence i draws from a generator of its own, seeded by this and i: a request repeats whatever runs beside it."""
    stop: tuple[str, ...] = ()
    """A sequence ends before the first of these in its text."""
    logprobs: int | None = None
    """Log-probability of each generated token, and of so many most likely ones; None means none at all."""
    prompt_logprobs: int | None = None
    """The same of each prompt token."""
    experts: tuple[str, ...] | None = None
    """Experts that may work on the tokens, the public one among them; None means all."""


class TokenLogprob(NamedTuple):
    """One token's log-probability before temperature and top_p, and those of the most likely tokens in its place."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing goes before."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities, most likely first."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Delta:
    """The next piece of one sequence. Pieces of a sequence add up to all of it."""

    sequence: int
    text: str = ""
    """May be empty while a character is incomplete or may be the start of a stop string."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """Those that `text` comes from."""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    """One for each of `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    """One for each prompt token, in the first piece, where asked for."""
    finish_reason: FinishReason | None = None
    """Set in the last piece: "stop" (end of text, or a stop string) or "length" (max_tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    experts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of each expert in the weight that the router gave, over all tokens and layers; adds up to 1."""
    lost: tuple[str, ...] = ()
    """Experts that the request was to have and that were not there for all of it."""


class QueueFull(FlexmoreError):  # noqa: N818
    """A replica has as many sequences waiting as it takes; try again in a moment (429)."""


class EngineFailed(FlexmoreError):  # noqa: N818
    """The engine ended before the request did."""


class ExpertLost(FlexmoreError):  # noqa: N818
    """An expert that the request needs is not there, and the policy is to refuse (503)."""
