"""Waiting for an answer, and sending it in pieces, for as long as the client is there and has time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


async def before(deadline: float, work: Awaitable[T]) -> T:
    """Wait for `work`, at most until the event loop's clock says `deadline`.

    Raises:
        TimeoutError: it says so.
    """
    async with asyncio.timeout_at(deadline):
        return await work


class ClientGone(Exception):  # noqa: N818 - an event, not a failure
    """The client closed the connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` for as long as the client is there.

    Args:
        receive: the connection's channel, whose body has been read.
        work: what to do; it is cancelled if the client goes, and if this is.

    Raises:
        ClientGone: the client went first.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events.

    Args:
        events: their bytes; closed at the end, however that comes.
        deadline: of the event loop's clock; a client that has not read everything by then is left.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], deadline: float) -> None:
        super().__init__(headers={"x-accel-buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._deadline = events, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, as ASGI has it."""
        with contextlib.suppress(ClientGone):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                try:
                    await before(self._deadline + 1, send(_body(event, more=True)))
                except TimeoutError:
                    _LOG.warning("a client stopped reading its stream")
                    return
            await send(_body(b"", more=False))


def _body(content: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}
