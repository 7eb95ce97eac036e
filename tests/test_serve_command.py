"""`flexmore serve` as its users have it: the openai client, lm-eval over HTTP, data owners who withdraw an expert."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
import torch

from flexmore_ray import load_mixture
from flexmore_ray.mixture import Mixture
from flexmore_ray.spec import MixtureSpec
from tests.serve_process import Server, serving

pytestmark = pytest.mark.slow
RANKS: dict[str, Any] = {"math": 16, "code": 32, "news": 8, "academic": "full", "creative": "drop", "reddit": 16}
OWN = {**RANKS, "academic": {"rank": "full", "placement": "own"}}
TEXTS = ("Question: 2+3=\nAnswer:", "fact: the capital of Zevog:", "12+7=", "the lamp in the harbour")
SUITE = Path(__file__).resolve().parents[1] / "flexmore_ray" / "suites" / "nano"
TASKS = ("nano_capitals", "nano_syllogism", "nano_animals")
"""Two by log-likelihood, one by generation."""
ADMIN = "the-key-of-the-owners"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    for name, ranks in (("winner", RANKS), ("own", OWN)):
        MixtureSpec.from_dict({"source": "zoo://nano", "ranks": ranks, "active": 4}).save(folder / f"{name}.yaml")
    (folder / "admin.keys").write_text(f"# of the data owners\n{ADMIN}\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    home = folder / "home"
    home.mkdir()
    with serving(home, folder / "winner.yaml", "--admin-key-file", str(folder / "admin.keys")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is set", max_retries=0)


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Mixture:
    return load_mixture(folder / "winner.yaml")


def greedy(mixture: Mixture, text: str, max_tokens: int = 24) -> str:
    prompt = mixture.tokenizer(text, return_tensors="pt").input_ids
    out = mixture.model.generate(prompt, max_new_tokens=max_tokens, do_sample=False)
    return str(mixture.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))


def test_completions_equal_generate(client: openai.OpenAI, mixture: Mixture) -> None:
    answer = client.completions.create(model="winner", prompt=list(TEXTS), max_tokens=24, temperature=0)
    assert [choice.text for choice in answer.choices] == [greedy(mixture, text) for text in TEXTS]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(mixture.tokenizer(text).input_ids) for text in TEXTS)


def test_streams_equal_generate(client: openai.OpenAI, mixture: Mixture) -> None:
    for text in TEXTS:
        chunks = client.completions.create(model="winner", prompt=text, max_tokens=24, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(mixture, text)


def test_chat(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "winner", "max_tokens": 12, "temperature": 0}
    messages: Any = [{"role": "user", "content": "12+7="}]
    whole = client.chat.completions.create(messages=messages, **settings).choices[0].message
    pieces = client.chat.completions.create(messages=messages, stream=True, **settings)
    assert whole.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.content


def test_without_an_expert_as_if_it_had_never_been_merged(
    client: openai.OpenAI, server: Server, mixture: Mixture, folder: Path
) -> None:
    ranks = {**RANKS, "math": "drop", "news": "drop"}
    without = load_mixture(MixtureSpec(source=("zoo://nano",), ranks=ranks, active=4))
    expected = [greedy(without, text) for text in TEXTS]
    body: dict[str, Any] = {"model": "winner", "prompt": list(TEXTS), "max_tokens": 24, "temperature": 0}
    asked = client.completions.create(**body, extra_body={"experts": {"exclude": ["math", "news"]}})
    assert [choice.text for choice in asked.choices] == expected
    admin = openai.OpenAI(base_url=server.url, api_key=ADMIN, max_retries=0)
    for name in ("math", "news"):
        admin.post(f"/admin/experts/{name}/disable", cast_to=object)
    try:
        withdrawn = client.completions.create(**body)
        assert [choice.text for choice in withdrawn.choices] == expected
        assert set(withdrawn.usage.experts) == {"public", "code", "academic", "reddit"}  # type: ignore[union-attr]
    finally:
        for name in ("math", "news"):
            admin.post(f"/admin/experts/{name}/enable", cast_to=object)
    again = client.completions.create(**body)
    assert [choice.text for choice in again.choices] == [greedy(mixture, text) for text in TEXTS]


def test_a_thousand_clients_at_once_are_served_or_told_to_come_again(server: Server) -> None:
    async def ask(session: aiohttp.ClientSession, i: int) -> tuple[int, bool]:
        body = {"model": "winner", "prompt": f"{i}+1=", "max_tokens": 8}
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            await answer.read()
            return answer.status, "retry-after" in answer.headers

    async def ask_all() -> list[tuple[int, bool]]:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(180)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await asyncio.gather(*(ask(session, i) for i in range(1000)))

    before = memory(server)
    outcomes = collections.Counter(asyncio.run(ask_all()))
    assert set(outcomes) <= {(200, False), (429, True)}, outcomes
    assert outcomes[200, False] >= 64
    wait_until_idle(server)
    assert memory(server) - before < 400 * 2**20


def test_the_engine_drops_what_nobody_waits_for(server: Server) -> None:
    async def leave() -> None:
        body = {"model": "winner", "prompt": "The", "max_tokens": 400, "temperature": 1.0, "stream": True}
        async with aiohttp.ClientSession() as session:
            for stream in (True, False):
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    timeout = aiohttp.ClientTimeout(0.5)
                    url, content = f"{server.url}/v1/completions", body | {"stream": stream, "n": 8}
                    async with session.post(url, json=content, timeout=timeout) as answer:
                        await answer.read()

    asyncio.run(leave())
    wait_until_idle(server)


def memory(server: Server) -> int:
    """Bytes that the service's replicas hold."""
    pids = [pid for deployment in ("ingress", "mixture") for pid in server.replicas(deployment)]
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def wait_until_idle(server: Server) -> None:
    """Wait until no sequence runs or waits."""
    deadline = time.monotonic() + 30
    while any(replica["running"] or replica["waiting"] for replica in server.get("/status")["replicas"]):
        assert time.monotonic() < deadline, server.get("/status")
        time.sleep(0.2)


