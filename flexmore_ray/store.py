"""Factors and spectra on disk, addressed by the weights that they were computed from.

    FOLDER/
      factors/STEM-rRANK.safetensors   one delta: a (rank, in), bt (rank, out), singular_values,
                                       row_checksums (rank, 2): CRC-32 of every row of a and bt
      spectra-HASH.parquet             the singular values of all deltas, one row a matrix
      manifest.json                    which file holds which matrix, with checksums; written last

STEM is a hash of the content of both matrices, of the stored dtype and of the version of the
algorithm, so a file is never taken for that of other weights, whatever the tensors are called. One
folder holds the factors of one set of weights: a source with others is refused.
Every file appears under its name only when it is whole (temporary name, fsync, rename), so a run
that was killed continues with the first matrix whose file is missing, and several processes may
write into one folder. Both factors are rank-major: a lower rank is a prefix of each.

What is checked when: every read compares the rows it returns with their checksums; opening a
store checks the manifest; `FactorStore.verify` reads everything and compares SHA-256.

This file reads; `flexmore_ray.build` writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexmore_ray.errors import StoreError, UsageError
from flexmore_ray.results import read_bounded
from flexmore_ray.spec import MatrixKey, ModelShape
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, StorageError, open_path
from flexmore_ray.storage.cache import local_file

ALGORITHM_VERSION = 2
"""Raised whenever `spectra` comes to give other factors for the same weights."""
FORMAT = "flexmore-store-1"
_TAGS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}
STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MANIFEST = "manifest.json"
_MANIFEST_BYTES = 256 << 20  # that of a million matrices is about as large

Progress = Callable[[int, int, str], None]
"""Called after each matrix with: matrices done, matrices in all, what was done."""


class FactorSource(Protocol):
    """Where factors come from: the store on disk, or actors that hold the experts."""

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        """Factors of one delta at a rank from 1 to `max_rank(key)`."""
        ...

    def spectrum(self, key: MatrixKey) -> Tensor:
        """Singular values of one delta, float64, largest first; all, or as many as are known."""
        ...

    def max_rank(self, key: MatrixKey) -> int:
        """Highest rank that `factors` gives for this delta."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        ...

    def recipe(self, expert: str) -> str:
        """What decided an expert's factors besides its weights; empty where nothing did."""
        ...


HEALED = "healed"
"""Weighting of a store whose factors were trained."""


class WeightSource(Protocol):
    """What the store needs of a source of experts: a part of `checkpoint.Source`."""

    experts: tuple[str, ...]
    shape: ModelShape

    @property
    def base_digest(self) -> str:
        """SHA-256 of what all experts share, the public one included."""
        ...

    def weight(self, key: MatrixKey) -> Tensor:
        """Dense matrix (out, in)."""
        ...

    def born_factors(self, key: MatrixKey) -> Factors | None:
        """Factors of a matrix that is low-rank already; None for a dense one."""
        ...

    def digest(self, key: MatrixKey) -> str:
        """SHA-256 of one matrix's content."""
        ...

    def describe(self) -> list[str]:
        """The SOURCE strings that open it again."""
        ...


class Recipe(Protocol):
    """What decides factors besides the weights: the metric of a decomposition, say."""

    @property
    def weighting(self) -> str:
        """One word for all of a store; "none" for the plain decomposition."""
        ...

    def recipe(self, key: MatrixKey) -> str:
        """What decides the factors of one matrix; empty where nothing does."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One delta in the store: the manifest's row about its file.

    Spectrum, `error_ratio` and `residual_energy` of healed factors are those of the factors that training began with.
    """

    expert: str
    layer: int
    projection: str
    rank: int
    """Highest rank held."""
    file: str
    """Path within the store."""
    size: int
    sha256: str
    expert_digest: str
    public_digest: str
    method: str
    """Method of decomposition whose result passed its check."""
    rejected: list[str]
    """Methods whose result did not."""
    error_ratio: float
    """Verified bound on squared error over least squared error, before rounding to the stored dtype."""
    residual_energy: float
    """Squared Frobenius norm of what the stored singular values leave out."""
    recipe: str = ""
    """What decided the factors besides the weights: `moments.files.Metric.recipe`; empty in the plain metric."""

    @property
    def key(self) -> MatrixKey:
        """The matrix that this entry is about."""
        return MatrixKey(self.expert, self.layer, self.projection)


# --------------------------------------------------------------------------------- reading


