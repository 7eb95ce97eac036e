"""The training of one expert's factors, by one process or by several together; see `flexmore_ray.heal`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexmore_ray.atomic import write_file
from flexmore_ray.errors import CheckpointError, FlexmoreError, UsageError
from flexmore_ray.expert import opener
from flexmore_ray.heal.pairs import HealedExperts, Pair
from flexmore_ray.heal.ranks import RankDraw
from flexmore_ray.mixture import load_mixture
from flexmore_ray.moments import Root
from flexmore_ray.moments.files import Metric
from flexmore_ray.pairs import own_mixture, replaced_experts
from flexmore_ray.source import Source, with_missing_rows
from flexmore_ray.spec import PROJECTIONS, MatrixKey
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.storage.cache import local_file
from flexmore_ray.store import FactorStore, WeightSource, one_line, open_store, write_safetensors
from flexmore_ray.texts import Document, encode, pad_documents

FORMAT = "flexmore-healing-3"
SAVE_SECONDS = 60.0
OTHERS_EVERY = 4
"""Of so many steps the last one reads what stands in for the texts of others."""
STEP_DAMPING = 0.3
"""Damping of the metric whose coordinates are trained. With less, factors drift where no text at hand tells."""

Progress = Callable[[str, int, int, float], None]
"""Told of an expert, its steps done, steps in all, and the mean loss of a token in the last one, in nats."""
Texts = Sequence[tuple[str, str]]
"""See `texts.read_documents`."""
Pairs = dict[MatrixKey, Pair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How factors are trained.

    Attributes:
        steps: for each expert.
        batch_tokens: tokens of one step, padding included.
        learning_rate: of Adam at its peak, as a share of a row's size in the coordinates that are trained; it rises
            over a twentieth of the steps and falls as a cosine to zero.
        max_rank: highest rank of the healed factors; None means that of the store.
        max_tokens: longer documents are cut.
        seed: of batches and ranks.
    """

    steps: int = 2000
    batch_tokens: int = 1024
    learning_rate: float = 0.02
    max_rank: int | None = None
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--batch-tokens", self.batch_tokens, 1),
            ("--max-rank", 1 if self.max_rank is None else self.max_rank, 1),
            ("--max-tokens", self.max_tokens, 2),
        ):
            if value < least:
                raise UsageError(f"{name}: an integer >= {least} is needed, got {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate: above 0 and finite is needed, got {self.learning_rate}")


def rank_of(store: FactorStore, key: MatrixKey, settings: Settings) -> int:
    """The highest rank of a matrix' healed factors."""
    return min(settings.max_rank or store.max_rank(key), store.max_rank(key))


