"""A node that drains: work in flight is finished, the rest goes elsewhere, and nothing counts as a failure."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

import flexmore_ray.pool
import search.engine
from flexmore_ray.build import build_store
from flexmore_ray.experts import start_experts
from flexmore_ray.placement import Needs
from flexmore_ray.pool import Pool, Queue, Unit
from flexmore_ray.runtime import leaving, nodes, staying
from flexmore_ray.store import open_store
from search.engine import Job, run_jobs
from search.objective import Block
from tests.actors import Scorer, Slow
from tests.chaos.node import get_node
from tests.test_experts import FakeSource, same

pytestmark = pytest.mark.slow

GRACE_SECONDS = 60
PREEMPTED = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION


@pytest.fixture(scope="module")
def cluster(ray_home: None, loopback: None) -> Iterator[Cluster]:
    """A head without CPUs, to which tests add nodes."""
    small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:  # nodes that start in half the time, and have longer for it
        patch.setattr("ray._private.services.get_node", get_node)
        patch.setattr("ray._private.utils.get_dashboard_dependency_error", lambda: ImportError("not wanted"))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def new_node(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Adds nodes with one CPU, and removes what is left of them."""
    added = []

    def add(**more: Any) -> Any:
        added.append(cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, **more))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


def drain(cluster: Cluster, node: Any) -> None:
    """Ask Ray to drain a node, as the notice of a cloud does."""
    deadline = int((time.time() + GRACE_SECONDS) * 1000)
    accepted, reason = GcsClient(address=cluster.address).drain_node(node.node_id, PREEMPTED, "a test", deadline)
    assert accepted, reason