class FactorStore:
    """A finished store, opened for reading; `open_store` and `build_store` make one.

    Attributes:
        folder: where it lies.
        decomposed: matrices that the `build_store` call which returned it had to decompose.
    """

    def __init__(self, folder: AnyPath, decomposed: int = 0) -> None:
        self.folder = folder
        self.decomposed = decomposed
        self._load(read_manifest(folder))

    def _load(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._entries = {entry.key: entry for entry in read_entries(manifest)}
        self.__dict__.pop("_spectra", None)

    @property
    def sources(self) -> list[str]:
        """The SOURCE strings that it was made from."""
        return list(self.manifest["sources"])

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, the public one first."""
        return tuple(self.manifest["experts"])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return STORE_DTYPES[self.manifest["dtype"]]

    @property
    def weighting(self) -> str:
        """The sides of the metric in which deltas were decomposed; "none" in the plain one."""
        return str(self.manifest.get("weighting", "none"))

    def recipe(self, expert: str) -> str:
        """What decided an expert's factors besides its weights; empty in the plain metric."""
        return joint_recipe([entry.recipe for entry in self._entries.values() if entry.expert == expert])

    def keys(self) -> list[MatrixKey]:
        """All matrices held."""
        return list(self._entries)

    def entry(self, key: MatrixKey) -> Entry:
        """What the manifest says of one matrix.

        Raises:
            StoreError: the store does not hold it.
        """
        if key not in self._entries:
            known = ", ".join(self.experts[1:])
            raise StoreError(f"{self.folder}: holds no factors of {key}; its domain experts are {known}")
        return self._entries[key]

    def max_rank(self, key: MatrixKey) -> int:
        """Highest rank held of one delta."""
        return self.entry(key).rank

    def spectrum(self, key: MatrixKey) -> Tensor:
        """Singular values of one delta, float64, largest first; see also `residual_energy`."""
        self.entry(key)
        return self._spectra[key]

    def residual_energy(self, key: MatrixKey) -> float:
        """Squared Frobenius norm of what `spectrum` leaves out; 0 where it is complete."""
        return self.entry(key).residual_energy

    def factors(self, key: MatrixKey, rank: int) -> Factors:
        """The leading `rank` rows of one delta's factors; reads no more than these.

        Raises:
            StoreError: the rank is above the one held, or the file is missing or damaged.
            UsageError: the rank is not positive.
        """
        if rank < 1:
            raise UsageError(f"a rank is an integer >= 1, got {rank} for {key}")
        entry = self.entry(key)
        if rank > entry.rank:
            raise StoreError(
                f"{self.folder}: rank {rank} asked for {key}, but the store holds rank {entry.rank}; "
                f"extend it with: flexmore decompose ... --store {self.folder} --max-rank {rank}"
            )
        if not (self.folder / entry.file).exists():
            self._load(read_manifest(self.folder))  # another process has extended the store meanwhile
            entry = self.entry(key)
        return read_factors(self.folder / entry.file, min(rank, entry.rank))

    def check_source(self, source: WeightSource) -> None:
        """Make sure that the store was made from a source's weights, as far as it covers them.

        Raises:
            StoreError: names the first matrix that differs.
        """
        check_digests(self.folder, self._entries.values(), source)

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file in full and compare its SHA-256 with the manifest's.

        Raises:
            StoreError: names the first file that is missing or damaged.
        """
        files = {entry.file: (entry.size, entry.sha256) for entry in self._entries.values()}
        spectra = self.manifest["spectra"]
        files[spectra["file"]] = (spectra["size"], spectra["sha256"])
        for done, (name, (size, sha256)) in enumerate(files.items(), 1):
            path = self.folder / name
            _check_size(path, size)
            if file_sha256(path) != sha256:
                raise StoreError(f"{path}: damaged, its SHA-256 is not the manifest's; {_REDO}")
            if progress:
                progress(done, len(files), f"checked {name}")

    @functools.cached_property
    def _spectra(self) -> dict[MatrixKey, Tensor]:
        about = self.manifest["spectra"]
        path = self.folder / about["file"]
        _check_size(path, about["size"])
        if file_sha256(path) != about["sha256"]:
            raise StoreError(f"{path}: damaged, its SHA-256 is not the manifest's; {_REDO}")
        try:
            rows = read_bounded(pq.ParquetFile(local_file(path))).to_pylist()
        except ValueError as error:
            raise StoreError(f"{path}: damaged ({one_line(error)}); {_REDO}") from None
        return {
            MatrixKey(row["expert"], row["layer"], row["projection"]): torch.tensor(
                row["singular_values"], dtype=torch.float64
            )
            for row in rows
        }


def joint_recipe(recipes: Iterable[str]) -> str:
    """One recipe for several matrices; empty where each is."""
    some = [recipe for recipe in recipes if recipe]
    return hashlib.sha256(" ".join(some).encode()).hexdigest()[:24] if some else ""


_REDO = "delete it and run flexmore decompose again"


def open_store(folder: str | AnyPath) -> FactorStore:
    """Open a finished store.

    Raises:
        StoreError: there is none, it was not finished, or its manifest is damaged.
    """
    return FactorStore(open_path(folder))


def delta_digests(source: WeightSource, key: MatrixKey) -> tuple[str, str]:
    """SHA-256 of the two matrices that a delta is the difference of: the expert's, the public expert's."""
    return source.digest(key), source.digest(key._replace(expert=source.experts[0]))


def check_digests(folder: AnyPath, entries: Iterable[Entry], source: WeightSource) -> None:
    """Compare the weights that entries were computed from with a source's.

    Raises:
        StoreError: names the first matrix that differs.
    """
    public, experts = source.experts[0], set(source.experts[1:])
    for entry in entries:
        if entry.layer >= source.shape.num_layers:
            raise StoreError(f"{folder}: made from other weights: the source has no layer {entry.layer}; {_ELSEWHERE}")
        base = entry.key._replace(expert=public)
        if source.digest(base) != entry.public_digest:
            raise StoreError(f"{folder}: made from other weights: {base} differs; {_ELSEWHERE}")
        if entry.expert in experts and source.digest(entry.key) != entry.expert_digest:
            raise StoreError(f"{folder}: made from other weights: {entry.key} differs; {_ELSEWHERE}")


_ELSEWHERE = "name another folder with --store"


def read_factors(path: AnyPath, rank: int) -> Factors:
    """The leading `rank` rows of the factors in a file, compared with their checksums; reads no more than these.

    Raises:
        StoreError: the file is missing or damaged.
    """
    with opened(path) as file:
        a, bt = (file.get_slice(name)[:rank] for name in ("a", "bt"))
        checksums = file.get_slice("row_checksums")[:rank]
    check_rows(path, a, bt, checksums)
    return Factors(a, bt)


def read_spectrum(path: AnyPath) -> Tensor:
    """Singular values in a file of factors, float64, largest first.

    Raises:
        StoreError: the file is missing or damaged.
    """
    with opened(path) as file:
        return file.get_tensor("singular_values")


def check_rows(path: AnyPath, a: Tensor, bt: Tensor, checksums: Tensor) -> None:
    """Compare rows of factors with their checksums.

    Args:
        path: where they were read, for the message.
        a: (rank, in).
        bt: (rank, out).
        checksums: (rank, 2), see `row_checksums`.

    Raises:
        StoreError: they differ.
    """
    if not torch.equal(row_checksums(a, bt), checksums):
        raise StoreError(f"{path}: damaged, rows of the factors do not match their checksums; {_REDO}")


@contextlib.contextmanager
def opened(path: AnyPath) -> Iterator[Any]:
    """A file of factors, open for reading; errors name it and say what to do."""
    try:
        with safe_open(str(local_file(path)), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise StoreError(f"{path}: missing, though the manifest names it; run flexmore decompose again") from None
    except StorageError:
        raise
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: damaged or not readable ({one_line(error)}); {_REDO}") from None


def _check_size(path: AnyPath, size: int) -> None:
    try:
        found = path.stat().st_size
    except StorageError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: {one_line(error)}; run flexmore decompose again") from None
    if found != size:
        raise StoreError(f"{path}: damaged, {found:,} bytes where the manifest says {size:,}; {_REDO}")


def read_manifest(folder: AnyPath) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError(f"more than {_MANIFEST_BYTES:,} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{folder}: no {MANIFEST}, so not a store, or one whose decomposition did not finish; "
            f"start or continue it with: flexmore decompose ... --store {folder}"
        ) from None
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged ({one_line(error)}); {_REDO}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: not the manifest of a store of format {FORMAT}; name another folder with --store")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise StoreError(f"{path}: damaged or edited, its checksum does not match; {_REDO}")
    return manifest


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_entries(manifest: Mapping[str, Any]) -> list[Entry]:
    """The rows of a manifest."""
    try:
        entries = [Entry(**row) for row in manifest["entries"]]
        files = [manifest["spectra"]["file"], *(entry.file for entry in entries)] if "spectra" in manifest else []
    except (KeyError, TypeError) as error:
        raise StoreError(f"the manifest of a store is damaged: {one_line(error)}; {_REDO}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise StoreError(f"the manifest of a store names files in its folder, got {str(file)[:80]!r}; {_REDO}")
    return entries


def parse_device(device: str | torch.device) -> torch.device:
    """A device that works here.

    Raises:
        UsageError: an unknown name, or a device that this machine or this PyTorch does not have.
    """
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {device} cannot be used here ({one_line(error)})") from None
    return place


# ------------------------------------------------------------------------------ file level


def row_checksums(a: Tensor, bt: Tensor) -> Tensor:
    """CRC-32 of every row of both factors, (rank, 2)."""
    columns = [[zlib.crc32(row) for row in tensor_bytes(tensor)] for tensor in (a, bt)]
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's memory as a numpy array of bytes, without a copy."""
    return tensor.contiguous().view(torch.uint8).numpy()


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the safetensors format straight from the tensors' memory, in their order.

    The library's own writer copies all tensors first, which would double the memory needed.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
        file.write(memoryview(tensor_bytes(tensor)).cast("B"))


def file_sha256(path: AnyPath) -> str:
    """SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except StorageError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot read: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
