"""The deployments behind the ingress: mixture replicas, and the replicas of each expert placed on its own.

    MixtureReplica    trunk, public expert and low-rank experts in one process; wraps an `Engine`
    ExpertReplica     one expert; mixture replicas hold leases on it and call it once per layer (`serve.remote`)

Both are ordinary classes; `serve.app` makes deployments of them. An error that is meant for the client crosses as a
value, which is cheaper than an exception and leaves no traceback in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Protocol

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.evaluate import use_few_threads
from flexmore_ray.mixture import Mixture, Parts, parse_dtype
from flexmore_ray.source import Guest
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.store import parse_device
from serve.engine import Engine, Limits
from serve.expert import load_expert, open_expert, open_shared
from serve.job import Observer
from serve.metrics import EngineMetrics, ExpertMetrics
from serve.remote import ExpertServer, RemoteExpert
from serve.request import Delta, EngineFailed, Request, Usage
from serve.settings import Settings
from serve.transport import EngineStopped, by_value, keep_to_loopback
from serve.wire import Lease

ENGINE_QUEUE = 4096  # sequences; requests wait in Serve's queue, this only bounds those of many sequences
ITEMS_PER_SECOND = 400  # of all streams of a replica together; one costs about 0.2 ms of CPU time on its way out
SWITCH_SECONDS = 5e-5  # that a step of the engine waits for the event loop: with Python's 5 ms a tenth was lost to it
IDLE_SECONDS = 5.0  # without a request, after which leases are given back where experts may go down to none
LEASE_LIFETIME_SECONDS = 20.0
_LEASE_SECONDS = 120.0  # for Serve to find, or start, a replica
_COLD_START_SECONDS = 120.0  # that a request waits for experts which went down to none
_TICK_SECONDS = 1.0
_REPORT_SECONDS = 5.0  # over which an expert's share of busy time is told


class EngineLike(Protocol):
    """What a mixture replica needs of an `Engine`."""

    def start(self) -> None:
        """Begin to take requests."""

    def stop(self) -> None:
        """End; may be called twice."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        """One complete piece per sequence, in order."""

    def stream(self, request: Request) -> AsyncIterator[list[Delta] | Usage]:
        """What is new since the last item; the last is the usage."""

    def stats(self) -> dict[str, Any]:
        """A snapshot."""


MakeEngine = Callable[[Parts, Settings, Mapping[str, RemoteExpert], Observer], EngineLike]


def load_engine(parts: Parts, settings: Settings, remote: Mapping[str, RemoteExpert], observer: Observer) -> Engine:
    """The engine of a mixture, with its weights loaded; experts in `remote` are left out of memory."""
    mixture = Mixture(parts, parse_device(settings.device), compute_dtype(parts, settings), remote=remote)
    use_few_threads(mixture.shape.hidden_size)
    limits = Limits(
        sequences=settings.max_ongoing_requests,
        queue=ENGINE_QUEUE,
        batch_tokens=settings.max_batch_tokens,
        cache_tokens=settings.cache_tokens,
        max_model_len=settings.max_model_len,
    )
    return Engine(mixture, limits, remote=remote, on_lost=settings.on_lost, observer=observer)


class MixtureReplica:
    """One copy of the mixture, but for the experts placed on their own.

    Args:
        spec: the mixture.
        settings: of the application.
        own: by name, the deployment of each expert placed on its own.
        guests: by name, what is known of those of them whose folder is on their owner's nodes.
        make_engine: what answers requests.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        spec: MixtureSpec,
        settings: Settings,
        own: Mapping[str, DeploymentHandle],
        guests: Mapping[str, Guest],
        make_engine: MakeEngine = load_engine,
    ) -> None:
        keep_to_loopback()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._loop = asyncio.get_running_loop()
        context = serve.get_replica_context()
        self._metrics = EngineMetrics(context.app_name, context.replica_id.unique_id)
        self._id = context.replica_id.unique_id
        self._gives_back = settings.expert_min_replicas == 0
        self._connections = settings.expert_max_replicas
        self._ongoing = self._streams = 0
        self._last = time.monotonic()
        leases = {name: by_value(handle, "lease", stream=True) for name, handle in own.items()}
        parts = await asyncio.to_thread(open_shared, spec, guests, verify=False)
        self._remote = self._link(parts, settings, leases)
        self._engine = await asyncio.to_thread(make_engine, parts, settings, self._remote, self._metrics)
        self._metrics.holds(_weight_bytes(parts, compute_dtype(parts, settings).itemsize, own))
        self._engine.start()
        self._awake: asyncio.Task[None] | None = self._loop.create_task(self._hold())
        self._ticker = self._loop.create_task(self._tick())

    async def generate(self, request: Request) -> tuple[list[Delta], Usage] | FlexmoreError:
        """Answer a request at once: one complete piece per sequence, or why there is none.

        Raises:
            EngineStopped: send it to another replica.
        """
        try:
            async with self._work():
                return await self._engine.generate(request)
        except EngineFailed as error:
            raise EngineStopped(str(error)) from None
        except FlexmoreError as error:
            return error

    async def stream(self, request: Request) -> AsyncIterator[list[Delta] | Usage | FlexmoreError]:
        """Answer it piece by piece; the last item is the usage, or why there is no more.

        Raises:
            EngineStopped: send it to another replica.
        """
        left = len(request.prompts) * request.n  # sequences that have not ended
        self._streams += 1
        try:
            async with self._work(), contextlib.aclosing(self._engine.stream(request)) as items:  # type: ignore[type-var]
                async for item in items:
                    yield item
                    left -= 0 if isinstance(item, Usage) else sum(delta.finish_reason is not None for delta in item)
                    if left and self._streams > 1:  # with more streams each waits longer, and gets more at a time
                        await asyncio.sleep(self._streams / ITEMS_PER_SECOND)
        except EngineFailed as error:
            raise EngineStopped(str(error)) from None
        except FlexmoreError as error:
            yield error
        finally:
            self._streams -= 1

    async def stats(self) -> dict[str, Any]:
        """What the engine looks like now."""
        return {**self._engine.stats(), "replica": self._id}

    def check_health(self) -> None:
        """Fail when the engine has ended, so that Serve replaces the replica."""
        if not self._engine.is_alive:
            raise EngineStopped("the engine has ended")

    async def __del__(self) -> None:
        """For Serve, after the last request."""
        self._ticker.cancel()
        await asyncio.to_thread(self._engine.stop)
        for link in self._remote.values():
            await asyncio.to_thread(link.close)  # which may wait for an attempt to connect, in this loop

    # ---- requests at work

    @contextlib.asynccontextmanager
    async def _work(self) -> AsyncIterator[None]:
        self.check_health()
        self._ongoing += 1
        try:
            if self._remote and self._gives_back:
                await self._wake()
            yield
        finally:
            self._ongoing -= 1
            self._last = time.monotonic()

    async def _tick(self) -> None:
        """Once a second: tell the metrics, and give leases back that nobody uses."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._metrics.report(self._engine.stats())
            idle = not self._ongoing and time.monotonic() - self._last > IDLE_SECONDS
            if idle and self._gives_back and self._awake is not None and self._awake.done():
                self._awake = None
                for link in self._remote.values():
                    link.hold(0)

    # ---- experts placed on their own

    def _link(
        self, parts: Parts, settings: Settings, handles: Mapping[str, DeploymentHandle]
    ) -> dict[str, RemoteExpert]:
        return {
            name: RemoteExpert(
                name,
                functools.partial(self._connect, handle),
                num_layers=parts.source.shape.num_layers,
                hidden_size=parts.source.shape.hidden_size,
                dtype=compute_dtype(parts, settings),
                device=settings.device,
                connections=self._connections,
                lifetime=LEASE_LIFETIME_SECONDS,
            )
            for name, handle in handles.items()
        }

    async def _wake(self) -> None:
        """Hold leases, if they were given back; who comes meanwhile waits for the same."""
        if self._awake is None:
            self._awake = self._loop.create_task(self._hold())
        await asyncio.shield(self._awake)

    async def _hold(self) -> None:
        for link in self._remote.values():
            link.hold(self._connections)
        await asyncio.gather(*(asyncio.to_thread(link.wait, _COLD_START_SECONDS) for link in self._remote.values()))

    def _connect(self, handle: DeploymentHandle) -> Lease:
        """Get a lease, from a thread of `RemoteExpert`."""
        return asyncio.run_coroutine_threadsafe(self._lease(handle), self._loop).result()

    async def _lease(self, handle: DeploymentHandle) -> Lease:
        """A lease, and the handle call that it lasts as long as."""
        call: Any = handle.remote()
        try:
            host, port, secret = await asyncio.wait_for(anext(call), _LEASE_SECONDS)
        except BaseException:
            call.cancel()
            raise
        held = _Held()
        weakref.finalize(held, self._loop.call_soon_threadsafe, call.cancel)
        return Lease(host, port, secret, held)


class _Held:
    """Ends a handle call when the last reference to it goes."""


class ExpertReplica:
    """One expert placed on its own.

    Args:
        spec: the mixture.
        settings: of the application.
        name: of the expert.
        guest: what the mixture was told of it; None where every node reads its folder.
    """

    async def __init__(  # type: ignore[misc]
        self, spec: MixtureSpec, settings: Settings, name: str, guest: Guest | None = None
    ) -> None:
        keep_to_loopback()
        context = serve.get_replica_context()
        self._server, size = await asyncio.to_thread(_serve_expert, spec, settings, name, guest)
        self._metrics = ExpertMetrics(context.app_name, context.replica_id.unique_id, name)
        self._metrics.holds({name: size})
        self._before = (time.monotonic(), 0.0)
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def lease(self) -> AsyncIterator[tuple[str, int, bytes]]:
        """Yield host, port and secret for one connection; ends with the connection, and the connection with it."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        lease = self._server.lease(functools.partial(_set_from_thread, loop, ended))
        yield lease.host, lease.port, lease.secret
        await ended.wait()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve: the share of the time since the last call that was spent computing."""
        share, self._before = self._busy_since(*self._before)
        return {"busy": share}

    def _busy_since(self, since: float, before: float) -> tuple[float, tuple[float, float]]:
        """The share of the time since then that was spent computing, and what to ask with next time."""
        now, busy = time.monotonic(), self._server.load().busy_seconds
        return (busy - before) / max(now - since, 1e-3), (now, busy)

    async def _tick(self) -> None:
        """Tell the metrics every few seconds."""
        last = self._before
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            share, last = self._busy_since(*last)
            self._metrics.report(share, self._server.load().connections)

    async def __del__(self) -> None:
        """For Serve, after the last lease."""
        self._ticker.cancel()
        await asyncio.to_thread(self._server.close)


def _weight_bytes(parts: Parts, width: int, own: Collection[str]) -> dict[str, int]:
    """Memory of a mixture's weights by expert, but for those placed on their own, and of the trunk."""
    count = parts.count()
    numbers = {"trunk": count.total - sum(count.experts.values())} | {
        name: number for name, number in count.experts.items() if number and name not in own
    }
    return {name: number * width for name, number in numbers.items()}


