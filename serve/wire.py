"""The connection between a mixture replica and an own-placed expert, from byte to byte.

    who      what                                                   bytes
    server   version, nonce                                         8 + 32
    client   lease, nonce, proof                                    16 + 32 + 32
    server   proof, layers, hidden size, tokens of a call, dtype    32 + 4 + 4 + 4 + 1
    client   layer, T, x (T, H)                                     4 + 4 + T * H * itemsize
    server   y (T, H)                                               T * H * itemsize, and so on

A proof is the HMAC (SHA-256) of both nonces under the lease's key, so neither side talks to one that does not know
it. Integers are big-endian; x and y are as they lie in memory. No message holds an object, and each has a length that
its receiver knows beforehand. As between Ray's own processes, nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALL = struct.Struct("!II")
GREETING_SECONDS = 5.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MAGIC = b"flexmor1"
_PROOF = struct.Struct("!16s32s32s")
_ABOUT = struct.Struct("!IIIB")
_NONCE = _PROVEN = 32


class Lease(NamedTuple):
    """What lets one client connect, once."""

    host: str
    port: int
    secret: bytes
    """Its name, 16 bytes, and its key."""
    held: object = None
    """For the client: kept as long as the connection, such as the open handle call that the lease came from."""


class Shape(NamedTuple):
    """What both sides have to agree on."""

    num_layers: int
    hidden_size: int
    dtype: torch.dtype


class BrokenRuleError(Exception):
    """The other end did what no proper one does."""


def new_secret() -> bytes:
    """A secret for one lease."""
    return secrets.token_bytes(48)


def lease_name(secret: bytes) -> bytes:
    """The part of a secret that its owner tells, so that the other side knows which key to expect."""
    return secret[:16]


def greet_client(sock: socket.socket, claim: Callable[[bytes], bytes | None], shape: Shape, max_tokens: int) -> bytes:
    """The server's part of the greeting.

    Args:
        sock: a connection that was just accepted.
        claim: the secret of a lease that is open, by the lease's name, or None.
        shape: of the expert.
        max_tokens: tokens of one call at most.

    Returns:
        The name of the client's lease.

    Raises:
        BrokenRuleError: it has none, or says nothing.
        OSError: it is gone.
    """
    ours = secrets.token_bytes(_NONCE)
    send(sock, _MAGIC, ours, GREETING_SECONDS)
    try:
        name, theirs, proof = _PROOF.unpack(_read(sock, _PROOF.size))
    except TimeoutError as error:
        raise BrokenRuleError("it did not say who it is") from error
    secret = claim(name)
    if secret is None or not hmac.compare_digest(proof, _proof(secret, b"client", ours, theirs)):
        raise BrokenRuleError("it does not know the secret of a lease that is open")
    about = _ABOUT.pack(shape.num_layers, shape.hidden_size, max_tokens, DTYPES.index(shape.dtype))
    send(sock, _proof(secret, b"server", ours, theirs, about), about, GREETING_SECONDS)
    return bytes(name)


class Link:
    """A client's connection to one server, made and greeted.

    Args:
        lease: what the server gave.
        shape: what the client expects of the expert.

    Raises:
        BrokenRuleError: what listens there is not that expert.
        OSError: nothing listens there, or not in time.
    """

    def __init__(self, lease: Lease, shape: Shape) -> None:
        self.held, self.place, self.since = lease.held, f"{lease.host}:{lease.port}", time.monotonic()
        self._sock = socket.create_connection((lease.host, lease.port), timeout=GREETING_SECONDS)
        try:
            prepare(self._sock)
            self.max_tokens = self._greet(lease.secret, shape)
        except BaseException:
            self._sock.close()
            raise

    def _greet(self, secret: bytes, shape: Shape) -> int:
        ours = secrets.token_bytes(_NONCE)
        hello = _read(self._sock, len(_MAGIC) + _NONCE)
        if not hello.startswith(_MAGIC):
            raise BrokenRuleError("what listens there is no expert replica of this version")
        theirs = hello[len(_MAGIC) :]
        answer = _PROOF.pack(lease_name(secret), ours, _proof(secret, b"client", theirs, ours))
        send(self._sock, answer, b"", GREETING_SECONDS)
        proof = _read(self._sock, _PROVEN)
        about = _read(self._sock, _ABOUT.size)
        if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, ours, about)):
            raise BrokenRuleError("what listens there does not know the lease's secret")
        layers, hidden, max_tokens, dtype = _ABOUT.unpack(about)
        if (layers, hidden, DTYPES[dtype]) != shape:
            raise BrokenRuleError(f"the replica has {Shape(layers, hidden, DTYPES[dtype])}, the mixture {shape}")
        return int(max_tokens)

    def send(self, layer: int, tokens: int, x: memoryview, seconds: float) -> None:
        """Send one call, the bytes of x (T, H)."""
        send(self._sock, CALL.pack(layer, tokens), x, seconds)

    def receive(self, y: memoryview, seconds: float) -> None:
        """Receive its answer, the bytes of y (T, H)."""
        if not receive(self._sock, y, seconds):
            raise ConnectionResetError("closed by its replica")

    def is_dead(self) -> bool:
        """Whether an idle connection was closed at the other end, or said what nobody asked for."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close it, and let go of what the lease came from."""
        self._sock.close()
        self.held = None


