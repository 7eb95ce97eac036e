"""What a request has to pass before anything else looks at it: a key, a bound on its size, a bound on its time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schema import ApiError, show

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""Paths that need no key: the page, which holds nothing but a program, the probes, the description."""
_DRAINED = 4  # times the limit: so much is read and thrown away, for a client that reads only when it has written
_HELD = 64  # times the limit: so much of bodies is in memory at once, of all requests in work
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}


def key_digest(key: str) -> str:
    """What the service keeps of a key: its SHA-256, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """Who may call what.

    Args:
        api: digests of keys for everything but the admin endpoints; none means that no key is needed.
        admin: digests of keys for everything; none closes the admin endpoints.
    """

    def __init__(self, api: Iterable[str], admin: Iterable[str]) -> None:
        self._api, self._admin = tuple(api), tuple(admin)

    def check(self, connection: HTTPConnection) -> None:
        """Let a call of the API pass.

        Raises:
            ApiError: 401, for want of a key or for an unknown one; 421 where no key is needed and the request is for
                a host name of the internet, under which a web page in a browser here may call its own site.
        """
        if not self._api:
            _check_host(connection)
        if self._api and not _among(connection, (*self._api, *self._admin)):
            raise _unauthorised(connection, "key")

    def check_admin(self, connection: HTTPConnection) -> None:
        """Let a call of an admin endpoint pass.

        Raises:
            ApiError: 401, for want of a key or for an unknown one; 403 for a key of the API, and for
                all where there is no admin key.
        """
        if not self._admin:
            message = (
                "the admin endpoints are closed, as there is no admin key; start the service with an admin_key_file"
            )
            raise ApiError(403, message, code="no_admin_key")
        if _among(connection, self._admin):
            return
        if _among(connection, self._api):
            raise ApiError(403, "an admin key is needed, and this is a key of the API", code="not_an_admin_key")
        raise _unauthorised(connection, "admin key")


def _check_host(connection: HTTPConnection) -> None:
    """Refuse a host name with a dot: a page's own name, which its owner can let point to this machine at any moment.

    Addresses and names like localhost can be nobody's web site. A key, which no such page has, makes this needless.
    """
    host = connection.headers.get("host", "")
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    name = name.strip("[]").rstrip(".").lower()
    if "." not in name or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        message = (
            f"without a key this service answers to an address or to localhost, not to the host {show(name)}; "
            "call it by its address, or start it with a key"
        )
        raise ApiError(421, message, code="unknown_host") from None


def _digest(connection: HTTPConnection) -> str | None:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return hashlib.sha256(key.strip().encode("latin-1")).hexdigest() if scheme.lower() == "bearer" else None


def _among(connection: HTTPConnection, digests: tuple[str, ...]) -> bool:
    """Whether the caller's key is one of these; takes as long for a near miss as for any other."""
    digest = _digest(connection)
    return digest is not None and sum(hmac.compare_digest(digest, known) for known in digests) > 0


def _unauthorised(connection: HTTPConnection, kind: str) -> ApiError:
    wrong = f"unknown {kind}" if _digest(connection) else f"no {kind}; send it as Authorization: Bearer KEY"
    return ApiError(401, wrong, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


class Gate:
    """ASGI middleware: checks the key, reads the body within bounds, and only then calls the application.

    Args:
        app: the application.
        keys: who may call what.
        max_body_bytes: a larger body is refused (413).
        body_timeout_s: a body that takes longer to come is refused (408).
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app, self._keys = app, keys
        self._limit, self._timeout = max_body_bytes, body_timeout_s
        self._held = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send, body = _with_headers(send), bytearray()
        try:
            connection = HTTPConnection(scope)
            if scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_PATHS:
                self._keys.check(connection)
            if await self._read(connection, receive, body):
                await self._app(scope, _replay(bytes(body), receive), send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, connection: HTTPConnection, receive: Receive, body: bytearray) -> bool:
        """Read the body; False if the client is gone."""
        size, more = 0, True
        announced = connection.headers.get("content-length", "")
        if re.fullmatch(r"[0-9]{1,18}", announced) and int(announced) > _DRAINED * self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout):
                while more and size <= _DRAINED * self._limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    size += len(message.get("body", b""))
                    if size <= self._limit:
                        self._hold(message.get("body", b""), body)
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"the body did not come within {self._timeout:g} s; send it faster, or less of it"
            raise ApiError(408, late, code="body_timeout", headers={"connection": "close"}) from None
        if size > self._limit:
            raise self._too_large()
        return True

    def _hold(self, part: bytes, body: bytearray) -> None:
        if self._held + len(part) > _HELD * self._limit:
            message = "the bodies of other requests take all the room there is; try again in a moment"
            raise ApiError(429, message, code="too_many_bodies", headers={"retry-after": "1", "connection": "close"})
        self._held += len(part)
        body += part

    def _too_large(self) -> ApiError:
        message = f"a body has at most {self._limit} bytes, and this one has more; split it into several requests"
        return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that has the whole body first, and then what else comes: that the client is gone."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    async def sender(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sender


def error_response(error: ApiError) -> Response:
    """An error as the client gets it."""
    return json_response(error.content, status=error.status, headers=error.headers)


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body; ASCII, so that any text can be in it."""
    return Response(dump(content), status, headers, media_type="application/json")


def dump(content: Any) -> bytes:
    """JSON in one line. Numbers come back from it exactly."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
