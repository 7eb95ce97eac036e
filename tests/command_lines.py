"""Commands in documentation and manifests: found, split as a shell would, and parsed by the programs' own parsers.

What stands in code blocks, comments with an indented command, and values of YAML files must be a command that runs. In
running text ("as `flexmore serve` does") options and subcommands must exist; required arguments may be left out, as
may what an ellipsis stands for. A word in capitals is a placeholder for any value.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).parent.parent
PROGRAMS = ("flexmore", "ray", "serve")
_STARTS = re.compile(
    r"(?:\S+=\S+ )*(?:\S*/)?(?:flexmore [a-z]|ray [a-z]+[ -]|serve (?:run|deploy|status|config|shutdown)\b)"
)
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_,.]*")
_ELLIPSIS = ("...", "…")
_MISSING = ("the following arguments are required", "expected one argument", "expected at least one argument")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as it was found."""

    where: str
    """The file."""
    words: tuple[str, ...]
    """From the program on."""
    whole: bool
    """Whether it must run as it is, or is only spoken of."""

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    [version] = re.findall(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    return version


# ------------------------------------------------------------------------------------------------------- found


def commands_of(path: Path, text: str | None = None) -> list[Command]:
    """The commands that a file of this repository has.

    Args:
        path: the file.
        text: read in place of its content.
    """
    text = path.read_text(encoding="utf-8") if text is None else text
    kind = {".md": _of_markdown, ".py": _of_python}.get(path.suffix, _of_configuration)
    return [
        Command(str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name, words, whole)
        for found, whole in kind(path, text)
        for words in split(found)
    ]


def split(text: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a shell line that call one of `PROGRAMS` or name a file of this repository."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in (*lexer, ";"):
        if not set(word) <= set(";&|<>()"):
            words.append(word)
            continue
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words and Path(words[0]).name in (*PROGRAMS, "kubectl", "docker", "aws"):
            yield (Path(words[0]).name, *words[1:])
        words = []


def _of_markdown(path: Path, text: str) -> Iterator[tuple[str, bool]]:
    blocks = text.split("```")
    for number, block in enumerate(blocks):
        if number % 2 == 0:
            yield from _spoken(block)
        elif block.partition("\n")[0].strip() in ("", "sh", "bash", "console"):
            for line in _lines(block.partition("\n")[2]):
                if _STARTS.match(line):
                    yield line, True


def _of_python(path: Path, text: str) -> Iterator[tuple[str, bool]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield from _spoken(doc)
            yield from ((line, False) for line in _lines(doc) if _STARTS.match(line) and "``" not in line)


def _of_configuration(path: Path, text: str) -> Iterator[tuple[str, bool]]:
    comments = [line[1:] for line in text.splitlines() if line.startswith("#")]
    for line in _lines("\n".join(comments), indented=True):
        yield line, True
    yield from _spoken("\n".join(comments))
    if path.suffix in (".yaml", ".yml"):
        for document in yaml.load_all(text, Loader=_Loader):
            yield from ((value, True) for value in _strings(document) if _STARTS.search(value))
    elif path.name == "Makefile":
        recipes = "\n".join(line for line in text.splitlines() if line.startswith("\t"))
        yield from ((line.replace("$(BIN)/", ""), True) for line in _lines(recipes))


class _Loader(yaml.SafeLoader):
    """Reads the tags of CloudFormation as what they stand for."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)


def _lines(text: str, *, indented: bool = False) -> Iterator[str]:
    """Lines, joined where one ends with a backslash; only those indented by two or more, if so asked."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not indented or line.startswith("  "):
            yield line.strip()


def _spoken(text: str) -> Iterator[tuple[str, bool]]:
    for code in re.findall(r"(?<!`)`{1,2}([^`\n]+)`{1,2}(?!`)", text):
        if _STARTS.match(f"{code} "):
            yield code.partition(" / ")[0], False  # "up / down" names two


# ----------------------------------------------------------------------------------------------------- checked


def problem(command: Command) -> str | None:
    """What is wrong with a command; None if nothing is."""
    program, *words = command.words
    for word in words:
        file = word.partition("=")[2] or word
        if re.match(r"(cluster|serve|tests)/[\w./-]+$", file) and not (ROOT / file).exists():
            return f"there is no file {file}"
    elided = any(word.endswith(_ELLIPSIS) for word in words)
    words = [word.rstrip(".…") if word.endswith(_ELLIPSIS) else word for word in words]
    words = [word for word in words if word]
    if program == "flexmore":
        found = _flexmore_problem(words)
        if found and any(missing in found for missing in _MISSING) and (elided or not command.whole):
            known = _options(words)
            return next((f"there is no {word}" for word in words if _is_unknown(word, known)), None)
        return found
    if program in ("ray", "serve"):
        return _click_problem(program, words, lenient=elided or not command.whole)
    return None


@cache
def flexmore_parser() -> argparse.ArgumentParser:
    """The parser of the `flexmore` command."""
    from flexmore_ray.__main__ import _parser

    return _parser()


def _flexmore_problem(words: list[str]) -> str | None:
    if words and _PLACEHOLDER.fullmatch(words[0]):
        return None
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            flexmore_parser().parse_args(_filled(words))
        except SystemExit as stop:
            return said.getvalue().strip() if stop.code else None
    return None


def _is_unknown(word: str, options: Container[str]) -> bool:
    return word.startswith("--") and word.partition("=")[0] not in options


def _filled(words: list[str]) -> list[str]:
    """With a value that the parser takes in place of each placeholder."""
    options, filled = _options(words), list(words)
    for index, word in enumerate(words[1:], start=1):
        action = options.get(words[index - 1])
        if action is not None and _PLACEHOLDER.fullmatch(word):
            filled[index] = str(next(iter(action.choices))) if action.choices else "1" if action.type else word
    return filled


def _options(words: list[str]) -> dict[str, argparse.Action]:
    """The options of a command, and of the command of its own that follows it, by their names."""
    found: dict[str, argparse.Action] = {}
    parser: argparse.ArgumentParser | None = flexmore_parser()
    for word in (*words, ""):
        if parser is None:
            break
        found |= parser._option_string_actions
        commands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        parser = commands.choices.get(word) if commands else None
    return found


@cache
def _group(program: str) -> click.Command:
    if program == "serve":
        from ray.serve.scripts import cli
    else:
        from ray.scripts.scripts import cli
    return cli


def _click_problem(program: str, words: list[str], *, lenient: bool) -> str | None:
    command, name = _group(program), program
    while isinstance(command, click.Group):
        if not words:
            return None if lenient else f"{name}: a subcommand is needed"
        name = words.pop(0)
        if _PLACEHOLDER.fullmatch(name):
            return None
        found = command.commands.get(name)
        if found is None:
            return f"{program}: there is no command {name}"
        command = found
    try:
        context = command.make_context(name, list(words), resilient_parsing=False)
    except click.MissingParameter as error:
        return None if lenient else error.format_message()
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return None if "does not exist" in error.format_message() else error.format_message()
    entrypoint = shlex.join(context.params.get("entrypoint") or ())
    inner = [Command("", found, whole=not lenient) for found in split(entrypoint)]
    return next(filter(None, map(problem, inner)), None)
