"""The HTTP service in front of a hand-written service: what clients see, and what no client can break."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import load_tokenizer
from flexmore_ray.source import open_source
from serve.answers import CompletionAnswer, Head
from serve.gate import Gate, Keys, key_digest
from serve.http import HttpSettings, Unavailable, choose_experts, create_app, page_policy
from serve.request import Delta, ExpertLost, QueueFull, Request, TokenLogprob
from serve.schema import ApiError, ExpertChoice
from serve.tokens import Tokens
from tests.serve_fake import NAMES, EchoService

PORT = 18100
BASE = f"http://127.0.0.1:{PORT}"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "nano", "prompt": "hello", "max_tokens": 5}
TALK: dict[str, Any] = {"model": "nano", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@functools.cache
def nano() -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(open_source(["zoo://nano"]))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def application(service: EchoService, **options: Any) -> TestClient:
    limits = HttpSettings(**{"model": "nano", "max_model_len": 512, **options})
    return TestClient(create_app(service, limits), raise_server_exceptions=False)


@pytest.fixture
def service() -> EchoService:
    return EchoService(nano())


@pytest.fixture
def client(service: EchoService) -> TestClient:
    return application(service)


@pytest.fixture(scope="module")
def served() -> Iterator[EchoService]:
    """A service behind a real server."""
    service = EchoService(nano())
    limits = HttpSettings(model="nano", max_model_len=512, max_body_bytes=2**16, body_timeout_s=1.0)
    server = uvicorn.Server(uvicorn.Config(create_app(service, limits), port=PORT, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield service
    server.should_exit = True
    thread.join()


def refusal(response: Any, status: int, code: str | None = None) -> str:
    """The message of an error, which has OpenAI's shape and fits a line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400
    assert "\n" not in error["message"]
    if code is not None:
        assert error["code"] == code
    return error["message"]


def events(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Completions


def test_a_completion_has_openais_shape(client: TestClient, service: EchoService) -> None:
    answer = client.post(COMPLETIONS, json=HELLO).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["id"] == service.requests[0].id
    assert (answer["object"], answer["model"], answer["system_fingerprint"]) == ("text_completion", "nano", "abc123")
    assert answer["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
        "experts": {"public": 0.333333, "math": 0.333333, "code": 0.333333},
    }


def test_prompts_are_text_or_token_ids_one_or_several(client: TestClient, service: EchoService) -> None:
    ids = nano()("hello")["input_ids"]
    for prompt in ("hello", ["hello"], ids, [ids]):
        assert client.post(COMPLETIONS, json=HELLO | {"prompt": prompt}).json()["choices"][0]["text"] == "hello"
    choices = client.post(COMPLETIONS, json=HELLO | {"prompt": ["ab", "cd"], "n": 2}).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        *((0, "ababa"), (1, "ababa"), (2, "cdcdc"), (3, "cdcdc"))
    ]
    assert service.requests[-1].n == 2
    assert len(service.requests[-1].prompts) == 2


def test_parameters_reach_the_request(client: TestClient, service: EchoService) -> None:
    body = HELLO | {"temperature": 0, "top_p": 0.5, "seed": -7, "stop": "x", "user": "me", "n": 3, "best_of": 3}
    client.post(COMPLETIONS, json=body)
    client.post(COMPLETIONS, json={"model": "nano", "prompt": "a", "stop": None, "seed": None, "n": None})
    client.post(COMPLETIONS, json={"model": "nano", "prompt": "a"})
    request, plain, other = service.requests
    assert (request.temperature, request.top_p, request.seed, request.stop, request.n) == (0, 0.5, -7, ("x",), 3)
    assert (plain.temperature, plain.top_p, plain.stop, plain.n, plain.max_tokens) == (1, 1, (), 1, 16)
    assert plain.seed != other.seed
    assert plain.id != other.id


