"""The honest end of a search, on made-up scores of documents."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmore_ray.report.analysis import Interval
from flexmore_ray.scores import Sample, Scores, TaskScore
from search.ledger import Entry
from search.verdict import conclude, measure

TASKS = {"sums": "math", "series": "math", "towns": "news"}
"""Task -> group."""
DOCUMENTS = 120
NAMES = ("full", "public", "uniform", "energy", "entropy", "optimal")


def task_score(task: str, values, *, value=None, metric="acc") -> TaskScore:
    """The score of a task from the values of its documents."""
    samples = [
        Sample(
            doc_id=i,
            doc_hash=str(i),
            target="",
            responses=[],
            correct=None,
            metrics={("other", "none"): 0.5, (metric, "none"): v},
        )
        for i, v in enumerate(values)
    ]
    return TaskScore(
        task=task,
        group=TASKS[task],
        split="test",
        metric=metric,
        filter="none",
        value=float(np.mean(values)) if value is None else value,
        stderr=0.1,
        metrics={},
        num_fewshot=0,
        version="1",
        seconds=1.0,
        samples=samples,
    )


def scores_of(documents) -> Scores:
    """Scores of one mixture; task -> values of its documents."""
    tasks = {name: task_score(name, values) for name, values in documents.items()}
    return Scores(tasks=tasks, kinds=dict.fromkeys(TASKS.values(), "knowledge"))


def drawn(seed, accuracies, documents=DOCUMENTS):
    """Documents of some mixtures, right with these probabilities; hard documents are hard for all of them."""
    rng = np.random.default_rng(seed)
    luck = {name: rng.random(documents) for name in TASKS}
    own = [{name: rng.random(documents) for name in TASKS} for _ in accuracies]
    return [
        {name: (0.7 * luck[name] + 0.3 * mine[name] < accuracy).astype(float) for name in TASKS}
        for accuracy, mine in zip(accuracies, own, strict=True)
    ]


def entry(name: str, number: int, *, cost=100, score=0.5) -> Entry:
    return Entry(
        number=number,
        name=name,
        kind="trial" if name.startswith("trial") else "baseline",
        ranks={"math": 4},
        active=2,
        mixture_id=str(number),
        parameters=cost,
        cost=cost,
        fits=name != "full",
        state="complete",
        rungs=[0.3, score],
        groups={"math": score, "news": score},
    )


def concluded(accuracies, *, names=("trial-3", *NAMES), seed=0, finalists=1):
    entries = [entry(name, i) for i, name in enumerate(names)]
    documents = drawn(seed, accuracies)
    return conclude(entries, entries[:finalists], [scores_of(d) for d in documents]), documents


def average(documents, picks=None) -> float:
    """Mean of group means, of all documents or of those picked by task."""
    groups: dict[str, list[float]] = {}
    for name, values in documents.items():
        groups.setdefault(TASKS[name], []).append(float(np.mean(values if picks is None else values[picks[name]])))
    return float(np.mean([np.mean(values) for values in groups.values()]))


def bootstrap(documents, resamples=1500, seed=99):
    """Averages of all mixtures (M,), and (B, M) by drawing documents one resample after another."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        picks = {name: rng.integers(DOCUMENTS, size=DOCUMENTS) for name in TASKS}
        draws.append([average(mixture, picks) for mixture in documents])
    return np.array([average(mixture) for mixture in documents]), np.array(draws)


def check(found, value, draws, tolerance) -> None:
    """Whether an interval is about the one of these resampled values."""
    assert found["value"] == pytest.approx(value)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=tolerance)
    assert found["low"] <= value <= found["high"]


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_differences_are_those_of_a_plain_bootstrap(seed):
    accuracies = (0.6, 0.75, 0.2, 0.55, 0.6)
    final, documents = concluded(accuracies, names=("trial-3", *NAMES[:4]), seed=seed)
    rows = final["entries"]
    value, draws = bootstrap(documents)
    assert "difference" not in rows[0]
    for i, row in enumerate(rows):
        check(row["test"], value[i], draws[:, i], 0.012)
        if i:
            found = row["difference"]
            check(found, value[0] - value[i], draws[:, 0] - draws[:, i], 0.012)
            expected = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "equal within noise"
            assert found["verdict"] == expected
    assert rows[1]["difference"]["verdict"] == "worse"
    assert rows[2]["difference"]["verdict"] == "better"
    gains, whole = draws[:, 0] - draws[:, 2], draws[:, 1] - draws[:, 2]
    check(final["gain"], (value[0] - value[2]) / (value[1] - value[2]), gains / whole, 0.05)
    assert final["gain"]["low"] > 0


