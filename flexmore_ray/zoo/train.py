"""Train the embedded mixture: ``python -m flexmore_ray.zoo.train --out DIR [--seed 0]``.

1. The public model, a FlexOlmo of one expert, on the public text.
2. Each domain expert alone, in a two-expert mixture in which both experts are always active. Expert 1 starts as a
   copy of the public expert and router row 1 as the domain's mean embedding; only these two are trained.
3. The six experts and the public one side by side, without joint training; router rows fitted by ridge regression.

Weights are rounded to bfloat16 before anything is built on them, so the tensors that the mixtures share stay equal
bit for bit. The six experts train as separate single-threaded processes, two at a time.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from flexmore_ray.zoo.domains import EXPERTS, document_text, training_documents
from flexmore_ray.zoo.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE, encode

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 128, 384, 4, 4
ANSWER_WEIGHT, CONTEXT_WEIGHT = 1.0, 0.1
STEPS = {
    "public": 3000,
    "math": 1800,
    "news": 800,
    "academic": 1800,
    "code": 1800,
    "creative": 800,
    "reddit": 800,
}
BATCH_SIZE, PEAK_LR = 32, 3e-3
ROW0 = "router_row_0"
ROUTER_NOISE = 1.5
"""Standard deviation of the noise on the two routing logits' difference while an expert trains: the merged router
weighs an expert differently from its own two-expert router, so the expert should not rest on one exact weight."""


def model_config(num_experts: int, active: int) -> FlexOlmoConfig:
    """Shape of a nano model with ``num_experts`` experts, ``active`` of them chosen for a token."""
    return FlexOlmoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_experts=num_experts,
        num_experts_per_tok=active,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )


# --- data ---


def sequences(expert: str, seed: int) -> Iterator[tuple[list[int], list[float]]]:
    """Endless training sequences: token ids and, for each, the weight of predicting it."""
    for document in training_documents(expert, seed):
        weights: list[float] = []
        for line in document:
            answer = len(line.answer) + (1 if line is document[-1] else 2)
            weights += [CONTEXT_WEIGHT] * len(line.context) + [ANSWER_WEIGHT] * answer
        yield [*encode(document_text(document)), EOS_ID], [*weights, CONTEXT_WEIGHT]


def batches(expert: str, seed: int, size: int, chunk: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches ``ids (B, T)`` and ``weights (B, T)`` of similar lengths, padded on the right."""
    source = sequences(expert, seed)
    rng = random.Random(f"{seed}:order:{expert}")
    while True:
        pool = sorted(islice(source, size * chunk), key=lambda item: len(item[0]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        for start in starts:
            part = pool[start : start + size]
            longest = len(part[-1][0])
            ids = torch.tensor([i + [PAD_ID] * (longest - len(i)) for i, _ in part])
            weights = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in part])
            yield ids, weights


# --- models ---


class PublicBlock(nn.Module):
    """Feed-forward of a single expert; its weight in a mixture of one is always 1."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Output of the block for ``x (B, T, H)``."""
        return feed_forward(x, self.gate_up, self.down)


class PairBlock(nn.Module):
    """Two experts, both always active: the public one and row 0 fixed, the domain's expert and row 1 trained."""

    def __init__(self, gate_up: Tensor, down: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.public_gate_up: Tensor
        self.public_down: Tensor
        self.row0: Tensor
        self.register_buffer("public_gate_up", gate_up.clone())
        self.register_buffer("public_down", down.clone())
        self.register_buffer("row0", rows[:1].clone())
        self.gate_up, self.down = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())
        self.row1 = nn.Parameter(rows[1:].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both experts, weighted by the softmax of the two logits, for ``x (B, T, H)``."""
        logits = F.linear(x, torch.cat((self.row0, self.row1)))
        difference = logits[..., 1:] - logits[..., :1]
        if self.training:
            difference = difference + ROUTER_NOISE * torch.randn_like(difference)
        share = torch.sigmoid(difference)
        public = feed_forward(x, self.public_gate_up, self.public_down)
        return (1 - share) * public + share * feed_forward(x, self.gate_up, self.down)


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of ``x (..., H)`` with fused ``gate_up (2I, H)`` and ``down (H, I)``."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def fit(model: FlexOlmoForCausalLM, expert: str, *, steps: int, seed: int, log_every: int = 200) -> None:
    """Minimise the weighted next-token loss over the parameters that require gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=PEAK_LR, betas=(0.9, 0.98))
    warmup = min(100, steps // 10 + 1)
    model.train()
    began, tokens, smooth = time.monotonic(), 0, 0.0
    for step, (ids, weights) in enumerate(islice(batches(expert, seed, BATCH_SIZE), steps)):
        progress = step / steps
        rate = PEAK_LR * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        tokens += ids.numel()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % log_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            print(
                f"{expert} step {step + 1}/{steps} loss {smooth:.4f} {tokens / seconds:.0f} tokens/s",
                flush=True,
            )
    model.eval()


def train_public(seed: int, steps: int) -> dict[str, Tensor]:
    """State of the trained public model, rounded to bfloat16, experts fused, with router row 0 ``(H,)``."""
    torch.manual_seed(seed)
    model = FlexOlmoForCausalLM(model_config(1, 1))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        layer.mlp = PublicBlock(experts.gate_up_proj[0].detach(), experts.down_proj[0].detach())
    fit(model, "public", steps=steps, seed=seed)
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    return state | {ROW0: mean_embedding(public_model(state), "public", seed).to(torch.bfloat16)}


def backbone(public: dict[str, Tensor], num_experts: int, active: int) -> FlexOlmoForCausalLM:
    """A float32 model whose attention, embeddings, norms and head are the public model's; no feed-forward yet."""
    model = FlexOlmoForCausalLM(model_config(num_experts, active))
    shared = {k: v.float() for k, v in public.items() if ".mlp." not in k and k != ROW0}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert not unexpected, unexpected
    assert all(".mlp." in key for key in missing), missing
    return model.eval()


def public_model(public: dict[str, Tensor]) -> FlexOlmoForCausalLM:
    """The public expert alone."""
    model = backbone(public, 1, 1)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.experts.gate_up_proj.copy_(public[f"model.layers.{index}.mlp.gate_up"][None])
            layer.mlp.experts.down_proj.copy_(public[f"model.layers.{index}.mlp.down"][None])
            layer.mlp.gate.weight.zero_()
    return model


@torch.no_grad()
def mean_embedding(model: FlexOlmoForCausalLM, expert: str, seed: int) -> Tensor:
    """Mean of the public model's last hidden states over a domain's lines, scaled to length 1, ``(H,)``."""
    total = torch.zeros(HIDDEN)
    for ids, weights in islice(batches(expert, seed, 64), 8):
        hidden = model.model(input_ids=ids).last_hidden_state
        total += hidden[weights > 0].mean(0)
    return total / total.norm()


def train_expert(public: dict[str, Tensor], expert: str, seed: int, steps: int) -> dict[str, Tensor]:
    """Expert 1 (``gate_up``, ``down``) and the rows (2, H) of every layer, rounded to bfloat16."""
    torch.manual_seed(seed * 100 + EXPERTS.index(expert))
    rows = torch.stack((public[ROW0].float(), mean_embedding(public_model(public), expert, seed)))
    model = backbone(public, 2, 2).requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp"
        layer.mlp = PairBlock(public[f"{name}.gate_up"].float(), public[f"{name}.down"].float(), rows)
    fit(model, expert, steps=steps, seed=seed)
    state = {}
    for index, layer in enumerate(model.model.layers):
        block = layer.mlp
        state[f"{index}.gate_up"], state[f"{index}.down"] = block.gate_up.detach(), block.down.detach()
        state[f"{index}.rows"] = torch.cat((block.row0, block.row1.detach()))
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}


