"""Places by URI, against an S3-compatible server and a proxy before it that fails on demand."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmore_ray import storage
from flexmore_ray.__main__ import main
from flexmore_ray.atomic import alone, locked, write_file
from flexmore_ray.build import StoreWriter, build_store
from flexmore_ray.checkpoint.writing import new_folder
from flexmore_ray.errors import CheckpointError, FlexmoreError, UsageError
from flexmore_ray.export import export_mixture
from flexmore_ray.mixture import open_mixture
from flexmore_ray.results import CellKey, commit_cell, done_cells, read_cells
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.storage import RemotePath, StorageError, cache, lease, open_path
from flexmore_ray.storage.cache import local_file, local_folder
from flexmore_ray.store import open_store
from tests.common import NAMES, random_model, write
from tests.object_store import BUCKET, CREDENTIALS, Proxy, client, keys, use

BIG = bytes(range(256)) * 100_000  # more than two pieces of an upload


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """This process finds the server by way of a proxy, and has a cache of its own."""
    proxy = Proxy(s3_url)
    use(monkeypatch, proxy.url)
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.01))
    yield proxy
    proxy.close()


@pytest.fixture
def root(proxy: Proxy, request: pytest.FixtureRequest) -> RemotePath:
    """A folder of this test."""
    return RemotePath(f"s3://{BUCKET}/{request.node.name}-{time.time_ns()}")


def there(proxy: Proxy, root: RemotePath) -> dict[str, bytes]:
    """What is in a folder, by another client."""
    return keys(client(proxy.url), "/".join(root.parts[1:]))


def sometimes(fault: str, numbers: set[int], methods: str = "PUT") -> Any:
    """The fault, for those of the requests of some methods whose numbers are given."""
    count = iter(range(1, 10**6))
    return lambda method, path: fault if method in methods.split() and next(count) in numbers else None


# ---------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("results", Path("results")),
        ("file:///tmp/a%20b", Path("/tmp/a b")),
        ("file://localhost/tmp", Path("/tmp")),
        ("a/s3://b", Path("a/s3://b")),
    ],
)
def test_what_is_no_uri_of_a_store_is_a_path_of_this_machine(text: str, path: Path) -> None:
    assert open_path(text) == path
    assert type(open_path(text)) is type(path)


@given(st.lists(st.sampled_from(["a", "b.c", ".", "..", "", "d e", "x%20", "ü"]), max_size=6))
def test_names_are_those_of_a_posix_path(parts: list[str]) -> None:
    expected = Path(os.path.normpath("/".join(["root", "deep", *parts]))) if parts else Path("root/deep")
    if expected.parts[:1] != ("root",) or len(expected.parts) < 2:
        return
    found = RemotePath("s3://root/deep")
    for part in parts:
        try:
            found = found / part
        except UsageError:
            return  # left the bucket on the way
    assert str(found) == f"s3://{expected}"
    assert (found.name, found.stem, found.suffix) == (expected.name, expected.stem, expected.suffix)
    assert pickle.loads(pickle.dumps(found)) == found == RemotePath(str(found))
    assert str(found.parent) == f"s3://{expected.parent}"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIACANARY:sec/ret@bucket/x",
        "s3://AKIACANARY@bucket/x",
        "gs://bucket/x?access_key=AKIACANARY",
        "s3://AKIACANARY:secret/x",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", f"math={uri}"]) == 2
    said = capsys.readouterr().err
    assert "credentials" in said
    assert said.count("\n") == 1
    assert "CANARY" not in said
    assert "ret" not in said.replace("secret_", "").replace("SECRET", "")


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "s3:///x", "s3://bucket/../x", "file://host/x", "hdfs://a/b"])
def test_bad_uris_end_in_one_line(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_path(uri)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------- objects, failing


def test_an_object_is_written_read_listed_and_deleted(proxy: Proxy, root: RemotePath) -> None:
    assert not root.exists()
    (root / "a/one.txt").write_bytes(b"one")
    write_file(root / "a/two.txt", lambda file: file.write(b"two"))
    (root / "empty").write_bytes(b"")
    assert there(proxy, root) == {"a/one.txt": b"one", "a/two.txt": b"two", "empty": b""}
    assert (root / "a/one.txt").read_text() == "one"
    assert [path.name for path in (root / "a").glob("t*")] == ["two.txt"]
    assert [path.name for path in root.iterdir()] == ["a", "empty"]
    assert [root.is_dir(), root.is_file(), (root / "empty").is_file()] == [True, False, True]
    (root / "empty").unlink()
    (root / "empty").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="empty"):
        (root / "empty").unlink()
    with pytest.raises(FileNotFoundError, match="empty"):
        (root / "empty").read_bytes()


def test_a_small_object_takes_one_request_and_the_check_of_its_size(proxy: Proxy, root: RemotePath) -> None:
    (root / "x").write_bytes(b"abc")
    assert [method for method, _ in proxy.seen] == ["PUT", "HEAD"]


@pytest.mark.parametrize("fault", ["503", "cut request", "lost"])
@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "big"])
def test_a_write_that_fails_for_a_moment_is_repeated(
    proxy: Proxy, root: RemotePath, fault: str, content: bytes
) -> None:
    proxy.fault = sometimes(fault, {1, 3, 4, 5, 8})
    (root / "x").write_bytes(content)
    proxy.fault = lambda method, path: None
    assert there(proxy, root) == {"x": content}


@pytest.mark.parametrize("fault", ["503", "cut answer", "lost"])
def test_a_read_that_fails_for_a_moment_is_repeated(proxy: Proxy, root: RemotePath, fault: str) -> None:
    (root / "x").write_bytes(BIG)
    proxy.fault = sometimes(fault, {2, 3, 4, 7}, "GET HEAD")
    assert (root / "x").read_bytes() == BIG
    assert local_file(root / "x").read_bytes() == BIG


@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "big"])
def test_a_write_that_fails_for_good_leaves_what_was_there(proxy: Proxy, root: RemotePath, content: bytes) -> None:
    (root / "x").write_bytes(b"before")
    proxy.fault = lambda method, path: (
        "503" if method == "PUT" and ("partNumber=2" in path or "?" not in path) else None
    )
    with pytest.raises(StorageError) as caught:
        (root / "x").write_bytes(content)
    assert "\n" not in str(caught.value)
    proxy.fault = lambda method, path: None
    time.sleep(0.2)
    assert there(proxy, root) == {"x": b"before"}


def test_an_exception_in_the_middle_of_a_write_publishes_nothing(proxy: Proxy, root: RemotePath) -> None:
    def broken(file: Any) -> None:
        file.write(b"half")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write_file(root / "x", broken)
    assert there(proxy, root) == {}


def test_a_process_killed_in_the_middle_of_a_write_publishes_nothing(proxy: Proxy, root: RemotePath) -> None:
    arrived = threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT":
            arrived.set()
            time.sleep(2)

    (root / "x").write_bytes(b"before")
    proxy.fault = hold
    program = "import sys; from flexmore_ray.storage import RemotePath; "
    program += "RemotePath(sys.argv[1]).write_bytes(bytes(25_600_000))"
    with subprocess.Popen([sys.executable, "-c", program, str(root / "x")]) as writer:
        assert arrived.wait(120)
        writer.kill()
    proxy.fault = lambda method, path: None
    time.sleep(3)
    assert there(proxy, root) == {"x": b"before"}


@pytest.mark.parametrize(
    ("fault", "says"), [("403", "no permission"), ("503", "reduce your request rate")], ids=["refused", "busy"]
)
def test_errors_of_a_store_are_one_line_and_say_the_way_out(
    proxy: Proxy, root: RemotePath, fault: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fault = lambda method, path: fault
    for command in (
        ["inspect", str(root)],
        ["params", f"{root}/mixture.yaml"],
        ["report", str(root), "--out", f"{root}/report"],
        ["decompose", "zoo://nano", "--store", f"{root}/store"],
        ["export", "zoo://nano", "--format", "flexolmo", "--out", f"{root}/model"],
    ):
        assert main(command) == 1, command
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        if fault == "403" or "HEAD" not in {method for method, _ in proxy.seen[-1:]}:
            assert says in said, said
        assert "canary" not in said


def test_a_missing_bucket_is_named(proxy: Proxy) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/x: no such bucket; make it first"):
        RemotePath("s3://no-such-bucket/x").write_bytes(b"1")


def test_a_server_that_is_not_there_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://user:canary@127.0.0.1:9")
    monkeypatch.setattr(storage, "_WAITS", (0.01,))
    with pytest.raises(StorageError, match=r"no answer from http://127.0.0.1:9 .*; check AWS_ENDPOINT_URL") as caught:
        RemotePath("s3://bucket/x").exists()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), StorageError)
    assert "canary" not in str(caught.value)


def test_another_endpoint_is_asked_from_then_on(
    proxy: Proxy, root: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write_bytes(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "_WAITS", (0.01,))
    with pytest.raises(StorageError, match=r"no answer from http://127.0.0.1:9 "):
        RemotePath(str(root / "x")).exists()


# ------------------------------------------------------------------------------- the cache


def test_the_cache_fetches_once_and_again_when_an_object_is_replaced(proxy: Proxy, root: RemotePath) -> None:
    (root / "x").write_bytes(b"first")
    first = local_file(root / "x")
    assert first.read_bytes() == b"first"
    seen = len(proxy.seen)
    assert local_file(root / "x") == first
    assert [method for method, _ in proxy.seen[seen:]] == ["HEAD"]
    (root / "x").write_bytes(b"second!")
    assert local_file(root / "x").read_bytes() == b"second!"
    assert not first.exists()
    with pytest.raises(FileNotFoundError):
        local_file(root / "y")


def test_many_that_want_a_file_at_once_fetch_it_once(proxy: Proxy, root: RemotePath) -> None:
    (root / "x").write_bytes(BIG)
    proxy.latency = 0.05
    seen = len(proxy.seen)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: local_file(root / "x"), range(8)))
    assert len(set(found)) == 1
    assert found[0].read_bytes() == BIG
    assert [method for method, _ in proxy.seen[seen:]].count("GET") == 2  # pieces of 16 MiB


def test_the_cache_keeps_to_its_limit_and_spares_what_is_in_use(
    proxy: Proxy, root: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXMORE_CACHE_GB", "0.000025")  # 25,000 bytes
    paths = [root / f"x{number}" for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(10_000))
    files = [local_file(path) for path in paths[:3]]
    assert all(file.exists() for file in files)  # asked for a moment ago
    for age, file in enumerate(files):
        os.utime(file.parent, (time.time() - 3600 + age,) * 2)
    last = local_file(paths[3])
    assert [file.exists() for file in files] == [False, False, True]
    assert last.exists()
    monkeypatch.setenv("FLEXMORE_CACHE_GB", "much")
    with pytest.raises(UsageError, match="FLEXMORE_CACHE_GB"):
        cache._cache_limit()


def test_a_cache_that_cannot_be_written_says_the_way_out(
    proxy: Proxy, root: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write_bytes(b"1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set FLEXMORE_CACHE"):
        local_file(root / "x")


def test_a_folder_in_the_cache_has_the_files_that_match(proxy: Proxy, root: RemotePath) -> None:
    for name in ("tokenizer.json", "vocab.txt", "model.safetensors", "deep/tokenizer.json"):
        (root / name).write_bytes(name.encode())
    folder = local_folder(root, ["tokenizer*", "vocab*"])
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "vocab.txt"]


# ----------------------------------------------------------------------------- one writer


def test_a_folder_has_one_owner_at_a_time(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_PAUSE_SECONDS", 0.05)
    refused = pytest.raises(UsageError, match="another grid is running on s3://")
    with alone(root, "grid"), refused, alone(root, "grid"):
        pass
    with alone(root, "grid"):
        pass


def test_those_that_wait_take_turns(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_PAUSE_SECONDS", 0.1)
    inside: list[int] = []
    most = []

    def work(number: int) -> None:
        with locked(root):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(root: RemotePath) -> None:
    program = "import sys, time; from flexmore_ray.atomic import alone; from flexmore_ray.storage import RemotePath\n"
    program += "with alone(RemotePath(sys.argv[1]), 'grid'):\n    print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another grid"), alone(root, "grid"):
            pass
        owner.kill()
    with alone(root, "grid"):
        pass


def test_the_lease_of_another_machine_is_renewed_and_runs_out(
    root: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(lease, "STALE_SECONDS", 3.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.5)
    with contextlib.ExitStack() as owner:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(lease, "_machine", lambda: "another")
            owner.enter_context(alone(root, "grid"))
            time.sleep(5)  # longer than a lease lasts that nobody renews
            monkeypatch.setattr(lease, "_machine", lambda: "this one")
        with pytest.raises(UsageError, match="another grid"), alone(root, "grid"):
            pass
    dead = root / ".lock" / "dead.json"
    dead.write_bytes(json.dumps({"machine": "another", "pid": 1, "started": "1"}).encode())
    with pytest.raises(UsageError, match="another grid"), alone(root, "grid"):
        pass
    time.sleep(5)
    with alone(root, "grid"):
        assert not dead.exists()


# ------------------------------------------------------------- folders equal to those made here


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint on this machine, in two shards."""
    return write(random_model(), tmp_path_factory.mktemp("model"), shards=2, expert_names=list(NAMES))


