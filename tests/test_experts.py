"""Expert actors: the plain class without Ray, then actors on a simulated cluster of two nodes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexmore_ray.__main__ import main
from flexmore_ray.build import build_store, decompose_matrix
from flexmore_ray.errors import CheckpointError, FlexmoreError, StoreError, UsageError
from flexmore_ray.expert import Expert, FactorCache, opener
from flexmore_ray.placement import Needs, check_room
from flexmore_ray.source import open_source
from flexmore_ray.spec import MatrixKey
from flexmore_ray.spectra import Factors
from flexmore_ray.store import open_store
from flexmore_ray.transport import Place, direct_transport, pack, received
from tests.common import random_model, state, write
from tests.test_store import FakeSource, contents, flip

KEY = MatrixKey("math", 0, "down_proj")
OTHER = KEY._replace(layer=1)
KEYS = FakeSource().shape.keys("math")
FULL_BYTES = 16 * (16 + 24) * 4
"""Memory of any matrix of `FakeSource` at its full rank 16."""


def expert(folder: Path, source: FakeSource | None = None, **settings: Any) -> Expert:
    return Expert("math", lambda: source or FakeSource(), folder, **settings)


def same(one: Factors, other: Factors) -> bool:
    return torch.equal(one.a, other.a) and torch.equal(one.bt, other.bt)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    build_store(FakeSource(), folder)
    return folder


# ------------------------------------------------------------------------------- the plain class


def test_it_decomposes_when_first_asked_and_another_one_reads_that(tmp_path: Path, built: Path) -> None:
    first = expert(tmp_path)
    assert not list(tmp_path.iterdir())
    given = first.factors(KEY, 5)
    assert same(given, open_store(built).factors(KEY, 5))
    assert len(list((tmp_path / "factors").iterdir())) == 1
    second = expert(tmp_path)
    assert same(second.factors(KEY, 5), given)
    assert torch.equal(second.spectrum(KEY), open_store(built).spectrum(KEY))
    assert (first.holdings().decompositions, second.holdings().decompositions) == (1, 0)


def test_events_are_counted_and_told(tmp_path: Path) -> None:
    told: collections.Counter[str] = collections.Counter()
    it = expert(tmp_path, memory=FULL_BYTES, observe=lambda event, number: told.update({event: number}))
    for key in (KEY, KEY, OTHER, OTHER, KEY):
        it.factors(key, 16)
    expected = {"truncations": 5, "cache_hits": 2, "cache_misses": 3, "decompositions": 2, "evictions": 2}
    assert told == expected
    holdings = dataclasses.asdict(it.holdings())
    assert holdings.items() >= expected.items()
    assert holdings.items() >= {"matrices": 1, "bytes": FULL_BYTES, "stored": 2, "device": "cpu"}.items()


@pytest.mark.parametrize("memory", [0, 500, FULL_BYTES - 1, 2 * FULL_BYTES + 3])
def test_any_budget_is_kept_and_gives_the_same_answers(memory: int, tmp_path: Path, built: Path) -> None:
    it, store = expert(tmp_path, memory=memory), open_store(built)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        key = KEYS[int(torch.randint(len(KEYS), (), generator=generator))]
        rank = int(torch.randint(1, 17, (), generator=generator))
        assert same(it.factors(key, rank), store.factors(key, rank))
        assert it.holdings().bytes <= memory
    assert it.holdings().decompositions == len(KEYS)
    held = [it._cache._held[key] for key in it._cache._held]
    assert it.holdings().bytes == sum(t.untyped_storage().nbytes() for f in held for t in (f.a, f.bt))


def test_what_was_not_asked_for_longest_goes_first() -> None:
    cache, keys = FactorCache(3 * 64), [KEY._replace(layer=i) for i in range(4)]
    factors = Factors(torch.zeros(2, 4), torch.zeros(2, 4))
    assert [cache.put(key, factors) for key in keys[:3]] == [0, 0, 0]
    assert cache.get(keys[0], 2) is factors
    assert cache.get(keys[0], 3) is None
    assert cache.put(keys[3], factors) == 1
    assert [cache.get(key, 1) is not None for key in keys] == [True, False, True, True]
    assert cache.put(keys[1], Factors(torch.zeros(7, 4), torch.zeros(7, 4))) == 0  # larger than the budget
    assert (len(cache), cache.bytes) == (3, 3 * 64)


class SlowSource(FakeSource):
    """A source that counts how often the weights of an expert are read, and holds one of them back."""

    def __init__(self, held_back: MatrixKey | None = None) -> None:
        super().__init__()
        self.held_back, self.asked, self.release = held_back, threading.Event(), threading.Event()

    def digest(self, key: MatrixKey) -> str:
        time.sleep(0.01)
        return super().digest(key)

    def weight(self, key: MatrixKey) -> Tensor:
        if key == self.held_back:
            self.asked.set()
            assert self.release.wait(60)
        return super().weight(key)


def test_two_requests_for_a_matrix_decompose_it_once(tmp_path: Path, built: Path) -> None:
    it, store = expert(tmp_path, SlowSource()), open_store(built)
    asked = [(key, rank) for rank in (3, 16, 9, 1) for key in KEYS]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda pair: it.factors(*pair), asked))
    assert all(same(given, store.factors(*pair)) for pair, given in zip(asked, answers, strict=True))
    assert it.holdings().decompositions == len(KEYS)


def test_a_long_decomposition_holds_nobody_up(tmp_path: Path, built: Path) -> None:
    source = SlowSource(held_back=OTHER)
    source.digest = lambda key: FakeSource.digest(FakeSource(), key)  # type: ignore[method-assign]
    it = expert(tmp_path, source)
    it.factors(KEY, 16)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(it.factors, OTHER, 2)
        assert source.asked.wait(60)
        assert same(it.factors(KEY, 4), open_store(built).factors(KEY, 4))
        assert (it.holdings().decompositions, waiting.done()) == (1, False)
        source.release.set()
        assert same(waiting.result(60), open_store(built).factors(OTHER, 2))


@pytest.mark.parametrize("harm", ["flipped bit", "gone"])
def test_a_damaged_file_is_made_again(harm: str, tmp_path: Path, built: Path) -> None:
    it = expert(tmp_path, memory=0)
    before = it.factors(KEY, 7)
    (path,) = (tmp_path / "factors").iterdir()
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        flip(path, 8 + int.from_bytes(content[:8], "little") + 5)
    assert same(it.factors(KEY, 7), open_store(built).factors(KEY, 7))
    assert same(before, it.factors(KEY, 7)) or harm == "flipped bit"  # it was a view on the damaged file
    assert path.read_bytes() == content
    assert it.holdings().decompositions == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_store_give_the_same_bits(dtype: str, tmp_path: Path) -> None:
    large, small = expert(tmp_path, dtype=dtype), expert(tmp_path, dtype=dtype, memory=0)
    fresh = large.factors(KEY, 6)
    assert fresh.a.dtype == large.dtype == getattr(torch, dtype)
    assert same(fresh, small.factors(KEY, 6))
    assert large.holdings().matrices == 1
    assert small.holdings().decompositions == 0


def test_a_highest_rank(tmp_path: Path, built: Path) -> None:
    it = expert(tmp_path, max_rank=4)
    assert it.max_rank(KEY) == 4
    with pytest.raises(StoreError, match=r"rank 5 asked for expert math, layer 0, down_proj.* goes up to rank 4"):
        it.factors(KEY, 5)
    assert it.holdings().decompositions == 0
    assert it.factors(KEY, 4).rank == 4
    assert same(expert(built, max_rank=4).factors(KEY, 4), open_store(built).factors(KEY, 4))


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 or more, got -1"):
        expert(tmp_path, memory=-1)
    with pytest.raises(UsageError, match=r">= 1.*got 0"):
        expert(tmp_path, max_rank=0)
    with pytest.raises(UsageError, match="cuda:77 cannot be used here"):
        expert(tmp_path, device="cuda:77").factors(KEY, 1)
    with pytest.raises(StoreError, match="holds no factors of expert news"):
        expert(tmp_path).factors(KEY._replace(expert="news"), 1)


def test_an_expert_opens_nothing_of_the_others(tmp_path: Path) -> None:
    model = random_model(3)
    tensors = state(model)
    everything = write(model, tmp_path / "all")
    pairs = []
    for index, name in ((1, "math"), (2, "news")):
        pair = random_model(2)
        own = {k.replace(f"experts.{index}.", "experts.1."): v for k, v in tensors.items() if f"experts.{index}." in k}
        shared = {k: v for k, v in tensors.items() if ".experts." not in k or ".experts.0." in k}
        gates = {k: v[[0, index]] for k, v in tensors.items() if k.endswith("mlp.gate.weight")}
        folder = write(pair, tmp_path / name)
        from safetensors.torch import save_file

        save_file({k: v.contiguous().clone() for k, v in (shared | own | gates).items()}, folder / "model.safetensors")
        pairs.append(f"{name}={folder}")
    names = ("public", "math", "news")
    for source in (open_source([str(everything)], names), open_source(pairs, names)):
        opened = pickle.loads(pickle.dumps(opener(source, "news")))()
        assert opened.experts[0] == "public"
        for key in source.shape.keys("news"):
            assert opened.digest(key) == source.digest(key)
    assert opened.experts == ("public", "math", "news")  # math's folder holds the shared tensors
    assert opener(open_source(pairs), "math")().experts == ("public", "math")


# ------------------------------------------------------------------------- where actors may run

NODES: list[dict[str, Any]] = [
    {"Resources": {"CPU": 2.0, "memory": 9e9, "node:10.0.0.1": 1.0}, "Labels": {"ray.io/node-id": "a"}},
    {"Resources": {"CPU": 1.0, "GPU": 2.0, "site": 1.0}, "Labels": {"owner": "acme"}},
]


@pytest.mark.parametrize(
    "needs", [Needs(), Needs(num_gpus=2), Needs(pin="owner=acme", num_gpus=0.5), Needs(pin="site")]
)
def test_needs_that_a_node_meets(needs: Needs) -> None:
    check_room({"expert math": needs}, NODES)


@pytest.mark.parametrize(
    ("needs", "asked"),
    [
        (Needs(num_gpus=3), "3 GPU"),
        (Needs(pin="owner=other"), "the label owner=other"),
        (Needs(pin="owner"), "the resource owner"),
        (Needs(pin="site", num_gpus=2.5), "2.5 GPU and the resource site"),
    ],
)
def test_needs_that_no_node_meets(needs: Needs, asked: str) -> None:
    message = f"expert math: its actor asks for {asked} on one node; the cluster has 2 nodes: CPU 2; CPU 1 GPU 2 site 1"
    with pytest.raises(UsageError, match=f"{message} owner=acme"):
        check_room({"expert math": needs}, NODES)


def test_more_gpus_in_all_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"6 actors ask for 3 GPUs in all; .*a smaller fraction"):
        check_room({f"expert {i}": Needs(num_gpus=0.5) for i in range(6)}, NODES)


# -------------------------------------------------------------------------------- the transport


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_cross_as_read_only_bytes(dtype: torch.dtype) -> None:
    factors = Factors(torch.randn(8, 6).to(dtype)[:3], torch.randn(8, 4).to(dtype)[:3])
    sent = pickle.dumps(pack({KEY: factors}), protocol=5)
    assert len(sent) < 3 * 10 * 4 + 700  # three rows, not eight
    arrays = tuple(np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape) for array in pack({KEY: factors})[KEY])
    assert not arrays[0].flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = received({KEY: arrays}, dtype)[KEY]
    assert same(given, factors)
    given.a.zero_()
    assert np.array_equal(arrays[0], pack({KEY: factors})[KEY][0])


def test_the_direct_transport_is_chosen_by_where_both_run() -> None:
    def place(node: str, *gpus: str, **about: bool) -> Place:
        return Place(node=node, gpus=gpus, **about)

    assert direct_transport(place("a", "0"), place("a", "0")) == "cuda_ipc"
    assert direct_transport(place("a", "0"), place("a", "1")) is None
    assert direct_transport(place("a", "0"), place("b", "0")) is None
    assert direct_transport(place("a", "0", nixl=True), place("b", "0", nixl=True)) == "nixl"
    assert direct_transport(place("a", "0", nixl=True), place("b", "0")) is None
    assert direct_transport(place("a", "0"), place("a")) is None
    assert direct_transport(place("a"), place("a", "0")) is None
    assert direct_transport(place("a", "0"), place("a", "0", actor=False)) is None


# ---------------------------------------------------------------------------- actors on two nodes


@pytest.fixture(scope="module")
def two_nodes(ray_home: None, loopback: None) -> Iterator[None]:
    """A cluster of two nodes; the second one has a label, a resource and a feigned GPU."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **small})
    try:
        nodes.add_node(num_cpus=2, num_gpus=1, resources={"site": 1}, labels={"owner": "acme"}, **small)
        ray.init(address=nodes.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_a_killed_actor_comes_back_with_the_same_bits(two_nodes: None, tmp_path: Path, built: Path) -> None:
    import ray

    from flexmore_ray.experts import start_experts

    store, pins = open_store(built), {"math": "owner=acme", "news": "site"}
    early, late = (MatrixKey("news", layer, "gate_proj") for layer in range(2))
    with start_experts(FakeSource(), tmp_path, pin=pins, memory=2000) as actors:
        pinned = {n["NodeID"] for n in ray.nodes() if n["Labels"].get("owner") == "acme"}
        assert {place.node for place in actors.places().values()} == pinned
        assert same(actors.factors(early, 5), store.factors(early, 5))
        before = actors.holdings()["news"]
        assert (before.decompositions, actors.commit()) == (1, None)

        # It dies in the middle of the whole, is started again, and the whole is as it should be.
        killed: list[int] = []

        def kill_once(name: str, done: int, total: int, what: str) -> None:
            assert total == 6
            if name == "news" and done == 2 and not killed:
                killed.append(before.pid)
                os.kill(before.pid, signal.SIGKILL)

        finished = actors.complete(kill_once)
        after = actors.holdings()["news"]
        assert killed == [before.pid] != [after.pid]
        assert contents(tmp_path) == contents(built)
        assert finished.manifest["entries"] == store.manifest["entries"]
        assert same(actors.factors(early, 5), store.factors(early, 5))
        assert actors.holdings()["news"].decompositions == after.decompositions <= 4  # this one came from the store

        # A copy, as workers are given it, must not finish the store.
        copy = ray.get(ray.put(actors))
        with pytest.raises(UsageError, match="a copy of the handle"):
            copy.complete()
        layer = copy.truncations(dict.fromkeys(copy.keys("news", layer=1), 3))
        assert list(layer) == [key for key in FakeSource().shape.keys("news") if key.layer == 1]
        assert same(layer[late], store.factors(late, 3))

        everything = {key: 16 for name in actors.experts for key in actors.keys(name)}
        assert all(same(given, store.factors(key, 16)) for key, given in actors.truncations(everything).items())
        assert all(holdings.bytes <= 2000 for holdings in actors.holdings().values())
        (tmp_path / "manifest.json").unlink()
    assert contents(tmp_path) == contents(built)  # the context's end has written the manifest
    assert (tmp_path / "manifest.json").exists()
    with pytest.raises(FlexmoreError, match="expert math: its actor has ended"):
        actors.factors(KEY, 1)


def test_errors_cross_as_they_are(two_nodes: None, tmp_path: Path) -> None:
    """One expert over a direct transport, whose CPU twin passes files: what a GPU's would do."""
    from ray.experimental import register_tensor_transport

    from flexmore_ray.experts import ExpertActors, actor_class
    from tests.rdt import FileTransport

    source = FakeSource(("public", "math"))
    source.changed[OTHER] = torch.full((16, 24), float("nan"))
    register_tensor_transport("FILE", ["cpu"], FileTransport, torch.Tensor)
    actor = actor_class(direct=True).remote("math", opener(source, "math"), tmp_path, threads=1, run="test")
    chosen: list[Place] = []

    def choose(sender: Place, receiver: Place) -> str:
        chosen.append(sender)
        return "FILE"

    with ExpertActors({"math": actor}, source, source.shape, tmp_path, "float32", choose) as actors:
        expected = decompose_matrix(source, KEY).factors
        assert same(actors.factors(KEY, 5), expected.truncate(5))
        assert FileTransport.received == 2
        assert same(actors.factors(KEY, 16), expected)
        assert chosen[0] == actors.places()["math"]
        with pytest.raises(CheckpointError, match="expert math, layer 1, down_proj: NaN or infinity") as caught:
            actors.factors(OTHER, 1)
        assert "\n" not in str(caught.value)
        FileTransport.broken = True
        assert same(actors.factors(KEY, 4), expected.truncate(4))  # through shared memory after all
    assert not (tmp_path / "manifest.json").exists()


def test_what_the_cluster_lacks_is_refused_at_once(two_nodes: None, tmp_path: Path) -> None:
    import ray

    from flexmore_ray.experts import start_experts

    start = time.monotonic()
    with pytest.raises(UsageError, match="expert math: its actor asks for 2 GPU on one node; the cluster has 2 nodes"):
        start_experts(FakeSource(), tmp_path, num_gpus=2)
    with pytest.raises(UsageError, match=r"2 actors ask for 1.5 GPUs in all"):
        start_experts(FakeSource(), tmp_path, num_gpus=0.75)
    with pytest.raises(UsageError, match="the label owner=nobody on one node"):
        start_experts(FakeSource(), tmp_path, pin={"news": "owner=nobody"})
    with pytest.raises(UsageError, match="pin: no domain expert is called 'maths'; did you mean math"):
        start_experts(FakeSource(), tmp_path, pin={"maths": "site"})
    assert time.monotonic() - start < 5

    @ray.remote(num_cpus=0, num_gpus=1)
    class Occupier:
        def there(self) -> None: ...

    occupier = Occupier.remote()
    ray.get(occupier.there.remote())
    with pytest.raises(FlexmoreError, match=r"no actor came up within 2 s for math \(0.5 GPU\), news .*occupy it"):
        start_experts(FakeSource(), tmp_path, num_gpus=0.5, wait=2)
    ray.kill(occupier)


def test_the_command_uses_the_cluster(
    two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import flexmore_ray.experts as experts

    told: list[str] = []
    build = experts.decompose_on_cluster

    def watched(*arguments: Any, progress: Any, **settings: Any) -> Any:
        def both(expert: str, *about: Any) -> None:
            told.append(expert)
            progress(expert, *about)

        return build(*arguments, progress=both, **settings)

    monkeypatch.setattr(experts, "decompose_on_cluster", watched)
    model = str(write(random_model(3), tmp_path / "model"))
    names = "public,math,news"
    command = ["decompose", model, "--experts", names, "--store", str(tmp_path / "store"), "--json"]
    assert main([*command, "--pin", "math=site"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["decomposed"] == 12
    assert collections.Counter(told) == {"math": 6, "news": 6}
    build_store(open_source([model], names.split(",")), tmp_path / "here")
    assert contents(tmp_path / "store") == contents(tmp_path / "here")
    assert main([*command, "--pin", "math"]) == 2
    assert main([*command, "--gpus", "4"]) == 2
    assert "asks for 4 GPU" in capsys.readouterr().err
