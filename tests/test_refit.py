"""Router rows of a file: what they are in a mixture, how they are fitted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmore_ray.__main__ import main
from flexmore_ray.build import build_store
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.evaluate import evaluate
from flexmore_ray.export import export_mixture
from flexmore_ray.factors import open_parts
from flexmore_ray.grid import Grid, Options, run_grid, write_record
from flexmore_ray.mixture import load_mixture, open_mixture
from flexmore_ray.plan import Plan, record_name
from flexmore_ray.refit import refit
from flexmore_ray.report import write_report
from flexmore_ray.report.sections import read_sections
from flexmore_ray.results import read_samples
from flexmore_ray.router import RouterRows, fit_rows, gather_moments
from flexmore_ray.source import open_source
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.zoo import domain_text, write_pair
from search.plan import Search
from search.plan import Settings as SearchSettings
from serve.expert import open_expert, open_shared
from serve.settings import Settings
from tests import common

LAYERS, HIDDEN = common.SIZES["num_hidden_layers"], common.SIZES["hidden_size"]
RANKS = {"math": 3, "news": {"gate_proj": [4, "full"], "up_proj": 2, "down_proj": 6}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return common.write(common.random_model(), tmp_path_factory.mktemp("m"), expert_names=list(common.NAMES))


def random_rows(folder: Path, experts: tuple[str, ...] = common.NAMES, seed: int = 5) -> RouterRows:
    rows = torch.randn(LAYERS, len(experts), HIDDEN, generator=torch.Generator().manual_seed(seed))
    return RouterRows(rows=rows, experts=experts, base=open_source([str(folder)]).base_digest, where="here")


@pytest.fixture
def spec(folder, tmp_path) -> MixtureSpec:
    random_rows(folder).save(tmp_path / "rows.safetensors")
    return MixtureSpec(source=(str(folder),), router=str(tmp_path / "rows.safetensors"), ranks=RANKS, active=2)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 61, (3, 19), generator=torch.Generator().manual_seed(1))


def gates(model: torch.nn.Module) -> Tensor:
    """Router rows of a model, (layers, experts, hidden)."""
    return torch.stack([layer.mlp.gate.weight for layer in model.model.layers])


# --- rows of a file ---------------------------------------------------------------------------------------


def test_a_mixture_has_the_rows_of_its_file_however_it_is_switched(spec, folder, tokens):
    rows = random_rows(folder).rows
    mixture = load_mixture(spec)
    assert torch.equal(gates(mixture.model), rows)
    mixture.set_ranks({"math": "full"})
    assert torch.equal(gates(mixture.model), rows)
    mixture.set_ranks({"news": "drop"})
    assert torch.equal(gates(mixture.model), rows[:, [0, 1, 3]])
    mixture.set_ranks({"news": RANKS["news"], "math": 3})
    assert torch.equal(gates(mixture.model), rows)
    assert torch.equal(mixture.model(tokens).logits, load_mixture(spec).model(tokens).logits)


def test_logits_are_those_of_the_checkpoint_with_these_rows(spec, folder, tokens):
    """The reference is a transformers model whose gates were written over by hand."""
    reference = common.truncated(common.random_model(), {1: 3})
    rows = random_rows(folder).rows
    for layer, own in zip(reference.model.layers, rows, strict=True):
        assert not torch.allclose(layer.mlp.gate.weight, own)
        layer.mlp.gate.weight.copy_(own)
    ours = load_mixture(dataclasses.replace(spec, ranks={"math": 3})).model(tokens).logits
    assert (ours - reference(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("format", ["flex_more", "flexolmo"])
def test_exports_have_the_rows(spec, tokens, tmp_path, format):
    logits = load_mixture(spec).model(tokens).logits
    assert not torch.allclose(load_mixture(dataclasses.replace(spec, router=None)).model(tokens).logits, logits)
    out = export_mixture(spec, tmp_path / "out", format)
    assert (AutoModelForCausalLM.from_pretrained(out)(tokens).logits - logits).abs().max() < 1e-4
    assert (load_mixture(str(out)).model(tokens).logits - logits).abs().max() < 1e-4


def test_identity_follows_the_rows_alone(spec, folder, tmp_path):
    def identity(spec: MixtureSpec) -> str:
        return str(open_mixture(spec).identified().mixture_id)

    shutil.copy(spec.router, tmp_path / "copy.safetensors")
    random_rows(folder, seed=6).save(tmp_path / "other.safetensors")
    copy, other, own = (
        dataclasses.replace(spec, router=router)
        for router in (str(tmp_path / "copy.safetensors"), str(tmp_path / "other.safetensors"), None)
    )
    assert identity(spec) == identity(copy)
    assert len({identity(spec), identity(other), identity(own)}) == 3
    refitted, plain = open_mixture(spec), open_mixture(own)
    assert refitted.weights == plain.weights
    for name in common.NAMES:
        assert refitted.source.with_own_rows.expert_digest(name) == plain.source.expert_digest(name)


def test_a_store_is_of_the_matrices_whatever_the_rows(spec, folder, tmp_path):
    store = build_store(open_source([str(folder)]), tmp_path / "store")
    parts = open_mixture(dataclasses.replace(spec, store=str(store.folder)))
    assert parts.factors.folder == store.folder
    store.check_source(parts.source)


def test_rows_of_more_experts_will_do_and_of_fewer_not(spec, folder, tokens, tmp_path):
    fewer = random_rows(folder, ("code", "public", "math"))
    fewer.save(tmp_path / "fewer.safetensors")
    spec = dataclasses.replace(spec, router=str(tmp_path / "fewer.safetensors"))
    mixture = load_mixture(spec.with_ranks({"news": "drop"}))
    assert torch.equal(gates(mixture.model), fewer.rows[:, [1, 2, 0]])
    logits = mixture.model(tokens).logits
    with pytest.raises(CheckpointError, match="no router row of expert news, only of code, public, math"):
        mixture.set_ranks({"news": 2})
    assert torch.equal(mixture.model(tokens).logits, logits)
    with pytest.raises(CheckpointError, match="no router row of expert news"):
        load_mixture(spec)
    with pytest.raises(CheckpointError, match="no router row of expert news"):
        export_mixture(spec, tmp_path / "out", "flexolmo")
    load_mixture(dataclasses.replace(spec, ranks={"news": "drop", "code": "drop"}))  # more than it keeps


def test_an_expert_elsewhere_has_the_row_of_the_file_too(tmp_path):
    """A guest's matrices stay with its owner; its row, as all rows, comes from the mixture's file."""
    model = common.random_model()
    folders = {}
    for index, name in enumerate(("math", "news"), 1):
        pair = common.without(model, {1, 2, 3} - {index})
        folders[name] = common.write(pair, tmp_path / name)
    sources = tuple(f"{name}={path}" for name, path in folders.items())
    own = {"news": "owner=clinic"}
    experts = ("public", "math", "news")
    rows = dataclasses.replace(random_rows(folders["math"], experts), base=open_source(sources).base_digest)
    rows.save(tmp_path / "rows.safetensors")
    spec = MixtureSpec(source=sources, own=own, router=str(tmp_path / "rows.safetensors"))
    guest = open_expert(spec, "news").source.guest("news")
    away = dataclasses.replace(spec, source=(sources[0], "news=/only/there"))
    parts = open_shared(away, {"news": guest}, verify=True)
    assert torch.equal(parts.source.router(1), rows.rows[1])
    assert parts.identified().mixture_id == open_mixture(spec).identified().mixture_id


# --- what is refused --------------------------------------------------------------------------------------


def broken_files(folder: Path, good: RouterRows) -> dict[str, object]:
    about = {"format": "flexmore-router-1", "experts": json.dumps(common.NAMES), "base": good.base}
    rows = good.rows

    def write(tensors: dict[str, Tensor], **changes: str | None) -> object:
        metadata = {k: v for k, v in (about | changes).items() if v is not None}
        return lambda path: save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)

    return {
        "no such file of router rows": lambda path: None,
        "damaged or not safetensors": lambda path: path.write_bytes(b"\x80\x04no pickle is read"),
        r"no file of router rows \(format flexmore-router-1\)": write({"rows": rows}, format="flexmore-router-2"),
        "no file of router rows": write({"router": rows}),
        "an expert name has only letters": write({"rows": rows}, experts='["public", "ma th", "news", "code"]'),
        "expert names must be unique": write({"rows": rows}, experts='["public", "math", "news", "news"]'),
        "expert names are a list of words, got None": write({"rows": rows}, experts="["),
        "expert names are a list of words, got 7": write({"rows": rows}, experts="7"),
        "expert names are a list of words": write({"rows": rows}, experts=None),
        r"4 experts are named, got \(2, 3, 32\)": write({"rows": rows[:, 1:]}),
        r"got \(2, 4\)": write({"rows": rows[..., 0]}),
        "of torch.int32": write({"rows": rows.int()}),
        "of torch.float8_e4m3fn": write({"rows": rows.to(torch.float8_e4m3fn)}),
        "NaN or infinity": write({"rows": rows / 0}),
        "of 1 layers of width 32, but .* has 2 of width 32": write({"rows": rows[:1]}),
        "of 2 layers of width 31": write({"rows": rows[..., 1:]}),
        "of another public model": write({"rows": rows}, base="0" * 64),
        "of another public model than": write({"rows": rows}, base=None),
    }


def test_bad_files_are_refused_in_one_line(folder, tmp_path):
    spec = MixtureSpec(source=(str(folder),), router=str(tmp_path / "rows.safetensors"))
    for message, write in broken_files(folder, random_rows(folder)).items():
        write(tmp_path / "rows.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            open_mixture(spec)
        assert "\n" not in str(caught.value), message
        (tmp_path / "rows.safetensors").unlink(missing_ok=True)


def test_a_mixture_file_says_where_its_rows_are(folder, tmp_path):
    random_rows(folder).save(tmp_path / "rows.safetensors")
    (tmp_path / "m.yaml").write_text(f"source: {folder}\nrouter: rows.safetensors\n")
    spec = MixtureSpec.load(tmp_path / "m.yaml")
    assert spec.router == str(tmp_path / "rows.safetensors")
    assert MixtureSpec.from_dict(spec.to_dict()) == spec
    (tmp_path / "uri.yaml").write_text(f"source: {folder}\nrouter: s3://bucket/rows.safetensors\n")
    assert MixtureSpec.load(tmp_path / "uri.yaml").router == "s3://bucket/rows.safetensors"
    for bad in ("7", "[a]", "''"):
        (tmp_path / "bad.yaml").write_text(f"source: {folder}\nrouter: {bad}\n")
        with pytest.raises(UsageError, match=r"bad\.yaml: router: the name of a file of router rows is needed, got "):
            MixtureSpec.load(tmp_path / "bad.yaml")


def test_a_served_file_names_rows_in_its_own_folder_or_what_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("received", "private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(b"rows")
    (tmp_path / "received" / "link").symlink_to(tmp_path / "private" / "rows")
    file = tmp_path / "received" / "m.yaml"

    def serve(router: str, *allow: str) -> MixtureSpec:
        file.write_text(f"source: zoo://nano\nrouter: '{router}'\n")
        return Settings(mixture=str(file), allow=list(allow)).spec()

    assert serve("rows").router == str(tmp_path / "received" / "rows")
    private = str(tmp_path / "private" / "rows")
    for router in ("../private/rows", private, "link", "private/rows", "s3://bucket/rows", f"a={private}"):
        with pytest.raises(UsageError, match=r"its router .* lies outside the file's own folder"):
            serve(router)
    assert serve(private, str(tmp_path / "private")).router == private


# --- the fit ----------------------------------------------------------------------------------------------

DOMAINS = ("math", "news", "academic", "code", "creative", "reddit")
CUT = {"math": 4, "news": 8, "academic": {"gate_proj": 4, "up_proj": 2, "down_proj": 8}, "code": "full"}
RIDGE, TEMPERATURE = 1e-2, 0.3


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    files = {name: folder / f"{name}.jsonl" for name in ("public", *DOMAINS)}
    for name, path in files.items():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in domain_text(name, 12)))
    return files


@pytest.fixture(scope="module")
def refitted(texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refit") / "new.yaml"
    spec = MixtureSpec(source=("zoo://nano",), ranks=CUT | {"reddit": "drop"}, active=3)
    kept = {name: path for name, path in texts.items() if name != "reddit"}
    made = refit(spec, kept, out, ridge=RIDGE, temperature=TEMPERATURE)
    assert made.mixture_id == open_mixture(out).identified().mixture_id
    return out


def test_the_fit_is_that_of_plain_transformers_models(refitted, texts, tmp_path):
    """Each two-expert mixture dense in a model of transformers' own, which reads one text at a time."""
    moments = {}
    for name in ("public", *DOMAINS[:-1]):
        ranks = dict.fromkeys(DOMAINS, "drop") | ({} if name == "public" else {name: CUT.get(name, "full")})
        pair = MixtureSpec(source=("zoo://nano",), ranks=ranks, active=1 if name == "public" else 2)
        out = export_mixture(pair, tmp_path / name, "flexolmo", dtype="float32")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        documents = [json.loads(line)["text"] for line in texts[name].read_text().splitlines()]
        moments[name] = gather_moments(model, [tokenizer(text, return_tensors="pt") for text in documents])
    expected = fit_rows(moments, ridge=RIDGE, temperature=TEMPERATURE)
    spec = MixtureSpec.load(refitted)
    assert spec.router is not None
    found = RouterRows.load(spec.router)
    assert found.experts == tuple(moments)
    assert found.rows.dtype == open_source(["zoo://nano"]).dtype
    precision = torch.finfo(found.rows.dtype).eps
    assert (found.rows.double() - expected).abs().max() < (precision + 1e-3) * expected.abs().max()
    mixture = load_mixture(refitted)
    assert torch.equal(gates(mixture.model), found.rows.float())
    assert (spec.source, spec.ranks, spec.active) == (("zoo://nano",), CUT | {"reddit": "drop"}, 3)