def upload(folder: Path, to: RemotePath) -> None:
    """Every file of a folder, by another client."""
    s3 = client(os.environ["AWS_ENDPOINT_URL"])
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, "/".join([*to.parts[1:], path.relative_to(folder).as_posix()]))


def here(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_in_a_bucket_equals_the_local_one(
    proxy: Proxy, root: RemotePath, checkpoint: Path, tmp_path: Path
) -> None:
    upload(checkpoint, root / "model")
    ours = build_store(open_source([str(checkpoint)]), tmp_path / "store", max_rank=8)
    source = open_source([f"{root}/model"])
    theirs = build_store(source, root / "store", max_rank=8)
    assert theirs.decomposed == ours.decomposed > 0
    local, remote = here(tmp_path / "store"), there(proxy, root / "store")
    manifests = [json.loads(files.pop("manifest.json")) for files in (local, remote)]
    local.pop(".lock")
    assert local == remote
    for manifest in manifests:
        for varying in ("sources", "checksum", "peak_memory_bytes"):
            manifest.pop(varying)
    assert manifests[0] == manifests[1]
    assert build_store(source, root / "store", max_rank=8).decomposed == 0
    higher = build_store(source, root / "store")
    assert higher.decomposed == ours.decomposed
    higher.verify()
    for key in ours.keys():  # noqa: SIM118 - a store is no mapping
        assert ours.spectrum(key).equal(open_store(f"{root}/store").spectrum(key)[: ours.spectrum(key).numel()])
        assert ours.factors(key, 5).a.equal(pickle.loads(pickle.dumps(higher)).factors(key, 5).a)


def test_two_writers_of_one_store_both_find_their_matrices(root: RemotePath, checkpoint: Path) -> None:
    source = open_source([str(checkpoint)])
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda _: build_store(source, root / "store", max_rank=4), range(2)))
    assert stores[0].keys() == stores[1].keys()
    assert StoreWriter(root / "store").committed is not None
    open_store(root / "store").verify()


