"""An S3-compatible server on the loopback address, and a proxy before it that is slow, fails, or cuts connections."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serve_process import free_port

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "canary-access-key",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-key",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START_SECONDS = 120.0
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@contextlib.contextmanager
def s3_server(port: int | None = None) -> Iterator[str]:
    """moto's S3 in a process of its own, with one empty bucket; gives its URL."""
    port = port or free_port()
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + _START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).close()
                    break
                assert server.poll() is None, "the S3 server ended"
                assert time.monotonic() < end, "the S3 server did not start"
                time.sleep(0.2)
            yield url
        finally:
            server.kill()


def keys(client: Any, prefix: str) -> dict[str, bytes]:
    """Names below a prefix and what the objects hold, without the empty ones that stand for folders."""
    found: dict[str, bytes] = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                body = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(prefix).lstrip("/")] = body
    return found


def client(url: str) -> Any:
    """A client that is independent of the code under test."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name=CREDENTIALS["AWS_REGION"],
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )


Fault = str | None
"""What becomes of a request: None forwards it, "503" or "403" answer so, "cut request" drops the connection when half
of its body has arrived, "cut answer" when half of the answer is sent, "lost" forwards it and sends no answer."""


class Proxy:
    """Forwards requests to a server, and does to some what `fault` says.

    Attributes:
        fault: called with method and path of every request.
        latency: seconds that every request waits.
        seen: method and path of every request.
    """

    def __init__(self, target: str) -> None:
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self.latency = 0.0
        self.seen: list[tuple[str, str]] = []
        self._target = urllib.parse.urlsplit(target).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.seen.append((self.command, self.path))
                time.sleep(proxy.latency)
                fault = proxy.fault(self.command, self.path)
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "cut request":
                    self.rfile.read(max(length // 2, 1))
                    return self._cut()
                body = self.rfile.read(length) if length else b"".join(self._chunks())
                if fault in ("503", "403"):
                    return self._answer(int(fault), [], _SLOW_DOWN if fault == "503" else _DENIED)
                headers = {
                    k: v
                    for k, v in self.headers.items()
                    if k.lower() not in ("expect", "connection", "transfer-encoding")
                }
                connection = http.client.HTTPConnection(proxy._target, timeout=60)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if fault == "lost":
                    return self._cut()
                self._answer(answer.status, answer.getheaders(), content, cut=fault == "cut answer")

            def _chunks(self) -> Iterator[bytes]:
                """The body of a request whose length is not told before; forwarded with its length."""
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                length = str(len(content))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value  # of a HEAD request, that of the object
                    elif name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self._cut()

            def _cut(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing on stderr."""

        return Handler


def use(patch: Any, url: str) -> None:
    """Let this process, and those that it starts, find the server at a URL."""
    from flexmore_ray import storage

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": url}).items():
        patch.setenv(name, value)
    storage._client.cache_clear()
