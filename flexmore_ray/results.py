"""Results on disk: one Parquet file per finished cell, written whole or not at all.

    DIR/cells/{cell}.parquet       one row: the score of one mixture on one task
    DIR/samples/{cell}.parquet     one row per document

`{cell}` is a hash of everything that decides the result (`CellKey`). Samples are written before the cell, and
each file appears whole or not at all: a cell that exists is complete. Files are the truth; there is no index and no
lock, and two workers that finish the same cell write the same file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from flexmore_ray.atomic import write_file
from flexmore_ray.errors import FlexmoreError
from flexmore_ray.storage import AnyPath, RemotePath, StorageError, at_once, open_path

if TYPE_CHECKING:
    from flexmore_ray.scores import Sample, TaskScore

DONE = "done"
FAILED = "failed"

CELL_SCHEMA = pa.schema(
    [
        ("mixture_id", pa.string()),
        ("mixture", pa.string()),  # the mixture's description as JSON
        ("active", pa.int64()),
        ("parameters", pa.int64()),
        ("task", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("documents", pa.int64()),
        ("seconds", pa.float64()),
        ("status", pa.string()),  # done, or failed with an error
        ("error", pa.string()),
        ("versions", pa.string()),  # JSON: task, libraries, and the cell's identity
        ("cell", pa.string()),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("mixture_id", pa.string()),
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("doc_hash", pa.string()),
        ("target", pa.string()),
        (
            "responses",
            pa.string(),
        ),  # JSON, per request: [log-likelihood, is greedy], a log-likelihood, or a text
        ("correct", pa.bool_()),
        ("metrics", pa.string()),  # JSON: a list of [metric, filter, value]
    ]
)
_TABLE_BYTES = 2**29  # of one file in memory; the samples of the largest task are a hundredth of it
_PIECE_BYTES = 2**27
_LIBRARIES = ("datasets", "flexmore-ray", "lm-eval", "torch", "transformers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellKey:
    """Everything that decides the result of a cell."""

    mixture_id: str
    """Weights, ranks and active experts."""
    dtype: str
    """Number format that the model computes in, such as bfloat16."""
    task: str
    task_version: str
    num_fewshot: int
    split: str
    limit: int | None = None
    """Number of documents from the start of the split; None: all."""
    seed: int
    task_hash: str = ""
    """`PreparedTask.content_hash`, where the version alone does not tell; empty: not used."""
    selection: str = ""
    """Which of the task's documents were scored; empty: all. Such a cell is a part of a score, and no report's."""

    def to_dict(self) -> dict[str, Any]:
        """The key as plain data, without a selection where all documents were scored."""
        data = dataclasses.asdict(self)
        return data if self.selection else {name: value for name, value in data.items() if name != "selection"}

    @property
    def cell(self) -> str:
        """A hash of the key, the same in every process: 32 hexadecimal digits."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on; one that is not installed is left out."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


# --- writing ----------------------------------------------------------------------------------------------


def commit_cell(
    root: str | AnyPath,
    key: CellKey,
    score: TaskScore | None,
    *,
    mixture: Mapping[str, Any],
    active: int,
    parameters: int,
    weights: str = "",
    group: str | None = None,
    error: str | None = None,
) -> str:
    """Write the result of a cell: samples first, the cell last.

    Args:
        root: Folder of the results; made if missing.
        key: Identity of the cell.
        score: The score; None for a cell that failed.
        mixture: The mixture's description.
        active: Experts chosen per token.
        parameters: Total parameters of the mixture.
        weights: `Parts.weights`, which tells apart results of sources that share expert names; empty: not known.
        group: Group of the task; None: the score's.
        error: Why the cell failed, one line; None if it did not.

    Returns:
        The cell's hash, `key.cell`.

    Raises:
        FlexmoreError: The folder cannot be written, or the disk is full. No half file stays, and no cell.
    """
    if score is not None:
        _write(open_path(root) / "samples", key.cell, _sample_table(key, score.samples))
    row = {
        "mixture_id": key.mixture_id,
        "mixture": json.dumps(mixture, sort_keys=True),
        "active": active,
        "parameters": parameters,
        "task": key.task,
        "group": group if score is None or group is not None else score.group,
        "split": key.split,
        "status": FAILED if score is None else DONE,
        "error": error,
        "versions": json.dumps({"identity": key.to_dict(), "libraries": library_versions(), "weights": weights}),
        "cell": key.cell,
    }
    if score is not None:
        row |= {name: getattr(score, name) for name in ("metric", "value", "stderr", "documents", "seconds")}
    _write(open_path(root) / "cells", key.cell, pa.Table.from_pylist([row], schema=CELL_SCHEMA))
    return key.cell


