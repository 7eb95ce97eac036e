"""The two-expert mixture in which an owner reads its own texts: the public expert and its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from flexmore_ray.modeling import FlexMoreExpert, FlexMoreExperts
from flexmore_ray.source import Source
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, ExpertRank, MixtureSpec


def own_mixture(source: Source, name: str, rank: ExpertRank = FULL) -> MixtureSpec:
    """Description of an expert's two-expert mixture, the expert at a rank; of the public expert, the public model."""
    ranks: dict[str, ExpertRank] = dict.fromkeys(source.experts[1:], DROP)
    if name == source.experts[0]:
        return MixtureSpec(ranks=ranks, active=1)
    return MixtureSpec(ranks=ranks | {name: rank}, active=2)


class PairExperts(nn.Module):
    """The experts of one layer of a two-expert mixture, every token through both, products of the second one open.

    Args:
        experts: the layer's own, the public one first.
    """

    def __init__(self, experts: FlexMoreExperts) -> None:
        super().__init__()
        self._experts = [experts]  # in a list, so that they are no submodule here

    def matrix(self, projection: str, expert: int = 1) -> Tensor:
        """A matrix (out, in) of an expert, which may have been born low-rank."""
        experts = cast("list[FlexMoreExpert]", list(self._experts[0]))
        dense = experts[expert].dense(projection)
        if dense is not None:
            return dense
        lora_a, lora_b = experts[expert].pair(projection)
        return self.matrix(projection, 0) + lora_b @ lora_a

    def own(self, projection: str, x: Tensor, public: Callable[[], Tensor]) -> Tensor:
        """Product of the domain expert's matrix with x (T, in): (T, out).

        Args:
            projection: which matrix.
            x: what it is multiplied with.
            public: gives the public expert's product with the same x.
        """
        return F.linear(x, self.matrix(projection))

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `FlexMoreExperts.forward`."""
        act = self._experts[0].act
        shares = [(top_k_weights * (top_k_index == e)).sum(-1, keepdim=True) for e in (0, 1)]
        gate, up, down = (self.matrix(projection, 0) for projection in PROJECTIONS)
        base_gate, base_up = F.linear(x, gate), F.linear(x, up)
        y = F.linear(act(base_gate) * base_up, down) * shares[0]
        hidden = act(self.own("gate_proj", x, lambda: base_gate)) * self.own("up_proj", x, lambda: base_up)
        return y + self.own("down_proj", hidden, lambda: F.linear(hidden, down)) * shares[1]


@contextlib.contextmanager
def replaced_experts(model: nn.Module, make: Mapping[int, Callable[[FlexMoreExperts], nn.Module]]) -> Iterator[None]:
    """Put other modules in the place of some layers' experts for as long as the block runs.

    Args:
        model: a `FlexMoreForCausalLM`.
        make: by layer, what makes the module from the layer's experts.
    """
    blocks = {number: cast(Any, model).model.layers[number].mlp for number in make}
    before = {number: block.experts for number, block in blocks.items()}
    try:
        for number, block in blocks.items():
            block.experts = make[number](before[number])
        yield
    finally:
        for number, block in blocks.items():
            block.experts = before[number]
