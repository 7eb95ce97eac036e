"""The dashboard, the alerts and our metrics: they belong together, and every query finds something where we run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import flexmore_ray.metrics
import serve.metrics
from flexmore_ray.placement import Needs
from search.progress import Progress
from tests.serve_process import free_port, process

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "cluster" / "monitoring"
BOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
with_prometheus = pytest.mark.skipif(
    PROMTOOL is None or PROMETHEUS is None, reason="no Prometheus here; on Debian: apt-get install prometheus"
)

OF_RAY: Mapping[str, set[str]] = {
    "ray_actors": {"Name", "Source", "State"},
    "ray_cluster_active_nodes": set(),
    "ray_component_rss_bytes": {"Component"},
    "ray_node_cpu_count": set(),
    "ray_node_cpu_utilization": set(),
    "ray_node_disk_free": set(),
    "ray_node_disk_usage": set(),
    "ray_node_mem_total": set(),
    "ray_node_mem_used": set(),
    "ray_object_store_available_memory": set(),
    "ray_object_store_used_memory": set(),
    "ray_resources": {"Name", "State"},
    "ray_scheduler_unscheduleable_tasks": set(),
    "ray_serve_deployment_queued_queries": {"application", "deployment"},
    "ray_serve_deployment_replica_healthy": {"application", "deployment"},
    "ray_serve_autoscaling_target_replicas": {"application", "deployment"},
}
"""Ray's own metrics that we use, with their labels; the slow test compares with what Ray tells."""
OF_GPUS = {"ray_node_gpus_utilization": {"GpuIndex"}}
COMMON = {"SessionName", "instance"}  # of every series
NOT_NAMES = {"ray", "ray_io_cluster"}
SECRET = "canary-5f2d81-6c07ab41"


# ---- what our code tells


class Recorded:
    """Takes the place of Ray's metrics: what was made, and what it was told."""

    made: dict[str, tuple[str, set[str]]]
    told: list[tuple[str, float, dict[str, str]]]

    def __init__(self, kind: str, name: str, tags: tuple[str, ...]) -> None:
        self.name = name
        assert self.made.setdefault(name, (kind, set(tags))) == (kind, set(tags)), name

    def _take(self, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == self.made[self.name][1], self.name
        self.told.append((self.name, float(value), dict(tags)))

    inc = set = observe = _take


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorded]]:
    class Here(Recorded):
        made: dict[str, tuple[str, set[str]]] = {}
        told: list[tuple[str, float, dict[str, str]]] = []

    def histogram(name: str, what: str, bounds: list[float], tags: tuple[str, ...]) -> Recorded:
        return Here("histogram", name, tags)

    for module in (flexmore_ray.metrics, serve.metrics):
        monkeypatch.setattr(module, "Counter", lambda name, what, tags: Here("counter", name, tags))
        monkeypatch.setattr(module, "Gauge", lambda name, what, tags: Here("gauge", name, tags))
    monkeypatch.setattr(serve.metrics, "Histogram", histogram)
    for cached in (flexmore_ray.metrics._expert_events, flexmore_ray.metrics._expert_bytes):
        cached.cache_clear()
    yield Here
    for cached in (flexmore_ray.metrics._expert_events, flexmore_ray.metrics._expert_bytes):
        cached.cache_clear()


def make_all() -> None:
    """Make every metric that our code has."""
    needs = Needs(num_cpus=1)
    flexmore_ray.metrics.GridMetrics("paper", needs)
    flexmore_ray.metrics.SearchMetrics("third", needs)
    expert = flexmore_ray.metrics.ExpertMetrics("grid:paper", "math")
    expert.happened("truncations")
    expert.watch(lambda: (1, 2))
    serve.metrics.EngineMetrics("flexmore", "a").holds({"trunk": 1})
    serve.metrics.ExpertMetrics("flexmore", "a", "math")
    serve.metrics.IngressMetrics("flexmore", "a")


