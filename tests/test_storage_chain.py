"""Decompose, evaluate, grid, report, search and serve wholly from and to an S3-compatible store; a driver is killed.

Run with `make slow`. Everything here is started by the command line, in processes of its own, with no local folder but
the cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexmore_ray.results import done_cells, read_cells, read_samples
from flexmore_ray.storage import RemotePath
from tests.object_store import BUCKET, CREDENTIALS, Proxy, client, keys, use
from tests.serve_process import serving

pytestmark = pytest.mark.slow
_SECONDS = 900
_PLAN = """
source: s3://bucket/model
store: s3://bucket/store
tasks: [nano_arithmetic, nano_mayors]
limit: 20
mixtures:
  - pairs: [2, full]
  - {uniform: [2, best], active: [2]}
  - mixtures/mine.yaml
"""
_MINE = "source: ../model\nstore: ../store\nranks: {math: 16, news: drop, code: full}\nactive: 2\n"


class User:
    """Someone with an empty folder, a store elsewhere, and its credentials in the environment."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.s3 = folder, client(url)
        self.log = folder.parent / "log"

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command of flexmore."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flexmore_ray", *command, "--json"],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def run(self, *command: str) -> dict[str, Any]:
        """What a command says at its end."""
        process = self.start(*command)
        said, _ = process.communicate(timeout=_SECONDS)
        with self.log.open("ab") as log:
            log.write(said)
        assert process.returncode == 0, self.log.read_text()[-3000:]
        return json.loads(said.splitlines()[-1])

    def keys(self, prefix: str) -> dict[str, bytes]:
        """What lies below a prefix."""
        return keys(self.s3, prefix)

    def put(self, name: str, text: str) -> None:
        """Put a file into the store, by another client."""
        self.s3.put_object(Bucket=BUCKET, Key=name, Body=text.encode())


@pytest.fixture
def proxy(ray_home: None, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(s3_url)
    use(monkeypatch, proxy.url)
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    yield proxy
    proxy.close()


@pytest.fixture
def user(proxy: Proxy, tmp_path: Path) -> User:
    (tmp_path / "empty").mkdir()
    return User(tmp_path / "empty", proxy.url)


def cells(name: str) -> list[dict[str, Any]]:
    """Rows of a results folder but for the time they took."""
    root = RemotePath(f"s3://{BUCKET}/{name}")
    rows = read_cells(root).drop_columns(["seconds"]).to_pylist()
    return rows + sorted(read_samples(root).to_pylist(), key=lambda row: (row["cell"], row["doc_id"]))


def test_the_whole_chain_from_and_to_a_bucket(user: User, proxy: Proxy, tmp_path: Path) -> None:
    user.run("export", "zoo://nano", "--format", "flexolmo", "--out", "s3://bucket/model")
    assert user.run("inspect", "s3://bucket/model")["layers"] == 4
    assert user.run("decompose", "s3://bucket/model", "--store", "s3://bucket/store")["decomposed"] == 72
    assert user.run("decompose", "s3://bucket/model", "--store", "s3://bucket/store")["decomposed"] == 0
    user.put("mixtures/mine.yaml", _MINE)
    user.put("plan.yaml", _PLAN)
    tasks = ("--tasks", "nano_arithmetic", "--limit", "20")
    scored = user.run("eval", "s3://bucket/mixtures/mine.yaml", *tasks, "--results", "s3://bucket/results")
    assert scored["tasks"].keys() == {"nano_arithmetic"}

    assert not user.run("grid", "s3://bucket/plan.yaml", "--results", "s3://bucket/grid")["failed"]
    user.run("report", "s3://bucket/grid", "--out", "s3://bucket/report")
    assert {"report.md", "report.html"} < user.keys("report").keys()

    # a search, and its winner over HTTP
    budget = (
        "--source",
        "s3://bucket/model",
        "--budget",
        "0.33x",
        "--trials",
        "2",
        "--limit",
        "6",
        "--test-limit",
        "6",
    )
    where = ("--out", "s3://bucket/search", "--store", "s3://bucket/store")
    user.run("search", *budget, "--tasks", "nano_arithmetic", "--rungs", "1", *where)
    made = {"winner.yaml", "trials.parquet", "front.parquet", "final.json", "journal.log", "report.html", "search.json"}
    assert made < user.keys("search").keys()
    (tmp_path / "home").mkdir()
    with serving(tmp_path / "home", "s3://bucket/search/winner.yaml") as server:
        answer = server.post("/v1/completions", {"model": "winner", "prompt": "2+2=", "max_tokens": 4})
        assert answer["choices"][0]["text"]

    assert list(user.folder.iterdir()) == []
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"remote", "written-mixtures"}
    secrets = [value for value in CREDENTIALS.values() if "canary" in value]
    everything = b"".join([user.log.read_bytes(), *user.keys("").values()])
    assert not [secret for secret in secrets if secret.encode() in everything]


def test_a_killed_driver_on_a_failing_store_loses_nothing_and_does_nothing_twice(user: User, proxy: Proxy) -> None:
    plan = _PLAN.replace("s3://bucket/model", "zoo://nano").replace("store: s3://bucket/store\n", "")
    user.put("faults/plan.yaml", plan.replace("  - mixtures/mine.yaml\n", ""))
    where = ("--store", "s3://bucket/faults/store", "--results", "s3://bucket/faults/grid")
    grid = ("grid", "s3://bucket/faults/plan.yaml", *where)
    count = iter(range(1, 10**9))
    proxy.fault = lambda method, path: "503" if next(count) % 7 == 0 else None
    killed = user.start(*grid)
    end = time.monotonic() + _SECONDS
    while len(user.keys("faults/grid/cells")) < 6:
        assert killed.poll() is None, user.log.read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.2)
    killed.kill()
    killed.communicate()
    time.sleep(3)  # for requests that were under way
    before = user.keys("faults/grid/cells")
    done = done_cells(RemotePath(f"s3://{BUCKET}/faults/grid"), [name.removesuffix(".parquet") for name in before])
    assert len(done) == len(before)
    again = user.run(*grid)
    assert again["computed"] == again["cells"] - len(done)  # nothing lost
    after = user.keys("faults/grid/cells")
    assert {name: after[name] for name in before} == before  # and nothing twice
    proxy.fault = lambda method, path: None
    user.run(*grid[:-1], "s3://bucket/faults/undisturbed")
    assert cells("faults/grid") == cells("faults/undisturbed")
