"""The store: content addresses, resuming after a kill, damage, other weights, several writers."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from flexmore_ray.build import StoreWriter, build_store, decompose_matrix
from flexmore_ray.errors import CheckpointError, StoreError, UsageError
from flexmore_ray.spec import PROJECTIONS, MatrixKey, ModelShape
from flexmore_ray.spectra import Factors, decompose, delta
from flexmore_ray.store import FactorStore, open_store

KEY = MatrixKey("math", 0, "down_proj")


class FakeSource:
    """Experts of random weights; a part of what `checkpoint.Source` is."""

    def __init__(self, experts: tuple[str, ...] = ("public", "math", "news"), seed: int = 0) -> None:
        self.experts = experts
        self.seed = seed
        self.changed: dict[MatrixKey, Tensor] = {}
        self.born: dict[MatrixKey, Factors] = {}
        self.shape = ModelShape(
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            vocab_size=8,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
        )

    def weight(self, key: MatrixKey) -> Tensor:
        if key in self.changed:
            return self.changed[key]
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randn(self.shape.matrix(key.projection), generator=generator).bfloat16()

    def born_factors(self, key: MatrixKey) -> Factors | None:
        return self.born.get(key)

    def digest(self, key: MatrixKey) -> str:
        born = self.born.get(key)
        tensors = [self.weight(key)] if born is None else [born.a, born.bt]
        return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()

    def describe(self) -> list[str]:
        return [f"fake={self.seed}"]


def files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of every file under a folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in found}


def contents(folder: Path) -> dict[str, bytes]:
    """Content of every file but the manifest, which also says how much memory the run took."""
    return {name: content for name, (_, _, content) in files(folder).items() if name != "manifest.json"}


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    build_store(FakeSource(), folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A finished store of one's own."""
    return Path(shutil.copytree(built, tmp_path / "store"))


def test_every_rank_is_a_slice_of_the_decomposition(built: Path, source: FakeSource) -> None:
    store = open_store(built)
    keys = store.keys()
    for key in keys:
        expected = decompose(delta(source.weight(key), source.weight(key._replace(expert="public"))))
        assert store.max_rank(key) == 16
        torch.testing.assert_close(store.spectrum(key), expected.singular_values)
        for rank in (1, 7, 16):
            factors = store.factors(key, rank)
            assert torch.equal(factors.a, expected.factors.a[:rank])
            assert torch.equal(factors.bt, expected.factors.bt[:rank])
    assert len(keys) == len(set(keys)) == 2 * 2 * 3
    assert store.experts == ("public", "math", "news")
    assert store.sources == ["fake=0"]
    store.check_source(source)
    store.verify()


def test_spectra_are_a_plain_parquet_table(built: Path) -> None:
    store = open_store(built)
    rows = pq.read_table(built / store.manifest["spectra"]["file"]).to_pylist()
    assert [MatrixKey(r["expert"], r["layer"], r["projection"]) for r in rows] == store.keys()
    assert rows[0]["singular_values"] == store.spectrum(store.keys()[0]).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_a_smaller_dtype(dtype: str, source: FakeSource, tmp_path: Path, built: Path) -> None:
    store = build_store(source, tmp_path, dtype=dtype)
    factors, exact = store.factors(KEY, 5), open_store(built).factors(KEY, 5)
    assert factors.a.dtype == store.dtype == getattr(torch, dtype)
    assert torch.equal(factors.bt, exact.bt.to(store.dtype))
    with pytest.raises(StoreError, match=f"holds factors in {dtype}, asked for float32"):
        build_store(source, tmp_path)


def test_a_second_run_does_nothing(folder: Path, source: FakeSource) -> None:
    before = files(folder)
    assert build_store(source, folder).decomposed == 0
    assert build_store(source, folder, max_rank=3).decomposed == 0
    assert files(folder) == before


def test_a_higher_rank_extends(source: FakeSource, tmp_path: Path, built: Path) -> None:
    low = build_store(source, tmp_path, max_rank=4)
    assert low.decomposed == 12
    assert low.max_rank(KEY) == 4
    message = r"rank 5 asked for expert math, layer 0, down_proj, but the store holds rank 4; .*--max-rank 5"
    with pytest.raises(StoreError, match=message):
        low.factors(KEY, 5)
    high = build_store(source, tmp_path)
    assert high.decomposed == 12
    assert high.max_rank(KEY) == 16
    assert contents(tmp_path) == contents(built)
    assert low.factors(KEY, 4).rank == 4  # opened before the extension replaced its files
    assert low.max_rank(KEY) == 16


