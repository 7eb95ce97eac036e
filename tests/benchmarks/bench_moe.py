"""One MoE block at 7B width: the shared-base forward against its peers, and rank switching.

    python -m tests.benchmarks.bench_moe

Width 4096, inner 11008, bf16, ranks 2048, 256, 64, 8, 4, 1 beside the public expert, the router's
choices uniform at random. Peers: transformers' expert implementations on seven full experts (the
best of them for each shape), and the published form of the low-rank experts, which runs the public
expert's projections again for every chosen expert.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

from flexmore_ray.modeling import FlexMoreConfig, FlexMoreExperts

RANKS = [0, 2048, 256, 64, 8, 4, 1]
TOKENS = (1, 16, 256)
ACTIVE = (2, 4, 7)
PEERS = ("eager", "batched_mm", "grouped_mm")


def shared_base(sizes: dict[str, int], dtype: torch.dtype) -> FlexMoreExperts:
    """Our experts with random weights."""
    config = FlexMoreConfig(**sizes, expert_ranks=RANKS)
    with torch.device("meta"):
        experts = FlexMoreExperts(config, 0)
    for expert in experts:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            dense = expert.dense(projection)
            if dense is not None:
                expert.set_dense(projection, _normal(dense.shape, dtype))
            else:
                a, b = expert.pair(projection)
                expert.set_pair(projection, _normal(a.shape, dtype), _normal(b.shape, dtype))
    return experts


def full_experts(sizes: dict[str, int], dtype: torch.dtype) -> FlexOlmoExperts:
    """Seven full experts as transformers holds them."""
    with torch.device("meta"):
        experts = FlexOlmoExperts(FlexOlmoConfig(**sizes))
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(experts, name).shape
        setattr(experts, name, torch.nn.Parameter(_normal(shape, dtype), requires_grad=False))
    return experts


def published_form(experts: FlexMoreExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each chosen expert runs the public expert's projections and its own correction."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        place = index == e
        rows = place.any(1).nonzero().squeeze(1)
        if len(rows) == 0:
            continue

        def project(projection: str, values: Tensor, e: int = e, expert: torch.nn.Module = expert) -> Tensor:
            out = F.linear(values, experts[0].dense(projection))
            if e == 0:
                return out
            a, b = expert.pair(projection)
            return out + F.linear(F.linear(values, a), b)

        xe = x[rows]
        hidden = F.silu(project("gate_proj", xe)) * project("up_proj", xe)
        y.index_add_(0, rows, project("down_proj", hidden) * (weights * place).sum(1, keepdim=True)[rows])
    return y


def _normal(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def run(quick: bool = False) -> dict[str, object]:
    """Median seconds and ratios for every number of tokens and of active experts."""
    torch.manual_seed(0)
    scale = 8 if quick else 1
    sizes = {
        "hidden_size": 4096 // scale,
        "intermediate_size": 11008 // scale,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "num_experts": len(RANKS),
        "pad_token_id": 0,
    }
    ours, full = shared_base(sizes, torch.bfloat16), full_experts(sizes, torch.bfloat16)
    rows = []
    for active in ACTIVE:
        for tokens in TOKENS:
            rows.append(_one(ours, full, tokens, active, seconds=0.3 if quick else 5.0))
            print(_line(rows[-1]), flush=True)
    by_active = {
        f"ratio_active_{k}": statistics.geometric_mean(r["ratio"] for r in rows if r["active"] == k) for k in ACTIVE
    }
    for name, ratio in by_active.items():
        print(f"{name}: {ratio:.2f} (geometric mean over {', '.join(map(str, TOKENS))} tokens)")
    return {"rows": rows, **by_active}


def _one(ours: FlexMoreExperts, full: FlexOlmoExperts, tokens: int, active: int, seconds: float) -> dict[str, float]:
    hidden = full.hidden_dim
    batches = []
    for seed in range(7 if tokens == 1 else 1):  # with one token the cost depends on who is chosen
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        scores = torch.rand(tokens, len(RANKS), generator=generator)
        weights, index = scores.softmax(-1).topk(active)
        batches.append((x, index, weights.to(torch.bfloat16)))

    def peer(name: str) -> Callable[[], object]:
        def call() -> None:
            full.config._experts_implementation = name
            for batch in batches:
                full(*batch)

        return call

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: [ours(*batch) for batch in batches],
        "published": lambda: [published_form(ours, *batch) for batch in batches],
    }
    # batched_mm copies the weights of every (token, expert) pair: 270 MB each.
    names = [name for name in PEERS if name != "batched_mm" or tokens * active <= 8]
    times = medians(calls | {name: peer(name) for name in names}, seconds)
    best = min(names, key=lambda name: times[name])
    return {
        "tokens": tokens,
        "active": active,
        "seconds": times["ours"] / len(batches),
        "best_peer": best,
        "best_peer_seconds": times[best] / len(batches),
        "ratio": times[best] / times["ours"],
        "ratio_to_published_form": times["published"] / times["ours"],
    }


def _line(row: dict[str, float]) -> str:
    return (
        f"active {row['active']}  tokens {row['tokens']:>3}  {1e3 * row['seconds']:8.1f} ms  "
        f"best of transformers ({row['best_peer']}) {row['ratio']:.2f}x  "
        f"published form {row['ratio_to_published_form']:.2f}x"
    )


if __name__ == "__main__":
    print(json.dumps(run()))
