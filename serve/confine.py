"""Which places a mixture file may name when it is served.

A mixture file may come from somebody else, and what is served goes to whoever may ask. So a file names places in its
own folder, the embedded mixtures, and what whoever serves it allows (``--allow``, the setting ``allow``). What is named
without a file, as a SOURCE or in the settings themselves, was named by who serves it. So was what a file holds that a
search of this user wrote (`flexmore_ray.written`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.storage import RemotePath, open_path
from flexmore_ray.written import is_known
from serve.expert import given_sources


def check_places(spec: MixtureSpec, file: str, content: bytes, allow: Sequence[str]) -> None:
    """Refuse a mixture file that names a place which nobody allowed.

    Args:
        spec: what the file holds.
        file: its path or URI.
        content: its bytes.
        allow: folders, or SOURCE strings as the file has them, that it may name besides.

    Raises:
        UsageError: names the place and the way out.
    """
    if is_known(content):
        return
    roots = [_folder_of(file), *allow]
    for what, text in _named(spec):
        _check(what, text, roots, file)


def _named(spec: MixtureSpec) -> Iterator[tuple[str, str]]:
    """The places; those that the manifest of a store names come after the store itself, which is opened for them."""
    if spec.store is not None:
        yield "store", spec.store
    for text in given_sources(spec):
        yield "source", text
    if spec.router is not None:
        yield "router", spec.router


def _check(what: str, text: str, roots: Sequence[str], file: str) -> None:
    name, equals, place = text.partition("=")
    if not equals or "/" in name or Path(text).exists():  # as `open_source` reads it
        place = text
    if place.startswith("zoo://") or place in roots:
        return
    folder, allowed = open_path(place), [open_path(root) for root in roots]
    if isinstance(folder, RemotePath):
        if any(isinstance(root, RemotePath) and _is_below(str(folder), str(root)) for root in allowed):
            return
        raise _refusal(what, place, place, roots, file)
    folders = [root.expanduser().resolve() for root in allowed if isinstance(root, Path)]
    folder = folder.expanduser()
    if not folder.is_absolute() and not folder.exists():  # a hub id, which would be downloaded
        raise _refusal(what, place, place, roots, file)
    for path in (folder, *_files(folder)):
        if not any(path.resolve().is_relative_to(root) for root in folders):
            raise _refusal(what, place, str(path.resolve()), roots, file)


def _files(folder: Path) -> Iterable[Path]:
    """What opening a folder may read: files in it and one level below. A link counts where it leads."""
    return itertools.chain(folder.glob("*"), folder.glob("*/*"))


def _is_below(uri: str, root: str) -> bool:
    return f"{uri}/".startswith(f"{root.rstrip('/')}/")


def _refusal(what: str, place: str, leads_to: str, roots: Sequence[str], file: str) -> UsageError:
    through = "" if leads_to == place else f" (which leads to {leads_to})"
    return UsageError(
        f"{file}: its {what} {place}{through} lies outside the file's own folder, {roots[0]}; if you trust the file, "
        f"serve it with --allow {leads_to} (setting allow)"
    )


def _folder_of(file: str) -> str:
    return str(open_path(file).parent.resolve())
