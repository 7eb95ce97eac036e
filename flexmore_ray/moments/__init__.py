"""Second moments of a domain expert's matrices on its owner's data, and the metric that they make for its deltas.

    symbol   meaning                                                                        shape
    D        delta of one matrix                                                            (out, in)
    x_t      what the matrix is multiplied with for token t                                 (in,)
    g_t      gradient of what is predicted with respect to the product                      (out,)
    C        input moment, sum_t |g_t|^2 x_t x_t^T                                          (in, in)
    G        output moment, sum_t |x_t|^2 g_t g_t^T                                         (out, out)
    s        sum_t |x_t|^2 |g_t|^2 = tr C = tr G
    n        predicted tokens
    L        root of a moment M scaled to mean eigenvalue 1, damped: L L^T = M size / tr M + damping I

A change W of the matrix changes what is predicted for the text by sum_t g_t^T W x_t, to first order. The mean square
of its terms is w^T F w / n, F = sum_t (g_t g_t^T) (x) (x_t x_t^T), w the entries of W. G (x) C / s is the Kronecker
product nearest to F after one step of power iteration (Van Loan and Pitsianis 1993), has its trace, and equals K-FAC
(Martens and Grosse, arXiv 1503.05671) where |x_t| and |g_t| do not vary. So

    w^T F w / n  ~  tr(W^T G W C) / (s n)  ~  unit * ||L_G^T W L_C||^2,      unit = s / (in out n).

All sums add up over batches, files, machines and runs: an owner hands over moments instead of texts. Each is kept as
one of `FORMS`: the matrix; its diagonal; or diagonal and sketch, k rows whose Gram matrix is never more than the
moment's, and less by at most tr M / k (frequent directions, Liberty 2013).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from flexmore_ray.errors import UsageError
from flexmore_ray.spectra import Decomposition, Factors, decompose, decompose_factors, fix_signs, full_precision

Form = Literal["full", "diagonal", "low-rank+diagonal"]
FORMS: tuple[Form, ...] = get_args(Form)
Weighting = Literal["none", "input", "output", "both"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
DAMPING = 1e-2
"""Added to a moment of mean eigenvalue 1: no direction counts less than a hundredth of the mean."""
SKETCH_ROWS = 256
"""Rows of a sketch where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """Second moment of vectors: a weighted sum of their outer products.

    Attributes:
        diagonal: (size,), float64.
        matrix: (size, size), float32, where the form is "full".
        sketch: (rows, size), float32, where it is "low-rank+diagonal".
    """

    diagonal: Tensor
    matrix: Tensor | None = None
    sketch: Tensor | None = None

    @classmethod
    def zero(cls, size: int, form: Form, device: torch.device | str = "cpu", rows: int = SKETCH_ROWS) -> Moment:
        """The moment of nothing yet."""
        matrix = torch.zeros(size, size, device=device) if form == "full" else None
        sketch = torch.zeros(min(rows, size), size, device=device) if form == "low-rank+diagonal" else None
        return cls(diagonal=torch.zeros(size, dtype=torch.float64, device=device), matrix=matrix, sketch=sketch)

    @property
    def form(self) -> Form:
        """One of `FORMS`."""
        if self.matrix is not None:
            return "full"
        return "diagonal" if self.sketch is None else "low-rank+diagonal"

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.diagonal.sum())

    def add(self, vectors: Tensor, weights: Tensor) -> Moment:
        """This moment and that of more vectors; a matrix is added to in place.

        Args:
            vectors: (n, size).
            weights: (n,), not negative.
        """
        scaled = vectors * weights.sqrt()[:, None]
        diagonal = self.diagonal + scaled.double().square().sum(0)
        if self.matrix is not None:
            return Moment(diagonal=diagonal, matrix=self.matrix.addmm_(scaled.T, scaled))
        sketch = self.sketch
        if sketch is not None and math.isfinite(float(diagonal.sum())):  # what is not finite shows in the trace
            keep, size = sketch.shape
            at_once = len(scaled) if size**3 <= 8 * len(scaled) * keep**2 else keep  # what is less work
            for part in scaled.split(max(1, at_once)):
                sketch = _shrunk(torch.cat([sketch, part]), len(sketch))
        return Moment(diagonal=diagonal, sketch=sketch)

    def __add__(self, other: Moment) -> Moment:
        """The moment of both sets of vectors.

        Raises:
            UsageError: they are of other sizes or forms.
        """
        if not isinstance(other, Moment):
            return NotImplemented
        if (self.form, self.diagonal.shape) != (other.form, other.diagonal.shape):
            raise UsageError(
                f"moments of one form and size can be added; got {self.form} of {len(self.diagonal)} and {other.form} "
                f"of {len(other.diagonal)}"
            )
        matrix = sketch = None
        if self.matrix is not None and other.matrix is not None:
            matrix = self.matrix + other.matrix
        if self.sketch is not None and other.sketch is not None:
            rows = max(len(self.sketch), len(other.sketch))
            sketch = _shrunk(torch.cat([self.sketch, other.sketch]), rows)
        return Moment(diagonal=self.diagonal + other.diagonal, matrix=matrix, sketch=sketch)

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        parts = {"diagonal": self.diagonal, "matrix": self.matrix, "sketch": self.sketch}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> Moment:
        """The same on a device, in memory of its own."""
        return Moment(**{name: tensor.to(device, copy=True) for name, tensor in self.tensors().items()})

    def root(self, damping: float = DAMPING) -> Root:
        """The root L, see above.

        Raises:
            ArithmeticError: NaN, infinity or a negative eigenvalue, which no second moment has.
        """
        mean = self.trace / len(self.diagonal)
        if not 0 <= mean < float("inf"):
            raise ArithmeticError(f"a second moment has a finite trace, not {self.trace}")
        if mean == 0:  # nothing is known, so all directions count alike
            return Diagonal(torch.ones_like(self.diagonal))
        if self.matrix is not None:
            matrix = self.matrix.double() / mean
            matrix.diagonal().add_(damping)
            lower, failed = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
            if int(failed):
                raise ArithmeticError("a second moment has no negative eigenvalue; this one has, or NaN")
            return Triangular(lower)
        diagonal = self.diagonal / mean + damping
        if self.sketch is None:
            return Diagonal(diagonal.sqrt())
        sketch = self.sketch.double() / mean**0.5
        return DiagonalAndSketch((diagonal - sketch.square().sum(0)).clamp_min(damping), sketch)