def _serve_expert(spec: MixtureSpec, settings: Settings, name: str, guest: Guest | None) -> tuple[ExpertServer, int]:
    """The server of an expert, and the memory that its weights take."""
    parts = open_expert(spec, name, guest)
    use_few_threads(parts.source.shape.hidden_size)
    expert = load_expert(parts, name, device=settings.device, dtype=compute_dtype(parts, settings))
    return ExpertServer(expert, ray.util.get_node_ip_address()), expert.num_bytes


def _set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


def scale_by_busy_share(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Replicas of an expert placed on its own: as many as keep each below the target share of busy time.

    As long as somebody holds a lease there is one at least. ``target_ongoing_requests`` of the configuration is the
    target share; Serve applies delays and bounds.
    """
    shares = (context.aggregated_metrics or {}).get("busy") or {}
    least = 1.0 if context.total_num_requests > 0 else 0.0
    target: float = context.config.target_ongoing_requests  # type: ignore[union-attr]
    return max(least, sum(shares.values()) / target), {}


def compute_dtype(parts: Parts, settings: Settings) -> Any:
    """What a mixture computes in: as asked, else float32 on the CPU and the checkpoint's own elsewhere."""
    if settings.dtype is not None:
        return parse_dtype(settings.dtype)
    return parse_dtype("float32") if parse_device(settings.device).type == "cpu" else parts.source.dtype