def test_stop_strings_end_an_answer(client: TestClient) -> None:
    choice = client.post(COMPLETIONS, json=HELLO | {"stop": ["lo", "zz"]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "stop")


def test_echoed_logprobs_follow_lm_evals_contract(client: TestClient, service: EchoService) -> None:
    body = HELLO | {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
    assert choice["text"] == "helloh"
    found = choice["logprobs"]
    assert found["tokens"] == list("helloh")
    assert found["text_offset"] == list(range(6))
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    ids = [*nano()("hello")["input_ids"], nano()("h")["input_ids"][0]]
    for place in range(1, 6):
        expected = service.logprob(ids[place], 1)
        assert found["token_logprobs"][place] == expected.logprob  # to the last bit
        assert max(found["top_logprobs"][place].values()) == expected.top[0][1]
        assert found["tokens"][place] in found["top_logprobs"][place]


def test_scoring_alone_generates_nothing(client: TestClient, service: EchoService) -> None:
    body = HELLO | {"echo": True, "logprobs": 0, "max_tokens": 0}
    choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
    assert choice["text"] == "hello"
    assert len(choice["logprobs"]["tokens"]) == 5
    assert (service.requests[0].max_tokens, service.requests[0].prompt_logprobs) == (0, 0)
    client.post(COMPLETIONS, json=HELLO | {"logprobs": 2})
    assert (service.requests[1].logprobs, service.requests[1].prompt_logprobs) == (2, None)


def test_two_tokens_of_one_name_never_hide_the_likelier() -> None:
    tokens, request = Tokens(nano()), Request(id="r", prompts=((3,),), logprobs=2)
    head = Head(id="r", model="m", created=0, fingerprint="f")
    for top in (((500, -0.5), (501, -0.7)), ((501, -0.7), (500, -0.5))):  # neither is in the vocabulary: both ""
        delta = Delta(sequence=0, logprobs=[TokenLogprob(501, -0.7, top), TokenLogprob(4, float("-inf"), ())])
        choice = CompletionAnswer(head, request, tokens, echo=None).chunk(delta)
        assert choice is not None
        assert choice["choices"][0]["logprobs"]["top_logprobs"] == [{"": -0.5}, {" ": -9999.0}]


def byte_level() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": len(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_tokens_of_part_of_a_character_have_bytes() -> None:
    text = "a €😀\n<end>b"
    tokens = Tokens(byte_level())
    ids = asyncio.run(tokens.encode([text]))[0]
    assert b"".join(map(tokens.spelling, ids)) == text.encode()
    names = [tokens.name(i) for i in ids]
    assert names[:3] == ["a", " ", r"bytes:\xe2"]
    assert names[-2:] == ["<end>", "b"]
    starts = tokens.offsets().push(ids)
    assert starts == [0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5, 10]
    assert text[starts[-2] : starts[-1]] == "<end>"


def test_every_byte_has_its_letter() -> None:
    tokens = Tokens(byte_level())
    assert sorted(tokens.spelling(i)[0] for i in range(256)) == list(range(256))


# Chats


def test_a_chat_has_openais_shape(client: TestClient, service: EchoService) -> None:
    answer = client.post(CHAT, json=TALK | {"logprobs": True, "top_logprobs": 1, "max_tokens": 2}).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "us", "refusal": None}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], len(first["top_logprobs"])) == ("u", [117], 1)
    assert nano().decode(list(service.requests[0].prompts[0])) == "user: hi\nassistant:"


def test_a_chat_goes_on_to_the_end_of_the_context(client: TestClient, service: EchoService) -> None:
    client.post(CHAT, json={"model": "nano", "messages": TALK["messages"]})
    client.post(CHAT, json={"model": "nano", "messages": TALK["messages"], "max_completion_tokens": 3})
    assert len(service.requests[0].prompts[0]) + service.requests[0].max_tokens == 512
    assert service.requests[1].max_tokens == 3


def test_the_models_own_chat_template_is_used() -> None:
    tokenizer = copy.deepcopy(nano())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    service = EchoService(tokenizer)
    client = application(service)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.post(CHAT, json=TALK | {"messages": [{"role": "user", "content": parts}]})
    assert nano().decode(list(service.requests[0].prompts[0])) == "<user>a\nb<answer>"
    assert client.get("/tokenizer_info").json()["chat_template"] == tokenizer.chat_template
    newer_word = TALK | {"messages": [{"role": "developer", "content": "x"}]}
    assert "no system turn here" in refusal(client.post(CHAT, json=newer_word), 400)


