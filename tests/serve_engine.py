"""An engine without a model, for replicas that are processes of their own: what it does is written to a file."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from flexmore_ray.spec import MixtureSpec
from serve.job import EndedRequest, Observer
from serve.request import Delta, Request, Usage
from serve.settings import Settings


@dataclasses.dataclass(frozen=True)
class FakeEngineMaker:
    """Makes a `FakeEngine` in a replica.

    Args:
        log: file that gets a line for everything that happens.
        seconds: for each token.
    """

    log: str
    seconds: float = 0.0

    def __call__(
        self, spec: MixtureSpec, settings: Settings, remote: Mapping[str, Any], observer: Observer
    ) -> FakeEngine:
        return FakeEngine(self, observer)


class FakeEngine:
    """Generates tokens that depend on the seed and their place alone, one at a time."""

    def __init__(self, maker: FakeEngineMaker, observer: Observer) -> None:
        self._maker, self._observer = maker, observer
        self._running = 0
        self.is_alive = False

    def start(self) -> None:
        self.is_alive = True
        self._note("started")

    def stop(self) -> None:
        self.is_alive = False

    async def generate(self, request: Request) -> tuple[list[Delta], Usage]:
        deltas = [item async for item in self.stream(request) if isinstance(item, list)]
        tokens = [delta.token_ids[0] for (delta,) in deltas]
        text = "".join(delta.text for (delta,) in deltas)
        return [Delta(sequence=0, text=text, token_ids=tokens, finish_reason="length")], self._usage(request)

    async def stream(self, request: Request) -> AsyncIterator[list[Delta] | Usage]:
        self._note(f"began {request.id} {','.join(request.experts or ['all'])}")
        self._running += 1
        outcome = "cancelled"
        try:
            for place in range(request.max_tokens):
                await asyncio.sleep(self._maker.seconds)
                last = place == request.max_tokens - 1
                token = 97 + (request.seed * 31 + place * 7) % 26
                self._observer.stepped(1, self._running, self._maker.seconds)
                yield [Delta(sequence=0, text=chr(token), token_ids=[token], finish_reason="length" if last else None)]
            outcome = "done"
            yield self._usage(request)
        finally:
            self._running -= 1
            self._note(f"{outcome} {request.id}")
            usage = self._usage(request)
            self._observer.ended(
                EndedRequest(outcome=outcome, usage=usage, seconds=0.1, first_token=0.01, per_token=0.01)  # type: ignore[arg-type]
            )

    def stats(self) -> dict[str, Any]:
        return {
            "running": self._running,
            "waiting": 0,
            "cache": 0.5,
            "cached": 0.25,
            "totals": {"requests": 1, "prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 0},
            "shares": {"public": 0.75, "math": 0.25},
            "recent": [(1.0, 0.01, 0.02, 0.1)],
            "lost": [],
            "alive": self.is_alive,
        }

    def _usage(self, request: Request) -> Usage:
        prompt = sum(map(len, request.prompts))
        return Usage(prompt_tokens=prompt, completion_tokens=request.max_tokens, experts={"public": 1.0})

    def _note(self, line: str) -> None:
        with Path(self._maker.log).open("a") as file:
            file.write(f"{os.getpid()} {line}\n")
