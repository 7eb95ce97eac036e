"""Healing on workers of Ray Train: the factors of one process, whatever happens to the workers."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.heal import heal
from flexmore_ray.heal.training import Settings, _draw_batch
from flexmore_ray.heal.workers import Workers
from flexmore_ray.mixture import load_tokenizer
from flexmore_ray.moments.files import Metric
from flexmore_ray.source import Source
from flexmore_ray.store import FactorStore
from flexmore_ray.texts import encode
from tests.test_heal import TEXTS, data, metric, source, store

__all__ = ["data", "metric", "source", "store"]  # fixtures
SETTINGS = Settings(steps=6, batch_tokens=17)


def assert_close(one: FactorStore, other: FactorStore, source: Source) -> None:
    """The same factors up to rounding."""
    for key in source.shape.keys("math"):
        a, b = one.factors(key, 12), other.factors(key, 12)
        for x, y in ((a.a, b.a), (a.bt, b.bt)):
            assert float((x - y).norm() / x.norm()) < 1e-5


@pytest.fixture(scope="module")
def both(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An owner's texts and public ones."""
    public = tmp_path_factory.mktemp("public") / "public.txt"
    public.write_text("what all\nmay read\n")
    return {**data, "public": public}


@pytest.fixture(scope="module")
def whole(
    source: Source, store: FactorStore, both: dict[str, Path], metric: Metric, tmp_path_factory: pytest.TempPathFactory
) -> FactorStore:
    """What one process makes."""
    return heal(source, store, both, tmp_path_factory.mktemp("whole"), SETTINGS, metric=metric)


@pytest.mark.usefixtures("local_ray")
def test_two_workers_make_the_factors_of_one_process(
    source: Source,
    store: FactorStore,
    both: dict[str, Path],
    metric: Metric,
    whole: FactorStore,
    tmp_path: Path,
) -> None:
    documents = encode(load_tokenizer(source), [("", text) for text in TEXTS], 512)
    sizes = [
        len(_draw_batch(documents, SETTINGS.batch_tokens, random.Random(f"0 math {step}")))
        for step in range(SETTINGS.steps)
    ]
    assert set(sizes) == {1, 2}  # in some steps a worker has no document
    steps: list[Any] = []
    out, progress = tmp_path / "h", lambda *step: steps.append(step)
    healed = heal(source, store, both, out, SETTINGS, metric=metric, progress=progress, train=Workers(2))
    assert [step[:3] for step in steps] == [("math", n, 6) for n in range(1, 7)]
    assert_close(whole, healed, source)
    assert not list((tmp_path / "h").rglob("healing/*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_is_started_again_from_the_checkpoint(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(steps=300, batch_tokens=17, learning_rate=1e-5)
    whole = heal(source, store, data, tmp_path / "whole", settings)

    def stop(_: str, done: int, *__: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("flexmore_ray.heal.training.SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        heal(source, store, data, tmp_path / "h", settings, progress=stop)
    steps: list[int] = []

    def kill_one(_: str, done: int, *__: object) -> None:
        if not steps:
            workers()[-1].kill()
        steps.append(done)

    healed = heal(source, store, data, tmp_path / "h", settings, progress=kill_one, train=Workers(2))
    assert steps[0] == 4  # two workers went on where one process had come
    assert steps.count(4) == 2  # and did so again
    assert steps[-1] == 300
    assert_close(whole, healed, source)


def workers() -> list[psutil.Process]:
    """The processes of Ray Train's workers that this process has started."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_a_worker_raises_arrives_as_it_was(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    settings = Settings(steps=9, batch_tokens=64, learning_rate=1e30)
    with pytest.raises(CheckpointError, match=r"the loss of step \d is (nan|inf); check weights") as caught:
        heal(source, store, data, tmp_path / "h", settings, train=Workers(1))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("local_ray")
def test_workers_for_which_there_is_no_room_are_refused(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    for count, gpus, message in (
        (1, 1, r"1 workers ask for 1 CPU and 1 GPU each; the cluster has 1 node: CPU 4"),
        (9, 0, r"9 workers ask for 1 CPU each; the cluster has 1 node: CPU 4; give fewer"),
    ):
        with pytest.raises(UsageError, match=message):
            heal(source, store, data, tmp_path / "h", SETTINGS, train=Workers(count, gpus))
    with pytest.raises(UsageError, match="--workers: an integer >= 1 is needed, got 0"):
        Workers(0)
    with pytest.raises(UsageError, match="--gpus: 0 or 1 is needed"):
        Workers(1, 2)


def test_one_process_imports_no_ray(source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["heal", *source.describe(), "--store", str(store.folder), "--data", f"math={data['math']}"]
    arguments += ["--out", str(tmp_path / "h"), "--steps", "1"]
    program = (
        "import sys; from flexmore_ray.__main__ import main; "
        "status = main(sys.argv[1:]); sys.exit(status or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, *arguments], check=False, timeout=120).returncode == 0
