"""A service without a model: it answers a prompt with the prompt, over and over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from serve.http import Description, ExpertInfo
from serve.request import Delta, FinishReason, Request, TokenLogprob, Usage

NAMES = ("public", "math", "code")


class EchoService:
    """Deterministic, and it remembers what it was asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.requests: list[Request] = []
        self.off: set[str] = set()
        self.lost: tuple[str, ...] = ()
        self.error: Exception | None = None
        self.error_after: Exception | None = None
        self.seconds = 0.0
        self.cancelled: list[str] = []
        self.is_ready = True

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        """Whole answers."""
        await self._begin(request)
        return [self.answer(request, sequence) for sequence in range(self._count(request))], self.usage(request)

    async def stream(self, request: Request) -> AsyncGenerator[list[Delta] | Usage, None]:
        """A token at a time, of every sequence."""
        await self._begin(request)
        whole = [self.answer(request, sequence) for sequence in range(self._count(request))]
        pieces = [self._pieces(delta) for delta in whole]
        try:
            for step in range(max(map(len, pieces))):
                yield [piece[step] for piece in pieces if step < len(piece)]
                if self.error_after:
                    raise self.error_after
                await asyncio.sleep(self.seconds / 10)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.id)
            raise
        yield self.usage(request)

    async def describe(self) -> Description:
        """Three experts."""
        experts = (
            ExpertInfo(name="public", rank="full", parameters=300),
            ExpertInfo(name="math", rank=8, parameters=20),
            ExpertInfo(
                name="code", rank={"gate_proj": 4, "up_proj": 4, "down_proj": 8}, parameters=10, placement="own"
            ),
        )
        parameters = {"total": 1000, "active": 500, "full": 3000}
        return Description(
            mixture_id="abc123", created=1700000000, experts=experts, parameters=parameters, active=2, source=("zoo",)
        )

    async def disabled(self) -> set[str]:
        """What `set_enabled` was told."""
        return set(self.off)

    async def set_enabled(self, name: str, enabled: bool) -> None:
        """Remember it."""
        (self.off.discard if enabled else self.off.add)(name)

    async def ready(self) -> bool:
        """What the test says."""
        if self.error:
            raise self.error
        return self.is_ready

    async def status(self) -> dict[str, Any]:
        """Half of the weight each."""
        return {"experts": {name: {"share": 0.5, "lost": name in self.lost} for name in NAMES[:2]}, "queue": 0}

    async def metrics(self) -> str:
        """One."""
        return "flexmore_requests_total 1\n"

    async def _begin(self, request: Request) -> None:
        self.requests.append(request)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise
        if self.error:
            raise self.error

    def answer(self, request: Request, sequence: int) -> Delta:
        """One sequence's whole answer."""
        prompt = request.prompts[sequence // request.n]
        ids = [prompt[place % len(prompt)] for place in range(request.max_tokens)]
        text, finish_reason = str(self.tokenizer.decode(ids)), "length"
        found = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        if found:
            text, finish_reason, ids = text[: min(found)], "stop", ids[: min(found)]
        reason: FinishReason = "stop" if finish_reason == "stop" else "length"
        return Delta(
            sequence=sequence,
            text=text,
            token_ids=ids,
            logprobs=[] if request.logprobs is None else [self.logprob(i, request.logprobs) for i in ids],
            prompt_logprobs=self._prompt_logprobs(prompt, request.prompt_logprobs),
            finish_reason=reason,
        )

    def _prompt_logprobs(self, prompt: Sequence[int], top: int | None) -> list[TokenLogprob]:
        if top is None:
            return []
        return [TokenLogprob(prompt[0], None, ()), *(self.logprob(i, top) for i in prompt[1:])]

    def logprob(self, token_id: int, top: int) -> TokenLogprob:
        """Even tokens are the likeliest in their place; odd ones come after <pad>, which is likelier by 1."""
        own = -1.0 / (token_id + 1) / 3
        likelier = () if token_id % 2 == 0 else ((0, own + 1.0),)
        rest = tuple((98 - i, own - 1 - i) for i in range(top))
        return TokenLogprob(token_id, own, (*likelier, (token_id, own), *rest)[:top])

    def usage(self, request: Request) -> Usage:
        """Equal shares of the experts that were asked for."""
        names = [name for name in request.experts or NAMES if name not in self.lost]
        return Usage(
            prompt_tokens=sum(map(len, request.prompts)),
            completion_tokens=request.max_tokens * self._count(request),
            cached_tokens=1,
            experts={name: 1 / len(names) for name in names},
            lost=self.lost,
        )

    @staticmethod
    def _count(request: Request) -> int:
        return len(request.prompts) * request.n

    @staticmethod
    def _pieces(delta: Delta) -> list[Delta]:
        """Of the nano tokenizer, a character each, but for special tokens; the end is a piece of its own."""
        first = Delta(sequence=delta.sequence, prompt_logprobs=delta.prompt_logprobs)
        pieces = [first]
        for place, token_id in enumerate(delta.token_ids):
            text = delta.text[place : place + 1]
            pieces.append(
                Delta(
                    sequence=delta.sequence,
                    text=text,
                    token_ids=[token_id],
                    logprobs=delta.logprobs[place : place + 1],
                )
            )
        rest = delta.text[len(delta.token_ids) :]
        pieces.append(Delta(sequence=delta.sequence, text=rest, finish_reason=delta.finish_reason))
        return pieces
