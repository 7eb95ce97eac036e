"""Texts of experts' owners: the files that ``--data`` names, and batches of them for a model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import suggest
from flexmore_ray.storage import AnyPath, open_path


def check_owners(data: Collection[str], experts: Sequence[str]) -> None:
    """Check whose texts are given.

    Args:
        data: names of the experts.
        experts: the domain experts that there are.

    Raises:
        UsageError: no name, or an unknown one.
    """
    for name in data:
        if name not in experts:
            raise UsageError(f"--data: unknown domain expert {name!r}; {suggest(name, list(experts))}")
    if not data:
        raise UsageError("--data: name=FILE of at least one domain expert is needed")


def read_documents(path: str | AnyPath) -> list[tuple[str, str]]:
    r"""Documents of a ``--data`` file as (prompt, completion), empty ones left out; a plain text has no prompt.

    A ``.jsonl`` file holds one object a line, with the key ``text``, or with ``prompt`` and ``completion``; any other
    file is UTF-8 text with one document a line, in which ``\n`` stands for a line break and ``\\`` for a backslash.

    Raises:
        UsageError: the file cannot be read, a line is no such object, or no document is in it.
    """
    path = open_path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the documents in {path}: {error}") from error
    lines = [line.rstrip("\r") for line in lines]
    if path.suffix == ".jsonl":
        texts = [_jsonl_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        texts = [("", _unescape(line)) for line in lines]
    texts = [text for text in texts if text[1]]
    if not texts:
        raise UsageError(f"{path} holds no document; one a line is needed")
    return texts


def read_texts(path: str | AnyPath) -> list[str]:
    """Documents of a ``--data`` file as whole texts; see `read_documents`."""
    return [prompt + completion for prompt, completion in read_documents(path)]


def _jsonl_text(path: AnyPath, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        found = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f'{path} line {number} is no JSON object with a "text", or "prompt" and "completion": {line[:60]!r}'
        ) from error
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{path} line {number}: texts must be strings, got {type(text).__name__}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"{path} line {number}: half a surrogate pair is no text; write whole characters")
    return found


def _unescape(line: str) -> str:
    return "\\".join(part.replace("\\n", "\n") for part in line.split("\\\\"))


def batch_texts(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64, max_tokens: int = 512) -> Iterable[Any]:
    """Batches for `router.gather_moments`: texts by length, cut at ``max_tokens``, padded, with their masks."""
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), batch_size):
        part = list(ordered[start : start + batch_size])
        yield tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=max_tokens)


class Document(NamedTuple):
    """Token ids, and from which one on they are predicted."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, texts: Sequence[tuple[str, str]], max_tokens: int) -> list[Document]:
    """Documents as token ids, the shortest first, cut at `max_tokens`.

    Args:
        tokenizer: of the mixture.
        texts: prompt and completion of each; the completion's tokens are predicted, but for a text's very first.
        max_tokens: the most of one document.
    """
    documents = []
    for prompt, completion in texts:
        ids = tokenizer(prompt + completion)["input_ids"][:max_tokens]
        before = tokenizer(prompt)["input_ids"] if prompt else []
        start = next(
            (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
        )
        documents.append(Document(ids, max(1, start)))
    return sorted(documents, key=lambda document: len(document.ids))


def batches(documents: Sequence[Document], tokens: int, start: int = 0) -> Iterator[tuple[int, Sequence[Document]]]:
    """Documents in their order, as many at once as `tokens` hold, padding included; at least one.

    Args:
        documents: the shortest first.
        tokens: of one batch.
        start: number of the first document.

    Yields:
        The number of a batch's first document, and the batch.
    """
    while start < len(documents):
        stop = start + 1
        while stop < len(documents) and (stop + 1 - start) * len(documents[stop].ids) <= tokens:
            stop += 1
        yield start, documents[start:stop]
        start = stop


def pad_documents(batch: Sequence[Document], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and which of them are predicted (B, T)."""
    longest = max(len(document.ids) for document in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    predicted = torch.zeros(len(batch), longest)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        predicted[row, document.start : len(document.ids)] = 1
    return ids.to(device), predicted.to(device)