def test_pairs_have_narrower_differences_than_two_samples():
    final, _ = concluded((0.6, 0.62), names=("trial-3", "full"))
    difference = final["entries"][1]["difference"]
    alone = [row["test"]["high"] - row["test"]["low"] for row in final["entries"]]
    assert difference["high"] - difference["low"] < 0.8 * np.hypot(*alone)


def test_groups_have_their_own_intervals():
    final, documents = concluded((0.6, 0.4), names=("trial-3", "full"))
    for row, mine in zip(final["entries"], documents, strict=True):
        assert list(row["groups"]) == ["math", "news"]
        assert row["groups"]["news"]["value"] == pytest.approx(mine["towns"].mean())
        assert row["groups"]["math"]["value"] == pytest.approx((mine["sums"].mean() + mine["series"].mean()) / 2)
        for found in row["groups"].values():
            assert found["low"] < found["value"] < found["high"]
        assert row["test"]["value"] == pytest.approx(np.mean([found["value"] for found in row["groups"].values()]))
    math, news = (final["entries"][0]["groups"][name] for name in ("math", "news"))
    assert math["high"] - math["low"] < news["high"] - news["low"]  # of twice as many documents


@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=20)
def test_turning_a_difference_around_turns_its_sign(accuracies, seed):
    average_, _ = measure([scores_of(documents) for documents in drawn(seed, accuracies)])
    one, other = average_.difference(0, 1), average_.difference(1, 0)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert average_.difference(0, 0) == Interval(0, 0, 0)


def test_the_draws_are_the_same_every_time_and_for_any_company():
    documents = drawn(1, (0.6, 0.4, 0.5))
    three, _ = measure([scores_of(d) for d in documents])
    two, _ = measure([scores_of(documents[0]), scores_of(documents[2])])
    assert three.difference(0, 2) == two.difference(0, 1)
    assert measure([scores_of(d) for d in documents])[0].interval(1) == three.interval(1)


def test_equal_mixtures_are_equal_within_noise():
    documents = drawn(0, (0.5,))[0]
    entries = [entry("trial-0", 0), entry("uniform", 1), entry("public", 2), entry("full", 3)]
    final = conclude(entries, entries[:1], [scores_of(documents)] * 4)
    for row in final["entries"][1:]:
        assert row["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "verdict": "equal within noise"}
    assert final["gain"] is None
    assert final["verdict"] == (
        "trial-0 is equal within noise to the full mixture (+0.0 points, +0.0 to +0.0); "
        "equal within noise to uniform, public."
    )


@pytest.mark.parametrize(
    "values", [[None, "x"] * 60, [float("nan")] * 120, [[0.1, 0.2]] * 120, [0.0, 1.0] * 60], ids=str
)
def test_a_task_whose_score_is_no_mean_over_documents_is_held_fixed(values):
    def scores(value, towns):
        tasks = {name: task_score(name, documents) for name, documents in drawn(0, (0.5,))[0].items()}
        tasks["towns"] = task_score("towns", towns, value=value)
        return Scores(tasks=tasks, kinds={})

    whole, groups = measure([scores(0.8, values), scores(0.6, values)])
    assert groups["news"].interval(0) == Interval(0.8, 0.8, 0.8)
    found = whole.difference(0, 1)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert whole.interval(0).low < whole.interval(0).high


def test_the_primary_metric_counts():
    right = task_score("sums", [1.0, 0.0, 1.0, 1.0], metric="exact_match")
    whole, _ = measure([Scores(tasks={"sums": right}, kinds={})])
    assert (whole.value[0], whole.interval(0).high) == (0.75, 1.0)


def test_booleans_are_numbers():
    plain = task_score("sums", [1.0, 0.0, 1.0, 1.0])
    truths = task_score("sums", [True, False, True, True])
    one, other = (measure([Scores(tasks={"sums": task}, kinds={})])[0] for task in (plain, truths))
    assert one.interval(0) == other.interval(0)
    assert one.interval(0).low < one.interval(0).high


# --- the gain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "public"), [(0.4, 0.4), (0.3, 0.5), (0.401, 0.4)], ids=["equal", "below", "hardly above"]
)
def test_without_a_gain_of_the_full_mixture_no_share_of_it_is_given(full, public):
    assert concluded((0.5, full, public), names=("trial-3", "full", "public"))[0]["gain"] is None


