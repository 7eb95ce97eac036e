"""Continuous batching of requests over one mixture in one process.

`Engine` is used from an event loop; its steps run in a thread of their own. A request becomes one sequence per prompt
and copy. All sequences share the batch, the KV cache and the public expert's products, whatever their experts are.

An excluded expert is masked in the router before the softmax, so it contributes nothing, exactly as if it had never
been merged. Keys and values depend on the experts that made them, so only sequences of equal experts share prefixes.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.mixture import Mixture
from flexmore_ray.modeling import ExpertLink, FlexMoreForCausalLM, Routing
from serve.job import RECENT, EndedRequest, Job, Observer, Outcome, Rows, SequenceState
from serve.request import Delta, EngineFailed, ExpertLost, FinishReason, QueueFull, Request, TokenLogprob, Usage
from serve.runner import BatchRunner, CacheSize, Slice
from serve.sampling import choose, logprobs

CPU_PAGE, CPU_CACHE_TOKENS = 16, 32768
ALIVE_SECONDS = 10.0
"""Without news for so long, a request looks whether the engine still steps."""
ATTEMPTS = 3
"""Times that a step is made again before it does without all experts that compute elsewhere."""
OnLost = Literal["continue", "refuse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an engine takes on."""

    sequences: int = 64
    """Sequences in one batch at most."""
    queue: int = 256
    """Sequences that may wait for a place; more are refused."""
    batch_tokens: int = 512
    """Tokens of one step at most; longer prompts are read in parts."""
    cache_tokens: int | None = None
    """Tokens of the KV cache; None means 32,768 on the CPU, and what the memory allows on a GPU."""
    max_model_len: int | None = None
    """Tokens of a prompt and what follows it at most; None means what the model was made for."""


class Remote(ExpertLink, Protocol):
    """An expert in a process of its own; see `serve.remote.RemoteExpert`."""

    @property
    def available(self) -> bool:
        """Whether a call would reach it now."""

    def abandon(self) -> None:
        """Forget a call that was sent and whose answer nobody will read."""


