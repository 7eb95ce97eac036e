"""What somebody who means harm may try: with files, with requests, from the same machine, from a page in a browser.

The tests of files and of requests run in this process; the slow ones at the end look at a service from outside.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from flexmore_ray import scores
from flexmore_ray.__main__ import main
from flexmore_ray.checkpoint import Adapter, Checkpoint, TensorFolder, open_safetensors
from flexmore_ray.errors import FlexmoreError, TaskError
from flexmore_ray.mixture import load_tokenizer
from flexmore_ray.results import CELL_SCHEMA, read_cells
from flexmore_ray.source import open_source
from flexmore_ray.spec import YAML_BYTES, MixtureSpec, read_yaml
from flexmore_ray.store import FORMAT, manifest_checksum, open_store
from flexmore_ray.suites import load_suite
from flexmore_ray.written import is_known, remember
from flexmore_ray.zoo import zoo_path
from serve.__main__ import _check_exposure
from serve.app import describe
from serve.gate import key_digest
from serve.http import create_app
from serve.service import HttpSettings
from serve.settings import Settings, environment_key, read_keys, read_settings
from serve.tokens import Tokens
from tests.serve_fake import EchoService
from tests.serve_process import Server, free_port, process, wait_for

KEY, ADMIN = "canary-of-the-api-0001", "canary-of-the-admin-01"


def refused(work: Callable[[], Any], match: str | None = None) -> str:
    """The error of `work`: ours, and one line."""
    with pytest.raises(FlexmoreError, match=match) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def little_memory() -> Any:
    """This process may take 4 GB of addresses more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ------------------------------------------------------------------------------ files from somebody else

_TENFOLD = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
YAMLS = {
    "references": f"a0: &a0 [x]\n{_TENFOLD}source: zoo://nano\nranks: *a9\n",
    "merged": "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
    "deep": "source: " + "[" * 50_000,
    "code": "source: !!python/object/apply:os.system [id]",
    "digits": "active: " + "9" * 5000,
    "date": "active: 2020-99-99",
    "bytes": "source: !!binary zz",
    "long": "source: zoo://nano\n#" + "x" * YAML_BYTES,
    "keys": "? [a]\n: 1\n",
    "text": "\x00",
}


@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_runs_nothing_and_does_not_grow(kind: str, tmp_path: Path, little_memory: None) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(YAMLS[kind])
    refused(lambda: MixtureSpec.load(file))
    refused(lambda: load_suite(str(file)))


def test_a_file_without_end_is_read_to_a_bound(little_memory: None) -> None:
    refused(lambda: read_yaml(Path("/dev/zero"), "mixture file"), "at most")


def copy_of_nano(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """The embedded mixture with other entries in one of its JSON files."""
    shutil.copytree(zoo_path(), folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"hidden_size": 10**30},
        {"num_experts": float("inf")},
        {"vocab_size": -5},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"expert_names": 5},
        {"expert_names": ["<script>alert(1)</script>", *"abcdef"]},
        {"expert_names": ["a\nb", *"abcdef"]},
        {"expert_bases": [10**400] * 7},
    ],
    ids=str,
)
def test_sizes_in_a_config_are_bounded(change: dict[str, Any], tmp_path: Path, little_memory: None) -> None:
    folder = copy_of_nano(tmp_path / "nano", **change)
    refused(lambda: open_source([str(folder)]))


