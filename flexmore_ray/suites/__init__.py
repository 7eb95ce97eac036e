"""Task suites as data: which tasks there are, in which groups, knowledge-heavy or reasoning-heavy.

A suite is a YAML file here or at any path:

    name: mine
    description: what it measures
    include: [mmlu]                  # optional: the groups of other suites, first
    missing: [some_task]             # optional: published tasks that lm-eval does not have
    groups:
      arithmetic:
        kind: reasoning              # or knowledge
        domain: math                 # optional: the expert whose domain it is
        tasks: [my_task, gsm8k]      # names of lm-eval, or of tasks in the folder `mine/` beside the file

Nothing here imports lm-eval; whether it knows a name is found out when the tasks are loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import read_yaml

FOLDER = Path(__file__).parent
KINDS = ("knowledge", "reasoning")
_SUITE_KEYS = {"name", "description", "include", "missing", "groups"}
_GROUP_KEYS = {"kind", "domain", "tasks"}
_TASK_LINE = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Tasks that are averaged together."""

    name: str
    tasks: tuple[str, ...]
    kind: str | None = None
    """One of `KINDS`; None where no suite says."""
    domain: str | None = None
    """The expert whose domain it is; None where no expert is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What to score: groups of task names, and the folders that hold tasks lm-eval does not come with."""

    name: str
    groups: tuple[Group, ...]
    folders: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    """Published tasks that lm-eval does not have."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All task names, group by group, each once."""
        return tuple(task for group in self.groups for task in group.tasks)

    def group_of(self, task: str) -> Group:
        """The group of a task of this suite."""
        return next(group for group in self.groups if task in group.tasks)


def suite_names() -> list[str]:
    """Names of the suites that come with flexmore-ray."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(what: str | Path | Suite | Sequence[str | Path]) -> Suite:
    """Make one suite of what `--tasks` accepts.

    Args:
        what: A suite name, a task name, a suite or task file, a folder of task files, several of them
            separated by commas, or a sequence of them. Names of suites win over names of tasks.

    Returns:
        The groups of all of them; a task named alone is a group of its own, a folder is one group. A task
        that occurs twice counts in the first place only.

    Raises:
        UsageError: Nothing is named, a path does not exist, or a file is no suite.
    """
    if isinstance(what, Suite):
        return what
    items = [what] if isinstance(what, str | Path) else list(what)
    parts = [part for item in items for part in _split(item)]
    if not parts:
        raise UsageError(f"no tasks named; give a suite ({', '.join(suite_names())}), a task or a path")
    suites = [_load_one(part) for part in parts]
    return _join(",".join(suite.name for suite in suites), suites)


def _split(item: str | Path) -> list[str | Path]:
    return [item] if isinstance(item, Path) else [part.strip() for part in item.split(",") if part.strip()]


def _load_one(part: str | Path) -> Suite:
    path = Path(part)
    if isinstance(part, str) and part in suite_names():
        return _read_suite(FOLDER / f"{part}.yaml")
    if path.is_dir():
        return _folder_suite(path)
    if path.suffix in (".yaml", ".yml") or isinstance(part, Path) or "/" in part:
        return _file_suite(path)
    return _single_task(part)


def _single_task(name: str) -> Suite:
    """A task named alone: a group of its own, of the kind and domain that our suites give it."""
    own = tuple(path.parent for path in FOLDER.glob(f"*/{name}.yaml"))
    known = _groups_by_task().get(name, Group(name=name, tasks=(name,)))
    group = dataclasses.replace(known, name=name, tasks=(name,))
    return Suite(name=name, groups=(group,), folders=own)


@lru_cache(maxsize=1)
def _groups_by_task() -> dict[str, Group]:
    suites = [_read_suite(FOLDER / f"{name}.yaml") for name in suite_names()]
    return {task: group for suite in suites for group in suite.groups for task in group.tasks}


def _folder_suite(folder: Path) -> Suite:
    tasks = tuple(sorted(task_folders([folder])))
    if not tasks:
        raise UsageError(f"no lm-eval task in folder {folder}: no YAML file in it has a line 'task: NAME'")
    group = Group(name=folder.resolve().name, tasks=tasks)
    return Suite(name=group.name, groups=(group,), folders=(folder.resolve(),))


def _file_suite(path: Path) -> Suite:
    if not path.is_file():
        raise UsageError(f"no such suite file, task file or folder: {path}")
    found = _TASK_LINE.search(path.read_text(encoding="utf-8"))
    if found:
        name = found.group(1)
        return Suite(name=name, groups=(Group(name=name, tasks=(name,)),), folders=(path.parent.resolve(),))
    return _read_suite(path)


def _read_suite(path: Path) -> Suite:
    data = read_yaml(path, "suite file")
    if not isinstance(data, dict) or not set(data) <= _SUITE_KEYS or not data.get("groups", data.get("include")):
        got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise UsageError(f"suite file {path}: needs 'groups' or 'include', knows {sorted(_SUITE_KEYS)}, got {got}")
    included = [_load_one(name) for name in data.get("include", ())]
    beside = path.with_suffix("")
    own = Suite(
        name=data.get("name", path.stem),
        groups=tuple(_read_group(path, *item) for item in (data.get("groups") or {}).items()),
        folders=(beside.resolve(),) if beside.is_dir() else (),
        missing=tuple(data.get("missing", ())),
    )
    return _join(own.name, [*included, own])


def _read_group(path: Path, name: str, data: Any) -> Group:
    if not isinstance(data, Mapping) or not set(data) <= _GROUP_KEYS or not data.get("tasks"):
        raise UsageError(f"suite file {path}, group {name}: needs 'tasks', knows {sorted(_GROUP_KEYS)}, got {data}")
    if data.get("kind") not in KINDS:
        raise UsageError(f"suite file {path}, group {name}: kind must be one of {KINDS}, got {data.get('kind')!r}")
    return Group(name=name, tasks=tuple(data["tasks"]), kind=data["kind"], domain=data.get("domain"))


def _join(name: str, suites: Sequence[Suite]) -> Suite:
    """All groups in order, groups of one name merged, every task in its first place only."""
    groups: dict[str, Group] = {}
    seen: set[str] = set()
    for group in (group for suite in suites for group in suite.groups):
        fresh = tuple(task for task in dict.fromkeys(group.tasks) if task not in seen)
        seen.update(fresh)
        known = groups.get(group.name, dataclasses.replace(group, tasks=()))
        groups[group.name] = dataclasses.replace(known, tasks=known.tasks + fresh)
    return Suite(
        name=name,
        groups=tuple(group for group in groups.values() if group.tasks),
        folders=_distinct(folder for suite in suites for folder in suite.folders),
        missing=_distinct(task for suite in suites for task in suite.missing),
    )


def _distinct(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


def task_folders(folders: Iterable[Path]) -> dict[str, Path]:
    """The folder of the file that defines each lm-eval task.

    lm-eval's own index parses its more than 14,000 files, which takes many seconds; this only looks for the
    line that names the task, so that just the folders needed are parsed.

    Args:
        folders: Where to look, deeply; a later folder wins over an earlier one.
    """
    return {name: path.parent for folder in folders for name, path in _named_tasks(folder)}


def _named_tasks(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("**/*.yaml")):
        found = _TASK_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            yield found.group(1), path


@lru_cache(maxsize=1)
def lm_eval_tasks() -> dict[str, Path]:
    """The folder of every task that comes with the installed lm-eval; reads files, imports nothing."""
    from importlib.util import find_spec

    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise UsageError("lm-eval is not installed: pip install 'lm-eval[api]'")
    return task_folders([Path(package.origin).parent / "tasks"])