class Engine:
    """Answers requests with one mixture.

    Args:
        mixture: the model and its tokenizer; nothing else may use it meanwhile.
        limits: how much to take on.
        remote: by name, the experts that compute elsewhere (the same that `mixture` was loaded with).
        on_lost: whether requests go on without an expert that is lost, or are refused.
        observer: told of steps and requests; None means nobody is.

    Raises:
        UsageError: a limit breaks its rule.
    """

    def __init__(
        self,
        mixture: Mixture,
        limits: Limits | None = None,
        *,
        remote: Mapping[str, Remote] | None = None,
        on_lost: OnLost = "continue",
        observer: Observer | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.experts = tuple(mixture.assignment.ranks)
        self._mixture, self._observer, self._on_lost = mixture, observer, on_lost
        self._model = mixture.model
        self._tokenizer = mixture.tokenizer.backend_tokenizer
        self._eos = _end_tokens(mixture)
        self._device = self._model.device
        self._remote = {self.experts.index(name): link for name, link in (remote or {}).items()}
        self.max_model_len = self._checked_length()
        self._routing = Routing()
        self._sequences: dict[str, SequenceState] = {}
        self._salts: dict[frozenset[int], int] = {}
        self._present = self._available()
        self._plan: list[Rows] = []
        self._has_failed = False
        self._totals: collections.Counter[str] = collections.Counter()
        self._recent: collections.deque[tuple[float | None, ...]] = collections.deque(maxlen=RECENT)
        self._expert_weights = np.zeros(len(self.experts))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner = BatchRunner(self._model, self, self._cache_size(), self._model.config.vocab_size)

    def _checked_length(self) -> int:
        most = int(self._model.config.max_position_embeddings)
        length = self.limits.max_model_len or most
        if not 0 < length <= most:
            raise UsageError(f"max_model_len: 1 to {most:,}, what the model was made for, got {length:,}")
        return length

    def _cache_size(self) -> CacheSize:
        limits, on_cpu = self.limits, self._device.type == "cpu"
        tokens = limits.cache_tokens or (max(CPU_CACHE_TOKENS, 2 * self.max_model_len) if on_cpu else None)
        if tokens is not None and tokens < self.max_model_len:
            raise UsageError(f"cache_tokens: at least max_model_len ({self.max_model_len:,}) is needed, got {tokens:,}")
        page = CPU_PAGE if on_cpu else 256  # what flash attention's kernels read
        pages = None if tokens is None else -(-tokens // page) + limits.sequences
        return CacheSize(
            sequences=min(limits.sequences, limits.batch_tokens),
            batch_tokens=limits.batch_tokens,
            page=page,
            pages=pages,
        )

    # ---- from the event loop

    def start(self) -> None:
        """Start the thread that steps."""
        self._model.set_routing(self._routing)
        self._runner.start()

    def stop(self) -> None:
        """End it; requests that are not finished fail."""
        self._runner.stop()
        self._model.set_routing(None)

    @property
    def is_alive(self) -> bool:
        """Whether the thread steps; False after an error that it cannot go on from."""
        return self._runner.is_alive and not self._has_failed

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        """Answer a request: one piece per sequence, in order, each with all of its sequence.

        Raises:
            QueueFull: too many sequences wait already.
            ExpertLost: an expert that the request needs is not there, and the policy is to refuse.
            UsageError: a prompt is too long, or names what the mixture does not have.
            EngineFailed: the engine failed; another one may answer.
        """
        job = self._admit(request, streams=False)
        try:
            while not job.is_over:
                await self._news(job)
            return self._take(job), self._usage(job)
        finally:
            self._release(job)

    async def stream(self, request: Request) -> AsyncIterator[list[Delta] | Usage]:
        """The same piece by piece: each item has all that is new; the last is the usage.

        Raises:
            QueueFull, ExpertLost, UsageError, EngineFailed: see `generate`.
        """
        job = self._admit(request, streams=True)
        try:
            while not job.is_over:
                await self._news(job)
                if deltas := self._take(job):
                    yield deltas
            yield self._usage(job)
        finally:
            self._release(job)

    def stats(self) -> dict[str, Any]:
        """A snapshot: sequences running and waiting, cache use, totals, and each expert's share and state.

        "cache" is the share of the KV cache that sequences hold, "cached" the share that is kept for others to reuse.
        "recent" has of each of the last 512 requests that were answered to their end: when that was (seconds since
        1970), and the seconds to the first token, per token after it, and to the end; None where there was no token.
        """
        running, waiting, cache, cached = self._runner.usage()
        weights = self._expert_weights / (self._expert_weights.sum() or 1.0)
        return {
            "running": running,
            "waiting": waiting,
            "cache": cache,
            "cached": cached,
            "totals": dict(self._totals),
            "recent": list(self._recent),
            "shares": dict(zip(self.experts, weights.tolist(), strict=True)),
            "lost": [self.experts[e] for e, link in self._remote.items() if not link.available],
            "alive": self.is_alive,
        }

    def _admit(self, request: Request, *, streams: bool) -> Job:
        self._loop = asyncio.get_running_loop()
        if not self.is_alive:
            raise EngineFailed("the engine has stopped")
        job = Job(request, self._allowed(request), streams=streams)
        for prompt in request.prompts:
            self._check_prompt(prompt, request.max_tokens)
        places = self.limits.sequences + self.limits.queue
        if len(self._sequences) + job.unfinished > places:
            raise QueueFull(
                f"{job.unfinished} more sequences do not fit, {len(self._sequences)} of {places} places are taken; "
                "try again in a moment"
            )
        self._miss(job, job.allowed - self._available())
        if job.error is not None:
            raise job.error
        if f"{request.id}/0" in self._sequences:
            raise UsageError(f"id: {request.id!r} is that of a request at work")
        for index in range(job.unfinished):
            sequence = SequenceState(job, index, self._tokenizer)
            job.sequences.append(sequence)
            self._sequences[sequence.id] = sequence
        try:
            for sequence in job.sequences:
                self._runner.add(sequence.id, sequence.prompt)
        except FlexmoreError as error:
            job.error = error
            self._release(job)
            raise
        return job

    def _allowed(self, request: Request) -> frozenset[int]:
        if request.experts is None:
            return frozenset(range(len(self.experts)))
        unknown = [name for name in request.experts if name not in self.experts]
        if unknown or self.experts[0] not in request.experts:
            raise UsageError(
                f"experts: {self.experts[0]} and any of {', '.join(self.experts[1:])}, got {', '.join(request.experts)}"
            )
        return frozenset(map(self.experts.index, request.experts))

    def _check_prompt(self, prompt: Sequence[int], max_tokens: int) -> None:
        if not prompt:
            raise UsageError("prompt: at least one token is needed")
        if len(prompt) + max_tokens > self.max_model_len:
            raise UsageError(
                f"prompt: {len(prompt):,} tokens and max_tokens {max_tokens:,} are more than the "
                f"{self.max_model_len:,} that the model takes"
            )

    def _release(self, job: Job) -> None:
        """Forget a request; what still runs of it is dropped."""
        for sequence in job.sequences:
            if sequence.finish_reason is None:
                self._runner.cancel(sequence.id)
            del self._sequences[sequence.id]
        usage, ended, first = self._usage(job), time.monotonic(), job.first_token
        self._totals.update(
            requests=1,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
        longest = max(len(sequence.token_ids) for sequence in job.sequences)
        outcome: Outcome = "failed" if job.error is not None else "cancelled" if job.unfinished else "done"
        request = EndedRequest(
            outcome=outcome,
            usage=usage,
            seconds=ended - job.began,
            first_token=None if first is None else first - job.began,
            per_token=(ended - first) / (longest - 1) if first is not None and longest > 1 else None,
        )
        if outcome == "done":
            self._recent.append((time.time(), request.first_token, request.per_token, request.seconds))
        if self._observer is not None:
            self._observer.ended(request)

    async def _news(self, job: Job) -> None:
        """Wait for news of a request, or of the engine's end."""
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                await job.news.wait()
        except TimeoutError:
            if not self.is_alive and job.error is None:
                job.error = EngineFailed("the engine has stopped")
        job.news.clear()

    def _take(self, job: Job) -> list[Delta]:
        if job.error is not None:
            raise job.error
        return [delta for sequence in job.sequences if (delta := sequence.take()) is not None]

    def _usage(self, job: Job) -> Usage:
        weights = np.zeros(len(self.experts)) + sum(sequence.shares for sequence in job.sequences)
        weights /= weights.sum() or 1.0
        return Usage(
            prompt_tokens=sum(map(len, job.request.prompts)),
            completion_tokens=sum(len(sequence.token_ids) for sequence in job.sequences),
            cached_tokens=sum(sequence.cached or 0 for sequence in job.sequences[:: job.request.n]),
            experts={name: share for name, share in zip(self.experts, weights.tolist(), strict=True) if share},
            lost=tuple(self.experts[e] for e in sorted(job.lost)),
        )

    # ---- experts that come and go

    def _available(self) -> frozenset[int]:
        """Experts that can work now."""
        return frozenset(e for e in range(len(self.experts)) if e not in self._remote or self._remote[e].available)

    def _salt(self, experts: frozenset[int]) -> int:
        return self._salts.setdefault(experts, len(self._salts))

    def _miss(self, job: Job, lost: frozenset[int]) -> None:
        """Let a request go on without some of its experts, or refuse it, as the policy is."""
        if not lost:
            return
        job.lost |= lost
        if self._on_lost == "refuse" and job.error is None:
            names = ", ".join(self.experts[e] for e in sorted(lost))
            job.error = ExpertLost(f"expert {names} is not available; exclude it, or try again in a moment")

    def _notice(self, present: frozenset[int]) -> None:
        """Act on experts that were lost or came back since the last step."""
        if present == self._present:
            return
        self._present = present
        refused = []
        for sequence in list(self._sequences.values()):
            sequence.is_private |= sequence.salt is not None  # its keys and values are now of several sets of experts
            before = sequence.job.error
            self._miss(sequence.job, sequence.job.allowed - present)
            if sequence.job.error is not before:
                refused.append(sequence.job)
        self._tell(refused)

    # ---- from the engine's thread: the steps of `serve.runner.Step`

    def salt(self, id: str) -> int | None:
        """Sequences of equal experts share prefixes; one whose prompt is scored reads all of it itself."""
        sequence = self._sequences.get(id)
        if sequence is None or sequence.is_private:
            return None
        if sequence.salt is None:  # its first step
            self._notice(self._available())
            sequence.salt = self._salt(sequence.job.allowed & self._present)
        return sequence.salt

    def failed(self, id: str, error: str) -> None:
        """The manager gave a sequence up, as it does when a step fails."""
        self._has_failed = True
        if (sequence := self._sequences.get(id)) is not None:
            sequence.job.error = EngineFailed(f"the engine failed: {error}")
            self._tell([sequence.job])

    def wanted(self, slices: Sequence[Slice]) -> list[int]:
        """The last position of a slice whose sequence gets a token, and those of a prompt that is scored."""
        positions: list[int] = []
        self._plan, offset = [], 0
        for part in slices:
            sequence = self._sequences.get(part.id)
            rows = Rows(sequence, len(positions), part.is_last)
            if sequence is not None and sequence.wants_prompt:
                if not sequence.prompt_logprobs:
                    sequence.prompt_logprobs.append(TokenLogprob(sequence.prompt[0], None, ()))
                first = len(sequence.prompt_logprobs) - 1  # whose logits are of the first token without a score
                end = min(part.start + part.length, len(sequence.prompt) - 1)
                rows.prompt = range(max(first, part.start), max(first, part.start, end))
                positions.extend(offset + place - part.start for place in rows.prompt)
            if part.is_last:
                positions.append(offset + part.length - 1)
            self._plan.append(rows)
            offset += part.length
        return positions

    def forward(self, model: FlexMoreForCausalLM, slices: Sequence[Slice], inputs: Mapping[str, Any]) -> Tensor:
        """Logits of the wanted positions (n, V), float32; made again without an expert that is lost in between."""
        began = time.monotonic()
        for attempt in itertools.count():
            present = self._available() if attempt < ATTEMPTS else self._available() - self._remote.keys()
            self._notice(present)
            self._routing.allowed = self._mask(slices, present)
            self._routing.picks = []
            try:
                logits: Tensor = model(**inputs).logits[0].float()
                break
            except ExpertLost:  # keys and values of this step are written again, in the same places
                for link in self._remote.values():
                    link.abandon()
        tokens = sum(part.length for part in slices)
        self._count(slices)
        if self._observer is not None:
            self._observer.stepped(tokens, len(slices), time.monotonic() - began)
        return logits

    def _mask(self, slices: Sequence[Slice], present: frozenset[int]) -> Tensor | None:
        """(T, E) which experts may work on which token; None if all may on all."""
        everyone = range(len(self.experts))
        rows = [present if rows.sequence is None else present & rows.sequence.job.allowed for rows in self._plan]
        if all(len(allowed) == len(everyone) for allowed in rows):
            return None
        table = torch.tensor([[e in allowed for e in everyone] for allowed in rows])
        lengths = torch.tensor([part.length for part in slices])
        return table.repeat_interleave(lengths, dim=0).to(self._device)

    def _count(self, slices: Sequence[Slice]) -> None:
        """Add the weight that the routers gave each expert to the sequences' and the engine's shares."""
        picks, self._routing.picks = self._routing.picks or [], None
        chosen = torch.stack([experts for experts, _ in picks])  # (layers, T, K)
        weights = torch.stack([weights for _, weights in picks])
        width = len(self.experts) + 1  # the last is nobody
        row = torch.arange(len(slices)).repeat_interleave(torch.tensor([part.length for part in slices]))
        cells = (chosen + row.to(chosen.device)[:, None] * width).flatten()
        table = torch.zeros(len(slices) * width, device=chosen.device).index_add_(0, cells, weights.flatten())
        shares = table.view(len(slices), width)[:, :-1].cpu().numpy()
        for rows, share, part in zip(self._plan, shares, slices, strict=True):
            if rows.sequence is not None:
                rows.sequence.shares = rows.sequence.shares + share
                if rows.sequence.cached is None:
                    rows.sequence.cached = part.start
        self._expert_weights += shares.sum(axis=0)

    def choose(self, slices: Sequence[Slice], logits: Tensor) -> list[tuple[int, bool]]:
        """The next token of each sequence that gets one, and whether it is the last."""
        self._score_prompts(logits)
        plan = [rows for rows in self._plan if rows.is_last]
        sequences = [rows.sequence for rows in plan]
        requests = [None if sequence is None else sequence.job.request for sequence in sequences]
        last = logits[[rows.last_row for rows in plan]]
        uniform = [0.0 if sequence is None else sequence.random.random() for sequence in sequences]
        temperature = [0.0 if request is None else request.temperature for request in requests]
        top_p = [1.0 if request is None else request.top_p for request in requests]
        tokens: list[int] = choose(last, temperature, top_p, uniform).tolist()
        told = [
            (row, sequence, sequence.job.request.logprobs)
            for row, sequence in enumerate(sequences)
            if sequence is not None and sequence.job.request.logprobs is not None
        ]
        if told:
            rows, whose, top = zip(*told, strict=True)
            scores = logprobs(last[list(rows)], [tokens[row] for row in rows], list(top))
            for sequence, score in zip(whose, scores, strict=True):
                sequence.logprobs.append(score)
        ends = [sequence is None or self._advance(sequence, t) for sequence, t in zip(sequences, tokens, strict=True)]
        self._tell([sequence.job for sequence in sequences if sequence is not None and sequence.job.streams])
        return list(zip(tokens, ends, strict=True))

    def _score_prompts(self, logits: Tensor) -> None:
        plan = [(rows.sequence, rows) for rows in self._plan if rows.sequence is not None and rows.prompt]
        if not plan:
            return
        picked = [rows.first_row + i for _, rows in plan for i in range(len(rows.prompt))]
        tokens = [sequence.prompt[place + 1] for sequence, rows in plan for place in rows.prompt]
        top = [sequence.job.request.prompt_logprobs or 0 for sequence, rows in plan for _ in rows.prompt]
        scores = iter(logprobs(logits[picked], tokens, top))
        for sequence, rows in plan:
            sequence.prompt_logprobs.extend(itertools.islice(scores, len(rows.prompt)))

    def _advance(self, sequence: SequenceState, token: int) -> bool:
        """Give a sequence its next token; returns whether it ends with it."""
        job, request = sequence.job, sequence.job.request
        if job.first_token is None:
            job.first_token = time.monotonic()
        reason: FinishReason | None = None
        if request.max_tokens == 0:
            reason = "length"
        else:
            sequence.token_ids.append(token)
            if sequence.watch is not None:
                sequence.watch.push([token])
            if token in self._eos or (sequence.watch is not None and sequence.watch.stopped):
                reason = "stop"
            elif len(sequence.token_ids) >= request.max_tokens:
                reason = "length"
        if reason is not None:
            sequence.finish_reason = reason
            job.unfinished -= 1
            if job.unfinished == 0:
                self._tell([job])
        return reason is not None

    def _tell(self, jobs: Sequence[Job]) -> None:
        """Wake who waits for these requests."""
        loop = self._loop
        if jobs and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_wake, jobs)


def _wake(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.news.set()


def _end_tokens(mixture: Mixture) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation config, else the tokenizer's."""
    given = mixture.model.generation_config.eos_token_id
    if given is None:
        given = mixture.tokenizer.eos_token_id
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
