"""What the deltas of a request look like in OpenAI's formats: a whole answer, or the chunks of a stream."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from serve.request import Delta, Request, TokenLogprob, Usage
from serve.tokens import Offsets, Tokens

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What every piece of an answer starts with."""

    id: str
    model: str
    created: int
    """Seconds since 1970."""
    fingerprint: str
    """Changes when the same request may be answered differently: the mixture's id."""

    def document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A piece of an answer, as JSON."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


class Answer(Protocol):
    """One request's answer in one of the formats."""

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """All of it."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that a stream starts with."""

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None where the delta has nothing to show."""

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that says what the request took."""


class CompletionAnswer:
    """An answer of ``/v1/completions``.

    Args:
        head: what it starts with.
        request: what is answered.
        tokens: names tokens.
        echo: the text of each prompt, to start its answers with; None to leave it out.
        usage_follows: whether the stream has a chunk with the usage, which the others then announce.
    """

    def __init__(
        self, head: Head, request: Request, tokens: Tokens, *, echo: Sequence[str] | None, usage_follows: bool = False
    ) -> None:
        self._head, self._request, self._tokens, self._echo = head, request, tokens, echo
        self._more = {"usage": None} if usage_follows else {}
        self._offsets: dict[int, Offsets] = defaultdict(tokens.offsets)
        self._started: set[int] = set()

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """All of it."""
        choices = [self._choice(delta) for delta in deltas]
        return self._head.document("text_completion", choices, usage=usage_document(usage))

    def opening(self) -> Iterator[dict[str, Any]]:
        """Nothing."""
        return iter(())

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None where the delta has nothing to show."""
        choice = self._choice(delta)
        if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
            return None
        return self._head.document("text_completion", [choice], **self._more)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that says what the request took."""
        return self._head.document("text_completion", [], usage=usage_document(usage))

    def _choice(self, delta: Delta) -> dict[str, Any]:
        prompt = ""
        if self._echo is not None and delta.sequence not in self._started:
            prompt = self._echo[delta.sequence // self._request.n]
        self._started.add(delta.sequence)
        return {
            "index": delta.sequence,
            "text": prompt + delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        entries = [*delta.prompt_logprobs, *delta.logprobs]
        if not entries:
            return None if self._request.logprobs is None else _legacy([], [], [], [])
        return _legacy(
            [self._tokens.name(entry.token_id) for entry in entries],
            [None if entry.logprob is None else _finite(entry.logprob) for entry in entries],
            [self._top(entry) for entry in entries],
            self._offsets[delta.sequence].push(entry.token_id for entry in entries),
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """By name, most likely first, the token itself among them. Of two tokens with one name, the likelier."""
        if entry.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name = self._tokens.name(token_id)
            found[name] = max(_finite(logprob), found.get(name, -math.inf))
        return found


def _legacy(tokens: list[Any], logprobs: list[Any], top: list[Any], offsets: list[int]) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


class ChatAnswer:
    """An answer of ``/v1/chat/completions``.

    Args:
        head: what it starts with.
        request: what is answered.
        tokens: names tokens.
        usage_follows: whether the stream has a chunk with the usage, which the others then announce.
    """

    def __init__(self, head: Head, request: Request, tokens: Tokens, *, usage_follows: bool = False) -> None:
        self._head, self._request, self._tokens = head, request, tokens
        self._more = {"usage": None} if usage_follows else {}

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """All of it."""
        choices = [
            {
                "index": delta.sequence,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta),
                "finish_reason": delta.finish_reason,
            }
            for delta in deltas
        ]
        return self._head.document("chat.completion", choices, usage=usage_document(usage))

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role, for every answer."""
        for index in range(self._request.n):
            yield self._piece(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None where the delta has nothing to show."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        text = {"content": delta.text} if delta.text else {}
        return self._piece(delta.sequence, text, self._logprobs(delta), delta.finish_reason)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that says what the request took."""
        return self._head.document("chat.completion.chunk", [], usage=usage_document(usage))

    def _piece(self, index: int, delta: Any, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head.document("chat.completion.chunk", [choice], **self._more)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in delta.logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokens.spelling(token_id)
        value = _LEAST if logprob is None else _finite(logprob)
        return {"token": self._tokens.name(token_id), "logprob": value, "bytes": list(raw)}


def usage_document(usage: Usage) -> dict[str, Any]:
    """What a request took, as JSON: OpenAI's counts, each expert's share of the routed weight, and experts lost."""
    document: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "experts": {name: round(share, 6) for name, share in usage.experts.items()},
    }
    if usage.lost:
        document["experts_lost"] = list(usage.lost)
    return document


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
