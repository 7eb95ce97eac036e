"""The description of the HTTP service that ``/openapi.json`` gives: made of the routes, the bodies and the settings."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from serve.schema import INT64, Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from serve.service import HttpSettings


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Document):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Document):
    """An error, in OpenAI's shape."""

    error: ErrorDetail


class PromptDetails(_Document):
    """Of the prompt's tokens."""

    cached_tokens: int


class UsageCounts(BaseModel):
    """What a request took. ``experts_lost`` is there only if some were."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    experts: dict[str, float]
    experts_lost: list[str] = []


class LegacyLogprobs(_Document):
    """Log-probabilities of a completion, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Document):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class _Answer(_Document):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageCounts


class Completion(_Answer):
    """An answer of completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class LikelyToken(_Document):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token of an answer, and the most likely ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Document):
    """Log-probabilities of a chat, token by token."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(_Document):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Document):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(_Answer):
    """An answer of chats."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Model(_Document):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    mixture_id: str
    ranks: dict[str, Any]
    parameters: dict[str, int]
    active: int
    source: list[str]


class ModelList(_Document):
    """All models: the one."""

    object: Literal["list"]
    data: list[Model]


class Expert(_Document):
    """One expert of the mixture."""

    name: str
    rank: Any
    parameters: int
    placement: Literal["local", "own"]
    state: Literal["enabled", "disabled", "lost"]
    share: float


class ExpertList(_Document):
    """The experts."""

    object: Literal["list"]
    data: list[Expert]


class ExpertSwitch(_Document):
    """An expert that was enabled or disabled."""

    name: str
    enabled: bool


class TokenList(_Document):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(_Document):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """About the tokenizer."""

    tokenizer_class: str
    vocab_size: int
    eos_token: str | None
    bos_token: str | None
    chat_template: str | None
    model_max_length: int


class Percentiles(_Document):
    """In seconds; null where no request had it."""

    median: float | None
    p95: float | None


class Latency(_Document):
    """Of the most recent requests that were answered to their end, measured in the replicas."""

    requests: int
    time_to_first_token_s: Percentiles
    time_per_output_token_s: Percentiles
    request_s: Percentiles


class Replica(_Document):
    """One mixture replica: sequences, and the shares of its KV cache that they hold and that is kept for reuse."""

    replica: str
    running: int
    waiting: int
    cache: float
    cached: float
    alive: bool


class Status(BaseModel):
    """Everything that the status page shows. ``queue`` counts sequences; ``totals`` are since the replicas started."""

    model: Model
    experts: list[Expert]
    replicas: list[Replica] = []
    queue: int = 0
    totals: dict[str, int] = {}
    latency: Latency | None = None


class Health(_Document):
    """How the service is."""

    status: str


_ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/models": ModelList,
    "/v1/models/{model}": Model,
    "/tokenize": TokenList,
    "/detokenize": Text,
    "/tokenizer_info": TokenizerInfo,
    "/experts": ExpertList,
    "/status": Status,
    "/health": Health,
    "/ready": Health,
    "/admin/experts/{name}/enable": ExpertSwitch,
    "/admin/experts/{name}/disable": ExpertSwitch,
}
_BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error, as JSON; at the end [DONE]."}},
}
_OTHER_MEDIA = {"/": "text/html", "/metrics": "text/plain"}
_ERRORS = {
    400: "a field breaks a rule",
    401: "no key, or an unknown one",
    403: "not with this key",
    404: "no such model or expert",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not JSON",
    421: "no key is needed, and the host is a name of the internet",
    429: "too many requests wait; come again after the seconds of Retry-After",
    503: "no model, or not with all its experts",
    504: "no answer in time",
}
_OF_BODIES = {400, 404, 408, 413, 415}
_OF_MODELS = {429, 503, 504}
_ALSO = {"/v1/models/{model}": {404}, "/ready": {503}}
_ALSO |= {path: {400, 401, 403, 404} for path in _ANSWERS if path.startswith("/admin/")}
_OPEN = {"/", "/health", "/ready"}


def openapi(routes: Sequence[BaseRoute], settings: HttpSettings, vocab_size: int) -> dict[str, Any]:
    """The description, as JSON.

    Args:
        routes: of the application.
        settings: what bodies are checked against.
        vocab_size: token ids go from 0 to this, exclusive.
    """
    document = get_openapi(title="flexmore", version="1", routes=routes)
    schemas = _schemas()
    document["components"] = {"schemas": schemas}
    keyed, with_admin = bool(settings.api_keys), bool(settings.admin_keys)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"] = _responses(path, keyed)
            if path in _BODIES:
                schema = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
            if (keyed and path not in _OPEN) or (with_admin and path.startswith("/admin/")):
                operation["security"] = [{"key": []}]
    _set_limits(schemas, settings, vocab_size)
    return document


def _schemas() -> dict[str, Any]:
    kinds: list[tuple[type[BaseModel], Literal["validation", "serialization"]]]
    kinds = [(model, "validation") for model in _BODIES.values()]
    answers: list[type[BaseModel]] = [Error, *_ANSWERS.values()]
    kinds += [(model, "serialization") for model in answers]
    found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    return dict(sorted(found[1]["$defs"].items()))


def _responses(path: str, keyed: bool) -> dict[str, Any]:
    media = _OTHER_MEDIA.get(path, "application/json")
    schema = {"$ref": f"#/components/schemas/{_ANSWERS[path].__name__}"} if path in _ANSWERS else {"type": "string"}
    content: dict[str, Any] = {media: {"schema": schema}}
    if path in ("/v1/completions", "/v1/chat/completions"):
        content["text/event-stream"] = {"schema": _EVENT}
    statuses = _OF_BODIES | _OF_MODELS if path in _BODIES else set(_ALSO.get(path, ()))
    statuses |= {401 if keyed else 421} if path not in _OPEN else set()
    return {"200": {"description": "done", "content": content}, **_error_responses(sorted(statuses))}


def _error_responses(statuses: Iterable[int]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {str(s): {"description": _ERRORS[s], "content": content} for s in statuses}
    if "429" in responses:
        responses["429"]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "required": True}}
    if "401" in responses:
        responses["401"]["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}
    return responses


def _set_limits(schemas: dict[str, Any], settings: HttpSettings, vocab_size: int) -> None:
    """Write into the schemas of bodies what the settings allow."""
    most = {
        "n": settings.max_sequences,
        "best_of": 1,
        "logprobs": settings.max_logprobs,
        "top_logprobs": settings.max_logprobs,
        "max_tokens": settings.max_model_len - 1,
        "max_completion_tokens": settings.max_model_len - 1,
    }
    for body in (schemas[model.__name__] for model in _BODIES.values()):
        for name, field in body["properties"].items():
            if name == "model":
                kinds = field.get("anyOf", [field])
                kinds[0]["const"] = settings.model
            for kind in field.get("anyOf", []):
                if name in most and kind["type"] == "integer":
                    kind["maximum"] = most[name]
                if name == "stop" and kind["type"] == "array":
                    kind["maxItems"] = settings.max_stop
            _limit_ids(field, vocab_size - 1)


def _limit_ids(schema: Any, most: int) -> None:
    """Bound the token ids that a schema has, which are the integers from 0 to the largest there is."""
    if isinstance(schema, dict):
        if (schema.get("minimum"), schema.get("maximum")) == (0, INT64 - 1):
            schema["maximum"] = most
        for part in schema.values():
            _limit_ids(part, most)
    elif isinstance(schema, list):
        for part in schema:
            _limit_ids(part, most)