def test_a_mixture_has_the_same_identity_wherever_it_lies(root: RemotePath, checkpoint: Path, tmp_path: Path) -> None:
    upload(checkpoint, root / "model")
    build_store(open_source([str(checkpoint)]), tmp_path / "store")
    (tmp_path / "model").symlink_to(checkpoint)
    upload(tmp_path / "store", root / "store")
    text = "source: model\nstore: store\nranks: {math: 4, news: drop}\nactive: 2\n"
    (tmp_path / "mixture.yaml").write_text(text)
    (root / "deep/mixture.yaml").write_bytes(
        text.replace(": model", ": ../model").replace(": store", ": ../store").encode()
    )
    (root / "named.yaml").write_bytes(f"source: {root}/model\nranks: {{math: 4, news: drop}}\nactive: 2\n".encode())
    ids = {
        open_mixture(path).identified().mixture_id
        for path in (tmp_path / "mixture.yaml", f"{root}/deep/mixture.yaml", f"file://{tmp_path}/mixture.yaml")
    }
    assert len(ids) == 1
    parts = open_mixture(f"{root}/deep/mixture.yaml")
    assert parts.spec.source == (f"{root}/model",)
    assert parts.spec.store == f"{root}/store"
    assert open_mixture(f"{root}/named.yaml").identified().mixture_id in ids
    again = MixtureSpec.load(f"{root}/deep/mixture.yaml")
    again.save(f"{root}/copy.yaml")
    assert MixtureSpec.load(root / "copy.yaml") == again