def test_json_without_end(tmp_path: Path, little_memory: None) -> None:
    shutil.copytree(zoo_path(), tmp_path / "nano")
    config = tmp_path / "nano" / "config.json"
    config.write_text('{"a":' + "[" * 200_000)
    refused(lambda: Checkpoint(config.parent), "not readable as JSON")
    with config.open("wb") as file:
        file.truncate(20 * 2**30)  # takes no room on the disk
    refused(lambda: Checkpoint(config.parent), "more than")


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{}", 2**63),
        safetensors(b"{}", 90 * 2**20),
        safetensors(json.dumps({"a": tensor([4], 0, 16), "b": tensor([2], 8, 16)}).encode()),
        safetensors(json.dumps({"a": tensor([-4], 0, 16)}).encode()),
        safetensors(json.dumps({"a": tensor([2**62, 2**62], 0, 16)}).encode()),
        safetensors(json.dumps({"a": tensor([2**30], 0, 2**32)}).encode()),
        safetensors(json.dumps({"a": tensor([4], 16, 0)}).encode()),
        safetensors(b"[" * 100_000),
        b"\x80\x04cos\nsystem\n(S'id'\ntR.",
    ],
    ids=("length", "claim", "overlap", "negative", "overflow", "beyond", "backwards", "deep", "pickle"),
)
def test_headers_of_safetensors(content: bytes, tmp_path: Path, little_memory: None) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(lambda: open_safetensors(tmp_path / "model.safetensors"), "damaged or not safetensors")
    refused(lambda: TensorFolder(tmp_path))


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "sub/x", "..", "", 5, ["x"]], ids=str)
def test_an_index_names_files_of_its_folder(file: Any, tmp_path: Path) -> None:
    shutil.copytree(zoo_path(), tmp_path / "other")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refused(lambda: TensorFolder(folder), "a file of this folder")


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", 5], ids=str)
def test_a_manifest_names_files_of_its_store(file: Any, tmp_path: Path) -> None:
    entry = {"expert": "math", "layer": 0, "projection": "up_proj", "rank": 1, "file": file, "size": 1, "sha256": ""}
    entry |= {"expert_digest": "", "public_digest": "", "method": "", "rejected": [], "error_ratio": 1.0}
    manifest: dict[str, Any] = {"format": FORMAT, "entries": [entry | {"residual_energy": 0.0}], "dtype": "float32"}
    manifest |= {"sources": ["zoo://nano"], "experts": ["public", "math"], "spectra": {"file": "spectra.parquet"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    refused(lambda: open_store(tmp_path), "files in its folder")
    manifest["entries"] = [{"unknown": 1}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    refused(lambda: open_store(tmp_path), "damaged")


@pytest.mark.parametrize("pattern", [{"(a+)+$": 1}, {".*.*.*.*.*.*x": 1}, {"(": 1}, {"(a|a)*": 1}, 5, ["x"]], ids=str)
def test_patterns_of_an_adapter_end_soon(pattern: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    module = f"model.layers.0.mlp.{'a' * 40}"
    save_file(
        {f"{module}.lora_A.weight": ones(1, 2), f"{module}.lora_B.weight": ones(2, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "alpha_pattern": pattern}))
    start = time.monotonic()
    refused(lambda: Adapter(tmp_path).factors(0, "a" * 40), "adapter_config.json")
    assert time.monotonic() - start < 1


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    where = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    for number, changes in enumerate(({"auto_map": where}, {"auto_map": where, "tokenizer_class": "Evil"})):
        folder = copy_of_nano(tmp_path / str(number), "tokenizer_config.json", **changes)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": where}))
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
        load_tokenizer(open_source([str(folder)]))
    assert not mark.exists()


@pytest.mark.parametrize("content", ["[" * 200_000, "{}", "5", '{"version": "1.0", "model": {"type": "Evil"}}'])
def test_a_damaged_tokenizer_is_one_line(content: str, tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path / "nano")
    (folder / "tokenizer.json").write_text(content)
    refused(lambda: load_tokenizer(open_source([str(folder)])), "no tokenizer")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ (1).__class__.__base__ }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(template: str) -> None:
    import asyncio

    tokenizer = load_tokenizer(open_source(["zoo://nano"]))
    tokenizer.chat_template = template
    refused(lambda: asyncio.run(Tokens(tokenizer).chat([{"role": "user", "content": "x"}])), "chat template refuses")


def test_a_small_parquet_file_does_not_become_a_large_table(tmp_path: Path, little_memory: None) -> None:
    (tmp_path / "cells").mkdir()
    rows = 50_000
    columns = {field.name: pa.nulls(rows, field.type) for field in CELL_SCHEMA}
    long = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 2**20]))
    bomb = pa.table(columns | {"error": long})  # 50 GB
    pq.write_table(bomb, tmp_path / "cells" / "0.parquet", compression="zstd")
    assert (tmp_path / "cells" / "0.parquet").stat().st_size < 2**20
    refused(lambda: read_cells(tmp_path), "more than")