def test_what_a_client_received_it_can_send_back(client: TestClient) -> None:
    turn = client.post(CHAT, json=TALK).json()["choices"][0]["message"]
    turns = [*TALK["messages"], turn | {"tool_calls": None, "function_call": None, "annotations": []}]
    assert client.post(CHAT, json=TALK | {"messages": turns}).status_code == 200


# Streams


@pytest.mark.parametrize("more", [{}, {"echo": True, "logprobs": 2}, {"n": 2, "stop": ["lo"]}, {"max_tokens": 0}])
def test_the_pieces_of_a_completion_add_up_to_it(client: TestClient, more: dict[str, Any]) -> None:
    whole = client.post(COMPLETIONS, json=HELLO | more).json()
    *chunks, done = events(client.post(COMPLETIONS, json=HELLO | more | {"stream": True}))
    assert done == "[DONE]"
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
        for key in choice["logprobs"] or ():
            assert [item for piece in pieces for item in piece["logprobs"][key]] == choice["logprobs"][key]


def test_the_pieces_of_a_chat_add_up_to_it(client: TestClient) -> None:
    body = TALK | {"n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT, json=body).json()
    streamed = events(client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    *chunks, usage, done = streamed
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
        content = [token for piece in pieces for token in (piece["logprobs"] or {"content": []})["content"]]
        assert content == choice["logprobs"]["content"]
        assert pieces[-1]["finish_reason"] == "length"


def test_an_error_before_the_first_piece_has_its_status(client: TestClient, service: EchoService) -> None:
    service.error = QueueFull("32 requests wait")
    response = client.post(COMPLETIONS, json=HELLO | {"stream": True})
    assert "32 requests" in refusal(response, 429, "queue_full")
    assert response.headers["retry-after"] == "1"


def test_an_error_after_the_first_piece_is_the_last_event(client: TestClient, service: EchoService) -> None:
    service.error_after = ExpertLost("expert math is gone")
    *_, last = events(client.post(COMPLETIONS, json=HELLO | {"stream": True}))
    assert last["error"]["code"] == "expert_lost"
    assert "math" in last["error"]["message"]
    service.error_after = RuntimeError("secret path")
    *_, last = events(client.post(COMPLETIONS, json=HELLO | {"stream": True}))
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in last["error"]["message"]


# Experts


def test_the_choice_of_experts_reaches_the_request(client: TestClient, service: EchoService) -> None:
    choices: list[Any] = [{"include": ["code"]}, {"exclude": ["code"]}, {"include": []}, {"exclude": []}, {}, None]
    for choice in choices:
        client.post(COMPLETIONS, json=HELLO | {"experts": choice})
    asked = [request.experts for request in service.requests]
    assert asked == [("public", "code"), ("public", "math"), ("public",), None, None, None]


NAME_SETS = st.lists(st.sampled_from(NAMES), max_size=4)


@given(include=st.none() | NAME_SETS, exclude=NAME_SETS, off=st.sets(st.sampled_from(NAMES[1:])))
def test_the_choice_is_what_is_asked_for_less_what_is_disabled(
    include: list[str] | None, exclude: list[str], off: set[str]
) -> None:
    choice = ExpertChoice(include=include) if include is not None else ExpertChoice(exclude=exclude)
    if off & set(include or ()) or (include is None and "public" in exclude):
        with pytest.raises(ApiError, match="experts"):
            choose_experts(choice, NAMES, off)
        return
    chosen = choose_experts(choice, NAMES, off)
    wanted = {"public", *include} if include is not None else set(NAMES) - set(exclude)
    assert set(NAMES if chosen is None else chosen) == wanted - off
    assert chosen is None or (chosen[0] == "public" and len(chosen) < 3)


def test_an_expert_is_withdrawn_and_given_back(service: EchoService) -> None:
    client = application(service, admin_keys=(key_digest("boss"),))
    boss = {"authorization": "Bearer boss"}
    assert client.post("/admin/experts/math/disable", headers=boss).json() == {"name": "math", "enabled": False}
    client.post(COMPLETIONS, json=HELLO)
    assert service.requests[-1].experts == ("public", "code")
    asked = client.post(COMPLETIONS, json=HELLO | {"experts": {"include": ["math"]}})
    assert "math is disabled" in refusal(asked, 400, "expert_disabled")
    states = {expert["name"]: expert["state"] for expert in client.get("/experts").json()["data"]}
    assert states == {"public": "enabled", "math": "disabled", "code": "enabled"}
    client.post("/admin/experts/math/enable", headers=boss)
    client.post(COMPLETIONS, json=HELLO)
    assert service.requests[-1].experts is None
    assert "did you mean math" in refusal(client.post("/admin/experts/mth/disable", headers=boss), 404)
    assert "public expert" in refusal(client.post("/admin/experts/public/disable", headers=boss), 400)


def test_lost_experts_are_seen(client: TestClient, service: EchoService) -> None:
    service.lost = ("math",)
    response = client.post(COMPLETIONS, json=HELLO)
    assert response.headers["x-flexmore-experts-lost"] == "math"
    assert response.json()["usage"]["experts_lost"] == ["math"]
    assert ": experts lost: math\n\n" in client.post(COMPLETIONS, json=HELLO | {"stream": True}).text
    cards = client.get("/experts").json()["data"]
    assert [(card["name"], card["state"], card["share"]) for card in cards] == [
        *(("public", "enabled", 0.5), ("math", "lost", 0.5), ("code", "enabled", 0.0))
    ]
    assert cards[2]["rank"]["down_proj"] == 8
    assert cards[2]["placement"] == "own"
    assert cards[2]["parameters"] == 10


# Keys


def test_keys_are_asked_for(service: EchoService) -> None:
    client = application(service, api_keys=(key_digest("one"), key_digest("zwölf")), admin_keys=(key_digest("boss"),))
    wrong: list[dict[str, Any]] = [{}, {"authorization": "Bearer two"}, {"authorization": "Basic one"}]
    for headers in [*wrong, {"authorization": b"Bearer \xff\xfe"}, {"authorization": "Bearer"}]:
        for path in ("/v1/models", "/experts", "/status", "/metrics", "/tokenizer_info", "/nowhere"):
            response = client.get(path, headers=headers)
            refusal(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ready", "/openapi.json"):
        assert client.get(path).status_code == 200
    for key in ("one", "zwölf", "boss"):
        assert client.get("/v1/models", headers={b"authorization": f"bearer {key}".encode()}).status_code == 200
    disable = "/admin/experts/math/disable"
    refusal(client.post(disable, headers={"authorization": "Bearer one"}), 403, "not_an_admin_key")
    refusal(client.post(disable), 401)
    assert service.off == set()


def test_without_an_admin_key_the_admin_endpoints_are_closed(client: TestClient) -> None:
    assert "admin_key_file" in refusal(client.post("/admin/experts/math/disable"), 403, "no_admin_key")


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="max_model_len"):
        HttpSettings(model="m", max_model_len=0)
    with pytest.raises(UsageError, match="digests"):
        HttpSettings(model="m", max_model_len=1, api_keys=("plain",))


# What else there is


def test_models(client: TestClient) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert card == client.get("/v1/models/nano").json()
    assert (card["id"], card["ranks"]["math"], card["parameters"]["full"]) == ("nano", 8, 3000)
    for path in ("/v1/models/other", "/v1/models/a/b", "/v1/models/%ff", "/v1/models/%ED%A0%80"):
        refusal(client.get(path), 404, "model_not_found")
    assert "nano" in refusal(client.post(COMPLETIONS, json=HELLO | {"model": "x"}), 404, "model_not_found")


def test_tokenize_and_back(client: TestClient) -> None:
    found = client.post("/tokenize", json={"prompt": "a<eos>", "add_special_tokens": False}).json()
    assert found == {"tokens": [*nano()("a")["input_ids"], nano().eos_token_id], "count": 2, "max_model_len": 512}
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "a<eos>"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    turns = client.post("/tokenize", json={"messages": TALK["messages"]}).json()["tokens"]
    assert nano().decode(turns) == "user: hi\nassistant:"
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["chat_template"]) == ("<eos>", None, None)


def test_probes_page_and_metrics(client: TestClient, service: EchoService) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    service.is_ready = False
    refusal(client.get("/ready"), 503, "unavailable")
    service.error = Unavailable("no replica")
    refusal(client.get("/ready"), 503, "unavailable")
    metrics = client.get("/metrics")
    assert metrics.text == "flexmore_requests_total 1\n"
    assert metrics.headers["content-type"].startswith("text/plain")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    status = client.get("/status").json()
    assert status["model"]["id"] == "nano"
    assert status["queue"] == 0
    assert len(status["experts"]) == 3


def test_the_page_runs_its_own_scripts_alone() -> None:
    policy = page_policy(b'<script>1</script><script type="module">2</script>')
    assert policy.count("sha256-") == 2
    assert "script-src 'sha256-" in policy
    assert "script-src 'none'" in page_policy(b"<p>")


def test_nothing_is_served_to_other_sites(client: TestClient) -> None:
    response = client.options(COMPLETIONS, headers={"origin": "http://x", "access-control-request-method": "POST"})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    plain = client.post(COMPLETIONS, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    refusal(plain, 415, "unsupported_media_type")


# Errors


def test_errors_of_the_service_have_their_status(client: TestClient, service: EchoService) -> None:
    cases: list[tuple[Exception, int, str]] = [
        (QueueFull("full"), 429, "queue_full"),
        (ExpertLost("math is gone"), 503, "expert_lost"),
        (Unavailable("none up"), 503, "unavailable"),
        (TimeoutError(), 504, "request_timeout"),
        (RuntimeError("/secret/path"), 500, "internal_error"),
    ]
    for error, status, code in cases:
        service.error = error
        assert "secret" not in refusal(client.post(COMPLETIONS, json=HELLO), status, code)
        assert "secret" not in refusal(client.post(CHAT, json=TALK | {"stream": True}), status, code)


def test_a_request_has_a_time_limit(service: EchoService) -> None:
    service.seconds = 30
    client = application(service, request_timeout_s=0.1)
    refusal(client.post(COMPLETIONS, json=HELLO), 504, "request_timeout")
    refusal(client.post(COMPLETIONS, json=HELLO | {"stream": True}), 504, "request_timeout")
    assert len(service.cancelled) == 2


def test_long_prompts_are_refused_with_both_numbers(client: TestClient, service: EchoService) -> None:
    assert client.post(COMPLETIONS, json=HELLO | {"prompt": "a" * 500, "max_tokens": 12}).status_code == 200
    message = refusal(client.post(COMPLETIONS, json=HELLO | {"prompt": "a" * 500, "max_tokens": 13}), 400)
    assert "512" in message
    assert "500" in message
    assert "13" in message
    refusal(client.post(COMPLETIONS, json=HELLO | {"prompt": ["a", "a" * 600]}), 400, "context_length_exceeded")
    refusal(client.post(COMPLETIONS, json=HELLO | {"max_tokens": 10**15}), 400, "context_length_exceeded")
    refusal(client.post(COMPLETIONS, json=HELLO | {"max_tokens": 10**400}), 400, "invalid_value")
    huge = refusal(client.post(COMPLETIONS, json=HELLO | {"prompt": "a" * 100_000}), 400, "context_length_exceeded")
    assert "100000" in huge  # without turning it into tokens
    long = [{"role": "user", "content": "a" * 600}]
    refusal(client.post(CHAT, json={"model": "nano", "messages": long}), 400, "context_length_exceeded")
    assert len(service.requests) == 1


def test_unknown_places_and_methods(client: TestClient) -> None:
    refusal(client.get("/v1/nothing"), 404, "unknown_url")
    response = client.get(COMPLETIONS)
    refusal(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    refusal(client.get("/docs"), 404)


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", [], "prompt"),
    ("prompt", "", "prompt"),
    ("prompt", [[]], "prompt[0]"),
    ("prompt", ["a", ""], "prompt[1]"),
    ("prompt", ["a", 1], "prompt[1]"),
    ("prompt", [1, "a"], "prompt[1]"),
    ("prompt", [1, True], "prompt[1]"),
    ("prompt", [1, 2.5], "prompt[1]"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [99], "prompt[0]"),
    ("prompt", [[1], [2**70]], "prompt[1][0]"),
    ("prompt", [[1], "a"], "prompt[1]"),
    ("prompt", {"a": 1}, "prompt"),
    ("prompt", 7, "prompt"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("temperature", 2.1, "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "hot", "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("n", 0, "n"),
    ("n", 129, "n"),
    ("n", 10**18, "n"),
    ("seed", 2**63, "seed"),
    ("seed", 1.5, "seed"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", ["a"] * 100_000, "stop"),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a" * 2000], "stop[0]"),
    ("stop", 5, "stop"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("echo", 1, "echo"),
    ("logprobs", 21, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("best_of", 2, "best_of"),
    ("suffix", "x", "suffix"),
    ("logit_bias", {"5": 1}, "logit_bias"),
    ("frequency_penalty", 0.5, "frequency_penalty"),
    ("presence_penalty", False, "presence_penalty"),
    ("tools", [], "tools"),
    ("min_p", 0.1, "min_p"),
    ("x" * 10_000, 1, "x" * 40),
    ("experts", {"include": ["maths"]}, "experts.include"),
    ("experts", {"exclude": ["public"]}, "experts.exclude"),
    ("experts", {"include": [], "exclude": []}, "experts"),
    ("experts", {"include": "math"}, "experts.include"),
    ("experts", {"only": ["math"]}, "experts.only"),
    ("experts", ["math"], "experts"),
    ("model", None, "model"),
    ("model", 3, "model"),
]


@pytest.mark.parametrize(("field", "value", "param"), BAD_FIELDS, ids=itertools.count())
def test_a_bad_field_is_named(field: str, value: Any, param: str) -> None:
    client = bad_field_client()
    response = client.post(COMPLETIONS, json=HELLO | {field: value})
    message = refusal(response, 400)
    assert message.startswith(f"{param}: ")
    assert response.json()["error"]["param"] == param


@functools.cache
def bad_field_client() -> TestClient:
    return application(EchoService(nano()))


def test_a_bad_chat_field_is_named(client: TestClient) -> None:
    def turn(**fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"} | fields]}

    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "user"}] * 50_000}, "messages[0].content"),
        ({"messages": TALK["messages"] * 10_001}, "messages"),
        (turn(role="tool"), "messages[1].role"),
        (turn(content=None), "messages[1].content"),
        (turn(content=[{"type": "image_url", "image_url": {}}]), "messages[1].content[0]"),
        (turn(tool_calls=[{}]), "messages[1].tool_calls"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_k": 5}, "top_k"),
    ]
    for change, param in cases:
        response = client.post(CHAT, json=TALK | change)
        assert refusal(response, 400).startswith(f"{param}: ")
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "frequency_penalty": 0.0}
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "suffix": None}
    assert client.post(CHAT, json=TALK | neutral | {k: v for k, v in ignored.items() if v}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"hello"',
        b"{",
        b"\xff\xfe",
        b'{"model": "nano", "prompt": "\xff"}',
        b'{"model": "nano", "prompt": "\xed\xa0\x80"}',
        b'{"model": "nano", "prompt": "\\ud800"}',
        b'{"model": "nano", "prompt": "\\udc00\\ud800"}',
        b'{"model": "nano", "prompt": "a", "temperature": NaN}',
        b'{"model": "nano", "prompt": "a", "top_p": Infinity}',
        b'{"model": "nano", "prompt": "a", "temperature": 1e999}',
        b'{"model": "nano", "prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"model": "nano", "prompt": [' + b"9" * 4000 + b"]}",
        b'{"model": "nano", "prompt": "a", "seed": -1e400}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"model": "nano", "prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"model": "nano", "prompt": "a", "stop": ' + b"[" * 1_000_000,
        b'{"model": "nano", "prompt": "a\x00"}',
        b'{"model": "nano", "prompt": "a"} {}',
        b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"}",
    ],
    ids=itertools.count(),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_hostile_bodies_are_refused(path: str, raw: bytes) -> None:
    response = bad_field_client().post(path, content=raw, headers={"content-type": "application/json"})
    refusal(response, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KNOWN_FIELDS = ["prompt", "messages", "tokens", "stop", "experts", "n", "seed", "max_tokens", "temperature", "top_p"]
KNOWN_FIELDS += ["logprobs", "top_logprobs", "stream", "stream_options", "echo", "user", "model", "logit_bias"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.sampled_from([HELLO, TALK, {"prompt": "a"}, {"tokens": [1]}]),
    changes=st.dictionaries(st.sampled_from(KNOWN_FIELDS), JSON, max_size=3),
    path=st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]),
)
def test_no_body_breaks_the_service(start: dict[str, Any], changes: dict[str, Any], path: str) -> None:
    raw = json.dumps(start | changes)  # with NaN, Infinity and lone surrogates
    response = bad_field_client().post(path, content=raw, headers={"content-type": "application/json"})
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        refusal(response, response.status_code)


