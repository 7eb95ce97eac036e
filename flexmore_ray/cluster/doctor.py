"""The command `flexmore doctor`: what newcomers trip over, each finding with its remedy.

Checks are functions of facts (`flexmore_ray.cluster.facts`) and start nothing. Levels: ok; warning, which may go well;
problem, which will not.
"""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.cluster import read_cluster
from flexmore_ray.cluster.facts import (
    PORTS,
    Access,
    NodeFacts,
    SilentNode,
    Upload,
    gather_access,
    gather_upload,
)
from flexmore_ray.cluster.survey import gather_cluster, gather_here
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.storage import RemotePath, open_path

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_RAY_FULL = 0.95  # used share of its folder's file system at which Ray starts no more work
_NEARLY_FULL = 0.9
_LITTLE_ROOM = 2**30  # bytes
_LARGE_UPLOAD = 100 * 2**20  # bytes
_FEW_FILES, _ENOUGH_FILES = 1024, 8192
_CLOCK_NOTICED, _CLOCK_WRONG = 2.0, 60.0  # seconds
_HEADROOM = 1.2  # memory of a running mixture, by its weights
_MIN_DRIVER = {"11": 450, "12": 525, "13": 580}  # of NVIDIA, by CUDA's major version (its release notes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found."""

    check: str
    level: str
    """ok, warning or problem."""
    text: str
    remedy: str | None = None
    """What to do about it; None where nothing is to be done."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.check:<14} {self.text}{f'; {self.remedy}' if self.remedy else ''}"


Findings = Iterator[Finding]
Nodes = Sequence[NodeFacts]


def check_answers(nodes: Sequence[NodeFacts | SilentNode]) -> Findings:
    """Whether every node said what it was asked."""
    for node in nodes:
        if isinstance(node, SilentNode):
            missing = "ModuleNotFoundError" in node.reason
            remedy = (
                "install flexmore-ray there, as on the head, with the same constraints.txt"
                if missing
                else "see its logs in the dashboard, restart Ray on it, or give --timeout more seconds"
            )
            yield Finding(check="nodes", level=PROBLEM, text=f"{node.name}: {node.reason}", remedy=remedy)
    if nodes and not any(isinstance(node, SilentNode) for node in nodes):
        yield Finding(check="nodes", level=OK, text=f"{len(nodes)} answered: {_names(nodes)}")


def check_versions(nodes: Nodes) -> Findings:
    """Whether all nodes have the same versions of what they exchange pickles and results with."""
    remedy = "install with the same constraints.txt on every node, then restart Ray there"
    equal = []
    for package in nodes[0].versions if nodes else ():
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.versions.get(package, "missing"), []).append(node.name)
        if len(by_version) > 1:
            text = ", ".join(f"{version} on {', '.join(names)}" for version, names in sorted(by_version.items()))
            yield Finding(check="versions", level=PROBLEM, text=f"{package} differs: {text}", remedy=remedy)
        elif "missing" in by_version:
            yield Finding(check="versions", level=PROBLEM, text=f"{package} is not installed", remedy=remedy)
        else:
            equal.append(f"{package} {next(iter(by_version))}")
    if equal:
        yield Finding(check="versions", level=OK, text=", ".join(equal))


def check_folders(nodes: Nodes, folders: Mapping[str, str]) -> Findings:
    """Whether store and results can be written from every node, and are the same place from each."""
    for option, folder in folders.items():
        name = f"{option} {folder}"
        bad = False
        for node in nodes:
            if reason := node.unwritable.get(name):
                bad = True
                remedy = "create the folder with rights for your user, free space on it, or name another"
                if isinstance(open_path(folder), RemotePath):
                    remedy = "check bucket, credentials (in the environment of every node) and AWS_ENDPOINT_URL"
                yield Finding(
                    check="folders",
                    level=PROBLEM,
                    text=f"{name} cannot be written on {node.name}: {reason}",
                    remedy=remedy,
                )
            if others := node.unseen.get(name):
                bad = True
                yield Finding(
                    check="folders",
                    level=PROBLEM,
                    text=f"{name}: what {', '.join(others)} wrote is not there on {node.name}: not the same folder",
                    remedy="mount one shared file system there on every node, or give an s3:// or gs:// URI",
                )
        if not bad and nodes:
            where = "every node" if len(nodes) > 1 else nodes[0].name
            yield Finding(check="folders", level=OK, text=f"{name}: written and read from {where}")


def check_spaces(nodes: Nodes) -> Findings:
    """Whether disks have room; Ray starts nothing more where its folder's is 95 % full."""
    for node in nodes:
        tight = False
        for what, space in node.spaces.items():
            used = 1 - space.free / space.total if space.total else 1.0
            text = f"{what} ({space.path}) on {node.name}: {_size(space.free)} free, {used:.0%} used"
            remedy = "free space, or move it: " + (
                "RAY_TMPDIR" if "Ray" in what else "FLEXMORE_CACHE, --store, --results"
            )
            if "Ray" in what and used >= _RAY_FULL:
                tight = True
                text += f"; Ray starts nothing more at {_RAY_FULL:.0%}"
                yield Finding(check="disk", level=PROBLEM, text=text, remedy=remedy)
            elif used >= _RAY_FULL and space.free < _LITTLE_ROOM:
                tight = True
                yield Finding(check="disk", level=PROBLEM, text=text, remedy=remedy)
            elif used >= _NEARLY_FULL or space.free < _LITTLE_ROOM:
                tight = True
                yield Finding(check="disk", level=WARNING, text=text, remedy=remedy)
        if not tight:
            least = min((space.free for space in node.spaces.values()), default=0)
            yield Finding(check="disk", level=OK, text=f"{node.name}: {_size(least)} free at least")


