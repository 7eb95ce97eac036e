"""A mixture over HTTP, against its engine alone, and against `transformers serve` with the full mixture.

    python -m tests.benchmarks.bench_serve

Clients send prompts of 48 tokens and ask for 16 to 80 more; they get them all (the models have no end token here). The
peer serves the FlexOlmo checkpoint of the same experts, all full, with its own continuous batching. Two models: the
embedded one, where a step is mostly overhead, and one of random weights that is wide enough to compute.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from flexmore_ray.export import export_mixture
from flexmore_ray.mixture import load_mixture
from serve.engine import Engine, Limits
from serve.request import Request
from tests.common import random_model, write
from tests.serve_process import Load, drive, free_port, process, serving, wait_for

CLIENTS, PROMPT = 32, 48
TOKENS = (16, 80)
NANO_RANKS = {"math": 16, "news": 8, "academic": 8, "code": 32, "creative": 8, "reddit": 16}
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 99}
WIDE_RANK = 32
NANO = Path(__file__).resolve().parents[2] / "flexmore_ray" / "zoo" / "nano"


def run(quick: bool = False) -> dict[str, object]:
    """Requests and tokens per second and latencies of each way to serve, by model, and the ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {"nano": _nano(Path(folder) / "nano")}
        if not quick:
            models["wide"] = _wide(Path(folder) / "wide")
        return {name: _compare(name, source, Path(folder), quick) for name, source in models.items()}


def _nano(folder: Path) -> tuple[Path, dict[str, Any]]:
    export_mixture("zoo://nano", folder, "flexolmo", dtype="float32")
    _without_end(folder)
    return folder, dict(NANO_RANKS)


def _wide(folder: Path) -> tuple[Path, dict[str, Any]]:
    sizes = WIDE | {"num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 512}
    write(random_model(7, 4, **sizes), folder, architectures=["FlexOlmoForCausalLM"])
    for file in NANO.glob("tokenizer*"):
        shutil.copy(file, folder)
    _without_end(folder)
    return folder, {f"expert-{i}": WIDE_RANK for i in range(1, 7)}


def _without_end(folder: Path) -> None:
    """Let no token end a text, so that every model does the same work."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": -1}))
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, "eos_token_id": -1}))


def _compare(name: str, source: tuple[Path, dict[str, Any]], folder: Path, quick: bool) -> dict[str, object]:
    checkpoint, ranks = source
    mixture = folder / f"{name}.yaml"
    mixture.write_text(yaml.safe_dump({"source": str(checkpoint), "ranks": ranks, "active": 4}))
    owned = folder / f"{name}-own.yaml"
    full = next(iter(ranks))
    for file, entry in ((owned, {"rank": "full", "placement": "own"}), (folder / f"{name}-in.yaml", "full")):
        file.write_text(yaml.safe_dump({"source": str(checkpoint), "ranks": {**ranks, full: entry}, "active": 4}))
    count = 32 if quick else 160
    engine = _engine(mixture, count)
    rows = {"engine alone": engine, "flexmore serve": _flexmore(folder, mixture, count)}
    rows["one at a time"] = _flexmore(folder, mixture, 8, clients=1)
    rows["transformers serve"] = _transformers(folder, checkpoint, count)
    rows["expert in process"] = _flexmore(folder, folder / f"{name}-in.yaml", count)
    rows["expert on its own"] = _flexmore(folder, owned, count)
    speed = {way: load["tokens_per_s"] for way, load in rows.items()}
    ratios = {
        "serve / engine alone": speed["flexmore serve"] / speed["engine alone"],
        "serve / transformers serve": speed["flexmore serve"] / speed["transformers serve"],
        "serve / one at a time": speed["flexmore serve"] / speed["one at a time"],
        "own placement / in process": speed["expert on its own"] / speed["expert in process"],
    }
    print(f"{name}: {CLIENTS} clients, prompts of {PROMPT} tokens, {TOKENS[0]} to {TOKENS[1]} generated")
    for way, load in rows.items():
        print(
            f"  {way:<20} {load['requests_per_s']:7.1f} requests/s {load['tokens_per_s']:8,.0f} tokens/s   latency "
            f"p50 {load['p50_s']:.2f} p90 {load['p90_s']:.2f} p99 {load['p99_s']:.2f} s"
        )
    print("  " + ", ".join(f"{what}: {ratio:.2f}" for what, ratio in ratios.items()))
    return {"ways": rows, "ratios": ratios}


def _median(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def _requests(count: int, turn: int) -> list[tuple[str, int]]:
    """Prompts and numbers of tokens; other prompts in every turn, so that no prefix is known."""
    draw = random.Random(turn)
    letters = string.ascii_lowercase + " \n"
    texts = ["".join(draw.choices(letters, k=PROMPT)) for _ in range(count)]
    draw.seed(0)
    return [(text, draw.randint(*TOKENS)) for text in texts]


def _engine(mixture: Path, count: int) -> dict[str, float]:
    """The same requests, as token ids, to the engine in this process."""
    loaded = load_mixture(mixture)
    engine = Engine(loaded, Limits(sequences=64))
    engine.start()

    async def all_of_them(turn: int) -> Load:
        latencies: list[float] = []
        asked = _requests(count, turn)
        prompts = [tuple(loaded.tokenizer(text).input_ids) for text, _ in asked]
        waiting = iter(enumerate(prompts))

        async def client() -> None:
            for i, prompt in waiting:
                start = time.perf_counter()
                await engine.generate(
                    Request(id=f"{turn}-{i}", prompts=(prompt,), max_tokens=asked[i][1], temperature=1.0, seed=i)
                )
                latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return Load(time.perf_counter() - start, latencies, sum(tokens for _, tokens in asked))

    try:
        runs = [asyncio.run(all_of_them(turn)).summary() for turn in range(4)]
    finally:
        engine.stop()
    return _median(runs[1:])


def _drive(url: str, model: str, count: int, clients: int) -> dict[str, float]:
    """Load in three runs, after one to warm up."""
    runs = []
    for turn in range(4):
        bodies = [
            {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 1.0, "seed": i}
            for i, (text, tokens) in enumerate(_requests(count, turn))
        ]
        load = drive(url, bodies, clients)
        asked = sum(body["max_tokens"] for body in bodies)
        assert load.tokens == asked, f"{load.tokens} tokens came of {asked}"
        runs.append(load.summary())
    return _median(runs[1:])


def _flexmore(folder: Path, mixture: Path, count: int, clients: int = CLIENTS) -> dict[str, float]:
    home = Path(tempfile.mkdtemp(dir=folder))
    with serving(home, mixture) as server:
        return _drive(server.url, mixture.stem, count, clients)


def _transformers(folder: Path, checkpoint: Path, count: int) -> dict[str, float]:
    """The peer: the full FlexOlmo checkpoint, with continuous batching and the same sizes of batch and cache."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(checkpoint), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--cb-block-size", "16", "--cb-num-blocks", "2112", "--cb-max-batch-tokens", "512"]
    log = folder / "transformers.log"
    with process(command, log, os.environ | {"OMP_NUM_THREADS": "1"}) as started:
        wait_for(f"http://127.0.0.1:{port}/health", started, log.read_text)
        return _drive(f"http://127.0.0.1:{port}", str(checkpoint), count, CLIENTS)


if __name__ == "__main__":
    print(json.dumps(run()))