class Rows:
    """CPU memory for rows (T, H) that come in or go out, used again by every call."""

    def __init__(self, width: int, dtype: torch.dtype, *, pinned: bool) -> None:
        self._width, self._dtype, self._pinned = width, dtype, pinned
        self._size = width * dtype.itemsize
        self._rows = torch.empty(0, width, dtype=dtype)
        self._view = view(self._rows)

    def take(self, tokens: int) -> tuple[Tensor, memoryview]:
        """The first `tokens` rows, and their bytes; what they held before is lost."""
        if len(self._rows) < tokens:
            self._rows = torch.empty(tokens, self._width, dtype=self._dtype, pin_memory=self._pinned)
            self._view = view(self._rows)
        return self._rows[:tokens], self._view[: tokens * self._size]


def view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def prepare(sock: socket.socket) -> None:
    """Send small calls at once, and notice within two minutes where the other machine has vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def send(sock: socket.socket, header: bytes, content: bytes | memoryview, seconds: float) -> None:
    """Send both.

    Raises:
        OSError: the other end is gone, or (TimeoutError) takes nothing for so long.
    """
    sock.settimeout(seconds)
    sent = sock.sendmsg([header, content])
    if sent < len(header) + len(content):
        sock.sendall(header[sent:])
        sock.sendall(content[max(sent - len(header), 0) :])


def receive(sock: socket.socket, into: memoryview, seconds: float | None) -> bool:
    """Fill all of `into`; False where the other end closed before the first byte.

    Raises:
        OSError: it closed in the middle, or (TimeoutError) did not send it all in time; None waits for ever.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    left = into
    while left:
        sock.settimeout(seconds)
        number = sock.recv_into(left)
        if not number and len(left) == len(into):
            return False
        if not number:
            raise ConnectionResetError("closed in the middle of a message")
        left = left[number:]
        if left and deadline is not None:
            seconds = max(deadline - time.monotonic(), 0.001)
    return True


def shutdown(sock: socket.socket, how: int) -> None:
    """Wake whoever waits for a socket, in this process and at the other end."""
    with contextlib.suppress(OSError):  # it may be closed already
        sock.shutdown(how)


def _read(sock: socket.socket, size: int) -> bytes:
    content = bytearray(size)
    if not receive(sock, memoryview(content), GREETING_SECONDS):
        raise ConnectionResetError("closed in the greeting")
    return bytes(content)


def _proof(secret: bytes, *said: bytes) -> bytes:
    return hmac.digest(secret[16:], b"".join(said), "sha256")