def _sample_table(key: CellKey, samples: Iterable[Sample]) -> pa.Table:
    rows = [
        {
            "cell": key.cell,
            "mixture_id": key.mixture_id,
            "task": key.task,
            "doc_id": sample.doc_id,
            "doc_hash": sample.doc_hash,
            "target": sample.target,
            "responses": json.dumps(sample.responses, ensure_ascii=False),
            "correct": sample.correct,
            "metrics": json.dumps([[*name, value] for name, value in sample.metrics.items()], ensure_ascii=False),
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def _write(folder: AnyPath, name: str, table: pa.Table) -> None:
    """Write a table so that `{name}.parquet` has all of it or is not there."""
    final = folder / f"{name}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(final, lambda file: pq.write_table(table, file))
    except StorageError:
        raise
    except OSError as error:
        raise FlexmoreError(
            f"cannot write results to {final}: {error.strerror or error}; free space or choose another folder"
        ) from error


# --- reading ----------------------------------------------------------------------------------------------


def has_cell(root: str | AnyPath, key: CellKey) -> bool:
    """Whether a cell is there and did not fail."""
    path = open_path(root) / "cells" / f"{key.cell}.parquet"
    return path.exists() and read_cell(root, key)["status"] == DONE


def done_cells(root: str | AnyPath, cells: Iterable[str]) -> set[str]:
    """Those of some cells (hashes) that are there with their samples, and did not fail.

    Raises:
        FlexmoreError: The folder cannot be read, or a file in it is damaged (named).
    """
    folder = open_path(root) / "cells"
    there, sampled = (_names(open_path(root) / name) for name in ("cells", "samples"))
    found = [cell for cell in cells if f"{cell}.parquet" in there & sampled]
    status = _read([folder / f"{cell}.parquet" for cell in found], pa.schema([("status", pa.string())]))["status"]
    return {cell for cell, value in zip(found, status.to_pylist(), strict=True) if value == DONE}


def _names(folder: AnyPath) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()} if isinstance(folder, RemotePath) else set(os.listdir(folder))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise FlexmoreError(f"results: {folder} cannot be read: {error.strerror}") from error


def read_cell(root: str | AnyPath, key: CellKey) -> dict[str, Any]:
    """One cell as a row: the columns of `CELL_SCHEMA` by name.

    Raises:
        FlexmoreError: The file is missing or damaged.
    """
    return _read([open_path(root) / "cells" / f"{key.cell}.parquet"], CELL_SCHEMA).to_pylist()[0]


def read_cells(root: str | AnyPath, cells: Iterable[str] | None = None) -> pa.Table:
    """Some cells (hashes) of a results folder, or all, in the order of their hashes; none if there is no such folder.

    Raises:
        FlexmoreError: A file is damaged (named).
    """
    folder = open_path(root) / "cells"
    names = [folder / f"{cell}.parquet" for cell in cells] if cells is not None else folder.glob("[!.]*.parquet")
    return _read(sorted(names), CELL_SCHEMA)


def read_samples(root: str | AnyPath, cells: Sequence[str] | None = None) -> pa.Table:
    """Samples of some cells (hashes), or of all cells in a results folder.

    Samples whose cell was never committed are not read.

    Raises:
        FlexmoreError: A file is missing or damaged (named).
    """
    if cells is None:
        committed = read_cells(root)
        cells = committed.filter(pa.compute.equal(committed["status"], DONE))["cell"].to_pylist()
    return _read([open_path(root) / "samples" / f"{cell}.parquet" for cell in cells], SAMPLE_SCHEMA)


def parse_samples(table: pa.Table) -> list[Sample]:
    """Rows of `SAMPLE_SCHEMA` as the samples that they were written from."""
    from flexmore_ray.scores import Sample

    return [
        Sample(
            responses=json.loads(row["responses"]),
            metrics={(metric, key): value for metric, key, value in json.loads(row["metrics"])},
            **{name: row[name] for name in ("doc_id", "doc_hash", "target", "correct")},
        )
        for row in table.to_pylist()
    ]


def _read(paths: Sequence[AnyPath], schema: pa.Schema) -> pa.Table:
    tables = at_once(functools.partial(_read_file, schema=schema), paths)
    return pa.concat_tables(tables) if tables else schema.empty_table()


def read_bounded(file: pq.ParquetFile, schema: pa.Schema | None = None) -> pa.Table:
    """A table read in pieces: a file of some bytes can say the same long text a billion times.

    Args:
        file: the table.
        schema: columns to read, and their types; None reads all as they are.

    Raises:
        ValueError: it is larger than any results are.
    """
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if size > _TABLE_BYTES:
        _too_large()
    schema = schema or file.schema_arrow
    if not file.metadata.num_rows:
        return file.read(schema.names).select(schema.names).cast(schema)
    pieces, held = [], 0
    rows = max(1, min(file.metadata.num_rows, _PIECE_BYTES // max(1, size)))
    for batch in file.iter_batches(rows, columns=schema.names):
        piece = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
        held += piece.nbytes
        pieces.append(piece if held <= _TABLE_BYTES else _too_large())
    return pa.concat_tables(pieces)


def _too_large() -> NoReturn:
    raise ValueError(f"it holds more than {_TABLE_BYTES:,} bytes")


def _read_file(path: AnyPath, schema: pa.Schema) -> pa.Table:
    try:
        file = pa.BufferReader(path.read_bytes()) if isinstance(path, RemotePath) else path
        return read_bounded(pq.ParquetFile(file), schema)
    except StorageError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise FlexmoreError(
            f"results file {path} cannot be read ({' '.join(str(error).split())}); delete it to compute it again"
        ) from error
