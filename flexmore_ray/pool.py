"""An elastic pool of Ray actors that work off a queue of units.

Ray Data's actor pool hands out blocks in order: it can neither prefer the units that share what an actor holds
nor add units that depend on the results of others, and the grid needs both. Here the queue is in the driver:
an actor takes units of the group that it has in memory, else a group that nobody has begun, else it helps
with the largest one. Actors come with the nodes that join and go with those that leave; the units of one that
died go back into the queue. On a node that drains an actor finishes the unit that it computes, if it can, and ends.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from flexmore_ray.errors import FlexmoreError
from flexmore_ray.placement import Needs, offer
from flexmore_ray.runtime import died_with_its_node, leaving, nodes, staying

MAX_DEATHS = 5
"""A unit during which this many actors died, on nodes that lived on, has failed: it takes too much memory, say."""
_LOOK_SECONDS = 1.0  # how often the pool looks at the nodes
_PATIENCE_SECONDS = 60.0
_IDLE_SECONDS = 60.0  # without work, after which an actor's node is better given back
_AHEAD = 2  # units given to an actor at once, so that it never waits for the driver


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """A piece of work for one call of an actor; each is itself alone."""

    group: Hashable
    """Units of one group share what an actor holds."""
    arguments: tuple[Any, ...]
    """Arguments of the actor's method `run`."""
    tag: Any = None
    """What the caller knows the unit by."""


class Queue:
    """Units by group, groups in the order in which they came."""

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self._groups: dict[Hashable, collections.deque[Unit]] = {}
        self._size = 0
        for unit in units:
            self.add(unit)

    def __len__(self) -> int:
        return self._size

    def add(self, unit: Unit, *, first: bool = False) -> None:
        """Add a unit at the end of its group, or at its start."""
        group = self._groups.setdefault(unit.group, collections.deque())
        group.appendleft(unit) if first else group.append(unit)
        self._size += 1

    def take(self, held: Hashable | None, begun: set[Hashable]) -> Unit:
        """The next unit for an actor.

        Args:
            held: the group of the actor's last unit; None for a new actor.
            begun: groups that other actors have in hand.
        """
        group = held if held in self._groups else next((g for g in self._groups if g not in begun), None)
        if group is None:
            group = max(self._groups, key=lambda g: len(self._groups[g]))
        unit = self._groups[group].popleft()
        if not self._groups[group]:
            del self._groups[group]
        self._size -= 1
        return unit


@dataclasses.dataclass(eq=False)
class _Member:
    actor: Any
    node: str | None = None
    """The node it runs on; None until it is ready."""
    group: Hashable | None = None
    units: dict[Any, Unit] = dataclasses.field(default_factory=dict)
    """What it has in hand, by the reference of the result."""
    ready: Any = None
    """Reference of the call `start`."""
    busy: float = dataclasses.field(default_factory=time.monotonic)
    """When it last had work, or was made."""


