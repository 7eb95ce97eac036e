"""Closed-form router rows: additive moments, ridge regression, input checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from flexmore_ray.errors import UsageError
from flexmore_ray.router import RouterMoments, fit_rows, gather_moments
from flexmore_ray.texts import read_texts

HIDDEN, LAYERS = 16, 2


def moments_of(features: Tensor) -> RouterMoments:
    """Moments of explicit features ``(L, N, H)``."""
    return RouterMoments(features.transpose(1, 2) @ features, features.sum(1), features.shape[1])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = FlexOlmoConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_experts=2,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return FlexOlmoForCausalLM(config).eval()


def test_moments_of_two_halves_add_up_to_the_whole(model: nn.Module) -> None:
    tokens = torch.randint(2, 50, (8, 11), generator=torch.Generator().manual_seed(1))
    whole = gather_moments(model, [tokens])
    halves = gather_moments(model, [tokens[:3]]) + gather_moments(model, [tokens[3:]])
    assert whole.count == halves.count == 88
    torch.testing.assert_close(whole.gram, halves.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.total, halves.total, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_the_block_inputs(model: nn.Module) -> None:
    tokens = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(2))
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    x = seen[0].reshape(-1, HIDDEN).double()
    moments = gather_moments(model, [tokens])
    torch.testing.assert_close(moments.gram[1], x.T @ x)
    torch.testing.assert_close(moments.total[1], x.sum(0))


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model: nn.Module, left: bool) -> None:
    tokens = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    padding, ones = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    pair = (padding, tokens) if left else (tokens, padding)
    masks = (padding, ones) if left else (ones, padding)
    padded = gather_moments(model, [{"input_ids": torch.cat(pair, 1), "attention_mask": torch.cat(masks, 1)}])
    plain = gather_moments(model, [tokens])
    assert padded.count == plain.count
    torch.testing.assert_close(padded.gram, plain.gram, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.lists(st.integers(3, 60), min_size=2, max_size=5),
    ridge=st.floats(1e-4, 1.0),
    temperature=st.floats(0.05, 2.0),
)
def test_fit_equals_weighted_ridge_regression(seed: int, sizes: list[int], ridge: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(LAYERS, n, HIDDEN, generator=generator, dtype=torch.float64) + index
        for index, n in enumerate(sizes)
    ]
    moments = {f"expert-{i}": moments_of(x) for i, x in enumerate(features)}
    rows = fit_rows(moments, ridge=ridge, temperature=temperature)
    assert rows.shape == (LAYERS, len(sizes), HIDDEN)
    for layer in range(LAYERS):
        x = torch.cat([f[layer] for f in features]).numpy()
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
        weights = torch.cat([torch.full((n,), 1.0 / n, dtype=torch.float64) for n in sizes]).numpy()
        gram = sum(m.gram[layer] / m.count for m in moments.values())
        reference = Ridge(alpha=ridge * float(gram.trace()) / HIDDEN, fit_intercept=False, solver="cholesky")
        reference.fit(x, torch.nn.functional.one_hot(owner, len(sizes)).double().numpy(), sample_weight=weights)
        expected = torch.from_numpy(reference.coef_) / temperature
        torch.testing.assert_close(rows[layer], expected, rtol=1e-6, atol=1e-8)


def test_fit_does_not_depend_on_how_much_data_an_owner_has() -> None:
    x = torch.randn(2, LAYERS, 40, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    once, other = moments_of(x[0]), moments_of(x[1])
    rows = fit_rows({"a": once, "b": other})
    torch.testing.assert_close(rows, fit_rows({"a": once + once + once, "b": other}))


def test_save_and_load(tmp_path: Path) -> None:
    moments = moments_of(torch.randn(LAYERS, 9, HIDDEN, dtype=torch.float64))
    moments.save(tmp_path / "moments.safetensors")
    loaded = RouterMoments.load(tmp_path / "moments.safetensors")
    assert loaded.count == 9
    assert torch.equal(loaded.gram, moments.gram)
    assert torch.equal(loaded.total, moments.total)


def test_bad_input_is_refused_in_one_line(tmp_path: Path, model: nn.Module) -> None:
    good = moments_of(torch.randn(LAYERS, 9, HIDDEN, dtype=torch.float64))
    other_shape = moments_of(torch.randn(LAYERS, 9, HIDDEN + 1, dtype=torch.float64))
    broken = moments_of(torch.full((LAYERS, 9, HIDDEN), float("nan"), dtype=torch.float64))
    empty = RouterMoments(torch.zeros_like(good.gram), torch.zeros_like(good.total), 0)
    (tmp_path / "garbage").write_bytes(b"no moments")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    cases = {
        "at least 2": lambda: fit_rows({"a": good}),
        "bad has gram": lambda: fit_rows({"a": good, "bad": other_shape}),
        "bad hold NaN": lambda: fit_rows({"a": good, "bad": broken}),
        "bad cover no token": lambda: fit_rows({"a": good, "bad": empty}),
        "ridge": lambda: fit_rows({"a": good, "b": good}, ridge=0.0),
        "temperature": lambda: fit_rows({"a": good, "b": good}, temperature=float("nan")),
        "cannot be added": lambda: good + other_shape,
        "need gram": lambda: RouterMoments(good.gram, good.total[0], 9),
        "garbage": lambda: RouterMoments.load(tmp_path / "garbage"),
        "missing": lambda: RouterMoments.load(tmp_path / "missing"),
        "at least one token": lambda: gather_moments(model, []),
        "no module named": lambda: gather_moments(nn.Linear(2, 2), []),
        "holds no document": lambda: read_texts(tmp_path / "empty.txt"),
        "line 2": lambda: read_texts(tmp_path / "bad.jsonl"),
        "latin": lambda: read_texts(tmp_path / "latin"),
        "nowhere": lambda: read_texts(tmp_path / "nowhere"),
    }
    for words, call in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_data_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\\ntwo\n\nback\\\\nslash\r\nthree", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "back\\nslash", "three"]
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "three", "id": 3}\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == ["one\ntwo", "three"]
