"""Own-placed experts: the right answers from another process, whatever happens to it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

import serve.remote
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import load_mixture, open_mixture
from flexmore_ray.modeling import _dense_forward
from flexmore_ray.spec import MixtureSpec
from serve.expert import ExpertMatrices, load_expert
from serve.remote import ExpertGone, ExpertServer, RemoteExpert
from serve.wire import CALL, Lease, Link, Shape
from tests.common import random_model, write

LAYERS, H, INNER = 3, 64, 160
SLOW, SLOW_SECONDS = 2, 0.6  # a layer that takes this long
SHAPE = Shape(LAYERS, H, torch.float32)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_serve_remote"])


class SlowExpert(ExpertMatrices):
    """A random expert, the same in every process, with one layer that takes its time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = [(INNER, H), (INNER, H), (H, INNER)]
        super().__init__(
            [tuple(torch.randn(*s, generator=generator) * 0.2 for s in shapes) for _ in range(LAYERS)], ACT2FN["silu"]
        )

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        time.sleep(SLOW_SECONDS if layer == SLOW else 0)
        return super().__call__(layer, x)


EXPERT = SlowExpert()


class Echo:
    """Gives back what it got."""

    num_layers, hidden_size, device = LAYERS, H, torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        return x


def serve_expert(pipe: Connection, options: dict) -> None:
    """An expert replica, in a process of its own: a lease or its load for each word that comes."""
    torch.set_num_threads(1)
    server = ExpertServer(SlowExpert(), "127.0.0.1", **options)
    while True:
        try:
            pipe.send(server.lease() if pipe.recv() == "lease" else server.load())
        except EOFError:
            return


class Replica:
    def __init__(self, **options: int) -> None:
        self._pipe, other = processes.Pipe()
        self._lock = threading.Lock()
        self.process = processes.Process(target=serve_expert, args=(other, options), daemon=True)
        self.process.start()
        other.close()

    def ask(self, word: str):
        with self._lock:
            self._pipe.send(word)
            if not self._pipe.poll(20):
                raise TimeoutError(f"no answer to {word}")
            return self._pipe.recv()

    def lease(self) -> Lease:
        return self.ask("lease")

    def kill(self) -> None:
        self.process.kill()  # as `kill -9` does
        self.process.join()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-")]


@pytest.fixture
def start() -> Iterator[Callable[..., Replica]]:
    """Starts replicas that end with the test."""
    started = []

    def replica(**options: int) -> Replica:
        started.append(Replica(**options))
        return started[-1]

    yield replica
    for each in started:
        each.kill()


@pytest.fixture
def client() -> Iterator[Callable[..., RemoteExpert]]:
    """Makes clients that are closed with the test."""
    made = []

    def remote(connect: Callable[[], Lease], ready: bool = True, **options) -> RemoteExpert:
        shape = {"num_layers": LAYERS, "hidden_size": H, "dtype": torch.float32}
        made.append(RemoteExpert("law", connect, **(shape | options)))
        assert made[-1].wait(30 if ready else 0) == ready
        return made[-1]

    yield remote
    for each in made:
        each.close()


@pytest.fixture
def server() -> Iterator[ExpertServer]:
    """A server of this process."""
    server = ExpertServer(SlowExpert(), "127.0.0.1")
    yield server
    server.close()


def call(remote: RemoteExpert, layer: int, x: Tensor) -> Tensor:
    remote.send(layer, x)
    return remote.receive().clone()


def expected(layer: int, x: Tensor) -> Tensor:
    return ExpertMatrices.__call__(EXPERT, layer, x)


