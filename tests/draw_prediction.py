"""python -m tests.draw_prediction --store weighted --out prediction.png

What a store's energies say that dropping directions costs, against what it costs: random rank assignments of
`zoo://nano`, the loss of every owner's held-out texts in its own two-expert mixture and in the whole mixture. An
expert's discarded energy is the mean square change of a token's log-odds to be expected; its root, the change itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flexmore_ray.budget import Spectra, discarded_energy
from flexmore_ray.mixture import Mixture, load_mixture
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, ExpertRank, MixtureSpec
from flexmore_ray.store import open_store
from flexmore_ray.texts import batches, encode, pad_documents
from flexmore_ray.zoo.domains import document_text, training_documents

ACTIVE, DOCUMENTS, BATCH_TOKENS = 4, 100, 4096
HELD_OUT = 1_000_003
"""Seed of the held-out texts; the moments' are of small ones."""


def held_out(mixture: Mixture, expert: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of an owner's questions and answers: token ids and which of them are predicted."""
    pairs: list[tuple[str, str]] = []
    for document in training_documents(expert, HELD_OUT):
        pairs += [(line.context, document_text([line])[len(line.context) :]) for line in document]
        if len(pairs) >= DOCUMENTS:
            break
    documents = encode(mixture.tokenizer, pairs[:DOCUMENTS], 512)
    return [pad_documents(batch, torch.device("cpu")) for _, batch in batches(documents, BATCH_TOKENS)]


@torch.no_grad()
def loss(mixture: Mixture, texts: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss of a predicted token, in nats."""
    total = count = 0.0
    for ids, predicted in texts:
        logits = mixture.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((losses * predicted[:, 1:]).sum())
        count += float(predicted[:, 1:].sum())
    return total / count


def assignments(mixture: Mixture, count: int, seed: int) -> Iterator[dict[str, ExpertRank]]:
    """Random ranks: of each expert one between 1 and full, log-uniform; in every other assignment also by matrix."""
    draw, full = random.Random(seed), mixture.shape.full_rank
    for number in range(count):
        ranks: dict[str, ExpertRank] = {}
        for name in mixture.experts[1:]:
            common = full ** draw.random()
            if number % 2:
                layers = range(mixture.shape.num_layers)
                values = {p: [common * 2.0 ** draw.uniform(-1.5, 1.5) for _ in layers] for p in PROJECTIONS}
                ranks[name] = {p: [max(1, min(full, round(v))) for v in row] for p, row in values.items()}
            else:
                ranks[name] = max(1, round(common))
        yield ranks


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of the ranks of two samples without ties."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def measure(store: str, count: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """`predicted`, `pairs` and `whole`, each (assignments, experts)."""
    spec = MixtureSpec(source=("zoo://nano",), store=store, active=ACTIVE)
    mixture = load_mixture(spec, hold_rank=10**6)
    experts, held = mixture.experts[1:], open_store(store)
    spectra: Spectra = {key: held.spectrum(key).numpy() for key in list(held.keys())}
    texts = {name: held_out(mixture, name) for name in experts}

    def losses(ranks: dict[str, ExpertRank]) -> tuple[list[float], list[float]]:
        mixture.switch(ranks, ACTIVE)
        whole = [loss(mixture, texts[name]) for name in experts]
        pairs = []
        for name in experts:
            mixture.switch(dict.fromkeys(experts, DROP) | {name: ranks[name]}, 2)
            pairs.append(loss(mixture, texts[name]))
        return pairs, whole

    own = {name: {key: s for key, s in spectra.items() if key.expert == name} for name in experts}
    best = np.array(losses(dict.fromkeys(experts, FULL)))
    rows = []
    for ranks in assignments(mixture, count, seed):
        found = np.array(losses(ranks)) - best
        mixture.switch(ranks, ACTIVE)
        rows.append([[discarded_energy(own[name], mixture.assignment) for name in experts], *found])
    predicted, pairs, whole = np.array(rows).transpose(1, 0, 2)
    return {"predicted": predicted, "pairs": pairs, "whole": whole}


def draw(measured: dict[str, NDArray[np.float64]], path: Path) -> dict[str, float]:
    """Draw both; returns their correlations, those with the sums of energies without a root too."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, layout="constrained")
    x, out = np.sqrt(measured["predicted"]).sum(1), {}
    for axis, (name, title) in zip(
        axes, (("pairs", "two-expert mixtures"), ("whole", "the whole mixture")), strict=True
    ):
        y = measured[name].sum(1)
        out |= {name: spearman(x, y), f"{name}, energy": spearman(measured["predicted"].sum(1), y)}
        axis.scatter(x, y, s=9, alpha=0.7)
        axis.set(title=f"{title}: Spearman {out[name]:.3f}", xlabel="predicted: change of log-odds, sum over experts")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("increase of the loss, nats a token, all owners")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--store", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(args.store, args.count, args.seed)
    print(json.dumps({"assignments": args.count} | draw(measured, args.out)))


if __name__ == "__main__":
    main()
