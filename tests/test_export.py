"""Exports read back as what they were: by us, by transformers, by PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

import flexmore_ray  # noqa: F401 - registers the model type
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.export import export_mixture
from flexmore_ray.mixture import load_mixture
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from tests import common

RANKS = {"math": 3, "news": {"gate_proj": [4, "full"], "up_proj": 2, "down_proj": 6}, "code": "full"}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> MixtureSpec:
    folder = common.write(common.random_model(), tmp_path_factory.mktemp("m"), expert_names=list(common.NAMES))
    return MixtureSpec(source=(str(folder),), ranks=RANKS, active=2)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 61, (3, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("format", ["flex_more", "flexolmo"])
def test_model_folders_load_with_transformers(spec, tokens, tmp_path, format, dropped):
    if dropped:
        spec = spec.with_ranks({"math": "drop"})
    logits = load_mixture(spec).model(tokens).logits
    out = export_mixture(spec, tmp_path / "out", format)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == {"flex_more": "FlexMoreForCausalLM", "flexolmo": "FlexOlmoForCausalLM"}[format]
    assert (model(tokens).logits - logits).abs().max() < 1e-4
    again = load_mixture(str(out))
    assert (again.model(tokens).logits - logits).abs().max() < 1e-4
    if format == "flex_more":
        assert again.assignment == load_mixture(spec).assignment


def test_flex_more_folder_has_the_published_format(spec, tmp_path):
    uniform = spec.with_ranks({"news": 5})
    out = export_mixture(uniform, tmp_path / "out", "flex_more")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "flex_more"
    assert config["expert_ranks"] == [0, 3, 5, 0]
    assert config["expert_alphas"] == [0, 3, 5, 0]
    assert config["expert_bases"] == [0, 0, 0, 0]
    assert "expert_rank_pattern" not in config
    names = set(open_source([str(out)]).trunk.tensors.names())
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stem = "model.layers.1.mlp.experts"
        assert {f"{stem}.1.{projection}_a.weight", f"{stem}.1.{projection}_b.weight"} <= names
        assert {f"{stem}.0.{projection}.weight", f"{stem}.3.{projection}.weight"} <= names
        assert f"{stem}.1.{projection}.weight" not in names


def test_adapters_load_with_peft_on_the_public_model(spec, tmp_path, tokens):
    spec = spec.with_ranks({"news": {"gate_proj": [4, 9], "up_proj": 2, "down_proj": 6}})
    out = export_mixture(spec, tmp_path / "out", "peft")
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["math", "news"]
    source = open_source(spec.source)
    state = {name: source.shared(name) for name in source.trunk.tensors.names() if "mlp" not in name}
    for key in source.shape.keys("public"):
        state[f"model.layers.{key.layer}.mlp.{key.projection}.weight"] = source.weight(key)
    for name in ("math", "news"):
        public = Olmo2ForCausalLM(Olmo2Config(**common.SIZES)).eval()
        public.load_state_dict(state)
        adapted = PeftModel.from_pretrained(public, out / name).merge_and_unload().state_dict()
        mixture = load_mixture(spec)
        index = list(mixture.assignment.ranks).index(name)
        for key in source.shape.keys(name):
            experts = mixture.model.model.layers[key.layer].mlp.experts
            a, b = experts[index].pair(key.projection)
            expected = experts[0].dense(key.projection) + b @ a
            merged = adapted[f"model.layers.{key.layer}.mlp.{key.projection}.weight"]
            assert (merged - expected).abs().max() < 1e-5


def test_an_exported_adapter_is_an_expert_again(spec, tmp_path, tokens):
    """Trunk and full experts from the checkpoint, a low-rank one from its adapter, router row included."""
    out = export_mixture(spec.with_ranks({"news": "drop"}), tmp_path / "out", "peft")
    without_math = export_mixture(spec.with_ranks({"math": "drop", "news": "drop"}), tmp_path / "rest", "flexolmo")
    again = MixtureSpec(source=(str(without_math), f"math={out}/math"), active=2)
    first = load_mixture(spec.with_ranks({"news": "drop"})).model(tokens).logits
    second = load_mixture(again).model(tokens).logits
    assert (first - second).abs().max() < 1e-4


def test_export_refuses_what_it_cannot_do(spec, tmp_path):
    with pytest.raises(UsageError, match="one of flex_more, flexolmo, peft"):
        export_mixture(spec, tmp_path / "out", "gguf")
    with pytest.raises(UsageError, match="no expert of this mixture is low-rank"):
        export_mixture(MixtureSpec(source=spec.source), tmp_path / "out", "peft")
    export_mixture(spec, tmp_path / "out", "flexolmo")
    with pytest.raises(UsageError, match="exists already"):
        export_mixture(spec, tmp_path / "out", "flexolmo")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_reads_back_different_is_refused(spec, tmp_path, monkeypatch):
    from flexmore_ray.checkpoint import writing

    def damaged(tensors, path, metadata):
        name = next(iter(tensors))
        save(tensors | {name: tensors[name] + 1}, path, metadata=metadata)

    save = writing.save_file
    monkeypatch.setattr(writing, "save_file", damaged)
    with pytest.raises(CheckpointError, match="reads back different"):
        export_mixture(spec, tmp_path / "out", "flexolmo")
    assert list(tmp_path.iterdir()) == []
