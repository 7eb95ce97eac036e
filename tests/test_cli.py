"""The command: exit statuses, one-line errors, JSON, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_ray.__main__ import main
from flexmore_ray.zoo import domain_text, write_pair
from tests import common


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return common.write(common.random_model(), tmp_path_factory.mktemp("m"), expert_names=list(common.NAMES))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in a folder of its own; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def _json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def _mixture(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------ it works


def test_params_of_the_released_shape(run):
    status, out, _ = run("params", "--shape", "flexolmo-7x7b", "--json")
    assert status == 0
    assert _json(out)["total"] == _json(out)["full_total"] == 33_270_665_216
    names = ("math", "news", "academic", "code", "creative", "reddit")
    ranks = [f"--rank={n}={r}" for n, r in zip(names, (2048, 256, 64, 8, 4, 1), strict=True)]
    status, out, _ = run("params", "--shape", "flexolmo-7x7b", *ranks, "--active", 2, "--json")
    result = _json(out)
    assert set(result) == {"total", "active", "bytes", "full_total", "ratio", "experts"}
    assert round(result["total"] / 1e9, 2) == 10.75
    assert result["bytes"] == 2 * result["total"]
    assert result["experts"]["news"] == {"rank": 256, "params": 256 * 1_449_984}
    status, out, _ = run("params", "--shape", "flexolmo-7x7b", "--all-ranks", "1", "--rank", "news=drop", "--json")
    assert _json(out)["experts"]["news"] == {"rank": "drop", "params": 0}


def test_params_agree_with_the_model(run, folder, tmp_path):
    from flexmore_ray import load_mixture

    path = _mixture(tmp_path / "m.yaml", f"source: {folder}\nranks: {{math: 4, news: drop}}\n")
    for target, ranks in ((path, {"math": 4, "news": "drop"}), (folder, {})):
        status, out, _ = run("params", target, "--json")
        assert status == 0
        mixture = load_mixture(str(folder))
        mixture.set_ranks(ranks)
        assert _json(out)["total"] == mixture.num_parameters()


def test_params_says_when_a_rank_is_full_or_above_break_even(run, folder):
    _, out, err = run("params", folder, "--rank", "math=100", "--rank", "news=25", "--json")
    assert _json(out)["experts"]["math"]["rank"] == "full"
    assert "math: 100 is at or above min(in, out) = 32" in err
    assert "news: above 22" in err


def test_inspect(run, folder):
    status, out, _ = run("inspect", folder, "--json", "--experts", "base,a,b,c")
    assert status == 0
    result = _json(out)
    assert result["experts"] == ["base", "a", "b", "c"]
    assert (result["layers"], result["layout"], result["dtype"]) == (2, "per-expert", "float32")


def test_decompose_export_and_eval_of_the_zoo(run, tmp_path):
    status, out, _ = run("decompose", "zoo://nano", "--store", "store", "--max-rank", "8", "--json")
    assert status == 0
    assert _json(out)["decomposed"] == 6 * 4 * 3
    status, out, _ = run("decompose", "zoo://nano", "--store", "store", "--max-rank", "8", "--json")
    assert _json(out)["decomposed"] == 0
    text = "store: store\nranks: {math: 8, news: 4, academic: drop, code: 8, creative: 1, reddit: full}\n"
    path = _mixture(tmp_path / "m.yaml", text)
    evaluate = ("--tasks", "nano_program,nano_mayors", "--limit", 20, "--json")
    status, out, _ = run("eval", path, *evaluate)
    assert status == 0
    first = _json(out)
    assert set(first["tasks"]) == {"nano_program", "nano_mayors"}
    assert first["score"] == pytest.approx(sum(first["groups"].values()) / 2)
    samples = sorted((tmp_path / "results" / "samples").iterdir())
    assert len(samples) == 2
    times = [p.stat().st_mtime_ns for p in samples]
    status, out, _ = run("eval", path, *evaluate)  # the cells are there: nothing is computed again
    assert _json(out) == first
    assert [p.stat().st_mtime_ns for p in samples] == times
    for form in ("flex_more", "flexolmo"):
        status, _, err = run("export", path, "--format", form, "--out", form)
        assert (status, err) == (0, "")
        status, out, _ = run("eval", form, *evaluate, "--results", f"results-{form}")
        assert _json(out)["tasks"] == first["tasks"]


@pytest.mark.slow
def test_merge_of_the_zoo_pairs_gives_the_zoo_router(run, tmp_path):
    sources, data = [], []
    for name in ("public", "math", "news", "academic", "code", "creative", "reddit"):
        if name != "public":
            sources.append(f"{name}={write_pair(name, tmp_path / name)}")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in domain_text(name)))
        data.append(f"{name}={tmp_path / name}.jsonl")
    status, _, err = run("merge", *sources, "--router", "ridge", "--data", *data, "--out", "merged")
    assert (status, err) == (0, "")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    from flexmore_ray.zoo import zoo_path

    shipped = load_file(zoo_path() / "model.safetensors")
    assert set(ours) == set(shipped)
    for name, values in shipped.items():
        if name.endswith("mlp.gate.weight"):
            assert (ours[name].float() - values.float()).abs().max() < 0.02 * values.float().abs().max(), name
        else:
            assert torch.equal(ours[name], values), name


def test_a_store_remembers_the_names_that_experts_were_given(run, tmp_path):
    folder = common.write(common.random_model(), tmp_path / "plain")
    names = ("--experts", ",".join(common.NAMES))
    assert run("decompose", folder, *names, "--store", "store", "--max-rank", 4)[0] == 0
    path = _mixture(tmp_path / "m.yaml", "store: store\nranks: {math: 4}\n")
    status, _, err = run("export", path, "--format", "peft", "--out", "out")
    assert (status, err) == (0, "")
    assert (tmp_path / "out" / "math" / "adapter_config.json").exists()


def test_an_adapter_without_a_router_row_gets_one_by_merging(run, tmp_path):
    write_pair("math", tmp_path / "math")
    mixture = _mixture(tmp_path / "m.yaml", "source: [math=math]\nranks: {math: 4}\n")
    assert run("export", mixture, "--format", "peft", "--out", "adapters")[0] == 0
    (tmp_path / "adapters" / "math" / "router.safetensors").unlink()
    data = []
    for name in ("public", "math"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "\n".join(domain_text(name, 20))}))
        data.append(f"{name}={name}.jsonl")
    sources = ("math=math", "again=adapters/math")
    ridge = ("--router", "ridge", "--data", *data, "again=math.jsonl")
    status, out, err = run("merge", *sources, *ridge, "--out", "merged", "--json")
    assert (status, err) == (0, "")
    assert _json(out)["experts"] == ["public", "math", "again"]
    _refused(run("merge", *sources, "--out", "kept"), 1, "has no router row", "--router ridge")


# ------------------------------------------------------------------------------ bad input


def _refused(result: tuple[int, str, str], status: int, *parts: str) -> None:
    got, out, err = result
    assert got == status, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for part in parts:
        assert part in err


def test_a_bad_command_line_is_one_line(run):
    _refused(run("params"), 2, "give a MIXTURE")
    _refused(run("params", "--shape", "flexolmo-9x9b"), 2, "invalid choice", "flexmore params --help")
    _refused(run("frobnicate"), 2, "invalid choice")
    _refused(run("params", "--shape", "flexolmo-7x7b", "--rank", "maths=3"), 2, "did you mean math")
    _refused(run("params", "--shape", "flexolmo-7x7b", "--rank", "math"), 2, "NAME=R is needed, got 'math'")
    _refused(run("params", "--shape", "flexolmo-7x7b", "--active", "8"), 2, "keeps only 7")
    for bad in ("0", "-1", "1.5", "huge"):
        _refused(run("params", "--shape", "flexolmo-7x7b", "--rank", f"math={bad}"), 2, "an integer >= 1, full or drop")


@pytest.mark.parametrize("command", ["inspect", "params", "decompose", "eval", "export"])
def test_a_missing_folder(run, command):
    more = {
        "decompose": ("--store", "s"),
        "eval": ("--tasks", "nano_program"),
        "export": ("--format", "flexolmo", "--out", "o"),
    }
    _refused(run(command, "nowhere", *more.get(command, ())), 1, "nowhere", "no such folder")
    assert list(Path.cwd().iterdir()) == []


def test_nan_in_a_weight_is_named_by_every_command_that_reads_it(run, tmp_path):
    broken = common.write(common.random_model(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    for argv in (
        ("inspect", broken),
        ("decompose", broken, "--store", "store"),
        ("export", broken, "--format", "flexolmo", "--out", "out"),
    ):
        _refused(run(*argv), 1, "experts.2.up_proj", "NaN")
    assert not (tmp_path / "out").exists()


def test_a_store_that_does_not_fit(run, tmp_path, folder):
    other = common.write(common.random_model(seed=1), tmp_path / "other", expert_names=list(common.NAMES))
    assert run("decompose", folder, "--store", "store", "--max-rank", 4)[0] == 0
    _refused(run("decompose", other, "--store", "store"), 1, "store", "other weights")
    text = "store: store\nranks: {math: 9}\n"
    export = ("--format", "flex_more", "--out", "out")
    _refused(run("export", _mixture(tmp_path / "m.yaml", text), *export), 1, "math", "9", "4", "--max-rank")
    text = f"source: {other}\n{text}"
    _refused(run("export", _mixture(tmp_path / "m.yaml", text), *export), 1, "other weights")
    assert not (tmp_path / "out").exists()
    path = next((tmp_path / "store" / "factors").iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    text = "store: store\nranks: {math: 4, news: 4, code: 4}\n"
    _refused(run("export", _mixture(tmp_path / "m.yaml", text), *export), 1, path.name)


def test_tasks_that_are_not_there(run, folder):
    _refused(run("eval", folder, "--tasks", "nano_programme"), 2, "nano_programme", "nano_program")
    _refused(run("eval", folder, "--tasks", "nano_program", "--limit", 0), 2, "limit")


def test_mixture_files_that_make_no_sense(run, tmp_path, folder):
    for text, part in (
        ("ranks: {math: 0}", "got 0"),
        ("ranks: {nobody: 3}", "unknown expert 'nobody'"),
        ("rank: {}", "unknown key 'rank'"),
        ("active: 5", "keeps only 4"),
    ):
        path = _mixture(tmp_path / "m.yaml", f"source: {folder}\n{text}\n")
        _refused(run("eval", path, "--tasks", "nano_program"), 2, part)
        _refused(run("params", path), 2, part)
    _refused(run("params", tmp_path / "gone.yaml"), 2, "no such mixture file")


def test_router_data_that_does_not_fit(run, tmp_path):
    sources = [f"{name}={write_pair(name, tmp_path / name)}" for name in ("math", "news")]
    (tmp_path / "text").write_text("hello\n")
    out = ("--out", "out")
    _refused(run("merge", *sources, "--data", "math=text", *out), 2, "only --router ridge uses data")
    ridge = ("--router", "ridge", "--data", "math=text", "news=text")
    _refused(run("merge", *sources, *ridge, *out), 2, "missing: public")
    _refused(run("merge", *sources, *ridge, "public=gone", *out), 2, "gone")
    _refused(run("merge", *sources, *ridge, "public=text", "maths=text", *out), 2, "did you mean math")
    assert not (tmp_path / "out").exists()


def test_the_installed_command_and_debug(tmp_path):
    """As a user's shell runs it: one process, no traceback unless asked."""
    command = [sys.executable, "-m", "flexmore_ray", "inspect", "nowhere"]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr == "flexmore: nowhere: no such folder\n"
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
