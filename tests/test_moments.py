"""Moments: what they are, that they add up, the metric that they make, files, and weighted stores."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FlexOlmoForCausalLM

from flexmore_ray.__main__ import main
from flexmore_ray.atomic import alone
from flexmore_ray.build import build_store
from flexmore_ray.errors import CheckpointError, FlexmoreError, StoreError, UsageError
from flexmore_ray.export import export_mixture
from flexmore_ray.mixture import check_same_factors, open_mixture
from flexmore_ray.moments import FORMS, WEIGHTINGS, Form, MatrixMoments, Moment, Weighting, decompose_weighted
from flexmore_ray.moments.files import LayerMoments, Metric, MomentStore, Settings, layer_file, read_about
from flexmore_ray.moments.gather import gather, layer_bytes
from flexmore_ray.plan import Plan, expand
from flexmore_ray.source import Source, open_source
from flexmore_ray.spec import PROJECTIONS, MatrixKey, MixtureSpec
from flexmore_ray.spectra import Factors, discarded_energy
from flexmore_ray.store import open_store
from flexmore_ray.texts import Document, batches, encode
from flexmore_ray.zoo.tokenizer import write_tokenizer
from tests.common import adapter_without_row, random_model, write

KEY = MatrixKey("math", 1, "down_proj")
TEXTS = [f"{a}+{b}={a + b}\n" for a, b in itertools.product((1, 12, 7, 30), (3, 25, 8))]


# ------------------------------------------------------------------------------------- second moments


def rows(number: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors of a decaying spectrum, and weights."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(number, size, generator=generator) * torch.logspace(0, -3, size)
    return vectors @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q, torch.rand(
        number, generator=generator
    )


def second_moment(vectors: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("n,ni,nj->ij", weights.double(), vectors.double(), vectors.double())


def moment(vectors: Tensor, weights: Tensor, form: Form, sketch: int = 6) -> Moment:
    return Moment.zero(vectors.shape[1], form, rows=sketch).add(vectors, weights)


@settings(deadline=None, max_examples=30)
@given(number=st.integers(1, 40), size=st.integers(1, 24), parts=st.integers(1, 4), seed=st.integers(0, 99))
def test_moments_add_up_over_any_parts(number: int, size: int, parts: int, seed: int) -> None:
    vectors, weights = rows(number, size, seed)
    exact = second_moment(vectors, weights)
    scale = float(exact.trace()) + 1e-30
    for form in FORMS:
        summed = Moment.zero(size, form, rows=6)
        one_by_one = Moment.zero(size, form, rows=6)
        for v, w in zip(vectors.chunk(parts), weights.chunk(parts), strict=True):
            summed, one_by_one = summed + moment(v, w, form), one_by_one.add(v, w)
        for found in (summed, one_by_one):
            assert found.form == form
            torch.testing.assert_close(found.diagonal, exact.diagonal(), rtol=1e-5, atol=1e-6 * scale)
            if found.matrix is not None:
                torch.testing.assert_close(found.matrix.double(), exact, rtol=0, atol=1e-5 * scale)
            if found.sketch is not None:  # never more than the moment in any direction, and little less
                gap = torch.linalg.eigvalsh(exact - found.sketch.double().T @ found.sketch.double())
                assert float(gap.min()) >= -1e-5 * scale
                assert float(gap.max()) <= scale / 6 * (1 + 1e-5)


def test_moments_of_other_forms_do_not_add_up() -> None:
    with pytest.raises(UsageError, match="one form and size"):
        Moment.zero(4, "full") + Moment.zero(4, "diagonal")
    with pytest.raises(UsageError, match="one form and size"):
        Moment.zero(4, "full") + Moment.zero(5, "full")


def expected_metric(found: Moment, damping: float) -> Tensor:
    """M scaled to mean eigenvalue 1, damped, of what a form keeps."""
    size, diagonal = len(found.diagonal), found.diagonal
    if found.matrix is not None:
        kept = found.matrix.double()
    elif found.sketch is None:
        kept = diagonal.diag()
    else:
        low = found.sketch.double().T @ found.sketch.double()
        kept = low + (diagonal - low.diagonal()).clamp_min(0).diag()
    return kept * size / diagonal.sum() + damping * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_the_root_is_a_root_and_is_undone(form: Form) -> None:
    found = moment(*rows(50, 12), form)
    root = found.root(1e-2)
    lower = root.scale(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(lower @ lower.T, expected_metric(found, 1e-2), rtol=1e-5, atol=1e-6)
    some = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(root.unscale(root.scale(some)), some, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_moment_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ArithmeticError, match="second moment"):
        Moment(diagonal=torch.full((3,), bad, dtype=torch.float64)).root()
    matrix = torch.eye(3)
    matrix[0, 1] = matrix[1, 0] = 5.0
    with pytest.raises(ArithmeticError, match="negative eigenvalue"):
        Moment(diagonal=torch.ones(3, dtype=torch.float64), matrix=matrix).root()


# ------------------------------------------------------------------------------------- decomposition


def matrix_moments(out: int, inner: int, form: Form = "full", seed: int = 0) -> MatrixMoments:
    """Moments as `gather` makes them: both have the same trace."""
    x, _ = rows(60, inner, seed)
    g, _ = rows(60, out, seed + 1)
    return MatrixMoments(input=moment(x, g.square().sum(1), form), output=moment(g, x.square().sum(1), form), tokens=37)


def metrics(found: MatrixMoments, weighting: Weighting, damping: float = 1e-2) -> tuple[Tensor, Tensor]:
    sizes = len(found.output.diagonal), len(found.input.diagonal)
    identity = [torch.eye(size, dtype=torch.float64) for size in sizes]
    left = expected_metric(found.output, damping) if weighting in ("output", "both") else identity[0]
    return left, expected_metric(found.input, damping) if weighting in ("input", "both") else identity[1]


def weighted_error(change: Tensor, left: Tensor, right: Tensor) -> float:
    change = change.double()
    return float(torch.trace(change.T @ left @ change @ right))


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(2, 30),
    inner=st.integers(2, 30),
    weighting=st.sampled_from(WEIGHTINGS),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_the_error_in_the_metric_is_the_discarded_energy(
    out: int, inner: int, weighting: Weighting, form: Form, seed: int
) -> None:
    delta = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    found = matrix_moments(out, inner, form, seed)
    left, right = metrics(found, weighting)
    result = decompose_weighted(delta, found, weighting)
    total = weighted_error(delta, left, right) * found.unit
    assert result.energy == pytest.approx(total, rel=1e-4)
    plain = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in range(1, min(out, inner) + 1):
        error = weighted_error(delta - result.factors.truncate(rank).dense(), left, right) * found.unit
        assert error == pytest.approx(discarded_energy(result.singular_values, rank), rel=1e-3, abs=1e-5 * total)
        rival = (plain.U[:, :rank] * plain.S[:rank]) @ plain.Vh[:rank]
        assert error <= weighted_error(delta - rival, left, right) * found.unit + 1e-5 * total  # the least of all
    torch.testing.assert_close(result.factors.dense(), delta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spread", [1e0, 1e6, 1e12])
def test_ill_conditioned_moments(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(24, 16, generator=generator)
    sides = []
    for size in (16, 24):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        sides.append(Moment.zero(size, "full").add(basis, torch.logspace(0, -math.log10(spread), size)))
    found = MatrixMoments(input=sides[0], output=sides[1], tokens=5)
    result = decompose_weighted(delta, found, "both")
    torch.testing.assert_close(result.factors.dense(), delta, rtol=1e-3, atol=1e-3)
    left, right = metrics(found, "both")
    error = weighted_error(delta - result.factors.truncate(4).dense(), left, right) * found.unit
    assert error == pytest.approx(discarded_energy(result.singular_values, 4), rel=1e-3)


def test_one_direction_alone_and_nothing_at_all() -> None:
    delta = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    one = torch.zeros(1, 5)
    one[0, 2] = 1.0
    found = MatrixMoments(
        input=Moment.zero(5, "full").add(one, torch.ones(1)),
        output=Moment.zero(6, "full").add(torch.ones(1, 6), torch.ones(1)),
        tokens=1,
    )
    kept = decompose_weighted(delta, found, "input").factors.truncate(1).dense()
    torch.testing.assert_close(kept[:, 2], delta[:, 2], rtol=0.1, atol=0.1)  # all that the data uses
    silent = MatrixMoments(input=Moment.zero(5, "full"), output=Moment.zero(6, "full"), tokens=1)
    result = decompose_weighted(delta, silent, "both")
    assert result.energy == 0  # nothing that was predicted depends on this matrix
    torch.testing.assert_close(result.factors.dense(), delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_matrix_that_was_born_low_rank_never_becomes_dense(weighting: Weighting) -> None:
    generator = torch.Generator().manual_seed(3)
    born = Factors(torch.randn(4, 18, generator=generator), torch.randn(4, 11, generator=generator))
    found = matrix_moments(11, 18)
    left, right = metrics(found, weighting)
    low, dense = decompose_weighted(born, found, weighting), decompose_weighted(born.dense(), found, weighting)
    assert low.factors.rank == 4
    for rank in (1, 2, 4):
        errors = [weighted_error(born.dense() - r.factors.truncate(rank).dense(), left, right) for r in (low, dense)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-5)


def test_the_unit_is_the_mean_square_change_of_what_is_predicted() -> None:
    # Where |x| and |g| do not vary, and g does not depend on x, the Kronecker product is exact.
    generator = torch.Generator().manual_seed(5)
    x = torch.nn.functional.normalize(torch.randn(40, 7, generator=generator), dim=1)
    g = torch.nn.functional.normalize(torch.randn(50, 9, generator=generator), dim=1)
    pairs = [(x[i], g[j]) for i in range(40) for j in range(50)]
    vectors, gradients = (torch.stack(side) for side in zip(*pairs, strict=True))
    ones = torch.ones(len(pairs))
    found = MatrixMoments(
        input=moment(vectors, ones, "full"), output=moment(gradients, ones, "full"), tokens=len(pairs)
    )
    change = torch.randn(9, 7, generator=generator)
    measured = float((gradients @ change * vectors).sum(1).square().mean())
    left, right = metrics(found, "both", damping=0.0)
    assert found.unit * weighted_error(change, left, right) == pytest.approx(measured, rel=1e-4)


# ------------------------------------------------------------------------------------- gathering


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a public and two domain experts that reads the nano tokenizer's tokens."""
    out = tmp_path_factory.mktemp("model")
    model = random_model(3, active=2, vocab_size=128, num_hidden_layers=2)
    write(model, out, expert_names=["public", "math", "news"])
    write_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return open_source([str(folder)])


