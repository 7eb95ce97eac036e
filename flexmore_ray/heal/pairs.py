"""Factors in training, and the experts of a two-expert mixture that compute with leading rows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmore_ray.modeling import FlexMoreExperts
from flexmore_ray.moments import Root
from flexmore_ray.pairs import PairExperts
from flexmore_ray.spectra import Factors


class Pair:
    """Factors in training. Each row counts in units of its size at the start, so one learning rate suits all rows.

    Args:
        start: the factors to begin with.
        device: where they are trained.
        roots: of the metrics in which their rows are trained, of outputs and of inputs; None means as they are.

    Attributes:
        rows: what is trained, of A and of B transposed, float32; a row's root mean square is 1 at the start.
    """

    def __init__(
        self, start: Factors, device: str | torch.device, roots: tuple[Root | None, Root | None] = (None, None)
    ) -> None:
        self.rows: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._roots = roots[::-1]
        for part, root in zip((start.a, start.bt), self._roots, strict=True):
            rows = part.float().to(device)
            rows = rows if root is None else root.scale(rows)
            sizes = rows.square().mean(1, keepdim=True).sqrt()
            self.rows.append((rows / sizes.where(sizes > 0, 1)).requires_grad_())
            self._sizes.append(sizes)

    def factors(self, rank: int | None = None) -> Factors:
        """The factors at a rank; None means all of them."""
        parts = []
        for rows, sizes, root in zip(self.rows, self._sizes, self._roots, strict=True):
            part = rows[:rank] * sizes[:rank]
            parts.append(part if root is None else root.unscale(part))
        return Factors(*parts)


class HealedExperts(PairExperts):
    """The experts of one layer; the domain expert full, or as leading rows of trained factors."""

    def __init__(self, experts: FlexMoreExperts, factors: Mapping[str, Pair]) -> None:
        super().__init__(experts)
        self._factors = factors
        self.ranks: dict[str, int] | None = None
        """Rank of each projection, 0 for the public expert's; None means the full expert."""

    def own(self, projection: str, x: Tensor, public: Callable[[], Tensor]) -> Tensor:
        """As `PairExperts.own`."""
        if self.ranks is None:
            return super().own(projection, x, public)
        factors = self._factors[projection].factors(self.ranks[projection])
        return public() + F.linear(x, factors.a) @ factors.bt
