"""The command `flexmore cluster`: its options, and what its parts print."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.cluster import Cluster, down, home, read_cluster, up
from flexmore_ray.errors import FlexmoreError, UsageError

Result = dict[str, Any]

_NEXT = """
next, in every shell that uses the cluster:

  eval "$(flexmore cluster env)"

and then, for example:

  flexmore doctor
  ray job submit --working-dir . -- flexmore grid plan.yaml --results "$PWD/results"
  ray job submit --working-dir . -- flexmore search --source zoo://nano --tasks nano --budget 0.33x --trials 12 \\
      --limit 24 --out "$PWD/search"
  serve deploy serve.yaml
  flexmore cluster status
  flexmore cluster down
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The parts of the command and their options."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, run: Callable[[argparse.Namespace], Result], help: str) -> argparse.ArgumentParser:
        sub = parts.add_parser(name, help=help, description=f"{help}.")
        sub.set_defaults(run=run)
        for option, text in (("--json", "end with one JSON object on stdout"), ("--debug", "show tracebacks")):
            sub.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)
        return sub

    start = part("up", run_up, "a cluster of this machine with dashboard and token, in the background")
    start.add_argument("--port", type=int, default=6379, metavar="P", help="of the head (default: 6379)")
    start.add_argument("--dashboard-port", type=int, default=8265, metavar="P", help="of the dashboard (default: 8265)")
    start.add_argument("--cpus", type=int, metavar="N", help="CPUs to give out (default: all)")
    start.add_argument("--gpus", type=int, metavar="N", help="GPUs to give out (default: all)")
    start.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="of this machine, so that others can join"
    )
    start.add_argument("--token-file", type=Path, metavar="FILE", help="default: ~/.ray/auth_token; made if missing")
    part("status", run_status, "nodes, resources, jobs and Serve applications; exit status 1 where none runs")
    part("env", run_env, 'what finds the cluster, for a shell: eval "$(flexmore cluster env)"')
    part("down", run_down, "end jobs, Serve and every process of the cluster, and forget its state; its logs stay")


def run_up(args: argparse.Namespace) -> Result:
    """Start the cluster, and say what to type next."""
    exposed = _is_exposed(args.host)
    if exposed:
        _note(
            f"whoever reaches {args.host} and has the token can run any program as you; ports of metrics and of Serve "
            "ask for no token: keep this network closed to others"
        )
    cluster, resumed = up(
        host=args.host,
        port=args.port,
        dashboard_port=args.dashboard_port,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
        token_file=args.token_file,
    )
    result = status(cluster) | {"pid": cluster.pid, "resumed": resumed}
    print(_describe_start(cluster, result))
    if resumed:
        print(_describe_resumption(result))
    if exposed:
        print(_describe_joining(cluster))
    print(_NEXT.rstrip())
    return result


def run_status(args: argparse.Namespace) -> Result:
    """Say what the cluster has, does and holds."""
    cluster = read_cluster()
    if cluster is None or not cluster.is_up():
        died = "the head of the cluster has died; flexmore cluster up goes on with its state, flexmore cluster down"
        print(f"{died} forgets it" if cluster else "no cluster runs; start one with flexmore cluster up")
        return {"running": False, "failed": True}
    result = status(cluster)
    print(_describe_status(result))
    return result


def run_env(args: argparse.Namespace) -> Result:
    """Print what a shell needs to find the cluster."""
    cluster = read_cluster()
    if cluster is None:
        raise FlexmoreError("no cluster runs; start one with flexmore cluster up")
    if not cluster.is_up():
        raise FlexmoreError(f"the head at {cluster.address} has died; flexmore cluster up goes on with its state")
    environment = cluster.environment()
    if not args.json:  # a shell evaluates what is printed
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()))
    return environment


def run_down(args: argparse.Namespace) -> Result:
    """End the cluster, whatever state it is in."""
    ended = down(lambda text: print(text, flush=True))
    if ended is None:
        print("no cluster runs")
        return {"processes": 0}
    print(f"the cluster is down: {ended} processes ended, none left; its logs are in {home() / 'logs'}")
    return {"processes": ended, "logs": str(home() / "logs")}


def status(cluster: Cluster) -> Result:
    """What a running cluster has, does and holds.

    Raises:
        FlexmoreError: its head does not answer.
    """
    try:
        usage = cluster.ask("/api/cluster_status")["data"]["clusterStatus"] or {}
        nodes, jobs, applications = cluster.nodes(), cluster.jobs(), cluster.applications()
    except (OSError, KeyError, TypeError) as error:
        raise FlexmoreError(
            f"the head of the cluster at {cluster.address} runs (process {cluster.pid}) but its dashboard does not "
            f"answer ({error}); see {home() / 'logs'}, or end it with flexmore cluster down"
        ) from None
    used = usage.get("loadMetricsReport", {}).get("usageByNode", {})
    alive = {node["node_id"] for node in nodes}
    return {
        "running": True,
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "logs": str(home() / "logs"),
        "nodes": [_node_facts(node, used.get(node["node_id"], {})) for node in nodes],
        "jobs": [_job_facts(job) for job in jobs if job["driver_node_id"] in {None, *alive}],
        "lost_jobs": [_job_facts(job) for job in jobs if job["driver_node_id"] not in {None, *alive}],
        "applications": {name: about["status"] for name, about in (applications or {}).items()},
        "environment": cluster.environment(),
    }