def text_file(path: Path, texts: list[str], *, prompts: bool = False) -> Path:
    """A file of texts; with prompts, what comes before "=" is one."""
    with path.open("w") as file:
        for text in texts:
            prompt, _, completion = text.partition("=")
            row = {"prompt": prompt + "=", "completion": completion} if prompts else {"text": text}
            file.write(json.dumps(row) + "\n")
    return path


def moments_of(folders: list[Path], source: Source, key: MatrixKey = KEY) -> MatrixMoments:
    return MomentStore(folders).matrix(key, source.digest(key), source.digest(key._replace(expert="public")))


def assert_same(one: MatrixMoments, other: MatrixMoments, rtol: float = 1e-5) -> None:
    assert one.tokens == other.tokens
    for a, b in ((one.input, other.input), (one.output, other.output)):
        for name, tensor in a.tensors().items():
            expected = b.tensors()[name]
            torch.testing.assert_close(tensor, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def reference(folder: Path, ids: Tensor, predicted: Tensor, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """x_t and g_t of the math expert's matrices in a layer by transformers' own FlexOlmo and autograd.

    The two-expert mixture is transformers' model without the third expert. To each product of the expert a tensor of
    zeros is added for which autograd gives g_t.
    """
    model = FlexOlmoForCausalLM.from_pretrained(folder)
    block = model.model.layers[layer].mlp
    for other in model.model.layers:
        other.mlp.gate.weight.data = other.mlp.gate.weight.data[:2]
        for name in ("gate_up_proj", "down_proj"):
            experts = other.mlp.experts
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name).data[:2]))
        other.mlp.experts.num_experts, other.mlp.gate.num_experts = 2, 2
    inner = model.config.intermediate_size
    zeros: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for e in (0, 1):
            gate_up, down = block.experts.gate_up_proj[e], block.experts.down_proj[e]
            gate, up = x @ gate_up[:inner].T, x @ gate_up[inner:].T
            if e == 1:
                for name, size in (("gate_proj", inner), ("up_proj", inner), ("down_proj", x.shape[1])):
                    zeros[name] = torch.zeros(len(x), size, requires_grad=True)
                gate, up = gate + zeros["gate_proj"], up + zeros["up_proj"]
            hidden = torch.nn.functional.silu(gate) * up
            y = hidden @ down.T
            if e == 1:
                y = y + zeros["down_proj"]
                seen.update(gate_proj=x, up_proj=x, down_proj=hidden)
            total = total + y * (weights * (index == e)).sum(-1, keepdim=True)
        return total

    block.experts.forward = forward
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    p = logits.softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ((p.log() - (1 - p).log()) * predicted[:, 1:]).sum().backward()
    return {name: (seen[name].detach(), zeros[name].grad) for name in PROJECTIONS}


