"""The HTTP service: what OpenAI's clients and lm-eval speak, in front of a `Service` that does the work.

    body -> checked (schema) -> tokens -> Request -> Service -> Delta, Usage -> OpenAI's format (answers)

Nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import logging
import math
import random
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.spec import suggest
from serve.answers import Answer, ChatAnswer, CompletionAnswer, Head
from serve.gate import Gate, Keys, dump, error_response, json_response
from serve.openapi import openapi
from serve.request import Delta, ExpertLost, QueueFull, Request, Usage
from serve.schema import (
    INT64,
    ApiError,
    B,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExpertChoice,
    Message,
    Sampling,
    TokenizeBody,
    parse,
    refuse,
    show,
)
from serve.service import Description, ExpertInfo, HttpSettings, Service, Unavailable
from serve.stream import ClientGone, EventStream, before, while_connected
from serve.tokens import Tokens

__all__ = ["Description", "ExpertInfo", "HttpSettings", "Service", "Unavailable", "create_app"]

_LOG = logging.getLogger(__name__)
_LARGE_BODY = 2**16  # bytes; reading more than this goes to a thread
_MANY_LOGPROBS = 2_000  # tokens; writing more than this goes to a thread
_LOGPROBS = 500_000  # of one answer, 12 MB of JSON
_TOKENIZED = 10**6  # characters that /tokenize takes whatever the model's length is
_READY_SECONDS = 10.0
T = TypeVar("T")


def create_app(service: Service, settings: HttpSettings) -> FastAPI:
    """The application.

    Args:
        service: does the work.
        settings: limits, keys and the model's name.
    """
    api, keys = _Api(service, settings), Keys(settings.api_keys, settings.admin_keys)
    app = FastAPI(title="flexmore", docs_url=None, redoc_url=None, redirect_slashes=False)
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model:path}", api.model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/tokenizer_info", api.tokenizer_info),
        ("GET", "/experts", api.experts),
        ("GET", "/status", api.status),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
        ("GET", "/metrics", api.metrics),
        ("GET", "/", api.page),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    for path, probe in (("/health", api.health), ("/ready", api.ready)):
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False, response_model=None)
    for action, enabled in (("enable", True), ("disable", False)):
        path, guard = "/admin/experts/{name}/" + action, [Depends(keys.check_admin)]
        app.add_api_route(path, api.switch(enabled), methods=["POST"], response_model=None, dependencies=guard)
    for kind in (FlexmoreError, ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, api.error)
    app.add_middleware(Gate, keys=keys, max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s)
    app.openapi = lambda: openapi(app.routes, settings, api.tokens.size)  # type: ignore[method-assign]
    return app


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service, self._settings = service, settings
        self.tokens = Tokens(service.tokenizer, settings.vocab_size)
        self._page = (Path(__file__).parent / "page.html").read_bytes()

    # Completions and chats

    async def completions(self, http: HttpRequest) -> Response:
        """Go on from prompts."""
        body = await _read(http, CompletionBody)
        self._check(body, sequences=len(body.prompt) * body.n, logprobs=("logprobs", body.logprobs))
        experts = await self._experts_for(body.experts)
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        self._check_size(max(map(len, texts), default=0), "prompt")
        prompts = await self.tokens.encode(texts)
        if not texts:
            prompts = [self._check_ids(ids, f"prompt[{place}]") for place, ids in enumerate(body.prompt)]
        for place, prompt in enumerate(prompts):
            self._check_length(prompt, body.max_tokens, "prompt" if len(prompts) == 1 else f"prompt[{place}]")
        self._check_answer(body, sum(map(len, prompts)) if body.echo else 0, len(prompts))
        request = Request(
            id=f"cmpl-{uuid.uuid4().hex}",
            prompts=tuple(prompts),
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            **_sampling(body, experts),
        )
        echo = [p if isinstance(p, str) else await self.tokens.decode(p) for p in body.prompt] if body.echo else None
        answer = CompletionAnswer(
            await self._head(request), request, self.tokens, echo=echo, usage_follows=_include_usage(body)
        )
        return await self._answer(http, request, answer, body)

    async def chat(self, http: HttpRequest) -> Response:
        """Take the next turn of a conversation."""
        body = await _read(http, ChatBody)
        self._check(body, sequences=body.n, logprobs=("top_logprobs", body.top_logprobs))
        experts = await self._experts_for(body.experts)
        self._check_size(sum(len(message.content) for message in body.messages), "messages")
        prompt = await self._chat_tokens(body.messages)
        given = body.max_completion_tokens or body.max_tokens
        self._check_length(prompt, given or 1, "messages")
        request = Request(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompts=(prompt,),
            max_tokens=given or self._settings.max_model_len - len(prompt),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **_sampling(body, experts),
        )
        answer = ChatAnswer(await self._head(request), request, self.tokens, usage_follows=_include_usage(body))
        return await self._answer(http, request, answer, body)

    def _check(self, body: Sampling, *, sequences: int, logprobs: tuple[str, int | None]) -> None:
        """Check a body against the settings."""
        settings = self._settings
        self._check_model(body.model)
        if len(body.stop) > settings.max_stop:
            refuse("stop", f"at most {settings.max_stop} stop strings, got {len(body.stop)}")
        if sequences > settings.max_sequences:
            rule = f"prompts times n are at most {settings.max_sequences}"
            refuse("n", rule, sequences, code="too_many_sequences")
        name, value = logprobs
        if value is not None and value > settings.max_logprobs:
            refuse(name, f"at most {settings.max_logprobs}", value)

    def _check_answer(self, body: CompletionBody, echoed: int, prompts: int) -> None:
        """Refuse an answer that would be too large."""
        if body.logprobs is None:
            return
        size = body.n * (echoed + prompts * body.max_tokens) * (1 + body.logprobs)
        if size > _LOGPROBS:
            rule = f"an answer has at most {_LOGPROBS} log-probabilities, all sequences together"
            refuse("logprobs", rule, size, code="too_many_logprobs")

    def _check_model(self, model: str) -> None:
        if model != self._settings.model:
            message = f"model: no model {show(model)} here; there is {show(self._settings.model)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_ids(self, ids: Any, param: str) -> tuple[int, ...]:
        if max(ids, default=0) >= self.tokens.size:
            refuse(param, f"token ids go up to {self.tokens.size - 1}", max(ids))
        return tuple(ids)

    def _check_length(self, prompt: Sequence[int], max_tokens: int, param: str) -> None:
        limit = self._settings.max_model_len
        if not prompt:
            refuse(param, "the text has no token; give one that has")
        if len(prompt) + max_tokens > limit:
            message = (
                f"{param}: the model has room for {limit} tokens, and {len(prompt)} of the prompt with "
                f"{show(max_tokens)} to generate are more; shorten the prompt or ask for fewer"
            )
            raise ApiError(400, message, param=param.partition("[")[0], code="context_length_exceeded")

    def _check_size(self, characters: int, param: str, least: int = 0) -> None:
        """Refuse text that is too long whatever its tokens are, before it is turned into them."""
        limit = max(least, self._settings.max_model_len * self.tokens.longest)
        if characters > limit:
            message = f"{param}: text has at most {limit} characters here, got {characters}; shorten it"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    async def _experts_for(self, choice: ExpertChoice | None) -> tuple[str, ...] | None:
        description, disabled = await self._service.describe(), await self._service.disabled()
        return choose_experts(choice, [expert.name for expert in description.experts], disabled)

    async def _chat_tokens(self, messages: Iterable[Message]) -> tuple[int, ...]:
        roles = {"developer": "system"}  # OpenAI's newer word for it, which few templates know
        turns = [{"role": roles.get(turn.role, turn.role), "content": turn.content} for turn in messages]
        try:
            return await self.tokens.chat(turns)
        except UsageError as error:
            refuse("messages", str(error))

    async def _head(self, request: Request) -> Head:
        fingerprint = (await self._service.describe()).mixture_id
        return Head(id=request.id, model=self._settings.model, created=int(time.time()), fingerprint=fingerprint)

    async def _answer(self, http: HttpRequest, request: Request, answer: Answer, body: Sampling) -> Response:
        deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        try:
            if body.stream:
                return await self._stream(http, request, answer, _include_usage(body), deadline)
            work = before(deadline, self._service.generate(request))
            deltas, usage = await while_connected(http.receive, work)
        except ClientGone:
            return Response(status_code=499)  # for the log: nobody is there to read it
        size = sum(len(delta.prompt_logprobs) + len(delta.logprobs) for delta in deltas)
        write = asyncio.to_thread if size > _MANY_LOGPROBS else _at_once
        content = await write(lambda: dump(answer.whole(deltas, usage)))
        lost = {"x-flexmore-experts-lost": ",".join(usage.lost)} if usage.lost else {}
        return Response(content, headers=lost, media_type="application/json")

    async def _stream(
        self, http: HttpRequest, request: Request, answer: Answer, include_usage: bool, deadline: float
    ) -> Response:
        """Wait for the first piece, so that a request that is turned away gets its status, and send the rest."""
        pieces = self._service.stream(request)
        try:
            first = await while_connected(http.receive, before(deadline, anext(pieces, None)))
        except BaseException:
            await pieces.aclose()
            raise
        return EventStream(self._events(first, pieces, answer, include_usage, deadline), deadline)

    async def _events(
        self,
        first: list[Delta] | Usage | None,
        pieces: AsyncGenerator[list[Delta] | Usage, None],
        answer: Answer,
        include_usage: bool,
        deadline: float,
    ) -> AsyncGenerator[bytes, None]:
        """The stream's bytes. An error is an event, and the last one."""
        item = first
        async with contextlib.aclosing(pieces):
            try:
                chunks = list(answer.opening())
                while isinstance(item, list):
                    chunks += [chunk for delta in item if (chunk := answer.chunk(delta)) is not None]
                    if chunks:
                        yield b"".join(map(_event, chunks))
                    chunks = []
                    item = await before(deadline, anext(pieces, None))
                if item is None:
                    raise RuntimeError("the service ended a stream without its usage")
            except Exception as error:
                yield _event(self._as_api_error(error).content)
                return
        if include_usage:
            yield _event(answer.closing(item))
        elif item.lost:
            yield f": experts lost: {', '.join(item.lost)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    # Tokens

    async def tokenize(self, http: HttpRequest) -> Response:
        """The tokens of a prompt, or of a conversation."""
        body = await _read(http, TokenizeBody)
        if body.model is not None:
            self._check_model(body.model)
        turns = body.messages or []
        size = len(body.prompt or "") + sum(len(turn.content) for turn in turns)
        self._check_size(size, "prompt" if body.messages is None else "messages", _TOKENIZED)
        if body.messages is not None:
            ids = await self._chat_tokens(body.messages)
        else:
            ids = (await self.tokens.encode([body.prompt or ""], special=body.add_special_tokens))[0]
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": self._settings.max_model_len})

    async def detokenize(self, http: HttpRequest) -> Response:
        """The text of tokens."""
        body = await _read(http, DetokenizeBody)
        if body.model is not None:
            self._check_model(body.model)
        return json_response({"prompt": await self.tokens.decode(self._check_ids(body.tokens, "tokens"))})

    async def tokenizer_info(self) -> Response:
        """What a client needs to use the tokenizer from afar."""
        return json_response({**self.tokens.info, "model_max_length": self._settings.max_model_len})

    # What is served, and how it is

    async def models(self) -> Response:
        """All models: the one."""
        return json_response({"object": "list", "data": [await self._card()]})

    async def model(self, model: str) -> Response:
        """One model."""
        self._check_model(model)
        return json_response(await self._card())

    async def _card(self) -> dict[str, Any]:
        described = await self._service.describe()
        return {
            "id": self._settings.model,
            "object": "model",
            "created": described.created,
            "owned_by": "flexmore",
            "max_model_len": self._settings.max_model_len,
            "mixture_id": described.mixture_id,
            "ranks": {expert.name: expert.rank for expert in described.experts},
            "parameters": dict(described.parameters),
            "active": described.active,
            "source": list(described.source),
        }

    async def experts(self) -> Response:
        """The experts, whether they take part, and how much of the weight went to them."""
        return json_response({"object": "list", "data": await self._expert_cards(await self._service.status())})

    async def _expert_cards(self, status: Mapping[str, Any]) -> list[dict[str, Any]]:
        described, disabled = await self._service.describe(), await self._service.disabled()
        live = status.get("experts", {})
        return [
            {
                **dataclasses.asdict(expert),
                "state": _state(expert.name in disabled, bool(live.get(expert.name, {}).get("lost"))),
                "share": round(float(live.get(expert.name, {}).get("share") or 0.0), 6),
            }
            for expert in described.experts
        ]

    async def status(self) -> Response:
        """Everything that the status page shows."""
        live = await self._service.status()
        return json_response({"model": await self._card(), **live, "experts": await self._expert_cards(live)})

    def switch(self, enabled: bool) -> Callable[[str], Coroutine[Any, Any, Response]]:
        """The endpoint that enables or disables an expert for all requests from now on."""

        async def switch(name: str) -> Response:
            names = [expert.name for expert in (await self._service.describe()).experts]
            if name not in names:
                raise ApiError(404, f"name: no expert {show(name)}; {suggest(name, names)}", code="expert_not_found")
            if name == names[0] and not enabled:
                refuse("name", f"{name} is the public expert, which all others correct; disable others")
            await self._service.set_enabled(name, enabled)
            return json_response({"name": name, "enabled": enabled})

        switch.__doc__ = f"{'En' if enabled else 'Dis'}able an expert for all requests from now on."
        return switch

    async def health(self) -> Response:
        """Alive."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a model answers."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                ready = await self._service.ready()
        except (FlexmoreError, TimeoutError):
            ready = False
        if not ready:
            raise self._as_api_error(Unavailable("no model answers yet"))
        return json_response({"status": "ready"})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(await self._service.metrics(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """The status page."""
        return Response(
            self._page, headers={"content-security-policy": page_policy(self._page)}, media_type="text/html"
        )

    # Errors

    async def error(self, http: HttpRequest, error: Exception) -> Response:
        """Any error as the client gets it."""
        return error_response(self._as_api_error(error))

    def _as_api_error(self, error: Exception) -> ApiError:
        again = {"retry-after": str(math.ceil(self._settings.retry_after_s))}
        match error:
            case ApiError():
                return error
            case HTTPException():
                code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
                return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
            case UsageError():  # of an engine with other limits than ours: the application is being replaced
                return ApiError(400, str(error))
            case QueueFull():
                return ApiError(429, f"{error}; try again in a moment", code="queue_full", headers=again)
            case ExpertLost():
                return ApiError(503, str(error), code="expert_lost", headers=again)
            case Unavailable():
                return ApiError(503, f"{error}; try again in a moment", code="unavailable", headers=again)
            case TimeoutError():
                limit = f"{self._settings.request_timeout_s:g} s"
                return ApiError(504, f"no answer within {limit}; ask for fewer tokens", code="request_timeout")
        _LOG.error("a request failed", exc_info=error)
        return ApiError(500, "the service failed; its log says how", code="internal_error")


def choose_experts(choice: ExpertChoice | None, names: Sequence[str], disabled: set[str]) -> tuple[str, ...] | None:
    """The experts that may work on a request.

    Args:
        choice: the caller's; None means all.
        names: all experts, the public one first, which always takes part.
        disabled: experts that requests go without.

    Returns:
        Names in the order of `names`; None if that is all of them.

    Raises:
        ApiError: 400, for an unknown name, a disabled one that is asked for, or the public one left out.
    """
    include, exclude = (choice.include, choice.exclude) if choice else (None, None)
    for field, asked in (("include", include), ("exclude", exclude)):
        for name in asked or ():
            if name not in names:
                refuse(f"experts.{field}", f"no expert {show(name)}; {suggest(name, names)}", code="expert_not_found")
    if gone := [name for name in include or () if name in disabled]:
        refuse("experts.include", f"{gone[0]} is disabled; leave it out", code="expert_disabled")
    if names[0] in (exclude or ()):
        refuse("experts.exclude", f"{names[0]} is the public expert, which all others correct; leave it out")
    wanted = set(names if include is None else [names[0], *include]) - set(exclude or ()) - (disabled - {names[0]})
    return None if len(wanted) == len(names) else tuple(name for name in names if name in wanted)


def page_policy(page: bytes) -> str:
    """What the page may do, for the header Content-Security-Policy: run its own scripts, and call this service."""
    scripts = re.findall(rb"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    run = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {run}; style-src 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


async def _read(http: HttpRequest, kind: type[B]) -> B:
    """The body of a request."""
    media = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        message = f"the body has to be of type application/json, got {show(media)}; send the header Content-Type"
        raise ApiError(415, message, code="unsupported_media_type")
    raw = await http.body()
    return await asyncio.to_thread(parse, kind, raw) if len(raw) > _LARGE_BODY else parse(kind, raw)


def _sampling(body: Sampling, experts: tuple[str, ...] | None) -> dict[str, Any]:
    """What completions and chats say alike. A seed that is not given is drawn here."""
    return {
        "n": body.n,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": random.SystemRandom().randrange(INT64) if body.seed is None else body.seed,
        "stop": tuple(body.stop),
        "experts": experts,
    }


def _include_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _state(disabled: bool, lost: bool) -> str:
    return "disabled" if disabled else "lost" if lost else "enabled"


def _event(content: Any) -> bytes:
    return b"data: " + dump(content) + b"\n\n"


async def _at_once(work: Callable[[], T]) -> T:
    return work()
