"""One fault on a simulated cluster of several hosts; `python -m tests.chaos` tries all of them, often."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.hosts import available

CHOSEN = [("worker node killed, another added", "grid"), ("head restarted", "decompose")]


@pytest.mark.slow
@pytest.mark.skipif(bool(available()), reason=available() or "")
@pytest.mark.parametrize(("fault", "stage"), CHOSEN, ids=[f"{fault.split(',')[0]}-{stage}" for fault, stage in CHOSEN])
def test_nothing_is_lost_or_done_twice_or_left_behind(fault: str, stage: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--only",
        fault,
        "--stage",
        stage,
        "--times",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = json.loads(out.read_text())
    assert (outcome["times"], len(outcome["recovered"])) == (1, 1)
    assert (outcome["lost"], outcome["duplicated"], outcome["orphans"]) == (0, 0, 0)
