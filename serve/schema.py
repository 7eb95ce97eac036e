"""The bodies of HTTP requests, what they are checked against, and errors in OpenAI's shape.

A field that is null counts as not given. A field that OpenAI knows and this service does not act on is
refused unless it holds the value that asks for nothing; a field that nobody knows is refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue, WithJsonSchema
from pydantic_core import PydanticCustomError

INT64 = 2**63
MAX_STOP_CHARACTERS = 1024
MAX_MESSAGES = 10_000
_SHOWN = 40  # characters of a value that an error repeats


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line: what is wrong, the rule, the value, the way out.
        param: the field at fault; None where there is none.
        code: a word for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message = " ".join(message.split())
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body, in OpenAI's shape."""
        kind = _ERROR_TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refuse(param: str, rule: str, value: Any = None, *, code: str = "invalid_value") -> NoReturn:
    """Refuse a field of the body.

    Args:
        param: the field.
        rule: what it has to be.
        value: what it is, which the message shows the start of; None where that would say nothing.
        code: a word for programs.

    Raises:
        ApiError: always, with status 400.
    """
    got = "" if value is None else f", got {show(value)}"
    raise ApiError(400, f"{param}: {rule}{got}", param=param, code=code)


def show(value: Any) -> str:
    """A value for an error message, however large it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    text = json.dumps(value[:_SHOWN] if isinstance(value, str) else value)
    long = isinstance(value, str) and len(value) > _SHOWN
    return text[: _SHOWN + 2] + ("..." if long or len(text) > _SHOWN + 2 else "")


def _wrong(rule: str, value: Any = None, at: str = "") -> PydanticCustomError:
    """The error of a checker of ours: rule, value, and the item (such as ``[3]``) or the field at fault."""
    got = "" if value is None else f", got {show(value)}"
    return PydanticCustomError("rule", "{rule}", {"rule": rule + got, "at": at})


def _whole(value: Any) -> Any:
    """In JSON, 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Seed = Annotated[int, Field(ge=-INT64, lt=INT64), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0, lt=INT64), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1, lt=INT64), BeforeValidator(_whole)]


def _is_id(value: Any) -> bool:
    return isinstance(_whole(value), int) and not isinstance(value, bool)


def _check_ids(value: Any, at: str = "") -> list[int]:
    if not isinstance(value, list):
        raise _wrong("a list of token ids is needed", value, at)
    for place, token_id in enumerate(value):
        if not _is_id(token_id) or not 0 <= token_id < INT64:
            raise _wrong("a token id is an integer >= 0", token_id, f"{at}[{place}]")
    return [int(token_id) for token_id in value]


def _check_prompt(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, as text or as token ids, all of a kind: always as a list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _wrong("text, token ids, or a list of either is needed, with at least one in it", value)
    if _is_id(value[0]):
        return [_check_ids(value)]
    if isinstance(value[0], list):
        if [] in value:
            raise _wrong("a prompt has at least one token", at=f"[{value.index([])}]")
        return [_check_ids(ids, f"[{place}]") for place, ids in enumerate(value)]
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise _wrong("prompts are all text or all token ids", text, f"[{place}]")
        if not text:
            raise _wrong("a prompt has at least one character", text, f"[{place}]" if len(value) > 1 else "")
    return value


def _check_stop(value: Any) -> list[str]:
    for place, text in enumerate(value if isinstance(value, list) else [value]):
        at = f"[{place}]" if isinstance(value, list) else ""
        if not isinstance(text, str):
            raise _wrong("text, or a list of texts, is needed", text, at)
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise _wrong(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters, got {len(text)}", at=at)
    return value if isinstance(value, list) else [value]


def _check_content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("text, or a list of text parts, is needed", value)
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            rule = 'a part is {"type": "text", "text": ...}; other kinds of content are not supported'
            raise _wrong(rule, part.get("type") if isinstance(part, dict) else part, f"[{place}]")
    return "\n".join(part["text"] for part in value)


def _text(**limits: int) -> JsonSchemaValue:
    return {"type": "string", **limits}


def _list(items: JsonSchemaValue) -> JsonSchemaValue:
    return {"type": "array", "minItems": 1, "items": items}


_IDS = _list({"type": "integer", "minimum": 0, "maximum": INT64 - 1})
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _text()},
    "required": ["type", "text"],
}