def _shrunk(rows: Tensor, keep: int) -> Tensor:
    """Frequent directions: at most `keep` rows for the Gram matrix of `rows`, each direction as much shorter."""
    if len(rows) <= keep:
        return rows
    wide = rows.double()
    tall = len(rows) > rows.shape[1]
    squares, basis = (part.flip(-1) for part in torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T))
    squares = squares.clamp_min(0)
    kept = squares[:keep] - (squares[keep] if len(squares) > keep else 0)
    if tall:
        return (kept.sqrt()[:, None] * basis[:, :keep].T).float()
    shares = torch.where(kept > 0, kept / squares[:keep], 0.0)  # never above 1, so that rounding adds nothing
    return (shares.sqrt()[:, None] * (basis[:, :keep].T @ wide)).float()


class Triangular:
    """The root of a whole moment: its Cholesky factor L (size, size), float64."""

    def __init__(self, lower: Tensor) -> None:
        self._lower = lower

    def scale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times L."""
        return (rows.to(self._lower) @ self._lower).to(rows)

    def unscale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times the inverse of L."""
        return torch.linalg.solve_triangular(self._lower, rows.to(self._lower), upper=False, left=False).to(rows)


class Diagonal:
    """The root of a diagonal moment: (size,), float64."""

    def __init__(self, root: Tensor) -> None:
        self._root = root

    def scale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times L."""
        return (rows * self._root).to(rows)

    def unscale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times the inverse of L."""
        return (rows / self._root).to(rows)


