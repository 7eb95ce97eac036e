"""`MixtureLM` against lm-eval's own `HFLM` on random models, and what it promises beyond equal scores."""

from __future__ import annotations

import random
import string

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from flexmore_ray.errors import TaskError
from flexmore_ray.harness import MixtureLM, _find_clusters
from flexmore_ray.scores import load_tasks

MAX_LENGTH = 96
VOCABULARY = 280


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def char_tokenizer(*, begin: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<bos>": 3}
    vocabulary |= {char: i + 4 for i, char in enumerate(string.printable)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if begin:
        special["bos_token"] = "<bos>"
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across the border of context and continuation, and has no padding token."""
    merges = ["t h", "th e", "a n", "a b", "Ġ a", "the m", "Ġ t", "b c", "n d", "Ġa n", "d g"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<eos>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"char": char_tokenizer, "char-bos": lambda: char_tokenizer(begin=True), "bpe": bpe_tokenizer}

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


def flex_olmo(attention: str = "sdpa", **changes) -> FlexOlmoForCausalLM:
    torch.manual_seed(0)
    config = FlexOlmoConfig(**(SIZES | {"num_experts": 5, "num_experts_per_tok": 2} | changes))
    config._attn_implementation = attention
    return FlexOlmoForCausalLM(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral_with_window() -> MistralForCausalLM:
    torch.manual_seed(2)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_LENGTH,
        eos_token_id=1, bos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "flex_olmo": flex_olmo,
    "flex_olmo-eager": lambda: flex_olmo("eager"),
    "llama": llama,
    "mistral-window": mistral_with_window,
    "gpt2": gpt2,
}


def words(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefgh thn\n") for _ in range(length)).strip() or "a"


def ask(method: str, *arguments, document: tuple[str, int] | None = None, index: int = 0) -> Instance:
    metadata = (None, None, 1) if document is None else (*document, 1)
    return Instance(method, {}, arguments, index, metadata=metadata)


def choice_requests(seed: int = 0, documents: int = 24) -> list[Instance]:
    """Questions of two tasks: few-shot prompt or none, one or many tokens a choice, several contexts."""
    rng = random.Random(seed)
    prompts = {"zero-shot": "", "few-shot": words(rng, 60) + "\n\n"}
    requests = []
    for number in range(documents):
        task = rng.choice(list(prompts))
        context = prompts[task] + words(rng, rng.randint(1, 30))
        ends = [rng.choice(["", " ", "\n "]) for _ in range(4)] if number % 3 == 0 else [""] * 4
        for index, end in enumerate(ends):
            text = rng.choice([" ", ""]) + words(rng, rng.choice([1, 1, 4, 9]))
            requests.append(ask("loglikelihood", context + end, text, document=(task, number), index=index))
    return requests


def odd_requests() -> list[Instance]:
    rng = random.Random(5)
    pairs = [
        ("", "abc"),
        ("", "<eos>abc"),
        ("<eos>the", " theme"),
        ("<bos>the", " theme"),
        ("a b \n ", "th"),
        ("the", "me"),
        ("größe 日本", " é本"),
        (words(rng, 400), words(rng, 5)),
        (words(rng, 400), words(rng, MAX_LENGTH // 4)),
        ("abc", words(rng, MAX_LENGTH - 12)),
    ]
    same = words(rng, 300)
    pairs += [(same, " a"), (same, " bcd"), (same, " a")]
    pairs += [(context, letter) for context in ("the", "ant", "a band", "q") for letter in string.printable]
    return [ask("loglikelihood", *pair) for pair in pairs]


def has_tokens(tokenizer, context: str, continuation: str) -> bool:
    """Whether a continuation keeps a token of its own; lm-eval cannot score one that merges into the context."""
    head = context.rstrip()
    return context == "" or len(tokenizer.encode(context + continuation)) > len(tokenizer.encode(head))


def assert_same(ours: list, theirs: list) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in ours]), torch.tensor([value for value, _ in theirs]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        *[("flex_olmo", "char"), ("flex_olmo", "char-bos"), ("flex_olmo", "bpe"), ("llama", "bpe")],
        *[("flex_olmo-eager", "char"), ("mistral-window", "char"), ("gpt2", "char-bos")],
    ],
)
def test_loglikelihood_equals_hflm(model, tokenizer):
    model, tokenizer = MODELS[model](), TOKENIZERS[tokenizer]()
    requests = [r for r in choice_requests() + odd_requests() if has_tokens(tokenizer, *r.args)]
    requests += requests[::7]
    ours = MixtureLM(model, tokenizer).loglikelihood(requests)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    assert_same(ours, reference.loglikelihood(requests, disable_tqdm=True))


def test_greedy_continuations_are_found():
    model, tokenizer = flex_olmo(), char_tokenizer()
    context = "what the band"
    text = model.generate(torch.tensor([tokenizer.encode(context)]), max_new_tokens=4, do_sample=False)[0, -4:]
    requests = [ask("loglikelihood", context, tokenizer.decode(text[:n])) for n in (1, 2, 3, 4)]
    requests.append(ask("loglikelihood", context, tokenizer.decode(text[:3]) + "~~"))
    greedy = [greedy for _, greedy in MixtureLM(model, tokenizer).loglikelihood(requests)]
    assert greedy == [True, True, True, True, False]


def test_which_models_branch():
    tokenizer = char_tokenizer()
    branches = {name: MixtureLM(make(), tokenizer).branches for name, make in MODELS.items()}
    assert branches == {
        "flex_olmo": True, "flex_olmo-eager": True, "llama": True, "mistral-window": False, "gpt2": False
    }  # fmt: skip


def test_bfloat16_stays_close_to_hflm():
    model, tokenizer = flex_olmo(initializer_range=0.05).to(torch.bfloat16), char_tokenizer()
    requests = choice_requests()
    ours = MixtureLM(model, tokenizer).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8).loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a - b) / (1 + abs(b)) for (a, _), (b, _) in zip(ours, theirs, strict=True)) < 0.02


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_do_not_depend_on_batching(batch_tokens):
    model, tokenizer = flex_olmo(), char_tokenizer()
    requests = choice_requests(documents=9) + odd_requests()[:20]
    shuffled = requests[:]
    random.Random(1).shuffle(shuffled)
    expected = dict(zip(map(id, requests), MixtureLM(model, tokenizer).loglikelihood(requests), strict=True))
    found = MixtureLM(model, tokenizer, batch_tokens=batch_tokens).loglikelihood(shuffled)
    assert_same(found, [expected[id(request)] for request in shuffled])


def test_shared_tokens_are_computed_once():
    """Tokens read = distinct prefixes of a question, and the few-shot prompt of a task once."""
    model, tokenizer = flex_olmo(max_position_embeddings=2048), char_tokenizer()
    prompt = "example: " * 90
    requests = [
        ask("loglikelihood", f"{prompt}{question}", answer, document=("t", number))
        for number, question in enumerate(["one?", "two?", "six?"])
        for answer in [" yes", " yet", " no", " no"]
    ]
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    MixtureLM(model, tokenizer).loglikelihood(requests)
    hook.remove()
    question = len("one?" + " ye" + "n")  # " y", "e" and "n" are read; last letters are only predicted
    assert sum(read) == len(prompt) + 3 * question


def test_the_output_layer_runs_where_needed_only():
    model, tokenizer = flex_olmo(), char_tokenizer()
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:-1].numel()))
    MixtureLM(model, tokenizer).loglikelihood([ask("loglikelihood", "what is it", c) for c in "abcd"])
    hook.remove()
    assert rows == [1]


def test_a_plan_serves_changed_weights():
    model, tokenizer = flex_olmo(), char_tokenizer()
    lm, requests = MixtureLM(model, tokenizer), choice_requests()
    before = lm.loglikelihood(requests)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = lm.loglikelihood(requests)
    assert after != before
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    assert_same(after, reference.loglikelihood(requests, disable_tqdm=True))


def test_rolling_equals_hflm():
    model, tokenizer = flex_olmo(), char_tokenizer()
    rng = random.Random(0)
    texts = [words(rng, n) for n in (1, 5, MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 3 * MAX_LENGTH)]
    requests = [ask("loglikelihood_rolling", text) for text in texts]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood_rolling(requests, True)
    assert MixtureLM(model, tokenizer).loglikelihood_rolling(requests) == pytest.approx(theirs, abs=1e-2)
    assert MixtureLM(model, tokenizer).loglikelihood_rolling([ask("loglikelihood_rolling", "")]) == [0.0]


def generation_requests(**settings) -> list[Instance]:
    rng = random.Random(2)
    prompt = words(rng, 50)
    contexts = [(prompt if i % 2 else "") + words(rng, rng.randint(1, 20)) for i in range(14)]
    contexts += [words(rng, 300), contexts[0]]
    return [ask("generate_until", context, dict(settings)) for context in contexts]


STOPS = {"until": ["t", "qc"], "max_gen_toks": 16}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("flex_olmo", STOPS),
        ("flex_olmo", {"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}),
        ("flex_olmo", {"until": [], "max_new_tokens": 12}),
        *[("flex_olmo-eager", STOPS), ("llama", STOPS), ("mistral-window", STOPS), ("gpt2", STOPS)],
    ],
)
def test_greedy_generation_equals_hflm(model, settings):
    model, tokenizer = MODELS[model](), char_tokenizer(begin=True)
    model.generation_config.eos_token_id = [1, 20, 21]  # some letters end the text, so that it happens
    requests = generation_requests(**settings)
    ours = MixtureLM(model, tokenizer, batch_tokens=400).generate_until(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(requests, disable_tqdm=True)
    assert ours == theirs
    assert len(set(ours)) > 3


def test_other_generation_settings_reach_generate():
    model, tokenizer = flex_olmo(), char_tokenizer()
    beams = generation_requests(until=["q"], max_gen_toks=6, num_beams=2)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    assert MixtureLM(model, tokenizer).generate_until(beams) == reference.generate_until(beams, disable_tqdm=True)
    sampled = generation_requests(until=["q"], max_gen_toks=6, do_sample=True, temperature=1.0)
    torch.manual_seed(0)
    first = MixtureLM(model, tokenizer).generate_until(sampled)
    torch.manual_seed(0)
    assert MixtureLM(model, tokenizer).generate_until(sampled) == first
    assert MixtureLM(model, tokenizer).generate_until(sampled) != first


@pytest.mark.parametrize("continuation", ["", "a" * (MAX_LENGTH + 1)])
def test_a_continuation_of_impossible_length_is_refused(continuation):
    with pytest.raises(TaskError, match=f"1 to {MAX_LENGTH} tokens"):
        MixtureLM(flex_olmo(), char_tokenizer()).loglikelihood([ask("loglikelihood", "abc", continuation)])


def test_a_generation_without_room_is_refused():
    with pytest.raises(TaskError, match="max_gen_toks"):
        MixtureLM(flex_olmo(), char_tokenizer()).generate_until(generation_requests(max_gen_toks=MAX_LENGTH))


def test_clusters_hold_everything_once_and_pay():
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(9) for _ in range(length)) for length in (600, 300, 30)]
    sequences = [prompts[i % 3] + tuple(rng.randrange(9) for _ in range(20)) for i in range(60)] + [(), (1,)]
    clusters = _find_clusters(sequences)
    assert sorted(index for members, _ in clusters for index in members) == list(range(len(sequences)))
    for members, prefix in clusters:
        assert len({sequences[index][:prefix] for index in members}) == 1
    assert sorted(prefix for _, prefix in clusters)[-2:] >= [300, 600]


def test_the_nano_suite_scores_as_with_hflm():
    model, tokenizer = flex_olmo(max_position_embeddings=512), char_tokenizer()
    tasks = load_tasks("nano", limit=8)
    ours = tasks.score(MixtureLM(model, tokenizer))
    theirs = tasks.score(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1))
    for name, task in ours.tasks.items():
        assert task.metrics == theirs.tasks[name].metrics
        for sample, reference in zip(task.samples, theirs.tasks[name].samples, strict=True):
            if isinstance(sample.responses[0], str):
                assert sample.responses == reference.responses
            else:
                assert_same(sample.responses, reference.responses)
