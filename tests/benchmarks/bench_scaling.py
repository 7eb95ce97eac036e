"""Replicas that come with load and go with it: of the mixture, and of an expert placed on its own, from none to none.

    python -m tests.benchmarks.bench_scaling --figure .readme/serve-scaling.png

The expert of the embedded mixture is so small that it computes for a few percent of the time even under load, so its
target is set to 2 % here; Serve's delays are shortened. Every answer has to be a 200.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmore_ray.spec import MixtureSpec
from tests.serve_process import Server, drive, serving

CLIENTS = (2, 16, 4)
"""Clients of each phase."""
PHASE_SECONDS = 45.0
IDLE_SECONDS = 75.0
EXPERT = "academic"
RANKS: dict[str, Any] = {"math": 16, "code": 8, "news": 8, EXPERT: {"rank": "full", "placement": "own"}}
SETTINGS = {
    "target_ongoing_requests": 6,
    "upscale_delay_s": 3,
    "downscale_delay_s": 12,
    "expert_target_busy": 0.02,
    "expert_cpus": 0.2,
}
OPTIONS = ("--cpus", "0.3", "--min-replicas", "0", "--max-replicas", "2")
EXPERT_OPTIONS = ("--expert-min-replicas", "0", "--expert-max-replicas", "2")
Sample = tuple[float, int, int, int]
"""Seconds, clients, mixture replicas, expert replicas."""


def run(quick: bool = False, figure: Path | None = None) -> dict[str, object]:
    """Highest and last number of replicas of both deployments, and the requests that were answered."""
    with tempfile.TemporaryDirectory() as folder:
        mixture = Path(folder) / "scaling.yaml"
        MixtureSpec.from_dict({"source": "zoo://nano", "ranks": RANKS, "active": 4}).save(mixture)
        settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        with serving(Path(folder), mixture, *OPTIONS, *EXPERT_OPTIONS, *settings) as server:
            samples, answered = _load(server, (16,) if quick else CLIENTS)
    seconds, _, mixtures, experts = zip(*samples, strict=True)
    result = {
        "answered": answered,
        "seconds": seconds[-1],
        "mixture_replicas": {"first": mixtures[0], "most": max(mixtures), "last": mixtures[-1]},
        "expert_replicas": {"first": experts[0], "most": max(experts), "last": experts[-1]},
    }
    print(
        f"scaling: {answered} requests, all answered; mixture replicas {mixtures[0]} -> {max(mixtures)} -> "
        f"{mixtures[-1]}, expert replicas {experts[0]} -> {max(experts)} -> {experts[-1]}"
    )
    if figure is not None:
        _draw(samples, figure)
    return result


def _load(server: Server, phases: Sequence[int]) -> tuple[list[Sample], int]:
    """Drive one phase after the other, watching; then wait."""
    samples: list[Sample] = []
    start, now, ended = time.monotonic(), collections.Counter[str](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            running = {p: len(server.replicas(p)) for p in ("mixture", f"expert-{EXPERT}")}
            samples.append((time.monotonic() - start, now["clients"], *running.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answered = 0
    try:
        time.sleep(5)
        for number, clients in enumerate(phases):
            now["clients"], began = clients, time.monotonic()
            while time.monotonic() - began < PHASE_SECONDS:
                body = {"model": "scaling", "max_tokens": 40, "temperature": 1.0}
                load = drive(server.url, [body | {"prompt": f"{number}+{i}="} for i in range(4 * clients)], clients)
                answered += len(load.latencies)
        now["clients"] = 0
        time.sleep(IDLE_SECONDS)
    finally:
        ended.set()
        watcher.join()
    return samples, answered


def _draw(samples: Sequence[Sample], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, clients, mixtures, experts = zip(*samples, strict=True)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 3.6), height_ratios=(1, 1.6))
    above.fill_between(seconds, clients, step="post", color="#9aa5b1", linewidth=0)
    above.set_ylabel("clients")
    below.step(seconds, mixtures, where="post", label="mixture replicas", color="#1f77b4", linewidth=2)
    below.step(
        seconds, [n + 0.04 for n in experts], where="post", label=f"replicas of expert {EXPERT}", color="#d95f02"
    )
    below.set_yticks(range(max(*mixtures, *experts) + 1))
    below.set_ylabel("processes")
    below.set_xlabel("seconds")
    below.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it as a PNG")
    print(json.dumps(run(figure=parser.parse_args().figure)))