@pytest.mark.parametrize("format", ["flex_more", "flexolmo", "peft"])
def test_an_export_to_a_bucket_equals_the_local_one(
    proxy: Proxy, root: RemotePath, checkpoint: Path, tmp_path: Path, format: str
) -> None:
    spec = MixtureSpec(source=(str(checkpoint),), ranks={"math": 4})
    export_mixture(spec, tmp_path / "out", format)
    assert str(export_mixture(spec, f"{root}/out", format)) == f"{root}/out"
    assert there(proxy, root / "out") == here(tmp_path / "out")
    puts = [path for method, path in proxy.seen if method == "PUT"]
    marks = ("/config.json", "/adapter_config.json")
    assert puts[-1].partition("?")[0].endswith(marks)  # what makes it a checkpoint comes last
    with pytest.raises(UsageError, match="exists already"):
        export_mixture(spec, f"{root}/out", format)


def test_a_folder_whose_making_failed_is_not_sent(proxy: Proxy, root: RemotePath) -> None:
    def fail() -> None:
        with new_folder(root / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError):
        fail()
    assert there(proxy, root) == {}


# --------------------------------------------------------------------------------- results


def key_of(number: int) -> CellKey:
    return CellKey(
        mixture_id=f"{number:016x}", dtype="float32", task="t", task_version="1", num_fewshot=0, split="test", seed=1
    )


