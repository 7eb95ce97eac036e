"""Write the nano suite's task data: ``python -m flexmore_ray.zoo.tasks [--out FOLDER] [--seed 0]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flexmore_ray.zoo.domains import EXPERTS, SPLITS, TOPICS, Topic

DOCUMENTS_PER_SPLIT = 200
DATA = Path(__file__).parents[1] / "suites" / "nano" / "data"


def task_rows(topic: Topic, split: str, seed: int = 0) -> list[dict[str, object]]:
    """Rows of one data file: ``context``, ``answer`` and, for multiple choice, ``choices`` and ``label``."""
    rows: list[dict[str, object]] = []
    for document in topic.documents(split, DOCUMENTS_PER_SPLIT, seed):
        row: dict[str, object] = {"context": document.context, "answer": document.answer}
        if document.choices:
            row |= {"choices": list(document.choices), "label": document.choices.index(document.answer)}
        rows.append(row)
    return rows


def write_tasks(folder: Path, seed: int = 0) -> None:
    """Write ``TASK.SPLIT.jsonl`` for every task and split."""
    folder.mkdir(parents=True, exist_ok=True)
    for topic in (topic for expert in EXPERTS for topic in TOPICS[expert]):
        for split in SPLITS:
            lines = [json.dumps(row) + "\n" for row in task_rows(topic, split, seed)]
            (folder / f"{topic.task}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m flexmore_ray.zoo.tasks", description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_tasks(args.out, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
