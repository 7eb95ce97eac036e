"""Deltas, their spectra and their low-rank factors: decomposition that is fast and checked.

    symbol   meaning                                                     shape
    D        delta: domain expert minus public expert, float32           (out, in)
    X        D, or its transpose if D is taller than wide                (m, n), m <= n
    G        Gram matrix X X^T, float64                                  (m, m)
    U        left basis of X, orthonormal columns                        (m, l)
    W        U^T X, orthogonal rows; row i has the norm s_i              (l, n)
    s        singular values, largest first (the spectrum)               (l,)
    Z        one application of the residual, (X - U W) W^T              (m, l)
    A, B     factors A = sqrt(S) V^T and B = U sqrt(S), D_r = B A        (rank, in), (out, rank)
    l        columns of the basis: m if it is complete, rank and a margin if it is not

Methods, each falling back to the next one that follows where its result does not pass the check:

    randomized   range finder with power iterations (Halko, Martinsson, Tropp 2011); for low ranks
    gram         eigenvectors of G. Squaring X squares its condition number, so eigenvectors in
                 float32 serve only a narrow spectrum. A wider one is first narrowed to its square
                 root by f(x) = -t / (x + t), which keeps the eigenvectors; one that is wider
                 still takes float64
    gram64       the same with float64 throughout
    svd, svd64   `torch.linalg.svd` in float32, float64

The check looks only at D and the result. It certifies, for every rank r up to the one held,

    ||D - D_r||^2  <=  1.001 * (least error of any matrix of rank r)  +  1e-10 * ||D||^2,

where the last term is the rounding of float32 (`torch.linalg.svd` itself leaves some 1e-11). Rows
of W that are orthogonal up to C = V V^T - I (V: W with unit rows) change no squared singular value
by more than a factor 1 +- ||C||_2 (Ostrowski), hence no least error either. Where the basis is not
complete, the energy that a Ritz value s_i^2 can miss is bounded by its residual ||z_i|| and by the
largest direction left out: the larger root of the two-by-two problem of both. Spectral norms are
estimated from random probes, with a margin.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ERROR_RATIO = 1.001
"""Highest squared truncation error, as a multiple of the least possible one, that passes the check."""
FLOAT32_FLOOR = 1e-10
"""Share of the energy below which errors are rounding of float32 and are not compared."""
METHODS = ("randomized", "gram", "gram64", "svd", "svd64")
"""Methods of `decompose`, in the order of falling back."""

_TINY = 160  # smaller sides gain nothing from a faster method: float64, which costs milliseconds, is exact
_MAX_POWER = 8  # power iterations before the range finder gives up
_CONVERGED = (MAX_ERROR_RATIO - 1) / 2  # excess of the error ratio at which it is content
_BLOCK = 256  # rows worked on at a time where a temporary would be as large as the matrix
_PROBES = 16  # random vectors per probe; products with fewer columns take longer, not less time
_NARROW, _WIDE = 3e2, 1e5  # widest spectra of G (largest over smallest) for float32, and narrowed


@dataclass(frozen=True)
class Factors:
    """A low-rank correction of one matrix, both factors rank-major so that a lower rank is a slice.

    Args:
        a: (rank, in), the LoRA A: sqrt(S) V^T.
        bt: (rank, out), the LoRA B transposed: sqrt(S) U^T.

    Raises:
        ValueError: the two do not have the same number of rows.
    """

    a: Tensor
    bt: Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.bt.ndim != 2 or self.a.shape[0] != self.bt.shape[0]:
            raise ValueError(
                f"factors are (rank, in) and (rank, out), got {tuple(self.a.shape)}, {tuple(self.bt.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of rows of both factors."""
        return self.a.shape[0]

    @property
    def lora_a(self) -> Tensor:
        """A, (rank, in)."""
        return self.a

    @property
    def lora_b(self) -> Tensor:
        """B, (out, rank): a view on `bt`."""
        return self.bt.T

    def truncate(self, rank: int) -> Factors:
        """The same correction at a lower rank, as views.

        Raises:
            ValueError: `rank` is not in [1, self.rank].
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"a rank from 1 to {self.rank} can be cut from these factors, got {rank}")
        return Factors(self.a[:rank], self.bt[:rank])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product B A, (out, in), multiplied in float32 and returned in `dtype`."""
        with full_precision():
            return (self.bt.float().T @ self.a.float()).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Factors of one delta, its spectrum, and what the check found."""

    factors: Factors
    """Factors at the highest rank asked for."""
    singular_values: Tensor
    """Float64, largest first: all min(in, out), or as many as the factors' rank where the rest
    was not computed."""
    residual_energy: float
    """Squared Frobenius norm of what `singular_values` leaves out; 0 where they are complete."""
    method: str
    """Method whose result passed: one of `METHODS`, "factors" for born factors, or "zero"."""
    rejected: tuple[str, ...]
    """Methods tried before it whose result did not pass."""
    error_ratio: float
    """Verified bound on squared truncation error over least squared error, at every rank held."""

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the delta."""
        return float(self.singular_values.square().sum()) + self.residual_energy


