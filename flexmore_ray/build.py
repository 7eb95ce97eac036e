"""Decompose the experts of a source into a store: safe to kill, to continue, and to run many times at once.

`build_store` does it in this process. `StoreWriter` and `decompose_matrix` are its parts for those that
spread the work: put matrices anywhere, commit in one place. See `flexmore_ray.store` for the format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import resource
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flexmore_ray.atomic import locked, remove_abandoned, write_file
from flexmore_ray.errors import CheckpointError, StoreError, UsageError
from flexmore_ray.moments import decompose_weighted
from flexmore_ray.moments.files import Metric
from flexmore_ray.spec import PROJECTIONS, MatrixKey, suggest
from flexmore_ray.spectra import Decomposition, Factors, decompose, decompose_factors, delta
from flexmore_ray.storage import AnyPath, StorageError, matching, open_path
from flexmore_ray.store import (
    ALGORITHM_VERSION,
    FORMAT,
    HEALED,
    MANIFEST,
    STORE_DTYPES,
    Entry,
    FactorStore,
    Progress,
    Recipe,
    WeightSource,
    check_digests,
    check_rows,
    delta_digests,
    file_sha256,
    manifest_checksum,
    one_line,
    opened,
    parse_device,
    read_entries,
    read_manifest,
    read_spectrum,
    row_checksums,
    tensor_bytes,
    write_safetensors,
)


class StoreWriter:
    """Adds deltas to a folder, one whole file at a time, and makes a store of them.

    Any number of processes may each have a writer on the same folder. `put` as often as needed,
    anywhere; then `commit` the entries in one place.

    Args:
        folder: made if it is missing.
        dtype: of the stored factors, a key of `STORE_DTYPES`.
        recipe: of the factors; None means that of the folder's store, the plain decomposition of a new store.

    Raises:
        StoreError: the folder cannot be written, or holds a store of another dtype or weighting.
        UsageError: an unknown dtype.
    """

    def __init__(self, folder: str | AnyPath, dtype: str = "float32", recipe: Recipe | None = None) -> None:
        if dtype not in STORE_DTYPES:
            raise UsageError(f"dtype: unknown {dtype!r}; {suggest(dtype, tuple(STORE_DTYPES))}")
        self.folder = open_path(folder)
        self.dtype, self._recipe = dtype, recipe
        with _writing(self.folder):
            (self.folder / "factors").mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
        self.committed = self._read_committed()

    def _read_committed(self) -> dict[str, Any] | None:
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = read_manifest(self.folder)
        if manifest["dtype"] != self.dtype:
            raise StoreError(
                f"{self.folder}: holds factors in {manifest['dtype']}, asked for {self.dtype}; "
                "a store has one dtype, name another folder with --store"
            )
        held = manifest.get("weighting", "none")
        if self._recipe is not None and held != self._recipe.weighting:
            raise StoreError(
                f"{self.folder}: holds factors of weighting {held}, asked for {self._recipe.weighting}; "
                "a store has one weighting, name another folder with --store"
            )
        return manifest

    @property
    def recipe(self) -> Recipe:
        """The recipe of the factors.

        Raises:
            StoreError: the store is weighted and the moments were not named.
        """
        if self._recipe is None and self._weighting != "none":
            if self._weighting == HEALED:
                raise StoreError(
                    f"{self.folder}: its factors were trained, so it cannot be extended; heal to another --out"
                )
            raise StoreError(
                f"{self.folder}: its factors are weighted ({self._weighting}), so what it lacks needs the moments; "
                f"complete it: flexmore decompose ... --store {self.folder} --weighting {self._weighting} --moments DIR"
            )
        return self._recipe or Metric()

    @property
    def _weighting(self) -> str:
        if self._recipe is not None:
            return self._recipe.weighting
        return str((self.committed or {}).get("weighting", "none"))

    def stem(self, key: MatrixKey, expert_digest: str, public_digest: str) -> str:
        """Name that files of this pair of matrices begin with."""
        content = [ALGORITHM_VERSION, expert_digest, public_digest, self.dtype]
        recipe = self.recipe.recipe(key)
        return hashlib.sha256(json.dumps(content + [recipe] * bool(recipe)).encode()).hexdigest()[:40]

    def find(
        self, key: MatrixKey, rank: int, expert_digest: str, public_digest: str, *, thorough: bool = False
    ) -> Entry | None:
        """The entry of a delta that is there already, at `rank` or higher; None if it is not.

        A file that the manifest names is checked by its size, one that it does not name (left by
        a run that did not finish) is read and checked in full; a damaged one counts as not there.

        Args:
            key: what to call the matrix in the entry.
            rank: lowest rank that will do.
            expert_digest: SHA-256 of the expert's matrix.
            public_digest: SHA-256 of the public expert's matrix.
            thorough: check files that the manifest names in full, too.
        """
        held = read_entries(self.committed or {"entries": []})
        if self._recipe is None and self._weighting != "none":  # what a run without moments can use
            digests = expert_digest, public_digest
            usable = (entry for entry in held if (entry.expert_digest, entry.public_digest) == digests)
            return next((entry for entry in usable if entry.key == key and entry.rank >= rank), None)
        known = {} if thorough else {entry.file: entry for entry in held}
        stem = self.stem(key, expert_digest, public_digest)
        for path in reversed(matching(self.folder / "factors", f"{stem}-r*.safetensors")):
            if int(path.stem.rpartition("-r")[2]) < rank:
                break
            name = f"factors/{path.name}"
            if name in known and path.stat().st_size == known[name].size:
                return dataclasses.replace(known[name], **key._asdict())
            entry = _check_file(self.folder, name, key)
            if entry and (entry.expert_digest, entry.public_digest) == (expert_digest, public_digest):
                return entry
        return None

    def put(self, key: MatrixKey, result: Decomposition, expert_digest: str, public_digest: str) -> Entry:
        """Write one delta's factors and spectrum; visible only when whole.

        Args:
            key: what to call the matrix in the entry.
            result: factors up to the rank to hold.
            expert_digest: SHA-256 of the expert's matrix.
            public_digest: SHA-256 of the public expert's matrix.

        Raises:
            StoreError: the disk is full or the folder cannot be written, or the factors
                overflow the store's dtype.
        """
        dtype = STORE_DTYPES[self.dtype]
        a, bt = (tensor.to("cpu", dtype).contiguous() for tensor in (result.factors.a, result.factors.bt))
        if not (bool(a.isfinite().all()) and bool(bt.isfinite().all())):
            raise StoreError(f"{key}: its factors overflow {self.dtype}; store them with --dtype float32")
        about: dict[str, Any] = {
            "rank": result.factors.rank,
            "expert_digest": expert_digest,
            "public_digest": public_digest,
            "method": result.method,
            "rejected": list(result.rejected),
            "error_ratio": result.error_ratio,
            "residual_energy": result.residual_energy,
        }
        if recipe := self.recipe.recipe(key):
            about["recipe"] = recipe
        values = result.singular_values.to("cpu", torch.float64).contiguous()
        tensors = {"a": a, "bt": bt, "singular_values": values, "row_checksums": row_checksums(a, bt)}
        name = f"factors/{self.stem(key, expert_digest, public_digest)}-r{result.factors.rank:06d}.safetensors"
        size, sha256 = _write_whole(self.folder / name, lambda file: _write_safetensors(file, tensors, about))
        return Entry(**key._asdict(), file=name, size=size, sha256=sha256, **about)

    def commit(self, entries: Iterable[Entry], source: WeightSource) -> FactorStore:
        """Write spectra and manifest over these entries and those that the folder's store has.

        A store that already says all this is left untouched.

        Raises:
            StoreError: the folder's store is of other weights, or cannot be written.
        """
        with _writing(self.folder), locked(self.folder):
            before = self._read_committed()
            old = {entry.key: entry for entry in read_entries(before)} if before else {}
            check_digests(self.folder, old.values(), source)
            current = before is not None and before["algorithm_version"] == ALGORITHM_VERSION
            new = old | {e.key: e for e in entries if not (current and e.key in old and self._serves(old[e.key], e))}
            manifest = self._manifest(new, before, source)
            if before is None or _content(manifest) != _content(before):
                self._write_manifest(manifest, new)
                _remove_superseded(self.folder, old, new)
        return FactorStore(self.folder)

    def _serves(self, old: Entry, new: Entry) -> bool:
        """Whether what the manifest says of a matrix may stay, though `new` is there as well."""
        path = self.folder / old.file
        if old.recipe != new.recipe:
            return False
        return old.file != new.file and old.rank >= new.rank and path.exists() and path.stat().st_size == old.size

    def _manifest(
        self, entries: Mapping[MatrixKey, Entry], before: dict[str, Any] | None, source: WeightSource
    ) -> dict[str, Any]:
        experts, sources = list(source.experts), source.describe()
        if before and not set(before["experts"]) <= set(experts):
            experts = list(dict.fromkeys([*before["experts"], *experts]))
            sources = _join_sources(before["sources"], sources)
        order = sorted(
            entries, key=lambda key: (experts.index(key.expert), key.layer, PROJECTIONS.index(key.projection))
        )
        weighting = {} if self._weighting == "none" else {"weighting": self._weighting}
        return {
            "format": FORMAT,
            "algorithm_version": ALGORITHM_VERSION,
            "dtype": self.dtype,
            **weighting,
            "sources": sources,
            "experts": experts,
            "entries": [_row(entries[key]) for key in order],
        }

    def _write_manifest(self, manifest: dict[str, Any], entries: Mapping[MatrixKey, Entry]) -> None:
        table = _spectra_table(self.folder, [entries[entry.key] for entry in read_entries(manifest)])
        spectra = io.BytesIO()
        pq.write_table(table, spectra)
        name = f"spectra-{hashlib.sha256(spectra.getbuffer()).hexdigest()[:16]}.parquet"
        size, sha256 = _write_whole(self.folder / name, lambda file: file.write(spectra.getbuffer()))
        manifest["spectra"] = {"file": name, "size": size, "sha256": sha256}
        manifest["peak_memory_bytes"] = _peak_memory()
        manifest["checksum"] = manifest_checksum(manifest)
        text = json.dumps(manifest, indent=1).encode()
        _write_whole(self.folder / MANIFEST, lambda file: file.write(text))
        for path in self.folder.glob("spectra-*.parquet"):
            if path.name != name:
                path.unlink(missing_ok=True)


def build_store(
    source: WeightSource,
    folder: str | AnyPath,
    *,
    max_rank: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    thorough: bool = False,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> FactorStore:
    """Decompose every delta of a source's domain experts into a store, or finish or extend one.

    What the folder holds already, at this rank or a higher one, is not computed again; where it
    holds everything, nothing is written and the result's `decomposed` is 0.

    Args:
        source: the experts.
        folder: the store; made if it is missing.
        max_rank: highest rank to hold, inclusive; None means the full rank of every matrix.
        dtype: of the stored factors: float32, bfloat16 or float16.
        device: where to decompose.
        thorough: read files that the manifest names in full to see whether they are still good.
        metric: in which to decompose; None means that of the folder's store, the plain one of a new store.
        progress: told of every matrix.

    Raises:
        StoreError: the folder cannot be written, or holds a store of other weights, dtype or metric.
        FlexmoreError: moments are missing, not finished or of another model.
        CheckpointError: a weight has NaN or infinity; names the matrix.
        UsageError: a bad rank, dtype or device.
    """
    check_max_rank(max_rank)
    place = parse_device(device)
    writer = StoreWriter(folder, dtype, metric)
    if writer.committed:
        check_digests(writer.folder, read_entries(writer.committed), source)
    keys = matrix_keys(source)
    entries, decomposed = [], 0
    for done, key in enumerate(keys, 1):
        digests = delta_digests(source, key)
        entry = writer.find(key, target_rank(source, key, max_rank), *digests, thorough=thorough)
        action = "kept"
        if entry is None:
            entry = writer.put(key, decompose_matrix(source, key, max_rank, place, writer.recipe), *digests)
            decomposed, action = decomposed + 1, f"decomposed ({entry.method})"
        entries.append(entry)
        if progress:
            progress(done, len(keys), f"{action} {key}")
    store = writer.commit(entries, source)
    store.decomposed = decomposed
    return store


def check_max_rank(max_rank: int | None) -> None:
    """Check the highest rank to hold.

    Raises:
        UsageError: it is not positive.
    """
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"--max-rank: an integer >= 1, or none for the full rank, got {max_rank}")


def decompose_matrix(
    source: WeightSource,
    key: MatrixKey,
    max_rank: int | None = None,
    device: str | torch.device = "cpu",
    recipe: Recipe | None = None,
) -> Decomposition:
    """Decompose one delta of a source; a matrix born low-rank never becomes dense.

    Args:
        source: the experts.
        key: a matrix of a domain expert.
        max_rank: highest rank wanted; None means all.
        device: where to compute.
        recipe: a `Metric` in which to decompose; None means the plain one.

    Raises:
        CheckpointError: NaN or infinity in the weights or moments, or no method passed its check.
        FlexmoreError: moments are missing, not finished or of another model.
    """
    born = source.born_factors(key)
    try:
        if isinstance(recipe, Metric) and recipe.weighting != "none":
            return _decompose_weighted(source, key, max_rank, device, recipe)
        if born is None:
            public = source.weight(key._replace(expert=source.experts[0])).to(device)
            return decompose(delta(source.weight(key).to(device), public), max_rank)
        result = decompose_factors(born.a.to(device), born.bt.to(device))
        return _truncated(result, min(max_rank or result.factors.rank, result.factors.rank))
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{key}: {one_line(error)}") from None


def _decompose_weighted(
    source: WeightSource, key: MatrixKey, max_rank: int | None, device: str | torch.device, metric: Metric
) -> Decomposition:
    moments = metric.matrix(source, key).to(device)
    change: Tensor | Factors | None = source.born_factors(key)
    if isinstance(change, Factors):
        change = Factors(change.a.to(device), change.bt.to(device))
    else:
        change = delta(source.weight(key).to(device), source.weight(key._replace(expert=source.experts[0])).to(device))
    return decompose_weighted(change, moments, metric.weighting, max_rank, metric.damping)


def _row(entry: Entry) -> dict[str, Any]:
    """An entry in the manifest; what only weighted stores have is left out of plain ones."""
    row = dataclasses.asdict(entry)
    return row if entry.recipe else {name: value for name, value in row.items() if name != "recipe"}


def _truncated(result: Decomposition, rank: int) -> Decomposition:
    cut = result.factors.truncate(rank)
    return dataclasses.replace(result, factors=cut)


def matrix_keys(source: WeightSource) -> list[MatrixKey]:
    """All deltas of a source; those of one public matrix follow each other."""
    experts = source.experts[1:]
    layers = range(source.shape.num_layers)
    return [MatrixKey(e, layer, p) for layer in layers for p in PROJECTIONS for e in experts]


def _join_sources(before: list[str], new: list[str]) -> list[str]:
    """Sources of all experts: a new ``name=FOLDER`` takes the place of the old one of that name.

    A folder that holds many experts stays, since what is new here are experts that it holds too.
    """
    if any("=" not in text for text in before):
        return before
    return list({text.partition("=")[0]: text for text in [*before, *new]}.values())


def target_rank(source: WeightSource, key: MatrixKey, max_rank: int | None) -> int:
    """Rank that a complete answer holds: what is asked (None: all), but no more than the matrix has."""
    born = source.born_factors(key)
    full = min(source.shape.matrix(key.projection))
    own = full if born is None else min(born.rank, full)
    return own if max_rank is None else min(max_rank, own)


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    text = json.dumps(about, sort_keys=True)
    checksums = [zlib.crc32(text.encode()), zlib.crc32(tensor_bytes(tensors["singular_values"]))]
    checksums.append(zlib.crc32(tensor_bytes(tensors["row_checksums"])))
    write_safetensors(file, tensors, {"entry": text, "checksums": json.dumps(checksums)})


def _check_file(folder: AnyPath, name: str, key: MatrixKey) -> Entry | None:
    """Read one file of factors in full; its entry, or None where anything in it is damaged."""
    path = folder / name
    try:
        with opened(path) as file:
            metadata = file.metadata()
            tensors = {part: file.get_tensor(part) for part in ("a", "bt", "singular_values", "row_checksums")}
        check_rows(path, tensors["a"], tensors["bt"], tensors["row_checksums"])
        about = json.loads(metadata["entry"])
        small = [
            metadata["entry"].encode(),
            tensor_bytes(tensors["singular_values"]),
            tensor_bytes(tensors["row_checksums"]),
        ]
        if json.loads(metadata["checksums"]) != [zlib.crc32(part) for part in small]:
            return None
        return Entry(**key._asdict(), file=name, size=path.stat().st_size, sha256=file_sha256(path), **about)
    except (StoreError, ValueError, KeyError, TypeError):
        return None


def _spectra_table(folder: AnyPath, entries: Iterable[Entry]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for entry in entries:
        values = read_spectrum(folder / entry.file)
        about = {"residual_energy": entry.residual_energy, "singular_values": values.numpy()}
        rows.append(entry.key._asdict() | about)
    schema = pa.schema(
        {
            "expert": pa.string(),
            "layer": pa.int32(),
            "projection": pa.string(),
            "residual_energy": pa.float64(),
            "singular_values": pa.list_(pa.float64()),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


class _Hashing:
    """A file open for writing that counts and hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        self.sha256.update(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _write_whole(path: AnyPath, write: Callable[[Any], object]) -> tuple[int, str]:
    """Write a file that appears under its name only when it is on disk; its size and SHA-256."""
    passed: list[_Hashing] = []

    def through(file: BinaryIO) -> None:
        passed.append(_Hashing(file))
        write(passed[0])

    with _writing(path):
        write_file(path, through)
    return passed[0].size, passed[0].sha256.hexdigest()


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot write the store: {one_line(error)}; make room or name another folder"
        ) from None


def _remove_superseded(folder: AnyPath, old: Mapping[MatrixKey, Entry], new: Mapping[MatrixKey, Entry]) -> None:
    """Delete files that only the manifest before this one named."""
    for name in {entry.file for entry in old.values()} - {entry.file for entry in new.values()}:
        (folder / name).unlink(missing_ok=True)


def _content(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, without what follows from it or only describes the run."""
    return {k: v for k, v in manifest.items() if k not in ("checksum", "peak_memory_bytes", "spectra")}


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; of its CUDA memory if that is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(peak, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak
