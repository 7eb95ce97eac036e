"""The ingress replica: HTTP on one side, mixture replicas on the other. Light: nothing here loads a weight."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from flexmore_ray.errors import FlexmoreError
from serve.http import create_app
from serve.job import RECENT
from serve.metrics import IngressMetrics, read_metrics
from serve.request import Delta, QueueFull, Request, Usage
from serve.service import Description, HttpSettings, Unavailable
from serve.switch import Switch
from serve.transport import EngineStopped, by_value, keep_to_loopback

ENGINES = 2  # that a request may have failed with, so that one that is the reason does not end all of them
ATTEMPTS = 3  # replicas that a request is sent to at most, one after the other
_PAUSE_SECONDS = 0.2  # before a request is sent again, for the news of a replica's death to come
_STATUS_SECONDS = 2.0
_OF_REPLICAS = ("replica", "running", "waiting", "cache", "cached", "alive")
_TIMES = ("time_to_first_token_s", "time_per_output_token_s", "request_s")
_TRANSIENT = (RayActorError, ReplicaUnavailableError, EngineStopped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """What an ingress replica has to know; made once, in `build_app`."""

    http: HttpSettings
    description: Description
    tokenizer: PreTrainedTokenizerFast
    scales_to_zero: bool
    """Whether there may be no mixture replica, which the first request then starts."""


class Replicas:
    """The mixture replicas, as the HTTP service sees them; see `serve.service.Service`.

    Args:
        front: what is served.
        handle: of the mixture's deployment.
        application: the application's name in Serve.
        metrics: told of retries.
    """

    def __init__(self, front: Front, handle: DeploymentHandle, application: str, metrics: IngressMetrics) -> None:
        self._front, self._handle, self._metrics = front, handle, metrics
        self._application = application
        self._generate = by_value(handle, "generate")
        self._stream = by_value(handle, "stream", stream=True)
        self._switch = Switch(application)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""
        return self._front.tokenizer

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        """One complete delta for every sequence, in order."""
        for attempt in range(ATTEMPTS):
            response = self._generate.remote(request)
            try:
                result: tuple[list[Delta], Usage] | FlexmoreError = await response
            except BaseException as error:
                response.cancel()
                await self._again_or_raise(error, attempt)
                continue
            if isinstance(result, FlexmoreError):
                raise result
            return result
        raise AssertionError("the last attempt returns or raises")

    async def stream(self, request: Request) -> AsyncGenerator[list[Delta] | Usage, None]:
        """What is new since the last item, and at the end the usage. Closing it cancels the request."""
        for attempt in range(ATTEMPTS):
            response: Any = self._stream.remote(request)
            started = False
            try:
                async for item in response:
                    if isinstance(item, FlexmoreError):
                        raise item
                    started = True
                    yield item
                return
            except BaseException as error:
                response.cancel()
                await self._again_or_raise(error, ATTEMPTS if started else attempt)

    async def _again_or_raise(self, error: BaseException, attempt: int) -> None:
        """Return where another replica may answer, else raise what the client shall be told."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, BackPressureError):
            raise QueueFull(f"{cause.args[0]} requests wait already") from None
        if isinstance(cause, DeploymentUnavailableError):
            raise Unavailable("no replica could be started") from None
        ours = isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling()
        stopped = isinstance(error, asyncio.CancelledError) and not ours  # by Serve, with its replica
        if not (stopped or isinstance(cause, _TRANSIENT)):
            raise error
        if attempt + 1 >= (ATTEMPTS if not isinstance(cause, EngineStopped) else ENGINES):
            raise Unavailable("the replica that was at work on the request is gone") from None
        self._metrics.retried()
        await asyncio.sleep(_PAUSE_SECONDS * (attempt + 1))

    async def describe(self) -> Description:
        """What is served."""
        return self._front.description

    async def disabled(self) -> set[str]:
        """Experts that new requests go without."""
        return set(await self._switch.disabled())

    async def set_enabled(self, name: str, enabled: bool) -> None:
        """Give an expert back to new requests, or take it from them."""
        await (self._switch.enable(name) if enabled else self._switch.disable(name))

    async def ready(self) -> bool:
        """Whether a replica answers, or the first request would start one."""
        stats = await self._stats()
        return any(snapshot["alive"] for snapshot in stats) or (self._front.scales_to_zero and not stats)

    async def status(self) -> dict[str, Any]:
        """For the status page."""
        return summarise(await self._stats())

    async def metrics(self) -> str:
        """In Prometheus's text format."""
        return await read_metrics(self._application)

    async def _stats(self) -> list[dict[str, Any]]:
        """What each mixture replica says of itself; those that do not answer are left out."""
        call = self._handle.broadcast("stats")
        try:
            found = await call.results_async(timeout_s=_STATUS_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [snapshot for snapshot in found if isinstance(snapshot, dict)]


def summarise(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """The snapshots of all mixture replicas in one.

    Returns:
        "experts" (share of the weight, whether lost), "replicas" (of each: id, running, waiting, cache use), "queue"
        (sequences that wait), "totals" and "latency" (see `latency`).
    """
    names = list(dict.fromkeys(name for snapshot in stats for name in snapshot["shares"]))
    totals: dict[str, int] = {}
    for snapshot in stats:
        for name, number in snapshot["totals"].items():
            totals[name] = totals.get(name, 0) + number
    tokens = [_tokens(snapshot) for snapshot in stats]
    whole = sum(tokens) or 1
    shares = {
        name: sum(s["shares"].get(name, 0.0) * t for s, t in zip(stats, tokens, strict=True)) / whole for name in names
    }
    lost = {name for snapshot in stats for name in snapshot["lost"]}
    return {
        "experts": {name: {"share": shares[name], "lost": name in lost} for name in names},
        "replicas": [{key: s[key] for key in _OF_REPLICAS} for s in stats],
        "queue": sum(snapshot["waiting"] for snapshot in stats),
        "totals": totals,
        "latency": latency([times for snapshot in stats for times in snapshot["recent"]]),
    }


def latency(recent: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """What the most recent requests took, whichever replica answered them.

    Args:
        recent: as `serve.engine.Engine.stats` has it, of all replicas.

    Returns:
        "requests", of how many this is, 512 at most; and "median" and "p95" (95th percentile) of
        "time_to_first_token_s", "time_per_output_token_s" and "request_s", in seconds; None where nothing is known.
    """
    latest = sorted(recent, key=lambda times: times[0] or 0.0)[-RECENT:]
    columns = list(zip(*latest, strict=True))[1:] or [()] * len(_TIMES)
    return {"requests": len(latest), **dict(zip(_TIMES, map(_percentiles, columns), strict=True))}


def _percentiles(column: Iterable[float | None]) -> dict[str, float | None]:
    values = [seconds for seconds in column if seconds is not None]
    if not values:
        return {"median": None, "p95": None}
    median, p95 = np.quantile(values, (0.5, 0.95)).tolist()
    return {"median": median, "p95": p95}


def _tokens(snapshot: Mapping[str, Any]) -> float:
    totals = snapshot["totals"]
    return float(totals.get("prompt_tokens", 0) - totals.get("cached_tokens", 0) + totals.get("completion_tokens", 0))


class Ingress:
    """Speaks HTTP.

    Args:
        front: what is served.
        mixture: the mixture's deployment.
    """

    async def __init__(self, front: Front, mixture: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        keep_to_loopback()
        context = serve.get_replica_context()
        status = await asyncio.to_thread(serve.status)
        started = int(status.applications[context.app_name].last_deployed_time_s)
        self._front = dataclasses.replace(front, description=dataclasses.replace(front.description, created=started))
        self._metrics = IngressMetrics(context.app_name, context.replica_id.unique_id)
        self._replicas = Replicas(self._front, mixture, context.app_name, self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """For Serve, which mounts it."""
        return _counted(create_app(self._replicas, self._front.http), self._metrics)


def _counted(app: ASGIApp, metrics: IngressMetrics) -> ASGIApp:
    """The same application; every answer's status is counted."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.answered(message["status"])
            await send(message)

        await app(scope, receive, sender if scope["type"] == "http" else send)

    return counted