def documented(module: Any) -> dict[str, tuple[str, set[str]]]:
    """The table of a module's docstring: name -> kind and tags."""
    found: dict[str, tuple[str, set[str]]] = {}
    name = ""
    for line in (module.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and line.startswith("|"):
            name = cells[0] if cells[0].startswith("flexmore_") else name
            kind, tags = found.get(name, (cells[1], set()))
            if name and not cells[2].startswith("-"):
                found[name] = (kind, tags | {tag.strip() for tag in cells[2].split(",") if tag.strip()})
    return found


def test_the_tables_in_the_code_say_what_there_is(recorded: type[Recorded]) -> None:
    make_all()
    ours = {name: made for name, made in recorded.made.items() if not name.startswith("flexmore_serve_")}
    assert documented(flexmore_ray.metrics) == ours
    serving = {name: kind for name, (kind, _) in documented(serve.metrics).items()}
    made = {name: kind for name, (kind, _) in recorded.made.items() if name not in ours}
    assert serving == made
    for name, (_, tags) in documented(serve.metrics).items():
        assert tags | {"application", "replica"} == recorded.made[name][1], name


def test_a_grid_tells_how_it_goes_and_what_it_reserves(
    recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("flexmore_ray.metrics.time.monotonic", lambda: now[0])
    metrics = flexmore_ray.metrics.GridMetrics("paper", Needs(num_cpus=2, num_gpus=0.5))
    now[0] += 10
    metrics.report(planned=9, left=4, workers=3)
    grid = {"grid": "paper"}
    assert recorded.told == [
        ("flexmore_grid_cells_planned", 9, grid),
        ("flexmore_grid_cells_left", 4, grid),
        ("flexmore_grid_workers", 3, grid),
        ("flexmore_reserved_seconds", 60, {"run": "grid:paper", "resource": "CPU"}),
        ("flexmore_reserved_seconds", 15, {"run": "grid:paper", "resource": "GPU"}),
    ]
    recorded.told.clear()
    now[0] += 5
    metrics.report(planned=9, left=4, workers=0)
    assert not [name for name, _, _ in recorded.told if name == "flexmore_reserved_seconds"]


def test_a_search_tells_its_entries_its_best_and_its_budget(recorded: type[Recorded]) -> None:
    def entry(kind: str, state: str, value: float = 0.0, cost: int = 0) -> Any:
        return SimpleNamespace(kind=kind, state=state, value=value, cost=cost)

    best = entry("trial", "complete", 0.5, 80)
    entries = [entry("baseline", "complete"), best, entry("trial", "running"), entry("trial", "stopped")]
    study: Any = SimpleNamespace(entries=entries, trials=entries[1:], best=best, live={2: None})
    metrics = flexmore_ray.metrics.SearchMetrics("third", Needs(num_cpus=1))
    with Progress(study, 10, 100, metrics) as progress:
        progress.scored(7)
        progress.at_work = 1
    told: dict[Any, float] = {}
    for name, value, tags in recorded.told:
        assert tags.get("search", "third") == "third"
        told[name, *(tags[key] for key in ("kind", "state") if key in tags)] = value
    assert told["flexmore_search_entries", "trial", "left"] == 7
    assert (
        told["flexmore_search_entries", "trial", "running"] == told["flexmore_search_entries", "trial", "stopped"] == 1
    )
    assert told["flexmore_search_entries", "trial", "failed"] == 0
    assert told["flexmore_search_entries", "baseline", "complete"] == 1
    assert (told["flexmore_search_best",], told["flexmore_search_best_cost",]) == (0.5, 80)
    assert (told["flexmore_search_budget",], told["flexmore_search_documents",]) == (100, 7)


def test_progress_is_reported_while_nothing_happens_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexmore_ray.metrics.REPORT_SECONDS", 0.01)
    calls: list[int] = []
    with flexmore_ray.metrics.reporting(lambda: calls.append(1)):
        deadline = time.monotonic() + 20
        while len(calls) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    ended = len(calls)
    time.sleep(0.05)
    assert len(calls) == ended


# ---- what the files ask for


def queries() -> Iterator[tuple[str, str]]:
    """Where a query is, and the query."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            yield f"${name}", re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])[1]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def known(made: Mapping[str, tuple[str, set[str]]]) -> dict[str, set[str]]:
    """Series as Prometheus has them, with their labels."""
    series: dict[str, set[str]] = {"up": {"job"}, **OF_RAY, **OF_GPUS}
    for name, (kind, tags) in made.items():
        if kind == "histogram":
            series |= {f"ray_{name}_{end}": tags | {"le"} for end in ("bucket", "sum", "count")}
        else:
            series[f"ray_{name}{'_total' if kind == 'counter' else ''}"] = tags
    return series


def names(query: str) -> set[str]:
    """Names of the series that a query asks for."""
    bare = re.sub(r'"[^"]*"', '""', query)
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+|\bup\b", bare)) - NOT_NAMES


def labels(query: str) -> set[str]:
    """Labels that a query selects or groups by."""
    bare = re.sub(r'"[^"]*"', '""', query)
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", bare)
    grouped = [name for group in re.findall(r"(?:by|on) \(([^)]*)\)", bare) for name in re.split(r",\s*", group)]
    return {*selected, *grouped} - {""}


def test_every_query_asks_for_what_there_is(recorded: type[Recorded]) -> None:
    make_all()
    series = known(recorded.made)
    used: set[str] = set()
    for where, query in queries():
        asked = names(query)
        assert asked, where
        assert asked <= set(series), f"{where}: nothing is called {', '.join(asked - set(series))}"
        offered = COMMON.union(*(series[name] for name in asked))
        assert labels(query) <= offered, f"{where}: {query} has no label {', '.join(labels(query) - offered)}"
        used |= asked
    assert set(OF_RAY) <= used


def test_a_name_that_is_wrong_is_found(recorded: type[Recorded]) -> None:
    make_all()
    series = known(recorded.made)
    assert names("rate(ray_flexmore_grid_cells[5m])") - set(series) == {"ray_flexmore_grid_cells"}  # without _total
    assert labels('sum by (gird) (up{jbo="ray"})') == {"gird", "jbo"}


def test_the_readme_names_metrics_that_there_are(recorded: type[Recorded]) -> None:
    make_all()
    series = set(recorded.made) | set(known(recorded.made))
    text = "".join(path.read_text() for path in (ROOT / "README.md", *sorted(FOLDER.rglob("*.yml"))))
    found = set(
        re.findall(r"(?<![\w.])(?:ray_)?flexmore_(?:grid|search|expert|serve|reserved)_\w*[a-z]\b(?!_?\*)", text)
    )
    assert found
    assert found <= series


# ---- the dashboard as Grafana reads it


def test_panels_have_their_own_place_and_number() -> None:
    every = BOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    rows = [panel["gridPos"]["y"] for panel in every if panel["type"] == "row"]
    assert rows == sorted(rows)
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1)), "a gap"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']} {panel['title']}")
def test_a_panel_is_complete(panel: Mapping[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["description"]
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    steps = defaults["thresholds"]["steps"]
    assert steps[0]["value"] is None
    assert [step["value"] for step in steps[1:]] == sorted(step["value"] for step in steps[1:])
    if any(step["color"] == "red" for step in steps):
        assert "Red: " in panel["description"], "what to do when it is red?"
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert 'SessionName=~"$session"' in target["expr"]
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= set(VARIABLES)
        offered = labels(target["expr"]) | COMMON | {"GpuIndex"}
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= offered


def test_the_dashboard_asks_the_source_that_was_chosen() -> None:
    text = json.dumps(BOARD)
    uids = set(re.findall(r'"datasource": \{"type": "\w+", "uid": "([^"]*)"\}', text))
    assert uids == {"${datasource}"}
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?(\w+)", "".join(target["expr"] for panel in PANELS for target in panel["targets"])))
    assert used | {"datasource"} == set(VARIABLES)


# ---- Prometheus


def promtool(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@with_prometheus
def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "auth_token").write_text("token")
    promtool("check", "config", "prometheus.yml", cwd=tmp_path)


GRID = '{SessionName="s",grid="paper"}'
APP = 'SessionName="s",application="flexmore"'
FIRES: Mapping[str, tuple[dict[str, str], dict[str, str], str]] = {
    # the series that make it fire, what changes for it not to, and since when it fires
    "GridStalled": (
        {f"ray_flexmore_grid_cells_left{GRID}": "5x70", f"ray_flexmore_grid_documents_total{GRID}": "7x70"},
        {f"ray_flexmore_grid_documents_total{GRID}": "0+10x70"},
        "61m",
    ),
    "GridWithoutWorkers": (
        {f"ray_flexmore_grid_cells_left{GRID}": "5x70", f"ray_flexmore_grid_workers{GRID}": "0x70"},
        {f"ray_flexmore_grid_workers{GRID}": "1x70"},
        "11m",
    ),
    "CellsFailed": (
        {
            'ray_flexmore_grid_cells_total{SessionName="s",grid="paper",status="failed"}': "2x70",
            f"ray_flexmore_grid_cells_left{GRID}": "0x70",
        },
        {'ray_flexmore_grid_cells_total{SessionName="s",grid="paper",status="failed"}': "0x70"},
        "1m",
    ),
    "ExpertLost": (
        {
            f'ray_flexmore_serve_expert_available{{{APP},expert="math",replica="a"}}': "1x70",
            f'ray_flexmore_serve_expert_available{{{APP},expert="math",replica="b"}}': "0x70",
        },
        {f'ray_flexmore_serve_expert_available{{{APP},expert="math",replica="b"}}': "1x70"},
        "2m",
    ),
    "QueueFull": (
        {f'ray_flexmore_serve_http_requests_total{{{APP},status="429"}}': "0+10x70"},
        {f'ray_flexmore_serve_http_requests_total{{{APP},status="429"}}': "10x70"},
        "11m",
    ),
    "ServiceFails": (
        {
            f'ray_flexmore_serve_http_requests_total{{{APP},status="200"}}': "0+980x70",
            f'ray_flexmore_serve_http_requests_total{{{APP},status="500"}}': "0+20x70",
        },
        {f'ray_flexmore_serve_http_requests_total{{{APP},status="500"}}': "0+2x70"},
        "11m",
    ),
    "DiskFull": (
        {'ray_node_disk_usage{instance="a"}': "91x70", 'ray_node_disk_free{instance="a"}': "9x70"},
        {'ray_node_disk_free{instance="a"}': "19x70"},
        "6m",
    ),
    "MemoryFull": (
        {'ray_node_mem_used{instance="a"}': "94x70", 'ray_node_mem_total{instance="a"}': "100x70"},
        {'ray_node_mem_used{instance="a"}': "90x70"},
        "6m",
    ),
    "NodeSilent": ({'up{job="ray",instance="a"}': "0x70"}, {'up{job="ray",instance="a"}': "1x70"}, "3m"),
}


@with_prometheus
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_fires_when_it_should(rule: Mapping[str, Any], tmp_path: Path) -> None:
    series, calm, since = FIRES[rule["alert"]]
    checks = []
    for given, expected in ((series, 1), (series | calm, 0)):
        condition = f'count(ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}}) or vector(0)'
        checks.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in given.items()],
                "promql_expr_test": [
                    {"expr": condition, "eval_time": since, "exp_samples": [{"labels": "{}", "value": expected}]}
                ],
            }
        )
    test = {"rule_files": [str(FOLDER / "alerts.yml")], "evaluation_interval": "1m", "tests": checks}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", "test.yml", cwd=tmp_path)


# ---- everything at work


@contextlib.contextmanager
def head(home: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A cluster with a token and a dashboard: its address, and the environment of its users."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    binaries = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback address alone
        "RAY_metrics_report_interval_ms": "1000",
        "FLEXMORE_API_KEY": SECRET,
    }
    dashboard, agent = free_port(), free_port()
    command = [str(binaries / "ray"), "start", "--head", "--block", "--num-cpus", "3", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(free_port()), "--temp-dir", str(home / "ray")]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", str(agent), "--object-store-memory", str(100 * 2**20)]
    address = f"http://127.0.0.1:{dashboard}"
    with process(command, home / "head.log", environment) as started:
        wait(lambda: get(f"{address}/api/prometheus/sd", token.read_text()), "the head", started)
        wait(lambda: get(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", token.read_text()), "its agent", started)
        yield address, environment | {"RAY_ADDRESS": address}


@contextlib.contextmanager
def prometheus(home: Path, dashboard: str) -> Iterator[str]:
    """Prometheus with our files, but for the port of the dashboard and for how often it looks."""
    text = (FOLDER / "prometheus.yml").read_text().replace("http://127.0.0.1:8265", dashboard)
    (home / ".ray" / "prometheus.yml").write_text(re.sub(r"(interval): \d+s", r"\1: 1s", text))
    shutil.copy(FOLDER / "alerts.yml", home / ".ray")
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(PROMETHEUS), f"--config.file={home / '.ray' / 'prometheus.yml'}"]
    command += [f"--web.listen-address={url[7:]}", f"--storage.tsdb.path={home / 'tsdb'}"]
    with process(command, home / "prometheus.log", os.environ) as started:
        wait(lambda: get(f"{url}/-/ready"), "Prometheus", started)
        yield url


def get(url: str, token: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return bytes(answer.read())


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """What Prometheus finds now."""
    try:
        answer = get(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    except urllib.error.HTTPError as error:
        pytest.fail(f"{query}: {error.read().decode()}")
    found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
    return found


def wait(done: Any, what: str, started: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if done():
                return
        assert started.poll() is None, f"{what} ended"
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)


def filled(query: str) -> str:
    values = {"session": ".+", "grid": ".*", "search": ".*", "application": ".*", "cpu_price": "0.05", "gpu_price": "2"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], query)


@pytest.mark.slow
@with_prometheus
def test_every_panel_shows_something_where_we_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("m")
    work = home / "work"
    work.mkdir()
    (work / "plan.yaml").write_text("source: zoo://nano\ntasks: nano\nlimit: 16\nmixtures: [{pairs: [2, full]}]\n")
    (work / "mixture.yaml").write_text(
        "source: zoo://nano\nranks: {math: 8, news: 4, academic: 4, creative: drop, reddit: 4, "
        "code: {rank: full, placement: own}}\n"
    )
    port = free_port()
    common = ["--workers", "1", "--store", str(home / "store")]
    tasks = ["--tasks", "nano_order", "--tasks", "nano_heroes"]
    commands = {
        "serve": ["serve", "mixture.yaml", "--port", str(port), "--cpus", "0.5", "--set", "expert_cpus=0.2"],
        "grid": ["grid", "plan.yaml", "--results", str(home / "results"), *common],
        "search": [
            *("search", "--source", "zoo://nano", *tasks, "--budget", "0.33x", "--trials", "10"),
            *("--limit", "24", "--test-limit", "6", "--out", str(home / "third"), *common),
        ],
    }
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        dashboard, environment = stack.enter_context(head(home))
        url = stack.enter_context(prometheus(home, dashboard))
        ray = str(Path(sys.executable).parent / "ray")

        def run(name: str) -> subprocess.Popen[bytes]:
            submit = [ray, "job", "submit", "--submission-id", f"{name}-1", "--working-dir", str(work)]
            submit += ["--metadata-json", json.dumps({"job_name": name}), "--", "flexmore", *commands[name]]
            return stack.enter_context(process(submit, home / f"{name}.log", environment))

        server = run("serve")
        wait(lambda: post(port, SECRET), "the service", server, 300)
        job, left = run("grid"), ["search"]
        deadline = time.monotonic() + 600
        while len(seen) < len(PANELS) and time.monotonic() < deadline:
            if left and job.poll() is not None:
                job = run(left.pop())
            with contextlib.suppress(OSError):
                for _ in range(4):
                    post(port, SECRET)
            for panel in PANELS:
                if any(number(ask(url, filled(target["expr"]))) for target in panel["targets"]):
                    seen.add(panel["title"] + str(panel["id"]))
            time.sleep(0.5)
        logs = "".join((home / f"{name}.log").read_text()[-1500:] for name in commands)
        assert not [p["title"] for p in PANELS if p["title"] + str(p["id"]) not in seen], logs
        for _, query in queries():
            ask(url, filled(query))
        for name, expected in OF_RAY.items():
            (series, *_) = json.loads(get(f"{url}/api/v1/series?match[]={name}"))["data"] or [{}]
            assert expected | COMMON <= set(series), f"{name}: {series}"
        every = urllib.parse.urlencode({"match[]": '{job="ray"}'})
        told = get(f"{url}/api/v1/series?{every}").decode()
        token = (home / ".ray" / "auth_token").read_text()
        assert SECRET not in told
        assert token not in told
        jobs = json.loads(get(f"{dashboard}/api/jobs/", token))
        assert {job["metadata"]["job_name"] for job in jobs if job["submission_id"]} == set(commands)
        actors = json.loads(get(f"{dashboard}/api/v0/actors?detail=1&limit=1000", token))["data"]["result"]["result"]
        shown = " ".join(f"{actor['name']} {actor['repr_name']}" for actor in actors)
        for actor in ("expert:math:grid:plan:", "grid:plan:worker-1:", "expert:math:search:third:", "search:third"):
            assert actor in shown
        assert SECRET not in json.dumps([jobs, actors])


def number(found: list[dict[str, Any]]) -> bool:
    return any(sample["value"][1] != "NaN" for sample in found)


def post(port: int, key: str) -> bool:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    body = json.dumps({"model": "mixture", "prompt": "12+7=" * 20, "max_tokens": 4}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bool(answer.read())
