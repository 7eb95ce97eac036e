"""The grid and the search as Ray jobs, unchanged. Run with `make slow`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flexmore_ray.results import read_cells
from flexmore_ray.spec import MixtureSpec

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def dashboard(ray_home: None) -> Iterator[str]:
    """A running cluster of this machine, by the address of its dashboard."""
    port, dashboard = free_port(), free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--object-store-memory", str(200 * 2**20)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listens on the loopback address alone
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(f"{address}/api/version", head)
        yield address
    finally:
        head.terminate()
        head.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen) -> None:
    start = time.monotonic()
    while time.monotonic() - start < 90:
        assert process.poll() is None, "ray start ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"nothing answers at {url}")


def submit(dashboard: str, work: Path, *arguments: str) -> str:
    """Run `flexmore` as a job to its end; returns the job's log."""
    command = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", str(work), "--"]
    done = subprocess.run([*command, "flexmore", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_grid_runs_unchanged_as_a_job(dashboard: str, tmp_path: Path) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    (work / "plan.yaml").write_text(
        "source: zoo://nano\ntasks: [nano_order]\nlimit: 4\n"
        "mixtures: [{pairs: [2, full]}, {uniform: best, active: 2}]\n"
    )
    log = submit(dashboard, work, "grid", "plan.yaml", "--results", str(results), "--json")
    summary = next(json.loads(line) for line in log.splitlines() if line.startswith('{"mixtures"'))
    assert (summary["computed"], summary["missing"], summary["failed"]) == (13, 0, {})
    assert read_cells(results).num_rows == 13


@pytest.mark.slow
def test_a_search_runs_unchanged_as_a_job(dashboard: str, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "mine.yaml").write_text("source: zoo://nano\nranks: {math: 4, news: 4}\n")
    sizes = ["--budget", "0.33x", "--trials", "3", "--limit", "6", "--test-limit", "6", "--include", "mine.yaml"]
    tasks = ["--tasks", "nano_order", "--tasks", "nano_heroes"]
    log = submit(dashboard, work, "search", "--source", "zoo://nano", *tasks, *sizes, "--out", str(out), "--json")
    result = next(json.loads(line) for line in log.splitlines() if line.startswith('{"winner"'))
    assert f"{result['winner']} (winner)" in log
    assert str(out / "winner.yaml") in log
    names = [row["name"] for row in pq.read_table(out / "trials.parquet").to_pylist()]
    assert names == [
        "full",
        "public",
        "uniform",
        "energy",
        "entropy",
        "optimal",
        "optimal-expert",
        "mine",
        "trial-0",
        "trial-1",
        "trial-2",
    ]
    winner = next(entry for entry in result["entries"] if entry["name"] == result["winner"])
    assert dict(MixtureSpec.load(out / "winner.yaml").ranks) == winner["ranks"]
    assert (out / "report.html").is_file()