def test_rows_that_a_mixture_has_already_take_no_part(refitted, texts, tmp_path):
    kept = {name: path for name, path in texts.items() if name != "reddit"}
    again = refit(refitted, kept, tmp_path / "again.yaml", ridge=RIDGE, temperature=TEMPERATURE)
    assert again.mixture_id == open_mixture(refitted).identified().mixture_id
    assert (tmp_path / "again.yaml").read_text() == refitted.read_text().replace("new.router", "again.router")


def test_an_adapter_without_a_row_gets_one(texts, tmp_path):
    pair = write_pair("math", tmp_path / "math")
    cut = MixtureSpec(source=(f"math={pair}",), ranks={"math": 4})
    adapter = export_mixture(cut, tmp_path / "adapters", "peft") / "math"
    (adapter / "router.safetensors").unlink()
    mixture = MixtureSpec(source=(f"math={pair}", f"again={adapter}"), ranks={"math": 2}, active=2)
    with pytest.raises(CheckpointError, match="has no router row"):
        load_mixture(mixture)
    made = refit(
        mixture,
        {name: texts[name.replace("again", "math")] for name in ("public", "math", "again")},
        tmp_path / "new.yaml",
    )
    rows = gates(load_mixture(made.mixture).model)
    assert rows.shape[1] == 3
    assert not torch.equal(rows[:, 0], rows[:, 2])


