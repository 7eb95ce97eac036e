"""One suite for both sources of factors: the store on disk, and the expert actors."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest
import torch

from flexmore_ray.build import build_store
from flexmore_ray.errors import StoreError, UsageError
from flexmore_ray.mixture import load_mixture
from flexmore_ray.source import Source, open_source
from flexmore_ray.spec import MatrixKey, MixtureSpec
from flexmore_ray.store import FactorSource
from tests.common import random_model, truncated, write

EXPERTS = ("public", "math", "news")
KEY = MatrixKey("math", 1, "down_proj")
FULL = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source([str(write(random_model(3), tmp_path_factory.mktemp("model")))], EXPERTS)


@pytest.fixture(scope="module", params=["store", "actors"])
def factors(
    request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FactorSource]:
    folder = tmp_path_factory.mktemp("factors")
    if request.param == "store":
        yield build_store(source, folder)
        return
    request.getfixturevalue("local_ray")
    from flexmore_ray.experts import start_experts

    with start_experts(source, folder) as actors:
        yield actors


@pytest.fixture(scope="module")
def reference(source: Source, tmp_path_factory: pytest.TempPathFactory) -> FactorSource:
    return build_store(source, tmp_path_factory.mktemp("reference"))


def delta(source: Source, key: MatrixKey) -> torch.Tensor:
    return source.weight(key).double() - source.weight(key._replace(expert="public")).double()


@pytest.mark.parametrize("rank", [1, 7, FULL])
def test_a_truncation_is_the_best_one_of_its_rank(factors: FactorSource, source: Source, rank: int) -> None:
    for key in source.shape.keys("news"):
        u, s, vh = torch.linalg.svd(delta(source, key), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(factors.factors(key, rank).dense(), best.float(), rtol=1e-4, atol=1e-4)


def test_every_source_gives_the_same_bits(factors: FactorSource, reference: FactorSource, source: Source) -> None:
    for key in source.shape.keys("math"):
        for rank in (5, FULL, 1):
            given, expected = factors.factors(key, rank), reference.factors(key, rank)
            assert torch.equal(given.a, expected.a)
            assert torch.equal(given.bt, expected.bt)
    assert factors.dtype == reference.dtype == factors.factors(KEY, 1).a.dtype == torch.float32


def test_what_is_given_is_ones_own(factors: FactorSource) -> None:
    given = factors.factors(KEY, 3)
    before = given.a.clone()
    for tensor, width in ((given.a, 80), (given.bt, 32)):
        assert tensor.shape == (3, width)
        assert tensor.is_contiguous()
        tensor.zero_()
    assert torch.equal(factors.factors(KEY, 3).a, before)


def test_the_spectrum_is_complete(factors: FactorSource, source: Source) -> None:
    values = factors.spectrum(KEY)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.linalg.svdvals(delta(source, KEY)), rtol=1e-5, atol=1e-6)


def test_ranks_have_bounds(factors: FactorSource) -> None:
    assert factors.max_rank(KEY) == FULL
    with pytest.raises(StoreError, match=f"rank {FULL + 1} asked for expert math, layer 1, down_proj"):
        factors.factors(KEY, FULL + 1)
    with pytest.raises(UsageError, match="an integer >= 1, got 0 for expert math"):
        factors.factors(KEY, 0)


@pytest.mark.parametrize("key", [KEY._replace(expert="law"), KEY._replace(layer=2), KEY._replace(expert="public")])
def test_a_matrix_that_is_not_there_is_named(factors: FactorSource, key: MatrixKey) -> None:
    for ask in (lambda: factors.factors(key, 1), lambda: factors.spectrum(key), lambda: factors.max_rank(key)):
        with pytest.raises(StoreError, match=f"holds no factors of {key}") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_many_may_ask_at_once(factors: FactorSource, reference: FactorSource, source: Source) -> None:
    asked = [(key, rank) for rank in (2, 20) for name in EXPERTS[1:] for key in source.shape.keys(name)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: factors.factors(*pair), asked))
    for (key, rank), given in zip(asked, answers, strict=True):
        assert torch.equal(given.a, reference.factors(key, rank).a)


def test_a_mixture_is_made_of_them(factors: FactorSource, source: Source) -> None:
    ranks = {"math": 4, "news": {"gate_proj": 2, "up_proj": 9, "down_proj": 1}}
    mixture = load_mixture(MixtureSpec(source=tuple(source.describe()), experts=EXPERTS), factors=factors)
    mixture.set_ranks(ranks)
    tokens = torch.arange(12)[None]
    by_projection = {1: 4, 2: lambda _, projection: ranks["news"][projection]}
    expected = truncated(random_model(3), by_projection)(tokens).logits
    torch.testing.assert_close(mixture.model(tokens).logits, expected, rtol=1e-3, atol=1e-3)
