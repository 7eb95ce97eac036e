"""An expert whose folder is on its owner's nodes alone: the rest of the mixture does without its files."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flexmore_ray.errors import CheckpointError, FlexmoreError, UsageError
from flexmore_ray.mixture import load_mixture, open_mixture
from flexmore_ray.source import Guest, Source, absent_experts, open_source
from flexmore_ray.spec import MatrixKey, MixtureSpec
from flexmore_ray.zoo import write_pair
from serve.app import ask_owners, bind
from serve.expert import introduce, load_expert, open_expert, open_shared
from serve.settings import Settings
from tests import common

PORT = 18290
SHARED, CLINIC = ("math", "news"), "code"
PROMPT = [5, 17, 3, 44, 21, 9, 30]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two-expert checkpoints of the embedded mixture."""
    folder = tmp_path_factory.mktemp("pairs")
    return {name: write_pair(name, folder / name) for name in (*SHARED, CLINIC)}


def mixture(folders: dict[str, Any], rank: Any = "full", **entry: Any) -> MixtureSpec:
    """All experts, `CLINIC` in the middle and placed on its own."""
    order = (SHARED[0], CLINIC, SHARED[1])
    ranks = {SHARED[0]: 4, CLINIC: {"rank": rank, "placement": "own", **entry}}
    return MixtureSpec.from_dict({"source": [f"{name}={folders[name]}" for name in order], "ranks": ranks, "active": 3})


def elsewhere(pairs: dict[str, Path]) -> dict[str, Any]:
    """The same folders, as a node sees them that does not have the owner's."""
    return {**pairs, CLINIC: "/only/on/owner/nodes"}


@pytest.fixture(scope="module")
def guest(pairs: dict[str, Path]) -> Guest:
    told = introduce(mixture(pairs), CLINIC)
    assert isinstance(told, Guest)
    return pickle.loads(pickle.dumps(told))


def test_mixture_without_the_folder_is_the_same(pairs: dict[str, Path], guest: Guest) -> None:
    plain = open_mixture(mixture(pairs, 4))
    parts = open_shared(mixture(elsewhere(pairs), 4), {CLINIC: guest}, verify=True)
    assert parts.source.experts == plain.source.experts == ("public", "math", CLINIC, "news")
    assert parts.count() == plain.count()
    assert parts.identified().mixture_id == plain.identified().mixture_id
    for layer in range(parts.source.shape.num_layers):
        assert torch.equal(parts.source.router(layer), plain.source.router(layer))
    assert f"{CLINIC}=/only/on/owner/nodes" in parts.spec.source
    with pytest.raises(CheckpointError, match="stay with its owner"):
        parts.source.weight(MatrixKey(CLINIC, 0, "up_proj"))


@pytest.mark.parametrize("rank", ["full", 4])
def test_what_the_owner_computes_is_what_the_mixture_would(pairs: dict[str, Path], guest: Guest, rank: Any) -> None:
    here, there = open_mixture(mixture(pairs, rank)), open_expert(mixture(pairs, rank), CLINIC, guest)
    ours, theirs = (load_expert(parts, CLINIC, device="cpu", dtype=torch.float32) for parts in (here, there))
    x = torch.randn(5, here.source.shape.hidden_size)
    for layer in range(here.source.shape.num_layers):
        assert (ours(layer, x) - theirs(layer, x)).abs().max() < 1e-5


def test_owner_opens_no_other_folder(pairs: dict[str, Path]) -> None:
    alone = {**{name: f"/not/here/{name}" for name in SHARED}, CLINIC: pairs[CLINIC]}
    assert open_expert(mixture(alone), CLINIC).source.experts == ("public", CLINIC)
    named = MixtureSpec(source=mixture(alone).source, experts=("base", "math", CLINIC, "news"))
    assert open_expert(named, CLINIC).source.experts == ("base", CLINIC)


def test_owner_of_an_adapter_needs_the_shared_folders(tmp_path: Path) -> None:
    model = common.random_model(num_experts=2)
    source = [f"math={common.write(model, tmp_path / 'math')}", f"{CLINIC}={tmp_path / 'adapter'}"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):  # which is looked into, after the shared folder
        open_expert(MixtureSpec(source=tuple(source)), CLINIC)


def test_another_public_model_is_refused(tmp_path: Path) -> None:
    names = ("math", CLINIC)
    folders = {
        name: common.write(common.random_model(num_experts=2, seed=i), tmp_path / name) for i, name in enumerate(names)
    }
    told = introduce(MixtureSpec(source=(f"{CLINIC}={folders[CLINIC]}",)), CLINIC)
    with pytest.raises(CheckpointError, match=f"^expert {CLINIC}: trained from another public model") as error:
        open_source([f"math={folders['math']}", f"{CLINIC}=/only/there"], guests={CLINIC: told})
    assert "\n" not in str(error.value)