def commit(root: Path | RemotePath, number: int) -> str:
    return commit_cell(
        root, key_of(number), None, mixture={"ranks": {}}, active=1, parameters=1, weights="w", group="g", error="e"
    )


def test_results_in_a_bucket_equal_the_local_ones(proxy: Proxy, root: RemotePath, tmp_path: Path) -> None:
    for number in range(5):
        assert commit(tmp_path / "results", number) == commit(root / "results", number)
    assert there(proxy, root / "results") == here(tmp_path / "results")
    assert read_cells(root / "results") == read_cells(tmp_path / "results") == read_cells(f"{root}/results")
    assert done_cells(root / "results", [key_of(1).cell]) == set()
    assert read_cells(root / "nothing").num_rows == 0


def test_a_thousand_cells_do_not_take_minutes(proxy: Proxy, root: RemotePath) -> None:
    with ThreadPoolExecutor(4) as pool:
        cells = list(pool.map(lambda number: commit(root / "results", number), range(200)))
    proxy.latency = 0.02
    start, seen = time.monotonic(), len(proxy.seen)
    assert read_cells(root / "results").num_rows == len(cells)
    took, requests = time.monotonic() - start, len(proxy.seen) - seen
    assert requests <= 2 * len(cells) + 2
    assert took < 0.5 * requests * proxy.latency + 10, f"{took:.1f} s for {requests} requests"


def test_a_damaged_cell_is_named(root: RemotePath) -> None:
    cell = commit(root / "results", 1)
    (root / f"results/cells/{cell}.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(FlexmoreError, match=f"s3://.*{cell}.parquet cannot be read"):
        read_cells(root / "results")


def test_secrets_are_not_in_what_is_sent_to_other_processes(root: RemotePath, checkpoint: Path) -> None:
    upload(checkpoint, root / "model")
    source = open_source([f"{root}/model"])
    sent = pickle.dumps([root, build_store(source, root / "store", max_rank=1), source.describe()])
    assert not [value for value in CREDENTIALS.values() if "canary" in value and value.encode() in sent]