def test_the_command_and_what_it_refuses(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dropped = dict.fromkeys(DOMAINS[2:], "drop")
    MixtureSpec(source=("zoo://nano",), ranks={"math": 4, **dropped}, active=2).save(tmp_path / "m.yaml")
    (tmp_path / "empty").write_text("\n")
    data = {name: f"{name}={texts[name]}" for name in ("public", "math", "news")}

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["refit", "m.yaml", *arguments])
        return status, *capsys.readouterr()

    for message, given, out in (
        ("missing: public", [data["math"], data["news"]], "new.yaml"),
        ("missing: news", [data["public"], data["math"]], "new.yaml"),
        ("unknown expert 'code'", [*data.values(), f"code={texts['code']}"], "new.yaml"),
        ("did you mean math", [data["public"], f"maths={texts['math']}", data["news"]], "new.yaml"),
        ("holds no document", [data["public"], "math=empty", data["news"]], "new.yaml"),
        ("cannot read the documents in gone", [data["public"], "math=gone", data["news"]], "new.yaml"),
        ("--out: a mixture file is called NAME.yaml, got new.json", [*data.values()], "new.json"),
        ("m.yaml: exists already", [*data.values()], "m.yaml"),
        ("--ridge and --temperature", [*data.values(), "--ridge", "0"], "new.yaml"),
    ):
        status, _, error = run("--data", *given, "--out", out)
        assert (status, error.count("\n")) == (2, 1), message
        assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m.yaml"]
    status, out, error = run("--data", *data.values(), "--out", "made/new.yaml", "--json")
    assert (status, error) == (0, "")
    told = json.loads(out.splitlines()[-1])
    assert set(told) == {"mixture", "router", "mixture_id", "tokens"}
    assert list(told["tokens"]) == ["public", "math", "news"]
    assert min(told["tokens"].values()) > 0
    assert open_mixture(told["mixture"]).identified().mixture_id == told["mixture_id"]
    assert Path(told["router"]).name == "new.router.safetensors"


