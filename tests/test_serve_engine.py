"""The engine against transformers' own generate, and against mixtures built without the excluded experts."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexmore_ray import load_mixture
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.mixture import Mixture
from flexmore_ray.spec import MixtureSpec
from serve.attention import Segments, varlen_attention
from serve.engine import Engine, Limits
from serve.request import Delta, ExpertLost, QueueFull, Request, Usage
from serve.sampling import choose
from serve.text import TextStream

RANKS = {"math": 16, "code": 32, "news": 8, "academic": "full", "creative": "drop", "reddit": 16}
SPEC = MixtureSpec(source=("zoo://nano",), ranks=RANKS, active=4)
DOMAINS = ("math", "code", "news", "academic", "reddit")
TEXTS = ("Question: 2+3=\nAnswer:", "fact: the capital of Zevog:", "12+7=", "def f(x):\n", "the lamp in the harbour")
ids = itertools.count()


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return load_mixture(SPEC)


@pytest.fixture(scope="module")
def engine(mixture: Mixture) -> Iterator[Engine]:
    engine = Engine(load_mixture(SPEC), Limits(batch_tokens=96))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def without(mixture: Mixture) -> Callable[[frozenset[str]], Mixture]:
    """The mixture as it would be had these experts never been merged."""
    built: dict[frozenset[str], Mixture] = {}

    def build(experts: frozenset[str]) -> Mixture:
        if experts not in built:
            kept = 6 - len(experts)
            spec = dataclasses.replace(SPEC, ranks={**RANKS, **dict.fromkeys(experts, "drop")}, active=min(4, kept))
            built[experts] = load_mixture(spec)
        return built[experts]

    return build


def encode(mixture: Mixture, text: str) -> tuple[int, ...]:
    return tuple(mixture.tokenizer(text).input_ids)


def request(mixture: Mixture, text: str, **settings: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 24} | settings
    return Request(id=str(next(ids)), prompts=(encode(mixture, text),), **settings)


def greedy(mixture: Mixture, text: str, max_tokens: int = 24) -> str:
    """What transformers generates, without the end-of-text token."""
    prompt = torch.tensor([encode(mixture, text)])
    out = mixture.model.generate(prompt, max_new_tokens=max_tokens, do_sample=False)
    return str(mixture.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))


def ask(engine: Engine, *requests: Request) -> list[tuple[list[Delta], Usage]]:
    async def all_at_once() -> list[tuple[list[Delta], Usage]]:
        return await asyncio.gather(*map(engine.generate, requests))

    return run(all_at_once())


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, timeout=60)

    return asyncio.run(bounded())


async def pieces(engine: Engine, request: Request) -> tuple[list[Delta], Usage]:
    items = [item async for item in engine.stream(request)]
    assert isinstance(items[-1], Usage)
    assert all(isinstance(item, list) for item in items[:-1])
    return [delta for item in items[:-1] for delta in item], items[-1]


# ---- the same as generate


def test_greedy_equals_generate(engine: Engine, mixture: Mixture) -> None:
    answers = ask(engine, *(request(mixture, text) for text in TEXTS))
    assert [deltas[0].text for deltas, _ in answers] == [greedy(mixture, text) for text in TEXTS]


def test_a_prompt_longer_than_a_step_is_read_in_parts(engine: Engine, mixture: Mixture) -> None:
    text = TEXTS[4] * 12
    assert len(encode(mixture, text)) > 2 * engine.limits.batch_tokens
    [(deltas, _)] = ask(engine, request(mixture, text, logprobs=1))
    assert deltas[0].text == greedy(mixture, text)


def test_several_prompts_and_copies_in_one_request(engine: Engine, mixture: Mixture) -> None:
    prompts = tuple(encode(mixture, text) for text in TEXTS)
    [(deltas, usage)] = ask(engine, Request(id="many", prompts=prompts, n=2, temperature=0.0, max_tokens=9))
    assert [delta.sequence for delta in deltas] == list(range(10))
    assert [delta.text for delta in deltas] == [greedy(mixture, text, 9) for text in TEXTS for _ in range(2)]
    assert usage.prompt_tokens == sum(map(len, prompts))
    assert usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)


def test_logprobs_equal_a_plain_forward(engine: Engine, mixture: Mixture) -> None:
    text = TEXTS[1] * 5  # longer than a step: the prompt is read in parts
    [(deltas, _)] = ask(engine, request(mixture, text, logprobs=3, prompt_logprobs=2, max_tokens=5))
    prompt, generated = encode(mixture, text), deltas[0].token_ids
    assert len(prompt) > engine.limits.batch_tokens
    with torch.no_grad():
        logits = mixture.model(torch.tensor([[*prompt, *generated]])).logits[0]
    expected = logits.log_softmax(-1)
    assert [score.token_id for score in deltas[0].prompt_logprobs] == list(prompt)
    assert deltas[0].prompt_logprobs[0].logprob is None
    for place, score in enumerate(deltas[0].prompt_logprobs[1:]):
        assert score.logprob == pytest.approx(expected[place, prompt[place + 1]].item(), abs=1e-4)
        assert len(score.top) == 2
    for place, score in enumerate(deltas[0].logprobs):
        row = expected[len(prompt) - 1 + place]
        assert score.logprob == pytest.approx(row[generated[place]].item(), abs=1e-4)
        assert score.logprob == score.top[0][1], "the greedy token's own value and the highest are one number"
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


def test_scoring_alone_generates_nothing(engine: Engine, mixture: Mixture) -> None:
    [(deltas, usage)] = ask(engine, request(mixture, TEXTS[0], max_tokens=0, prompt_logprobs=0))
    assert (deltas[0].text, deltas[0].token_ids, deltas[0].finish_reason) == ("", [], "length")
    assert len(deltas[0].prompt_logprobs) == len(encode(mixture, TEXTS[0]))
    assert usage.completion_tokens == 0


# ---- experts by request


def test_usage_says_who_worked(engine: Engine, mixture: Mixture) -> None:
    everyone, some = request(mixture, TEXTS[0]), request(mixture, TEXTS[0], experts=("public", "math"))
    [(_, usage), (_, restricted)] = ask(engine, everyone, some)
    assert sum(usage.experts.values()) == pytest.approx(1)
    assert set(restricted.experts) == {"public", "math"}
    assert sum(restricted.experts.values()) == pytest.approx(1)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mixed_requests_do_not_disturb_each_other(
    engine: Engine, mixture: Mixture, without: Callable[[frozenset[str]], Mixture], data: st.DataObject
) -> None:
    """Each of a random batch answers as the mixture without its excluded experts does, alone."""
    cases = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(TEXTS),
                st.frozensets(st.sampled_from(DOMAINS)),
                st.integers(1, 30),
                st.sampled_from([0.0, 0.8]),
                st.integers(0, 3),
            ),
            min_size=1,
            max_size=8,
        )
    )

    def asked(case: tuple[Any, ...]) -> Request:
        text, excluded, max_tokens, temperature, seed = case
        experts = tuple(name for name in engine.experts if name not in excluded)
        return request(
            mixture, text, max_tokens=max_tokens, temperature=temperature, seed=seed, experts=experts, top_p=0.9
        )

    together = ask(engine, *map(asked, cases))
    for case, (deltas, usage) in zip(cases, together, strict=True):
        text, excluded, max_tokens, temperature, _ = case
        assert not excluded & set(usage.experts)
        if temperature == 0:
            assert deltas[0].text == greedy(without(excluded), text, max_tokens)
        else:
            [(alone, _)] = ask(engine, asked(case))
            assert alone[0].text == deltas[0].text


def test_prefixes_are_shared_by_equal_experts_alone(mixture: Mixture) -> None:
    engine = Engine(load_mixture(SPEC))
    engine.start()
    text = TEXTS[1] * 3
    try:
        some = ("public", "math", "news")
        cached = [
            ask(engine, request(mixture, text, experts=experts))[0][1].cached_tokens
            for experts in (None, None, some, some, engine.experts)
        ]
    finally:
        engine.stop()
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] == cached[4] == (len(encode(mixture, text)) - 1) // 16 * 16


@pytest.mark.parametrize("experts", [("math",), ("public", "maths"), ()])
def test_the_public_expert_and_known_names_are_needed(
    engine: Engine, mixture: Mixture, experts: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=r"experts: public and any of"):
        ask(engine, request(mixture, "x", experts=experts))


# ---- text


@pytest.mark.parametrize("stop", [("Z",), ("capital", "xyz"), ("e c", "\n\n"), ("never there",)])
def test_stop_strings_cut_the_text(engine: Engine, mixture: Mixture, stop: tuple[str, ...]) -> None:
    plain = greedy(mixture, TEXTS[0], 40)
    places = [place for text in stop if (place := plain.find(text)) >= 0]
    expected = plain[: min(places)] if places else plain
    asked = {"stop": stop, "max_tokens": 40, "logprobs": 0}
    [(deltas, _)] = ask(engine, request(mixture, TEXTS[0], **asked))
    assert deltas[0].text == expected
    assert deltas[0].finish_reason == ("stop" if places else "length")
    streamed, _ = run(pieces(engine, request(mixture, TEXTS[0], **asked)))
    assert "".join(delta.text for delta in streamed) == expected
    assert [token for delta in streamed for token in delta.token_ids] == deltas[0].token_ids
    assert sum(len(delta.logprobs) for delta in streamed) == len(deltas[0].token_ids)
    assert len(deltas[0].token_ids) == len(expected), "one token a character here"
    assert [delta.finish_reason for delta in streamed if delta.finish_reason] == [deltas[0].finish_reason]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Byte-level, so that a character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox über die Brücke 日本語"] * 3, trainer)
    return tokenizer


@settings(max_examples=150)
@given(
    text=st.text(alphabet="abcü日 é🙂the", max_size=30),
    stop=st.lists(st.text(alphabet="abcü日 ", min_size=1, max_size=3), max_size=3),
    cut=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 4), min_size=1),
)
def test_streamed_text_is_the_decoded_text(
    byte_tokenizer: Tokenizer, text: str, stop: list[str], cut: int, sizes: list[int]
) -> None:
    """However tokens are pushed and taken, and wherever they end, even within a character."""
    token_ids = byte_tokenizer.encode(text).ids[:cut]
    stream, out, taken, at = TextStream(byte_tokenizer, stop), "", 0, 0
    for size in itertools.cycle(sizes):
        if at >= len(token_ids):
            break
        stream.push(token_ids[at : at + size])
        at += size
        piece, count = stream.take(last=False)
        out, taken = out + piece, taken + count
        assert not any(string in out for string in stop)
    piece, count = stream.take(last=True)
    whole = byte_tokenizer.decode(token_ids)
    places = [place for string in stop if (place := whole.find(string)) >= 0]
    assert out + piece == (whole[: min(places)] if places else whole)
    assert taken + count <= len(token_ids)
    assert places or taken + count == len(token_ids)


# ---- sampling


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    draws = 4000
    uniform = [(i + 0.5) / draws for i in range(draws)]
    tokens = choose(logits.expand(draws, -1), [0.5] * draws, [1.0] * draws, uniform)
    frequency = torch.bincount(tokens, minlength=4) / draws
    torch.testing.assert_close(frequency, (logits / 0.5).softmax(-1), atol=1e-3, rtol=0)


@given(st.floats(0.01, 1.0), st.floats(0, 1, exclude_max=True), st.integers(0, 10**6))
def test_top_p_keeps_the_fewest_tokens(top_p: float, uniform: float, seed: int) -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed)) * 3
    [token] = choose(logits, [1.0], [top_p], [uniform]).tolist()
    probabilities = logits[0].softmax(-1)
    before = probabilities[probabilities > probabilities[token]].sum().item()
    assert before < top_p + 1e-6


def test_copies_of_a_known_prompt(engine: Engine, mixture: Mixture) -> None:
    text = TEXTS[1] * 2
    for n in (1, 4):
        [(deltas, usage)] = ask(engine, request(mixture, text, n=n))
        assert {delta.text for delta in deltas} == {greedy(mixture, text)}
    assert 0 < usage.cached_tokens < usage.prompt_tokens == len(encode(mixture, text))


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"top_p": 1e-50}, {"temperature": 1e-40, "top_p": 1e-50}])
def test_extreme_settings_take_the_most_likely_token(
    engine: Engine, mixture: Mixture, extreme: dict[str, float]
) -> None:
    [(deltas, _)] = ask(engine, request(mixture, TEXTS[1], **({"temperature": 1.0} | extreme)))
    assert deltas[0].text == greedy(mixture, TEXTS[1])


def test_a_seed_repeats_and_copies_differ(engine: Engine, mixture: Mixture) -> None:
    settings = {"temperature": 1.0, "n": 3, "max_tokens": 20}
    first, again, other = (request(mixture, TEXTS[4], seed=seed, **settings) for seed in (7, 7, 8))
    texts = [[delta.text for delta in deltas] for deltas, _ in ask(engine, first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) > 1


# ---- limits, cancellation, failure


def test_a_cancelled_request_leaves_nothing_behind(engine: Engine, mixture: Mixture) -> None:
    async def cancel_one() -> str:
        stays = asyncio.create_task(engine.generate(request(mixture, TEXTS[1])))
        goes = asyncio.create_task(engine.generate(request(mixture, TEXTS[4], max_tokens=400, temperature=1.0)))
        stream = engine.stream(request(mixture, TEXTS[4], max_tokens=400, temperature=1.0))
        await anext(stream)
        goes.cancel()
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await goes
        deltas, _ = await stays
        for _ in range(100):
            if engine.stats()["running"] == 0:
                break
            await asyncio.sleep(0.05)
        return str(deltas[0].text)

    assert run(cancel_one()) == greedy(mixture, TEXTS[1])
    assert (engine.stats()["running"], engine.stats()["waiting"]) == (0, 0)


def test_a_full_queue_refuses(mixture: Mixture) -> None:
    engine = Engine(load_mixture(SPEC), Limits(sequences=2, queue=3))
    engine.start()
    try:
        answers = run(gather_errors(engine, [request(mixture, TEXTS[1]) for _ in range(9)]))
    finally:
        engine.stop()
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 4
    assert {answer[0][0].text for answer in answers if isinstance(answer, tuple)} == {greedy(mixture, TEXTS[1])}


async def gather_errors(engine: Engine, requests: list[Request]) -> list[Any]:
    return await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)


def test_a_cache_that_is_too_small_for_all_loses_nothing(mixture: Mixture) -> None:
    limits = Limits(cache_tokens=160, max_model_len=150, sequences=8, batch_tokens=64)
    engine = Engine(load_mixture(SPEC), limits)
    engine.start()
    texts = [text + "\n" for text in TEXTS] + list(TEXTS)
    try:
        asked = [request(mixture, text, max_tokens=100, prompt_logprobs=0) for text in texts]
        answers = ask(engine, *asked)
    finally:
        engine.stop()
    assert [deltas[0].text for deltas, _ in answers] == [greedy(mixture, text, 100) for text in texts]
    for text, (deltas, _) in zip(texts, answers, strict=True):
        assert [score.token_id for score in deltas[0].prompt_logprobs] == list(encode(mixture, text))


def test_a_prompt_that_is_too_long_is_refused(engine: Engine, mixture: Mixture) -> None:
    with pytest.raises(UsageError, match=r"500 tokens and max_tokens 24 are more than the 512"):
        ask(engine, Request(id="long", prompts=((5,) * 500,), max_tokens=24))


def test_limits_that_break_a_rule(mixture: Mixture) -> None:
    with pytest.raises(UsageError, match="max_model_len: 1 to 512"):
        Engine(mixture, Limits(max_model_len=513))
    with pytest.raises(UsageError, match=r"cache_tokens: at least max_model_len \(512\) is needed, got 100"):
        Engine(mixture, Limits(cache_tokens=100))


def test_a_model_that_fails_fails_the_requests_and_the_engine(mixture: Mixture) -> None:
    broken = load_mixture(SPEC)
    engine = Engine(broken)
    engine.start()
    calls = itertools.count()
    forward = broken.model.model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    broken.model.model.forward = fail
    answers = run(gather_errors(engine, [request(mixture, text) for text in TEXTS[:3]]))
    assert [str(answer) for answer in answers] == ["the engine failed: out of memory"] * 3
    assert not engine.is_alive
    with pytest.raises(FlexmoreError, match="engine has stopped"):
        ask(engine, request(mixture, "x"))
    engine.stop()


# ---- experts that compute elsewhere


class FakeLink:
    """An expert "elsewhere" that is lost and comes back when told."""

    def __init__(self, mixture: Mixture, name: str) -> None:
        place = list(mixture.assignment.ranks).index(name)
        self.layers = [layer.mlp.experts[place] for layer in mixture.model.model.layers]
        self.available, self.lose_at, self.calls, self.abandoned = True, -1, 0, 0
        self.answer: torch.Tensor | None = None

    def send(self, layer: int, x: torch.Tensor) -> None:
        assert self.answer is None, "one call at a time"
        gate, up, down = (self.layers[layer].dense(name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.answer = ((torch.nn.functional.silu(x @ gate.T)) * (x @ up.T)) @ down.T

    def receive(self) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.lose_at:
            self.available = False
            raise ExpertLost("gone")
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def abandon(self) -> None:
        self.answer = None
        self.abandoned += 1


def with_link(mixture: Mixture, **options: Any) -> tuple[Engine, FakeLink]:
    link = FakeLink(mixture, "academic")
    engine = Engine(load_mixture(SPEC, remote={"academic": link}), remote={"academic": link}, **options)
    engine.start()
    return engine, link


def test_an_expert_elsewhere_changes_nothing(mixture: Mixture) -> None:
    engine, link = with_link(mixture)
    try:
        answers = ask(engine, *(request(mixture, text) for text in TEXTS))
    finally:
        engine.stop()
    assert [deltas[0].text for deltas, _ in answers] == [greedy(mixture, text) for text in TEXTS]
    assert link.calls > 0


def test_a_lost_expert_is_done_without_and_comes_back(
    mixture: Mixture, without: Callable[[frozenset[str]], Mixture]
) -> None:
    engine, link = with_link(mixture)
    text = TEXTS[1] * 3
    try:
        link.lose_at = 2  # in the middle of the first step
        [(deltas, usage)] = ask(engine, request(mixture, text))
        assert deltas[0].text == greedy(without(frozenset({"academic"})), text)
        assert usage.lost == ("academic",)
        assert (link.abandoned, engine.stats()["lost"]) == (1, ["academic"])
        link.available = True
        [(deltas, usage)] = ask(engine, request(mixture, text))
        assert deltas[0].text == greedy(mixture, text)
        assert usage.lost == ()
        assert usage.cached_tokens == 0, "keys and values made without the expert are not those with it"
    finally:
        engine.stop()


def test_a_lost_expert_is_refused_where_it_is_needed(mixture: Mixture) -> None:
    engine, link = with_link(mixture, on_lost="refuse")
    text = TEXTS[1]
    try:
        link.lose_at = 2
        others = ("public", "math", "news")
        answers = run(gather_errors(engine, [request(mixture, text), request(mixture, text, experts=others)]))
        assert isinstance(answers[0], ExpertLost)
        assert link.calls == 2, "it is told at once, not after all of its tokens"
        assert isinstance(answers[1], tuple)
        with pytest.raises(ExpertLost, match="expert academic is not available"):
            ask(engine, request(mixture, text))
        link.available = True
        ask(engine, request(mixture, text))
    finally:
        engine.stop()


# ---- attention


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    seed=st.integers(0, 999),
)
def test_each_sequence_attends_to_itself_alone(
    shapes: list[tuple[int, int]], heads: tuple[int, int], seed: int
) -> None:
    """Queries and keys before them, sequence by sequence, against a plain causal product of each alone."""
    torch.manual_seed(seed)
    query_heads, key_heads = heads
    lengths = [new + old for new, old in shapes]
    cache_places = torch.randperm(sum(lengths) + 3)[: sum(lengths)].split(lengths)
    keys, values = torch.randn(2, sum(lengths) + 3, key_heads, 8)
    writes = torch.cat([places[old:] for places, (_, old) in zip(cache_places, shapes, strict=True)])
    expected_keys, expected_values = keys.clone(), values.clone()
    new_keys, new_values = keys[writes].clone(), values[writes].clone()
    keys[writes] = values[writes] = torch.nan  # to be written by the step
    query = torch.randn(len(writes), query_heads, 8)
    has_past = any(old for _, old in shapes)
    read = torch.cat(cache_places) if has_past else torch.empty(0, dtype=torch.long)
    segments = Segments.of([new for new, _ in shapes], lengths, read)

    class Allocator:
        index = 0
        _kv_token_views = [(keys, values)]

    class Cache:
        layer_to_allocator = [Allocator()]

    class Layer(torch.nn.Module):
        layer_idx = 0

    states = (x.transpose(0, 1).unsqueeze(0) for x in (query, new_keys, new_values))
    out, _ = varlen_attention(Layer(), *states, None, 0.3, cache=Cache(), segments=segments, write_index=[writes])
    start = 0
    for places, (new, old) in zip(cache_places, shapes, strict=True):
        q = query[start : start + new].transpose(0, 1)
        k, v = (
            x[places].repeat_interleave(query_heads // key_heads, 1).transpose(0, 1)
            for x in (expected_keys, expected_values)
        )
        scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(~torch.ones(new, new + old).tril(old).bool(), -torch.inf)
        torch.testing.assert_close(
            out[0, start : start + new].transpose(0, 1), scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5
        )
        start += new