class DiagonalAndSketch:
    """The root of diag(d) + S^T S: diag(d)^1/2 (I + W^T c W), W the right singular vectors of S diag(d)^-1/2.

    Args:
        diagonal: d (size,), positive.
        sketch: S (k, size), float64.
    """

    def __init__(self, diagonal: Tensor, sketch: Tensor) -> None:
        self._root = diagonal.sqrt()
        _, values, self._directions = torch.linalg.svd(sketch / self._root, full_matrices=False)
        self._more = (1 + values.square()).sqrt() - 1

    def scale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times L."""
        scaled = rows * self._root
        return (scaled + ((scaled @ self._directions.T) * self._more) @ self._directions).to(rows)

    def unscale(self, rows: Tensor) -> Tensor:
        """Rows (n, size) times the inverse of L."""
        wide = rows.to(self._root)
        less = self._more / (1 + self._more)
        return ((wide - ((wide @ self._directions.T) * less) @ self._directions) / self._root).to(rows)


Root = Triangular | Diagonal | DiagonalAndSketch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MatrixMoments:
    """What is known of one matrix on its owner's data.

    Attributes:
        input: C.
        output: G.
        tokens: predicted tokens, n.
    """

    input: Moment
    output: Moment
    tokens: int

    def __add__(self, other: MatrixMoments) -> MatrixMoments:
        """Of both sets of tokens."""
        if not isinstance(other, MatrixMoments):
            return NotImplemented
        return MatrixMoments(
            input=self.input + other.input, output=self.output + other.output, tokens=self.tokens + other.tokens
        )

    def to(self, device: torch.device | str) -> MatrixMoments:
        """The same on a device, in memory of its own."""
        return dataclasses.replace(self, input=self.input.to(device), output=self.output.to(device))

    @property
    def unit(self) -> float:
        """Mean square change of what is predicted for a token, for one unit of weighted energy."""
        size = len(self.input.diagonal) * len(self.output.diagonal)
        return self.input.trace / (size * self.tokens) if self.tokens else 0.0

    def roots(self, weighting: Weighting, damping: float = DAMPING) -> tuple[Root | None, Root | None]:
        """The roots of output and input moment that a weighting uses; None where it does not."""
        output = self.output.root(damping) if weighting in ("output", "both") else None
        return output, self.input.root(damping) if weighting in ("input", "both") else None


def decompose_weighted(
    delta: Tensor | Factors,
    moments: MatrixMoments,
    weighting: Weighting,
    max_rank: int | None = None,
    damping: float = DAMPING,
) -> Decomposition:
    """Factor a delta up to a rank so that unit ||L_G^T (D - B A) L_C||^2 is smallest at every rank.

    One decomposition serves all ranks, as in the plain metric: L_G^T D L_C is decomposed, and the factors are taken
    back by the inverse roots. `singular_values` are those of L_G^T D L_C times the root of the unit, so discarded
    energy is what dropping directions is expected to cost, in one unit for all matrices of all experts: the mean
    square change of a token's log-odds.

    Args:
        delta: (out, in), or the factors of one that was born low-rank, which never becomes dense.
        moments: of the matrix.
        weighting: which of the two metrics to use; the other side counts all directions alike.
        max_rank: highest rank wanted; None means all.
        damping: see above.

    Raises:
        ValueError, ArithmeticError: see `spectra.decompose` and `Moment.root`.
    """
    output, input = moments.roots(weighting, damping)
    with full_precision():
        if isinstance(delta, Factors):
            result = decompose_factors(_scaled(delta.a, input), _scaled(delta.bt, output))
        else:
            result = decompose(_scaled(_scaled(delta.float(), input).T.contiguous(), output).T, max_rank)
        factors = result.factors.truncate(min(max_rank or result.factors.rank, result.factors.rank))
        a, bt = factors.a, factors.bt
        a = a if input is None else input.unscale(a)
        bt = bt if output is None else output.unscale(bt)
    return dataclasses.replace(
        result,
        factors=fix_signs(Factors(a.contiguous(), bt.contiguous())),
        singular_values=result.singular_values * moments.unit**0.5,
        residual_energy=result.residual_energy * moments.unit,
    )


def _scaled(rows: Tensor, root: Root | None) -> Tensor:
    return rows.float() if root is None else root.scale(rows.float())