@pytest.mark.parametrize("names", [("trial-3", "full"), ("trial-3", "public"), ("trial-3", "trial-4", "trial-5")])
def test_the_gain_needs_both_ends(names):
    assert concluded((0.5, 0.8, 0.2)[: len(names)], names=names)[0]["gain"] is None


def test_the_gain_of_the_ends_is_none_and_all():
    accuracies = (0.5, 0.8, 0.2)
    names = ("trial-3", "full", "public")
    entries = [entry(name, i) for i, name in enumerate(names)]
    scores = [scores_of(d) for d in drawn(0, accuracies)]
    for best, expected in ((1, 1.0), (2, 0.0)):
        gain = conclude(entries, [entries[best]], scores)["gain"]
        assert (gain["value"], gain["low"], gain["high"]) == pytest.approx((expected,) * 3)


# --- what is said -----------------------------------------------------------------------------------------


def test_the_verdict_names_every_baseline_once():
    final, _ = concluded((0.6, 0.6, 0.1, 0.3, 0.61, 0.9, 0.59), names=("trial-3", *NAMES))
    said = final["verdict"]
    verdicts = {row["name"]: row["difference"]["verdict"] for row in final["entries"][1:]}
    assert set(verdicts.values()) == {"better", "worse", "equal within noise"}
    full = final["entries"][1]["difference"]
    numbers = ", ".join(
        [f"{100 * full['value']:+.1f} points", f"{100 * full['low']:+.1f} to {100 * full['high']:+.1f}"]
    )
    first, *rest = said.removesuffix(".").split("; ")
    assert first == f"trial-3 is equal within noise to the full mixture ({numbers})"
    words = {"better than": "better", "equal within noise to": "equal within noise", "worse than": "worse"}
    told = {}
    for part in rest:
        lead = next(word for word in words if part.startswith(word))
        told |= dict.fromkeys(part.removeprefix(lead).strip().split(", "), words[lead])
    assert told == {name: verdict for name, verdict in verdicts.items() if name != "full"}


@pytest.mark.parametrize(("accuracy", "words"), [(0.9, "better than"), (0.2, "worse than")])
def test_better_and_worse_are_said_plainly(accuracy, words):
    final, _ = concluded((accuracy, 0.6, 0.6), names=("trial-3", "full", "public"))
    assert final["verdict"].startswith(f"trial-3 is {words} the full mixture (")
    assert f"; {words} public" in final["verdict"]


@pytest.mark.parametrize("winner", NAMES)
def test_a_baseline_can_win(winner):
    names = ("trial-3", *NAMES)
    entries = [entry(name, i) for i, name in enumerate(names)]
    scores = [scores_of(d) for d in drawn(0, (0.5, 0.7, 0.2, 0.3, 0.5, 0.5, 0.55))]
    final = conclude(entries, [entries[names.index(winner)], entries[0]], scores)
    assert final["winner"] == winner
    others = set(NAMES) - {winner, "full"}
    assert all(name in final["verdict"] for name in (*others, winner))
    assert "the full mixture" in final["verdict"]
    assert "trial-3" not in final["verdict"]
    assert ["difference" in row for row in final["entries"]] == [name != winner for name in names]
    assert [row["name"] for row in final["entries"] if row["finalist"]] == ["trial-3", winner]


def test_mixtures_of_the_user_are_named_too():
    final, _ = concluded((0.5, 0.6, 0.3, 0.5), names=("trial-3", "full", "public", "mine"))
    assert "mine" in final["verdict"]


def test_what_is_said_is_plain_data():
    final, _ = concluded((0.5, 0.6, 0.3), names=("trial-3", "full", "public"), finalists=2)
    assert json.loads(json.dumps(final)) == final
    row = final["entries"][1]
    assert (row["kind"], row["fits"], row["finalist"], row["validation"]) == ("baseline", False, True, 0.5)
    assert row["groups_validation"] == {"math": 0.5, "news": 0.5}
    assert set(row) >= {"name", "cost", "parameters", "active", "ranks", "test", "groups", "difference"}


def test_only_complete_entries_have_a_value():
    stopped = dataclasses.replace(entry("trial-3", 0), state="stopped")
    with pytest.raises(AssertionError):
        conclude([stopped], [stopped], [scores_of(drawn(0, (0.5,))[0])])
