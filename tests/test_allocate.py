"""`flexmore allocate`: the mixture files that rules make, on a tiny real model and the embedded mixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flexmore_ray.__main__ import main
from flexmore_ray.budget import discarded_energy
from flexmore_ray.build import build_store
from flexmore_ray.mixture import open_mixture
from flexmore_ray.source import open_source
from flexmore_ray.spec import FULL, PROJECTIONS, MixtureSpec
from flexmore_ray.written import is_known
from tests import common

DOMAINS = common.NAMES[1:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `m` and its store `s`."""
    root = tmp_path_factory.mktemp("allocate")
    common.write(common.random_model(), root / "m", expert_names=list(common.NAMES))
    build_store(open_source([str(root / "m")]), root / "s")
    return root


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, made):
    """Run a command in a folder of its own that `m` and `s` are in; returns (status, JSON or None, stderr)."""
    for name in ("m", "s"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "cache"))

    def call(*argv: object) -> tuple[int, dict | None, str]:
        try:
            status = main([*map(str, argv), "--json"])
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if status == 0 else None, err

    return call


@pytest.mark.parametrize(
    "how",
    [
        *([f"--rule={rule}"] for rule in ("uniform", "energy", "entropy", "optimal")),
        *([f"--granularity={name}"] for name in ("expert", "projection", "layer", "matrix")),
        [],
    ],
)
def test_the_file_is_the_mixture_that_was_said(run, made, tmp_path, how):
    status, result, _ = run("allocate", "m", "--store", "s", "--budget", "0.6x", "--active", 2, *how, "--out", "a.yaml")
    assert status == 0
    assert result["rule"] == (how[0].partition("=")[2] if how and "rule" in how[0] else "optimal")
    assert (result["granularity"] is None) == (result["rule"] != "optimal")
    parts = open_mixture(tmp_path / "a.yaml")
    count, assignment = parts.count(), parts.assignment
    assert result["total"] == count.total
    assert 0.5 < result["ratio"] == count.ratio <= 0.6
    assert assignment.active == 2
    assert dict(parts.spec.ranks) == result["ranks"]
    assert {name: found["params"] for name, found in result["experts"].items()} == {
        name: count.experts[name] for name in DOMAINS
    }
    lost = 0.0
    for name in DOMAINS:
        keys = parts.source.shape.keys(name)
        own = 0.0
        for key in (key for key in keys if assignment.rank(key) != FULL):
            delta = parts.source.weight(key).double() - parts.source.weight(key._replace(expert="public")).double()
            own += float(torch.linalg.svdvals(delta)[assignment.rank(key) :].square().sum())
        assert result["experts"][name]["discarded_energy"] == pytest.approx(own, rel=1e-4)
        lost += own
    assert result["discarded_energy"] == pytest.approx(lost, rel=1e-4)
    assert result["weighting"] == "none"


def test_no_other_rule_or_granularity_discards_less(run):
    rules = {name: ["--rule", name] for name in ("uniform", "energy", "entropy")}
    rules |= {name: ["--granularity", name] for name in ("expert", "projection", "layer", "matrix")}
    args = ("allocate", "m", "--store", "s", "--budget", "0.5x")
    found = {name: run(*args, *how, "--out", f"{name}.yaml")[1] for name, how in rules.items()}
    lost = {name: result["discarded_energy"] for name, result in found.items()}
    assert all(FULL not in json.dumps(result["ranks"]) for result in found.values())
    assert lost["matrix"] == min(lost.values())
    assert lost["matrix"] < lost["projection"] < lost["expert"]
    assert lost["matrix"] < lost["layer"] <= lost["expert"] <= lost["uniform"]
    expert = found["expert"]["ranks"]
    assert all(isinstance(rank, int) for rank in expert.values())
    assert set(found["projection"]["ranks"]["math"]) == set(PROJECTIONS)


