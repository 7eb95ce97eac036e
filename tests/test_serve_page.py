"""The status page: what it may do, what it asks for, and, where there is a browser, what people see."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

import serve.http
from flexmore_ray.mixture import load_tokenizer
from flexmore_ray.source import open_source
from serve.gate import key_digest
from serve.http import Description, HttpSettings, create_app
from serve.ingress import latency
from serve.request import Delta, Request, Usage
from tests.serve_fake import EchoService

PORT = 18500
PAGE = (Path(serve.http.__file__).parent / "page.html").read_text(encoding="utf-8")
EVIL = "<img src=x onerror='hacked=1'>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
    "--remote-debugging-pipe",
]


class PageService(EchoService):
    """One expert has a name that is a program, one is lost; a prompt may end in an answer that is cut off."""

    def __init__(self) -> None:
        tokenizer = load_tokenizer(open_source(["zoo://nano"]))
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        super().__init__(tokenizer)
        self.cut_off = False

    async def describe(self) -> Description:
        described = await super().describe()
        public, math, code = described.experts
        return dataclasses.replace(described, experts=(public, dataclasses.replace(math, name=EVIL), code))

    async def status(self) -> dict[str, Any]:
        shares = {"public": 0.5, EVIL: 0.4, "code": 0.1}
        replica = {"replica": "k2j8", "running": 3, "waiting": 2, "cache": 0.25, "cached": 0.5, "alive": True}
        return {
            "experts": {name: {"share": share, "lost": name in self.lost} for name, share in shares.items()},
            "replicas": [replica],
            "queue": 2,
            "totals": {"requests": 1234, "completion_tokens": 56789},
            "latency": latency([(1.0, 0.1, None, 0.15), (2.0, 0.1, None, 0.25)]),
        }

    async def stream(self, request: Request) -> AsyncGenerator[list[Delta] | Usage, None]:
        async for item in super().stream(request):
            if self.cut_off and isinstance(item, Usage):
                raise ConnectionResetError
            yield item


def application(service: EchoService, **options: Any) -> Any:
    return create_app(service, HttpSettings(**{"model": "nano", "max_model_len": 512, **options}))


# What can be told from the page alone


def test_the_page_may_run_its_own_script_and_nothing_else() -> None:
    response = TestClient(application(PageService())).get("/")
    assert response.text == PAGE
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert policy["require-trusted-types-for"] == "'script'"
    assert len(re.findall("<script", PAGE)) == 1


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?:|//[a-z0-9]|@import|url\(", PAGE.replace("// ", ""), re.IGNORECASE)
    assert set(re.findall(r'(?:href|src|action)="([^"]*)"', PAGE)) == {"#prompt", "data:,"}


def test_the_page_treats_text_as_text_and_keeps_no_key() -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert word not in PAGE
    for word in ("localStorage", "sessionStorage", "cookie", "indexedDB"):
        assert word not in PAGE
    assert not re.search(r"<[^>]*\son[a-z]+=", PAGE)


def test_what_the_page_asks_for_is_there() -> None:
    calls = set(re.findall(r'\bcall\("([A-Z]+)", "([^"]+)"', PAGE))
    assert calls == {("GET", "status"), ("POST", "v1/completions")}
    assert len(calls) == PAGE.count(" call(") - PAGE.count("function call(")
    paths = TestClient(application(PageService())).get("/openapi.json").json()["paths"]
    for method, path in calls:
        assert method.lower() in paths[f"/{path}"]
    (latencies,) = re.findall(r"const LATENCIES = \[(.*?)\];", PAGE, re.DOTALL)
    assert {"requests", *re.findall(r'\["(\w+)"', latencies)} == set(latency([]))


def test_the_script_finds_what_it_looks_for() -> None:
    ids = re.findall(r'\bid="([^"]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', PAGE)) <= set(ids)
    assert set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', PAGE)) <= set(ids)


# In a browser


class Browser:
    """A page in Chromium, driven over the DevTools protocol through a pipe.

    Args:
        folder: for its profile.
        url: to open.
    """

    def __init__(self, folder: Path, url: str) -> None:
        to_read, its_output = os.pipe()
        its_input, to_write = os.pipe()
        command = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
        arguments = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", command, *arguments], pass_fds=(its_input, its_output), stdout=log, stderr=log
            )
        os.close(its_input)
        os.close(its_output)
        self._input, self._output, self._rest, self._count = to_write, to_read, b"", 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def close(self) -> None:
        """End it, and wait until it has."""
        os.close(self._input)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            os.close(self._output)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true; returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} is {value!r}; the page says: {self.run(TEXT)}"
            time.sleep(0.05)
        return value

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._input, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            continue  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._output], [], [], 60)[0], "the browser does not answer"
            piece = os.read(self._output, 2**16)
            assert piece, "the browser has ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


TEXT = "document.body.innerText"
LIVE = "document.getElementById('live')?.dataset.state === 'up'"
IDLE = "document.getElementById('stop').disabled && document.getElementById('outcome').textContent"


def text(element: str) -> str:
    return f"document.getElementById('{element}').textContent"


def ask(browser: Browser, prompt: str, *, max_tokens: int) -> None:
    fields = {"prompt": prompt, "max-tokens": str(max_tokens)}
    for element, value in fields.items():
        browser.run(f"document.getElementById({json.dumps(element)}).value = {json.dumps(value)}")
    browser.run("document.getElementById('send').click()")


@contextlib.contextmanager
def served(service: EchoService, **options: Any) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(application(service, **options), port=PORT, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def opened(folder: Path, service: EchoService, **options: Any) -> Iterator[Browser]:
    with served(service, **options), contextlib.closing(Browser(folder, f"http://127.0.0.1:{PORT}/")) as browser:
        yield browser


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")


@in_a_browser
def test_people_see_the_mixture_and_get_an_answer(tmp_path: Path) -> None:
    service = PageService()
    service.off, service.lost = {EVIL}, ("code",)
    with opened(tmp_path, service) as browser:
        browser.wait(LIVE)
        rows = browser.run(
            "[...document.querySelectorAll('#expert-rows tr')].map((row) => row.innerText.split(/\\s*\\t\\s*/))"
        )
        assert [row[0] for row in rows] == ["public", EVIL, "code"]
        assert [row[4] for row in rows] == ["enabled", "disabled", "lost"]
        assert "Lost: code." in browser.run(text("notice"))
        assert browser.run(text("total-note")) == "0.33 of full, 3.00K"
        assert browser.run(text("queue")) == "2"
        assert "k2j8" in browser.run(text("replica-rows"))
        cells = browser.run("[...document.querySelectorAll('#latency-rows td')].map((cell) => cell.innerText)")
        assert cells == ["100 ms", "100 ms", "\N{EN DASH}", "\N{EN DASH}", "200 ms", "245 ms"]
        assert "last 2 requests" in browser.run(text("latency-note"))

        ask(browser, EVIL, max_tokens=len(EVIL))
        assert browser.wait(IDLE) == "Done: max tokens reached. Without code, now lost."
        assert browser.run(text("answer")) == EVIL
        assert browser.run(text("usage-generated")).startswith(f"{len(EVIL)} tokens")
        assert browser.run("typeof hacked") == "undefined"
        assert service.requests[-1].experts == ("public", "code")

        service.off = set()
        browser.wait("!document.querySelectorAll('#choices input')[1].disabled")
        browser.run("document.querySelectorAll('#choices input')[2].click()")
        ask(browser, "hello", max_tokens=5)
        browser.wait(IDLE)
        assert service.requests[-1].experts == ("public", EVIL)
        assert browser.run("document.getElementById('worked-rows').children.length") == 2
        refused = "(() => { try { document.body.innerHTML = '<b>'; return false } catch { return true } })()"
        assert browser.run(refused), "the policy lets markup in"


@in_a_browser
def test_a_prompt_can_be_stopped_refused_and_cut_off(tmp_path: Path) -> None:
    service = PageService()
    with opened(tmp_path, service) as browser:
        browser.wait(LIVE)
        service.seconds = 0.5
        ask(browser, "over and over", max_tokens=400)
        browser.wait(f"{text('answer')}.length > 3")
        browser.run("document.getElementById('stop').click()")
        assert browser.wait(IDLE).startswith("Stopped after")
        deadline = time.monotonic() + 20
        while service.cancelled != [service.requests[-1].id]:
            assert time.monotonic() < deadline, "the service was not told"
            time.sleep(0.05)

        service.seconds = 0.0
        ask(browser, "x" * 600, max_tokens=5)
        assert "512 tokens" in browser.wait(IDLE)
        service.cut_off = True
        ask(browser, "hello", max_tokens=5)
        assert "the service failed" in browser.wait(IDLE)
        assert browser.run(text("answer")) == "hello"


@in_a_browser
def test_the_page_asks_for_a_key_once(tmp_path: Path) -> None:
    with opened(tmp_path, PageService(), api_keys=(key_digest("sesame"),)) as browser:
        shown = "document.getElementById('key-form')?.hidden === false"
        browser.wait(shown)
        assert browser.run("document.getElementById('main').hidden")
        for key, then in (("wrong", f"{text('key-text')}.includes('does not know')"), ("sesame", LIVE)):
            browser.run(f"document.getElementById('key').value = '{key}'")
            browser.run("document.querySelector('#key-form button').click()")
            browser.wait(then)
        assert not browser.run(shown)
        ask(browser, "hello", max_tokens=5)
        assert browser.wait(IDLE).startswith("Done")
        assert browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0


@in_a_browser
@pytest.mark.slow
def test_the_page_says_when_the_service_is_gone_and_comes_back(tmp_path: Path) -> None:
    service = PageService()
    with contextlib.ExitStack() as stack:
        with served(service):
            browser = stack.enter_context(contextlib.closing(Browser(tmp_path, f"http://127.0.0.1:{PORT}/")))
            browser.wait(LIVE)
            assert browser.run("document.getElementById('notice').hidden")
        assert "does not answer" in browser.wait(text("notice"))
        assert browser.run("document.title") == "no answer · nano"
        ask(browser, "hello", max_tokens=5)
        assert browser.wait(IDLE).startswith("No whole answer")
        with served(service):
            browser.wait(LIVE)
            assert browser.run("document.getElementById('notice').hidden")