def test_one_changed_matrix_is_found_and_only_it_is_computed(source: FakeSource, folder: Path, tmp_path: Path) -> None:
    source.changed[KEY] = source.weight(KEY) * 2
    with pytest.raises(StoreError, match=r"other weights: expert math, layer 0, down_proj differs; .*--store"):
        open_store(folder).check_source(source)
    before = files(folder)
    with pytest.raises(StoreError, match="other weights"):
        build_store(source, folder)
    assert files(folder) == before
    (folder / "manifest.json").unlink()
    assert build_store(source, folder).decomposed == 1
    build_store(source, tmp_path / "fresh")
    assert contents(folder).items() >= contents(tmp_path / "fresh").items()


def test_a_changed_public_expert_is_other_weights(source: FakeSource, folder: Path) -> None:
    key = KEY._replace(expert="public")
    source.changed[key] = source.weight(key) * 2
    with pytest.raises(StoreError, match="expert public, layer 0, down_proj differs"):
        open_store(folder).check_source(source)


def test_experts_are_added_one_source_at_a_time(source: FakeSource, tmp_path: Path, built: Path) -> None:
    build_store(FakeSource(("public", "math")), tmp_path)
    store = build_store(FakeSource(("public", "news")), tmp_path)
    assert store.decomposed == 6
    assert store.experts == ("public", "math", "news")
    assert contents(tmp_path) == contents(built)
    assert build_store(source, tmp_path).decomposed == 0


def test_experts_that_were_born_low_rank(source: FakeSource, tmp_path: Path) -> None:
    a, bt = torch.randn(4, 24), torch.randn(4, 16)
    source.born[KEY] = Factors(a, bt)
    store = build_store(source, tmp_path)
    assert store.max_rank(KEY) == 4
    assert store.entry(KEY).method == "factors"
    torch.testing.assert_close(store.factors(KEY, 4).dense(), bt.T @ a, rtol=1e-4, atol=1e-4)
    assert build_store(source, tmp_path).decomposed == 0
    assert decompose_matrix(source, KEY, 2).factors.rank == 2


def test_an_expert_equal_to_the_public_one(source: FakeSource, tmp_path: Path) -> None:
    source.changed[KEY] = source.weight(KEY._replace(expert="public"))
    store = build_store(source, tmp_path, max_rank=2)
    assert store.entry(KEY).method == "zero"
    assert not store.factors(KEY, 2).dense().any()


def test_a_weight_that_is_not_finite_is_named(source: FakeSource, tmp_path: Path) -> None:
    source.changed[KEY] = source.weight(KEY).fill_(float("inf"))
    with pytest.raises(CheckpointError, match="expert math, layer 0, down_proj: NaN or infinity"):
        build_store(source, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_factors_that_overflow_the_dtype_are_refused(source: FakeSource, tmp_path: Path) -> None:
    source.changed[KEY] = source.weight(KEY).float() * 1e12
    with pytest.raises(StoreError, match=r"down_proj: its factors overflow float16; .*float32"):
        build_store(source, tmp_path, dtype="float16")


# ----------------------------------------------------------------------------------- damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["header", "first row", "end"])
def test_a_flipped_bit_is_found_and_named_and_repaired(part: str, folder: Path, source: FakeSource) -> None:
    store = open_store(folder)
    path = folder / store.entry(KEY).file
    before = contents(folder)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, {"header": 30, "first row": 8 + header + 5, "end": -1}[part])
    with pytest.raises(StoreError, match=f"{path.name}: damaged.*delete it and run flexmore decompose"):
        open_store(folder).verify()
    if part == "first row":
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            store.factors(KEY, 1)
    assert build_store(source, folder, thorough=True).decomposed == 1
    assert contents(folder) == before


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 4000, "cut"])
def test_a_damaged_file_is_found_and_named_and_repaired(content: bytes | str, folder: Path, source: FakeSource) -> None:
    store = open_store(folder)
    path = folder / store.entry(KEY).file
    path.write_bytes(path.read_bytes()[:-100] if isinstance(content, str) else content)
    for read in (lambda: store.factors(KEY, 16), store.verify):
        with pytest.raises(StoreError, match=path.name):
            read()
    assert build_store(source, folder).decomposed == 1
    open_store(folder).verify()


def test_a_missing_file_is_named_and_repaired(folder: Path, source: FakeSource) -> None:
    store = open_store(folder)
    path = folder / store.entry(KEY).file
    path.unlink()
    for read in (lambda: store.factors(KEY, 1), store.verify):
        with pytest.raises(StoreError, match=path.name):
            read()
    assert build_store(source, folder).decomposed == 1