# --- plans ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_rows(tmp_path_factory) -> str:
    source = open_source(["zoo://nano"])
    shape = source.shape
    own = torch.stack([source.router(layer) for layer in range(shape.num_layers)]).float()
    path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    RouterRows(rows=own.flip(1), experts=source.experts, base=source.base_digest, where="here").save(path)
    return str(path)


def plan(name: str, **changes: object) -> Plan:
    entries = (
        {"curve": name, "allocation": "uniform", "budgets": ["0.4x", "1x"], "active": 4},
        {"name": "public", "ranks": dict.fromkeys(DOMAINS, "drop"), "active": 1},
    )
    known = {"name": name, "source": ("zoo://nano",), "tasks": ("nano_capitals",), "limit": 4}
    return Plan(**{**known, "mixtures": entries} | changes)


def test_records_of_plans_with_and_without_rows_agree_on_the_weights(nano_rows, tmp_path):
    plain = Grid(plan("cut"), tmp_path / "results", Options())
    write_record(plain.results, plain.record())
    routed = Grid(plan("refitted", router=nano_rows), plain.results, Options())  # the folder is not of other weights
    one, other = plain.record(), routed.record()
    assert (one["weights"], one["digests"]) == (other["weights"], other["digests"])
    assert (one["factors"], other["factors"]) == ("", f"router:{RouterRows.load(nano_rows).digest[:8]}")
    assert record_name(one) != record_name(other)
    assert not {m.mixture_id for m in plain.mixtures} & {m.mixture_id for m in routed.mixtures}