def _node_facts(node: Result, usage: dict[str, Sequence[float]]) -> Result:
    shown = ("CPU", "GPU", "memory", "object_store_memory", "objectStoreMemory")
    own = {k: v for k, v in node["resources_total"].items() if k in shown or ":" not in k}
    taken = {{"objectStoreMemory": "object_store_memory"}.get(k, k): v[0] for k, v in usage.items()}
    return {
        "node_id": node["node_id"],
        "address": node["node_ip"],
        "head": node["is_head_node"],
        "resources": {name: {"total": total, "used": taken.get(name, 0.0)} for name, total in sorted(own.items())},
        "labels": {k: v for k, v in node["labels"].items() if not k.startswith("ray.io/")},
    }


def _job_facts(job: Result) -> Result:
    name = job["submission_id"] or f"process {job['driver_info']['pid']}"
    sent = (job.get("runtime_env") or {}).get("working_dir", "")
    folder = "." if str(sent).startswith("gcs://") else shlex.quote(str(sent))
    return {
        "name": name,
        "status": job["status"],
        "entrypoint": job["entrypoint"],
        "options": f"--working-dir {folder} " if sent else "",
        "started": job["start_time"] / 1000,
    }


def _is_exposed(host: str) -> bool:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if not address.is_unspecified:
            return not address.is_loopback
    raise UsageError(f"--host: the IP address of this machine that the other nodes reach is needed, got {host!r}")


def _describe_start(cluster: Cluster, result: Result) -> str:
    rows = [
        ["cluster", f"{cluster.address}, {_resources(result['nodes'])}"],
        ["dashboard", f"{cluster.dashboard}; it asks for the token: cat {shlex.quote(cluster.token_file)}"],
        ["logs", result["logs"]],
    ]
    return _aligned(rows)


def _describe_resumption(result: Result) -> str:
    lines = ["\nit goes on with the state of the one before; Serve applications come back within two minutes"]
    if result["lost_jobs"]:
        lines.append(
            "jobs that ended with it; submitted again, from the same folder, they compute only what is missing:"
        )
        lines += [f"  ray job submit {job['options']}-- {job['entrypoint']}" for job in result["lost_jobs"]]
    return "\n".join(lines)


def _describe_joining(cluster: Cluster) -> str:
    return (
        "\nother machines join, with the same token in their ~/.ray/auth_token (chmod 600) and the same versions:\n\n"
        f"  RAY_AUTH_MODE=token ray start --address {cluster.address} --block"
    )


def _describe_status(result: Result) -> str:
    jobs = [*result["jobs"], *({**job, "status": "LOST"} for job in result["lost_jobs"])]
    served = [f"{name} {status}" for name, status in result["applications"].items()]
    rows = [
        ["cluster", f"{result['address']}, {_resources(result['nodes'])}"],
        ["dashboard", result["dashboard"]],
        ["logs", result["logs"]],
        *(["node", _describe_node(node)] for node in result["nodes"]),
        *(["job", _describe_job(job)] for job in jobs),
        *(["serve", text] for text in served),
    ]
    return _aligned(rows if jobs or served else [*rows, ["jobs", "none"]])


def _resources(nodes: list[Result]) -> str:
    parts = [f"{len(nodes)} node{'s' * (len(nodes) != 1)}"]
    for name in ("CPU", "GPU"):
        held = [node["resources"][name] for node in nodes if name in node["resources"]]
        total, used = sum(each["total"] for each in held), sum(each["used"] for each in held)
        if total:
            parts.append(f"{name} {used:g} of {total:g} in use")
    return ", ".join(parts)


def _describe_node(node: Result) -> str:
    words = [node["address"], *(["head"] if node["head"] else [])]
    for name, held in node["resources"].items():
        memory = name.endswith("memory")
        total, used = (f"{held[key] / 2**30:.1f} GiB" if memory else f"{held[key]:g}" for key in ("total", "used"))
        words.append(f"{name.replace('_', ' ')} {used} of {total}")
    return ", ".join([*words, *(f"{label}={value}" for label, value in node["labels"].items())])


def _describe_job(job: Result) -> str:
    minutes = (time.time() - job["started"]) / 60
    entrypoint = textwrap.shorten(job["entrypoint"], 200, placeholder=" ...")
    return f"{job['name']} {job['status'].lower()} for {minutes:.0f} min: {entrypoint}"


def _aligned(rows: list[list[str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
