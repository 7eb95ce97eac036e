"""Healing: train the factors of an expert until its mixture says what it said with the full expert.

Only the factors are trained, on the owner's texts and what stands in for those of others, and only their own two-expert
mixture is needed: the teacher is the same mixture with the full expert, or for texts of others without it. The loss of
a predicted token is KL(teacher || student). Every step draws the ranks anew, one for each matrix, and trains leading
rows of one pair A, B: so all ranks stay slices of that pair, as after a decomposition, and no rank has to be chosen
before. Most draws give the matrices what the store's energies would under some budget, as rule "optimal" does.

With moments the rows are trained in the coordinates of their metric, A L_C and B^T L_G (see `flexmore_ray.moments`):
there a step of one size changes what is predicted about as much in every direction, so Adam wastes fewer of them
(K-FAC, Martens and Grosse, arXiv 1503.05671, seen from the coordinates).

In the whole mixture tokens of other domains go through the expert too, and their texts are not at hand. Public texts,
as they are and with their tokens in random order, stand in for them, where they are given: on these the expert learns
to say what the public expert says, so that it does no harm to them. (The full expert does some.)

    OUT                     a store like any other, its weighting "healed"
    OUT/healing/EXPERT.safetensors    factors, Adam's state and the step, every minute: what a killed run goes on from

Several workers train an expert together: all draw the same batch and ranks, and each takes its share of the documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexmore_ray.atomic import write_file
from flexmore_ray.build import StoreWriter
from flexmore_ray.errors import CheckpointError, FlexmoreError, UsageError
from flexmore_ray.expert import opener
from flexmore_ray.mixture import load_mixture
from flexmore_ray.modeling import FlexMoreExperts
from flexmore_ray.moments import Root
from flexmore_ray.moments.files import Metric
from flexmore_ray.pairs import PairExperts, own_mixture, replaced_experts
from flexmore_ray.source import Source, with_missing_rows
from flexmore_ray.spec import PROJECTIONS, MatrixKey
from flexmore_ray.spectra import Decomposition, Factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.storage.cache import local_file
from flexmore_ray.store import MANIFEST, Entry, FactorStore, WeightSource, one_line, open_store, write_safetensors
from flexmore_ray.texts import Document, check_owners, encode, pad_documents, read_documents

FORMAT = "flexmore-healing-3"
SAVE_SECONDS = 60.0
OTHERS_EVERY = 4
"""Of so many steps the last one reads what stands in for the texts of others."""
STEP_DAMPING = 0.3
"""Damping of the metric whose coordinates are trained. With less, factors drift where no text at hand tells."""
UNIFORM_SHARE = 0.15
"""Share of steps in which all matrices have about the same rank, instead of what their energies give them."""
LEAST_LEVEL = 0.4
"""The lowest mean rank that energies are asked for is the highest rank to this power."""

Progress = Callable[[str, int, int, float], None]
"""Told of an expert, its steps done, steps in all, and the mean loss of a token in the last one, in nats."""
Texts = Sequence[tuple[str, str]]
"""See `texts.read_documents`."""


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

    steps: int = 1000
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What decided the factors of a healed store; see `moments.files.Metric`."""

    healed: Mapping[str, str]
    """By healed expert; factors of the others are as the store has them."""
    store: FactorStore
    weighting: str = "healed"

    def recipe(self, key: MatrixKey) -> str:
        return self.healed.get(key.expert) or self.store.entry(key).recipe