# ----------------------------------------------------------------------------------- energy


def energy_share(singular_values: Tensor, rank: int, residual_energy: float = 0.0) -> float:
    """Share of the energy, in [0, 1], that rank `rank` keeps; 1 for a delta of zeros.

    Args:
        singular_values: largest first.
        rank: 0 or more; above the number of values it counts all of them.
        residual_energy: squared Frobenius norm of what `singular_values` leaves out.
    """
    energy = singular_values.double().square()
    total = float(energy.sum()) + residual_energy
    return float(energy[:rank].sum()) / total if total else 1.0


def discarded_energy(singular_values: Tensor, rank: int, residual_energy: float = 0.0) -> float:
    """Least squared Frobenius error of rank `rank` (Eckart-Young): the squares of all later values.

    Args are those of `energy_share`; the result is in squared units of the weights.
    """
    return float(singular_values.double()[rank:].square().sum()) + residual_energy


def stable_rank(singular_values: Tensor, residual_energy: float = 0.0) -> float:
    """Energy over the energy of the first direction, ||D||_F^2 / ||D||_2^2; 0 for a delta of zeros."""
    first = float(singular_values[0]) ** 2
    return discarded_energy(singular_values, 0, residual_energy) / first if first else 0.0


# --------------------------------------------------------------------------- decomposition


def delta(expert: Tensor, public: Tensor) -> Tensor:
    """Domain expert minus public expert, in float32, on the expert's device.

    Raises:
        ValueError: the shapes differ.
    """
    if expert.shape != public.shape:
        raise ValueError(f"a delta needs equal shapes, got {tuple(expert.shape)} and {tuple(public.shape)}")
    return expert.float() - public.to(expert.device).float()


def decompose(delta: Tensor, max_rank: int | None = None, method: str = "auto", seed: int = 0) -> Decomposition:
    """Factor a delta up to a rank, with a verified error, on the delta's device.

    Memory needed beside the delta, in multiples of its own size in float32, result included: 5.5 at
    2048 x 5504 and 11 for a square one, at any spectrum; 1.6 and 3.5 with the range finder. A fallback
    to "svd" takes 6.5, to "svd64" 14.5.

    Args:
        delta: (out, in), floating point; computed with in float32.
        max_rank: highest rank wanted, inclusive; None, or more than min(in, out), means min(in, out).
        method: "auto", or one of `METHODS` to start with; those after it remain the fallback.
        seed: of the random probes; the caller's generators are left alone.

    Returns:
        Factors whose columns of B have their largest entry positive, so that a result does not
        depend on which signs a library chose.

    Raises:
        ValueError: NaN or infinity in the delta, or a bad shape, rank or method.
        ArithmeticError: no method passed the check.
    """
    _check_arguments(delta, max_rank, method)
    rank = min(max_rank or min(delta.shape), *delta.shape)
    low, high = (float(v) for v in torch.aminmax(delta))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("NaN or infinity in the delta; only finite weights can be decomposed")
    peak = max(-low, high)
    if peak == 0:
        return _zero(delta, rank)
    wide = delta.shape[0] <= delta.shape[1]
    scale = _scale(peak)
    with full_precision(), torch.no_grad():
        x = (delta if wide else delta.T).float()
        if scale != 1:
            x = x * scale
        problem = _Problem(x, rank, torch.Generator(device=x.device).manual_seed(seed))
        return _first_verified(problem, _plan(method, len(x), rank), wide, scale)


