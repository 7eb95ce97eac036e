"""Facts of every node of a cluster, for `flexmore doctor`, within a bounded time.

Each node writes a file of its own into every folder that all of them must share, then looks for the files of the
others: a folder that exists everywhere and is not the same one is found by that.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexmore_ray.cluster.facts import NodeFacts, SilentNode, node_facts, others_seen, remove_left


def gather_here(folders: Mapping[str, str], nonce: str, seconds: float) -> NodeFacts:
    """Facts of this machine, without Ray.

    Args:
        folders: that are to be written, by option.
        nonce: of this look.
        seconds: that each folder has to answer.
    """
    name = "this machine"
    facts = node_facts(name, folders, nonce, seconds, {})
    writers = _writers({name: facts}, folders)
    _, unseen = others_seen(folders, nonce, writers, seconds)
    remove_left({option: folder for option, folder in folders.items() if writers[option]}, nonce, name, seconds)
    return dataclasses.replace(facts, unseen=unseen)


def gather_cluster(
    nodes: Sequence[Mapping[str, Any]], folders: Mapping[str, str], nonce: str, seconds: float
) -> list[NodeFacts | SilentNode]:
    """Facts of every node of the cluster that this process is connected to, in at most three times `seconds`.

    Args:
        nodes: as `ray.nodes` describes them.
        folders: that all of them must share, by option.
        nonce: of this look.
        seconds: for all nodes to answer one of three questions.
    """
    named = {f"{node['NodeManagerAddress']} {node['NodeID'][:6]}": node for node in nodes}
    ids, limit = {name: node["NodeID"] for name, node in named.items()}, seconds / 2
    found: dict[str, Any] = _on_each(
        ids, seconds, node_facts, lambda name: (name, folders, nonce, limit, dict(named[name]["Resources"]))
    )
    answered = {name: ids[name] for name, facts in found.items() if isinstance(facts, NodeFacts)}
    writers = _writers(found, folders)
    seen = _on_each(answered, seconds, others_seen, lambda name: (folders, nonce, writers, limit), clock=True)
    for name, answer in seen.items():
        if isinstance(answer, SilentNode):
            found[name] = answer
            continue
        (now, unseen), sent, received = answer
        unseen = {folder: names for folder, names in unseen.items() if folder not in found[name].unwritable}
        ahead = min(0.0, now - sent) + max(0.0, now - received)
        found[name] = dataclasses.replace(found[name], clock=ahead, unseen=unseen)
    _on_each(answered, seconds, remove_left, lambda name: (folders, nonce, name, limit))
    return list(found.values())


def _writers(found: Mapping[str, NodeFacts | SilentNode], folders: Mapping[str, str]) -> dict[str, list[str]]:
    """By option: the nodes that left a file in its folder."""
    facts = [node for node in found.values() if isinstance(node, NodeFacts)]
    return {
        option: [node.name for node in facts if f"{option} {folder}" not in node.unwritable]
        for option, folder in folders.items()
    }


def _on_each(
    nodes: Mapping[str, str],
    seconds: float,
    function: Callable[..., Any],
    arguments: Callable[[str], tuple[Any, ...]],
    clock: bool = False,
) -> dict[str, Any]:
    """Call a function on nodes, by name and id; a node that fails or is late gives a `SilentNode`.

    With `clock` each answer comes with the time before it was asked and that after it came.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote, sent, names, answers = ray.remote(function), {}, {}, {}
    for name, node_id in nodes.items():
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy, name=f"doctor:{name}")
        sent[name] = time.time()
        names[task.remote(*arguments(name))] = name
    deadline = time.monotonic() + seconds
    while names and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(names), timeout=left)
        received = time.time()
        for reference in ready:
            name = names.pop(reference)
            try:
                value = ray.get(reference)
                answers[name] = (value, sent[name], received) if clock else value
            except ray.exceptions.RayError as error:
                answers[name] = SilentNode(name=name, reason=_last_line(error))
    for reference, name in names.items():
        ray.cancel(reference, force=True)
        answers[name] = SilentNode(name=name, reason=f"it did not answer in {seconds:.0f} s")
    return {name: answers[name] for name in nodes}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