def test_no_reader_of_ours_unpickles() -> None:
    """What unpickles, or runs what a file says, is named nowhere in the code but in words."""
    root = Path(__file__).parent.parent
    calls = ("pickle.load", "torch.load(", "joblib", "allow_pickle=True", "trust_remote_code=True", "yaml.unsafe_load")
    calls += ("yaml.full_load", "yaml.UnsafeLoader", "eval(", "exec(", "os.system", "shell=True", "read_pickle")
    allowed = {"model.eval()", ").eval()", "FlexMoreForCausalLM(config).eval()"}
    found = []
    for package in ("flexmore_ray", "search", "serve"):
        for path in (root / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                code = line.partition("#")[0]
                for good in allowed:
                    code = code.replace(good, "")
                found += [
                    f"{path.relative_to(root)}: {line}" for call in calls if f" {call}" in code or f"({call}" in code
                ]
    assert not found, found


def test_task_files_are_programs_and_come_by_no_uri(tmp_path: Path) -> None:
    """lm-eval's tasks may name functions; so they are read where the user names a path, and nowhere else."""
    for text in ("s3://bucket/tasks/mine.yaml", "https://example.org/mine.yaml", "file:///tmp/mine.yaml"):
        refused(lambda text=text: load_suite(text))
    pickled = tmp_path / "mine.yaml"
    pickled.write_text("task: mine\ndataset_path: pandas\noutput_type: generate_until\ndoc_to_text: x\n")
    with pytest.raises(TaskError, match="pickled"):
        scores.load_tasks(str(pickled))


# ------------------------------------------------------------------------------ places in a mixture file


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder received, with a mixture in it, and one beside it that is nobody's business."""
    monkeypatch.setenv("FLEXMORE_CACHE", str(tmp_path / "cache"))
    for name in ("received/model", "private/model"):
        shutil.copytree(zoo_path(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serve(places: Path, text: str, **settings: Any) -> MixtureSpec:
    file = places / "received" / "winner.yaml"
    file.write_text(text)
    return Settings(mixture=str(file), **settings).spec()


def test_a_served_mixture_names_its_own_folder(places: Path) -> None:
    for source in ("model", "./model", "../received/model", f"{places}/received/model", "zoo://nano", "a=model"):
        assert serve(places, f"source: [{source}]\n").source
    (places / "private" / "link").symlink_to(places / "received")
    assert Settings(mixture=str(places / "private" / "link" / "winner.yaml")).spec().source


@pytest.mark.parametrize(
    "source",
    [
        "../private/model",
        "/etc",
        "PRIVATE",
        "model/../../private/model",
        "math=../private/model",
        "math=PRIVATE",
        "~/model",
        "/proc/self/root/PRIVATE",
        "file://PRIVATE",
        "s3://bucket/model",
        "s3://key:secret@bucket/model",
        "owner/model",
        "private/model",
        "linked",
        "holds-a-link",
        "holds-a-linked-folder",
    ],
)
def test_and_no_other(places: Path, source: str) -> None:
    private = places / "private" / "model"
    (places / "received" / "linked").symlink_to(private)
    for name, link in (("holds-a-link", "model.safetensors"), ("holds-a-linked-folder", "factors")):
        shutil.copytree(zoo_path(), places / "received" / name, ignore=shutil.ignore_patterns("model.safetensors"))
        (places / "received" / name / link).symlink_to(private / "model.safetensors" if "." in link else private)
    source = source.replace("PRIVATE", str(private)).replace("root//", "root/")
    message = refused(lambda: serve(places, f"source: ['{source}']\n"))
    assert "secret" not in message
    if "bucket" not in message or "key:" not in source:
        assert "--allow" in message or "no credentials" in message


def test_stores_and_what_they_were_made_of(places: Path) -> None:
    from flexmore_ray.build import build_store

    build_store(open_source([str(places / "private" / "model")]), places / "received" / "store", max_rank=1)
    refused(lambda: serve(places, "store: store\n"), "its source .*private/model lies outside")
    refused(lambda: serve(places, "store: ../private\n"), "its store .*private lies outside")
    allowed = serve(places, "store: store\n", allow=[str(places / "private")])
    assert allowed.store == str(places / "received" / "store")


def test_the_way_out_works(places: Path) -> None:
    private = places / "private" / "model"
    text = f"source: {private}\n"
    for allow in (str(private), f"{places}/private", "private", f"file://{private}"):
        assert serve(places, text, allow=[allow]).source == (str(private),)
    assert serve(places, text, allow="elsewhere,private").source == (str(private),)
    for allow in ("received", f"{private}x", "/proc"):
        refused(lambda allow=allow: serve(places, text, allow=[allow]), "lies outside")
    assert serve(places, "source: owner/model\n", allow=["owner/model"]).source == ("owner/model",)
    assert serve(places, "source: s3://b/x/model\n", allow=["s3://b/x"]).source == ("s3://b/x/model",)
    for place in ("s3://b/xy", "s3://b/x/../y", "s3://c/x"):
        refused(lambda place=place: serve(places, f"source: {place}\n", allow=["s3://b/x"]), "lies outside")


def test_what_is_named_without_a_file_was_named_by_who_serves_it(places: Path) -> None:
    private = str(places / "private" / "model")
    assert Settings(mixture=private).spec().source == (private,)
    assert Settings(mixture={"source": private}).spec().source == (private,)


def test_the_winner_of_an_own_search_is_served_as_it_is(places: Path) -> None:
    text = f"source: {places / 'private' / 'model'}\nranks: {{math: 4}}\n"
    refused(lambda: serve(places, text))
    remember(text.encode())
    assert serve(places, text).source
    refused(lambda: serve(places, text + "active: 2\n"), "lies outside")  # changed since
    note = places / "cache" / "written-mixtures"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    note.chmod(0o666)
    assert not is_known(text.encode())
    note.unlink()
    note.symlink_to("/dev/zero")
    assert not is_known(text.encode())


def test_clients_are_not_told_where_things_lie(places: Path) -> None:
    from flexmore_ray.mixture import open_mixture

    for source, told in ((str(places / "private" / "model"), "model"), ("zoo://nano", "zoo://nano")):
        assert describe(open_mixture(MixtureSpec(source=(source,))), "id").source == (told,)


# ------------------------------------------------------------------------------ keys


def test_keys_are_long_and_are_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nshort-secret\n")
    message = refused(lambda: read_keys(str(file), where="api_key_file"), "at least, .* openssl rand")
    assert "short-secret" not in message
    refused(lambda: read_keys("/dev/zero", where="api_key_file"))
    file.write_text(f"{KEY}\n{ADMIN}\n")
    assert read_keys(str(file), where="api_key_file") == (KEY, ADMIN)


def test_a_key_in_a_job_or_on_a_command_line_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLEXMORE_API_KEY", KEY)
    told = {"runtime_env": {"env_vars": {"FLEXMORE_API_KEY": KEY}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    assert KEY not in refused(environment_key, "runtime_env")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    assert environment_key() == (KEY,)
    assert "FLEXMORE_API_KEY" not in os.environ
    assert main(["serve", "zoo://nano", "--api-key", KEY]) == 2
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert "--api-key-file" in said.err


def test_names_of_models_stay_on_their_line() -> None:
    for name in ("a\nINFO: all is well", "a\x1b[2J", "a\r\nset-cookie: x"):
        refused(lambda name=name: read_settings({"mixture": "zoo://nano", "name": name}), "printable")


def test_other_machines_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        refused(lambda host=host: _check_exposure(host, keys=False), "there is no key")
        _check_exposure(host, keys=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        _check_exposure(host, keys=False)


# ------------------------------------------------------------------------------ requests

OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/openapi.json")}
OPEN |= {("HEAD", "/health"), ("HEAD", "/ready")}


def application(**options: Any) -> TestClient:
    tokenizer: Any = load_tokenizer(open_source(["zoo://nano"]))
    app = create_app(EchoService(tokenizer), HttpSettings(model="nano", max_model_len=64, **options))
    return TestClient(app, raise_server_exceptions=False, base_url="http://127.0.0.1:8000")


def test_every_endpoint_but_four_asks_for_a_key() -> None:
    client = application(api_keys=(key_digest(KEY),), admin_keys=(key_digest(ADMIN),))
    routes = [(method, route.path) for route in client.app.routes for method in route.methods]
    assert len(routes) > 15
    assert set(routes) >= OPEN - {("HEAD", "/")}
    for method, path in routes:
        found = client.request(method, path.replace("{name}", "math").replace("{model:path}", "nano")).status_code
        is_open = (method, path) in OPEN or (method == "HEAD" and path == "/openapi.json")
        assert (found == 401) is not is_open, (method, path, found)
    for path in ("//health", "/health/", "/./health", "/health;x", "/%2e/health", "/HEALTH", "/health/../status", "/x"):
        answer = client.get(f"http://127.0.0.1:8000{path}")
        assert answer.status_code in (401, 200), path
        assert answer.status_code == 401 or answer.json() == {"status": "ok"}, path


def test_admin_endpoints_take_admin_keys_alone() -> None:
    client = application(api_keys=(key_digest(KEY),), admin_keys=(key_digest(ADMIN),))
    path = "/admin/experts/math/disable"
    for key, status in ((None, 401), (KEY, 403), (ADMIN + "x", 401), (ADMIN[:-1], 401), (ADMIN, 200)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert client.post(path, headers=headers).status_code == status
    assert application().post(path).status_code == 403  # no admin key at all


def test_several_keys_so_that_one_may_follow_another() -> None:
    client = application(api_keys=(key_digest(KEY), key_digest("the-key-of-tomorrow")))
    for key in (KEY, "the-key-of-tomorrow"):
        assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "a.b.", "EVIL.example"]
)
def test_a_web_page_cannot_come_by_its_own_name(host: str) -> None:
    """DNS rebinding: a page lets its name point to 127.0.0.1; the browser then takes our answers for the page's own."""
    for path in ("/", "/status", "/v1/models"):
        answer = application().get(path, headers={"host": host})
        assert (answer.status_code, path) in ((421, path), (200, "/"))
    assert application().get("/ready", headers={"host": host}).status_code == 200
    keyed = application(api_keys=(key_digest(KEY),))  # which the page does not have, so any name will do
    assert keyed.get("/status", headers={"host": host, "authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "10.1.2.3", "head-svc:8000", "a.localhost", "", "::1"]
)
def test_addresses_and_local_names_are_answered(host: str) -> None:
    assert application().get("/status", headers={"host": host}).status_code == 200


def test_a_web_page_cannot_post_without_asking() -> None:
    client, body = application(), json.dumps({"model": "nano", "prompt": "x"})
    for media in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain;application/json",
    ):
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = client.post(path, content=body, headers={"content-type": media, "origin": "http://evil.example"})
            assert answer.status_code == 415
    asked = client.options("/v1/completions", headers={"origin": "http://x", "access-control-request-method": "POST"})
    assert asked.status_code == 405
    for answer in (asked, client.get("/status", headers={"origin": "http://evil.example"})):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_clients_send_does_not_reach_logs_as_lines(caplog: pytest.LogCaptureFixture) -> None:
    client = application()
    evil = "x\n2026-01-01 ERROR forged \x1b[31m"
    answer = client.post("/v1/completions", json={"model": evil, "prompt": "x"})
    client.get("/v1/models/" + "a%0aERROR%20forged")
    client.post("/v1/completions", json={"model": "nano", "prompt": "x", evil: 1})
    assert answer.status_code == 404
    assert "\n" not in answer.json()["error"]["message"]
    ours = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in ("serve", "flexmore_ray")]
    assert not [line for line in ours if "forged" in line]


# ------------------------------------------------------------------------------ a run, seen from outside

LOOPBACK = ("127.", "::1", "::ffff:127.")
SHARED = "canary-of-the-file-003"


def listening(pid: int) -> Iterator[tuple[str, str, int]]:
    """Process, address and port of every socket that a process or one that it started listens on."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in processes:
        try:
            for connection in one.net_connections("inet"):
                if not connection.raddr:  # TCP that listens, and UDP that takes from everybody
                    yield one.name(), connection.laddr.ip, connection.laddr.port
        except psutil.Error:  # it has just ended
            continue


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **more}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["grid", "search"])
def test_nothing_listens_beyond_this_machine(command: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "source: zoo://nano\ntasks: [nano_order]\nlimit: 4\nmixtures: [{uniform: [2]}]\n"
    )
    words = ["grid", str(tmp_path / "plan.yaml"), "--results", str(tmp_path / "results")]
    if command == "search":
        words = ["search", "--source", "zoo://nano", "--tasks", "nano_order", "--budget", "0.33x", "--trials", "1"]
        words += ["--limit", "4", "--test-limit", "4", "--out", str(tmp_path / "out")]
    line = [sys.executable, "-m", "flexmore_ray", *words, "--workers", "1"]
    seen: set[tuple[str, str, int]] = set()
    with process(line, tmp_path / "log", environment(tmp_path, FLEXMORE_CACHE=str(tmp_path / "cache"))) as started:
        while started.poll() is None:
            seen |= set(listening(started.pid))
            time.sleep(0.2)
    assert started.returncode == 0, (tmp_path / "log").read_text()
    assert {name for name, _, _ in seen} >= {"gcs_server", "raylet"}
    assert [found for found in seen if not found[1].startswith(LOOPBACK)] == []
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with keys, and with an expert in a process of its own."""
    home, port = tmp_path_factory.mktemp("secure"), free_port()
    own = {"rank": "full", "placement": "own"}
    MixtureSpec.from_dict({"source": "zoo://nano", "ranks": {"math": 4, "code": own}}).save(home / "own.yaml")
    for name, key in (("api", SHARED), ("admin", ADMIN)):
        (home / f"{name}.keys").write_text(f"{key}\n")
    words = ["serve", str(home / "own.yaml"), "--port", str(port), "--cpus", "0.3", "--set", "expert_cpus=0.2"]
    words += ["--api-key-file", str(home / "api.keys"), "--admin-key-file", str(home / "admin.keys")]
    line = [sys.executable, "-m", "flexmore_ray", *words]
    log = home / "serve.log"
    with process(line, log, environment(home, FLEXMORE_API_KEY=KEY)) as started:
        wait_for(f"http://127.0.0.1:{port}/ready", started, log.read_text)
        yield Server(f"http://127.0.0.1:{port}", started, home)


def session(server: Server) -> Path:
    """Ray's folder of the service."""
    for line in (" ".join(one.cmdline()) for one in psutil.Process(server.process.pid).children(recursive=True)):
        if "--session-dir=" in line:
            return Path(line.partition("--session-dir=")[2].split()[0])
    raise AssertionError("no process of Ray names its folder")


def status_of(url: str, key: str | None = None) -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_service_listens_on_this_machine_alone(server: Server) -> None:
    found = list(listening(server.process.pid))
    assert len(found) > 10
    assert sum("ServeReplica" in name for name, _, _ in found) >= 6  # Ray's port and Serve's in each of three
    assert [one for one in found if not one[1].startswith(LOOPBACK)] == []


@pytest.mark.slow
def test_keys_are_in_no_process_no_log_and_no_answer(server: Server) -> None:
    for key in (KEY, SHARED):
        assert status_of(f"{server.url}/status", key) == 200
    assert status_of(f"{server.url}/status", KEY + "x") == 401
    keys = [key.encode() for key in (KEY, SHARED, ADMIN)]
    token = (server.home / ".ray" / "auth_token").read_bytes()
    for one in psutil.Process(server.process.pid).children(recursive=True):
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{one.pid}/{name}").read_bytes()
            assert not [key for key in (*keys, token) if key in content], (one.name(), name)
    assert not [key for key in keys if key in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()]
    logs = [path for path in session(server).rglob("*") if path.is_file()]
    assert len(logs) > 20
    for path in (*logs, server.home / "serve.log"):
        content = path.read_bytes()
        assert not [key for key in (*keys, token) if key in content], path
    for path in ("/", "/openapi.json", "/status", "/v1/models", "/experts", "/metrics", "/tokenizer_info", "/-/routes"):
        request = urllib.request.Request(f"{server.url}{path}", headers={"authorization": f"Bearer {SHARED}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
        assert not [key for key in (*keys, token) if key in content], path


KEPT = """
import sys
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
for space in (None, b"serve", b"fun", b"dashboard", b"job", b"session", b"runtime_env", b"cluster", b"tracing"):
    for name in client.internal_kv_keys(b"", space, timeout=20):
        print(name, client.internal_kv_get(name, space, timeout=20))
for job in client.get_all_job_info(timeout=20).values():
    print("job", job.SerializeToString(), job.entrypoint)
"""


def ask_head(server: Server, **more: str) -> subprocess.CompletedProcess[str]:
    """What the head of the cluster keeps, for who has the token; as another process asks for it."""
    ports = [port for name, _, port in listening(server.process.pid) if name == "gcs_server"]
    line = [sys.executable, "-c", KEPT, f"127.0.0.1:{ports[0]}"]
    return subprocess.run(line, env=environment(server.home, **more), capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_head_keeps_no_key_and_answers_who_has_the_token(server: Server, tmp_path: Path) -> None:
    told = ask_head(server, RAY_AUTH_MODE="token")
    assert told.returncode == 0, told.stderr
    assert "--api-key-file" in told.stdout  # so the job's command line is there
    assert not [key for key in (KEY, SHARED, ADMIN) if key in told.stdout]
    for more in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        assert "AuthenticationError" in ask_head(server, **more).stderr


class Evil:
    """What a replica must not unpickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.slow
def test_replicas_unpickle_nothing_from_who_has_no_token(server: Server, tmp_path: Path) -> None:
    import pickle

    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    refusals = []
    call = pickle.dumps(Evil(tmp_path / "ran"))
    for name, _, port in listening(server.process.pid):
        if "ServeReplica" in name:
            stub = serve_pb2_grpc.ASGIServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
            with pytest.raises(grpc.RpcError) as error:
                stub.HandleRequest(serve_pb2.ASGIRequest(pickled_request_metadata=call, request_args=call), timeout=20)
            refusals.append(error.value.code())
    assert refusals.count(grpc.StatusCode.UNAUTHENTICATED) == 3  # of ingress, mixture and expert
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_other_users_of_this_machine_cannot_enter_rays_folder(server: Server) -> None:
    folder = session(server)
    assert folder.exists()
    closed = [parent for parent in folder.parents if not stat.S_IMODE(parent.stat().st_mode) & 0o077]
    assert closed, f"all users may enter {folder}"
    token = server.home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
