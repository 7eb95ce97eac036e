"""A request at work: its sequences, what they have so far, and who waits for it.

The engine's thread writes what it makes of a sequence, the event loop what it has handed on of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

from serve.request import Delta, FinishReason, Request, TokenLogprob, Usage
from serve.text import TextStream

Outcome = Literal["done", "cancelled", "failed"]
RECENT = 512
"""Requests whose times are remembered."""


class Observer(Protocol):
    """Told what the engine does; must be quick."""

    def stepped(self, tokens: int, sequences: int, seconds: float) -> None:
        """A step was made; told in the engine's thread."""

    def ended(self, request: EndedRequest) -> None:
        """A request ended; told in the event loop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndedRequest:
    """What a request took; times are in seconds."""

    outcome: Outcome
    usage: Usage
    seconds: float
    first_token: float | None
    """From arrival to the first token of any sequence; None if none came."""
    per_token: float | None
    """Between tokens of a sequence after its first, on average; None where no sequence had two."""


class SequenceState:
    """One sequence at work."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        request = job.request
        self.job, self.index = job, index
        self.id = f"{request.id}/{index}"
        self.prompt = request.prompts[index // request.n]
        self.salt: int | None = None  # known from its first step on
        self.is_private = request.prompt_logprobs is not None  # it shares keys and values with nobody
        # written by the engine's thread
        self.random = random.Random(f"{request.seed}/{index}")
        self.watch = TextStream(tokenizer, request.stop) if request.stop else None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.shares: Any = 0.0  # (E,) weight that the router gave to each expert
        self.cached: int | None = None
        self.finish_reason: FinishReason | None = None
        # written by the event loop
        self.text = TextStream(tokenizer, request.stop)
        self.pushed = self.sent = self.prompt_sent = 0
        self.is_closed = False

    @property
    def wants_prompt(self) -> bool:
        """Whether tokens of the prompt still have no log-probability."""
        return self.job.request.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    def take(self) -> Delta | None:
        """What is new since the last time; None if nothing is."""
        reason, length = self.finish_reason, len(self.token_ids)  # in this order: after the reason comes no token
        if self.is_closed:
            return None
        self.text.push(self.token_ids[self.pushed : length])
        self.pushed, self.is_closed = length, reason is not None
        text, count = self.text.take(last=self.is_closed)
        start, self.sent = self.sent, self.sent + count
        prompt_start, self.prompt_sent = self.prompt_sent, len(self.prompt_logprobs)
        delta = Delta(
            sequence=self.index,
            text=text,
            token_ids=self.token_ids[start : self.sent],
            logprobs=self.logprobs[start : self.sent],
            prompt_logprobs=self.prompt_logprobs[prompt_start:],
            finish_reason=reason,
        )
        return delta if count or text or reason or delta.prompt_logprobs else None


class Job:
    """One request at work; its news are what the event loop waits for."""

    def __init__(self, request: Request, allowed: frozenset[int], *, streams: bool) -> None:
        self.request, self.allowed, self.streams = request, allowed, streams
        self.sequences: list[SequenceState] = []
        self.unfinished = len(request.prompts) * request.n
        self.error: Exception | None = None
        self.news = asyncio.Event()
        self.lost: frozenset[int] = frozenset()
        self.began = time.monotonic()
        self.first_token: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.unfinished == 0 or self.error is not None


class Rows:
    """Where the logits of one slice are among those that were asked for."""

    __slots__ = ("first_row", "is_last", "prompt", "sequence")

    def __init__(self, sequence: SequenceState | None, first_row: int, is_last: bool) -> None:
        self.sequence, self.first_row, self.is_last = sequence, first_row, is_last
        self.prompt = range(0)
        """Places in the prompt whose logits are asked for; each tells of the token after it."""

    @property
    def last_row(self) -> int:
        """Of the logits that choose the next token."""
        return self.first_row + len(self.prompt)