def decompose_factors(a: Tensor, bt: Tensor) -> Decomposition:
    """Factors in the form of `decompose` of a delta that is given as B A, without forming it.

    QR of both factors, then the SVD of the small core, in float64: exact at every rank.

    Args:
        a: (rank, in).
        bt: (rank, out), B transposed.

    Returns:
        Factors of rank min(rank, in, out).

    Raises:
        ValueError: NaN or infinity in a factor, or shapes that do not match.
    """
    given = Factors(a, bt)
    if not (bool(given.a.isfinite().all()) and bool(given.bt.isfinite().all())):
        raise ValueError("NaN or infinity in a factor; only finite weights can be decomposed")
    q_in, r_in = torch.linalg.qr(a.double().T)
    q_out, r_out = torch.linalg.qr(bt.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    root = s.sqrt()
    out_t, in_t = (q_out @ (u * root)).T.contiguous(), root[:, None] * (vh @ q_in.T)
    factors = fix_signs(Factors(in_t.float(), out_t.float()))
    return Decomposition(
        factors=factors,
        singular_values=s,
        residual_energy=0.0,
        method="factors",
        rejected=(),
        error_ratio=1.0,
    )


def _check_arguments(delta: Tensor, max_rank: int | None, method: str) -> None:
    if delta.ndim != 2 or 0 in delta.shape or not delta.is_floating_point():
        raise ValueError(f"a delta is a floating-point matrix (out, in), got {delta.dtype} {tuple(delta.shape)}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is an integer >= 1, or None for the full rank, got {max_rank}")
    if method not in ("auto", *METHODS):
        raise ValueError(f"method is auto or one of {', '.join(METHODS)}, got {method!r}")


def _scale(peak: float) -> float:
    """A power of four that brings the largest entry near 1, or 1 where squares are safe anyway."""
    return 1.0 if 2.0**-20 < peak < 2.0**20 else 4.0 ** -round(math.log(peak, 4))


def _plan(method: str, m: int, rank: int) -> tuple[str, ...]:
    """Methods to try, in this order."""
    if method != "auto":
        return METHODS[METHODS.index(method) :]
    if m <= _TINY:
        return METHODS[METHODS.index("svd64") :]
    return METHODS if 5 * _columns(m, rank) <= m else METHODS[1:]


class _Problem(NamedTuple):
    x: Tensor
    rank: int
    generator: torch.Generator


class _Basis(NamedTuple):
    u: Tensor
    w: Tensor
    s: Tensor

    @property
    def complete(self) -> bool:
        return self.u.shape[1] == self.u.shape[0]


def _first_verified(problem: _Problem, plan: tuple[str, ...], wide: bool, scale: float) -> Decomposition:
    rejected: list[str] = []
    for method in plan:
        basis = _attempt(method, problem)
        ratio, residual = (math.inf, 0.0) if basis is None else _verify(problem, basis)
        if basis is not None and ratio <= MAX_ERROR_RATIO:
            factors, values = _finish(basis, problem.rank, wide, scale)
            known = problem.rank if not basis.complete else len(values)
            beyond = float(values[known:].square().sum()) + residual / scale**2
            return Decomposition(
                factors=factors,
                singular_values=values[:known].clone(),
                residual_energy=beyond,
                method=method,
                rejected=tuple(rejected),
                error_ratio=ratio,
            )
        del basis
        rejected.append(method)
    raise ArithmeticError(
        f"no decomposition of a {tuple(problem.x.shape)} delta passed its check: {', '.join(rejected)}"
    )


def _attempt(method: str, problem: _Problem) -> _Basis | None:
    """The basis that a method finds; None where it does not converge."""
    try:
        return _FIND[method](problem)
    except torch.linalg.LinAlgError:
        return None


def _finish(basis: _Basis, rank: int, wide: bool, scale: float) -> tuple[Factors, Tensor]:
    """Split the singular values over both factors, undo the scaling, fix the signs."""
    root = (basis.s[:rank] / scale).sqrt()
    left = (basis.u[:, :rank].T * root[:, None].float()).contiguous()
    unit = torch.where(basis.s[:rank] > 0, root / basis.s[:rank], 0.0).float()[:, None]
    right = basis.w.mul_(unit) if len(basis.w) == rank else basis.w[:rank] * unit
    factors = Factors(right.contiguous(), left) if wide else Factors(left, right.contiguous())
    return fix_signs(factors), basis.s / scale


def fix_signs(factors: Factors) -> Factors:
    """Make the largest entry of every column of B positive, in place."""
    for rows, partner in zip(factors.bt.split(_BLOCK), factors.a.split(_BLOCK), strict=True):
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(rows)
        rows.mul_(sign)
        partner.mul_(sign)
    return factors


def _zero(delta: Tensor, rank: int) -> Decomposition:
    factors = Factors(*(torch.zeros(rank, size, device=delta.device) for size in (delta.shape[1], delta.shape[0])))
    values = torch.zeros(min(delta.shape), dtype=torch.float64, device=delta.device)
    return Decomposition(
        factors=factors,
        singular_values=values,
        residual_energy=0.0,
        method="zero",
        rejected=(),
        error_ratio=1.0,
    )


# --------------------------------------------------------------------------------- methods


def _svd(problem: _Problem) -> _Basis:
    u, s, w = torch.linalg.svd(problem.x, full_matrices=False)
    return _Basis(u, w.mul_(s[:, None]), s.double())


def _svd64(problem: _Problem) -> _Basis:
    u, s, w = torch.linalg.svd(problem.x.double(), full_matrices=False)
    return _Basis(u.float(), w.mul_(s[:, None]).float(), s)


def _gram(problem: _Problem) -> _Basis:
    gram = _gram_matrix(problem.x)
    spread = _spread(gram, problem.generator)
    if spread is not None and spread.ratio <= _WIDE:
        if spread.ratio > _NARROW:
            _narrow(gram, spread.largest / math.sqrt(spread.ratio))
        gram = gram.float()
    return _project(problem.x, _eigenvectors(gram))


def _gram64(problem: _Problem) -> _Basis:
    return _project(problem.x, _eigenvectors(_gram_matrix(problem.x)))


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, those of the largest eigenvalues first; uses it up."""
    torch.linalg.eigh(gram, out=(gram.new_empty(len(gram)), gram))
    return gram.flip(1)


def _gram_matrix(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """X X^T, multiplied in `dtype`; only the blocks on and below the diagonal are multiplied out."""
    m = len(x)
    gram = x.new_zeros(m, m, dtype=dtype)
    for columns in x.split(max(1024, m // 2), dim=1):
        part = columns.to(dtype)
        for start in range(0, m, _BLOCK):
            stop = min(start + _BLOCK, m)
            gram[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)
    for start in range(0, m, _BLOCK):
        gram[:start, start : start + _BLOCK] = gram[start : start + _BLOCK, :start].T
    return gram


class _Spread(NamedTuple):
    largest: float
    ratio: float


def _spread(gram: Tensor, generator: torch.Generator) -> _Spread | None:
    """Largest eigenvalue of G and its ratio to the smallest, roughly; None where that is too wide."""
    lower, failed = torch.linalg.cholesky_ex(gram.float())
    if int(failed):
        return None
    top = bottom = _normal(generator, len(gram), 4, dtype=torch.float64)
    for _ in range(4):
        top = gram @ (top / top.norm(dim=0))
    low = bottom.float()
    for _ in range(4):
        low = torch.cholesky_solve(low / low.norm(dim=0), lower)
    largest, inverse = float(top.norm(dim=0).max()), float(low.norm(dim=0).max())
    ratio = largest * inverse
    return _Spread(largest, ratio) if math.isfinite(ratio) else None


def _narrow(gram: Tensor, shift: float) -> None:
    """Replace G by -t (G + t I)^-1: the same eigenvectors in the same order, less spread eigenvalues."""
    gram.diagonal().add_(shift)
    torch.cholesky_inverse(torch.linalg.cholesky(gram), out=gram)
    gram.mul_(-shift)


def _project(x: Tensor, u: Tensor) -> _Basis:
    """W = U^T X, multiplied in U's precision, returned in float32."""
    if u.dtype == x.dtype:
        w = u.T @ x
    else:
        w = torch.cat([(u.T @ columns.to(u.dtype)).to(x.dtype) for columns in x.split(1024, dim=1)], dim=1)
    return _ordered(u.to(x.dtype), w)


def _ordered(u: Tensor, w: Tensor) -> _Basis:
    """Order by the norms of W's rows: eigenvalues that are close, or mere rounding, come in any order."""
    s = _row_norms(w)
    if bool((s[1:] > s[:-1]).any()):
        order = s.argsort(descending=True, stable=True)
        u, w, s = u[:, order], w[order], s[order]
    return _Basis(u, w, s)


def _row_norms(w: Tensor) -> Tensor:
    return torch.cat([rows.double().norm(dim=1) for rows in w.split(_BLOCK)])


def _columns(m: int, rank: int) -> int:
    """Columns of the range finder's basis for a rank: some more, which speeds its convergence."""
    return min(m, rank + max(24, rank // 4))


def _randomized(problem: _Problem) -> _Basis | None:
    x, rank, generator = problem
    columns = _columns(len(x), rank)
    product, patience = _gram_product(x, columns)
    q = torch.linalg.qr(product(_normal(generator, len(x), columns))).Q
    energy = sum(float(rows.double().square().sum()) for rows in x.split(_BLOCK))
    excess = math.inf
    for left in reversed(range(patience)):
        u, y, ritz = _ritz(q, product(q))
        missed = _missed_energy(ritz, _column_norms(y - u * ritz.float()), float(ritz[-1]))
        residual = energy - float(ritz.sum())
        before, excess = excess, _worst_ratio(ritz[:rank], missed[:rank], residual, ritz[rank:], energy) - 1
        if excess <= _CONVERGED:
            return _rotate(u, u.T @ x)
        if before < math.inf and excess * min(1.0, excess / before) ** left > _CONVERGED:
            return None  # too slow: a spectrum without decay
        q = torch.linalg.qr(y / ritz.clamp_min(float(ritz[0]) * 1e-7).float()).Q
    return None


def _gram_product(x: Tensor, columns: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """How to multiply by X X^T, and how often at most; a product with many columns pays to form it."""
    if 32 * columns < len(x):
        return lambda q: x @ (x.T @ q), _MAX_POWER
    gram = _gram_matrix(x, torch.float32)
    return lambda q: gram @ q, 2 * _MAX_POWER


def _ritz(q: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz vectors U, their images G U, and Ritz values, from an orthonormal Q and Y = G Q."""
    small = (q.T @ y).double()
    values, turn = torch.linalg.eigh((small + small.T) / 2)
    turn = turn.flip(1).float()
    return q @ turn, y @ turn, values.flip(0)


def _rotate(q: Tensor, w: Tensor) -> _Basis:
    """Rayleigh-Ritz: turn an orthonormal basis Q and W = Q^T X so that the rows of W are orthogonal."""
    wide = w.double()
    turn = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)
    w = (turn.T @ wide).to(q.dtype)
    return _ordered((q.double() @ turn).to(q.dtype), w)


_FIND: dict[str, Callable[[_Problem], _Basis | None]] = {
    "randomized": _randomized,
    "gram": _gram,
    "gram64": _gram64,
    "svd": _svd,
    "svd64": _svd64,
}


# ----------------------------------------------------------------------------------- check


def _verify(problem: _Problem, basis: _Basis) -> tuple[float, float]:
    """Bound on squared error over least squared error at every rank held, and the residual energy.

    The bound is infinite where the result is not a decomposition of X at all.
    """
    energy = basis.s.square()
    if not (bool(torch.isfinite(energy).all()) and float(energy[0]) > 0 and bool((energy[1:] <= energy[:-1]).all())):
        return math.inf, 0.0
    u, w = _deviations(problem, basis)
    if max(u, w) > 0.01:
        return math.inf, 0.0
    frame = (1 + min(u, w)) / ((1 - u) * (1 - w))
    if basis.complete:
        return (frame if _reproduces(problem, basis) else math.inf), 0.0
    residual = _residual_energy(problem.x, basis)
    missed = _missed_energy(energy, _residual_norms(problem.x, basis), _largest_left_out(problem, basis))
    rank = problem.rank
    total = float(energy.sum()) + residual
    worst = _worst_ratio(energy[:rank], missed[:rank], residual, energy[rank:], total)
    return frame * worst, residual


def _deviations(problem: _Problem, basis: _Basis) -> tuple[float, float]:
    """||U^T U - I||_2 and ||V V^T - I||_2 over the rows whose energy float32 resolves."""
    tail = basis.s.square().flip(0).cumsum(0).flip(0)
    held = int((tail > FLOAT32_FLOOR * tail[0]).sum())
    inverse = (1 / basis.s[:held]).float()[:, None]
    rows_u, rows_w = basis.u[:, :held].T, basis.w[:held]
    u = _deviation(lambda y: rows_u @ (rows_u.T @ y), held, problem.generator)
    w = _deviation(lambda y: inverse * (rows_w @ (rows_w.T @ (inverse * y))), held, problem.generator)
    return u, w


def _deviation(gram: Callable[[Tensor], Tensor], size: int, generator: torch.Generator) -> float:
    """Spectral norm of gram - I by block power iteration, with a margin of a quarter."""
    block = _normal(generator, size, min(_PROBES, size))
    norm = 0.0
    for _ in range(4):
        block = torch.linalg.qr(block).Q
        block = gram(block) - block
        if not bool(torch.isfinite(block).all()):
            return math.inf
        norm = float(torch.linalg.matrix_norm(block.double(), 2))
        if norm == 0:
            break
    return 1.25 * norm


def _reproduces(problem: _Problem, basis: _Basis) -> bool:
    """Whether U W equals X up to rounding, on random probes."""
    x, _, generator = problem
    probes = _normal(generator, x.shape[1], _PROBES)
    error = (x @ probes - basis.u @ (basis.w @ probes)).double().square().sum() / probes.shape[1]
    return float(error) <= FLOAT32_FLOOR * float(basis.s.square().sum())


def _residual_energy(x: Tensor, basis: _Basis) -> float:
    """||X - U W||^2, summed explicitly: a difference of energies would cancel."""
    pairs = zip(x.split(_BLOCK), basis.u.split(_BLOCK), strict=True)
    return sum(float((rows - u @ basis.w).double().square().sum()) for rows, u in pairs)


def _residual_norms(x: Tensor, basis: _Basis) -> Tensor:
    """Norm of every column of Z = (X - U W) W^T."""
    return _column_norms(x @ basis.w.T - basis.u @ (basis.w @ basis.w.T))


def _column_norms(z: Tensor) -> Tensor:
    return z.double().norm(dim=0)


def _largest_left_out(problem: _Problem, basis: _Basis) -> float:
    """Square of the largest singular value of X - U W, by block power iteration from fresh probes."""
    x, _, generator = problem
    block = _normal(generator, x.shape[1], _PROBES)
    square = 0.0
    for _ in range(5):
        block = torch.linalg.qr(block).Q
        image = x @ block - basis.u @ (basis.w @ block)
        square = float(torch.linalg.matrix_norm(image.double(), 2)) ** 2
        block = x.T @ image - basis.w.T @ (basis.u.T @ image)
    return 1.05 * square


def _missed_energy(ritz: Tensor, residual_norms: Tensor, left_out: float) -> Tensor:
    """How much each true squared singular value can exceed its Ritz value.

    Larger root of [[ritz, z], [z, left_out]] less ritz, written so that neither sign cancels.
    """
    excess = left_out - ritz
    root = (excess.square() + 4 * residual_norms.square()).sqrt()
    below = 2 * residual_norms.square() / (root - excess).clamp_min(1e-300)
    return torch.where(excess > 0, (excess + root) / 2, below)


def _worst_ratio(ritz: Tensor, missed: Tensor, residual: float, margin: Tensor, energy: float) -> float:
    """Largest error ratio over the ranks 1 to len(ritz), leaving out errors that are mere rounding."""
    beyond = max(residual, 0.0) + float(margin.sum())
    after = torch.cat([ritz[1:], ritz.new_zeros(1)]).flip(0).cumsum(0).flip(0) + beyond
    floor = FLOAT32_FLOOR * energy
    ratio = (after - floor).clamp_min(0) / (after - missed.cumsum(0)).clamp_min(1e-300)
    return float(ratio.clamp_min(1).max())


def _normal(generator: torch.Generator, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=generator, device=generator.device, dtype=dtype)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, whatever reduced precision the process allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
