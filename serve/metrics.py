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
| flexmore_serve_running                    | gauge     |          | sequences in the batch                           |
| flexmore_serve_waiting                    | gauge     |          | sequences that wait for a place in it            |
| flexmore_serve_cache_use                  | gauge     |          | share of the KV cache that sequences hold        |
| flexmore_serve_cache_kept                 | gauge     |          | share that is kept for others to reuse           |
| flexmore_serve_expert_tokens              | counter   | expert   | tokens, each divided among experts by the        |
|                                           |           |          | router's weights                                 |
| flexmore_serve_expert_share               | gauge     | expert   | share of the routed weight since the replica     |
|                                           |           |          | started, in [0, 1]                               |
| flexmore_serve_expert_lost                | counter   | expert   | requests that had to do without this expert      |
| flexmore_serve_expert_available           | gauge     | expert   | 1, or 0 while this expert is lost to a replica   |
| flexmore_serve_weight_bytes               | gauge     | expert   | memory of weights in a replica, by expert; those |
|                                           |           |          | shared by all are "trunk"                        |
| flexmore_serve_leases                     | gauge     | expert   | connections of mixture replicas to a replica of  |
|                                           |           |          | an expert placed on its own                      |
| flexmore_serve_expert_busy                | gauge     | expert   | share of its time that such a replica computed   |

All have the tags ``application`` and ``replica`` too; counters end in ``_total`` on the port. A value appears there up
to 10 seconds after the fact: so often Ray collects from the processes of a node (its ``metrics_report_interval_ms``).

`read_metrics` adds what Serve says of the same application: how many replicas there are and shall be, how many requests
came, wait, are at work or failed, and how long HTTP answers took.
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
_OF_SERVE = (
    "autoscaling_desired_replicas",
    "autoscaling_target_replicas",
    "deployment_error_counter_total",
    "deployment_queued_queries",
    "deployment_replica_healthy",
    "deployment_replica_starts_total",
    "deployment_request_counter_total",
    "http_request_latency_ms",
    "num_http_requests_total",
    "replica_processing_queries",
)
_FAMILY = re.compile(rf"ray_(?:flexmore_serve_\w+|serve_(?:{'|'.join(_OF_SERVE)}))")
_SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_DROPPED = re.compile("Component|SessionName|Version|WorkerId|otel_.*")
"""Labels that say nothing: the same everywhere, or the process, which replica, handle or node tell already."""
_SCRAPE_SECONDS = 5.0