class Pool:
    """Actors that run units.

    Args:
        create: makes one actor; it has the methods `start()`, called once, which returns the id of its node,
            and `run(*arguments)`.
        needs: what one actor asks of a node.
        size: how many actors; None follows what the nodes can hold at any time.
    """

    def __init__(self, create: Callable[[], Any], needs: Needs, size: int | None = None) -> None:
        self._create, self._needs, self._size = create, needs, size
        self._members: list[_Member] = []
        self._leaving: set[str] = set()  # nodes that drain
        self._losses: dict[Unit, list[str | None]] = {}  # by unit, the nodes on which it was lost
        self._looked = 0.0
        self._since, self._said = time.monotonic(), False
        self._stillborn = 0  # actors in a row that died before they were ready

    @property
    def working(self) -> int:
        """Actors that have started."""
        return sum(member.node is not None for member in self._members)

    def run(self, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        """Work the queue off; yields (unit, result) as they come, an exception as the result of a unit that failed.

        The caller may add units to the queue while it iterates.

        Raises:
            FlexmoreError: no actor can start.
        """
        while queue or any(member.units for member in self._members):
            self._resize(len(queue))
            for member in list(self._members):
                if member.node in self._leaving:
                    self._vacate(member, queue)
                else:
                    self._feed(member, queue)
            yield from self._collect(queue)

    def close(self) -> None:
        """End the actors."""
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()

    def _resize(self, waiting: int) -> None:
        """Have as many actors as there is room and work for."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if not self._said and not self.working and self._looked - self._since > _PATIENCE_SECONDS:
            self._said = True
            waited = f"no worker has started in {_PATIENCE_SECONDS:.0f} s; each asks for {self._needs} on one node"
            print(f"note: {waited}, and the cluster has {offer(nodes())}; waiting", file=sys.stderr, flush=True)
        self._leaving = leaving()
        stay = [node for node in nodes() if node["NodeID"] not in self._leaving]
        wanted = sum(map(self._needs.capacity, stay)) if self._size is None else self._size
        members = [member for member in self._members if member.node not in self._leaving]
        busy = sum(bool(member.units) for member in members)
        for _ in range(len(members), int(min(wanted, busy + waiting))):
            actor = self._create()
            self._members.append(_Member(actor=actor, ready=actor.start.remote()))
        for member in members:
            if member.units or waiting:
                member.busy = self._looked
            elif self._looked - member.busy > _IDLE_SECONDS:
                self._dismiss(member)

    def _feed(self, member: _Member, queue: Queue) -> None:
        if member.node is None:
            return
        ahead = _AHEAD if len(queue) > _AHEAD * len(self._members) else 1
        while queue and len(member.units) < ahead:
            begun = {other.group for other in self._members if other is not member}
            unit = queue.take(member.group, begun)
            member.group = unit.group
            member.units[member.actor.run.remote(*unit.arguments)] = unit

    def _vacate(self, member: _Member, queue: Queue) -> None:
        """Leave a node that drains: no more than the unit that is computed now, and then nothing."""
        for reference in reversed(list(member.units)[1:]):
            queue.add(member.units.pop(reference), first=True)
        if not member.units:
            self._dismiss(member)

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        ray.kill(member.actor)

    def _collect(self, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        """Results that are there, after waiting for one at most as long as the pool may look away."""
        owners = {reference: member for member in self._members for reference in self._references(member)}
        if not owners:
            time.sleep(_LOOK_SECONDS / 10)
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=_LOOK_SECONDS)
        if len(owners) > 1:
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for reference in ready:
            member = owners[reference]
            if member not in self._members:
                continue  # died in this round; its units are back in the queue
            if reference == member.ready:
                self._welcome(member)
            else:
                yield from self._receive(member, reference, queue)

    @staticmethod
    def _references(member: _Member) -> list[Any]:
        return [member.ready] if member.node is None else list(member.units)

    def _welcome(self, member: _Member) -> None:
        try:
            member.node = ray.get(member.ready)
        except RayTaskError as error:
            raise FlexmoreError(f"a worker cannot start: {_reason(error)}") from error
        except RayError as error:  # died before it was ready: the next look replaces it
            self._members.remove(member)
            self._stillborn += not died_with_its_node(member.actor)
            if self._stillborn >= MAX_DEATHS:
                raise FlexmoreError(f"{MAX_DEATHS} workers in a row died while they started: {_line(error)}") from error
        else:
            self._stillborn = 0

    def _receive(self, member: _Member, reference: Any, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        unit = member.units[reference]
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            result = error.cause if isinstance(error.cause, Exception) else error
        except RayActorError:
            yield from self._bury(member, queue)
            return
        except ObjectLostError as error:  # the result went with its node
            del member.units[reference]
            yield from self._again(unit, queue, member.node, error)
            return
        except RayError as error:  # a result that cannot be read here
            result = FlexmoreError(_line(error))
        del member.units[reference]
        yield unit, result

    def _bury(self, member: _Member, queue: Queue) -> Iterator[tuple[Unit, Any]]:
        """Put back the units of an actor that died; only the first of them can be the cause."""
        self._dismiss(member)  # it may yet live, where the network was to blame
        for position, unit in reversed(list(enumerate(member.units.values()))):
            if position == 0:
                text = f"{MAX_DEATHS} workers died while they computed it; out of memory?"
                yield from self._again(unit, queue, member.node, text)
            else:
                queue.add(unit, first=True)
        self._looked = 0.0

    def _again(self, unit: Unit, queue: Queue, node: str | None, reason: object) -> Iterator[tuple[Unit, Any]]:
        """Put back a unit that was lost, unless that was so often that it is to blame.

        An actor's end is often known before that of its node, so it is only now that earlier nodes are looked at.
        """
        there = {other["NodeID"] for other in staying()}
        self._losses[unit] = [place for place in (*self._losses.get(unit, ()), node) if place in there]
        if len(self._losses[unit]) < MAX_DEATHS:
            queue.add(unit, first=True)
        else:
            yield unit, FlexmoreError(_line(reason))


def _reason(error: RayTaskError) -> str:
    cause = error.cause if isinstance(error.cause, BaseException) else error
    return f"{type(cause).__name__}: {_line(cause)}"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:500]