TokenIds = Annotated[list[int], PlainValidator(_check_ids), WithJsonSchema({**_IDS, "minItems": 0})]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema({"anyOf": [_text(minLength=1), _list(_text(minLength=1)), _IDS, _list(_IDS)]}),
]
_STOP = _text(minLength=1, maxLength=MAX_STOP_CHARACTERS)
Stops = Annotated[
    list[str],
    PlainValidator(_check_stop),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP}]}),
]
Content = Annotated[
    str,
    PlainValidator(_check_content),
    WithJsonSchema({"anyOf": [_text(), {"type": "array", "items": _PART}]}),
]


def _describe_fields(schema: JsonSchemaValue, model: type["Body"]) -> None:
    """Add to the schema what the fields cannot say: null is as good as left out, and what is taken of the others."""
    for name, field in schema.get("properties", {}).items():
        field.pop("title", None)
        if name not in schema.get("required", ()):
            notes = {key: field.pop(key) for key in ("default", "description") if key in field}
            kinds = [kind for kind in field.pop("anyOf", [dict(field)]) if kind != {"type": "null"}]
            field.clear()
            field |= {"anyOf": [*kinds, {"type": "null"}], **notes}
    for name, values in model.neutral.items():
        schema["properties"][name] = {"enum": [*values, None], "description": "Not supported."}
    if model.rules:
        schema["allOf"] = list(model.rules)