def heal(
    source: Source,
    store: FactorStore,
    data: Mapping[str, AnyPath],
    out: str | AnyPath,
    settings: Settings | None = None,
    *,
    metric: Metric | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    train: Train | None = None,
) -> FactorStore:
    """Train the factors of some experts into a store of their own; those of the others are taken over as they are.

    Experts that `out` has healed before, and of which no texts are given now, stay as they are there.

    Args:
        source: the experts, which are the teachers.
        store: where training begins; its spectra are taken over too, for rules that allocate ranks.
        data: by expert the file of its owner's texts, see `texts.read_documents`. Under the public expert's name
            texts that every owner may have: on these each healed expert is to do what the public one does, so that in
            the mixture it does no harm to tokens that are not of its domain.
        out: the store to make, or to go on with.
        settings: None means their defaults.
        metric: whose coordinates are trained, best with `STEP_DAMPING`; None means the entries of the factors. Its
            roots are held for all matrices of an expert at once.
        device: where to train; factors and Adam's state are float32, the mixture is computed in float32.
        progress: told of what is done.
        train: trains an expert, such as `heal_ray.Workers`; None means in this process.

    Raises:
        UsageError: an expert that the source has not, no texts; texts that moments count twice.
        StoreError: the store is of other weights.
        CheckpointError: the loss is not finite; moments that no text can have.
        FlexmoreError: `out` is of another run; moments are missing, not finished or of another model.
    """
    out, settings, metric = open_path(out), settings or Settings(), metric or Metric()
    train = train or functools.partial(Training.heal, team=Team(device))
    public, domain = source.experts[0], source.experts[1:]
    texts = {name: read_documents(path) for name, path in data.items()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in data.items()}
    shared = texts.pop(public, [])
    check_owners(texts, domain)
    if out.resolve() == store.folder.resolve():
        raise UsageError(f"--out: a store of its own is needed, got {out}, which is --store")
    before = open_store(out) if (out / MANIFEST).exists() else None
    if before is not None and before.weighting != "healed":
        raise UsageError(
            f"--out: {out} holds a store of weighting {before.weighting}; name a new folder, or one of healed factors"
        )
    store.check_source(source)
    metric.check(source, list(texts))
    recipes = {}
    for name in texts:
        keys = source.shape.keys(name)
        begun = [store.recipe(name), str(store.dtype), [_rank(store, key, settings) for key in keys]]
        coordinates = [metric.recipe(key) for key in keys]
        about = [FORMAT, name, begun, coordinates, digests[name], digests.get(public), dataclasses.asdict(settings)]
        recipes[name] = f"healed:{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]}"
    writer = StoreWriter(out, str(store.dtype).removeprefix("torch."), _Recipe(healed=recipes, store=store))
    entries: list[Entry] = []
    for name in domain:
        keys = source.shape.keys(name)
        if name not in texts and before is not None and _is_healed(before, keys):
            continue
        found = [_find(writer, source, store, key, settings) for key in keys]
        if any(entry is None for entry in found):
            file = out / "healing" / f"{name}.safetensors"
            training = Training(source, store, name, file, settings, metric, shared)
            trained = train(training, texts[name], recipes[name], progress) if name in texts else training.start
            found = [_put(writer, source, store, key, trained[key]) for key in keys]
        entries += [entry for entry in found if entry is not None]
    healed = writer.commit(entries, source)
    for name in texts:
        (out / "healing" / f"{name}.safetensors").unlink(missing_ok=True)
    return healed


def _is_healed(store: FactorStore, keys: Sequence[MatrixKey]) -> bool:
    return set(keys) <= set(store.keys()) and all(store.entry(key).recipe.startswith("healed:") for key in keys)


def _rank(store: FactorStore, key: MatrixKey, settings: Settings) -> int:
    return min(settings.max_rank or store.max_rank(key), store.max_rank(key))


def _find(writer: StoreWriter, source: Source, store: FactorStore, key: MatrixKey, settings: Settings) -> Entry | None:
    digests = source.digest(key), source.digest(key._replace(expert=source.experts[0]))
    return writer.find(key, _rank(store, key, settings), *digests)


def _put(writer: StoreWriter, source: Source, store: FactorStore, key: MatrixKey, factors: Factors) -> Entry:
    digests = source.digest(key), source.digest(key._replace(expert=source.experts[0]))
    values = store.spectrum(key)
    result = Decomposition(
        factors=Factors(factors.a.contiguous(), factors.bt.contiguous()),
        singular_values=values,
        residual_energy=store.residual_energy(key),
        method="healed",
        rejected=(),
        error_ratio=store.entry(key).error_ratio,
    )
    return writer.put(key, result, *digests)


# ------------------------------------------------------------------------------------- training


Pairs = dict[MatrixKey, "Pair"]


class Pair:
    """Factors in training. Each row counts in units of its size at the start, so one learning rate suits all rows.

    Args:
        start: the factors to begin with.
        device: where they are trained.
        roots: of the metrics in which their rows are trained, of outputs and of inputs; None means as they are.

    Attributes:
        rows: what is trained, of A and of B transposed, float32; a row's root mean square is 1 at the start.
    """

    def __init__(
        self, start: Factors, device: str | torch.device, roots: tuple[Root | None, Root | None] = (None, None)
    ) -> None:
        self.rows: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._roots = roots[::-1]
        for part, root in zip((start.a, start.bt), self._roots, strict=True):
            rows = part.float().to(device)
            rows = rows if root is None else root.scale(rows)
            sizes = rows.square().mean(1, keepdim=True).sqrt()
            self.rows.append((rows / sizes.where(sizes > 0, 1)).requires_grad_())
            self._sizes.append(sizes)

    def factors(self, rank: int | None = None) -> Factors:
        """The factors at a rank; None means all of them."""
        parts = []
        for rows, sizes, root in zip(self.rows, self._sizes, self._roots, strict=True):
            part = rows[:rank] * sizes[:rank]
            parts.append(part if root is None else root.unscale(part))
        return Factors(*parts)