@pytest.mark.parametrize("prompts", [False, True])
def test_moments_are_those_of_transformers_own_model(
    folder: Path, source: Source, tmp_path: Path, prompts: bool
) -> None:
    data = text_file(tmp_path / "math.jsonl", TEXTS, prompts=prompts)
    tokens = gather(source, {"math": data}, tmp_path / "m")
    documents = encode(open_tokenizer(folder), [("", t) for t in TEXTS], 512)
    longest = max(len(document.ids) for document in documents)
    ids = torch.tensor([d.ids + [0] * (longest - len(d.ids)) for d in documents])
    equals = open_tokenizer(folder)("=")["input_ids"][0]
    first = [d.ids.index(equals) + 1 if prompts else 1 for d in documents]
    spans = [(start, len(document.ids)) for start, document in zip(first, documents, strict=True)]
    predicted = torch.tensor([[float(start <= i < stop) for i in range(longest)] for start, stop in spans])
    assert tokens == {"math": int(predicted.sum())}
    for layer in range(2):
        for name, (x, g) in reference(folder, ids, predicted, layer).items():
            found = moments_of([tmp_path / "m"], source, MatrixKey("math", layer, name))
            expected = MatrixMoments(
                input=moment(x, g.square().sum(1), "full"),
                output=moment(g, x.square().sum(1), "full"),
                tokens=int(predicted.sum()),
            )
            assert_same(found, expected, rtol=1e-3)
            assert found.input.trace == pytest.approx(found.output.trace, rel=1e-5)


