"""`flexmore serve` as a process of its own, the processes of its cluster, and load for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

START_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A service at work."""

    url: str
    process: subprocess.Popen[bytes]
    home: Path

    def get(self, path: str) -> Any:
        """What a path answers."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What a path answers to a body."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def replicas(self, deployment: str) -> dict[int, float]:
        """Processes of a deployment's replicas (ingress, mixture, expert-NAME), and when each started."""
        named = re.compile(rf"ray::.*[:#]{deployment}([#:.]|$)")  # Ray's names, at rest and at work
        return {pid: start for pid, start, name in self.cluster() if named.match(name)}

    def log(self) -> str:
        """What the command has printed."""
        return (self.home / "serve.log").read_text()

    def cluster(self) -> Iterator[tuple[int, float, str]]:
        """Processes that the command has started, Ray's among them: id, time of its start, name."""
        for other in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                yield other.pid, other.create_time(), " ".join(other.cmdline()).strip()


@contextlib.contextmanager
def serving(home: Path, mixture: str | Path, *options: str) -> Iterator[Server]:
    """Run ``flexmore serve`` for as long as the block runs.

    Args:
        home: an empty folder, the process's home.
        mixture: what to serve.
        options: of the command.
    """
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flexmore_ray", "serve", str(mixture), "--port", str(port), *options]
    with process(command, home / "serve.log", environment) as started:
        server = Server(f"http://127.0.0.1:{port}", started, home)
        wait_for(f"{server.url}/ready", started, server.log)
        while server.url not in server.log():  # which it says last
            time.sleep(0.1)
        yield server


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command for as long as the block runs."""
    with log.open("wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env=dict(environment))
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(timeout=90)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(url: str, started: subprocess.Popen[bytes], log: Callable[[], str]) -> None:
    """Wait until a URL answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert started.poll() is None, f"the server ended: {log()}"
        time.sleep(0.3)
    raise AssertionError(f"no answer from {url} after {START_SECONDS:g} s: {log()}")


# ---- load


@dataclasses.dataclass(frozen=True)
class Load:
    """What a number of requests took."""

    seconds: float
    latencies: list[float]
    tokens: int

    def summary(self) -> dict[str, float]:
        """Requests and tokens per second, and percentiles of the latency in seconds."""
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        return {
            "requests_per_s": len(self.latencies) / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "p50_s": cuts[49],
            "p90_s": cuts[89],
            "p99_s": cuts[98],
        }


def drive(url: str, bodies: Sequence[Mapping[str, Any]], clients: int) -> Load:
    """Post completions with so many clients at a time; every answer has to be a 200."""

    async def all_of_them() -> Load:
        latencies: list[float] = []
        tokens, waiting = 0, iter(bodies)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:

            async def client() -> None:
                nonlocal tokens
                for body in waiting:
                    start = time.perf_counter()
                    async with session.post(f"{url}/v1/completions", json=body) as answer:
                        content = await answer.json()
                        assert answer.status == 200, content
                    latencies.append(time.perf_counter() - start)
                    tokens += content["usage"]["completion_tokens"]

            start = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return Load(time.perf_counter() - start, latencies, tokens)

    return asyncio.run(all_of_them())