class Body(BaseModel):
    """A JSON object of known fields: no conversions, and null as if left out."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_describe_fields,
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI that are not supported, each with the values that ask for nothing."""
    rules: ClassVar[tuple[JsonSchemaValue, ...]] = ()
    """What the schema says of several fields together."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise _wrong("a JSON object is needed", data)
        given = {name: value for name, value in data.items() if value is not None}
        for name in [name for name in given if name in cls.neutral]:
            _check_neutral(name, given.pop(name), cls.neutral[name])
        for name in data:
            if name not in cls.model_fields and name not in cls.neutral:
                known = ", ".join(cls.model_fields)
                raise PydanticCustomError("unknown", "{at}", {"at": name[:_SHOWN], "known": known})
        return given


def _given(*names: str) -> JsonSchemaValue:
    """The schema of objects that have all of these fields, and not null."""
    return {"required": list(names), "properties": {name: {"not": {"type": "null"}} for name in names}}


def _only_with(name: str, flag: str) -> JsonSchemaValue:
    """The schema of objects that have a field only if a flag is set."""
    return {"anyOf": [{"not": _given(name)}, {"required": [flag], "properties": {flag: {"const": True}}}]}


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        way_out = " or ".join(["leave it out", *(f"give {json.dumps(known)}" for known in neutral)])
        raise _wrong(f"is not supported; {way_out}", value, name)


class StreamOptions(Body):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    """Whether a last piece without choices says what the request took."""
    neutral = {"include_obfuscation": (False,)}


class ExpertChoice(Body):
    """Which experts may work on the tokens: those named, or all but those named. The public one always does."""

    include: list[str] | None = Field(default=None, fail_fast=True)
    exclude: list[str] | None = Field(default=None, fail_fast=True)
    rules = ({"not": _given("include", "exclude")},)

    @model_validator(mode="after")
    def _one_of_them(self) -> "ExpertChoice":
        if self.include is not None and self.exclude is not None:
            raise _wrong("name the experts to include or the ones to exclude, not both")
        return self


class Sampling(Body):
    """What completions and chats have in common."""

    model: str
    """The name that /v1/models gives."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the fewest tokens that together have this probability."""
    n: Positive = 1
    """Answers to each prompt."""
    stop: Stops = []
    """An answer ends before the first of these."""
    seed: Seed | None = None
    """The same seed gives the same answer; left out, every request has its own."""
    stream: bool = False
    """Whether to send pieces as server-sent events."""
    stream_options: StreamOptions | None = None
    experts: ExpertChoice | None = None
    """Which experts may work on the tokens; left out, all that are enabled."""
    user: str | None = None
    """Not used."""
    neutral = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
    rules: ClassVar[tuple[JsonSchemaValue, ...]] = (_only_with("stream_options", "stream"),)

    @model_validator(mode="after")
    def _stream_has_options(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise _wrong("only with stream: true", at="stream_options")
        return self


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompts
    """Text or token ids, or a list of either."""
    max_tokens: Count = 16
    """Tokens to generate at most; 0 only scores, with echo."""
    echo: bool = False
    """Whether an answer starts with its prompt."""
    logprobs: Count | None = None
    """How many of the most likely tokens to give log-probabilities of; with echo those of the prompt too."""
    best_of: Positive | None = None
    """Not supported: at most n."""
    neutral = Sampling.neutral | {"suffix": ("",)}

    @model_validator(mode="after")
    def _best_of(self) -> "CompletionBody":
        if (self.best_of or 1) > self.n:
            raise _wrong(f"more than n ({self.n}) is not supported; leave it out", self.best_of, "best_of")
        return self


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    """Text; of several text parts, each starts on a line of its own."""
    name: str | None = None
    """Not used."""
    neutral = {"refusal": (), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],)}


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: Positive | None = None
    """Tokens to generate at most; left out, as many as the model has room for."""
    max_completion_tokens: Positive | None = None
    """The same as max_tokens."""
    logprobs: bool = False
    """Whether to give the log-probability of each token."""
    top_logprobs: Count | None = None
    """How many of the most likely tokens to give log-probabilities of."""
    metadata: dict[str, Any] | None = None
    """Not used."""
    prompt_cache_key: str | None = None
    """Not used."""
    safety_identifier: str | None = None
    """Not used."""
    neutral = Sampling.neutral | {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (False, True),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    rules = (
        *Sampling.rules,
        _only_with("top_logprobs", "logprobs"),
        {"not": _given("max_tokens", "max_completion_tokens")},
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("only with logprobs: true", at="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise _wrong("is another name of max_tokens; give one of them", at="max_completion_tokens")
        return self


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt, or messages as a chat would have them."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    add_special_tokens: bool = True
    """Whether to add the tokens that the tokenizer puts around a text; not for messages."""
    model: str | None = None

    rules = ({"oneOf": [_given("prompt"), _given("messages")]},)

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt or messages is needed, not both", at="prompt")
        return self


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: TokenIds
    model: str | None = None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], raw: bytes) -> B:
    """Read a body.

    Raises:
        ApiError: it is not JSON, or breaks a rule: 400 with the field, the rule and the value.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    except RecursionError:
        raise ApiError(400, "body: too deeply nested", code="invalid_json") from None
    raise _explain(first)


def _explain(error: Any) -> ApiError:
    """The answer to the first thing that is wrong with a body."""
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return ApiError(400, f"body: not JSON that can be read: {context['error']}", code="invalid_json")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    place = (place + _suffix(place, context.get("at", ""))).lstrip(".")
    if error["type"] == "unknown":
        message = f"unrecognized request argument; known: {context['known']}"
        return ApiError(400, f"{place}: {message}", param=place, code="unknown_parameter")
    if error["type"] == "rule":
        return ApiError(400, f"{place or 'body'}: {context['rule']}", param=place or None, code="invalid_value")
    if error["type"] == "missing":
        return ApiError(400, f"{place}: is needed", param=place, code="missing_required_parameter")
    rule = error["msg"].removeprefix("Input ")
    if error["type"] == "too_short":
        rule = f"should have at least {context['min_length']} in it"
    if error["type"] == "too_long":
        rule = f"should have at most {context['max_length']} in it"
    return ApiError(400, f"{place}: {rule}, got {show(error['input'])}", param=place, code="invalid_value")


def _suffix(place: str, at: str) -> str:
    return at if not at or at.startswith("[") else f".{at}"