def check_shared_memory(nodes: Nodes) -> Findings:
    """Whether /dev/shm can hold Ray's object store, which otherwise lies on the disk."""
    for node in nodes:
        space = node.shared_memory
        if space is None:
            continue
        text = f"/dev/shm on {node.name}: {_size(space.total)}"
        if node.object_store > space.total:
            yield Finding(
                check="shared memory",
                level=PROBLEM,
                text=f"{text}, less than Ray's object store of {_size(node.object_store)}, which then lies on the disk",
                remedy="give containers more (docker run --shm-size, an emptyDir of medium Memory), or start Ray with "
                "a smaller --object-store-memory",
            )
        elif space.total < 2**28:
            yield Finding(
                check="shared memory",
                level=WARNING,
                text=f"{text}: Ray's object store has little room",
                remedy="give containers more: docker run --shm-size, an emptyDir of medium Memory",
            )
        else:
            yield Finding(check="shared memory", level=OK, text=text)


def check_gpus(nodes: Nodes) -> Findings:
    """Whether GPUs that are installed are given out by Ray and can be used by torch."""
    for node in nodes:
        gpus = node.gpus
        if gpus is None or not gpus.installed:
            if node.given_gpus:
                yield Finding(
                    check="GPUs",
                    level=PROBLEM,
                    text=f"{node.name}: Ray gives out {node.given_gpus:g} GPUs, the driver shows none",
                    remedy="install the driver, in a container run it with --gpus all, or start Ray with --num-gpus 0",
                )
            else:
                yield Finding(check="GPUs", level=OK, text=f"{node.name}: none")
        elif gpus.seen < gpus.installed or gpus.error:
            yield Finding(check="GPUs", level=PROBLEM, **_why_unusable(node, gpus))
        elif node.given_gpus < gpus.installed and node.object_store:
            yield Finding(
                check="GPUs",
                level=WARNING,
                text=f"{node.name}: {gpus.installed} installed, Ray gives out {node.given_gpus:g}",
                remedy="start Ray there with --num-gpus",
            )
        else:
            sizes = ", ".join(_size(each) for each in gpus.bytes)
            about = f"{gpus.seen} ({sizes}), driver {gpus.driver}, CUDA {gpus.runtime}"
            yield Finding(check="GPUs", level=OK, text=f"{node.name}: {about}")


