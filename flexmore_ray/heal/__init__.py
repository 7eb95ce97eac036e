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
    OUT/healing/EXPERT@RUN.safetensors    factors, Adam's state and the step, every minute: what a killed run goes on
                                          from; RUN stands for texts, weights, moments and settings

Several workers train an expert together: all draw the same batch and ranks, and each takes its share of the documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence

from flexmore_ray.atomic import alone
from flexmore_ray.build import StoreWriter
from flexmore_ray.errors import StoreError, UsageError
from flexmore_ray.heal.training import FORMAT, Progress, Settings, Team, Train, Training, rank_of
from flexmore_ray.moments.files import Metric
from flexmore_ray.source import Source, with_missing_rows
from flexmore_ray.spec import MatrixKey
from flexmore_ray.spectra import Decomposition, Factors
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import HEALED, MANIFEST, Entry, FactorStore, delta_digests, open_store
from flexmore_ray.texts import check_owners, read_documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What decided the factors of a healed store; see `moments.files.Metric`."""

    healed: Mapping[str, str]
    """By healed expert; factors of the others are as the store has them."""
    store: FactorStore
    weighting: str = HEALED

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
        train: trains an expert, such as `workers.Workers`; None means in this process.

    Raises:
        UsageError: an expert that the source has not, no texts; texts that moments count twice; another run heals
            into `out`.
        StoreError: the store is of other weights, or has not all of an expert.
        CheckpointError: the loss is not finite; moments that no text can have.
        FlexmoreError: moments are missing, not finished or of another model.
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
    store.check_source(source)
    metric.check(source, list(texts))
    recipes = {}
    base, whole = source.base_digest, with_missing_rows(source)
    for name in texts:
        keys = source.shape.keys(name)
        begun = [store.recipe(name), str(store.dtype), [rank_of(store, key, settings) for key in keys]]
        coordinates = [metric.recipe(key) for key in keys]
        weights = [base, whole.expert_digest(name)]
        data_digests = [digests[name], digests.get(public)]
        about = [FORMAT, name, weights, begun, coordinates, data_digests, dataclasses.asdict(settings)]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        recipes[name] = f"healed:{base[:16]}:{digest}"
    recipe = _Recipe(healed=recipes, store=store)
    _healed_before(out, source)  # refused before anything is written there
    with alone(out / "healing", "flexmore heal"):
        before = _healed_before(out, source)
        writer = StoreWriter(out, str(store.dtype).removeprefix("torch."), recipe)
        made = [
            name
            for name in domain
            if name in texts or before is None or not _is_healed(before, source.shape.keys(name))
        ]
        ranks = {
            key: rank_of(store, key, settings) if name in texts else store.max_rank(key)
            for name in made
            for key in source.shape.keys(name)
        }
        entries: list[Entry] = []
        files: list[AnyPath] = []
        for name in made:
            keys = source.shape.keys(name)
            found = [writer.find(key, ranks[key], *delta_digests(source, key)) for key in keys]
            trained: Mapping[MatrixKey, Factors] = {}
            if name in texts and None in found:
                files.append(out / "healing" / f"{name}@{recipes[name].rpartition(':')[2]}.safetensors")
                training = Training(source, store, name, files[-1], settings, metric, shared)
                trained = train(training, texts[name], recipes[name], progress)
            entries += [
                entry or _put(writer, source, store, key, trained.get(key) or store.factors(key, ranks[key]))
                for key, entry in zip(keys, found, strict=True)
            ]
        healed = writer.commit(entries, source)
        for file in files:
            file.unlink(missing_ok=True)
    return healed


def _healed_before(out: AnyPath, source: Source) -> FactorStore | None:
    """The store that `out` holds already; None where it holds none."""
    if not (out / MANIFEST).exists():
        return None
    before = open_store(out)
    if before.weighting != HEALED:
        raise UsageError(
            f"--out: {out} holds a store of weighting {before.weighting}; name a new folder, or one of healed factors"
        )
    keys, ours = before.keys(), f"healed:{source.base_digest[:16]}:"
    recipes = [before.entry(key).recipe for key in keys]
    same = all(recipe.startswith(ours) for recipe in recipes if recipe.startswith("healed:"))
    try:
        before.check_source(source)
    except StoreError:
        same = False
    if not same:
        raise UsageError(f"--out: {out} holds healed factors of other weights; name a new folder")
    return before


def _is_healed(store: FactorStore, keys: Sequence[MatrixKey]) -> bool:
    return set(keys) <= set(store.keys()) and all(store.entry(key).recipe.startswith("healed:") for key in keys)


def _put(writer: StoreWriter, source: Source, store: FactorStore, key: MatrixKey, factors: Factors) -> Entry:
    result = Decomposition(
        factors=Factors(factors.a.contiguous(), factors.bt.contiguous()),
        singular_values=store.spectrum(key),
        residual_energy=store.residual_energy(key),
        method=HEALED,
        rejected=(),
        error_ratio=store.entry(key).error_ratio,
    )
    return writer.put(key, result, *delta_digests(source, key))
