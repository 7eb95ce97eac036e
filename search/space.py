"""The space of a search: which rank assignments it can try, and the nearest ones that fit the budget. Pure.

A **point** is what the sampler sees: per domain expert the base-2 logarithm of its rank, -1 for an expert that is
dropped, and the highest level for the full expert; where the number of active experts is searched, that too.

    {"log2_rank.math": 4, "log2_rank.news": -1, "log2_rank.code": 7, "active": 3}     rank 16, drop, full (of 128)
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import IntDistribution

from flexmore_ray.spec import DROP, FULL, ExpertRank

Point = dict[str, int]
ACTIVE = "active"
_RANK = "log2_rank."
_DROPPED = -1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """Rank assignments under a budget."""

    experts: tuple[str, ...]
    """The domain experts."""
    full_rank: int
    """min(in, out) of the experts' matrices."""
    max_rank: int | None = None
    """The highest rank to try below full, inclusive; None: all powers of two."""
    actives: tuple[int, ...]
    """Numbers of experts per token, consecutive; one number is fixed."""
    fits: Callable[[Mapping[str, ExpertRank], int], bool]
    """Whether an assignment (rank by domain expert, active) is within the budget; dropping all experts must be."""

    @functools.cached_property
    def levels(self) -> tuple[ExpertRank, ...]:
        """What an expert can be: drop, 1, 2, 4 ... full."""
        highest = min(self.full_rank - 1, self.max_rank or self.full_rank)
        return (DROP, *(2**k for k in range(highest.bit_length())), FULL)

    @functools.cached_property
    def distributions(self) -> dict[str, IntDistribution]:
        """The parameters of a point, as Optuna describes them; a fixed number of active experts is none."""
        ranks = {_RANK + name: IntDistribution(_DROPPED, self._top) for name in self.experts}
        searched = len(self.actives) > 1
        return ranks | ({ACTIVE: IntDistribution(self.actives[0], self.actives[-1])} if searched else {})

    @property
    def _top(self) -> int:
        return len(self.levels) - 2

    def assignment(self, point: Mapping[str, int]) -> tuple[dict[str, ExpertRank], int]:
        """Ranks by domain expert, and the number of active experts, at most as many as are kept."""
        ranks = {name: self.levels[point[_RANK + name] + 1] for name in self.experts}
        kept = 1 + sum(rank != DROP for rank in ranks.values())
        return ranks, min(point.get(ACTIVE, self.actives[0]), kept)

    def repair(self, point: Mapping[str, int]) -> Point:
        """The point itself if it fits the budget, else one below it that does.

        All experts go down by the same number of levels, so that their proportions stay; then levels are given
        back where that fits, to the experts with the highest ranks first. Experts at rank 1 are dropped where
        nothing else is left, those with the lowest ranks first.
        """
        wanted = dict(point)
        found = self._lowered(wanted)
        for name in self._by_rank(wanted):
            while found[name] < wanted[name] and self._fits({**found, name: found[name] + 1}):
                found[name] += 1
        return self._with_active(found)

    def _lowered(self, point: Point) -> Point:
        while not self._fits(point):
            kept = self._by_rank(point)
            high = [name for name in kept if point[name] > 0]
            point = point | ({name: point[name] - 1 for name in high} if high else {kept[-1]: _DROPPED})
        return dict(point)

    def _by_rank(self, point: Mapping[str, int]) -> list[str]:
        """Parameters of the kept experts, the highest rank first."""
        names = [_RANK + name for name in self.experts if point[_RANK + name] != _DROPPED]
        return sorted(names, key=lambda name: -point[name])

    def _fits(self, point: Mapping[str, int]) -> bool:
        return self.fits(*self.assignment(point))

    def _with_active(self, point: Point) -> Point:
        """A point whose number of active experts is one that its kept experts allow."""
        if ACTIVE not in self.distributions:
            return point
        return point | {ACTIVE: max(self.assignment(point)[1], self.actives[0])}

    def filled(self, point: Mapping[str, int]) -> Point:
        """A point with all kept experts as many levels higher as the budget allows."""
        found = dict(point)
        while True:
            higher = found | {name: min(found[name] + 1, self._top) for name in self._by_rank(found)}
            if higher == found or not self._fits(higher):
                return self._with_active(found)
            found = higher

    def neighbour(self, point: Mapping[str, int], chance: random.Random) -> Point:
        """A point that differs in one parameter; for what that costs, other experts go down, drawn at random."""
        name = chance.choice(list(self.distributions))
        bounds = self.distributions[name]
        values = [value for value in range(bounds.low, bounds.high + 1) if value != point[name]]
        found = dict(point) | ({name: chance.choice(values)} if values else {})
        while not self._fits(found):
            others = [other for other in self._by_rank(found) if other != name]
            found[chance.choice(others or [name])] -= 1
        return self._with_active(found)

    @property
    def size(self) -> int:
        """Number of points, whether they fit or not."""
        total = 1
        for bounds in self.distributions.values():
            total *= bounds.high - bounds.low + 1
        return total

    def at(self, index: int) -> Point:
        """The point of an index from 0 to `size` - 1."""
        point = {}
        for name, bounds in self.distributions.items():
            index, offset = divmod(index, bounds.high - bounds.low + 1)
            point[name] = bounds.low + offset
        return point

    def nearest(self, ranks: Mapping[str, ExpertRank], active: int) -> Point:
        """The point whose ranks are the levels next to those of an assignment, as far as the budget allows.

        They are the levels at or below, repaired. Then experts go up to the next level where that fits and is less
        than twice their rank, those that are the furthest above their level first.

        Args:
            ranks: by domain expert, as in a mixture file; of a refined rank the mean over its matrices counts.
            active: experts per token.
        """
        point = {_RANK + name: self._level(ranks.get(name, FULL)) for name in self.experts}
        if ACTIVE in self.distributions:
            point[ACTIVE] = min(max(active, self.actives[0]), self.actives[-1])
        found = self.repair(point)
        means = {name: self._mean(ranks.get(name.removeprefix(_RANK), FULL)) for name in self._by_rank(found)}
        above = {name: mean / self._rank_at(found[name]) for name, mean in means.items() if found[name] < self._top}
        for name in sorted(above, key=lambda name: -above[name]):
            higher = found | {name: found[name] + 1}
            if above[name] > 1 and self._rank_at(higher[name]) < 2 * means[name] and self._fits(higher):
                found = higher
        return found

    def _rank_at(self, level: int) -> int:
        return self.full_rank if level == self._top else 2**level

    def _level(self, rank: ExpertRank) -> int:
        if rank == DROP:
            return _DROPPED
        mean = self._mean(rank)
        return self._top if mean >= self.full_rank else min(int(mean).bit_length(), self._top) - 1

    def _mean(self, rank: Any) -> float:
        parts = rank.values() if isinstance(rank, Mapping) else rank
        if isinstance(parts, str | int):
            return self.full_rank if parts == FULL else float(parts)
        values = [self._mean(part) for part in parts]
        return sum(values) / len(values)
