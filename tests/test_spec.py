"""Mixture files and rank assignments: what is accepted, what is refused and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmore_ray.errors import UsageError
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, MixtureSpec, ModelShape, parse_rank

SHAPE = ModelShape(
    hidden_size=32, intermediate_size=80, num_layers=2, vocab_size=61, num_heads=4, num_kv_heads=2, head_dim=8
)
EXPERTS = ("public", "math", "news")


def test_a_mixture_file_survives_a_round_trip(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "source: zoo://nano\nexperts: [public, math, news, code]\nactive: 3\n"
        "ranks: {math: 64, news: {gate_proj: 32, up_proj: [1, full], down_proj: full}, code: drop}\n"
    )
    spec = MixtureSpec.load(path)
    assert spec.ranks["news"] == {"gate_proj": 32, "up_proj": [1, FULL], "down_proj": FULL}
    spec.save(tmp_path / "again.yaml")
    assert MixtureSpec.load(tmp_path / "again.yaml") == spec


def test_folders_are_relative_to_the_mixture_file(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "m.yaml").write_text("source: [math=weights]\nstore: weights\n")
    spec = MixtureSpec.load(tmp_path / "m.yaml")
    assert spec.source == (f"math={tmp_path}/weights",)
    assert spec.store == str(tmp_path / "weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is a mapping with keys"),
        ("source: a\nrank: {math: 1}", "unknown key 'rank'; did you mean ranks"),
        ("ranks: {math: 1}", "names its source or its store"),
        ("source: a\nranks: {math: 0}", "ranks.math: a rank is an integer >= 1, full or drop, got 0"),
        ("source: a\nranks: {math: -3}", "got -3"),
        ("source: a\nranks: {math: 2.5}", "got 2.5"),
        ("source: a\nranks: {math: true}", "got True"),
        ("source: a\nranks: {math: most}", "got 'most'"),
        ("source: a\nranks: {math: }", "got None"),
        ("source: a\nranks: {math: {gate: 1}}", "unknown projection 'gate'"),
        ("source: a\nranks: {math: {gate_proj: 1}}", "missing: up_proj, down_proj"),
        ("source: a\nranks: {math: {gate_proj: drop, up_proj: 1, down_proj: 1}}", "ranks.math.gate_proj"),
        ("source: a\nranks: [math]", "ranks: a mapping"),
        ("source: a\nactive: 0", "active: .* integer >= 1, got 0"),
        ("source: a\nactive: 1.5", "got 1.5"),
        ("source: a\nexperts: [public, public]", "unique"),
        ("source: a\nexperts: [public, 'a/b']", "only letters"),
        ("source: 7", "source is a string or a list"),
        ("source: [a: b", "not a YAML mixture file"),
        ("source: a\nranks: {math: 4, math: 8}", "'math' is given twice"),
        ("source: a\nranks: []", "ranks: a mapping"),
        ("source: a\nexperts: 5", "expert names are a list"),
        ("store: 5", "store: the folder of a store is a string"),
    ],
)
def test_a_bad_mixture_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        MixtureSpec.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MixtureSpec(ranks={1: 3}), "unknown expert 1"),
        (MixtureSpec(ranks={"maths": 3}), "unknown expert 'maths'; did you mean math"),
        (MixtureSpec(ranks={"public": 3}), "the public expert is the base"),
        (MixtureSpec(ranks={"public": DROP}), "the public expert is the base"),
        (MixtureSpec(ranks={"news": DROP}, active=3), "3 experts per token asked, but the mixture keeps only 2"),
        (MixtureSpec(ranks={"math": {p: [1, 2, 3] for p in PROJECTIONS}}), r"one rank per layer \(2\), got 3"),
    ],
)
def test_an_assignment_that_cannot_be_is_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        spec.assignment(EXPERTS, SHAPE)


@given(rank=st.integers(32, 100_000))
def test_a_rank_at_or_above_min_in_out_is_full(rank):
    high = MixtureSpec(ranks={"math": rank}).assignment(EXPERTS, SHAPE)
    assert high == MixtureSpec().assignment(EXPERTS, SHAPE)
    assert high.summary("math") == FULL


@given(st.dictionaries(st.sampled_from(EXPERTS[1:]), st.one_of(st.integers(1, 50), st.sampled_from([FULL, DROP]))))
def test_compact_form_says_the_same(ranks):
    assignment = MixtureSpec(ranks=ranks).assignment(EXPERTS, SHAPE)
    compact = {name: assignment.compact(name) for name in EXPERTS}
    assert MixtureSpec(ranks=compact).assignment(EXPERTS, SHAPE) == assignment


def test_ranks_on_the_command_line():
    assert parse_rank("64", where="x") == 64
    assert parse_rank("drop", where="x") == DROP
    assert parse_rank("{gate_proj: 1, up_proj: 2, down_proj: full}", where="x")["down_proj"] == FULL
    for bad in ("", "0", "1.5", "x", "[1]", "{", "1: 2: 3"):
        with pytest.raises(UsageError, match="x"):
            parse_rank(bad, where="x")


# ---- placement


def test_placement_is_part_of_an_entry() -> None:
    data = {
        "source": "zoo://nano",
        "ranks": {
            "math": 8,
            "code": {"rank": "full", "placement": "own", "nodes": "owner=acme"},
            "news": {"placement": "own"},
        },
    }
    spec = MixtureSpec.from_dict(data)
    assert spec.ranks == {"math": 8, "code": "full", "news": "full"}
    assert spec.own == {"code": "owner=acme", "news": None}
    assert MixtureSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 8, "placement": "here"}, "ranks.math.placement: own is the only one to ask for, got 'here'"),
        ({"rank": 8, "nodes": "a=b"}, "ranks.math.placement: own is the only one to ask for, got None"),
        ({"rank": 8, "placement": "own", "node": "a=b"}, "ranks.math: unknown key 'node'; did you mean nodes?"),
        ({"rank": 0, "placement": "own"}, "ranks.math: a rank is an integer >= 1"),
        ({"rank": 8, "placement": "own", "nodes": 7}, "ranks.math.nodes: LABEL=VALUE or the name of a resource"),
    ],
)
def test_a_bad_placement(entry: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        MixtureSpec.from_dict({"source": "zoo://nano", "ranks": {"math": entry}})


@pytest.mark.parametrize("name", ["public", "news"])
def test_own_is_for_a_kept_domain_expert(name: str) -> None:
    spec = MixtureSpec(ranks={"news": "drop"}, own={name: None})
    with pytest.raises(UsageError, match=f"ranks.{name}.placement: own is for a domain expert that is kept"):
        spec.assignment(("public", "math", "news"), SHAPE)