def await_that(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
    return found


def notes(folder: Path, what: str) -> Counter[str]:
    """How often each unit began or ended."""
    return Counter(path.name.split("-")[0] for path in folder.glob(f"*-{what}-*"))


def test_workers_leave_a_node_that_drains(cluster, new_node, tmp_path):
    going, _ = new_node(), new_node()
    actor = ray.remote(num_cpus=1)(Slow)
    workers = Pool(lambda: actor.remote(str(tmp_path), 3.0), Needs(num_cpus=1))
    queue = Queue(Unit(group=i % 2, arguments=(i,), tag=i) for i in range(8))
    results, told = {}, None
    for unit, result in workers.run(queue):
        results[unit.tag] = result
        if told is None and workers.working == 2:
            drain(cluster, going)
            told = time.time()
    assert results == {i: 2 * i for i in range(8)}
    late = [p for p in tmp_path.glob("*-began-*") if p.read_text() == going.node_id and p.stat().st_mtime > told + 2]
    assert not late, "no unit may begin on a node that drains"
    assert all(notes(tmp_path, "ended")[str(i)] == 1 for i in range(8)), "what was in flight is finished there"
    await_that(lambda: going.node_id not in {node["NodeID"] for node in nodes()}, GRACE_SECONDS / 2)
    workers.close()


def test_the_last_node_drains_and_another_comes(cluster, new_node, tmp_path):
    going = new_node()
    actor = ray.remote(num_cpus=1)(Slow)
    workers = Pool(lambda: actor.remote(str(tmp_path), 0.5), Needs(num_cpus=1))
    queue = Queue(Unit(group=0, arguments=(i,), tag=i) for i in range(6))
    results = {}
    for unit, result in workers.run(queue):
        results[unit.tag] = result
        if len(results) == 2:
            drain(cluster, going)
            await_that(lambda: going.node_id in leaving() or going.node_id not in {n["NodeID"] for n in nodes()})
            assert all(node["NodeID"] != going.node_id for node in staying())
            new_node()
    assert results == {i: 2 * i for i in range(6)}
    workers.close()


def test_a_unit_is_not_blamed_for_the_death_of_nodes(cluster, new_node, tmp_path, monkeypatch):
    monkeypatch.setattr(flexmore_ray.pool, "MAX_DEATHS", 2)
    here = [new_node() for _ in range(3)]
    actor = ray.remote(num_cpus=1)(Slow)
    workers = Pool(lambda: actor.remote(str(tmp_path), 15.0), Needs(num_cpus=1))
    killer = threading.Thread(target=kill_nodes, args=(cluster, here, tmp_path))
    killer.start()
    results = [(unit.tag, result) for unit, result in workers.run(Queue([Unit(group=0, arguments=(7,), tag=7)]))]
    killer.join()
    assert notes(tmp_path, "began")["7"] == 3
    assert results == [(7, 14)]
    workers.close()


def kill_nodes(cluster: Cluster, here: list[Any], folder: Path) -> None:
    """Kill the node on which a unit began, twice, the second one when Ray knows of the first."""
    killed: set[str] = set()
    while len(killed) < 2:
        began = {path.read_text() for path in folder.glob("7-began-*")} - killed
        for node in here:
            if node.node_id in began:
                cluster.remove_node(node, allow_graceful=False)
                killed.add(node.node_id)
                await_that(lambda node=node: node.node_id not in {other["NodeID"] for other in nodes()}, 90.0)
        time.sleep(0.1)


def test_workers_without_work_give_their_nodes_back(cluster, new_node, tmp_path, monkeypatch):
    monkeypatch.setattr(flexmore_ray.pool, "_IDLE_SECONDS", 2.0)
    new_node(), new_node()
    actor = ray.remote(num_cpus=1)(Slow)
    workers = Pool(lambda: actor.remote(str(tmp_path), 6.0), Needs(num_cpus=1), size=2)
    queue, seen = Queue(Unit(group=i, arguments=(i,), tag=i) for i in range(3)), []
    for unit, result in workers.run(queue):
        seen.append((unit.tag, result, workers.working))
    assert sorted(tag for tag, _, _ in seen) == [0, 1, 2]
    assert [working for _, _, working in seen][-1] == 1, "the other one had nothing to do for longer than the limit"
    workers.close()


def test_an_expert_moves_with_what_it_has_in_hand(cluster, new_node, tmp_path):
    build_store(FakeSource(), tmp_path / "built")
    store = open_store(tmp_path / "built")
    going, _ = new_node(resources={"spot": 1}), new_node()
    with start_experts(FakeSource(), tmp_path / "store", pin={"math": "spot", "news": "spot"}) as actors:
        assert {place.node for place in actors.places().values()} == {going.node_id}
        before = {name: held.pid for name, held in actors.holdings().items()}
        asked = actors.keys("math")[0]
        assert same(actors.factors(asked, 5), store.factors(asked, 5))
        other = new_node(resources={"spot": 1})
        drain(cluster, going)
        finished = actors.complete()
        await_that(lambda: {place.node for place in actors.places().values()} == {other.node_id})
        after = {name: held.pid for name, held in actors.holdings().items()}
        assert all(before[name] != after[name] for name in before)
        assert finished.manifest["entries"] == store.manifest["entries"]
        await_that(lambda: going.node_id not in {node["NodeID"] for node in nodes()}, GRACE_SECONDS / 2)
        assert same(actors.factors(asked, 5), store.factors(asked, 5))


class Jobs:
    """A source of two jobs of three rungs; does something when a rung comes."""

    def __init__(self, on_rung: Callable[[str, int], None]) -> None:
        blocks = [[Block(task="t", split="validation", documents=(rung,), selection=str(rung))] for rung in range(3)]
        self.jobs = [Job(name=n, ranks={"job": n}, active=1, rungs=blocks, may_stop=False) for n in ("a", "b")]
        self.received: list[tuple[str, int, list[Any]]] = []
        self.finished: list[tuple[str, str | None]] = []
        self.idle = False
        self._on_rung = on_rung

    @property
    def ended(self) -> bool:
        return not self.jobs and len(self.finished) == 2

    def next(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def receive(self, job: Job, rung: int, scores: Any, seconds: float) -> float:
        if scores:
            self.received.append((job.name, rung, list(scores.values())))
            self._on_rung(job.name, rung)
        return 0.5

    def finish(self, job: Job, error: str | None, *, stopped: bool) -> None:
        self.finished.append((job.name, error))


def run_both(jobs: Jobs, folder: Path, deadly: Any = ()) -> list[str]:
    """Run the jobs one after the other; returns what was scored."""
    worker: Any = Scorer(str(folder), deadly)
    contents = {("validation", "t"): ""}
    run_jobs(jobs, worker, contents, Needs(num_cpus=1), rungs=3, reduction=3, workers=1)
    assert jobs.finished == [("a", None), ("b", None)]
    assert jobs.received == [(name, rung, [rung]) for name in "ab" for rung in range(3)]
    return (folder / "scored").read_text().splitlines()


def test_a_trial_whose_actor_dies_goes_on_at_its_rung(cluster, new_node, tmp_path):
    new_node()
    scored = run_both(Jobs(lambda name, rung: None), tmp_path, [("a", 0), ("a", 2), ("b", 1)])
    assert (tmp_path / "died-a-2").exists()
    assert scored == [f"{name} {rung}" for name in "ab" for rung in range(3)], "no rung is computed twice"


def test_trials_leave_nodes_that_drain_and_are_not_blamed(cluster, new_node, tmp_path, monkeypatch):
    monkeypatch.setattr(search.engine, "_RETRIES", 1)
    here = [new_node()]

    def move(name: str, rung: int) -> None:
        if name == "a" and rung < 2:
            here.append(new_node())
            drain(cluster, here[-2])
            await_that(lambda: here[-2].node_id not in {node["NodeID"] for node in staying()})

    scored = run_both(Jobs(move), tmp_path)
    assert len(here) == 3
    assert scored == [f"{name} {rung}" for name in "ab" for rung in range(3)]
