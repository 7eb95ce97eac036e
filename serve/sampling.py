"""The next token of every sequence of a batch, and log-probabilities.

    R   rows: sequences that get a token        V   vocabulary

A sequence brings its own random number u in [0, 1), so what it draws depends on nothing else in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.request import TokenLogprob

COLDEST = 1e-5
"""A temperature below it is this one, so that quotients stay finite."""


def choose(logits: Tensor, temperature: list[float], top_p: list[float], uniform: list[float]) -> Tensor:
    """Choose one token per row.

    Args:
        logits: (R, V) float32.
        temperature: of each row; 0 takes the most likely token.
        top_p: of each row, in (0, 1]: the fewest tokens that together have this probability are kept.
        uniform: of each row, in [0, 1): where in the cumulated probability of the kept tokens to draw.

    Returns:
        (R,) token ids.
    """
    best = logits.argmax(dim=-1)
    rows = [row for row, value in enumerate(temperature) if value > 0]
    if not rows:
        return best
    device = logits.device
    scale, keep, draw = (
        torch.tensor([values[row] for row in rows], device=device).unsqueeze(1)
        for values in (temperature, top_p, uniform)
    )
    probabilities, order = (
        (logits[rows] / scale.clamp(min=COLDEST)).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    )
    cumulated = probabilities.cumsum(dim=-1)
    kept = (cumulated - probabilities < keep).sum(dim=-1, keepdim=True).clamp(min=1)
    target = draw * cumulated.gather(1, kept - 1)
    place = torch.minimum((cumulated <= target).sum(dim=-1, keepdim=True), kept - 1)
    best[rows] = order.gather(1, place).squeeze(1)
    return best


def logprobs(logits: Tensor, token_ids: list[int], top: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of one token per row, and of the most likely ones.

    Args:
        logits: (R, V) float32.
        token_ids: the token of each row.
        top: how many of the most likely tokens each row wants.
    """
    values = logits.log_softmax(dim=-1)
    chosen = values.gather(1, torch.tensor(token_ids, device=values.device).unsqueeze(1)).squeeze(1).tolist()
    best, ids = values.topk(max(max(top), 1), dim=-1)
    rows = zip(token_ids, chosen, ids.tolist(), best.tolist(), top, strict=True)
    return [TokenLogprob(token, value, tuple(zip(i[:k], v[:k], strict=True))) for token, value, i, v, k in rows]