def open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_documents_are_cut_and_batched() -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    documents = encode(Letters(), [("ab", "cdefgh"), ("", "xy"), ("abcdef", "g")], max_tokens=5)
    assert documents == [
        Document([120, 121], 1),
        Document([97, 98, 99, 100, 101], 2),
        Document([97, 98, 99, 100, 101], 5),
    ]
    assert [(start, len(batch)) for start, batch in batches(documents, 10)] == [(0, 2), (2, 1)]
    assert [(start, len(batch)) for start, batch in batches(documents, 9)] == [(0, 1), (1, 1), (2, 1)]
    assert [(start, len(batch)) for start, batch in batches(documents, 1, start=1)] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_halves_batches_and_passes_add_up(source: Source, tmp_path: Path, form: Form) -> None:
    kept = Settings(form=form, rows=200)  # as many rows as there are columns: the sketch is exact
    whole = text_file(tmp_path / "whole.jsonl", TEXTS)
    gather(source, {"math": whole}, tmp_path / "whole", kept)
    for number, part in enumerate((TEXTS[:5], TEXTS[5:])):
        data = {"math": text_file(tmp_path / f"{number}.jsonl", part)}
        gather(source, data, tmp_path / f"half-{number}", kept)
        gather(source, data, tmp_path / "in turn", kept)  # one machine that gets texts later
        gather(source, data, tmp_path / "in turn", kept)  # which are not counted twice
    one_layer = layer_bytes(source.shape, kept)
    gather(source, {"math": whole}, tmp_path / "passes", kept, memory=one_layer, batch_tokens=20)
    expected = moments_of([tmp_path / "whole"], source)
    assert expected.input.form == form
    for folders in (["half-0", "half-1"], ["in turn"], ["passes"]):
        found = moments_of([tmp_path / name for name in folders], source)
        assert found.tokens == expected.tokens
        for a, b in ((found.input, expected.input), (found.output, expected.output)):
            torch.testing.assert_close(a.diagonal, b.diagonal, rtol=1e-4, atol=1e-4 * float(b.diagonal.max()))
            metric = [expected_metric(m, 0.0) for m in (a, b)]
            torch.testing.assert_close(*metric, rtol=1e-3, atol=1e-3)