@pytest.mark.slow
def test_plans_with_and_without_rows_share_a_folder_and_a_section(local_ray, nano_rows, tmp_path):
    results = tmp_path / "results"
    grids = []
    for name, router in (("cut", None), ("refitted router", nano_rows)):
        grids.append(Grid(plan(name, router=router), results, Options(workers=1)))
        assert run_grid(grids[-1]).computed == 3
    assert Grid(plan("refitted router", router=nano_rows), results, Options()).missing == {}

    responses: dict[str, list[str]] = {}
    for row in sorted(read_samples(results).to_pylist(), key=lambda row: row["doc_id"]):
        responses.setdefault(row["cell"], []).append(row["responses"])
    routed = next(iter(grids[1].cells.values())).mixture
    list(evaluate(load_mixture(routed.spec), grids[1].tasks, tmp_path / "alone"))
    alone = [
        row["responses"] for row in sorted(read_samples(tmp_path / "alone").to_pylist(), key=lambda r: r["doc_id"])
    ]
    of_plain, of_routed = (responses[next(iter(grid.cells))] for grid in grids)
    assert of_routed == alone != of_plain

    (section,) = read_sections(results)
    assert section.curves == ("cut", "refitted router")
    assert [m.name for m in section.mixtures] == [
        *("cut 0.4x", "full-a4", "public"),
        *("refitted router 0.4x", "full-a4 (router)", "public (router)"),
    ]
    assert (section.full(4), section.public()) == (1, 2)  # what all are compared with has its experts' own rows
    found = write_report(results, tmp_path / "report")["sections"][0]
    assert [len(found["curves"][name]["points"]) for name in section.curves] == [2, 2]


def test_a_mixture_file_has_the_plans_rows_or_none(nano_rows, tmp_path):
    shutil.copy(nano_rows, tmp_path / "copy.safetensors")
    rows = RouterRows.load(nano_rows)
    dataclasses.replace(rows, rows=rows.rows * 2).save(tmp_path / "other.safetensors")
    files = {"none": None, "same": str(tmp_path / "copy.safetensors"), "other": str(tmp_path / "other.safetensors")}
    for name, router in files.items():
        MixtureSpec(source=("zoo://nano",), ranks={"math": 2}, router=router).save(tmp_path / f"{name}.yaml")

    def grid(router: str | None, *names: str) -> Grid:
        mixtures = tuple(str(tmp_path / f"{name}.yaml") for name in names)
        return Grid(plan("p", router=router, mixtures=mixtures), tmp_path / "results", Options())

    (one,), (two,) = grid(nano_rows, "same").mixtures, grid(None, "none").mixtures
    assert one.mixture_id != two.mixture_id
    for router, name in ((nano_rows, "other"), (nano_rows, "none"), (None, "same")):
        with pytest.raises(UsageError, match=rf"{name}\.yaml has the router rows .*, the plan ") as caught:
            grid(router, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"plan p: router: the name of a file of router rows is needed, got 7"):
        grid(7, "none")  # type: ignore[arg-type]
    assert open_parts(plan("p", router=nano_rows).spec(), None)[0].spec.router == nano_rows


def test_a_search_does_not_mix_rows(nano_rows, tmp_path):
    MixtureSpec(source=("zoo://nano",), router=nano_rows).save(tmp_path / "mine.yaml")
    settings = SearchSettings(
        source=("zoo://nano",), tasks=("nano",), budget="0.33x", trials=3, include=(str(tmp_path / "mine.yaml"),)
    )
    with pytest.raises(UsageError, match=r"mine\.yaml has router rows of its own"):
        Search(settings, tmp_path / "search", Options())
