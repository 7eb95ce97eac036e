"""Documents per second of `MixtureLM` against lm-eval's `HFLM` on multiple choice.

    python tests/benchmarks/bench_scoring.py [--quick]

One process, alternating runs, medians; `HFLM` at the batch size that is best in a run of each. The model is a random
FlexOlmo of the size of the embedded mixture (width 128, 4 layers, 7 experts, characters as tokens). Three
kinds of questions, 4 choices each: texts of several tokens, the same behind a few-shot prompt, and letters.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, PreTrainedTokenizerFast

from flexmore_ray.harness import MixtureLM

BATCH_SIZES = (16, 64, 256)
CHOICES = 4
PROMPT = 160  # characters of the few-shot prompt
KINDS = {"texts": (0, 2, 8), "few-shot texts": (PROMPT, 2, 8), "letters": (0, 1, 1)}
"""Kind of question -> characters of prompt, of the shortest and of the longest choice."""


def make_model() -> tuple[FlexOlmoForCausalLM, PreTrainedTokenizerFast]:
    """A random FlexOlmo, and a tokenizer of characters."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(string.printable)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = FlexOlmoConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=7,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    return FlexOlmoForCausalLM(config).eval(), wrapped


def make_requests(kind: str, documents: int) -> list[Instance]:
    """Questions of 30 to 78 characters with 4 choices, as lm-eval would build them."""
    prompt_length, shortest, longest = KINDS[kind]
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))

    prompt, requests = text(prompt_length), []
    for doc_id in range(documents):
        question = prompt + text(rng.randint(30, 78))
        for index in range(CHOICES):
            pair = (question, " " + text(rng.randint(shortest, longest)))
            requests.append(Instance("loglikelihood", {}, pair, index, metadata=(kind, doc_id, 1)))
    return requests


def time_kind(model: Any, tokenizer: Any, kind: str, documents: int, repeats: int) -> dict[str, float]:
    """Medians of documents per second; a fresh `MixtureLM` is also timed once, planning included."""
    requests = make_requests(kind, documents)
    ours = MixtureLM(model, tokenizer)
    first = _seconds(lambda: ours.loglikelihood(requests))
    peers = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in BATCH_SIZES}
    tried = {size: _seconds(lambda: peer.loglikelihood(requests, disable_tqdm=True)) for size, peer in peers.items()}  # noqa: B023
    best = min(tried, key=lambda size: tried[size])
    times: dict[str, list[float]] = {"ours": [], "hflm": []}
    for _ in range(repeats):
        times["ours"].append(_seconds(lambda: ours.loglikelihood(requests)))
        times["hflm"].append(_seconds(lambda: peers[best].loglikelihood(requests, disable_tqdm=True)))
    rates = {name: documents / statistics.median(values) for name, values in times.items()}
    return {
        "mixture_lm": rates["ours"],
        "mixture_lm_first_run": documents / first,
        "hflm": rates["hflm"],
        "hflm_batch_size": best,
        "ratio": rates["ours"] / rates["hflm"],
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(quick: bool = False) -> dict[str, Any]:
    """Measure all kinds of questions.

    Args:
        quick: Fewer documents and runs, for a smoke test; the numbers are then rough.

    Returns:
        For each kind: documents per second of both, batch size of the best `HFLM`, and their ratio; under
        `ratio` the median ratio over kinds.
    """
    model, tokenizer = make_model()
    documents, repeats = (16, 1) if quick else (64, 5)
    MixtureLM(model, tokenizer).loglikelihood(make_requests("texts", 8))  # first calls are slow for everyone
    kinds = {kind: time_kind(model, tokenizer, kind, documents, repeats) for kind in KINDS}
    print(f"{'documents/s':<16}{'MixtureLM':>10}{'HFLM':>10}{'batch':>7}{'ratio':>7}", file=sys.stderr)
    for kind, row in kinds.items():
        numbers = f"{row['mixture_lm']:>10.0f}{row['hflm']:>10.0f}{row['hflm_batch_size']:>7}{row['ratio']:>7.2f}"
        print(f"{kind:<16}{numbers}", file=sys.stderr)
    ratio = statistics.median(row["ratio"] for row in kinds.values())
    return {"name": "scoring", "documents": documents, "repeats": repeats, "kinds": kinds, "ratio": ratio}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer documents and runs")
    print(json.dumps(run(**vars(parser.parse_args()))))
