"""Metrics of the application, in Ray's own pipeline: on every node's metrics port, with the prefix ``ray_``.

| metric                                    | kind      | tags     | counts                                           |
|-------------------------------------------|-----------|----------|--------------------------------------------------|
| flexmore_serve_requests                   | counter   | outcome  | requests that ended in an engine: done,          |
|                                           |           |          | cancelled, failed                                |
| flexmore_serve_http_requests              | counter   | status   | answers over HTTP, by status code                |
| flexmore_serve_retries                    | counter   |          | requests sent again after a replica was lost     |
| flexmore_serve_time_to_first_token_s      | histogram |          | from arrival in the replica to the first token   |
| flexmore_serve_time_per_output_token_s    | histogram |          | between tokens of a sequence after its first     |
| flexmore_serve_request_s                  | histogram |          | from arrival in the replica to the end           |
| flexmore_serve_prompt_tokens              | counter   |          | tokens of prompts                                |
| flexmore_serve_cached_tokens              | counter   |          | of these, found in the KV cache                  |
| flexmore_serve_generated_tokens           | counter   |          | tokens generated                                 |
| flexmore_serve_step_tokens                | histogram |          | tokens of one step: the size of a batch          |
| flexmore_serve_step_s                     | histogram |          | time of one step                                 |
| flexmore_serve_running                    | gauge     | replica  | sequences in the batch                           |
| flexmore_serve_waiting                    | gauge     | replica  | sequences that wait for a place in it            |
| flexmore_serve_cache_use                  | gauge     | replica  | share of the KV cache in use, in [0, 1]          |
| flexmore_serve_expert_tokens              | counter   | expert   | tokens, each divided among experts by the        |
|                                           |           |          | router's weights                                 |
| flexmore_serve_expert_share               | gauge     | replica, | share of the routed weight since the replica     |
|                                           |           | expert   | started, in [0, 1]                               |
| flexmore_serve_expert_lost                | counter   | expert   | requests that had to do without this expert      |
| flexmore_serve_leases                     | gauge     | replica, | connections of mixture replicas to a replica of  |
|                                           |           | expert   | an expert placed on its own                      |
| flexmore_serve_expert_busy                | gauge     | replica, | share of its time that such a replica computed   |
|                                           |           | expert   |                                                  |

All have the tag ``application`` too. Replicas are counted by Serve: ``ray_serve_deployment_replica_healthy``. A value
appears on the port within 10 seconds or so, which is how often Ray collects.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.request import urlopen

from ray.util.metrics import Counter, Gauge, Histogram

from flexmore_ray.runtime import nodes
from serve.job import EndedRequest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
_FAMILIES = re.compile(r"(?:# (?:HELP|TYPE) )?ray_(?:flexmore_|serve_)")
_SCRAPE_SECONDS = 5.0


class _Metrics:
    """Metrics of one process; each has the application's name as a tag."""

    def __init__(self, application: str) -> None:
        self._tags = {"application": application}

    def _counter(self, name: str, what: str, *tags: str) -> Counter:
        return Counter(f"flexmore_serve_{name}", what, ("application", *tags))

    def _gauge(self, name: str, what: str, *tags: str) -> Gauge:
        return Gauge(f"flexmore_serve_{name}", what, ("application", *tags))

    def _histogram(self, name: str, what: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(f"flexmore_serve_{name}", what, list(bounds), ("application",))


class EngineMetrics(_Metrics):
    """What one mixture replica does; an engine's observer.

    Args:
        application: its name in Serve.
        replica: tells the replica from others.
    """

    def __init__(self, application: str, replica: str) -> None:
        super().__init__(application)
        self._replica = {**self._tags, "replica": replica}
        self._requests = self._counter("requests", "Requests that ended in an engine", "outcome")
        self._first = self._histogram("time_to_first_token_s", "From arrival to the first token, seconds", _SECONDS)
        self._per_token = self._histogram("time_per_output_token_s", "Between tokens, seconds", _PER_TOKEN)
        self._total = self._histogram("request_s", "From arrival to the end, seconds", _SECONDS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("cached_tokens", "Tokens of prompts found in the KV cache")
        self._generated = self._counter("generated_tokens", "Tokens generated")
        self._step_tokens = self._histogram("step_tokens", "Tokens of one step", _TOKENS)
        self._step_seconds = self._histogram("step_s", "Time of one step, seconds", _PER_TOKEN)
        self._running = self._gauge("running", "Sequences in the batch", "replica")
        self._waiting = self._gauge("waiting", "Sequences that wait for a place in the batch", "replica")
        self._cache = self._gauge("cache_use", "Share of the KV cache in use", "replica")
        self._expert_tokens = self._counter("expert_tokens", "Tokens by the router's weights", "expert")
        self._share = self._gauge("expert_share", "Share of the routed weight", "replica", "expert")
        self._lost = self._counter("expert_lost", "Requests that did without this expert", "expert")

    def stepped(self, tokens: int, sequences: int, seconds: float) -> None:
        """A step was made."""
        self._step_tokens.observe(tokens, self._tags)
        self._step_seconds.observe(seconds, self._tags)

    def ended(self, request: EndedRequest) -> None:
        """A request ended."""
        tags, usage = self._tags, request.usage
        self._requests.inc(1, {**tags, "outcome": request.outcome})
        self._total.observe(request.seconds, tags)
        if request.first_token is not None:
            self._first.observe(request.first_token, tags)
        if request.per_token is not None:
            self._per_token.observe(request.per_token, tags)
        for counter, tokens in (
            (self._prompt, usage.prompt_tokens),
            (self._cached, usage.cached_tokens),
            (self._generated, usage.completion_tokens),
        ):
            if tokens:
                counter.inc(tokens, tags)
        seen = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        for name, share in usage.experts.items():
            if share * seen:
                self._expert_tokens.inc(share * seen, {**tags, "expert": name})
        for name in usage.lost:
            self._lost.inc(1, {**tags, "expert": name})

    def report(self, stats: Mapping[str, Any]) -> None:
        """What the engine looks like now: its stats."""
        self._running.set(stats["running"], self._replica)
        self._waiting.set(stats["waiting"], self._replica)
        self._cache.set(stats["cache"], self._replica)
        for name, share in stats["shares"].items():
            self._share.set(share, {**self._replica, "expert": name})


class ExpertMetrics(_Metrics):
    """What one replica of an expert placed on its own does."""

    def __init__(self, application: str, replica: str, expert: str) -> None:
        super().__init__(application)
        self._busy = self._gauge("expert_busy", "Share of its time that it computed", "replica", "expert")
        self._leases = self._gauge("leases", "Mixture replicas' connections to it", "replica", "expert")
        self._replica = {**self._tags, "replica": replica, "expert": expert}

    def report(self, busy: float, leases: int) -> None:
        """How busy it was lately, as a share of the time, and its open connections."""
        self._busy.set(busy, self._replica)
        self._leases.set(leases, self._replica)


class IngressMetrics(_Metrics):
    """What one ingress replica does."""

    def __init__(self, application: str) -> None:
        super().__init__(application)
        self._answers = self._counter("http_requests", "Answers over HTTP", "status")
        self._retries = self._counter("retries", "Requests sent again after a replica was lost")

    def answered(self, status: int) -> None:
        """A request was answered with this status."""
        self._answers.inc(1, {**self._tags, "status": str(status)})

    def retried(self) -> None:
        """A request was sent again."""
        self._retries.inc(1, self._tags)


async def read_metrics() -> str:
    """This application's and Serve's metrics of all nodes, as Prometheus text; a node that does not answer is left out.

    Values are up to 10 seconds old: so often Ray collects them from the processes of a node.
    """
    ports = {(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in await asyncio.to_thread(nodes)}
    texts = await asyncio.gather(*(asyncio.to_thread(_scrape, *port) for port in sorted(ports)))
    return _merge(texts)


def _scrape(host: str, port: int) -> str:
    address = f"[{host}]" if ":" in host else host
    try:
        with urlopen(f"http://{address}:{port}/metrics", timeout=_SCRAPE_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):
        return ""


def _merge(texts: Sequence[str]) -> str:
    """Wanted families of several pages on one: each is announced once, with all of its samples after that."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        name, announced = "", False
        for line in text.splitlines():
            if line.startswith("# "):
                found = line.split(" ", 3)[2]
                if found != name:
                    name, announced = found, found in families
                if _FAMILIES.match(line) and not announced:
                    families.setdefault(name, ([], []))[0].append(line)
            elif _FAMILIES.match(line):
                families.setdefault(name, ([], []))[1].append(line)
    return "".join(f"{line}\n" for head, samples in families.values() for line in (*head, *samples))
