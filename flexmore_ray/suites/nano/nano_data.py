"""Data of the nano tasks, read from the JSONL files beside the task files."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

FOLDER = Path(__file__).parent / "data"


def load(*, data: str, **_: object) -> datasets.DatasetDict:
    """Splits train, validation and test of one task, held in memory.

    Args:
        data: task name, the stem of its files ``data/NAME.SPLIT.jsonl``; lm-eval passes the task's
            ``dataset_kwargs`` and, besides, its ``metadata``, which is not needed.
    """
    splits = {}
    for split in ("train", "validation", "test"):
        text = (FOLDER / f"{data}.{split}.jsonl").read_text(encoding="utf-8")
        splits[split] = datasets.Dataset.from_list([json.loads(line) for line in text.splitlines()])
    return datasets.DatasetDict(splits)
