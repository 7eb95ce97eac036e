"""An expert in a process of its own, called once per layer over a connection of its own.

    T   tokens of one call        H   hidden size

    mixture replica                                   expert replica
      RemoteExpert                                      ExpertServer
        connect() --- a handle call that stays open ---> lease()        Serve routes it and counts it as load
        send(layer, x) ------- TCP connection --------> y = expert(layer, x)
        receive() <------------------------------------ y

A call through Ray takes longer than the layer itself (see ``tests/benchmarks/bench_own_expert.py``), and a compiled
graph, its fastest way, serves one caller of an actor only and no Serve replica. So only the lease goes through Serve,
which thereby places, scales and restarts expert replicas, and layer calls go from socket to socket (`serve.wire`).
Nothing here imports Ray.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from serve.expert import Expert
from serve.request import ExpertLost
from serve.wire import (
    CALL,
    DTYPES,
    GREETING_SECONDS,
    BrokenRuleError,
    Lease,
    Link,
    Rows,
    Shape,
    greet_client,
    lease_name,
    new_secret,
    prepare,
    receive,
    send,
    shutdown,
    view,
)

logger = logging.getLogger(__name__)

_LEASE_SECONDS = 30.0  # within which its connection has to come
_WATCH_SECONDS = 0.5  # how often a client looks whether idle connections are still there
_BACK_OFF_SECONDS = (0.1, 2.0)  # first and longest pause between two attempts to connect
_SPLIT_TOKENS = 128  # fewer than this are not worth a second replica


class ExpertGone(ExpertLost):
    """No replica of an own-placed expert answers."""


# ------------------------------------------------------------------------------- the server


class Load(NamedTuple):
    """What an `ExpertServer` has done since it started."""

    calls: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0
    """Time in calls, from their last byte in to their last byte out, added up over connections."""
    connections: int = 0
    """Open now."""


class _Unclaimed(NamedTuple):
    secret: bytes
    ended: Callable[[], None]
    until: float


class ExpertServer:
    """Answers layer calls, a thread for each connection. Stop it with `close`.

    Args:
        expert: what computes the answers.
        host: address to listen on, on a free port; others of the cluster must reach it, and nobody else.
        max_tokens: tokens of one call at most; clients are told and split theirs.
        max_connections: more than this are refused.
        stalled_seconds: a client that takes longer to send or fetch the rest of a call is dropped.
    """

    def __init__(
        self,
        expert: Expert,
        host: str,
        *,
        max_tokens: int = 1024,
        max_connections: int = 256,
        stalled_seconds: float = 60.0,
    ) -> None:
        assert expert.dtype in DTYPES, f"the dtype is one of {DTYPES}, got {expert.dtype}"
        self._expert, self._max_tokens, self._max_connections = expert, max_tokens, max_connections
        self._stalled_seconds = stalled_seconds
        self._lock = threading.Lock()
        self._load = Load()
        self._leases: dict[bytes, _Unclaimed] = {}
        self._open: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._listener = socket.create_server((host, 0), backlog=128)
        self._listener.settimeout(1.0)
        self.host, self.port = self._listener.getsockname()[:2]
        self._acceptor = threading.Thread(target=self._accept, name="expert-accept", daemon=True)
        self._acceptor.start()

    def lease(self, ended: Callable[[], None] = lambda: None) -> Lease:
        """Let one client connect, within 30 seconds.

        Args:
            ended: called from another thread, once, when the connection is closed or did not come.
        """
        secret = new_secret()
        with self._lock:
            closed = self._closing
            if not closed:
                self._leases[lease_name(secret)] = _Unclaimed(secret, ended, time.monotonic() + _LEASE_SECONDS)
        if closed:
            ended()
        return Lease(self.host, self.port, secret)

    def load(self) -> Load:
        """What it has done so far."""
        with self._lock:
            return self._load._replace(connections=len(self._open))

    def close(self) -> None:
        """Finish the calls that have begun, then close every connection; returns when all threads have ended."""
        with self._lock:
            self._closing = True
            leases, threads = list(self._leases.values()), dict(self._open)
            self._leases.clear()
        shutdown(self._listener, socket.SHUT_RDWR)  # wakes the thread that accepts
        self._acceptor.join()
        self._listener.close()
        for sock in threads:
            shutdown(sock, socket.SHUT_RD)
        deadline = time.monotonic() + GREETING_SECONDS
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for sock, thread in threads.items():
            shutdown(sock, socket.SHUT_RDWR)
            thread.join()
        for lease in leases:
            lease.ended()

    def _accept(self) -> None:
        while not self._closing:
            self._expire()
            try:
                sock, (host, port, *_) = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # closing, or out of file descriptors
                if not self._closing:
                    logger.warning("layer calls: no connection can be accepted: %s", error)
                    time.sleep(_WATCH_SECONDS)
                continue
            client = f"{host}:{port}"
            thread = threading.Thread(target=self._serve, args=(sock, client), name=f"expert-{client}", daemon=True)
            with self._lock:
                accepted = len(self._open) < self._max_connections and not self._closing
                if accepted:
                    self._open[sock] = thread
                    thread.start()
            if not accepted:
                logger.warning("layer calls: %s refused: %d connections are open, or closing", client, len(self._open))
                sock.close()

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [self._leases.pop(name) for name, lease in list(self._leases.items()) if lease.until < now]
        for lease in late:
            lease.ended()

    def _serve(self, sock: socket.socket, client: str) -> None:
        ended: Callable[[], None] | None = None
        try:
            prepare(sock)
            ended = self._greet(sock)
            with torch.inference_mode():
                self._answer(sock)
        except BrokenRuleError as error:
            logger.warning("layer calls: %s dropped: %s", client, error)
        except OSError as error:
            logger.info("layer calls: %s is gone: %s", client, error)
        except Exception:
            logger.exception("layer calls: %s dropped: its call failed", client)
        finally:
            sock.close()
            with self._lock:
                del self._open[sock]
            if ended is not None:
                ended()

    def _greet(self, sock: socket.socket) -> Callable[[], None]:
        """Make sure of a client; returns whom to tell when it leaves."""
        expert = self._expert
        shape = Shape(expert.num_layers, expert.hidden_size, expert.dtype)
        name = greet_client(sock, self._secret, shape, self._max_tokens)
        with self._lock:
            lease = self._leases.pop(name, None)
        if lease is None:
            raise BrokenRuleError("its lease was used or ended meanwhile")
        return lease.ended

    def _secret(self, name: bytes) -> bytes | None:
        with self._lock:
            lease = self._leases.get(name)
        return lease.secret if lease else None

    def _answer(self, sock: socket.socket) -> None:
        """Answer calls until the client closes."""
        expert, on_gpu = self._expert, self._expert.device.type != "cpu"
        asked, answers = (Rows(expert.hidden_size, expert.dtype, pinned=on_gpu) for _ in range(2))
        header = memoryview(bytearray(CALL.size))
        while receive(sock, header, None):
            layer, tokens = CALL.unpack(header)
            if layer >= expert.num_layers or not 0 < tokens <= self._max_tokens:
                raise BrokenRuleError(
                    f"a call names a layer below {expert.num_layers} and 1 to {self._max_tokens} tokens, "
                    f"got layer {layer} and {tokens} tokens"
                )
            x, content = asked.take(tokens)
            if not receive(sock, content, self._stalled_seconds):
                raise ConnectionResetError("closed in the middle of a call")
            start = time.perf_counter()
            y = expert(layer, x.to(expert.device))
            if on_gpu:
                y = answers.take(tokens)[0].copy_(y)
            send(sock, b"", view(y.contiguous()), self._stalled_seconds)
            self._count(tokens, time.perf_counter() - start)

    def _count(self, tokens: int, seconds: float) -> None:
        with self._lock:
            load = self._load
            self._load = Load(load.calls + 1, load.tokens + tokens, load.busy_seconds + seconds)


# ------------------------------------------------------------------------------- the client


class RemoteExpert:
    """An expert whose replicas are elsewhere. One thread calls it; a thread of its own connects and reconnects.

    Every connection is replaced by a fresh lease now and then, the new one first: so replicas that were added get
    their share, and those that Serve is about to stop are left before they end.

    Args:
        name: of the expert, for messages.
        connect: gets a lease from a replica; called from another thread, where it may take some seconds and raise.
        num_layers: of the mixture; a replica of another shape or dtype is not used.
        hidden_size: H.
        dtype: what the mixture computes in.
        device: where x is and y shall be.
        connections: how many to hold; large batches are split among them. 0 for none until `hold` asks for some.
        timeout: seconds that a replica may take for one call of at most its `max_tokens` before it counts as lost.
        lifetime: seconds after which a connection is replaced.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Lease],
        *,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        connections: int = 1,
        timeout: float = 10.0,
        lifetime: float = 60.0,
    ) -> None:
        self.name = name
        self.lost = 0
        """Connections that broke or timed out."""
        self._connect, self._shape = connect, Shape(num_layers, hidden_size, dtype)
        self._device, self._timeout, self._lifetime = torch.device(device), timeout, lifetime
        pinned = self._device.type != "cpu"
        self._asked, self._answers = (Rows(hidden_size, dtype, pinned=pinned) for _ in range(2))
        self._layer, self._row_bytes = 0, hidden_size * dtype.itemsize
        self._x = self._y_bytes = memoryview(b"")
        self._y = torch.empty(0, hidden_size, dtype=dtype)
        self._pieces: collections.deque[slice] = collections.deque()  # bytes of x that no replica has
        self._asking: collections.deque[tuple[Link, slice]] = collections.deque()  # bytes that one is working on
        self._links: collections.deque[Link] = collections.deque()  # oldest first, but for rotation
        self._wanted, self._calling, self._closed = connections, False, False
        self._reason = "none was connected yet"
        self._changed = threading.Condition()
        self._keeper = threading.Thread(target=self._keep, name=f"expert-{name}-connect", daemon=True)
        self._keeper.start()

    @property
    def available(self) -> bool:
        """Whether a replica is connected."""
        return bool(self._links)

    def wait(self, seconds: float) -> bool:
        """Wait until a replica is connected, at most so long; returns whether one is."""
        with self._changed:
            self._changed.wait_for(lambda: self._links or self._closed, seconds)
            return bool(self._links)

    def hold(self, connections: int) -> None:
        """Hold so many connections from now on; 0 ends all leases, so that Serve may stop every replica."""
        with self._changed:
            self._wanted = connections
            self._changed.notify_all()

    def send(self, layer: int, x: Tensor) -> None:
        """Ask for y of x (T, H) in `layer`; x must stay as it is until `receive`.

        Raises:
            ExpertGone: no replica is connected.
        """
        assert x.ndim == 2, f"x is (T, H), got {tuple(x.shape)}"
        assert (x.shape[1], x.dtype) == self._shape[1:], f"x is {self._shape[1:]}, got {x.shape[1]}, {x.dtype}"
        if self._asking:
            self.abandon()
        with self._changed:
            self._retire()
            self._links.rotate(1)
            links, self._calling = list(self._links), True
        self._layer, self._x = layer, self._on_cpu(x)
        self._y, self._y_bytes = self._answers.take(len(x))
        max_tokens = min((link.max_tokens for link in links), default=len(x))
        self._pieces = _split(len(x), len(links), max_tokens, self._row_bytes)
        for link in links:
            if self._pieces:
                self._ask(link)
        if self._pieces and not self._asking:
            self._give_up()

    def receive(self) -> Tensor:
        """Wait for the answer to `send`; a piece of it that a replica loses is asked of the next one.

        Returns:
            y (T, H), before the router's weight; on the CPU it lies in memory that the next `send` writes to.

        Raises:
            ExpertGone: no replica is left.
        """
        while self._asking or self._pieces:
            if not self._asking:
                self._ask_any()
            link = self._fetch()
            if self._pieces and link is not None:
                self._ask(link)
        with self._changed:
            self._calling = False
        return self._y if self._device.type == "cpu" else self._y.to(self._device)

    def abandon(self) -> None:
        """Forget what was sent and whose answer nobody will read; waits for it, so that the connection stays."""
        while self._asking:
            self._fetch()
        self._pieces.clear()
        with self._changed:
            self._calling = False

    def close(self) -> None:
        """Close every connection and end the thread, after an attempt to connect that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._keeper.join()
        while self._links:
            self._links.pop().close()

    # One call, in the caller's thread.

    def _on_cpu(self, x: Tensor) -> memoryview:
        if x.device.type == "cpu":
            return view(x.detach().contiguous())
        copy, content = self._asked.take(len(x))
        copy.copy_(x)
        return content

    def _ask(self, link: Link) -> None:
        piece = self._pieces.popleft()
        content = self._x[piece]
        try:
            link.send(self._layer, len(content) // self._row_bytes, content, self._timeout)
        except OSError as error:
            self._pieces.appendleft(piece)
            self._lose(link, str(error))
        else:
            self._asking.append((link, piece))

    def _fetch(self) -> Link | None:
        """Wait for the oldest answer; returns who gave it, None where it was lost."""
        link, piece = self._asking.popleft()
        try:
            link.receive(self._y_bytes[piece], self._timeout)
        except OSError as error:
            self._pieces.appendleft(piece)
            self._lose(link, str(error))
            return None
        return link

    def _ask_any(self) -> None:
        while not self._asking:
            with self._changed:
                link = self._links[0] if self._links else None
            if link is None:
                self._give_up()
            else:
                self._ask(link)

    def _give_up(self) -> None:
        self._pieces.clear()
        with self._changed:
            self._calling = False
        raise ExpertGone(f"expert {self.name}: no replica answers ({self._reason}); it is tried again by itself")

    def _lose(self, link: Link, reason: str) -> None:
        with self._changed:
            self._drop(link, reason)
            self._changed.notify_all()

    # Connections; with the lock held, except for connecting itself.

    def _drop(self, link: Link, reason: str) -> None:
        self.lost += 1
        self._reason = f"{link.place}: {reason}"
        logger.warning("expert %s: connection lost: %s", self.name, self._reason)
        with contextlib.suppress(ValueError):  # it may have been dropped before
            self._links.remove(link)
        link.close()

    def _retire(self) -> None:
        """Close what is more than wanted, the oldest first."""
        while len(self._links) > self._wanted:
            oldest = min(self._links, key=lambda link: link.since)
            self._links.remove(oldest)
            oldest.close()

    def _missing(self) -> bool:
        expired = time.monotonic() - self._lifetime
        return sum(link.since > expired for link in self._links) < self._wanted

    def _keep(self) -> None:
        """Hold as many connections as wanted, until closed."""
        pause = _BACK_OFF_SECONDS[0]
        while True:
            with self._changed:
                if not self._calling:
                    self._retire()
                    for link in [link for link in self._links if link.is_dead()]:
                        self._drop(link, "closed by its replica")
                if not self._missing():
                    self._changed.wait_for(lambda: self._closed or self._missing(), _WATCH_SECONDS)
                if self._closed:
                    return
                if not self._missing():
                    continue
            if self._add_link():
                pause = _BACK_OFF_SECONDS[0]
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, _BACK_OFF_SECONDS[1])

    def _add_link(self) -> bool:
        try:
            link = Link(self._connect(), self._shape)
        except Exception as error:  # whatever `connect` raises, such as Serve's own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if reason != self._reason:
                logger.warning("expert %s: not connected: %s", self.name, reason)
            self._reason = reason
            return False
        with self._changed:
            self._links.append(link)
            self._changed.notify_all()
        return True


def _split(tokens: int, replicas: int, max_tokens: int, row_bytes: int) -> collections.deque[slice]:
    """Bytes of each piece: as few pieces as fit, or one for each replica where that pays; of about one size."""
    if not tokens:
        return collections.deque()
    number = max(math.ceil(tokens / max_tokens), min(replicas, tokens // _SPLIT_TOKENS), 1)
    size = math.ceil(tokens / number)
    return collections.deque(slice(i * row_bytes, min(i + size, tokens) * row_bytes) for i in range(0, tokens, size))
