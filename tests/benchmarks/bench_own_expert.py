"""One call of an expert in another process: what each way takes, and what it adds to the expert's own work.

    python -m tests.benchmarks.bench_own_expert

A call carries x (T, H) float32 and brings back as much. The ways are a Serve handle (by reference, and by value over
gRPC), an actor's method, a compiled graph over that actor, and the connection of `serve.remote`, whose lease comes
over the handle. All are measured in turn, several times, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import ray
import torch
from ray import serve as ray_serve
from ray.dag import InputNode
from torch import Tensor
from transformers.activations import ACT2FN

from flexmore_ray.runtime import cluster
from serve.expert import ExpertMatrices
from serve.remote import ExpertServer, RemoteExpert
from serve.wire import Lease
from tests.benchmarks.bench_grid import own_home

SIZES = [(tokens, hidden) for hidden in (128, 4096) for tokens in (1, 16, 64)]
FFNS = [(tokens, hidden, inner) for hidden, inner in ((128, 344), (1024, 2752)) for tokens in (1, 16, 64)]
LAYERS = 4


class Echo:
    """Gives back what it gets: a call takes as long as the way there and back."""

    num_layers, dtype, device = 1, torch.float32, torch.device("cpu")

    def __init__(self, hidden: int) -> None:
        self.hidden_size = hidden

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        return x


class Owner:
    """Has experts, and answers calls through Ray and beside it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._servers: dict[str, ExpertServer] = {}

    def echo(self, x: np.ndarray) -> np.ndarray:
        return x

    def lease(self, hidden: int, inner: int | None) -> Lease:
        name = f"{hidden} {inner}"
        if name not in self._servers:
            expert = Echo(hidden) if inner is None else ffn(hidden, inner)
            self._servers[name] = ExpertServer(expert, "127.0.0.1")
        return self._servers[name].lease()


def ffn(hidden: int, inner: int) -> ExpertMatrices:
    """A random expert of `LAYERS` layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    layers = [tuple(torch.randn(*s, generator=generator) * 0.05 for s in shapes) for _ in range(LAYERS)]
    return ExpertMatrices(layers, ACT2FN["silu"])


def run(quick: bool = False) -> dict[str, object]:
    """Median microseconds of each way, of an expert in process and in its own process, and their ratios."""
    seconds, rounds = (0.02, 1) if quick else (0.2, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with own_home(), cluster(num_cpus=4), torch.inference_mode():
        ray_serve.start(proxy_location="Disabled")
        handle = ray_serve.run(ray_serve.deployment(Owner).bind(), name="bench", route_prefix=None)
        try:
            result = {
                "transport_us": _transports(handle, seconds, rounds),
                "expert_us": _experts(handle, seconds, rounds),
            }
        finally:
            ray_serve.shutdown()
            torch.set_num_threads(threads)
    _print(result)
    return result


def _transports(handle: ray_serve.handle.DeploymentHandle, seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    by_value = handle.options(_by_reference=False)
    actor = ray.remote(num_cpus=0)(Owner).remote()
    ray.get(actor.echo.remote(np.zeros(1)))
    with InputNode() as node:
        graph = actor.echo.bind(node).experimental_compile()
    result = {}
    for tokens, hidden in SIZES:
        x = torch.ones(tokens, hidden)
        array = x.numpy()
        remote = _connect(handle, hidden, None, num_layers=1)
        ways = {
            "handle": lambda array=array: handle.echo.remote(array).result(),
            "handle_by_value": lambda array=array: by_value.echo.remote(array).result(),
            "actor": lambda array=array: ray.get(actor.echo.remote(array)),
            "compiled_graph": lambda array=array: ray.get(graph.execute(array)),
            "connection": lambda x=x, remote=remote: _call(remote, 0, x),
        }
        result[f"T={tokens} H={hidden}"] = _medians(ways, seconds, rounds)
        remote.close()
    graph.teardown()
    return result


def _experts(handle: ray_serve.handle.DeploymentHandle, seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    result = {}
    for tokens, hidden, inner in FFNS:
        x, expert = torch.randn(tokens, hidden), ffn(hidden, inner)
        remote = _connect(handle, hidden, inner, num_layers=LAYERS)
        ways = {
            "in_process": lambda x=x, expert=expert: [expert(layer, x) for layer in range(LAYERS)],
            "own_process": lambda x=x, remote=remote: [_call(remote, layer, x) for layer in range(LAYERS)],
        }
        medians = {name: value / LAYERS for name, value in _medians(ways, seconds, rounds).items()}
        ratio = medians["own_process"] / medians["in_process"]
        result[f"T={tokens} H={hidden} I={inner}"] = medians | {"ratio": ratio}
        remote.close()
    return result


def _connect(
    handle: ray_serve.handle.DeploymentHandle, hidden: int, inner: int | None, *, num_layers: int
) -> RemoteExpert:
    remote = RemoteExpert(
        "own",
        lambda: handle.lease.remote(hidden, inner).result(timeout_s=20),
        num_layers=num_layers,
        hidden_size=hidden,
        dtype=torch.float32,
    )
    assert remote.wait(20), "the expert's process did not answer"
    return remote


def _call(remote: RemoteExpert, layer: int, x: Tensor) -> Tensor:
    remote.send(layer, x)
    return remote.receive()


def _medians(ways: dict[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            way()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                way()
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _print(result: dict[str, dict[str, dict[str, float]]]) -> None:
    for title, rows in zip(("transport alone, us", "one layer of an expert, us"), result.values(), strict=True):
        names = list(next(iter(rows.values())))
        print(f"{title:<28}" + "".join(f"{name:>17}" for name in names))
        for size, row in rows.items():
            print(
                f"{size:<28}"
                + "".join(f"{row[name]:>17.2f}" if name == "ratio" else f"{row[name]:>17.0f}" for name in names)
            )


if __name__ == "__main__":
    print(json.dumps(run()))