def test_moments_at_the_ranks_of_a_mixture_are_those_of_its_cut_experts(source: Source, tmp_path: Path) -> None:
    data = {name: text_file(tmp_path / f"{name}.jsonl", TEXTS[i:]) for i, name in enumerate(source.experts[1:])}
    store = build_store(source, tmp_path / "s")
    spec = MixtureSpec(
        source=tuple(source.describe()), store=str(store.folder), ranks={"math": 3, "news": "full"}, active=2
    )
    export_mixture(spec, tmp_path / "cut", "flexolmo")
    cut = open_source([str(tmp_path / "cut")], source.experts)
    gather(source, data, tmp_path / "at", at=spec)
    gather(cut, data, tmp_path / "expected")
    gather(source, data, tmp_path / "full")
    for key in (KEY, KEY._replace(layer=0, projection="gate_proj")):
        found, expected = moments_of([tmp_path / "at"], source, key), moments_of([tmp_path / "expected"], cut, key)
        assert_same(found, expected, rtol=1e-3)
        with pytest.raises(AssertionError):
            assert_same(found, moments_of([tmp_path / "full"], source, key), rtol=1e-3)
    ends = [tmp_path / "full", tmp_path / "at"]
    both = moments_of(ends, source)  # the same texts, but not counted twice
    assert both.tokens == 2 * moments_of(ends[:1], source).tokens
    news = KEY._replace(expert="news")  # is not cut, so its ends are one
    assert_same(moments_of(ends, source, news), moments_of(ends[:1], source, news))
    gather(source, data, tmp_path / "at", at=spec, progress=lambda *_: pytest.fail("all of it was there"))
    with pytest.raises(UsageError, match="holds moments at the ranks of another mixture"):
        gather(source, data, tmp_path / "at", at=dataclasses.replace(spec, ranks={"math": 4}))
    gather(source, data, tmp_path / "at")
    assert_same(moments_of([tmp_path / "at"], source), both)
    with pytest.raises(UsageError, match="--at: the mixture cuts none of these experts"):
        gather(source, {"news": data["news"]}, tmp_path / "x", at=spec)
    with pytest.raises(UsageError, match="--at: the mixture has no expert news"):
        gather(source, data, tmp_path / "x", at=dataclasses.replace(spec, ranks={"news": "drop"}))
    with pytest.raises(UsageError, match="--at: expert math of the mixture has other weights"):
        gather(cut, data, tmp_path / "x", at=spec)
    assert not (tmp_path / "x").exists()


def test_moments_of_an_adapter_without_a_router_row(source: Source, tmp_path: Path) -> None:
    folder = adapter_without_row(source, "math", 4, tmp_path / "peft")
    both = open_source([*source.describe(), f"mine={folder}"])
    data = {"mine": text_file(tmp_path / "math.jsonl", TEXTS)}
    key = KEY._replace(expert="mine")
    gather(both, data, tmp_path / "m")
    dropped = dict.fromkeys(source.experts[1:], "drop")
    with pytest.raises(UsageError, match="--at: the mixture cuts none of these experts"):  # as it was made
        gather(both, data, tmp_path / "x", at=MixtureSpec(source=tuple(both.describe()), ranks=dropped | {"mine": 4}))
    gather(both, data, tmp_path / "ends", at=MixtureSpec(source=tuple(both.describe()), ranks=dropped | {"mine": 2}))
    with pytest.raises(AssertionError):
        assert_same(moments_of([tmp_path / "m"], both, key), moments_of([tmp_path / "ends"], both, key))