def _why_unusable(node: NodeFacts, gpus: Any) -> dict[str, str]:
    text = f"{node.name}: {gpus.installed} installed, torch sees {gpus.seen}"
    if gpus.runtime is None:
        return {"text": f"{text}, as it was built without CUDA", "remedy": "install a build of torch for CUDA there"}
    needed = _MIN_DRIVER.get(gpus.runtime.split(".")[0], 0)
    if gpus.driver and int(gpus.driver.split(".")[0]) < needed:
        text += f": driver {gpus.driver} is too old for torch's CUDA {gpus.runtime}"
        return {"text": text, "remedy": f"install driver {needed} or newer, or torch for an older CUDA"}
    reason = f" ({' '.join(gpus.error.split())[:200]})" if gpus.error else ""
    return {"text": text + reason, "remedy": "see nvidia-smi there; restart the node or its container"}


def check_mixture(nodes: Nodes, size: int) -> Findings:
    """Whether a mixture of `size` bytes fits into the memory of a node, or of one of its GPUs."""
    need = int(size * _HEADROOM)
    for node in nodes:
        gpus = max(node.gpus.bytes, default=0) if node.gpus else 0
        kind, room = ("a GPU", gpus) if gpus else ("memory", node.memory)
        text = (
            f"{node.name}: the mixture takes {_size(size)}, about {_size(need)} while it runs; {kind} has {_size(room)}"
        )
        if need <= room:
            yield Finding(check="memory", level=OK, text=text)
        else:
            remedy = "lower ranks, use --dtype bfloat16, or a node with more"
            yield Finding(check="memory", level=PROBLEM if size > room else WARNING, text=text, remedy=remedy)


def check_limits(nodes: Nodes) -> Findings:
    """Open files, home folders, threads."""
    for node in nodes:
        if node.open_files < _ENOUGH_FILES:
            yield Finding(
                check="open files",
                level=PROBLEM if node.open_files < _FEW_FILES else WARNING,
                text=f"{node.name}: at most {node.open_files:,} of a process; Ray opens one for each connection",
                remedy="raise it before Ray starts: ulimit -n 65536, or LimitNOFILE in its unit",
            )
        if node.home:
            yield Finding(
                check="home",
                level=PROBLEM,
                text=f"{node.name}: the home folder cannot be written ({node.home})",
                remedy="set HOME to a folder that can: Ray's token and the cache are kept there",
            )
        if (node.threads or "1") != "1" and node.cpus > 1:
            yield Finding(
                check="threads",
                level=WARNING,
                text=f"{node.name}: OMP_NUM_THREADS={node.threads}: each of {node.cpus} workers would use as many",
                remedy="unset it before Ray starts: Ray then gives each worker as many as it reserves CPUs",
            )
    if nodes and all(n.open_files >= _ENOUGH_FILES and not n.home and (n.threads or "1") == "1" for n in nodes):
        yield Finding(check="limits", level=OK, text="open files, home folder, threads")


def check_clocks(nodes: Nodes) -> Findings:
    """Whether clocks agree; signatures of object stores and ages of files depend on them."""
    wrong = [node for node in nodes if abs(node.clock) > _CLOCK_NOTICED]
    for node in wrong:
        yield Finding(
            check="clocks",
            level=PROBLEM if abs(node.clock) > _CLOCK_WRONG else WARNING,
            text=f"{node.name}: its clock is {abs(node.clock):.0f} s {'ahead' if node.clock > 0 else 'behind'}",
            remedy="synchronise clocks (chrony, systemd-timesyncd)",
        )
    if len(nodes) > 1 and not wrong:
        yield Finding(check="clocks", level=OK, text=f"within {_CLOCK_NOTICED:.0f} s on {len(nodes)} nodes")


