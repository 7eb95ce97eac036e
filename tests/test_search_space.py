"""The space of a search and the samplers in it: what fits, what is new, what is near. Pure, nothing is trained."""

from __future__ import annotations

import dataclasses
import itertools
import random

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmore_ray.spec import DROP, FULL, PROJECTIONS
from search.samplers import SAMPLERS, ExhaustedError, FeasibleSampler
from search.space import ACTIVE, Space

NAMES = ("math", "news", "code", "art")

# --- spaces to draw from ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """A budget: every expert has its own price per rank, and a full one that of seven tenths of its rank.

    Where the ranks just below full cost more than that, a lower level costs more than a higher one, as in a model.
    """

    prices: tuple[int, ...]
    full_rank: int
    limit: float
    per_token: bool = False
    """Whether only what one token can use counts: the public expert and the dearest of the others."""

    def cost(self, ranks, active):
        numbers = [0 if rank == DROP else 0.7 * self.full_rank if rank == FULL else rank for rank in ranks.values()]
        costs = sorted((price * number for price, number in zip(self.prices, numbers, strict=True)), reverse=True)
        return sum(costs[: active - 1] if self.per_token else costs)

    def __call__(self, ranks, active):
        return self.cost(ranks, active) <= self.limit


@st.composite
def spaces(draw, *, experts=4, highest=300, smallest=1):
    number = draw(st.integers(smallest, experts))
    full_rank = draw(st.integers(1, highest))
    prices = tuple(draw(st.lists(st.integers(1, 5), min_size=number, max_size=number)))
    share = draw(st.sampled_from([0, 0.05, 0.2, 0.4, 0.7, 1]))
    rule = Rule(prices, full_rank, share * full_rank * sum(prices), per_token=draw(st.booleans()))
    actives = draw(st.sampled_from([(1,), (2,), tuple(range(1, number + 2)), tuple(range(2, number + 3))]))
    return Space(
        experts=NAMES[:number],
        full_rank=full_rank,
        max_rank=draw(st.none() | st.integers(1, full_rank)),
        actives=actives,
        fits=rule,
    )


def points_of(space):
    """Any point of a space."""
    return st.builds(space.at, st.integers(0, space.size - 1))


spaces_and_points = spaces().flatmap(lambda space: st.tuples(st.just(space), points_of(space)))


def feasible(space):
    """All points that fit, by trying every one, as assignments."""
    grid = itertools.product(*(range(d.low, d.high + 1) for d in space.distributions.values()))
    found = (space.assignment(dict(zip(space.distributions, values, strict=True))) for values in grid)
    return {identity(ranks, active) for ranks, active in found if space.fits(ranks, active)}


def identity(ranks, active):
    return (*ranks.items(), active)


def small_space(limit=20.0, *, full_rank=8, experts=2, actives=(2,), prices=(1, 2, 3, 4)):
    rule = Rule(prices[:experts], full_rank, limit)
    return Space(experts=NAMES[:experts], full_rank=full_rank, actives=actives, fits=rule)


# --- levels and points ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full_rank", "max_rank", "levels"),
    [
        (128, None, [DROP, 1, 2, 4, 8, 16, 32, 64, FULL]),
        (129, None, [DROP, 1, 2, 4, 8, 16, 32, 64, 128, FULL]),
        (96, None, [DROP, 1, 2, 4, 8, 16, 32, 64, FULL]),
        (128, 16, [DROP, 1, 2, 4, 8, 16, FULL]),
        (128, 31, [DROP, 1, 2, 4, 8, 16, FULL]),
        (128, 128, [DROP, 1, 2, 4, 8, 16, 32, 64, FULL]),
        (128, 1000, [DROP, 1, 2, 4, 8, 16, 32, 64, FULL]),
        (2, None, [DROP, 1, FULL]),
        (1, None, [DROP, FULL]),
        (11008, None, [DROP, *(2**k for k in range(14)), FULL]),
    ],
)
def test_levels_are_powers_of_two_below_the_full_rank(full_rank, max_rank, levels):
    space = Space(experts=("math",), full_rank=full_rank, max_rank=max_rank, actives=(2,), fits=lambda *_: True)
    assert list(space.levels) == levels
    (bounds,) = space.distributions.values()
    assert [space.assignment({"log2_rank.math": i})[0]["math"] for i in range(bounds.low, bounds.high + 1)] == levels
    assert [2**i for i in range(bounds.high)] == levels[1:-1]


@given(spaces(experts=3, highest=9))
def test_every_index_is_one_point(space):
    points = [space.at(index) for index in range(space.size)]
    assert len({tuple(point.items()) for point in points}) == space.size
    for point in points:
        assert list(point) == list(space.distributions)
        assert all(
            space.distributions[name].low <= value <= bounds.high for (name, value), bounds in _with(space, point)
        )


def _with(space, point):
    return zip(point.items(), space.distributions.values(), strict=True)


@given(spaces_and_points)
def test_active_experts_are_at_most_the_kept_ones(drawn):
    space, point = drawn
    ranks, active = space.assignment(point)
    kept = 1 + sum(rank != DROP for rank in ranks.values())
    assert active == min(point.get(ACTIVE, space.actives[0]), kept)
    assert (ACTIVE in space.distributions) == (len(space.actives) > 1)


# --- repair -----------------------------------------------------------------------------------------------


@given(spaces_and_points)
def test_a_repaired_point_fits_and_is_nowhere_above(drawn):
    space, asked = drawn
    found = space.repair(asked)
    assert space.fits(*space.assignment(found))
    assert list(found) == list(asked)
    for (name, value), bounds in _with(space, found):
        assert bounds.low <= value <= bounds.high
        assert value <= asked[name]
    assert space.repair(found) == found


@given(spaces_and_points)
def test_a_point_that_fits_is_not_repaired(drawn):
    space, asked = drawn
    if space.fits(*space.assignment(asked)):
        found = space.repair(asked)
        assert space.assignment(found) == space.assignment(asked)
        assert {**found, ACTIVE: None} == {**asked, ACTIVE: None}


@given(spaces_and_points)
def test_repair_leaves_no_level_that_could_be_given_back(drawn):
    space, asked = drawn
    found = space.repair(asked)
    for name in space.distributions:
        if name == ACTIVE or found[name] == asked[name] or found[name] == -1 or asked[name] - found[name] > 1:
            continue
        ranks, _ = space.assignment({**found, name: asked[name]})
        assert not space.fits(ranks, space.assignment(asked)[1]), name


@given(spaces_and_points)
def test_a_repaired_number_of_active_experts_is_one_that_is_kept(drawn):
    space, asked = drawn
    if ACTIVE in space.distributions:
        found = space.repair(asked)
        assert found[ACTIVE] == max(space.assignment(found)[1], space.actives[0])


def test_repair_keeps_proportions_before_it_drops():
    space = small_space(7, full_rank=64, experts=3, prices=(1, 1, 1))
    asked = {"log2_rank.math": 4, "log2_rank.news": 3, "log2_rank.code": 2}
    assert space.repair(asked) == {"log2_rank.math": 2, "log2_rank.news": 1, "log2_rank.code": 0}
    tight = small_space(2, full_rank=64, experts=3, prices=(1, 1, 1))
    assert tight.repair(asked) == {"log2_rank.math": 0, "log2_rank.news": 0, "log2_rank.code": -1}
    nothing = small_space(0).repair({"log2_rank.math": 2, "log2_rank.news": 3})
    assert nothing == {"log2_rank.math": -1, "log2_rank.news": -1}


@given(spaces_and_points)
def test_filled_points_fit_and_have_no_room_for_one_level_more(drawn):
    space, asked = drawn
    start = space.repair(asked)
    found = space.filled(start)
    assert space.fits(*space.assignment(found))
    assert all(found[name] >= value for name, value in start.items())
    steps = {found[name] - start[name] for name in start if name != ACTIVE and start[name] >= 0}
    top = len(space.levels) - 2
    kept = [name for name in start if name != ACTIVE and start[name] >= 0]
    assert all(found[name] - start[name] == max(steps) or found[name] == top for name in kept)
    assert all(found[name] == -1 for name in start if name != ACTIVE and start[name] == -1)
    higher = found | {name: min(found[name] + 1, top) for name in kept}
    assert higher == found or not space.fits(*space.assignment(higher))
    assert space.filled(found) == found


# --- neighbours and nearest points ------------------------------------------------------------------------


@given(spaces_and_points, st.integers(0, 99))
def test_a_neighbour_differs_in_one_parameter_where_that_fits(drawn, seed):
    space, asked = drawn
    start = space.repair(asked)
    found = space.neighbour(start, random.Random(seed))
    assert found == space.repair(found)
    assert space.fits(*space.assignment(found))
    above = [name for name in start if name != ACTIVE and found[name] > start[name]]
    assert len(above) <= 1
    assert found == space.neighbour(start, random.Random(seed))


def test_all_neighbours_are_met():
    space = small_space(1000, experts=2, actives=(1, 2, 3))
    start = {"log2_rank.math": 1, "log2_rank.news": 2, ACTIVE: 2}
    chance, met = random.Random(0), set()
    for _ in range(600):
        met.add(tuple(space.neighbour(start, chance).items()))
    expected = {
        tuple(space.repair(start | {name: value}).items())
        for name, bounds in space.distributions.items()
        for value in range(bounds.low, bounds.high + 1)
        if value != start[name]
    }
    assert met == expected


@given(spaces(), st.data())
def test_the_nearest_point_has_the_levels_next_to_the_ranks(space, data):
    """At or below where the budget ends; above, but less than twice the rank, where it does not."""
    rank = st.sampled_from([DROP, FULL]) | st.integers(1, space.full_rank)
    ranks = {name: data.draw(rank) for name in space.experts}
    active = data.draw(st.integers(1, 6))
    size = {level: space.full_rank if level == FULL else level for level in space.levels if level != DROP}
    below: dict[str, int | str] = {}
    above: dict[str, int | str] = {}
    for name, asked in ranks.items():
        rank = 0 if asked == DROP else size.get(asked, asked)
        below[name] = max((level for level in size if size[level] <= rank), key=size.__getitem__, default=DROP)
        higher = [level for level in size if rank <= size[level] < 2 * rank]
        above[name] = min(higher, key=size.__getitem__, default=below[name])
    free, bounded = (
        dataclasses.replace(space, fits=lambda found, _, most=most: all(at_most(found[n], most[n]) for n in found))
        for most in (dict.fromkeys(ranks, FULL), below)
    )

    def at_most(one, other) -> bool:
        return space.levels.index(one) <= space.levels.index(other)

    inside = min(max(active, space.actives[0]), space.actives[-1])
    number = min(inside, 1 + sum(rank != DROP for rank in ranks.values()))
    assert free.assignment(free.nearest(ranks, active)) == (above, number)
    assert bounded.assignment(bounded.nearest(ranks, active)) == (below, number)
    lowest, found = space.repair(bounded.nearest(ranks, active)), space.nearest(ranks, active)
    assert space.fits(*space.assignment(found))
    assert all(lowest[name] <= value <= lowest[name] + 1 for name, value in found.items())
    assert all(at_most(rank, above[name]) for name, rank in space.assignment(found)[0].items())


def test_what_is_left_of_the_budget_goes_to_the_rank_that_is_the_furthest_above_its_level():
    space = small_space(16 + 64, full_rank=128, prices=(1, 1))
    assert space.nearest({"math": 20, "news": 60}, 3) == {"log2_rank.math": 4, "log2_rank.news": 6}
    space = small_space(32 + 32, full_rank=128, prices=(1, 1))
    assert space.nearest({"math": 30, "news": 34}, 3) == {"log2_rank.math": 5, "log2_rank.news": 5}
    assert space.nearest({"math": 30, "news": 20}, 3) == {"log2_rank.math": 5, "log2_rank.news": 5}
    assert space.nearest({"math": 16, "news": 20}, 3) == {"log2_rank.math": 4, "log2_rank.news": 5}


@given(spaces_and_points)
def test_the_nearest_point_of_a_point_is_itself(drawn):
    space, asked = drawn
    start = space.repair(asked)
    assert space.nearest(*space.assignment(start)) == start


@pytest.mark.parametrize(
    ("rank", "level"),
    [
        (dict.fromkeys(PROJECTIONS, 5), 3),
        ({"gate_proj": 7, "up_proj": 8, "down_proj": 8}, 3),
        ({"gate_proj": 1, "up_proj": 1, "down_proj": 22}, 3),
        ({"gate_proj": [4, 12], "up_proj": 8, "down_proj": [8, 8]}, 3),
        ({"gate_proj": FULL, "up_proj": 1, "down_proj": 1}, 6),
        (dict.fromkeys(PROJECTIONS, FULL), 7),
        ({"gate_proj": [FULL, FULL], "up_proj": 128, "down_proj": FULL}, 7),
        ([16, 17], 5),
        (1000, 7),
    ],
)
def test_of_a_refined_rank_the_mean_counts(rank, level):
    space = Space(experts=("math", "news"), full_rank=128, actives=(3,), fits=lambda *_: True)
    assert space.nearest({"math": rank}, 3) == {"log2_rank.math": level, "log2_rank.news": 7}


# --- samplers ---------------------------------------------------------------------------------------------


class Search:
    """The least that a sampler needs: a study, and what was evaluated."""

    def __init__(self, name, space, seed, *, front=False, fill=True):
        self.space, self.front, self.seen = space, front, set()
        sampler = FeasibleSampler(name, space, seed, self.is_new, fill=fill)
        self.study = optuna.create_study(directions=["maximize", "minimize"][: 1 + front], sampler=sampler)

    def is_new(self, point):
        return identity(*self.space.assignment(point)) not in self.seen

    def ask(self):
        trial = self.study.ask()
        return trial, {n: trial.suggest_int(n, d.low, d.high) for n, d in self.space.distributions.items()}

    def tell(self, trial, point):
        self.seen.add(identity(*self.space.assignment(point)))
        values = [value_of(point), self.space.fits.cost(*self.space.assignment(point))]
        self.study.tell(trial, values if self.front else values[0])

    def run(self, count):
        """So many points, or all that there are."""
        points = []
        for _ in range(count):
            try:
                trial, point = self.ask()
            except ExhaustedError:
                break
            self.tell(trial, point)
            points.append(point)
        return points


def value_of(point):
    """Some smooth score with an optimum inside."""
    return -sum((value - 2 - i) ** 2 for i, value in enumerate(point.values()))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


COUNTS = {"tpe": 40, "gp": 14, "nsga2": 48, "random": 60, "grid": 60}


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_points_fit_and_are_new(name, front):
    space = small_space(30, full_rank=64, experts=3, actives=(1, 2, 3, 4))
    points = Search(name, space, seed=3, front=front, fill=not front).run(COUNTS[name])
    assert len(points) == COUNTS[name]
    assert len({identity(*space.assignment(point)) for point in points}) == len(points)
    for point in points:
        assert space.fits(*space.assignment(point))
        assert point == space.repair(point)


@given(
    space=spaces(experts=3, highest=20),
    name=st.sampled_from(["tpe", "nsga2", "random", "grid"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_points_of_any_space_fit_and_are_new(space, name, seed):
    points = Search(name, space, seed).run(12)
    found = [identity(*space.assignment(point)) for point in points]
    assert len(set(found)) == len(found)
    assert set(found) <= feasible(space)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_and_history_give_the_same_point(name):
    space = small_space(30, full_rank=64, experts=3, actives=(1, 2, 3, 4))
    count = COUNTS[name]
    points = Search(name, space, seed=1).run(count)
    for cut in (3, count - 4):
        again = Search(name, space, seed=1)
        first = again.run(cut)
        rebuilt = Search(name, space, seed=1)
        for trial, point in zip(again.study.trials, first, strict=True):
            rebuilt.study.add_trial(trial)
            rebuilt.seen.add(identity(*space.assignment(point)))
        assert first + rebuilt.run(count - cut) == points
    if name != "grid":
        assert Search(name, space, seed=2).run(5) != points[:5]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "space",
    [
        small_space(0),
        small_space(1),
        small_space(3),
        small_space(3, full_rank=2, actives=(1, 2, 3)),
        small_space(1, full_rank=1, experts=1),
    ],
    ids=["nothing", "one", "few", "active", "two levels"],
)
def test_a_small_space_is_tried_whole(name, space):
    search = Search(name, space, seed=0)
    points = search.run(200)
    assert {identity(*space.assignment(point)) for point in points} == feasible(space)
    assert len(points) == len(feasible(space))
    with pytest.raises(ExhaustedError):
        search.ask()


@given(spaces(experts=3, highest=20))
@settings(max_examples=40)
def test_the_grid_is_every_assignment_once(space):
    points = Search("grid", space, seed=0).run(space.size)
    found = [identity(*space.assignment(point)) for point in points]
    assert len(found) == len(set(found))
    assert set(found) == feasible(space)


def test_the_grid_covers_the_space_early():
    space = small_space(1e9, full_rank=64, experts=3)
    points = Search("grid", space, seed=0).run(space.size // 8)
    for name, bounds in space.distributions.items():
        assert {point[name] for point in points} == set(range(bounds.low, bounds.high + 1))
    for one, other in itertools.pairwise(points):
        assert sum(abs(one[name] - other[name]) for name in one) > 1


def test_what_was_evaluated_elsewhere_is_not_proposed():
    space = small_space(8, full_rank=4)
    for name in SAMPLERS:
        search = Search(name, space, seed=0)
        known = sorted(feasible(space), key=str)[::2]
        search.seen |= set(known)
        found = {identity(*space.assignment(point)) for point in search.run(100)}
        assert found == feasible(space) - set(known), name


def test_first_points_of_a_model_are_raised_to_the_budget():
    space = small_space(500, full_rank=256, experts=3)
    for name in ("tpe", "gp"):
        filled = Search(name, space, seed=5).run(6)
        assert all(space.filled(point) == point for point in filled)
        assert any(space.filled(point) != point for point in Search(name, space, seed=5, fill=False).run(6))


def test_a_model_goes_on_from_the_best_point():
    space = small_space(1e9, full_rank=256, experts=4)
    points = Search("tpe", space, seed=0).run(60)
    steps = [
        sum(one[name] != best[name] for name in one)
        for one, best in ((points[i], max(points[:i], key=value_of)) for i in range(10, 60))
    ]
    assert 15 <= steps.count(1) <= 40
    assert min(value_of(point) for point in points[:8]) < value_of(max(points, key=value_of)) >= -1
