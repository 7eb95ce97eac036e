"""Where an actor may run: what it asks of a node, and whether the cluster has such a node at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexmore_ray.errors import UsageError

_SHARE = 0.001  # of a custom resource that only says where an actor may run
_NOT_CUSTOM = ("node:", "memory", "object_store_memory", "accelerator_type:")

Node = Mapping[str, Any]
"""A node as `ray.nodes` describes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an actor asks of a node."""

    num_cpus: float = 0
    """CPUs that it reserves."""
    num_gpus: float = 0
    """GPUs on one node; a fraction shares one."""
    pin: str | None = None
    """"LABEL=VALUE" for a node label, the name of a custom resource that the node has, or None for any node."""

    def options(self) -> dict[str, Any]:
        """The same as options of a Ray actor."""
        asked: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        label, equals, value = (self.pin or "").partition("=")
        if equals:
            return asked | {"label_selector": {label: value}}
        return asked | {"resources": {label: _SHARE} if label else {}}

    def met_by(self, node: Node) -> bool:
        """Whether a node has this, were it empty."""
        return self.capacity(node) > 0

    def capacity(self, node: Node) -> float:
        """How many such actors a node can hold, were it empty; infinity where it asks for no CPU and no GPU."""
        resources, (label, equals, value) = node["Resources"], (self.pin or "").partition("=")
        pinned = not label or (node["Labels"].get(label) == value if equals else resources.get(label, 0) > 0)
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        rooms = [resources.get(name, 0) / number // 1 for name, number in asked.items() if number]
        return min(rooms, default=math.inf) if pinned else 0

    def __str__(self) -> str:
        cpus = [f"{self.num_cpus:g} CPU"] if self.num_cpus else []
        gpus = [f"{self.num_gpus:g} GPU"] if self.num_gpus else []
        pin = [f"the {'label' if '=' in self.pin else 'resource'} {self.pin}"] if self.pin else []
        return " and ".join([*cpus, *gpus, *pin]) or "room"


def check_room(needs: Mapping[str, Needs], nodes: Sequence[Node]) -> None:
    """Refuse what no node of the cluster has, rather than wait for it.

    Args:
        needs: by the name of the actor.
        nodes: the nodes that are alive.

    Raises:
        UsageError: says what is asked and what the cluster has.
    """
    for name, need in needs.items():
        if not any(need.met_by(node) for node in nodes):
            raise UsageError(f"{name}: its actor asks for {need} on one node; the cluster has {offer(nodes)}")
    asked = sum(need.num_gpus for need in needs.values())
    if asked > sum(node["Resources"].get("GPU", 0) for node in nodes):
        raise UsageError(
            f"{len(needs)} actors ask for {asked:g} GPUs in all; the cluster has {offer(nodes)}; "
            "give each a smaller fraction of a GPU, or none"
        )


def offer(nodes: Sequence[Node]) -> str:
    """Nodes in words: their CPUs, GPUs and custom resources, and the labels that were given to them."""
    words = []
    for node in nodes:
        resources = {k: v for k, v in node["Resources"].items() if not k.startswith(_NOT_CUSTOM)}
        labels = [f"{k}={v}" for k, v in node["Labels"].items() if not k.startswith("ray.io/")]
        words.append(" ".join([*(f"{k} {v:g}" for k, v in sorted(resources.items())), *labels]) or "nothing")
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {'; '.join(words)}"
