"""The application on Ray Serve, with an engine that has no model."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.spec import read_yaml
from serve.__main__ import _check_exposure
from serve.app import bind, build_app
from serve.deployment import scale_by_busy_share
from serve.gate import key_digest
from serve.ingress import latency, summarise
from serve.metrics import _merge
from serve.settings import Settings, read_keys, read_settings
from serve.transport import check_port
from tests.serve_engine import FakeEngineMaker

PORT = 18230
ADMIN = "admin-key-of-the-tests"
MODEL = {"model": "nano", "prompt": "2+2=", "seed": 3}
SECONDS = 0.02  # of a token


class Client:
    """Talks to one application."""

    def __init__(self, path: str, log: Path) -> None:
        self.base, self.log = f"http://127.0.0.1:{PORT}{path}", log

    def call(self, path: str, body: Any = None, *, key: str | None = None, timeout: float = 60) -> tuple[int, Any, Any]:
        """Status, headers and JSON of an answer."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.headers, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.loads(error.read())

    def complete(self, max_tokens: int = 8, **more: Any) -> tuple[int, Any, Any]:
        """An answer to the usual prompt."""
        return self.call("/v1/completions", {**MODEL, "max_tokens": max_tokens, **more})

    def lines(self) -> list[str]:
        """What the engines have written."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until it is true; returns what it is."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def replicas(deployment: str, application: str) -> list[int]:
    """Process ids of a deployment's replicas."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).strip() == f"ray::ServeReplica:{application}:{deployment}":
                found.append(process.pid)
    return found


def text(seed: int, tokens: int) -> str:
    """What the engine answers."""
    return "".join(chr(97 + (seed * 31 + place * 7) % 26) for place in range(tokens))


@pytest.fixture(scope="module")
def started() -> float:
    """When the tests began."""
    return time.time()