def check_upload(upload: Upload) -> Findings:
    """Whether a working directory is small enough to be sent with a job."""
    more = "more than " if upload.partial else ""
    text = f"{upload.folder}: {more}{upload.files:,} files, {_size(upload.bytes)} before compression"
    remedy = "list what a job does not need in .rayignore (as .gitignore), or submit from a smaller folder"
    largest = ", ".join(f"{path} {_size(size)}" for path, size in upload.largest)
    if upload.bytes >= upload.limit:
        text += f"; Ray takes {_size(upload.limit)}; largest: {largest}"
        yield Finding(check="working dir", level=PROBLEM, text=text, remedy=remedy)
    elif upload.partial or upload.bytes > _LARGE_UPLOAD:
        yield Finding(check="working dir", level=WARNING, text=f"{text}; largest: {largest}", remedy=remedy)
    else:
        yield Finding(check="working dir", level=OK, text=text)


def check_access(access: Access) -> Findings:
    """Whether the token is there, private, and the cluster's; or, without a cluster, whether its ports are free."""
    yield from _check_token_file(access)
    for port, reason in access.taken_ports.items():
        yield Finding(
            check="ports",
            level=WARNING,
            text=f"{port} cannot be listened on ({reason})",
            remedy=f"end what holds it (ss -ltnp), or choose another: {PORTS[port]}",
        )
    if access.address is None:
        if not access.taken_ports:
            yield Finding(check="ports", level=OK, text=f"{', '.join(map(str, PORTS))} are free, or our cluster's")
        return
    if access.with_token == 200 and access.without_token == 200:
        yield Finding(
            check="token",
            level=PROBLEM,
            text=f"the cluster at {access.address} lets everyone in: whoever reaches its ports runs programs on it",
            remedy="start it with RAY_AUTH_MODE=token, as flexmore cluster up does",
        )
    elif access.with_token in (401, 403):
        yield Finding(
            check="token",
            level=PROBLEM,
            text=f"the cluster at {access.address} does not accept this token (HTTP {access.with_token})",
            remedy="copy the head's ~/.ray/auth_token to this machine (chmod 600), or point RAY_AUTH_TOKEN_PATH to it",
        )
    elif access.with_token == 200:
        yield Finding(check="token", level=OK, text=f"{access.dashboard} takes this token, and asks for one")
    else:
        yield Finding(
            check="dashboard",
            level=WARNING,
            text=f"{access.dashboard} does not answer ({access.with_token})",
            remedy="set RAY_API_SERVER_ADDRESS to its URL; from elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD",
        )
    if access.refused:
        yield Finding(
            check="cluster",
            level=PROBLEM,
            text=access.refused,
            remedy='for a cluster of this machine: eval "$(flexmore cluster env)"',
        )


def _check_token_file(access: Access) -> Findings:
    if access.token_file is None:
        yield Finding(
            check="token",
            level=WARNING,
            text="it is in RAY_AUTH_TOKEN, which goes before any file and which every child process sees",
            remedy="unset RAY_AUTH_TOKEN, and keep the token in ~/.ray/auth_token",
        )
    elif access.token_mode is None:
        needed = access.mode == "token" and access.address
        yield Finding(
            check="token",
            level=PROBLEM if needed else OK,
            text=f"{access.token_file} is not there" + ("" if needed else "; one is made when a cluster starts"),
            remedy="copy the head's to this machine, chmod 600" if needed else None,
        )
    elif access.token_mode & 0o077:
        yield Finding(
            check="token",
            level=PROBLEM,
            text=f"{access.token_file} can be read by other users (mode {access.token_mode:04o})",
            remedy=f"chmod 600 {access.token_file}; if others were here, make a new one",
        )
    else:
        yield Finding(check="token", level=OK, text=f"{access.token_file} is yours alone")