def test_both_ends_from_the_command_line(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{name}={text_file(tmp_path / f'{name}.jsonl', TEXTS)}" for name in source.experts[1:]]
    build_store(source, tmp_path / "s")
    spec = MixtureSpec(source=tuple(source.describe()), store="s", ranks={"math": 3, "news": "full"}, active=2)
    spec.save(tmp_path / "cut.yaml")

    def run(*words: str) -> str:
        assert main([*words[:1], *source.describe(), *words[1:]]) == 0
        return capsys.readouterr().out

    run("moments", "--out", "full", "--data", *texts)
    said = run("moments", "--at", "cut.yaml", "--out", "ends", "--data", *texts)
    assert "left full" in said
    *_, command = said.splitlines()
    assert command.endswith("next: flexmore decompose ... --weighting both --moments DIR ends")
    run("decompose", "--store", "both", "--weighting", "both", "--moments", "full", "ends")
    assert open_store(tmp_path / "both").weighting == "both"


def test_no_more_moments_are_held_than_memory_is_given(source: Source, tmp_path: Path) -> None:
    def held() -> int:
        return sum(type(thing) is Moment and thing.matrix is not None for thing in gc.get_objects())

    gc.collect()
    before, counts = held(), []
    data = {"math": text_file(tmp_path / "math.jsonl", TEXTS[:3])}
    for _ in range(2):  # from nothing, and to what the files have
        gather(
            source,
            data,
            tmp_path / "m",
            memory=layer_bytes(source.shape, Settings()),
            progress=lambda *_: counts.append(held() - before),
        )
        data["math"] = text_file(tmp_path / "more.jsonl", TEXTS[3:])
    assert counts == [6] * 4  # two sides of three matrices of one layer


def test_a_run_that_was_killed_goes_on(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexmore_ray.moments.gather.SAVE_SECONDS", 0.0)
    data = {"math": text_file(tmp_path / "math.jsonl", TEXTS), "news": text_file(tmp_path / "news.jsonl", TEXTS[::2])}
    gather(source, data, tmp_path / "whole", batch_tokens=20)

    def kill(at: int) -> Any:
        calls = itertools.count()

        def progress(*_: object) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        return progress

    steps = []
    for at in (1, 0, 2, 0):
        with pytest.raises(KeyboardInterrupt):
            gather(source, data, tmp_path / "killed", batch_tokens=20, progress=kill(at))
    with pytest.raises(FlexmoreError, match=r"not finished|no moments"):
        moments_of([tmp_path / "killed"], source, KEY._replace(expert="news"))
    gather(source, data, tmp_path / "killed", batch_tokens=20, progress=lambda *done: steps.append(done))
    assert 0 < len(steps) < 4  # most had been done
    for expert in ("math", "news"):
        key = KEY._replace(expert=expert)
        assert_same(moments_of([tmp_path / "killed"], source, key), moments_of([tmp_path / "whole"], source, key))
        for layer in range(2):  # bit for bit
            killed, whole = (layer_file(tmp_path / name, expert, layer) for name in ("killed", "whole"))
            assert killed.read_bytes() == whole.read_bytes()
    gather(source, data, tmp_path / "killed", progress=lambda *_: pytest.fail("all of it was there"))


def test_a_run_that_was_killed_between_layers_goes_on_with_other_batches(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexmore_ray.moments.gather.SAVE_SECONDS", 0.0)
    data = {"math": text_file(tmp_path / "math.jsonl", TEXTS)}
    gather(source, data, tmp_path / "whole")
    keep, calls = LayerMoments.write, itertools.count()

    def write_some(layer: LayerMoments, path: Path) -> None:
        if next(calls) == 3:  # of the second batch layer 0 is written, layer 1 is not
            raise KeyboardInterrupt
        keep(layer, path)

    with monkeypatch.context() as patch:
        patch.setattr(LayerMoments, "write", write_some)
        with pytest.raises(KeyboardInterrupt):
            gather(source, data, tmp_path / "killed", batch_tokens=20)
    done = [
        next(iter(read_about(layer_file(tmp_path / "killed", "math", layer))["texts"].values()))[0] for layer in (0, 1)
    ]
    assert 0 < done[1] < done[0] < len(TEXTS)
    gather(source, data, tmp_path / "killed", batch_tokens=64)
    for layer in range(2):
        key = KEY._replace(layer=layer)
        assert_same(moments_of([tmp_path / "killed"], source, key), moments_of([tmp_path / "whole"], source, key))


def test_what_cannot_be_gathered_is_refused_in_one_line(source: Source, folder: Path, tmp_path: Path) -> None:
    good = text_file(tmp_path / "good.jsonl", TEXTS)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1="}\n')
    one = text_file(tmp_path / "one.jsonl", ["a", "b"])

    def line(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text + "\n")
        return path

    cases: list[tuple[dict[str, Path], dict[str, Any], str]] = [
        ({}, {}, "at least one domain expert"),
        ({"maths": good}, {}, "did you mean math"),
        ({"public": good}, {}, "unknown domain expert 'public'"),
        ({"math": good, "news": empty}, {}, "holds no document"),
        ({"math": good, "news": broken}, {}, 'line 1 is no JSON object with a "text", or "prompt" and "completion"'),
        ({"math": tmp_path / "missing"}, {}, "cannot read the documents"),
        ({"math": line("half", '{"text": "\\ud800 a"}')}, {}, "line 1: half a surrogate pair is no text"),
        ({"math": line("deep", "[" * 100_000)}, {}, "line 1 is no JSON object"),
        ({"math": line("long", "9" * 5_000)}, {}, "line 1 is no JSON object"),
        ({"math": one}, {}, "no token to predict"),
        ({"math": good}, {"memory": 10}, "--memory: the full moments of one layer take"),
        ({"math": good}, {"batch_tokens": 0}, "--batch-tokens: an integer >= 1 is needed, got 0"),
    ]
    for data, options, message in cases:
        with pytest.raises(UsageError, match=message) as caught:
            gather(source, data, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.safetensors"))  # all files were read before anything was computed
    with pytest.raises(UsageError, match="not a folder that can be written"):
        gather(source, {"math": good}, one, progress=lambda *_: pytest.fail("computed what cannot be kept"))
    with (
        alone(tmp_path / "out" / "math", "other"),
        pytest.raises(UsageError, match="another flexmore moments is running on"),
    ):
        gather(source, {"math": good}, tmp_path / "out")
    for options in ({"form": "half"}, {"rows": 0}, {"max_tokens": 1}):
        with pytest.raises(UsageError, match="is needed, got"):
            Settings(**options)
    gather(source, {"math": good}, tmp_path / "full")
    with pytest.raises(UsageError, match="another settings"):
        gather(source, {"math": good}, tmp_path / "full", Settings(form="diagonal"))
    other = random_model(3, active=2, vocab_size=128, num_hidden_layers=2, seed=1)
    write(other, tmp_path / "other", expert_names=["public", "math", "news"])
    write_tokenizer(tmp_path / "other")
    stranger = open_source([str(tmp_path / "other")])
    with pytest.raises(UsageError, match="another model"):
        gather(stranger, {"math": good}, tmp_path / "full")
    with pytest.raises(FlexmoreError, match="are of another model"):
        moments_of([tmp_path / "full"], stranger)
    with pytest.raises(FlexmoreError, match="no moments of expert news, layer 1"):
        moments_of([tmp_path / "full"], source, KEY._replace(expert="news"))
    gather(source, {"math": good}, tmp_path / "again")
    with pytest.raises(UsageError, match="has texts that another folder has too"):
        moments_of([tmp_path / "full", tmp_path / "again"], source)
    layer_file(tmp_path / "again", "math", 1).write_bytes(b"damaged")
    with pytest.raises(FlexmoreError, match="no file of moments that can be read"):
        moments_of([tmp_path / "again"], source)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_are_not_finite_are_refused(tmp_path: Path, form: Form) -> None:
    model = random_model(2, active=2, vocab_size=128, num_hidden_layers=2)
    model.lm_head.weight.data *= 1e38  # finite, but no logits are
    write(model, tmp_path / "nan", expert_names=["public", "math"])
    write_tokenizer(tmp_path / "nan")
    source = open_source([str(tmp_path / "nan")])
    data = {"math": text_file(tmp_path / "math.jsonl", TEXTS)}
    with pytest.raises(CheckpointError, match="math, layer 0, gate_proj: NaN or infinite gradients on documents 1"):
        gather(source, data, tmp_path / "out", Settings(form=form))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


# ------------------------------------------------------------------------------------- stores


@pytest.fixture(scope="module")
def gathered(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments")
    data = {name: text_file(out / f"{name}.jsonl", TEXTS[i:]) for i, name in enumerate(source.experts[1:])}
    gather(source, data, out / "m")
    return out / "m"


def test_a_weighted_store_is_a_store(source: Source, gathered: Path, tmp_path: Path) -> None:
    metric = Metric(weighting="both", folders=(str(gathered),))
    store = build_store(source, tmp_path / "s", max_rank=8, metric=metric)
    assert (store.weighting, store.decomposed) == ("both", 12)
    found = moments_of([gathered], source)
    change = source.weight(KEY).float() - source.weight(KEY._replace(expert="public")).float()
    left, right = metrics(found, "both")
    for rank in (1, 3, 8):
        error = weighted_error(change - store.factors(KEY, rank).dense(), left, right) * found.unit
        discarded = discarded_energy(store.spectrum(KEY), rank, store.residual_energy(KEY))
        assert error == pytest.approx(discarded, rel=1e-3)
    assert build_store(source, tmp_path / "s", max_rank=8, metric=metric).decomposed == 0
    assert build_store(source, tmp_path / "s", max_rank=8).decomposed == 0  # needs no moments for what is there
    with pytest.raises(StoreError, match=r"are weighted \(both\).*--moments DIR"):
        build_store(source, tmp_path / "s", max_rank=9)
    assert build_store(source, tmp_path / "s", max_rank=9, metric=metric).decomposed == 12
    with pytest.raises(StoreError, match="weighting both, asked for input"):
        build_store(source, tmp_path / "s", metric=Metric(weighting="input", folders=(str(gathered),)))
    open_store(tmp_path / "s").verify()


def test_a_metric_that_has_read_moments_can_be_sent(source: Source, gathered: Path) -> None:
    metric = Metric(weighting="both", folders=(str(gathered),))
    metric.check(source, source.experts[1:])
    sent = pickle.loads(pickle.dumps(metric))
    assert sent == metric
    assert sent.recipe(KEY) == metric.recipe(KEY)


def test_moments_of_another_size_are_refused(source: Source, gathered: Path, tmp_path: Path) -> None:
    for path in gathered.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        small = {
            f"{projection}.{side}.diagonal": torch.ones(7, dtype=torch.float64)
            for projection in PROJECTIONS
            for side in ("input", "output")
        }
        copy = tmp_path / "m" / path.relative_to(gathered)
        copy.parent.mkdir(parents=True, exist_ok=True)
        save_file(small, copy, about)
    metric = Metric(weighting="both", folders=(str(tmp_path / "m"),))
    with pytest.raises(FlexmoreError, match="are not of its size"):
        build_store(source, tmp_path / "s", metric=metric)


def test_a_mixture_of_weighted_factors_is_another_mixture(source: Source, gathered: Path, tmp_path: Path) -> None:
    build_store(source, tmp_path / "plain", max_rank=4)
    build_store(source, tmp_path / "both", max_rank=4, metric=Metric(weighting="both", folders=(str(gathered),)))
    harder = Metric(weighting="both", folders=(str(gathered),), damping=0.1)
    build_store(source, tmp_path / "damped", max_rank=4, metric=harder)

    def identity(store: str | None, **ranks: Any) -> str | None:
        spec = MixtureSpec(source=tuple(source.describe()), store=str(tmp_path / store) if store else None, ranks=ranks)
        return open_mixture(spec).identified().mixture_id

    cut = {"math": 4, "news": "full"}
    assert len({identity(store, **cut) for store in ("plain", "both", "damped")}) == 3
    assert identity("plain", **cut) == identity(None, **cut)  # as it was before there were weighted stores
    assert identity("both", math="full", news="full") == identity("plain", math="full", news="full")


def test_a_mixture_file_is_made_with_the_factors_that_it_names_or_not_at_all(
    source: Source, gathered: Path, tmp_path: Path
) -> None:
    build_store(source, tmp_path / "both", max_rank=4, metric=Metric(weighting="both", folders=(str(gathered),)))
    sources = tuple(source.describe())
    plain = open_mixture(MixtureSpec(source=sources))
    both = open_mixture(MixtureSpec(source=sources, store=str(tmp_path / "both")))
    for ours, theirs in ((plain, both), (both, plain)):
        cut = theirs.spec.with_ranks({"math": 4})
        check_same_factors(cut, theirs, "file.yaml")
        check_same_factors(theirs.spec.with_ranks({"math": "drop"}), ours, "file.yaml")  # which cuts nothing
        with pytest.raises(UsageError, match=r"file\.yaml: its factors of math are those of .*, other ones"):
            check_same_factors(cut, ours, "file.yaml")
    file = tmp_path / "cut.yaml"
    both.spec.with_ranks({"math": 4}).save(file)
    plan = Plan(name="p", source=sources, tasks=("nano",), mixtures=(str(file),))
    with pytest.raises(UsageError, match=r"plan p: .*cut\.yaml: its factors of math"):
        expand(plan, plain)
    assert [item.ranks["math"] for item in expand(plan, both)] == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "sideways"}, "one of none, input, output, both"),
        ({"weighting": "both"}, "give both"),
        ({"folders": ("m",)}, "give both"),
        ({"weighting": "both", "folders": ("m",), "damping": 0.0}, "--damping: above 0"),
    ],
)
def test_a_metric_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Metric(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "another"),
        ("texts", None),
        ("texts", {"a": 3}),
        ("texts", {"a": ["x", 2]}),
        ("weights", {}),
        ("base", 1),
        ("settings", []),
        ("tokens", {"gate_proj": "many"}),
    ],
)
def test_what_a_file_says_of_itself_is_checked(gathered: Path, tmp_path: Path, name: str, value: Any) -> None:
    layer = LayerMoments.read(layer_file(gathered, "math", 1))
    tokens = dict.fromkeys(PROJECTIONS, 1)
    about = layer.about | {"tokens": tokens} | {name: value}
    path = layer_file(tmp_path, "math", 1)
    path.parent.mkdir(parents=True)
    save_file({"gate_proj.input.diagonal": torch.ones(2)}, path, {"about": json.dumps(about)})
    with pytest.raises(FlexmoreError, match="no file of moments that can be read") as caught:
        MomentStore([tmp_path]).identity("math", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "shape", "sketch"])
def test_tensors_that_do_not_fit_are_refused(gathered: Path, tmp_path: Path, change: str) -> None:
    path = layer_file(tmp_path, "math", 1)
    path.parent.mkdir(parents=True)
    with safe_open(layer_file(gathered, "math", 1), framework="pt") as file:
        about = file.metadata()
    tensors = load_file(layer_file(gathered, "math", 1))
    if change == "missing":
        del tensors["up_proj.output.diagonal"]
    else:
        tensors[f"up_proj.output.{'matrix' if change == 'shape' else 'sketch'}"] = torch.ones(3, 4)
    save_file(tensors, path, about)
    with pytest.raises(FlexmoreError, match="no file of moments that can be read"):
        LayerMoments.read(path)


def test_a_file_of_moments_is_read_as_it_was_written(gathered: Path) -> None:
    path = layer_file(gathered, "math", 0)
    layer = LayerMoments.read(path)
    before = path.read_bytes()
    layer.write(path)
    assert path.read_bytes() == before