class _Metrics:
    """Metrics of one replica; each has its name and the application's as tags.

    Args:
        application: its name in Serve.
        replica: tells the replica from others.
    """

    def __init__(self, application: str, replica: str) -> None:
        self._tags = {"application": application, "replica": replica}
        self._sizes: Mapping[str, int] = {}

    def _counter(self, name: str, what: str, *tags: str) -> Counter:
        return Counter(f"flexmore_serve_{name}", what, (*self._tags, *tags))

    def holds(self, weights: Mapping[str, int]) -> None:
        """Weights are in memory: bytes by expert, "trunk" for those that all share."""
        self._sizes = weights
        self._weights = Gauge("flexmore_serve_weight_bytes", "Memory of weights", ("application", "replica", "expert"))

    def _report_weights(self) -> None:
        for name, size in self._sizes.items():  # again and again: a gauge that is not set for 20 s goes away
            self._weights.set(size, {**self._tags, "expert": name})

    def _gauge(self, name: str, what: str, *tags: str) -> Gauge:
        return Gauge(f"flexmore_serve_{name}", what, (*self._tags, *tags))

    def _histogram(self, name: str, what: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(f"flexmore_serve_{name}", what, list(bounds), tuple(self._tags))


class EngineMetrics(_Metrics):
    """What one mixture replica does; an engine's observer."""

    def __init__(self, application: str, replica: str) -> None:
        super().__init__(application, replica)
        self._requests = self._counter("requests", "Requests that ended in an engine", "outcome")
        self._first = self._histogram("time_to_first_token_s", "From arrival to the first token, seconds", _SECONDS)
        self._per_token = self._histogram("time_per_output_token_s", "Between tokens, seconds", _PER_TOKEN)
        self._total = self._histogram("request_s", "From arrival to the end, seconds", _SECONDS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("cached_tokens", "Tokens of prompts found in the KV cache")
        self._generated = self._counter("generated_tokens", "Tokens generated")
        self._step_tokens = self._histogram("step_tokens", "Tokens of one step", _TOKENS)
        self._step_seconds = self._histogram("step_s", "Time of one step, seconds", _PER_TOKEN)
        self._running = self._gauge("running", "Sequences in the batch")
        self._waiting = self._gauge("waiting", "Sequences that wait for a place in the batch")
        self._cache = self._gauge("cache_use", "Share of the KV cache that sequences hold")
        self._kept = self._gauge("cache_kept", "Share of the KV cache that is kept for others to reuse")
        self._expert_tokens = self._counter("expert_tokens", "Tokens by the router's weights", "expert")
        self._share = self._gauge("expert_share", "Share of the routed weight", "expert")
        self._lost = self._counter("expert_lost", "Requests that did without this expert", "expert")
        self._available = self._gauge("expert_available", "Whether this expert is there", "expert")

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
        self._running.set(stats["running"], self._tags)
        self._waiting.set(stats["waiting"], self._tags)
        self._cache.set(stats["cache"], self._tags)
        self._kept.set(stats["cached"], self._tags)
        for name, share in stats["shares"].items():
            self._share.set(share, {**self._tags, "expert": name})
            self._available.set(name not in stats["lost"], {**self._tags, "expert": name})
        self._report_weights()


class ExpertMetrics(_Metrics):
    """What one replica of an expert placed on its own does."""

    def __init__(self, application: str, replica: str, expert: str) -> None:
        super().__init__(application, replica)
        self._busy = self._gauge("expert_busy", "Share of its time that it computed", "expert")
        self._leases = self._gauge("leases", "Mixture replicas' connections to it", "expert")
        self._tags = {**self._tags, "expert": expert}

    def report(self, busy: float, leases: int) -> None:
        """How busy it was lately, as a share of the time, and its open connections."""
        self._busy.set(busy, self._tags)
        self._leases.set(leases, self._tags)
        self._report_weights()


class IngressMetrics(_Metrics):
    """What one ingress replica does."""

    def __init__(self, application: str, replica: str) -> None:
        super().__init__(application, replica)
        self._answers = self._counter("http_requests", "Answers over HTTP", "status")
        self._retries = self._counter("retries", "Requests sent again after a replica was lost")

    def answered(self, status: int) -> None:
        """A request was answered with this status."""
        self._answers.inc(1, {**self._tags, "status": str(status)})

    def retried(self) -> None:
        """A request was sent again."""
        self._retries.inc(1, self._tags)


async def read_metrics(application: str) -> str:
    """An application's metrics, its own and Serve's, of all nodes, as Prometheus text.

    A node that does not answer is left out. Values are up to 10 seconds old: so often Ray collects them.

    Args:
        application: its name in Serve.
    """
    ports = {(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in await asyncio.to_thread(nodes)}
    texts = await asyncio.gather(*(asyncio.to_thread(_scrape, *port) for port in sorted(ports)))
    return await asyncio.to_thread(_merge, texts, application)


def _scrape(host: str, port: int) -> str:
    address = f"[{host}]" if ":" in host else host
    try:
        with urlopen(f"http://{address}:{port}/metrics", timeout=_SCRAPE_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):
        return ""


def _merge(texts: Sequence[str], application: str) -> str:
    """What several pages say of an application on one: each family is announced once, and has each series once.

    Where a process has taken another's place, as a proxy of Serve, their series are equal: counts are added up.
    """
    heads: dict[str, dict[str, str]] = {}
    families: dict[str, dict[str, float]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# "):
                kind, name = line.split(" ", 3)[1:3]
                heads.setdefault(name, {}).setdefault(kind, line)
            elif _FAMILY.fullmatch(name) and (found := _series(line, application)):
                series, value = found
                known = families.setdefault(name, {})
                adds = not heads[name].get("TYPE", "").endswith(" gauge")
                known[series] = value + (known.get(series, 0.0) if adds else 0.0)
    lines: list[str] = []
    for name, known in families.items():
        lines += [*heads[name].values(), *(f"{series} {value!r}" for series, value in known.items())]
    return "".join(f"{line}\n" for line in lines)


def _series(line: str, application: str) -> tuple[str, float] | None:
    """A sample's series, without the labels that say nothing, and its value; None if it is of something else."""
    sample = _SAMPLE.fullmatch(line)
    labels = dict(_LABEL.findall(sample[2])) if sample else {}
    if not sample or labels.get("application") != application:
        return None
    kept = ",".join(f'{name}="{value}"' for name, value in labels.items() if not _DROPPED.fullmatch(name))
    return f"{sample[1]}{{{kept}}}", float(sample[3])
