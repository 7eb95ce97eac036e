"""Faults on a service under load: what clients see."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmore_ray.spec import MixtureSpec
from tests.chaos.faults import WORKERS, Outcome, Scenario, Trial, undrawn
from tests.chaos.hosts import Host, Hosts
from tests.chaos.stages import Stage, title

KEY = "chaos-key-of-a-test"
PORT = 26001
CLIENTS = 4
PROMPTS = [f"{a}+{b}=" for a in (3, 14, 25) for b in (7, 41)]
START_SECONDS = 240.0
SETTLE_SECONDS = 120.0
"""Longest time after a fault in which requests may fail."""
CALM_SECONDS = 20.0
"""Watched after each fault, when it is over."""
RANKS: Mapping[str, Any] = {"math": 16, "code": 8, "news": 8, "creative": "drop", "reddit": 16, "academic": 8}


class Serve(Stage):
    """A mixture served by two replicas, of which a host holds one, with the proxy of the head asked."""

    name = "serve"

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        MixtureSpec.from_dict({"source": "zoo://nano", "ranks": dict(RANKS), "active": 4}).save(out / "m.yaml")
        (out / "keys").write_text(KEY + "\n")
        self.arguments = [str(out / "m.yaml"), "--host", "0.0.0.0", "--port", str(PORT), "--cpus", "0.6"]
        self.arguments += ["--api-key-file", str(out / "keys"), "--min-replicas", "2", "--ingress-replicas", "2"]
        self.asked = Clients()

    def committed(self) -> Any:
        return iter(())

    def result(self) -> Any:
        return self.asked.answers


class Clients:
    """Clients that ask one thing after the other, at temperature 0, so that every answer is known."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: dict[str, str] = {}
        self.wrong: list[str] = []
        self.good = 0
        self.failures: list[tuple[float, float, str]] = []
        """When a failed request began and ended, and how."""
        self.successes: list[float] = []
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def ask(self, prompt: str) -> str:
        """One answer."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=90) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    def start(self) -> None:
        """Begin to ask."""
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish what is asked, and end."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        draw = random.Random(number)
        while not self._end.is_set():
            prompt, began = draw.choice(PROMPTS), time.monotonic()
            try:
                text = self.ask(prompt)
            except (OSError, ValueError) as error:  # urllib's errors are OSErrors
                told = error.read()[:200].decode() if isinstance(error, urllib.error.HTTPError) else ""
                self.failures.append((began, time.monotonic(), f"{error} {told}"))
                time.sleep(0.2)
            else:
                self.successes.append(time.monotonic())
                self.good += 1
                if self.answers.setdefault(prompt, text) != text:
                    self.wrong.append(f"{prompt}{text}")


def attempt_serving(scenario: Scenario, outcome: Outcome, times: int, seed: int, scratch: Path) -> None:
    """Try a fault on a service so often; see `faults.attempt`.

    Lost are wrong answers, and requests that failed though they began after the fault was over; requests that failed
    while it lasted are in the notes. It has recovered when the last of these has failed and another was answered.
    """
    chance = random.Random(f"{scenario.fault} serve {seed}")
    hosts = Hosts(scratch, WORKERS, **{"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", **scenario.variables})
    try:
        driver = hosts.add_idle() if scenario.driver_on_worker else hosts.head
        stage = Serve(scratch / "run")
        stage.start(driver, hosts)
        trial = Trial(stage=stage, hosts=hosts, chance=chance, outcome=outcome, driver=driver)
        clients = stage.asked
        clients.url = f"http://{driver.address}:{PORT}"
        _await_ready(stage, clients.url)
        clients.answers = {prompt: clients.ask(prompt) for prompt in PROMPTS}
        clients.start()
        for _ in range(times):
            at_work = _await_replica(hosts.workers[0])
            time.sleep(chance.uniform(2, 5))
            failed, since = len(clients.failures), time.monotonic()
            scenario.do(trial)
            over = _settle(clients, failed)
            outcome.times += 1
            outcome.recovered.append(over - since if len(clients.failures) > failed else 0.0)
            time.sleep(CALM_SECONDS)
            outcome.lost += len(late := [text for began, _, text in clients.failures[failed:] if began > over])
            hosts.await_nodes(len(hosts.all))
            failures = {text[:120] for _, _, text in clients.failures[failed:]}
            trial.say(f"a worker host had {', '.join(at_work)}")
            trial.say(f"{len(clients.failures) - failed} failed while it lasted, {len(late)} later: {sorted(failures)}")
        clients.stop()
        outcome.lost += len(clients.wrong)
        outcome.notes += clients.wrong[:5]
        trial.say(f"{clients.good} requests answered, {len(clients.failures)} failed")
        assert stage.process is not None
        for process in driver.processes():
            if " -m flexmore_ray " in " ".join(process.cmdline()):
                process.terminate()
        with contextlib.suppress(Exception):
            stage.process.wait(timeout=90)
    finally:
        left = undrawn(hosts)
    outcome.orphans += len(left)
    outcome.notes += [f"left behind: {title}" for title in left]


def _await_ready(stage: Stage, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        assert stage.running, stage.log()
        assert time.monotonic() < deadline, stage.log()
        time.sleep(0.5)


def _await_replica(host: Host) -> list[str]:
    """Wait until a mixture replica runs on a host; the names of all of Serve that runs there."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        running = [name for process in host.processes() if (name := title(process)).startswith("ray::ServeReplica")]
        if any("mixture" in name and "initialize" not in name for name in running):
            return running
        assert time.monotonic() < deadline, f"no mixture replica came to {host.name}"
        time.sleep(0.5)


def _settle(clients: Clients, failed: int) -> float:
    """When the last failure after a fault was followed by a success: none has failed for a while then."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        last = max((ended for _, ended, _ in clients.failures[failed:]), default=0.0)
        after = next((moment for moment in clients.successes if moment > last), None)
        if after is not None and time.monotonic() - last > 8:
            return after if last else time.monotonic()
        time.sleep(0.5)
    return deadline