class _Healed(PairExperts):
    """The experts of one layer; the domain expert full, or as leading rows of trained factors."""

    def __init__(self, experts: FlexMoreExperts, factors: Mapping[str, Pair]) -> None:
        super().__init__(experts)
        self._factors = factors
        self.ranks: dict[str, int] | None = None
        """Rank of each projection, 0 for the public expert's; None means the full expert."""

    def own(self, projection: str, x: Tensor, public: Callable[[], Tensor]) -> Tensor:
        if self.ranks is None:
            return super().own(projection, x, public)
        factors = self._factors[projection].factors(self.ranks[projection])
        return public() + F.linear(x, factors.a) @ factors.bt


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
        metric = dataclasses.replace(self._metric, folders=folders)  # without the moments that this process has opened
        again = (folder, self._name, checkpoint, self._settings, metric, self._public)
        return functools.partial(_open_again, opener(self._source, self._name), *again)

    @functools.cached_property
    def start(self) -> dict[MatrixKey, Factors]:
        """The factors of the store."""
        keys = self._source.shape.keys(self._name)
        return {key: self._store.factors(key, _rank(self._store, key, self._settings)) for key in keys}

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
        documents = self._documents(mixture.tokenizer, texts)
        if not documents:
            raise UsageError(f"--data: the texts of {self._name} have no token to predict; longer ones are needed")
        public = self._documents(mixture.tokenizer, self._public)
        others = public + _shuffled(public, self._settings.seed)
        pairs, trained, adam = self._begin(team.device)
        step = self._restore(trained, adam, recipe)
        steps = torch.tensor(float(step), device=team.device)
        team.add_up(steps)
        if steps != team.size * step:
            raise FlexmoreError(f"{self._checkpoint}: workers see different files; --out must be shared by all nodes")
        layers = {
            number: functools.partial(
                _Healed, factors={p: pairs[MatrixKey(self._name, number, p)] for p in PROJECTIONS}
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

    def _documents(self, tokenizer: Any, texts: Texts) -> list[Document]:
        """Texts that have a token to predict."""
        return [d for d in encode(tokenizer, texts, self._settings.max_tokens) if len(d.ids) > d.start]

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
        digests = self._source.digest(key), self._source.digest(key._replace(expert=self._source.experts[0]))
        moments = self._metric.moments.matrix(key, *digests).to(device)
        try:
            return moments.roots(self._metric.weighting, self._metric.damping)
        except ArithmeticError as error:
            raise CheckpointError(f"{key}: {one_line(error)}; gather its moments again") from None

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
        ranks = self._draw_ranks(draw, len(model.model.layers))
        share = batch[team.number :: team.size]
        loss = _loss(model, share, ranks, of_others) / tokens if share else torch.zeros((), device=team.device)
        whole = loss.detach().clone()
        team.add_up(whole)
        value = float(whole)
        if not math.isfinite(value):
            raise CheckpointError(
                f"expert {self._name}: the loss of step {step + 1} is {value}; lower --learning-rate, or check weights "
                "and texts; what was trained before is kept"
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

    def _draw_ranks(self, draw: random.Random, layers: int) -> list[dict[str, int]]:
        """Ranks of a step: a mean one, split by energy or evenly, then times a factor for each matrix."""
        highest = {matrix: len(values) for matrix, values in self._spectra.items()}
        most = max(highest.values())
        if draw.random() < UNIFORM_SHARE:
            shares, spread = dict.fromkeys(highest, most ** draw.random()), 1.0
        else:
            share = most ** (draw.uniform(LEAST_LEVEL, 1) - 1)
            shares, spread = self._leading(round(share * len(self._values))), 0.5

        return [
            {
                p: max(1, min(highest[layer, p], round(shares[layer, p] * 2.0 ** draw.uniform(-spread, spread))))
                for p in PROJECTIONS
            }
            for layer in range(layers)
        ]

    def _leading(self, count: int) -> dict[tuple[int, str], float]:
        """How many of the `count` directions with most energy are of each matrix, ties included."""
        least = self._values[max(1, min(count, len(self._values))) - 1]
        return {matrix: float((values >= least).sum()) for matrix, values in self._spectra.items()}

    @functools.cached_property
    def _values(self) -> Tensor:
        """Singular values of all directions in training, largest first, but for those that rounding makes."""
        values = torch.cat(list(self._spectra.values())).sort(descending=True).values
        return values[values >= 1e-6 * values[0]]

    @functools.cached_property
    def _spectra(self) -> dict[tuple[int, str], Tensor]:
        """By layer and projection: singular values of the directions in training."""
        return {
            (key.layer, key.projection): self._store.spectrum(key)[: factors.rank]
            for key, factors in self.start.items()
        }

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
                    return 0  # of other texts or settings
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


def _loss(model: Any, batch: Sequence[Document], ranks: Sequence[dict[str, int]], of_others: bool) -> Tensor:
    """KL(teacher || student) of all predicted tokens of a batch, the student at some ranks, by layer."""
    ids, predicted = pad_documents(batch, next(model.parameters()).device)
    healed = [layer.mlp.experts for layer in model.model.layers]
    for experts in healed:
        experts.ranks = dict.fromkeys(PROJECTIONS, 0) if of_others else None
    with torch.no_grad():
        teacher = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    for experts, chosen in zip(healed, ranks, strict=True):
        experts.ranks = chosen
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


Train = Callable[[Training, Texts, str, Progress | None], dict[MatrixKey, Factors]]
"""`Training.heal` by some team."""


def _schedule(step: int, steps: int) -> float:
    rise = max(1, steps // 20)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)))