def diagnose(
    access: Access,
    nodes: Sequence[NodeFacts | SilentNode],
    folders: Mapping[str, str],
    upload: Upload | None = None,
    mixture_bytes: int | None = None,
) -> list[Finding]:
    """All findings, from facts alone.

    Args:
        access: to the cluster.
        nodes: that were asked.
        folders: that they share, by option.
        upload: of a working directory; None leaves that out.
        mixture_bytes: weights of a mixture that is to run on each node; None leaves that out.
    """
    answered = [node for node in nodes if isinstance(node, NodeFacts)]
    findings = [*check_access(access), *check_answers(nodes), *check_versions(answered)]
    findings += [*check_folders(answered, folders), *check_spaces(answered), *check_shared_memory(answered)]
    findings += [*check_gpus(answered), *check_limits(answered), *check_clocks(answered)]
    findings += check_upload(upload) if upload else ()
    findings += check_mixture(answered, mixture_bytes) if mixture_bytes is not None else ()
    return findings


def _names(nodes: Sequence[NodeFacts | SilentNode]) -> str:
    names = [node.name for node in nodes]
    return ", ".join(names if len(names) <= 8 else [*names[:8], "..."])


def _size(count: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--store", metavar="DIR", help="folder or URI that every node must read and write")
    parser.add_argument("--results", metavar="DIR", help="likewise")
    parser.add_argument("--working-dir", default=".", metavar="DIR", help="what would be sent with a job (default: .)")
    parser.add_argument("--mixture", metavar="MIXTURE", help="a mixture that nodes must have memory for")
    parser.add_argument(
        "--timeout", type=float, default=90, metavar="S", help="seconds for a node to answer (default: 90)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at this machine, or at every node of the cluster that RAY_ADDRESS names, and say what is wrong."""
    if not 0 < args.timeout < float("inf"):
        raise UsageError(f"--timeout: seconds above 0 are needed, got {args.timeout:g}")
    given = {"--store": args.store, "--results": args.results}
    folders = {option: _absolute(folder) for option, folder in given.items() if folder}
    upload = gather_upload(Path(args.working_dir))
    size = _mixture_bytes(args.mixture) if args.mixture else None
    access, nodes = gather(folders, args.timeout)
    findings = [*diagnose(access, nodes, folders, upload, size), *_check_overlooked(access)]
    order = (PROBLEM, WARNING, OK)
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        print(finding)
    count = {level: sum(finding.level == level for finding in findings) for level in order}
    plural = {level: f"{count[level]} {level}{'s' * (count[level] != 1)}" for level in (PROBLEM, WARNING)}
    print(f"\n{plural[PROBLEM]}, {plural[WARNING]}, {count[OK]} ok")
    listed = [dataclasses.asdict(finding) for finding in findings]
    return {"findings": listed, "nodes": [node.name for node in nodes], "failed": count[PROBLEM]}


def _check_overlooked(access: Access) -> Findings:
    """A cluster of this machine that this shell does not use."""
    ours = read_cluster()
    if access.address is None and ours is not None and ours.is_up():
        yield Finding(
            check="cluster",
            level=WARNING,
            text=f"one runs at {ours.address}, but this shell does not use it, so only this machine was looked at",
            remedy='eval "$(flexmore cluster env)", then once more',
        )


def gather(folders: Mapping[str, str], seconds: float) -> tuple[Access, list[NodeFacts | SilentNode]]:
    """Facts of the cluster that RAY_ADDRESS names, or of this machine alone.

    Args:
        folders: that all nodes must share, by option.
        seconds: for a node to answer.
    """
    from flexmore_ray import runtime

    access, nonce = gather_access(), secrets.token_hex(4)
    if access.address is None:
        return access, [gather_here(folders, nonce, seconds)]
    if access.with_token in (401, 403):
        return access, []
    try:
        with runtime.cluster():
            return access, gather_cluster(runtime.nodes(), folders, nonce, seconds)
    except FlexmoreError as error:
        return dataclasses.replace(access, refused=str(error)), []


def _absolute(folder: str) -> str:
    path = open_path(folder)
    return str(path if isinstance(path, RemotePath) else path.absolute())


def _mixture_bytes(mixture: str) -> int:
    from flexmore_ray.budget import count_parameters
    from flexmore_ray.mixture import open_mixture

    parts = open_mixture(mixture, None, verify=False)
    count = count_parameters(parts.source.shape, parts.source.experts, parts.assignment)
    return int(count.total * parts.source.dtype.itemsize)
