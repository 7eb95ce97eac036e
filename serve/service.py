"""What the HTTP service is set to, and what it asks of the replicas behind it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from flexmore_ray.errors import FlexmoreError, UsageError
from serve.request import Delta, Request, Usage


class Unavailable(FlexmoreError):  # noqa: N818
    """No replica is up to take a request (503)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """What the HTTP service takes, and from whom."""

    model: str
    """The model's name in requests and answers."""
    max_model_len: int
    """Tokens that a prompt and its answer have at most, together."""
    vocab_size: int | None = None
    """Token ids that the model knows; None means those of the tokenizer."""
    api_keys: tuple[str, ...] = ()
    """`key_digest` of each key for the API; none means that no key is needed."""
    admin_keys: tuple[str, ...] = ()
    """`key_digest` of each key for the admin endpoints, good for the API too; none closes these endpoints."""
    max_body_bytes: int = 4 * 2**20
    """A larger body is refused."""
    body_timeout_s: float = 30.0
    """Seconds for a body to come."""
    request_timeout_s: float = 600.0
    """Seconds for an answer, to the end of a stream."""
    max_sequences: int = 128
    """Prompts of one request, times `n`."""
    max_logprobs: int = 20
    """Likely tokens that a request may ask for at each place."""
    max_stop: int = 16
    """Stop strings of one request; OpenAI has 4, and lm-eval's tasks have more."""
    retry_after_s: float = 1.0
    """Seconds after which a client that was turned away may come again."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_body_bytes", "body_timeout_s", "request_timeout_s", "max_sequences"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: a number above 0 is needed, got {getattr(self, name)}")
        if not self.model:
            raise UsageError("model: a name is needed, got none")
        if any(not re.fullmatch("[0-9a-f]{64}", digest) for digest in (*self.api_keys, *self.admin_keys)):
            raise UsageError("api_keys, admin_keys: SHA-256 digests in hex are needed; make them with key_digest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertInfo:
    """One expert of a mixture."""

    name: str
    rank: Any
    """As a mixture file says it: an integer, "full", or a mapping from projection to these."""
    parameters: int
    """Of the expert alone, over all layers."""
    placement: str = "local"
    """ "local", with the trunk, or "own", a deployment of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is served. It stays the same while the service runs."""

    mixture_id: str
    created: int = 0
    """When the service started, in seconds since 1970; `serve.ingress.Ingress` finds out."""
    experts: tuple[ExpertInfo, ...]
    """All that are in the mixture, the public one first."""
    parameters: Mapping[str, int]
    """"total", "active" (per token) and "full" (of the mixture with every expert full)."""
    active: int
    """Experts that work on a token."""
    source: tuple[str, ...]
    """Where the weights come from."""


class Service(Protocol):
    """What the HTTP service asks of the replicas behind it.

    Any method may raise `QueueFull` (429), `ExpertLost` (503), `Unavailable` (503) or TimeoutError (504).
    A call that is cancelled cancels its request.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        """One complete delta for every sequence, in order."""

    def stream(self, request: Request) -> AsyncGenerator[list[Delta] | Usage, None]:
        """What is new since the last item, and at the end the usage. Closing it cancels the request."""

    async def describe(self) -> Description:
        """What is served."""

    async def disabled(self) -> set[str]:
        """Experts that new requests go without."""

    async def set_enabled(self, name: str, enabled: bool) -> None:
        """Give an expert back to new requests, or take it from them."""

    async def ready(self) -> bool:
        """Whether a model answers."""

    async def status(self) -> dict[str, Any]:
        """For the status page: "experts" (name -> {"share": weight share so far, "lost": bool}), and of "replicas",
        "queue", "totals" and "latency" what is known; see `serve.ingress.summarise`."""

    async def metrics(self) -> str:
        """In Prometheus's text format; a value may be 10 seconds old."""