def test_lm_eval_over_http_scores_as_flexmore_eval(server: Server, folder: Path) -> None:
    out = folder / "lm_eval"
    arguments = f"model=winner,base_url={server.url}/v1/completions,num_concurrent=8"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(SUITE), "--limit", "60", "--batch_size", "4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output_path", str(out)], check=True, timeout=400, env=environment)
    [file] = out.rglob("results_*.json")
    over_http = json.loads(file.read_text())["results"]
    command = [sys.executable, "-m", "flexmore_ray", "eval", str(folder / "winner.yaml"), "--split", "test", "--json"]
    command += ["--tasks", ",".join(TASKS), "--limit", "60", "--results", str(folder / "results")]
    done = subprocess.run(command, check=True, timeout=400, env=environment, capture_output=True, text=True)
    expected = json.loads(done.stdout.splitlines()[-1])["tasks"]
    metrics = {"nano_animals": "exact_match,none"}
    found = {task: over_http[task][metrics.get(task, "acc,none")] for task in TASKS}
    assert found == pytest.approx({task: expected[task] for task in TASKS}, abs=1e-12)


def test_an_expert_on_its_own_gives_the_same_logits(folder: Path, mixture: Mixture) -> None:
    home = folder / "own-home"
    home.mkdir()
    with serving(home, folder / "own.yaml") as server:
        assert len(server.replicas("expert-academic")) == 1
        for text in TEXTS:
            body = {"model": "own", "prompt": text, "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 1}
            [choice] = server.post("/v1/completions", body)["choices"]
            ids = mixture.tokenizer(choice["text"], return_tensors="pt").input_ids
            with torch.no_grad():
                scores = mixture.model(ids).logits[0].log_softmax(-1)
            expected = scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
            assert choice["logprobs"]["token_logprobs"][1 : len(expected) + 1] == pytest.approx(expected, abs=1e-4)


def test_it_ends_cleanly(folder: Path) -> None:
    home = folder / "short-home"
    home.mkdir()
    with serving(home, folder / "winner.yaml", "--json") as server:
        started = [psutil.Process(pid) for pid, _, _ in server.cluster()]
        assert len(started) > 5
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        assert json.loads(server.log().splitlines()[-1])["model"] == "winner"
        assert "Traceback" not in server.log()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
