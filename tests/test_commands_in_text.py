"""Commands in documentation and manifests are ones that their programs take, so that they cannot rot."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.command_lines import ROOT, Command, commands_of, problem, split

CLUSTER = ROOT / "cluster"


def texts() -> list[Path]:
    found = [
        *CLUSTER.rglob("*"),
        *(path for name in ("flexmore_ray", "search", "serve") for path in (ROOT / name).rglob("*.py")),
    ]
    found += [ROOT / "README.md", ROOT / "Makefile", ROOT / "serve" / "config.yaml"]
    return sorted(path for path in found if path.is_file() and path.suffix in ("", ".md", ".py", ".yaml", ".yml"))


@cache
def every_command() -> tuple[Command, ...]:
    return tuple(command for path in texts() for command in commands_of(path))


def test_every_command_is_one_that_its_program_takes():
    assert [f"{command}: {found}" for command in every_command() if (found := problem(command))] == []


def test_commands_are_found_where_they_are():
    found = {command.where for command in every_command()}
    with_commands = {
        "README.md",
        "cluster/aws.yaml",
        "cluster/Dockerfile",
        "serve/config.yaml",
        "Makefile",
        "serve/app.py",
    }
    assert found >= with_commands | {f"cluster/kubernetes/{path.name}" for path in (CLUSTER / "kubernetes").iterdir()}
    programs = {command.words[:1] + command.words[1:2] * (command.words[0] != "aws") for command in every_command()}
    assert programs >= {
        ("flexmore", "grid"),
        ("flexmore", "search"),
        ("flexmore", "serve"),
        ("ray", "job"),
        ("ray", "up"),
    }
    entrypoint = ("flexmore", "grid", "/etc/flexmore/plan/plan.yaml")
    assert any(command.words[:3] == entrypoint and command.whole for command in every_command())


def test_a_wrong_option_in_any_command_is_found():
    checked = 0
    for command in every_command():
        for index, word in enumerate(command.words):
            if command.words[0] in ("flexmore", "ray") and word.startswith("--") and len(word) > 2:
                name, equals, value = word.partition("=")
                wrong = (*command.words[:index], f"{name}-x{equals}{value}", *command.words[index + 1 :])
                assert problem(Command(command.where, wrong, command.whole)), wrong
                checked += 1
    assert checked > 80


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("cluster/kubernetes/grid.yaml", "flexmore grid /etc", "flexmore gird /etc"),
        ("cluster/kubernetes/grid.yaml", "--results s3", "--result-folder s3"),
        ("cluster/kubernetes/grid.yaml", "--workers 16", "--workers many"),
        ("cluster/kubernetes/search.yaml", "--budget 10.75B ", ""),
        ("cluster/kubernetes/serve.yaml", "ray drain-node", "ray drain"),
        ("cluster/kubernetes/raycluster.yaml", "ray job submit", "ray job send"),
        ("cluster/kubernetes/base.yaml", "kubernetes/base.yaml", "kubernetes/bse.yaml"),
        ("cluster/aws.yaml", "ray up cluster/aws.yaml", "ray up cluster/ec2.yaml"),
        ("cluster/aws.yaml", "--gpus 1 --workers", "--gpu-count 1 --workers"),
        ("cluster/aws.yaml", "--metrics-export-port", "--metric-export-port"),
        ("cluster/Dockerfile", "--file cluster/Dockerfile", "--file cluster/Dockerfiles"),
        ("serve/config.yaml", "serve deploy serve/config.yaml", "serve deploy serve/configuration.yaml"),
        ("README.md", "flexmore inspect SOURCE", "flexmore look SOURCE"),
        ("README.md", "serve run serve.app", "serve run --wide serve.app"),
        ("Makefile", "flexmore demo --out", "flexmore demo --folder"),
    ],
)
def test_a_command_that_rots_is_found(file, old, new):
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    assert any(map(problem, commands_of(path, text.replace(old, new))))


def test_shell_lines_are_split_as_a_shell_does():
    line = 'A=b ulimit -n 5; B=c ~/venv/bin/ray start --head && echo "flexmore x" | flexmore grid "a b" > out # no'
    assert list(split(line)) == [("ray", "start", "--head"), ("flexmore", "grid", "a b")]