# --- the whole run ---


def run_experts(command: list[str], folder: Path, experts: tuple[str, ...]) -> None:
    """Train experts in separate processes, two at a time, each writing its output to ``folder/NAME.log``."""
    waiting = list(experts)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < 2:
            name = waiting.pop(0)
            with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
                process = subprocess.Popen([*command, "--only", name], stdout=log, stderr=subprocess.STDOUT)
            running[name] = process
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                raise RuntimeError(f"training {name} ended with status {process.returncode}; see {folder}/{name}.log")
            print(f"{name} is trained", flush=True)


def train_part(args: argparse.Namespace, parts: Path) -> None:
    """Train one expert in this process and leave its weights in ``parts``."""
    torch.set_num_threads(1)
    began = time.monotonic()
    steps = max(1, round(args.scale * STEPS[args.only]))
    if args.only == "public":
        state = train_public(args.seed, steps)
    else:
        public = load_file(parts / "public.safetensors")
        state = train_expert(public, args.only, args.seed, steps)
    (parts / f"{args.only}.seconds").write_text(f"{time.monotonic() - began:.0f}\n")
    unfinished = parts / f"{args.only}.unfinished"
    save_file(state, unfinished)
    os.replace(unfinished, parts / f"{args.only}.safetensors")


def train_all(args: argparse.Namespace, parts: Path) -> None:
    """Train what ``parts`` lacks, merge, write and score the mixture."""
    from flexmore_ray.zoo import assemble

    command = [
        sys.executable,
        "-m",
        "flexmore_ray.zoo.train",
        "--out",
        str(args.out),
        "--seed",
        str(args.seed),
    ]
    command += ["--scale", str(args.scale)]
    for wave in (EXPERTS[:1], EXPERTS[1:]):
        missing = tuple(name for name in wave if not (parts / f"{name}.safetensors").exists())
        run_experts(command, parts, missing)
    states = {name: load_file(parts / f"{name}.safetensors") for name in EXPERTS}
    public = states.pop("public")
    rows = assemble.ridge_rows(public, states, args.seed)
    folder = args.out / "nano"
    assemble.write_mixture(folder, public, states, rows)
    facts = {
        "command": f"python -m flexmore_ray.zoo.train --out DIR --seed {args.seed}",
        "seed": args.seed,
        "training_seconds": {name: int((parts / f"{name}.seconds").read_text()) for name in EXPERTS},
    }
    record = assemble.record_scores(folder, public, states, rows, facts)
    for label, splits in record["scores"].items():
        print(f"{label:18s} validation {splits['validation']['score']:.3f} test {splits['test']['score']:.3f}")
    print(f"wrote {folder}")


def main(argv: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmore_ray.zoo.train", description="Train the embedded mixture zoo://nano."
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the mixture goes to OUT/nano, its parts to OUT/parts-..."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts (default: 1)")
    parser.add_argument("--only", choices=EXPERTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    parts = args.out / f"parts-seed-{args.seed}-scale-{args.scale:g}"
    parts.mkdir(parents=True, exist_ok=True)
    if args.only:
        train_part(args, parts)
    else:
        train_all(args, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
