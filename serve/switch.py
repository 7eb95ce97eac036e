"""Which experts are switched off for everyone.

The set is in the internal key-value store of the cluster's head, one entry per expert under the application's name:
it survives replicas, redeployments and other mixtures under the same name, and ends with `enable` or with the head
(unless the head itself is made to survive). Every request reads it anew, so what one ingress replica was told holds
for requests at all of them from the moment it answered. Where the store does not answer in time, the last known set
holds, and a change fails; a replica that knows none yet takes no request, lest a withdrawn expert works again.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ray.experimental.internal_kv import internal_kv_get_gcs_client

from flexmore_ray.errors import FlexmoreError
from serve.service import Unavailable

logger = logging.getLogger("ray.serve")

_NAMESPACE = b"flexmore_serve_disabled"
_SECONDS = 1.0  # that a read may take
_CHANGE_SECONDS = 10.0
_SILENT_SECONDS = 30.0  # between two warnings


class Switch:
    """Experts that are switched off, for all replicas of an application.

    Args:
        application: its name in Serve.
    """

    def __init__(self, application: str) -> None:
        self._prefix = f"{application}/".encode()
        self._last: frozenset[str] | None = None
        self._reading: asyncio.Task[frozenset[str]] | None = None
        self._next: asyncio.Task[frozenset[str]] | None = None
        self._warned = -_SILENT_SECONDS

    async def disabled(self) -> frozenset[str]:
        """Names of the experts that are off now.

        Callers that come while a read is under way share the next one: what they get is never older than their call.

        Raises:
            Unavailable: the head does not answer, and never has.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            return await asyncio.shield(self._reading)
        if self._next is None or self._next.done() or self._next is self._reading:
            self._next = asyncio.create_task(self._read_after(self._reading))
        return await asyncio.shield(self._next)

    async def disable(self, expert: str) -> None:
        """Switch an expert off for every request that comes from now on.

        Raises:
            FlexmoreError: the store did not take it.
        """
        await self._change(self._client().async_internal_kv_put, self._prefix + expert.encode(), b"", True)

    async def enable(self, expert: str) -> None:
        """Switch it on again.

        Raises:
            FlexmoreError: the store did not take it.
        """
        await self._change(self._client().async_internal_kv_del, self._prefix + expert.encode(), False)

    async def _change(self, call: object, *args: object) -> None:
        try:
            await call(*args, _NAMESPACE, timeout=_CHANGE_SECONDS)  # type: ignore[operator]
        except Exception as error:  # of Ray's, of several kinds
            reason = " ".join(str(error).split())[:200]
            raise FlexmoreError(f"the cluster's head does not answer ({reason}); try again in a moment") from error

    async def _read_after(self, reading: asyncio.Task[frozenset[str]]) -> frozenset[str]:
        await asyncio.wait([reading])
        self._reading = asyncio.current_task()
        return await self._read()

    async def _read(self) -> frozenset[str]:
        try:
            keys = await self._client().async_internal_kv_keys(self._prefix, _NAMESPACE, timeout=_SECONDS)
        except Exception as error:  # of Ray's, of several kinds: the head is not reachable
            if self._last is None:
                raise Unavailable("the cluster's head does not answer") from error
            now = time.monotonic()
            if now - self._warned > _SILENT_SECONDS:
                logger.warning("disabled experts: the head does not answer, the last known set holds: %s", error)
                self._warned = now
            return self._last
        self._last = frozenset(key[len(self._prefix) :].decode() for key in keys)
        return self._last

    @staticmethod
    def _client():  # type: ignore[no-untyped-def]  # Ray has no type for it
        return internal_kv_get_gcs_client()
