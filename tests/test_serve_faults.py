"""Processes of the service are killed under steady load: what fails, and how soon all is well again."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from flexmore_ray.spec import MixtureSpec
from tests.serve_process import Server, serving

pytestmark = pytest.mark.slow
KILLS = 10
CLIENTS = 8
DEPLOYMENTS = ("ingress", "mixture", "expert-academic")
RANKS: dict[str, Any] = {"math": 16, "code": 8, "news": 8, "creative": "drop", "reddit": 16}
SETTLE_SECONDS = 60.0
OPTIONS = ("--ingress-replicas", "2", "--min-replicas", "2", "--cpus", "0.2", "--expert-min-replicas", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas of everything."""
    folder = tmp_path_factory.mktemp("faults")
    ranks = {**RANKS, "academic": {"rank": "full", "placement": "own"}}
    MixtureSpec.from_dict({"source": "zoo://nano", "ranks": ranks, "active": 4}).save(folder / "m.yaml")
    home = folder / "home"
    home.mkdir()
    with serving(home, folder / "m.yaml", *OPTIONS, "--set", "expert_cpus=0.2") as server:
        yield server


class Traffic:
    """Clients who ask one thing after the other, every second one streamed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: list[tuple[float, float, str]] = []  # when the request began and ended, and how
        self.lost = 0

    async def run(self, work: Any) -> None:
        """Keep the clients busy for as long as `work` takes."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
            clients = [asyncio.create_task(self._client(session, i)) for i in range(CLIENTS)]
            try:
                await work
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession, i: int) -> None:
        draw = random.Random(i)
        while True:
            body = {"model": "m", "prompt": f"{draw.randrange(100)}+{draw.randrange(100)}=", "max_tokens": 40}
            began = time.monotonic()
            try:
                await self._ask(session, body | {"stream": draw.random() < 0.5, "seed": draw.randrange(99)})
                self.outcomes["answered"] += 1
            except (aiohttp.ClientError, ValueError, TimeoutError) as error:
                self.outcomes["failed"] += 1
                self.failures.append((began, time.monotonic(), f"{type(error).__name__}: {error}"))

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status} {await answer.text()}")
            if not body["stream"]:
                usage = (await answer.json())["usage"]
                self.lost += "experts_lost" in usage
                return
            content = await answer.text()
        if '"error"' in content or "data: [DONE]" not in content:
            raise ValueError(f"a stream ended with {content[-120:]!r}")


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_killed_process_costs_at_most_what_it_had_in_flight(
    server: Server, deployment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic, seconds, kills = Traffic(server.url), [], []

    async def kill_again_and_again() -> None:
        draw = random.Random(deployment)
        await asyncio.sleep(2)
        for _ in range(KILLS):
            before = server.replicas(deployment)
            assert len(before) == 2, before
            os.kill(draw.choice(sorted(before)), signal.SIGKILL)
            kills.append(start := time.monotonic())
            while not (len(now := server.replicas(deployment)) == 2 and now != before):
                assert time.monotonic() - start < SETTLE_SECONDS, f"{deployment} did not come back: {now}"
                await asyncio.sleep(0.25)
            seconds.append(time.monotonic() - start)
            await asyncio.sleep(6 + draw.random())  # until the new one is at work

    asyncio.run(traffic.run(kill_again_and_again()))
    with capsys.disabled():
        print(
            f"\n{deployment}: {KILLS} kills, {traffic.outcomes['answered']} answered, {traffic.outcomes['failed']} "
            f"failed, {traffic.lost} went on without the expert; a new process after {sum(seconds) / KILLS:.1f} s"
        )
        for failure, number in collections.Counter(failure[-140:] for _, _, failure in traffic.failures).items():
            print(f"    {number} x {failure}")
    assert traffic.outcomes["answered"] > 100
    in_flight = [any(began < kill < ended for kill in kills) for began, ended, _ in traffic.failures]
    assert all(in_flight), "only what was in flight on the killed process may fail"
    if deployment != "ingress":  # requests that had nothing streamed yet are sent to the other replica
        assert all("stream ended" in failure for _, _, failure in traffic.failures)