class Team:
    """Workers that train an expert together; here a single one.

    Attributes:
        device: where this worker computes.
        number: of this worker, from 0, which writes the checkpoint.
        size: how many there are.
    """

    def __init__(self, device: str | torch.device, number: int = 0, size: int = 1) -> None:
        self.device, self.number, self.size = device, number, size

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all workers in place of a tensor."""


class Training:
    """The training of one expert.

    Args:
        source, store, settings, metric: see `heal`.
        name: of the expert.
        checkpoint: file that a run which is killed goes on from.
        public: texts of the public expert's; none where there are none.
    """

    def __init__(
        self,
        source: Source,
        store: FactorStore,
        name: str,
        checkpoint: AnyPath,
        settings: Settings,
        metric: Metric,
        public: Texts = (),
    ) -> None:
        self._source, self._store, self._name = source, store, name
        self._settings, self._checkpoint, self._metric, self._public = settings, checkpoint, metric, public

    def elsewhere(self) -> Callable[[], Training]:
        """What makes the same in another process; it can be sent there."""
        folder, checkpoint = self._store.folder.resolve(), self._checkpoint.resolve()
        folders = tuple(str(open_path(folder).resolve()) for folder in self._metric.folders)
        metric = dataclasses.replace(self._metric, folders=folders)
        again = (folder, self._name, checkpoint, self._settings, metric, self._public)
        return functools.partial(_open_again, opener(self._source, self._name), *again)

    @functools.cached_property
    def start(self) -> dict[MatrixKey, Factors]:
        """The factors of the store."""
        keys = self._source.shape.keys(self._name)
        return {key: self._store.factors(key, rank_of(self._store, key, self._settings)) for key in keys}

    def heal(self, texts: Texts, recipe: str, progress: Progress | None, team: Team) -> dict[MatrixKey, Factors]:
        """Train, from where a run that was killed had come.

        Args:
            texts: of the expert's owner.
            recipe: what decides the factors; a checkpoint of another one is not gone on from.
            progress: told of every step.
            team: who trains; this process is one of them.
        """
        mixture = load_mixture(
            own_mixture(self._source, self._name),
            source=with_missing_rows(self._source),
            device=str(team.device),
            dtype="float32",
        )
        documents = self._documents(mixture.tokenizer, self._name, texts)
        others = self._others(mixture.tokenizer)
        pairs, trained, adam = self._begin(team.device)
        step = self._restore(trained, adam, recipe)
        steps = torch.tensor(float(step), device=team.device)
        team.add_up(steps)
        if steps != team.size * step:
            raise FlexmoreError(f"{self._checkpoint}: workers see different files; --out must be shared by all nodes")
        layers = {
            number: functools.partial(
                HealedExperts, factors={p: pairs[MatrixKey(self._name, number, p)] for p in PROJECTIONS}
            )
            for number in range(mixture.shape.num_layers)
        }
        saved = time.monotonic()
        with replaced_experts(mixture.model, layers):
            while step < self._settings.steps:
                of_others = bool(others) and step % OTHERS_EVERY == OTHERS_EVERY - 1
                loss = self._step(mixture.model, others if of_others else documents, of_others, adam, step, team)
                step += 1
                due = step == self._settings.steps or time.monotonic() - saved > SAVE_SECONDS
                if due and team.number == 0:
                    self._save(trained, adam, step, recipe)
                    saved = time.monotonic()
                if progress:
                    progress(self._name, step, self._settings.steps, loss)
        return _detached(pairs)

    def _documents(self, tokenizer: Any, owner: str, texts: Texts) -> list[Document]:
        """Texts that have a token to predict."""
        documents = [d for d in encode(tokenizer, texts, self._settings.max_tokens) if len(d.ids) > d.start]
        if not documents:
            raise UsageError(f"--data: the texts of {owner} have no token to predict; longer ones are needed")
        return documents

    def _others(self, tokenizer: Any) -> list[Document]:
        """What stands in for the texts of others: public ones, as they are and shuffled; none where none are given."""
        if not self._public:
            return []
        public = self._documents(tokenizer, self._source.experts[0], self._public)
        return public + _shuffled(public, self._settings.seed)

    def finished(self, recipe: str) -> dict[MatrixKey, Factors]:
        """What other processes have trained.

        Raises:
            FlexmoreError: the checkpoint of the last step is not there.
        """
        factors: dict[MatrixKey, Factors] = {}
        for key, start in self.start.items():  # one root in memory at a time
            pairs = {key: Pair(start, "cpu", self._roots(key, "cpu"))}
            if (step := self._restore(_named(pairs), None, recipe)) < self._settings.steps:
                raise FlexmoreError(
                    f"{self._checkpoint}: the workers are done, and step {step} of {self._settings.steps} is here; "
                    "--out must be shared by all nodes"
                )
            factors |= _detached(pairs)
        return factors

    def _begin(self, device: str | torch.device) -> tuple[Pairs, dict[str, Tensor], torch.optim.Adam]:
        """Factors, the same by their names in the checkpoint, and who trains them."""
        pairs = {key: Pair(factors, device, self._roots(key, device)) for key, factors in self.start.items()}
        trained = _named(pairs)
        return pairs, trained, torch.optim.Adam(trained.values(), lr=self._settings.learning_rate, betas=(0.9, 0.99))

    def _roots(self, key: MatrixKey, device: str | torch.device) -> tuple[Root | None, Root | None]:
        if self._metric.weighting == "none":
            return None, None
        moments = self._metric.matrix(self._source, key).to(device)
        try:
            return moments.roots(self._metric.weighting, self._metric.damping)
        except ArithmeticError as error:
            raise CheckpointError(f"{key}: {one_line(error)}; gather its moments again") from None

    @functools.cached_property
    def _ranks(self) -> RankDraw:
        return RankDraw({key: self._store.spectrum(key)[: factors.rank] for key, factors in self.start.items()})

    def _step(
        self,
        model: Any,
        documents: Sequence[Document],
        of_others: bool,
        adam: torch.optim.Adam,
        step: int,
        team: Team,
    ) -> float:
        """One step of Adam; the mean loss of a token."""
        settings, draw = self._settings, random.Random(f"{self._settings.seed} {self._name} {step}")
        batch = _draw_batch(documents, settings.batch_tokens, draw)
        tokens = sum(len(document.ids) - document.start for document in batch)  # predicted by all workers
        ranks = self._ranks.draw(draw)
        share = batch[team.number :: team.size]
        loss = _loss(model, share, ranks, of_others) / tokens if share else torch.zeros((), device=team.device)
        whole = loss.detach().clone()
        team.add_up(whole)
        value = float(whole)
        if not math.isfinite(value):
            raise CheckpointError(
                f"expert {self._name}: the loss of step {step + 1} is {value}; check weights and texts, or lower "
                "--learning-rate, which begins anew"
            )
        for group in adam.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        adam.zero_grad(set_to_none=True)
        if share:
            loss.backward()
        for parameter in adam.param_groups[0]["params"]:
            if parameter.grad is None:  # rows that no rank drawn has reached yet
                parameter.grad = torch.zeros_like(parameter)
            team.add_up(parameter.grad)
        adam.step()
        return value

    def _save(self, trained: Mapping[str, Tensor], adam: torch.optim.Adam, step: int, recipe: str) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
        for name, parameter in trained.items():
            for part in ("exp_avg", "exp_avg_sq"):
                tensors[f"{part} {name}"] = adam.state[parameter][part].cpu().contiguous()
        about = json.dumps({"format": FORMAT, "recipe": recipe, "step": step})
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._checkpoint, lambda file: write_safetensors(file, tensors, {"about": about}))

    def _restore(self, trained: Mapping[str, Tensor], adam: torch.optim.Adam | None, recipe: str) -> int:
        """Steps that a run which was killed has saved; its factors and Adam's state, if wanted, are put in place."""
        if not self._checkpoint.exists():
            return 0
        try:
            with safe_open(str(local_file(self._checkpoint)), framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                if (about["format"], about["recipe"]) != (FORMAT, recipe):
                    return 0  # of another run
                with torch.no_grad():
                    for name, parameter in trained.items():
                        parameter.copy_(file.get_tensor(name))
                        if adam is None:
                            continue
                        state = {part: file.get_tensor(f"{part} {name}") for part in ("exp_avg", "exp_avg_sq")}
                        adam.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
                        adam.state[parameter]["step"] = torch.tensor(float(about["step"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise FlexmoreError(f"{self._checkpoint}: cannot be read ({reason}); delete it to train anew") from None
        return int(about["step"])


def _open_again(
    open_source: Callable[[], WeightSource],
    folder: AnyPath,
    name: str,
    checkpoint: AnyPath,
    settings: Settings,
    metric: Metric,
    public: Texts,
) -> Training:
    return Training(cast(Source, open_source()), open_store(folder), name, checkpoint, settings, metric, public)


def _named(pairs: Pairs) -> dict[str, Tensor]:
    """What is trained, by its names in the checkpoint."""
    return {
        f"{side} {key.layer} {key.projection}": rows
        for key, pair in pairs.items()
        for side, rows in zip("ab", pair.rows, strict=True)
    }


def _detached(pairs: Pairs) -> dict[MatrixKey, Factors]:
    with torch.no_grad():
        return {key: pair.factors() for key, pair in pairs.items()}


def _loss(model: Any, batch: Sequence[Document], ranks: Mapping[MatrixKey, int], of_others: bool) -> Tensor:
    """KL(teacher || student) of all predicted tokens of a batch, the student at some ranks."""
    ids, predicted = pad_documents(batch, next(model.parameters()).device)
    healed = [layer.mlp.experts for layer in model.model.layers]
    for experts in healed:
        experts.ranks = dict.fromkeys(PROJECTIONS, 0) if of_others else None
    with torch.no_grad():
        teacher = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    for layer, experts in enumerate(healed):
        experts.ranks = {key.projection: rank for key, rank in ranks.items() if key.layer == layer}
    student = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return ((teacher.exp() * (teacher - student)).sum(-1) * predicted[:, 1:]).sum()


def _shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """Documents with their tokens in random order, all of them but the first to be predicted."""
    draw = random.Random(f"{seed} shuffled")
    return [Document(draw.sample(d.ids, len(d.ids)), 1) for d in documents]


def _draw_batch(documents: Sequence[Document], tokens: int, draw: random.Random) -> list[Document]:
    """Random documents, as many as `tokens` hold, padding included; at least one, and none twice."""
    batch: list[Document] = []
    longest = 0
    for index in draw.sample(range(len(documents)), min(len(documents), max(1, tokens))):
        longest = max(longest, len(documents[index].ids))
        if batch and (len(batch) + 1) * longest > tokens:
            break
        batch.append(documents[index])
    return batch


def _schedule(step: int, steps: int) -> float:
    rise = max(1, steps // 20)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)))


Train = Callable[[Training, Texts, str, Progress | None], dict[MatrixKey, Factors]]
"""`Training.heal` by some team."""