def test_other_weights_than_were_told_are_refused(pairs: dict[str, Path], guest: Guest) -> None:
    swapped = {**pairs, CLINIC: pairs["news"]}
    with pytest.raises(CheckpointError, match="other weights than the application was deployed with"):
        open_expert(mixture(swapped), CLINIC, guest)


def test_which_experts_are_absent(pairs: dict[str, Path], tmp_path: Path) -> None:
    texts = [f"math={pairs['math']}", "news=/not/here", f"{CLINIC}=/not/here/either", "creative=not/absolute"]
    assert absent_experts(texts, ["math", CLINIC, "creative"]) == [CLINIC]
    assert absent_experts(["zoo://nano"], ["math"]) == []
    assert ask_owners(mixture(pairs, nodes="owner=clinic")) == {}


def test_absent_without_a_cluster_or_a_pin(pairs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match=f"^{CLINIC}: its folder is not here, and RAY_ADDRESS"):
        ask_owners(mixture(elsewhere(pairs), nodes="owner=clinic"))
    with pytest.raises(CheckpointError, match="/only/on/owner/nodes: no such folder"):
        open_shared(mixture(elsewhere(pairs)), ask_owners(mixture(elsewhere(pairs))), verify=True)


def test_mixture_side_reads_no_matrix_of_an_own_expert_that_it_could_read(
    pairs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path))
    read: set[str] = set()
    weight, factors = Source.weight, Source._own_factors
    monkeypatch.setattr(Source, "weight", lambda source, key: (read.add(key.expert), weight(source, key))[1])
    monkeypatch.setattr(Source, "_own_factors", lambda source, key: (read.add(key.expert), factors(source, key))[1])
    parts = open_shared(mixture(pairs, 4), {}, verify=False)
    for key in parts.matrix_keys():
        if key.expert != CLINIC:
            parts.piece(key)
    assert read == {"public", *SHARED}


# ---- the application


@pytest.fixture(scope="module")
def served(
    ray_home: None, pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Served with the owner's folder in the home of Ray's processes, while the builder has another home."""
    from ray import serve

    from flexmore_ray.runtime import cluster
    from serve.transport import local_variables

    owner = Path.home() / "clinic"
    shutil.copytree(pairs[CLINIC], owner)
    spec = mixture({**pairs, CLINIC: "~/clinic"}, 4, nodes="clinic")
    with pytest.MonkeyPatch.context() as patch, local_variables():
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"clinic": 1}))
        with cluster(num_cpus=4):
            patch.setenv("HOME", str(tmp_path_factory.mktemp("empty")))
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            settings = Settings(mixture=spec.to_dict(), name="m", cpus=0.1, expert_cpus=0.1)
            serve.run(bind(settings), name="default", route_prefix="/")
            yield f"http://127.0.0.1:{PORT}", owner
            serve.shutdown()


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def processes(name: str) -> list[int]:
    found = [p for p in psutil.process_iter() if "".join(p.cmdline()).strip().endswith(f"ServeReplica:default:{name}")]
    return [process.pid for process in found]


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
def test_service_with_a_guest(served: tuple[str, Path], pairs: dict[str, Path]) -> None:
    url, owner = served
    deadline = time.monotonic() + 60
    while True:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}
        try:
            answer = ask(f"{url}/v1/completions", body)
        except urllib.error.URLError:
            answer = {"usage": {"experts_lost": ["not up yet"]}}
        if "experts_lost" not in answer["usage"]:
            break
        assert time.monotonic() < deadline, "the expert did not come"
        time.sleep(0.2)
    found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    plain = load_mixture(mixture(pairs, 4))
    with torch.inference_mode():
        logits = plain.model(torch.tensor([PROMPT])).logits[0]
    expected = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    assert (torch.tensor(found) - expected).abs().max() < 1e-4
    model = ask(f"{url}/v1/models")["data"][0]
    assert plain.spec.mixture_id in json.dumps(model)
    cards = {card["name"]: card for card in ask(f"{url}/experts")["data"]}
    assert cards[CLINIC]["parameters"] == plain.count().experts[CLINIC]
    (replica,) = processes("mixture")
    assert str(pairs["math"]) in mapped(replica)
    assert str(owner) not in mapped(replica)  # which it would find in its home
    assert Path.home() != owner.parent


@pytest.mark.slow
def test_owner_that_cannot_be_asked_is_one_line(served: tuple[str, Path], pairs: dict[str, Path]) -> None:
    with pytest.raises(FlexmoreError, match=f"^{CLINIC}: on the nodes of its owner, .*/only/on/owner/nodes: no such"):
        ask_owners(mixture(elsewhere(pairs), nodes="clinic"))
    with pytest.raises(UsageError, match=f"^{CLINIC}: its actor asks for the label owner=nobody"):
        ask_owners(mixture(elsewhere(pairs), nodes="owner=nobody"))
