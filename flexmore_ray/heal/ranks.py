"""Which ranks a step of healing trains: drawn anew, one for each matrix, most often as the energies would give them."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from flexmore_ray.spec import MatrixKey

UNIFORM_SHARE = 0.15
"""Share of steps in which all matrices have about the same rank, instead of what their energies give them."""
LEAST_LEVEL = 0.4
"""The lowest mean rank that energies are asked for is the highest rank to this power."""


class RankDraw:
    """Draws the ranks of one expert's matrices.

    Args:
        spectra: by matrix the singular values of the directions in training, largest first (R,).
    """

    def __init__(self, spectra: Mapping[MatrixKey, Tensor]) -> None:
        self._spectra = dict(spectra)
        values = torch.cat(list(self._spectra.values())).sort(descending=True).values
        self._values = values[values >= 1e-6 * values[0]]  # without those that rounding makes

    def draw(self, chance: random.Random) -> dict[MatrixKey, int]:
        """Ranks of one step: a mean one, split by energy or evenly, then times a factor for each matrix."""
        highest = {key: len(values) for key, values in self._spectra.items()}
        most = max(highest.values())
        if chance.random() < UNIFORM_SHARE:
            shares, spread = dict.fromkeys(highest, most ** chance.random()), 1.0
        else:
            share = most ** (chance.uniform(LEAST_LEVEL, 1) - 1)
            shares, spread = dict(self.leading(round(share * len(self._values)))), 0.5
        return {
            key: max(1, min(limit, round(shares[key] * 2.0 ** chance.uniform(-spread, spread))))
            for key, limit in highest.items()
        }

    def leading(self, count: int) -> dict[MatrixKey, int]:
        """How many of the `count` directions with most energy are of each matrix, ties included."""
        least = self._values[max(1, min(count, len(self._values))) - 1]
        return {key: int((values >= least).sum()) for key, values in self._spectra.items()}