@pytest.fixture(scope="module")
def served(ray_home: None, started: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Two applications: one with two ingress replicas and room for little, one that goes down to no replica."""
    from ray import serve

    from flexmore_ray.runtime import cluster
    from serve.transport import local_variables

    folder = tmp_path_factory.mktemp("serve")
    clients = {name: Client(f"/{name}", folder / f"{name}.log") for name in ("main", "zero")}
    base: dict[str, Any] = {"mixture": "zoo://nano", "name": "nano", "cpus": 0.1}
    main = Settings(**base, ingress_replicas=2, max_ongoing_requests=4, max_queued_requests=4)
    zero = Settings(**base, min_replicas=0, max_replicas=1, downscale_delay_s=1)
    makers = {name: FakeEngineMaker(str(client.log), SECONDS) for name, client in clients.items()}
    with local_variables(), cluster(num_cpus=4):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        keys = {"admin_keys": (key_digest(ADMIN),)}
        serve.run(bind(main, **keys, make_engine=makers["main"]), name="main", route_prefix="/main")
        serve.run(bind(zero, **keys, make_engine=makers["zero"]), name="zero", route_prefix="/zero")
        for client in clients.values():
            wait_for(lambda client=client: client.call("/ready")[0] == 200)
        yield clients
        serve.shutdown()


@pytest.fixture
def main(served: dict[str, Client]) -> Client:
    """The first application, with all of its replicas up."""
    client = served["main"]
    wait_for(lambda: len(replicas("mixture", "main")) == 1 and len(replicas("ingress", "main")) == 2)
    wait_for(lambda: client.call("/ready")[0] == 200)
    return client


def test_completion(main: Client) -> None:
    status, _, answer = main.complete()
    assert status == 200
    assert answer["choices"][0]["text"] == text(3, 8)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["experts"] == {"public": 1.0}


def test_stream(main: Client) -> None:
    body = {**MODEL, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{main.base}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == text(3, 8)
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert len(chunks) > 3


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_request(main: Client, stream: bool) -> None:
    import http.client

    before = len(main.lines())
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    body = json.dumps({**MODEL, "max_tokens": 400, "stream": stream})
    connection.request("POST", "/main/v1/completions", body, {"content-type": "application/json"})
    began = wait_for(lambda: [line for line in main.lines()[before:] if " began " in line])[0].split()[2]
    if stream:
        connection.getresponse().read(20)
    connection.close()
    wait_for(lambda: any(line.endswith(f"cancelled {began}") for line in main.lines()), 3)


def test_more_than_there_is_room_for(main: Client) -> None:
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        status, headers, answer = main.complete(max_tokens=75)
        answers.append((status, (headers.get("retry-after"), answer)))

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [detail for status, detail in answers if status == 429]
    assert {status for status, _ in answers} == {200, 429}
    assert 4 <= len(answers) - len(refused) <= 20  # 4 at work, 4 waiting at each ingress, and some that came late
    assert all(after == "1" and answer["error"]["code"] == "queue_full" for after, answer in refused)


def test_disabled_expert_is_off_everywhere_at_once(main: Client) -> None:
    assert main.call("/admin/experts/math/disable", {})[0] == 401
    for _ in range(3):
        assert main.call("/admin/experts/math/disable", {}, key=ADMIN)[0] == 200
        for _ in range(8):  # both ingress replicas answer some of these
            assert main.complete(1, experts={"include": ["math"]})[0] == 400
        assert main.call("/admin/experts/math/enable", {}, key=ADMIN)[0] == 200
        for _ in range(8):
            assert main.complete(1, experts={"include": ["math"]})[0] == 200
    assert {line.split()[0] for line in main.lines() if " began " in line}


def test_disabled_expert_stays_off_when_ingress_dies(main: Client) -> None:
    assert main.call("/admin/experts/news/disable", {}, key=ADMIN)[0] == 200
    pids = replicas("ingress", "main")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(replicas("ingress", "main")) - set(pids)) == 2, 40)
    before = len(main.lines())
    assert wait_for(lambda: main.complete(1)[0] == 200, 40)
    began = [line for line in main.lines()[before:] if " began " in line]
    assert all("news" not in line and "math" in line for line in began)
    states = {card["name"]: card["state"] for card in main.call("/experts")[2]["data"]}
    assert states["news"] == "disabled"
    assert states["math"] == "enabled"
    assert main.call("/admin/experts/news/enable", {}, key=ADMIN)[0] == 200


def test_request_is_sent_again_when_its_replica_dies(main: Client) -> None:
    before, answers = len(main.lines()), []
    thread = threading.Thread(target=lambda: answers.append(main.complete(max_tokens=50, seed=5)))
    thread.start()
    wait_for(lambda: any(" began " in line for line in main.lines()[before:]))
    (pid,) = replicas("mixture", "main")
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    status, _, answer = answers[0]
    assert status == 200, answer
    assert answer["choices"][0]["text"] == text(5, 50)
    assert len([line for line in main.lines()[before:] if " began " in line]) == 2


def test_metrics_and_status(main: Client) -> None:
    assert main.complete()[0] == 200
    status = main.call("/status")[2]
    assert status["replicas"][0]["alive"]
    shares = {card["name"]: card["share"] for card in status["experts"]}
    assert shares["math"] == 0.25
    assert status["latency"]["request_s"] == {"median": 0.1, "p95": 0.1}

    def page() -> str:
        with urllib.request.urlopen(f"{main.base}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    wanted = (
        "ray_flexmore_serve_generated_tokens",
        "ray_flexmore_serve_running",
        "ray_serve_deployment_replica_healthy{",
    )
    wait_for(lambda: all(map(page().__contains__, wanted)), 60)
    found = page()
    samples = [line.rpartition(" ")[0] for line in found.splitlines() if not line.startswith("#")]
    assert all('application="main"' in series and "WorkerId" not in series for series in samples)
    assert len(samples) == len(set(samples))
    assert len(found) < 100_000


def test_what_an_answer_and_the_model_say_of_themselves(main: Client, started: float) -> None:
    _, headers, _ = main.complete(1)
    assert len(headers.get_all("x-request-id")) == 1
    created = {main.call("/v1/models")[2]["data"][0]["created"] for _ in range(8)}  # of both ingress replicas
    assert len(created) == 1
    assert started - 1 <= created.pop() <= time.time()


def test_no_key_leaves_the_builder(served: dict[str, Client]) -> None:
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_NAMESPACE

    assert ADMIN not in str(serve.status())
    application = bind(Settings(mixture="zoo://nano"), admin_keys=(key_digest(ADMIN),))
    assert ADMIN.encode() not in pickle.dumps(application._bound_deployment.init_args[0])
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=SERVE_NAMESPACE)
    assert ADMIN not in str(ray.get(controller.get_serve_instance_details.remote()))


def test_first_request_starts_a_replica(served: dict[str, Client]) -> None:
    zero = served["zero"]
    wait_for(lambda: not replicas("mixture", "zero"), 40)
    assert zero.call("/ready")[0] == 200
    status, _, answer = zero.complete()
    assert status == 200
    assert answer["choices"][0]["text"] == text(3, 8)


# ---- without Ray


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixtur": "x"}, "mixture: field required"),
        ({"mixture": "zoo://nano", "max_replica": 3}, "max_replica: extra inputs are not permitted, got 3"),
        ({"mixture": "zoo://nano", "min_replicas": 3}, "max_replicas: at least min_replicas (3) is needed, got 1"),
        ({"mixture": "zoo://nano", "gpus": "many"}, "gpus: input should be a valid number"),
        ({"mixture": "zoo://nano", "on_lost": "cry"}, "on_lost: input should be 'continue' or 'refuse', got 'cry'"),
    ],
)
def test_settings_say_what_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_settings(given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_settings_from_words() -> None:
    settings = Settings.model_validate({"mixture": "a/winner.yaml", "experts": "public,math", "max_replicas": "4"})
    assert settings.experts == ["public", "math"]
    assert settings.max_replicas == 4
    assert settings.model_name == "winner"
    assert Settings(mixture="zoo://nano").model_name == "nano"


def test_example_of_a_config_file() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = read_yaml(Path(__file__).parent.parent / "serve" / "config.yaml", "config file")
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert application.import_path == "serve.app:build_app"
    assert Settings.model_validate(application.args).max_replicas == 8


def test_serve_reads_the_builder() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call_builder

    application = call_builder(build_app, {"mixture": "zoo://nano", "max_replicas": "2"})
    assert application._bound_deployment.name == "ingress"


def test_bad_mixture_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "winner.yaml"
    file.write_text("source: zoo://nano\nranks: {maths: 3}\n")
    for mixture in (str(file), {"source": "zoo://nano", "ranks": {"maths": 3}}, str(tmp_path / "none.yaml")):
        with pytest.raises(FlexmoreError) as error:
            build_app(Settings(mixture=mixture))
        assert "\n" not in str(error.value)


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, second = "the-key-of-the-team", "the-key-of-tomorrow"
    file.write_text(f"# of the team\n\n {first} \n{second}\n")
    assert read_keys(str(file), where="api_key_file") == (first, second)
    assert read_keys(None, where="api_key_file") == ()
    file.write_text("\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(str(file), where="api_key_file")
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(str(tmp_path / "none"), where="api_key_file")


def test_other_machines_need_a_key() -> None:
    _check_exposure("127.0.0.1", keys=False)
    _check_exposure("::1", keys=False)
    _check_exposure("0.0.0.0", keys=True)
    with pytest.raises(UsageError, match="there is no key"):
        _check_exposure("0.0.0.0", keys=False)
    with pytest.raises(UsageError, match="an IP address"):
        _check_exposure("localhost.", keys=False)


def test_taken_port() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(FlexmoreError, match="cannot be listened on"):
        check_port("127.0.0.1", sock.getsockname()[1])


def test_replicas_follow_busy_share() -> None:
    class Context:
        class config:  # noqa: N801
            target_ongoing_requests = 0.5

        def __init__(self, shares: list[float], leases: int) -> None:
            self.aggregated_metrics = {"busy": dict(enumerate(shares))} if shares else None
            self.total_num_requests = leases

    assert scale_by_busy_share(Context([0.9], 1))[0] == pytest.approx(1.8)  # type: ignore[arg-type]
    assert scale_by_busy_share(Context([0.4, 0.4], 2))[0] == pytest.approx(1.6)  # type: ignore[arg-type]
    assert scale_by_busy_share(Context([0.0, 0.0], 2))[0] == 1  # type: ignore[arg-type]
    assert scale_by_busy_share(Context([0.0], 0))[0] == 0  # type: ignore[arg-type]
    assert scale_by_busy_share(Context([], 1))[0] == 1  # type: ignore[arg-type]


def test_summary_of_replicas() -> None:
    def stats(prompt: int, math: float, lost: list[str]) -> dict[str, Any]:
        totals = {"requests": 1, "prompt_tokens": prompt, "completion_tokens": 0, "cached_tokens": 0}
        live = {"replica": "a", "running": 1, "waiting": 2, "cache": 0.5, "cached": 0.1, "alive": True}
        shares = {"public": 1 - math, "math": math}
        return {**live, "totals": totals, "recent": [(1.0, 0.1, None, 0.2)], "shares": shares, "lost": lost}

    found = summarise([stats(30, 0.5, []), stats(10, 0.1, ["math"])])
    assert found["experts"]["math"] == {"share": pytest.approx(0.4), "lost": True}
    assert found["queue"] == 4
    assert found["totals"]["prompt_tokens"] == 40
    assert found["latency"]["requests"] == 2
    nothing = {"experts": {}, "replicas": [], "queue": 0, "totals": {}, "latency": latency([])}
    assert summarise([]) == nothing


def test_latency_is_of_the_most_recent_requests_of_all_replicas() -> None:
    slow = [(float(i), 9.0, 9.0, 9.0) for i in range(512)]
    fast = [(1000.0 + i, i / 100, None if i else 0.5, i / 10) for i in range(412)]
    found = latency([*fast, *slow])
    assert found["requests"] == 512
    assert found["request_s"]["median"] == pytest.approx(15.55)  # 100 of 9 s, and those from 0 to 41.1
    assert found["time_per_output_token_s"] == {"median": 9.0, "p95": 9.0}
    unknown = {"median": None, "p95": None}
    assert latency([(1.0, None, None, 2.0)])["time_to_first_token_s"] == unknown
    assert latency([]) == {
        "requests": 0,
        "time_to_first_token_s": unknown,
        "time_per_output_token_s": unknown,
        "request_s": unknown,
    }


def test_metrics_of_several_nodes_on_one_page() -> None:
    def node(name: str, requests: int) -> str:
        tags = f'NodeAddress="{name}",Version="2",WorkerId="{name}",application="a"'
        return (
            "# HELP ray_flexmore_serve_requests_total Requests\n# TYPE ray_flexmore_serve_requests_total counter\n"
            f'ray_flexmore_serve_requests_total{{{tags},otel_scope="",x="}} \\",y=\\""}} {requests}\n'
            "# HELP ray_tasks Tasks\n# TYPE ray_tasks gauge\nray_tasks 3\n"
        )

    other = node("1", 7).replace('application="a"', 'application="b"')
    assert _merge([node("1", 1) + other, "", node("2", 2)], "a") == (
        "# HELP ray_flexmore_serve_requests_total Requests\n# TYPE ray_flexmore_serve_requests_total counter\n"
        'ray_flexmore_serve_requests_total{NodeAddress="1",application="a",x="} \\",y=\\""} 1.0\n'
        'ray_flexmore_serve_requests_total{NodeAddress="2",application="a",x="} \\",y=\\""} 2.0\n'
    )


def test_metrics_of_a_process_that_took_anothers_place() -> None:
    page = (
        "# TYPE ray_serve_num_http_requests_total counter\n"
        'ray_serve_num_http_requests_total{WorkerId="1",application="a"} 3.0\n'
        'ray_serve_num_http_requests_total{WorkerId="2",application="a"} 4.0\n'
        "# TYPE ray_serve_autoscaling_target_replicas gauge\n"
        'ray_serve_autoscaling_target_replicas{WorkerId="1",application="a"} 3.0\n'
        'ray_serve_autoscaling_target_replicas{WorkerId="2",application="a"} 4.0\n'
    )
    lines = _merge([page], "a").splitlines()
    assert lines[1] == 'ray_serve_num_http_requests_total{application="a"} 7.0'
    assert lines[3] == 'ray_serve_autoscaling_target_replicas{application="a"} 4.0'