def test_a_damaged_spectra_table_is_named(folder: Path) -> None:
    store = open_store(folder)
    path = folder / store.manifest["spectra"]["file"]
    flip(path, 50)
    for read in (lambda: store.spectrum(KEY), store.verify):
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            read()


@pytest.mark.parametrize("content", ["", "garbage", "{}", "[]", '{"format": "flexmore-store-1"}', "edited"])
def test_a_damaged_manifest_is_named(content: str, folder: Path) -> None:
    path = folder / "manifest.json"
    if content == "edited":
        content = path.read_text().replace('"rank": 16', '"rank": 15')
    path.write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        open_store(folder)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match=r"no manifest\.json.*flexmore decompose"):
            open_store(folder)


# ---------------------------------------------------------------------------------- writing


def test_bad_arguments(folder: Path, source: FakeSource) -> None:
    store = open_store(folder)
    for call, words in [
        (lambda: build_store(source, folder, max_rank=0), "max-rank: an integer >= 1"),
        (lambda: build_store(source, folder, dtype="int8"), "dtype: unknown 'int8'"),
        (lambda: build_store(source, folder, device="nowhere"), "device: nowhere cannot be used"),
        (lambda: store.factors(KEY, 0), "an integer >= 1"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="domain experts are math, news"):
        store.factors(KEY._replace(expert="code"), 1)


def test_a_folder_that_cannot_be_written(source: FakeSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the store: Not a directory"):
        build_store(source, tmp_path / "file" / "store")


def test_a_full_disk_leaves_nothing_half_written(source: FakeSource, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot write the store: File too large; make room"):
            build_store(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == {}


def test_writers_can_put_anywhere_and_commit_in_one_place(source: FakeSource, tmp_path: Path, built: Path) -> None:
    entries = []
    for expert in ("news", "math"):
        writer = StoreWriter(tmp_path)
        for layer in range(2):
            for projection in PROJECTIONS:
                key = MatrixKey(expert, layer, projection)
                digests = source.digest(key), source.digest(key._replace(expert="public"))
                assert writer.find(key, 16, *digests) is None
                entries.append(writer.put(key, decompose_matrix(source, key), *digests))
                assert writer.find(key, 16, *digests) == entries[-1]
    with pytest.raises(StoreError, match="did not finish"):
        open_store(tmp_path)
    assert isinstance(StoreWriter(tmp_path).commit(entries, source), FactorStore)
    assert contents(tmp_path) == contents(built)


def test_equal_matrices_share_a_file(source: FakeSource, tmp_path: Path) -> None:
    for layer in range(2):
        for projection in PROJECTIONS:
            key = MatrixKey("news", layer, projection)
            source.changed[key] = source.weight(key._replace(expert="math"))
    store = build_store(source, tmp_path)
    assert store.decomposed == 6
    assert store.entry(KEY).file == store.entry(KEY._replace(expert="news")).file
    assert build_store(source, tmp_path).decomposed == 0


def test_temporary_files_of_killed_runs_are_removed(folder: Path, source: FakeSource) -> None:
    old, new = folder / "factors" / ".x.safetensors.1.tmp", folder / "factors" / ".y.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    build_store(source, folder)
    assert not old.exists()
    assert new.exists()


def build_slowly(folder: str, seconds: float) -> None:
    """What the child processes of these tests run."""
    print(build_store(FakeSource(), folder, progress=lambda *_: time.sleep(seconds)).decomposed)


def start_building(folder: Path, seconds: float) -> subprocess.Popen[str]:
    code = f"import tests.test_store as t; t.build_slowly({str(folder)!r}, {seconds})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for_files(folder: Path, number: int) -> None:
    limit = time.monotonic() + 100
    while len(list((folder / "factors").glob("[!.]*.safetensors"))) < number:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_killed_run_is_continued_and_two_at_once_agree(tmp_path: Path, source: FakeSource, built: Path) -> None:
    killed = start_building(tmp_path, 0.2)
    wait_for_files(tmp_path, 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(StoreError, match="did not finish"):
        open_store(tmp_path)
    finished = {name: value for name, value in files(tmp_path).items() if not Path(name).name.startswith(".")}
    assert 3 <= len(finished) < 12
    both = [start_building(tmp_path, 0.05) for _ in range(2)]
    counts = [int(process.communicate(timeout=100)[0]) for process in both]
    assert all(count <= 12 - len(finished) for count in counts)
    assert sum(counts) >= 12 - len(finished)
    after = files(tmp_path)
    assert {name: after[name] for name in finished} == finished
    assert contents(tmp_path) == contents(built)
    assert json.loads((tmp_path / "manifest.json").read_text())["experts"] == list(source.experts)
    open_store(tmp_path).verify()