# Over a real connection


def test_bodies_have_room_together() -> None:
    """Of 65 at once that are as large as they may be, one is told to come again; later there is room again."""
    release, statuses = asyncio.Event(), list[int]()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        assert len((await receive())["body"]) == 1000
        await release.wait()
        statuses.append(200)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 1000}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def run() -> None:
        gate = Gate(wait, Keys((), ()), 1000, 10.0)
        scope = {"type": "http", "path": COMPLETIONS, "headers": []}
        calls = [asyncio.create_task(gate(scope, receive, send)) for _ in range(65)]
        await asyncio.sleep(0.01)
        assert statuses == [429]
        release.set()
        await asyncio.gather(*calls, gate(scope, receive, send))
        assert statuses == [429] + [200] * 65

    asyncio.run(run())


@contextlib.contextmanager
def connection() -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", PORT), timeout=10) as sock:
        yield sock


def post(path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def everything(sock: socket.socket) -> bytes:
    received = b""
    while piece := sock.recv(2**16):
        received += piece
    return received


def wait_for(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


def test_large_bodies_are_refused_with_and_without_a_length(served: EchoService) -> None:
    with connection() as sock:
        sock.sendall(post(COMPLETIONS, f"Content-Length: {10**12}"))
        assert sock.recv(2**16).startswith(b"HTTP/1.1 413")
    piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with connection() as sock:
        sock.sendall(post(COMPLETIONS, "Transfer-Encoding: chunked") + piece * 3 + b"0\r\n\r\n")
        assert everything(sock).startswith(b"HTTP/1.1 413")
    with connection() as sock, contextlib.suppress(ConnectionError):  # one that never ends
        sock.sendall(post(COMPLETIONS, "Transfer-Encoding: chunked"))
        for _ in range(1000):
            sock.sendall(piece)
        pytest.fail("the service went on reading")


def test_slow_senders_are_cut_off(served: EchoService) -> None:
    start = time.monotonic()
    with connection() as sock:
        sock.sendall(post(COMPLETIONS, "Content-Length: 100") + b"{")
        received = everything(sock)
    assert received.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in received
    assert time.monotonic() - start < 5


def test_half_closed_and_broken_connections(served: EchoService) -> None:
    with connection() as sock:  # closed in the middle of the body
        sock.sendall(post(COMPLETIONS, "Content-Length: 100") + b"{")
    with connection() as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 400")
    with connection() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        received = everything(sock)
        assert received == b"" or received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request(served: EchoService, stream: bool) -> None:
    served.seconds, asked, cancelled = 20.0, len(served.requests), len(served.cancelled)
    raw = json.dumps(HELLO | {"stream": stream}).encode()
    try:
        with connection() as sock:
            sock.sendall(post(COMPLETIONS, f"Content-Length: {len(raw)}") + raw)
            wait_for(lambda: len(served.requests) > asked)
        wait_for(lambda: len(served.cancelled) > cancelled)
    finally:
        served.seconds = 0.0


def test_a_client_that_goes_away_within_a_stream_cancels_its_request(served: EchoService) -> None:
    raw = json.dumps(HELLO | {"stream": True, "max_tokens": 400}).encode()
    served.seconds, cancelled = 0.5, len(served.cancelled)
    try:
        with connection() as sock:
            sock.sendall(post(COMPLETIONS, f"Content-Length: {len(raw)}") + raw)
            assert b"data: " in sock.recv(2**16) + sock.recv(2**16)
        wait_for(lambda: len(served.cancelled) > cancelled)
        assert served.cancelled[-1] == served.requests[-1].id
    finally:
        served.seconds = 0.0


def test_openais_client(served: EchoService) -> None:
    client: Any = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "nano"
    assert client.models.retrieve("nano").ranks["math"] == 8
    answer = client.completions.create(model="nano", prompt=["hello", "ab"], max_tokens=4, logprobs=2)
    assert [choice.text for choice in answer.choices] == ["hell", "abab"]
    assert answer.choices[0].logprobs.tokens == list("hell")
    assert answer.usage.experts["math"] > 0
    chunks = list(client.completions.create(model="nano", prompt="hello", max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hell"

    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = functools.partial(client.chat.completions.create, model="nano", messages=turns, max_completion_tokens=6)
    answer = chat(logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "system"
    assert len(answer.choices[0].logprobs.content) == 6
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "system"
    assert chunks[-1].usage.completion_tokens == 6
    only = chat(extra_body={"experts": {"exclude": ["math"]}})
    assert set(only.usage.experts) == {"public", "code"}

    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="nano", prompt="a", temperature=3)
    with pytest.raises(openai.NotFoundError, match="nano"):
        client.completions.create(model="other", prompt="a")
    try:
        served.error = QueueFull("full")
        with pytest.raises(openai.RateLimitError):
            chat()
        served.error, served.error_after = None, ExpertLost("math is gone")
        with pytest.raises(openai.APIError, match="math is gone"):
            list(chat(stream=True))
    finally:
        served.error = served.error_after = None


@pytest.mark.parametrize("tokenized", [True, False])
@pytest.mark.parametrize("concurrent", [1, 3])
def test_lm_evals_client(served: EchoService, tokenized: bool, concurrent: int) -> None:
    model = LocalCompletionsAPI(
        base_url=BASE + COMPLETIONS,
        model="nano",
        max_length=512,
        num_concurrent=concurrent,
        batch_size=2,
        tokenized_requests=tokenized,
        max_retries=1,
    )
    assert model.tokenizer_backend == "remote"
    assert model.eot_token_id == nano().eos_token_id

    pairs = [("2+2=", "4"), ("b", "dfh"), ("x", "aceg"), ("hello wor", "ld")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (_, continuation), (logprob, greedy) in zip(pairs, model.loglikelihood(asked), strict=True):
        found = [served.logprob(i, 1) for i in nano()(continuation)["input_ids"]]
        assert logprob == sum(entry.logprob or 0 for entry in found)
        assert greedy == all(entry.logprob == entry.top[0][1] for entry in found)

    options = {"until": ["z", "\n\n", "Q:", "A:", "</s>"], "max_gen_toks": 7, "do_sample": False}
    asked = [Instance("generate_until", {}, (context, dict(options)), i) for i, context in enumerate(["abz", "hello"])]
    assert model.generate_until(asked) == ["ab", "hellohe"]
    assert served.requests[-1].temperature == 0
    assert served.requests[-1].seed == 1234


# The description


DESCRIPTION = schemathesis.openapi.from_asgi(
    "/openapi.json", create_app(EchoService(nano()), HttpSettings(model="nano", max_model_len=256))
)
NOT_IN_THE_SCHEMA = {"context_length_exceeded", "expert_not_found", "too_many_sequences"}


@DESCRIPTION.parametrize()
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_the_description_is_true(case: schemathesis.Case) -> None:
    response = case.call()
    beyond = response.status_code == 400 and response.json()["error"]["code"] in NOT_IN_THE_SCHEMA
    case.validate_response(response, excluded_checks=[positive_data_acceptance] if beyond else [])


def test_the_description_asks_for_keys_where_they_are_needed(service: EchoService) -> None:
    plain = application(service).get("/openapi.json").json()
    assert not any("security" in operation for path in plain["paths"].values() for operation in path.values())
    keyed = application(service, api_keys=(key_digest("k"),)).get("/openapi.json").json()
    assert keyed["paths"]["/experts"]["get"]["security"]
    assert "security" not in keyed["paths"]["/health"]["get"]
    assert "401" in keyed["paths"][COMPLETIONS]["post"]["responses"]


def test_an_answer_that_would_be_too_large_is_refused(client: Any) -> None:
    body = {"model": "nano", "prompt": [[5] * 400] * 8, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_logprobs"


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_balancers_may_ask_without_a_body(client: Any, path: str) -> None:
    assert client.head(path).status_code == 200