def test_a_file_of_relative_folders_loads_from_anywhere(run, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    args = ("allocate", "m", "--store", "s", "--budget", "0.5x", "--granularity", "expert")
    assert run(*args, "--out", "sub/a.yaml")[0] == 0
    (tmp_path / "far").mkdir()
    shutil.copy(tmp_path / "sub" / "a.yaml", tmp_path / "far" / "b.yaml")
    before = open_mixture(tmp_path / "sub" / "a.yaml").identified().mixture_id
    monkeypatch.chdir("/")
    again = open_mixture(tmp_path / "far" / "b.yaml")
    assert again.identified().mixture_id == before
    assert again.spec.store == str((tmp_path / "s").resolve())
    assert again.spec.source == (str((tmp_path / "m").resolve()),)
    assert not is_known((tmp_path / "far" / "b.yaml").read_bytes())  # when it is served, its places are asked for


def test_without_a_store_it_decomposes_into_the_cache_once(run, tmp_path):
    args = ("allocate", "m", "--budget", "0.5x", "--out", "a.yaml", "--experts", "base,a,b,c")
    for unknown in ("--rule", "--granularity"):
        assert run(*args, unknown, "foo")[0] == 2
    assert not list((tmp_path / "cache").glob("*"))  # nothing was decomposed for it
    status, first, _ = run(*args)
    assert status == 0
    assert list(first["ranks"]) == ["a", "b", "c"]
    assert "store" not in MixtureSpec.load(tmp_path / "a.yaml").to_dict()
    stores = list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(stores) == 1
    before = stores[0].stat().st_mtime_ns
    status, _, err = run(*args)
    assert status == 2
    assert "a.yaml: exists already; choose another --out or remove it" in err
    (tmp_path / "a.yaml").unlink()
    assert run(*args)[1] == first
    assert stores[0].stat().st_mtime_ns == before
    parts = open_mixture("a.yaml")
    spectra = {k: build_store(parts.source, tmp_path / "o").spectrum(k).numpy() for k in parts.source.shape.keys("a")}
    assert first["experts"]["a"]["discarded_energy"] == pytest.approx(discarded_energy(spectra, parts.assignment))


def test_bad_use_is_one_line_and_writes_nothing(run, tmp_path):
    args = ["allocate", "m", "--store", "s", "--budget", "0.5x", "--out", "a.yaml"]
    full = open_mixture("m").count().full_total
    build_store(open_source([str(tmp_path / "m")]), tmp_path / "low", max_rank=4)
    common.write(common.random_model(seed=1), tmp_path / "other", expert_names=list(common.NAMES))
    for more, status, message in (
        (["--budget", "0.01x"], 2, "give at least the public expert alone"),
        (["--budget", "1.01x"], 2, f"at most the full mixture ({full:,})"),
        (["--budget", "much"], 2, "budget: a count such as 10.75B or a ratio"),
        (["--rule", "optimum"], 2, "rule: unknown 'optimum'; did you mean optimal?"),
        (["--granularity", "row"], 2, "granularity: one of expert, projection, layer, matrix is needed, got 'row'"),
        (["--rule", "energy", "--granularity", "layer"], 2, "--granularity: only --rule optimal has one"),
        (["--active", "9"], 2, "active: 9 experts per token asked"),
        (["--out", "none/a.yaml"], 2, "--out: there is no folder none"),
        (["--out", "a.txt"], 2, "--out: a mixture file is called .yaml or .yml, got a.txt"),
        (["--store", "none"], 1, "none: no manifest.json"),
        (["--store", "low"], 1, "low: holds rank 4 of expert math, layer 0, gate_proj, and a rule needs all 32"),
        (["--experts", "a,b"], 2, "--experts:"),
    ):
        found, _, err = run(*args, *more)
        assert (found, err.count("\n")) == (status, 1), (more, err)
        assert message in err
        assert not list(tmp_path.glob("*.yaml"))
    found, _, err = run("allocate", "other", *args[2:])
    assert (found, err.count("\n")) == (1, 1)
    assert "made from other weights" in err


def test_the_smallest_budget_is_said(run):
    args = ("allocate", "m", "--store", "s", "--out")
    everything = open_mixture(MixtureSpec(source=("m",), ranks=dict.fromkeys(DOMAINS, 1)))
    least = everything.count().total
    for rule in ("uniform", "energy", "entropy", "optimal"):
        status, _, err = run(*args, f"{rule}.yaml", "--rule", rule, "--budget", least - 1)
        assert status == 2
        assert f"rank 1 for every domain expert need ({least:,})" in err
        result = run(*args, f"{rule}.yaml", "--rule", rule, "--budget", least)[1]
        assert result["ranks"] == dict.fromkeys(DOMAINS, 1)
