"""A mixture equals the transformers FlexOlmo model it stands for, whatever its ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flexmore_ray.checkpoint import expert_tensor
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import load_mixture
from flexmore_ray.spec import PROJECTIONS, MixtureSpec
from tests import common

FULL_RANK = 32
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return common.random_model()


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(common.write(model, tmp_path_factory.mktemp("model"), expert_names=list(common.NAMES)))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 61, (3, 19), generator=torch.Generator().manual_seed(1))


def _spec(folder: str, ranks: dict[str, object], active: int) -> MixtureSpec:
    return MixtureSpec(source=(folder,), ranks=ranks, active=active)


@torch.inference_mode()
def _difference(ours: torch.nn.Module, reference: torch.nn.Module, tokens: torch.Tensor) -> float:
    return (ours(tokens).logits - reference(tokens).logits).abs().max().item()


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 5, 31, FULL_RANK, 500, "full"])
def test_logits_and_generations_equal_the_reconstruction(model, folder, tokens, rank, active):
    reference = model if rank == "full" else common.truncated(model, dict.fromkeys((1, 2, 3), rank))
    common.set_active(reference, active)
    mixture = load_mixture(_spec(folder, dict.fromkeys(common.NAMES[1:], rank), active))
    assert _difference(mixture.model, reference, tokens) < TOLERANCE
    generate = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(mixture.model.generate(tokens, **generate), reference.generate(tokens, **generate))
    common.set_active(model, 2)


def test_padded_batch_equals_single_rows(folder, tokens):
    mixture = load_mixture(_spec(folder, {"math": 3, "news": "full", "code": 7}, 2))
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :6] = 0
    padded = tokens[:2].clone()
    padded[1, :6] = 0
    generated = mixture.model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = mixture.model.generate(tokens[1:2, 6:], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[1, 19:], alone[0, 13:])


def test_bfloat16_runs_close_to_float32(folder, tokens):
    spec = _spec(folder, {"math": 3, "news": 8, "code": "drop"}, 2)
    exact = load_mixture(spec).model(tokens).logits
    rounded = load_mixture(spec, dtype="bfloat16").model(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).pow(2).mean() < 0.01 * exact.pow(2).mean()


_RANK = st.one_of(st.integers(1, 40), st.sampled_from(["full", "drop"]))
_REFINED = st.fixed_dictionaries(
    {p: st.one_of(st.integers(1, 40), st.lists(st.one_of(st.integers(1, 40), st.just("full")), min_size=2, max_size=2))
     for p in PROJECTIONS}
)  # fmt: skip
_RANKS = st.fixed_dictionaries({name: st.one_of(_RANK, _REFINED) for name in common.NAMES[1:]})


def _reference(model: torch.nn.Module, ranks: dict[str, object], active: int) -> torch.nn.Module:
    by_index = {}
    for e, name in enumerate(common.NAMES):
        rank = ranks.get(name, "full")
        if isinstance(rank, dict):

            def pick(layer: int, projection: str, rank: dict = rank) -> int | None:
                value = rank[projection]
                value = value[layer] if isinstance(value, list) else value
                return None if value == "full" else value

            by_index[e] = pick
        elif isinstance(rank, int):
            by_index[e] = rank
    dropped = {e for e, name in enumerate(common.NAMES) if ranks.get(name) == "drop"}
    reference = common.without(common.truncated(model, by_index), dropped)
    common.set_active(reference, active)
    return reference


@settings(max_examples=25, deadline=None)
@given(first=_RANKS, second=_RANKS, data=st.data())
def test_any_assignment_any_switch(model, folder, tokens, first, second, data):
    """Switching in place gives the mixture that loading gives, and both give the reference."""
    kept = 1 + sum(rank != "drop" for rank in second.values())
    active = data.draw(st.integers(1, kept))
    mixture = load_mixture(_spec(folder, first, 1))
    mixture.set_ranks(second)
    mixture.set_active(active)
    assert _difference(mixture.model, _reference(model, second, active), tokens) < TOLERANCE
    loaded = load_mixture(_spec(folder, second, active))
    assert torch.equal(mixture.model(tokens).logits, loaded.model(tokens).logits)
    assert mixture.spec.mixture_id == loaded.spec.mixture_id
    assert mixture.num_parameters() == mixture.count().total
    assert mixture.model.config.to_dict() == loaded.model.config.to_dict()


def test_a_switch_moves_views_and_copies_nothing(folder):
    mixture = load_mixture(_spec(folder, dict.fromkeys(common.NAMES[1:], 16), 2))
    expert = mixture.model.model.layers[0].mlp.experts[1]
    before = [w.untyped_storage().data_ptr() for w in expert.pair("up_proj")]
    dense = mixture.model.model.layers[0].mlp.experts[0].gate_proj.weight.data_ptr()
    mixture.set_ranks({"math": 5})
    after = expert.pair("up_proj")
    assert [w.untyped_storage().data_ptr() for w in after] == before
    assert [tuple(w.shape) for w in after] == [(5, 32), (80, 5)]
    assert mixture.model.model.layers[0].mlp.experts[0].gate_proj.weight.data_ptr() == dense


def test_a_failed_switch_changes_nothing(folder, tokens):
    mixture = load_mixture(_spec(folder, {"math": 3}, 4))
    logits, spec = mixture.model(tokens).logits, mixture.spec
    for ranks in ({"math": 0}, {"maths": 3}, {"news": "drop"}, {"math": 2.5}):
        with pytest.raises(UsageError):
            mixture.set_ranks(ranks)
    with pytest.raises(UsageError, match="active"):
        mixture.set_active(5)
    assert torch.equal(mixture.model(tokens).logits, logits)
    assert mixture.spec == spec


def test_save_and_load_as_any_transformers_model(folder, tokens, tmp_path):
    ranks = {"math": 3, "news": {"gate_proj": [4, "full"], "up_proj": 2, "down_proj": "full"}, "code": "drop"}
    mixture = load_mixture(_spec(folder, ranks, 2))
    mixture.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, mixture.model(tokens).logits)
    again = load_mixture(str(tmp_path))
    assert torch.equal(again.model(tokens).logits, mixture.model(tokens).logits)
    assert again.assignment == dataclasses.replace(mixture.assignment)


def test_mixture_id_is_about_outputs_alone(model, folder, tmp_path):
    def identity(source: str, active: int = 2, names: tuple[str, ...] | None = None, **ranks: object) -> str:
        spec = MixtureSpec(source=(source,), ranks=ranks, active=active, experts=names)
        return load_mixture(spec).spec.mixture_id

    fused = str(common.write(model, tmp_path / "fused", layout="fused", shards=3))
    base = identity(folder, math=4, news=500, code="full")
    assert base == identity(folder, math=4)
    assert base == identity(fused, names=("base", "a", "b", "c"), a=4)
    assert base == identity(folder, math={"gate_proj": 4, "up_proj": [4, 4], "down_proj": 4})
    others = [identity(folder, math=5), identity(folder, active=3, math=4), identity(folder, math=4, news="drop")]
    assert len({base, *others}) == 4
    changed = common.random_model()
    changed.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 1
    other = str(common.write(changed, tmp_path / "other", expert_names=list(common.NAMES)))
    assert identity(other, math=4) != base
    assert identity(other, math=4, code="drop") == identity(folder, math=4, code="drop")


def test_gradients_reach_factors_and_public_expert(folder, tokens):
    mixture = load_mixture(_spec(folder, {"math": 3, "news": "full", "code": 2}, 3))
    mixture.model.requires_grad_(True)
    mixture.model(tokens, labels=tokens).loss.backward()
    missing = [name for name, p in mixture.model.named_parameters() if p.grad is None]
    assert not missing
    assert expert_tensor(0, 1, "gate_proj", "_a") in dict(mixture.model.named_parameters())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A flex_more folder in which math was born at rank 6 and news at 40, above min(in, out) = 32."""
    import json

    from safetensors.torch import save_file

    tensors = common.state(common.random_model(num_experts=3))
    generator = torch.Generator().manual_seed(2)
    for layer in range(2):
        for p, (out, columns) in {"gate_proj": (80, 32), "up_proj": (80, 32), "down_proj": (32, 80)}.items():
            for e, rank in ((1, 6), (2, 40)):
                tensors.pop(expert_tensor(layer, e, p))
                tensors[expert_tensor(layer, e, p, "_a")] = 0.2 * torch.randn(rank, columns, generator=generator)
                tensors[expert_tensor(layer, e, p, "_b")] = 0.2 * torch.randn(out, rank, generator=generator)
    folder = tmp_path_factory.mktemp("born")
    save_file(tensors, folder / "model.safetensors")
    config = common.random_model(num_experts=3).config.to_dict() | {"model_type": "flex_more"}
    config |= {"expert_ranks": [0, 6, 40], "expert_names": ["public", "math", "news"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_experts_born_low_rank_switch_like_any_other(adapter, tokens):
    """Their own factors are in no order, so a lower rank is never a slice of them."""
    own = AutoModelForCausalLM.from_pretrained(adapter)(tokens).logits
    mixture = load_mixture(adapter)
    assert (mixture.model(tokens).logits - own).abs().max() < TOLERANCE
    for rank in (3, "full", 5, 6, 1):
        mixture.set_ranks({"math": rank, "news": rank})
        fresh = load_mixture(_spec(adapter, {"math": rank, "news": rank}, 2))
        assert (mixture.model(tokens).logits - fresh.model(tokens).logits).abs().max() < TOLERANCE
        assert mixture.spec.mixture_id == fresh.spec.mixture_id
        assert mixture.num_parameters() == mixture.count().total


def test_mixture_id_knows_config_and_dtype_of_the_factors(model, folder, tmp_path):
    from flexmore_ray.build import build_store
    from flexmore_ray.source import open_source

    other = common.write(model, tmp_path / "other", expert_names=list(common.NAMES), rms_norm_eps=1e-3)
    ids = {load_mixture(str(place)).spec.mixture_id for place in (folder, other)}
    source = open_source([folder])
    for dtype in ("float32", "bfloat16"):
        build_store(source, tmp_path / dtype, dtype=dtype)
        spec = MixtureSpec(source=(folder,), store=str(tmp_path / dtype), ranks={"math": 3})
        ids.add(load_mixture(spec).spec.mixture_id)
    assert len(ids) == 4


def test_the_cache_is_filled_in_one_pass(folder, monkeypatch, tmp_path):
    from flexmore_ray import mixture as module

    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path))
    calls = []
    build = module.build_store
    monkeypatch.setattr(module, "build_store", lambda *a, **k: calls.append(k["max_rank"]) or build(*a, **k))
    ranks = {"math": {"gate_proj": [2, 4], "up_proj": [6, 8], "down_proj": 10}, "news": 21, "code": "drop"}
    load_mixture(_spec(folder, ranks, 2))
    assert calls == [21]


@pytest.mark.parametrize("active", [2, 4, 7])
@pytest.mark.parametrize("rank", ["full", 8])
def test_the_embedded_mixture_equals_transformers_flexolmo(rank, active):
    from transformers import FlexOlmoForCausalLM

    from flexmore_ray.zoo import zoo_path

    reference = FlexOlmoForCausalLM.from_pretrained(zoo_path("nano"), dtype=torch.float32).eval()
    if rank != "full":
        reference = common.truncated(reference, dict.fromkeys(range(1, 7), rank))
    common.set_active(reference, active)
    names = ("math", "news", "academic", "code", "creative", "reddit")
    mixture = load_mixture(MixtureSpec(source=("zoo://nano",), ranks=dict.fromkeys(names, rank), active=active))
    generator = torch.Generator().manual_seed(active)
    tokens = torch.randint(3, reference.config.vocab_size, (4, 40), generator=generator)
    # Trained logits on random characters are large, and a decided router magnifies float32 rounding.
    largest = reference(tokens).logits.abs().max().item()
    assert _difference(mixture.model, reference, tokens) < TOLERANCE * largest
    generate = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(mixture.model.generate(tokens, **generate), reference.generate(tokens, **generate))
