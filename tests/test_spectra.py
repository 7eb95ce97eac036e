"""Decomposition: truncations against plain float64 `torch.linalg.svd`, the check, the fallback."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexmore_ray import spectra
from flexmore_ray.spectra import (
    FLOAT32_FLOOR,
    MAX_ERROR_RATIO,
    METHODS,
    Decomposition,
    Factors,
    decompose,
    decompose_factors,
    delta,
    discarded_energy,
    energy_share,
    stable_rank,
)

SPECTRA = {
    "power": lambda i: i**-0.7,
    "flat": lambda i: torch.ones_like(i),
    "steep": lambda i: 10 ** (-12 * (i - 1) / max(1, len(i) - 1)),
    "repeated": lambda i: torch.where(i <= len(i) / 3, 2.0, 1.0).double(),
    "deficient": lambda i: torch.where(i <= max(1, len(i) // 5), 1 / i, 0.0),
    "spikes": lambda i: torch.where(i <= 3, 100.0, 1.0).double(),
}
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (40, 24), (24, 40), (200, 330), (330, 200)]


def matrix(spectrum: str, out: int, inner: int, seed: int = 0) -> Tensor:
    """A float32 matrix with random singular vectors and a given spectrum."""
    generator = torch.Generator().manual_seed(seed)
    size = min(out, inner)
    u, v = (torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q for n in (out, inner))
    return ((u * SPECTRA[spectrum](torch.arange(1, size + 1, dtype=torch.float64))) @ v.T).float()


def squared_error(d: Tensor, factors: Factors) -> float:
    return float((d.double() - factors.bt.double().T @ factors.a.double()).square().sum())


def assert_optimal(d: Tensor, result: Decomposition, scale: float = 1.0) -> None:
    """Every truncation is the best of its rank, against an independent reference in float64."""
    values = torch.linalg.svdvals(d.double() / scale)
    energy = float(values.square().sum())
    held = result.factors.rank
    for rank in sorted({1, 2, held // 4, held // 2, held - 1, held} & set(range(1, held + 1))):
        least = float(values[rank:].square().sum())
        error = squared_error(d, result.factors.truncate(rank)) / scale**2
        assert error <= MAX_ERROR_RATIO * least + FLOAT32_FLOOR * energy
        stated = discarded_energy(result.singular_values, rank, result.residual_energy) / scale**2
        assert stated == pytest.approx(error, rel=2e-3, abs=2 * FLOAT32_FLOOR * energy)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_every_rank_is_the_discarded_energy(shape: tuple[int, int], spectrum: str, method: str) -> None:
    d = matrix(spectrum, *shape)
    for max_rank in (None, 1, 8):
        result = decompose(d, max_rank, method)
        assert result.factors.rank == min(max_rank or min(shape), *shape)
        assert result.error_ratio <= MAX_ERROR_RATIO
        assert_optimal(d, result)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 60),
    inner=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    decay=st.floats(0, 3),
    rank=st.integers(1, 60),
    method=st.sampled_from(["auto", *METHODS]),
)
def test_random_deltas(out: int, inner: int, seed: int, decay: float, rank: int, method: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(out, inner, generator=generator) * torch.arange(1, inner + 1) ** -decay
    result = decompose(d, rank, method)
    assert_optimal(d, result)
    errors = [squared_error(d, result.factors.truncate(r)) for r in range(1, result.factors.rank + 1)]
    energy = float(d.double().square().sum())
    assert all(later <= before + FLOAT32_FLOOR * energy for before, later in itertools.pairwise(errors))
    assert result.energy == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("method", METHODS)
def test_very_large_and_very_small_deltas(scale: float, method: str) -> None:
    d = matrix("power", 180, 220) * scale
    for max_rank in (None, 8):
        result = decompose(d, max_rank, method)
        assert result.method == method or (method == "randomized" and max_rank is None)
        assert_optimal(d, result, scale)


@pytest.mark.parametrize("spread", [1e1, 1e2, 3e2, 1e3, 1e4, 1e6])
def test_gram_at_every_width_of_the_spectrum(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=generator, dtype=torch.float64)).Q for n in (300, 500))
    d = ((u * torch.logspace(0, -torch.tensor(spread).log10().item(), 300, dtype=torch.float64)) @ v.T).float()
    result = decompose(d, method="gram")
    assert result.method == "gram"
    assert_optimal(d, result)


def test_ranks_nest_and_a_lower_rank_shares_memory() -> None:
    factors = decompose(matrix("power", 40, 24)).factors
    cut = factors.truncate(5)
    assert torch.equal(cut.a, factors.a[:5])
    assert cut.a.data_ptr() == factors.a.data_ptr()
    assert cut.bt.data_ptr() == factors.bt.data_ptr()
    assert cut.a.is_contiguous()
    assert cut.bt.is_contiguous()
    assert cut.lora_b.shape == (40, 5)
    for rank in (0, -1, 25):
        with pytest.raises(ValueError, match="1 to 24"):
            factors.truncate(rank)


def test_the_split_is_symmetric_and_signs_are_fixed() -> None:
    d = matrix("power", 50, 30)
    for method in METHODS:
        result = decompose(d, method=method)
        norms = torch.stack([result.factors.a.norm(dim=1), result.factors.bt.norm(dim=1)]).double().square()
        torch.testing.assert_close(norms, result.singular_values.expand(2, -1), rtol=1e-4, atol=1e-7)
        bt = result.factors.bt
        assert bool((bt.gather(1, bt.abs().argmax(1, keepdim=True)) > 0).all())
        torch.testing.assert_close(result.factors.a[:5], decompose(d).factors.a[:5], rtol=1e-3, atol=1e-4)


def test_the_same_delta_gives_the_same_bytes_and_leaves_the_caller_alone() -> None:
    d = matrix("power", 200, 330)
    before, state = d.clone(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    one, two = decompose(d, 8, "randomized"), decompose(d, 8, "randomized")
    assert one.method == "randomized"
    assert torch.equal(one.factors.a, two.factors.a)
    assert torch.equal(d, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


def test_a_delta_of_zeros() -> None:
    result = decompose(torch.zeros(6, 4), 3)
    assert result.method == "zero"
    assert result.factors.rank == 3
    assert not result.factors.dense().any()
    assert result.energy == 0
    assert energy_share(result.singular_values, 1) == 1
    assert stable_rank(result.singular_values) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    d = torch.ones(4, 5)
    d[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose(d)
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose_factors(d, torch.ones(4, 6))


@pytest.mark.parametrize(
    ("d", "arguments"),
    [
        (torch.ones(3), {}),
        (torch.ones(0, 3), {}),
        (torch.ones(3, 3, dtype=torch.int64), {}),
        (torch.ones(3, 3), {"max_rank": 0}),
        (torch.ones(3, 3), {"method": "magic"}),
    ],
)
def test_bad_arguments(d: Tensor, arguments: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        decompose(d, **arguments)


def _random_basis(problem: spectra._Problem) -> spectra._Basis:
    size = len(problem.x)
    u = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(5))).Q
    return spectra._project(problem.x, u)


def _missing_the_first_direction(problem: spectra._Problem) -> spectra._Basis:
    right = spectra._svd(problem)
    return spectra._Basis(right.u[:, 1:40], right.w[1:40], right.s[1:40])


def _wrong_product(problem: spectra._Problem) -> spectra._Basis:
    right = spectra._svd(problem)
    return right._replace(w=right.w.roll(1, dims=1))


def _not_a_number(problem: spectra._Problem) -> spectra._Basis:
    right = spectra._svd(problem)
    return right._replace(w=right.w * float("nan"))


def _slightly_turned(problem: spectra._Problem) -> spectra._Basis:
    right = spectra._svd(problem)
    turn = torch.eye(len(right.s))
    angle = torch.tensor(0.1)
    turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return spectra._project(problem.x, right.u @ turn)


def _does_not_converge(problem: spectra._Problem) -> spectra._Basis:
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize(
    "broken",
    [
        _random_basis,
        _missing_the_first_direction,
        _wrong_product,
        _not_a_number,
        _slightly_turned,
        _does_not_converge,
    ],
)
def test_a_method_that_fails_its_check_is_replaced(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    d = matrix("power", 200, 330)
    for method in ("randomized", "gram", "gram64"):
        monkeypatch.setitem(spectra._FIND, method, broken)
    result = decompose(d, 8)
    assert result.method == "svd"
    assert result.rejected == ("randomized", "gram", "gram64")
    assert_optimal(d, result)


def test_no_method_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in METHODS:
        monkeypatch.setitem(spectra._FIND, method, _random_basis)
    with pytest.raises(ArithmeticError, match="svd64"):
        decompose(matrix("power", 20, 30))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 20), out=st.integers(1, 16), inner=st.integers(1, 16), seed=st.integers(0, 1000))
def test_born_factors_are_decomposed_exactly(rank: int, out: int, inner: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, bt = torch.randn(rank, inner, generator=generator), torch.randn(rank, out, generator=generator)
    result = decompose_factors(a, bt)
    assert result.factors.rank == min(rank, out, inner)
    assert_optimal((bt.double().T @ a.double()).double(), result)
    bt = result.factors.bt
    assert bool((bt.gather(1, bt.abs().argmax(1, keepdim=True)) >= 0).all())


def test_delta_is_taken_in_float32() -> None:
    expert, public = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[0.00390625, 1.0]]).bfloat16()
    assert torch.equal(delta(expert, public), torch.tensor([[0.99609375, 1.0]]))
    with pytest.raises(ValueError, match="equal shapes"):
        delta(expert, public.T)


def test_energies() -> None:
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert [energy_share(values, r) for r in range(4)] == pytest.approx([0, 9 / 14, 13 / 14, 1])
    assert energy_share(values[:1], 1, residual_energy=5.0) == pytest.approx(9 / 14)
    assert [discarded_energy(values, r) for r in range(4)] == [14, 5, 1, 0]
    assert stable_rank(values) == pytest.approx(14 / 9)


_MEMORY = """
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("spectra", sys.argv[1])
sys.modules["spectra"] = spectra = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spectra)
torch.set_num_threads(1)
d = torch.randn(1024, 2752) * torch.arange(1, 1025)[:, None] ** -1.0
for rank in (32, None):
    spectra.decompose(d[:300, :400].contiguous(), rank)
    before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    method = spectra.decompose(d, rank).method
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(method, (peak - before) / (d.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_small_multiple_of_the_matrix() -> None:
    command = [sys.executable, "-c", _MEMORY, spectra.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    measured = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert 0 < measured["randomized"] <= 3
    assert 1 < measured["gram"] <= 8