def eventually(holds: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tokens(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, H, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- answers


def test_another_process_answers_to_the_last_bit(start, client):
    replica = start()
    remote = client(replica.lease)
    for layer, number in itertools.product((0, 1), (1, 2, 16, 64, 300)):
        x = tokens(number)
        assert torch.equal(call(remote, layer, x), expected(layer, x))
    assert call(remote, 0, tokens(0)).shape == (0, H)
    eventually(lambda: replica.ask("load").calls == 10)
    load = replica.ask("load")
    assert (load.tokens, load.connections) == (2 * 383, 1)
    assert 0 < load.busy_seconds < 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_pattern_crosses(client, dtype):
    server = ExpertServer(Echo(dtype), "127.0.0.1")
    remote = client(server.lease, dtype=dtype)
    x = torch.randint(0, 256, (50, H * dtype.itemsize), dtype=torch.uint8).view(dtype)  # with NaN and infinity
    assert torch.equal(call(remote, 1, x).view(torch.uint8), x.view(torch.uint8))
    assert torch.equal(call(remote, 1, x[::2]).view(torch.uint8), x[::2].contiguous().view(torch.uint8))
    server.close()


def test_the_caller_works_while_the_expert_does(start, client):
    remote = client(start().lease)
    began = time.monotonic()
    remote.send(SLOW, tokens(4))
    assert time.monotonic() - began < SLOW_SECONDS / 2
    time.sleep(SLOW_SECONDS)
    assert torch.equal(remote.receive(), expected(SLOW, tokens(4)))
    assert time.monotonic() - began < 1.8 * SLOW_SECONDS


def test_a_large_batch_is_divided(start, client):
    replicas = [start(max_tokens=200) for _ in range(2)]
    turns = itertools.cycle(replicas)
    remote = client(lambda: next(turns).lease(), connections=2)
    eventually(lambda: len(remote._links) == 2)
    x = tokens(1501)
    torch.testing.assert_close(call(remote, 1, x), expected(1, x), rtol=0, atol=1e-4)
    eventually(lambda: sum(replica.ask("load").tokens for replica in replicas) == 1501)
    loads = [replica.ask("load") for replica in replicas]
    assert sum(load.calls for load in loads) == 8
    assert min(load.tokens for load in loads) > 500
    for _ in range(10):
        call(remote, 0, tokens(1))  # small ones take turns
    eventually(lambda: min(replica.ask("load").calls for replica in replicas) == 9)


def test_a_mixture_with_an_expert_elsewhere(tmp_path, client):
    folder = write(random_model(), tmp_path / "model")
    spec = MixtureSpec(source=(str(folder),), experts=("public", "math", "news", "code"), ranks={"news": 3})
    parts, whole = open_mixture(spec), load_mixture(spec)
    ids = torch.arange(40).view(2, 20) % 61
    shape = parts.source.shape
    for name in ("math", "news"):
        expert = load_expert(parts, name, device="cpu", dtype=torch.float32)
        server = ExpertServer(expert, "127.0.0.1")
        remote = client(server.lease, num_layers=shape.num_layers, hidden_size=shape.hidden_size)
        divided = load_mixture(spec, remote={name: remote})
        torch.testing.assert_close(divided.model(ids).logits, whole.model(ids).logits, rtol=0, atol=1e-4)
        assert server.load().calls >= shape.num_layers
        server.close()
    full = whole.model.model.layers[1].mlp.experts[1]
    x, one = torch.randn(7, shape.hidden_size), torch.ones(7, 1)
    math = load_expert(parts, "math", device="cpu", dtype=torch.float32)
    assert torch.equal(math(1, x), _dense_forward(full, x, one, ACT2FN["silu"]))
    assert load_expert(parts, "news", device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="did you mean math"):
        load_expert(parts, "maths", device="cpu", dtype=torch.float32)


# ------------------------------------------------------------------------------- faults


def test_a_call_moves_on_when_its_replica_is_killed(start, client):
    replicas = [start(), start()]
    turns = itertools.cycle(replicas)
    remote = client(lambda: next(turns).lease(), connections=2)
    eventually(lambda: len(remote._links) == 2)
    x, waited = tokens(5), []
    right = expected(SLOW, x)
    for _ in range(2):  # of two calls in turn one goes to the replica that is killed
        remote.send(SLOW, x)
        time.sleep(SLOW_SECONDS / 3)
        if replicas[0].process.is_alive():
            replicas[0].kill()
        began = time.monotonic()
        torch.testing.assert_close(remote.receive(), right, atol=1e-5, rtol=1e-5)
        waited.append(time.monotonic() - began)
    assert max(waited) < 3 * SLOW_SECONDS
    assert remote.available
    eventually(lambda: remote.lost == 1)


def test_the_last_replica_is_killed_and_another_comes(start, client):
    replicas = [start(), start(), start()]
    remote = client(replicas[0].lease)
    remote.send(SLOW, tokens(3))
    time.sleep(SLOW_SECONDS / 3)
    replicas[0].kill()
    with pytest.raises(ExpertGone, match=r"expert law: no replica answers \(127.0.0.1"):
        remote.receive()
    assert not remote.available
    with pytest.raises(ExpertGone, match="no replica answers"):
        remote.send(0, tokens(3))
    for fresh in replicas[1:]:
        time.sleep(0.3)  # of attempts in vain
        assert not remote.available
        remote._connect = fresh.lease
        assert remote.wait(5)
        assert torch.equal(call(remote, 1, tokens(3)), expected(1, tokens(3)))
        fresh.kill()
        eventually(lambda: not remote.available, 3)  # noticed without a call
    assert remote.lost == 3


def test_a_replica_that_hangs_is_lost(start, client):
    replicas = [start(), start()]
    remote = client(replicas[0].lease, timeout=0.5)
    os.kill(replicas[0].process.pid, signal.SIGSTOP)
    remote._connect = replicas[1].lease
    began = time.monotonic()
    remote.send(0, tokens(2))
    with pytest.raises(ExpertGone, match="timed out"):
        remote.receive()
    assert 0.4 < time.monotonic() - began < 3
    assert remote.wait(5)
    assert torch.equal(call(remote, 0, tokens(2)), expected(0, tokens(2)))


def test_an_answer_that_nobody_fetched(server, client):
    remote = client(server.lease)
    remote.send(0, tokens(2))
    remote.abandon()
    remote.send(1, tokens(3))
    assert torch.equal(call(remote, 0, tokens(4, seed=1)), expected(0, tokens(4, seed=1)))
    assert remote.lost == 0


def test_connections_are_renewed_under_load_and_given_up_when_told(server, client):
    ended = []
    remote = client(lambda: server.lease(lambda: ended.append(1)), lifetime=0.3)
    right, deadline = expected(0, tokens(3)), time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert torch.equal(call(remote, 0, tokens(3)), right)
    assert len(ended) >= 2
    assert remote.lost == 0
    remote.hold(0)
    eventually(lambda: not remote.available and server.load().connections == 0)
    remote.hold(1)
    assert remote.wait(5)
    assert torch.equal(call(remote, 0, tokens(3)), right)


def test_many_clients_at_once(client):
    server = ExpertServer(SlowExpert(), "127.0.0.1", max_connections=30)
    clients = [client(server.lease) for _ in range(30)]
    right, wrong = expected(0, tokens(3)), []

    def work(remote: RemoteExpert) -> None:
        wrong.extend(1 for _ in range(50) if not torch.equal(call(remote, 0, tokens(3)), right))

    threads = [threading.Thread(target=work, args=(remote,)) for remote in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    eventually(lambda: server.load().calls == 1500)
    with pytest.raises(OSError, match=r"closed|reset"):
        Link(server.lease(), SHAPE)  # one too many
    server.close()
    eventually(lambda: not any(remote.available for remote in clients))


# ------------------------------------------------------------------------------- strangers


def test_strangers_are_dropped_and_disturb_nobody(server, client, caplog, monkeypatch):
    monkeypatch.setattr("serve.wire.GREETING_SECONDS", 0.5)
    remote, silent = client(server.lease), socket.create_connection((server.host, server.port))
    rubbish = [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(80), os.urandom(10_000_000), b"\x00" * 79, b"\x80\x04." * 40]
    for content in rubbish:
        with socket.create_connection((server.host, server.port), timeout=5) as stranger:
            try:
                stranger.sendall(content)
                stranger.shutdown(socket.SHUT_WR if content[:1] != b"G" else socket.SHUT_RD)
            except OSError:
                assert len(content) > 80  # dropped while it was still talking
        assert torch.equal(call(remote, 0, tokens(3)), expected(0, tokens(3)))
    eventually(lambda: "did not say who it is" in caplog.text)
    eventually(lambda: server.load().connections == 1)
    silent.close()
    assert "does not know the secret" in caplog.text
    assert remote.lost == 0


def test_a_lease_lets_one_client_in_once(server, monkeypatch):
    ended = []
    lease = server.lease(lambda: ended.append("used"))
    for secret in (os.urandom(48), lease.secret[:16] + os.urandom(32), b""):
        with pytest.raises(OSError, match=r"closed|reset"):
            Link(lease._replace(secret=secret), SHAPE)
    link = Link(lease, SHAPE)
    with pytest.raises(OSError, match=r"closed|reset"):
        Link(lease, SHAPE)
    assert not ended
    link.close()
    eventually(lambda: ended == ["used"])
    monkeypatch.setattr(serve.remote, "_LEASE_SECONDS", 0.1)
    server.lease(lambda: ended.append("late"))
    eventually(lambda: ended == ["used", "late"])


@pytest.mark.parametrize(("layer", "number"), [(LAYERS, 1), (0, 0), (0, 1025), (2**32 - 1, 2**32 - 1)])
def test_an_absurd_call_ends_its_connection_alone(server, client, caplog, layer, number):
    remote, link = client(server.lease), Link(server.lease(), SHAPE)
    link._sock.sendall(CALL.pack(layer, number))
    assert link._sock.recv(1) == b""
    assert f"got layer {layer} and {number} tokens" in caplog.text
    assert call(remote, 0, tokens(2)).shape == (2, H)
    link.close()


def test_a_failing_expert_and_a_call_cut_short(client, caplog):
    class Failing(Echo):
        def __call__(self, layer: int, x: Tensor) -> Tensor:
            if layer == 1:
                raise RuntimeError("out of memory")
            return x

    server = ExpertServer(Failing(torch.float32), "127.0.0.1", stalled_seconds=0.3)
    remote = client(server.lease)
    link = Link(server.lease(), SHAPE)
    link._sock.sendall(CALL.pack(0, 10) + b"half")
    assert link._sock.recv(1) == b""
    link.close()
    remote.send(1, tokens(1))
    with pytest.raises(ExpertGone, match="closed by its replica"):
        remote.receive()
    assert "out of memory" in caplog.text
    assert remote.wait(5)
    assert torch.equal(call(remote, 0, tokens(1)), tokens(1))
    server.close()


def test_a_client_that_meets_another_kind_of_server(server, client):
    other = client(server.lease, ready=False, dtype=torch.bfloat16)
    eventually(lambda: "the mixture Shape" in other._reason)
    with pytest.raises(ExpertGone, match="bfloat16"):
        other.send(0, tokens(1).bfloat16())
    other.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            for said in (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2, b"flexmor1" + bytes(32) + bytes(45)):
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):  # the other end had enough
                        sock.recv(1000)

        thread = threading.Thread(target=pretend)
        thread.start()
        lease = Lease("127.0.0.1", listener.getsockname()[1], bytes(48))
        for problem in ("of this version", "does not know the lease's secret"):
            with pytest.raises(serve.wire.BrokenRuleError, match=problem):
                Link(lease, SHAPE)
        thread.join()


def test_a_server_closes_after_the_call_it_is_in(client):
    server = ExpertServer(SlowExpert(), "127.0.0.1")
    ended = []
    remote = client(lambda: server.lease(lambda: ended.append(1)))
    server.lease(lambda: ended.append(2))
    remote.send(SLOW, tokens(2))
    time.sleep(SLOW_SECONDS / 3)
    server.close()
    assert torch.equal(remote.receive(), expected(SLOW, tokens(2)))
    eventually(lambda: not remote.available)
    assert {1, 2} <= set(ended)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=1)


def test_the_header_is_as_documented():
    assert CALL.pack(3, 17) == struct.pack(">II", 3, 17)
