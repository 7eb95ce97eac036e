"""The elastic pool: every unit exactly once, whatever dies."""

from __future__ import annotations

import time

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.placement import Needs
from flexmore_ray.pool import MAX_DEATHS, Pool, Queue, Unit
from tests.actors import Doubler, Mortal, Odd, Stillborn, Unable


def units(number: int, groups: int) -> list[Unit]:
    return [Unit(group=i % groups, arguments=(i,), tag=i) for i in range(number)]


@given(sizes=st.lists(st.integers(0, 5), max_size=6), held=st.lists(st.integers(0, 6), max_size=30))
def test_the_queue_gives_every_unit_once_and_keeps_to_groups(sizes, held):
    queue = Queue(Unit(group=g, arguments=(), tag=(g, i)) for g, size in enumerate(sizes) for i in range(size))
    left = {g: size for g, size in enumerate(sizes) if size}
    taken = []
    assert len(queue) == sum(sizes)
    while queue:
        mine = held[len(taken) % len(held)] if held else None
        unit = queue.take(mine, set(held))
        if mine in left:
            assert unit.group == mine
        elif set(left) - set(held):
            assert unit.group == min(set(left) - set(held))  # the first that nobody has begun
        else:
            assert left[unit.group] == max(left.values())  # help where most is left
        left[unit.group] -= 1
        left = {g: n for g, n in left.items() if n}
        taken.append(unit.tag)
    assert sorted(taken) == [(g, i) for g, size in enumerate(sizes) for i in range(size)]


def pool(cls, *arguments, size=None, cpus=1.0):
    actor = ray.remote(num_cpus=cpus)(cls)
    return Pool(lambda: actor.remote(*arguments), Needs(num_cpus=cpus), size)


def test_results_of_all_units_and_errors_of_some(local_ray):
    workers = pool(Doubler, size=2)
    queue = Queue([*units(200, 7), Unit(group=3, arguments=(-5,), tag=-5)])
    results = {unit.tag: result for unit, result in workers.run(queue)}
    error = results.pop(-5)
    assert isinstance(error, ValueError)
    assert str(error) == "negative: -5"
    assert {tag: result[0] for tag, result in results.items()} == {i: 2 * i for i in range(200)}
    assert len({result[1] for result in results.values()}) == workers.working == 2
    workers.close()


def test_units_added_while_it_runs(local_ray):
    workers, queue, seen = pool(Doubler, size=1), Queue(units(1, 1)), []
    for unit, _ in workers.run(queue):
        seen.append(unit.tag)
        if unit.tag < 20:
            queue.add(Unit(group="later", arguments=(unit.tag + 1,), tag=unit.tag + 1))
    assert seen == list(range(21))
    workers.close()


def test_as_many_workers_as_the_nodes_hold(local_ray):
    workers = pool(Doubler, cpus=2)
    pids = {result[1] for _, result in workers.run(Queue(units(400, 400)))}
    assert len(pids) <= 2
    workers.close()


def test_units_of_dead_workers_are_done_by_others(local_ray, tmp_path):
    workers = pool(Mortal, str(tmp_path), size=2)
    results = [(unit.tag, result) for unit, result in workers.run(Queue(units(12, 4)))]
    assert sorted(results) == [(i, 2 * i) for i in range(12)]
    workers.close()


def test_a_unit_that_always_kills_its_worker_fails_alone(local_ray, tmp_path):
    workers = pool(Mortal, str(tmp_path), size=1)
    queue = Queue(Unit(group=0, arguments=(i,), tag=i) for i in (1, 13, 2))
    results = {unit.tag: result for unit, result in workers.run(queue)}
    assert isinstance(results[13], FlexmoreError)
    assert f"{MAX_DEATHS} workers died" in str(results[13])
    assert (results[1], results[2]) == (2, 4)
    workers.close()


def test_workers_that_cannot_start_end_the_run(local_ray):
    start = time.monotonic()
    with pytest.raises(FlexmoreError, match="a worker cannot start: FileNotFoundError: /nowhere/source"):
        list(pool(Unable).run(Queue(units(3, 1))))
    assert time.monotonic() - start < 30


def test_workers_that_die_while_they_start_end_the_run(local_ray):
    with pytest.raises(FlexmoreError, match=f"{MAX_DEATHS} workers in a row died while they started"):
        list(pool(Stillborn, size=1).run(Queue(units(3, 1))))


def test_an_error_that_cannot_be_read_here_fails_its_unit_alone(local_ray):
    workers = pool(Odd, size=1)
    results = {unit.tag: result for unit, result in workers.run(Queue(units(3, 1)))}
    assert isinstance(results.pop(1), Exception)
    assert {tag: result[0] for tag, result in results.items()} == {0: 0, 2: 4}
    workers.close()
