"""Healing: every rank of the trained pair is better than before, runs go on, bad input is refused."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexmore_ray.build import build_store
from flexmore_ray.errors import CheckpointError, FlexmoreError, StoreError, UsageError
from flexmore_ray.export import export_mixture
from flexmore_ray.heal import heal
from flexmore_ray.heal.pairs import Pair
from flexmore_ray.heal.ranks import RankDraw
from flexmore_ray.heal.training import Settings, Training, _draw_batch, _shuffled
from flexmore_ray.mixture import load_mixture, open_mixture
from flexmore_ray.moments.files import Metric
from flexmore_ray.moments.gather import gather
from flexmore_ray.source import Source, open_source
from flexmore_ray.spec import MatrixKey, MixtureSpec
from flexmore_ray.store import MANIFEST, FactorStore
from flexmore_ray.texts import Document, encode, pad_documents
from flexmore_ray.zoo.tokenizer import write_tokenizer
from tests.common import adapter_without_row, random_model, write

KEY = MatrixKey("math", 1, "up_proj")
TEXTS = [f"{a}+{b}={a + b}\n" for a, b in itertools.product((1, 12, 7, 30), (3, 25, 8))]
SHORT = Settings(steps=6, batch_tokens=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    out = tmp_path_factory.mktemp("model")
    write(random_model(3, active=2, vocab_size=128), out, expert_names=["public", "math", "news"])
    write_tokenizer(out)
    return open_source([str(out)])


@pytest.fixture(scope="module")
def store(source: Source, tmp_path_factory: pytest.TempPathFactory) -> FactorStore:
    return build_store(source, tmp_path_factory.mktemp("store"), max_rank=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("data") / "math.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"math": path}


@pytest.fixture(scope="module")
def metric(source: Source, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Metric:
    folder = tmp_path_factory.mktemp("moments")
    gather(source, data, folder)
    return Metric(weighting="both", folders=(str(folder),))


def divergence(
    source: Source, factors: FactorStore, rank: int, texts: list[str] = TEXTS, teacher: str = "full"
) -> float:
    """Mean KL of a token between the two-expert mixture with the full expert, or without one, and at a rank."""
    logits = []
    for chosen in (teacher, rank):
        spec = MixtureSpec(ranks={"math": chosen, "news": "drop"}, active=1 if chosen == "drop" else 2)
        mixture = load_mixture(spec, source=source, factors=factors)
        tokens = [mixture.tokenizer(text)["input_ids"] for text in texts]
        ids, predicted = pad_documents([Document(ids, 1) for ids in tokens], torch.device("cpu"))
        logits.append(mixture.model(input_ids=ids).logits[:, :-1].log_softmax(-1))
    expected, said = logits
    kl = (expected.exp() * (expected - said)).sum(-1)
    return float((kl * predicted[:, 1:]).sum() / predicted[:, 1:].sum())


def test_every_rank_of_one_pair_says_more_of_what_the_full_expert_says(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    losses: list[float] = []
    healed = heal(
        source,
        store,
        data,
        tmp_path / "h",
        Settings(steps=120, batch_tokens=256),
        progress=lambda *step: losses.append(step[3]),
    )
    assert len(losses) == 120
    for rank in (1, 3, 6, 12):
        before, after = divergence(source, store, rank), divergence(source, healed, rank)
        assert after < 0.8 * before, rank
        assert torch.equal(healed.factors(KEY, rank).a, healed.factors(KEY, 12).a[:rank])
    assert healed.weighting == "healed"
    healed.verify()
    news = KEY._replace(expert="news")  # had no texts, and is as it was
    assert torch.equal(healed.factors(news, 12).a, store.factors(news, 12).a)
    assert not list((tmp_path / "h").rglob("healing/*.safetensors"))  # nothing that only a killed run needs
    spec = MixtureSpec(source=tuple(source.describe()), store=str(tmp_path / "h"), ranks={"math": 4, "news": "drop"})
    plain = MixtureSpec(source=spec.source, store=str(store.folder), ranks=spec.ranks)
    assert open_mixture(spec).identified().mixture_id != open_mixture(plain).identified().mixture_id
    export_mixture(spec, tmp_path / "peft", "peft")
    adapter = json.loads((tmp_path / "peft" / "math" / "adapter_config.json").read_text())
    assert adapter["r"] == 4


def test_rows_in_the_coordinates_of_a_metric_are_the_same_factors(
    source: Source, store: FactorStore, metric: Metric
) -> None:
    start = store.factors(KEY, 12)
    moments = metric.moments.matrix(KEY, source.digest(KEY), source.digest(KEY._replace(expert="public")))
    for weighting in ("none", "input", "output", "both"):
        output, input = moments.roots(weighting)
        pair = Pair(start, "cpu", (output, input))
        for rank in (1, 5, None):
            factors, expected = pair.factors(rank), start.truncate(rank or 12)
            torch.testing.assert_close(factors.a, expected.a, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(factors.bt, expected.bt, atol=1e-5, rtol=1e-4)
        for rows, part, root in zip(pair.rows, (start.a, start.bt), (input, output), strict=True):
            torch.testing.assert_close(rows.square().mean(1), torch.ones(12))
            scaled = part if root is None else root.scale(part)
            torch.testing.assert_close(rows, scaled / scaled.square().mean(1, keepdim=True).sqrt())
    factors.a.square().sum().backward()
    before = 2 * start.a * start.a.square().mean(1, keepdim=True).sqrt()  # what it is as the rows are
    assert (pair.rows[0].grad - before).abs().max() > 0.01 * before.abs().max()


def test_with_moments_healing_gives_other_factors_and_helps(
    source: Source, store: FactorStore, data: dict[str, Path], metric: Metric, tmp_path: Path
) -> None:
    settings = Settings(steps=120, batch_tokens=256)
    plain, healed = (heal(source, store, data, tmp_path / str(m), settings, metric=m) for m in (None, metric))
    for rank in (1, 3, 6, 12):
        assert divergence(source, healed, rank) < 0.8 * divergence(source, store, rank), rank
    assert healed.recipe("math") != plain.recipe("math")
    again = heal(source, store, data, tmp_path / str(None), settings, progress=lambda *_: pytest.fail("was done"))
    assert again.recipe("math") == plain.recipe("math")


def test_moments_that_do_not_fit_are_refused_before_training(
    source: Source, store: FactorStore, data: dict[str, Path], metric: Metric, tmp_path: Path
) -> None:
    def begun(*_: object) -> None:
        pytest.fail("a step was made")

    both = {"math": data["math"], "news": data["math"]}
    with pytest.raises(FlexmoreError, match="no moments of expert news, layer 0"):
        heal(source, store, both, tmp_path / "h", SHORT, metric=metric, progress=begun)
    write(random_model(3, active=2, vocab_size=128, seed=1), tmp_path / "m", expert_names=["public", "math", "news"])
    write_tokenizer(tmp_path / "m")
    other = open_source([str(tmp_path / "m")])
    gather(other, {"news": data["math"]}, tmp_path / "theirs")
    mixed = Metric(weighting="both", folders=(*metric.folders, str(tmp_path / "theirs")))
    with pytest.raises(
        FlexmoreError, match=r"moments of expert news, layer 0, \w+ are of another model; gather them for this one"
    ):
        heal(source, store, both, tmp_path / "h", SHORT, metric=mixed, progress=begun)
    assert not (tmp_path / "h" / MANIFEST).exists()


def test_moments_that_no_text_can_have_end_in_one_line(
    source: Source, store: FactorStore, data: dict[str, Path], metric: Metric, tmp_path: Path
) -> None:
    for path in sorted(Path(metric.folders[0]).rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        tensors = {name: -tensor if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
        copy = tmp_path / path.relative_to(metric.folders[0])
        copy.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, copy, about)
    damaged = Metric(weighting="both", folders=(str(tmp_path),))
    with pytest.raises(FlexmoreError, match=r"^[^\n]*layer[^\n]*$"):
        heal(source, store, data, tmp_path / "h", SHORT, metric=damaged)


def ranks_of(source: Source, store: FactorStore, limit: int = 12) -> tuple[dict[MatrixKey, torch.Tensor], RankDraw]:
    spectra = {key: store.spectrum(key)[:limit] for key in source.shape.keys("math")}
    return spectra, RankDraw(spectra)


@given(count=st.integers(1, 2000))
def test_energies_share_directions_as_one_sort_of_all_does(source: Source, store: FactorStore, count: int) -> None:
    spectra, ranks = ranks_of(source, store)
    every = [(float(value), key) for key, values in spectra.items() for value in values]
    taken = Counter(key for _, key in sorted(every, key=lambda each: -each[0])[:count])
    assert ranks.leading(count) == {key: taken[key] for key in spectra}


def test_directions_without_energy_do_not_count(source: Source) -> None:
    values = torch.cat([torch.tensor([4.0, 2.0]), torch.full((10,), 1e-9)])
    spectra = dict.fromkeys(source.shape.keys("math"), values)
    empty = MatrixKey("math", 0, "up_proj")
    spectra[empty] = torch.zeros(12)
    ranks = RankDraw(spectra)
    steps = [ranks.draw(random.Random(seed)) for seed in range(200)]
    assert sum(max(step.values()) <= 2 for step in steps) > 100
    assert ranks.leading(0) == ranks.leading(1)
    assert ranks.leading(10**6) == {key: (0 if key == empty else 2) for key in spectra}
    nothing = RankDraw(dict.fromkeys(spectra, torch.zeros(12)))
    for seed in range(20):
        assert all(1 <= rank <= 12 for rank in nothing.draw(random.Random(seed)).values())


def test_ranks_of_steps_stay_within_the_factors_and_cover_them(source: Source, store: FactorStore) -> None:
    spectra, ranks = ranks_of(source, store, 9)
    drawn = [ranks.draw(random.Random(seed)) for seed in range(2000)]
    for key in spectra:
        found = {step[key] for step in drawn}
        assert {1, 9} <= found <= set(range(1, 10))
    assert {rank for step in drawn for rank in step.values()} == set(range(1, 10))


def test_public_texts_keep_what_the_public_expert_says(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    public = [f"{n} {n * 7 % 10} is what all may read" for n in range(30)]
    file = tmp_path / "public.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in public))
    settings = Settings(steps=80, batch_tokens=256)
    alone = heal(source, store, data, tmp_path / "alone", settings)
    kept = heal(source, store, {**data, "public": file}, tmp_path / "kept", settings)
    for rank in (2, 6):
        harm = {store: divergence(source, store, rank, public, "drop") for store in (kept, alone)}
        assert harm[kept] < harm[alone]
        assert divergence(source, kept, rank) < divergence(source, store, rank)
    assert kept.recipe("math") != alone.recipe("math")
    assert not list((tmp_path / "kept" / "healing").glob("*.safetensors"))
    short = tmp_path / "short.txt"
    short.write_text("a\n")
    with pytest.raises(UsageError, match="the texts of public have no token to predict"):
        heal(source, store, {**data, "public": short}, tmp_path / "none", settings)
    with pytest.raises(UsageError, match="at least one domain expert"):
        heal(source, store, {"public": file}, tmp_path / "none", settings)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_that_was_killed_gives_the_same_bits(
    source: Source,
    store: FactorStore,
    data: dict[str, Path],
    metric: Metric,
    weighted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flexmore_ray.heal.training.SAVE_SECONDS", 0.0)
    run = partial(heal, source, store, data, settings=SHORT, metric=metric if weighted else None)
    whole = run(tmp_path / "whole")

    def kill(at: int) -> Any:
        def progress(_: str, done: int, *__: object) -> None:
            if done == at:
                raise KeyboardInterrupt

        return progress

    for at in (2, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", progress=kill(at))
    steps: list[int] = []
    killed = run(tmp_path / "killed", progress=lambda _, done, *__: steps.append(done))
    assert steps == [6]
    for key in source.shape.keys("math"):
        one, other = whole.factors(key, 12), killed.factors(key, 12)
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.bt, other.bt)
    again = run(tmp_path / "killed", progress=lambda *_: pytest.fail("was done"))
    assert again.manifest == killed.manifest


def test_what_cannot_be_healed_is_refused_in_one_line(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    short = tmp_path / "short.txt"
    short.write_text("a\n")
    for files, message in (
        ({}, "at least one domain expert"),
        ({"maths": data["math"]}, "did you mean math"),
        ({"math": data["math"], "news": empty}, "holds no document"),
        ({"math": short}, "no token to predict"),
    ):
        with pytest.raises(UsageError, match=message):
            heal(source, store, files, tmp_path / "out", SHORT)
    for options in ({"steps": 0}, {"learning_rate": 0.0}, {"max_rank": 0}, {"batch_tokens": 0}, {"max_tokens": 1}):
        with pytest.raises(UsageError, match=r"is needed, got"):
            Settings(**options)
    with pytest.raises(CheckpointError, match=r"the loss of step \d is (nan|inf); check weights"):
        heal(source, store, data, tmp_path / "nan", Settings(steps=9, batch_tokens=64, learning_rate=1e30))
    heal(source, store, data, tmp_path / "done", SHORT)
    with pytest.raises(StoreError, match="heal to another --out"):
        build_store(source, tmp_path / "done", max_rank=20)
    for place, message in ((store.folder, "which is --store"), (tmp_path / "plain", "holds a store of weighting none")):
        build_store(source, tmp_path / "plain", max_rank=2)
        with pytest.raises(UsageError, match=message):
            heal(source, store, data, place, SHORT)
        assert not (place / "healing").exists()
    other = random_model(3, active=2, vocab_size=128, seed=1)
    write(other, tmp_path / "other", expert_names=["public", "math", "news"])
    write_tokenizer(tmp_path / "other")
    with pytest.raises(StoreError, match="made from other weights"):
        heal(open_source([str(tmp_path / "other")]), store, data, tmp_path / "out", SHORT)


def test_experts_healed_one_after_the_other_stay_healed(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    out, settings = tmp_path / "h", Settings(steps=2, batch_tokens=64)
    math = heal(source, store, data, out, settings).recipe("math")
    both = heal(source, store, {"news": data["math"]}, out, settings)
    assert both.recipe("math") == math
    assert both.recipe("news") not in ("", math)
    together = heal(source, store, {**data, "news": data["math"]}, tmp_path / "together", settings)
    for key in (key for name in ("math", "news") for key in source.shape.keys(name)):
        one, other = both.factors(key, 12), together.factors(key, 12)
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.bt, other.bt)


def test_two_runs_into_one_store_take_turns(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "h"
    settings = Settings(steps=1, batch_tokens=64)

    def meanwhile(*_: object) -> None:
        with pytest.raises(UsageError, match="another flexmore heal is running on"):
            heal(source, store, {"news": data["math"]}, out, settings)

    heal(source, store, data, out, settings, progress=meanwhile)
    heal(source, store, {"news": data["math"]}, out, settings)


def other_model(folder: Path, *, experts: bool) -> Source:
    """A model with other weights of its experts, or with an output layer of its own alone."""
    model = random_model(3, active=2, vocab_size=128, seed=1 if experts else 0)
    model.lm_head.weight.data *= 1.0 if experts else 1.5
    write(model, folder, expert_names=["public", "math", "news"])
    write_tokenizer(folder)
    return open_source([str(folder)])


def test_another_trunk_is_healed_anew_and_needs_moments_of_its_own(
    source: Source, store: FactorStore, data: dict[str, Path], metric: Metric, tmp_path: Path
) -> None:
    trunk = other_model(tmp_path / "m", experts=False)
    store.check_source(trunk)  # the experts are the same
    healed = heal(source, store, data, tmp_path / "h", SHORT)
    for name in ("math", "news"):  # what is there would be mixed with it
        with pytest.raises(UsageError, match="holds healed factors of other weights"):
            heal(trunk, store, {name: data["math"]}, tmp_path / "h", SHORT)
    other = heal(trunk, store, data, tmp_path / "other", SHORT)
    assert not torch.equal(other.factors(KEY, 12).a, healed.factors(KEY, 12).a)
    with pytest.raises(FlexmoreError, match="are of another public model"):
        heal(trunk, store, data, tmp_path / "w", SHORT, metric=metric)


def test_what_could_not_be_committed_is_refused_before_training(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    def begun(*_: object) -> None:
        pytest.fail("a step was made")

    other = other_model(tmp_path / "m", experts=True)
    heal(other, build_store(other, tmp_path / "s", max_rank=4), data, tmp_path / "h", Settings(steps=1))
    with pytest.raises(UsageError, match="holds healed factors of other weights"):
        heal(source, store, data, tmp_path / "h", SHORT, progress=begun)
    without = build_store(source.without(["news"]), tmp_path / "part", max_rank=4)
    with pytest.raises(StoreError, match="no factors of expert news"):
        heal(source, without, data, tmp_path / "out", SHORT, progress=begun)
    news = build_store(source.without(["math"]), tmp_path / "news", max_rank=12)  # all that its owner has
    heal(source, store, data, tmp_path / "both", SHORT)
    assert heal(source, news, {"news": data["math"]}, tmp_path / "both", SHORT).recipe("math")


def test_an_adapter_without_a_router_row_is_healed(source: Source, data: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter_without_row(source, "math", 4, tmp_path / "peft")
    both = open_source([*source.describe(), f"mine={folder}"])
    store = build_store(both, tmp_path / "s", max_rank=4)
    healed = heal(both, store, {"mine": data["math"]}, tmp_path / "h", SHORT)
    key = KEY._replace(expert="mine")
    assert not torch.equal(healed.factors(key, 2).a, store.factors(key, 2).a)


def test_a_highest_rank_is_that_of_what_is_healed(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    healed = heal(source, store, data, tmp_path / "h", Settings(steps=1, batch_tokens=64, max_rank=4))
    assert {healed.max_rank(key) for key in source.shape.keys("math")} == {4}
    assert {healed.max_rank(key) for key in source.shape.keys("news")} == {12}


def test_what_training_begins_with_is_part_of_what_comes_out(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path
) -> None:
    settings = Settings(steps=1, batch_tokens=64)
    lower = build_store(source, tmp_path / "lower", max_rank=6)
    healed = [heal(source, begun, data, tmp_path / str(n), settings) for n, begun in enumerate((store, lower))]
    assert healed[0].recipe("math") != healed[1].recipe("math")
    assert {each.recipe("news") for each in healed} == {store.recipe("news")} == {""}  # as the store has it


def test_a_checkpoint_of_other_settings_or_damaged(
    source: Source, store: FactorStore, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexmore_ray.heal.training.SAVE_SECONDS", 0.0)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(source, store, data, tmp_path / "h", SHORT, progress=stop)
    steps: list[int] = []
    longer = Settings(steps=3, batch_tokens=64)
    with pytest.raises(KeyboardInterrupt):
        heal(source, store, data, tmp_path / "h", longer, progress=stop)
    heal(source, store, data, tmp_path / "h", SHORT, progress=lambda _, done, *__: steps.append(done))
    assert steps == [2, 3, 4, 5, 6]  # a trial with other settings, which make other factors, has lost nothing
    steps.clear()
    heal(source, store, data, tmp_path / "h", longer, progress=lambda _, done, *__: steps.append(done))
    assert steps == [2, 3]  # nor has the trial
    assert not list((tmp_path / "h" / "healing").glob("*.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        heal(source, store, data, tmp_path / "d", SHORT, progress=stop)
    next((tmp_path / "d" / "healing").glob("math@*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(FlexmoreError, match="delete it to train anew"):
        heal(source, store, data, tmp_path / "d", SHORT)


def test_what_stands_in_for_the_texts_of_others(source: Source, store: FactorStore) -> None:
    public = [("", f"{n} {n * 7 % 10} is what all may read") for n in range(20)]
    tokenizer = load_mixture(MixtureSpec(ranks={"math": "drop", "news": "drop"}, active=1), source=source).tokenizer
    training = Training(source, store, "math", Path("none"), SHORT, Metric(), public)
    plain = encode(tokenizer, public, SHORT.max_tokens)
    assert training._others(tokenizer) == plain + _shuffled(plain, SHORT.seed)
    assert Training(source, store, "math", Path("none"), SHORT, Metric())._others(tokenizer) == []


def test_shuffled_documents_have_the_same_tokens_all_to_be_predicted() -> None:
    documents = [Document(list(range(n, 2 * n)), n // 2) for n in range(2, 40)]
    shuffled = _shuffled(documents, 0)
    assert [sorted(document.ids) for document in shuffled] == [document.ids for document in documents]
    assert {document.start for document in shuffled} == {1}
    assert sum(one.ids != other.ids for one, other in zip(documents, shuffled, strict=True)) > 30
    assert shuffled == _shuffled(documents, 0) != _shuffled(documents, 1)


def test_batches_are_random_and_full() -> None:
    documents = [Document([n] * draw, 1) for n, draw in enumerate(random.Random(0).choices(range(2, 60), k=200))]
    longest = max(len(document.ids) for document in documents)
    seen: set[int] = set()
    for seed in range(100):
        batch = _draw_batch(documents, 300, random.Random(seed))
        drawn = [document.ids[0] for document in batch]
        assert len(set(drawn)) == len(drawn)
        assert len(batch) * max(len(document.ids) for document in batch) <= 300
        assert (len(batch) + 1) * longest > 300  # some other document would not have fit
        seen |= set(drawn)
    assert len(seen) > 180
    assert _draw_batch(documents, 10**9, random.Random(0)) != documents
    assert len(_draw_batch(documents, 10**9, random.Random(0))) == 200
    assert len(_draw_batch(documents, 1, random.Random(0))) == 1
