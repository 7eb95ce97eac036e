"""Sources: every layout reads the same, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_ray.checkpoint import TensorFolder
from flexmore_ray.checkpoint.writing import new_folder, write_tensors
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.source import flexolmo_plan, open_source
from flexmore_ray.spec import MatrixKey
from tests import common


@pytest.fixture(scope="module")
def model():
    return common.random_model(num_experts=3)


@pytest.fixture(scope="module")
def pair_models(model):
    """Two-expert models of experts 1 and 2, with the rows that their owners trained."""
    return {name: common.without(model, {other}) for name, other in (("math", 2), ("news", 1))}


@pytest.fixture
def pairs(pair_models, tmp_path) -> list[str]:
    return [f"{name}={common.write(pair, tmp_path / name)}" for name, pair in pair_models.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_every_layout_reads_the_same(model, tmp_path, layout, shards, dtype):
    source = open_source([str(common.write(model, tmp_path / "m", layout=layout, shards=shards, dtype=dtype))])
    assert source.experts == ("public", "expert-1", "expert-2")
    assert source.trunk.layout == layout
    expected = common.state(model)
    for e, name in enumerate(source.experts):
        for key in source.shape.keys(name):
            own = expected[f"model.layers.{key.layer}.mlp.experts.{e}.{key.projection}.weight"]
            assert torch.equal(source.weight(key), own.to(dtype))
    assert list(source.check()) == ["shared", *source.experts]


def test_digests_do_not_depend_on_the_layout(model, tmp_path):
    one = open_source([str(common.write(model, tmp_path / "a"))])
    two = open_source([str(common.write(model, tmp_path / "b", layout="fused", shards=4))])
    assert [one.expert_digest(name) for name in one.experts] == [two.expert_digest(name) for name in two.experts]
    assert one.shared_digest == two.shared_digest


def test_pairs_merge_to_the_model_they_were_cut_from(model, pairs, tmp_path):
    source = open_source(pairs)
    assert source.experts == ("public", "math", "news")
    with new_folder(tmp_path / "merged") as folder:
        write_tensors(folder, flexolmo_plan(source), shard_bytes=40_000)
    merged = TensorFolder(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    for name, values in common.state(model).items():
        assert torch.equal(merged.read(name), values), name


def test_adapter_is_the_public_expert_plus_its_product(pairs, tmp_path):
    """A PEFT adapter with patterns and rank-stabilised scaling, against PEFT's own arithmetic."""
    from peft import LoraConfig, get_peft_model
    from transformers import Olmo2Config, Olmo2ForCausalLM

    source = open_source(pairs)
    dense = Olmo2ForCausalLM(Olmo2Config(**common.SIZES)).eval()
    tensors = {n: source.shared(n) for n in dense.state_dict() if ".mlp." not in n}
    for key in source.shape.keys("public"):
        tensors[f"model.layers.{key.layer}.mlp.{key.projection}.weight"] = source.weight(key)
    dense.load_state_dict(tensors)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"layers.1.mlp.up_proj": 7},
        alpha_pattern={"down_proj": 3},
        use_rslora=True,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    tuned = get_peft_model(dense, config)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    both = open_source([*pairs, f"code={tmp_path / 'adapter'}"])
    assert both.experts == ("public", "math", "news", "code")
    for key in both.shape.keys("code"):
        expected = merged[f"model.layers.{key.layer}.mlp.{key.projection}.weight"]
        assert (both.weight(key) - expected).abs().max() < 1e-6
        assert both.born_ranks[key] == (7 if (key.layer, key.projection) == (1, "up_proj") else 4)
    with pytest.raises(CheckpointError, match="no router row"):
        both.router_row("code", 0)


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _poke(name: str, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


BROKEN = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "garbage config": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "model type": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "nothing to read weights from"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 500), "damaged or not safetensors"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "damaged or not safetensors",
    ),
    "missing tensor": (
        lambda f: _edit(f, lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight")),
        "tensor model.layers.1.mlp.experts.2.up_proj.weight is missing",
    ),
    "wrong shape": (lambda f: _edit(f, _reshape), r"tensor model.norm.weight has shape \(7,\)"),
    "NaN": (
        lambda f: _edit(f, _poke("model.layers.0.mlp.experts.1.gate_proj.weight", float("nan"))),
        "tensor model.layers.0.mlp.experts.1.gate_proj.weight holds NaN",
    ),
    "infinity": (lambda f: _edit(f, _poke("lm_head.weight", float("inf"))), "tensor lm_head.weight holds NaN or inf"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named(model, tmp_path, case):
    breaks, message = BROKEN[case]
    folder = common.write(model, tmp_path / "m")
    breaks(folder)
    with pytest.raises(CheckpointError, match=message):
        list(open_source([str(folder)]).check())


def test_a_missing_shard_is_named(model, tmp_path):
    folder = common.write(model, tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the file is missing"):
        open_source([str(folder)])


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight", "lm_head.weight"],
)
def test_a_different_public_model_is_named_with_the_difference(pairs, name):
    folder = Path(pairs[1].partition("=")[2])
    _edit(folder, lambda tensors: tensors[name].view(-1)[5].add_(0.25))
    with pytest.raises(CheckpointError, match=rf"{name} must equal .* largest difference 0\.25"):
        open_source(pairs)


def test_a_different_public_router_row_is_named(pairs):
    folder = Path(pairs[1].partition("=")[2])
    _edit(folder, lambda tensors: tensors["model.layers.1.mlp.gate.weight"][0, 2].add_(1.0))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.gate.weight row 0 must equal"):
        open_source(pairs)


def test_sources_that_make_no_sense_together(model, pairs, tmp_path):
    three = str(common.write(model, tmp_path / "three"))
    with pytest.raises(CheckpointError, match="takes a two-expert checkpoint, this has 3"):
        open_source([f"x={three}"])
    with pytest.raises(UsageError, match="give one folder"):
        open_source([three, three])
    with pytest.raises(UsageError, match="unique"):
        open_source([pairs[0], pairs[0]])
    with pytest.raises(UsageError, match="3 experts, got 2 names"):
        open_source([three], ["public", "math"])
    with pytest.raises(UsageError, match="no such embedded mixture"):
        open_source(["zoo://mega"])


CHAIN = {
    "model_type": "flex_more",
    "architectures": ["FlexMoreForCausalLM"],
    "expert_ranks": [0, 3, 2, 0, 4],
    "expert_alphas": [0, 6, 2, 0, 4],
    "expert_bases": [0, 0, 1, 0, 3],
    "num_experts": 5,
}


def test_chains_of_corrections_are_one_correction(tmp_path):
    """Expert 2 corrects 1 corrects the public one; expert 4 corrects the dense expert 3."""
    from transformers import AutoModelForCausalLM

    import flexmore_ray  # noqa: F401 - registers the model type

    model = common.random_model(num_experts=5)
    tensors = common.state(model)
    products = {}
    for layer in range(2):
        for p, (out, columns) in {"gate_proj": (80, 32), "up_proj": (80, 32), "down_proj": (32, 80)}.items():
            stem = f"model.layers.{layer}.mlp.experts"
            for e, rank, scale in ((1, 3, 2.0), (2, 2, 1.0), (4, 4, 1.0)):
                a, b = torch.randn(rank, columns) * 0.1, torch.randn(out, rank) * 0.1
                tensors |= {f"{stem}.{e}.{p}_a.weight": a, f"{stem}.{e}.{p}_b.weight": b}
                products[e] = scale * (b @ a)
            dense = {e: tensors[f"{stem}.{e}.{p}.weight"] for e in (0, 3)}
            dense[1] = dense[0] + products[1]
            dense[2] = dense[1] + products[2]
            dense[4] = dense[3] + products[4]
            for e in (1, 2, 4):
                tensors.pop(f"{stem}.{e}.{p}.weight")
            experts = model.model.layers[layer].mlp.experts
            for e, values in dense.items():
                if p == "down_proj":
                    experts.down_proj[e] = values
                else:
                    experts.gate_up_proj[e, slice(0, 80) if p == "gate_proj" else slice(80, 160)] = values
    folder = tmp_path / "chain"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | CHAIN))
    source = open_source([str(folder)])
    assert source.born_ranks[MatrixKey("expert-2", 0, "up_proj")] == 5
    assert MatrixKey("expert-4", 0, "up_proj") not in source.born_ranks
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(2, 61, (2, 11))
    common.set_active(model, 3)
    loaded.set_active(3)
    assert (loaded(tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_a_loop_of_bases_is_refused(tmp_path):
    folder = common.write(common.random_model(num_experts=3), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "flex_more", "expert_bases": [0, 2, 1], "expert_ranks": [0, 1, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="form a loop"):
        open_source([str(folder)])


def test_nothing_half_written_is_left(tmp_path):
    def fill_the_disk() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="nothing was kept"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_ranks_in_the_config_must_be_those_of_the_tensors(tmp_path):
    from flexmore_ray.export import export_mixture
    from flexmore_ray.spec import MixtureSpec

    folder = common.write(common.random_model(num_experts=2), tmp_path / "m")
    spec = MixtureSpec(source=(str(folder),), ranks={"expert-1": 4})
    out = export_mixture(spec, tmp_path / "out", "flex_more")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"expert_ranks": [0, 5]}))
    with pytest.raises(CheckpointError, match=r"gate_proj_a.weight has shape \(4, 32\), .* asks for \(5, 32\)"):
        open_source([str(out)])


def test_an_export_keeps_the_widest_dtype_and_points_home(tmp_path, monkeypatch):
    from flexmore_ray.export import export_mixture
    from flexmore_ray.mixture import load_mixture

    model = common.random_model(num_experts=3)
    folder = common.write(model, tmp_path / "m", dtype=torch.bfloat16)
    _edit(folder, lambda tensors: tensors.update({"lm_head.weight": model.lm_head.weight.clone()}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixture.yaml").write_text("source: m\n")
    out = export_mixture("mixture.yaml", "sub/out", "flexolmo")
    assert torch.equal(open_source([str(out)]).shared("lm_head.weight"), model.lm_head.weight)
    monkeypatch.chdir("/")
    assert load_mixture(tmp_path / out / "mixture.yaml").spec.source == (str(folder),)


def test_what_a_killed_export_left_is_removed(tmp_path):
    import platform
    import subprocess
    import sys

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".out.partial-{platform.node()}-{dead.pid}"
    left.mkdir()
    with new_folder(tmp_path / "out"):
        assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
