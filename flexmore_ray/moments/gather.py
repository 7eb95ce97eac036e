"""Gather moments of experts on their owners' texts: forward and backward of each two-expert mixture.

What is predicted for a token is the log-odds of the right next one, log p - log(1 - p). The loss itself will not do:
its gradient is that of the log-odds times 1 - p, so what an expert has learned to certainty would count for nothing.

A layer's moments are 3 (in^2 + out^2) numbers: 1.65 GB in float32 at 4096 x 11008. So many layers are gathered in one
pass over the texts as fit into the memory given, and each pass is forward through the whole model and backward to the
lowest of these layers. Files are replaced whole, every minute, with how far they are: a run that was killed goes on
from there. A file remembers which texts it has, so texts that come later are added, and none is counted twice.

Gradients are those at the full expert, or at the ranks of a mixture. What cutting changes is the gradient's integral
along the way from the one to the other, so moments at both ends, added up, tell more than those at one (the
trapezoidal rule).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmore_ray.atomic import alone, remove_abandoned
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.mixture import MixtureLike, Parts, load_mixture, open_mixture
from flexmore_ray.modeling import FlexMoreExperts
from flexmore_ray.moments import MatrixMoments, Moment
from flexmore_ray.moments.files import FORMAT, LayerMoments, Settings, layer_file, read_about
from flexmore_ray.pairs import PairExperts, own_mixture, replaced_experts
from flexmore_ray.source import Source, with_missing_rows
from flexmore_ray.spec import DROP, FULL, PROJECTIONS, MatrixKey, MixtureSpec, ModelShape
from flexmore_ray.storage import AnyPath, open_path
from flexmore_ray.store import FactorSource, delta_digests
from flexmore_ray.texts import Document, batches, check_owners, encode, pad_documents, read_documents

MEMORY = 4 * 2**30
"""Bytes of moments in memory unless told otherwise."""
BATCH_TOKENS = 4096
SAVE_SECONDS = 60.0

Progress = Callable[[str, int, int], None]
"""Told of an expert, its documents done (times passes), and in all."""


# ---------------------------------------------------------------------------------- gathering


def gather(
    source: Source,
    data: Mapping[str, AnyPath],
    folder: str | AnyPath,
    settings: Settings | None = None,
    *,
    at: MixtureLike | None = None,
    memory: int = MEMORY,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Gather the moments of experts into a folder, or finish, or add texts to what is there.

    Args:
        source: the experts.
        data: by expert the file of its owner's texts, see `texts.read_documents`.
        folder: made if it is missing.
        settings: of the moments; None means their defaults.
        at: a mixture, at whose ranks of the experts gradients are taken, each folder for one mixture; None means the
            full experts. Of an expert that it leaves full nothing is gathered: its two ends are one.
        memory: bytes of moments to hold at once; decides how many layers one pass covers.
        batch_tokens: tokens of one forward and backward pass, padding included.
        device: where to compute.
        dtype: of the model; None means float32 on the CPU and the checkpoint's own elsewhere.
        progress: told of what is done.

    Returns:
        Predicted tokens by expert that was gathered, over all texts that the folder has.

    Raises:
        UsageError: an expert that the source has not, or `at` drops, no texts, memory for less than one layer, a
            folder that cannot be written or that another run writes to; `at` is of other weights, or cuts none of
            these experts.
        FlexmoreError: gradients are not finite; what the folder has is of another model or other settings.
    """
    folder, settings = open_path(folder), settings or Settings()
    check_owners(data, source.experts[1:])
    each = layer_bytes(source.shape, settings)
    if batch_tokens < 1:
        raise UsageError(f"--batch-tokens: an integer >= 1 is needed, got {batch_tokens}")
    if memory < each:
        raise UsageError(
            f"--memory: the {settings.form} moments of one layer take {each:,} bytes, got {memory:,}; give more, or "
            "choose --moments low-rank+diagonal"
        )
    points = _full_experts(source, data) if at is None else _cut_experts(source, data, open_mixture(at))
    read = {name: read_documents(path) for name, path in data.items()}  # all of them before anything is computed
    tokens = {}
    for name, point in points.items():
        digest = hashlib.sha256(data[name].read_bytes()).hexdigest()
        run = _Expert(source, name, point, digest, folder, settings, device, dtype, batch_tokens, progress)
        tokens[name] = run.gather(read[name], memory // each)
    return tokens


def layer_bytes(shape: ModelShape, settings: Settings) -> int:
    """Bytes that one layer's moments of one expert take."""
    total = 0
    for projection in PROJECTIONS:
        for size in shape.matrix(projection):
            kept = {"full": size, "diagonal": 0, "low-rank+diagonal": min(settings.rows, size)}[settings.form]
            total += 8 * size + 4 * kept * size
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    """Where gradients are taken: the two-expert mixture, and what tells its texts from those at the full expert."""

    spec: MixtureSpec
    factors: FactorSource | None = None
    suffix: str = ""


def _full_experts(source: Source, names: Iterable[str]) -> dict[str, _Point]:
    return {name: _Point(spec=own_mixture(source, name)) for name in names}


def _cut_experts(source: Source, names: Iterable[str], parts: Parts) -> dict[str, _Point]:
    """By expert, of those that a mixture cuts, where gradients are taken."""
    ours, theirs = with_missing_rows(source), with_missing_rows(parts.source.with_own_rows)
    same_base = parts.source.base_digest == source.base_digest
    points = {}
    for name in names:
        rank = parts.spec.ranks.get(name, FULL) if name in theirs.experts else DROP
        if rank == DROP:
            raise UsageError(f"--at: the mixture has no expert {name}; give no texts of it, or another mixture")
        if not same_base or theirs.expert_digest(name) != ours.expert_digest(name):
            raise UsageError(f"--at: expert {name} of the mixture has other weights than that of the source")
        own = dataclasses.replace(parts, source=theirs).with_spec(own_mixture(theirs, name, rank))
        if own.is_cut(name):
            suffix = f"@{own.identified().mixture_id}"
            points[name] = _Point(spec=own_mixture(source, name, rank), factors=own.factors, suffix=suffix)
    if not points:
        raise UsageError("--at: the mixture cuts none of these experts; moments without --at are all there is to know")
    return points


class _Expert:
    """The work on one expert."""

    def __init__(
        self,
        source: Source,
        name: str,
        point: _Point,
        texts: str,
        folder: AnyPath,
        settings: Settings,
        device: str,
        dtype: str | None,
        batch_tokens: int,
        progress: Progress | None,
    ) -> None:
        self._source, self._name, self._texts, self._folder = source, name, texts + point.suffix, folder
        self._settings, self._batch_tokens, self._progress = settings, batch_tokens, progress
        self._load = functools.partial(
            load_mixture,
            point.spec,
            source=with_missing_rows(source),
            factors=point.factors,
            device=device,
            dtype=dtype,
        )

    def gather(self, texts: Sequence[tuple[str, str]], layers_at_once: int) -> int:
        """Gather all layers; returns the predicted tokens of all texts that the folder has."""
        with alone(self._folder / self._name, "flexmore moments"):
            remove_abandoned(self._folder)
            return self._gather(texts, layers_at_once)

    def _gather(self, texts: Sequence[tuple[str, str]], layers_at_once: int) -> int:
        abouts = [self._about(number, len(texts)) for number in range(self._source.shape.num_layers)]
        left = [n for n, about in enumerate(abouts) if about["texts"][self._texts][0] < len(texts)]
        if left:
            mixture = self._load()
            documents = encode(mixture.tokenizer, texts, self._settings.max_tokens)
            if not any(len(document.ids) > document.start for document in documents):
                raise UsageError(f"--data: the texts of {self._name} have no token to predict; longer ones are needed")
            passes = [left[i : i + layers_at_once] for i in range(0, len(left), layers_at_once)]
            for number, chosen in enumerate(passes):
                # The highest layers first would save nothing: each pass goes back to its lowest layer alone.
                layers = {n: self._open(n, abouts[n]) for n in chosen}
                self._one_pass(mixture.model, documents, layers, number, len(passes))
        return int(read_about(layer_file(self._folder, self._name, 0))["tokens"]["gate_proj"])

    def _about(self, number: int, documents: int) -> dict[str, Any]:
        """What a layer's file says of itself, or is to say."""
        settings = dataclasses.asdict(self._settings)
        keys = [MatrixKey(self._name, number, projection) for projection in PROJECTIONS]
        weights = {key.projection: list(delta_digests(self._source, key)) for key in keys}
        expected = {"format": FORMAT, "weights": weights, "base": self._source.base_digest, "settings": settings}
        path = layer_file(self._folder, self._name, number)
        if path.exists():
            about = read_about(path)
            for what, rule in (("weights", "model"), ("base", "model"), ("settings", "settings")):
                if about.get(what) != expected[what]:
                    raise UsageError(f"{path}: holds moments of another {rule}; name another folder with --out")
        else:
            about = expected | {"texts": {}}
        digest, at, _ = self._texts.partition("@")
        if at and any(other.startswith(f"{digest}@") and other != self._texts for other in about["texts"]):
            raise UsageError(f"{path}: holds moments at the ranks of another mixture; name another folder with --out")
        about["texts"].setdefault(self._texts, [0, documents])
        return about

    def _open(self, number: int, about: dict[str, Any]) -> LayerMoments:
        """What the folder has of a layer, or nothing yet."""
        path = layer_file(self._folder, self._name, number)
        if path.exists():
            return LayerMoments(about=about, matrices=LayerMoments.read(path).matrices)
        form, rows = self._settings.form, self._settings.rows
        sizes = {p: self._source.shape.matrix(p) for p in PROJECTIONS}
        zero = {
            p: MatrixMoments(
                input=Moment.zero(columns, form, rows=rows), output=Moment.zero(lines, form, rows=rows), tokens=0
            )
            for p, (lines, columns) in sizes.items()
        }
        return LayerMoments(about=about, matrices=zero)

    def _one_pass(
        self,
        model: nn.Module,
        documents: Sequence[Document],
        layers: Mapping[int, LayerMoments],
        number: int,
        passes: int,
    ) -> None:
        """Read the texts once, and add to some layers what they lack."""
        device = next(model.parameters()).device
        taps = {n: _Tap(layer, device) for n, layer in layers.items()}
        done = {n: layer.about["texts"][self._texts][0] for n, layer in layers.items()}
        saved = time.monotonic()
        with replaced_experts(model, {n: functools.partial(_Tapped, tap=tap) for n, tap in taps.items()}):
            for start, batch in self._batches(documents, done.values()):
                stop = start + len(batch)
                ids, predicted = pad_documents(batch, device)
                for n, tap in taps.items():
                    tap.listening = done[n] <= start
                log_odds = _log_odds(model, ids)
                (log_odds * predicted[:, 1:]).sum().backward()
                self._check(taps, start, stop)
                count = int(predicted[:, 1:].sum())
                last = stop == len(documents)
                for n, tap in taps.items():
                    if tap.listening:
                        done[n] = stop
                        tap.count(count)
                if last or time.monotonic() - saved > SAVE_SECONDS:
                    self._save(taps, layers, done)
                    saved = time.monotonic()
                if self._progress:
                    self._progress(self._name, number * len(documents) + stop, passes * len(documents))

    def _batches(self, documents: Sequence[Document], done: Iterable[int]) -> Iterator[tuple[int, Sequence[Document]]]:
        """Batches of what some layer lacks; none that a layer has a part of, whose sizes may have been others."""
        ends = sorted({*done, len(documents)})
        for start, stop in itertools.pairwise(ends):
            yield from batches(documents[:stop], self._batch_tokens, start)

    def _check(self, taps: Mapping[int, _Tap], start: int, stop: int) -> None:
        for n, tap in taps.items():
            if projection := tap.broken():
                raise CheckpointError(
                    f"expert {self._name}, layer {n}, {projection}: NaN or infinite gradients on documents {start + 1} "
                    f"to {stop} (shortest first); check weights and texts, or compute with --dtype float32"
                )

    def _save(self, taps: Mapping[int, _Tap], layers: Mapping[int, LayerMoments], done: Mapping[int, int]) -> None:
        for n, tap in taps.items():
            layer = layers[n]
            layer.matrices = dict(tap.matrices)
            layer.about["texts"][self._texts][0] = done[n]
            layer.write(layer_file(self._folder, self._name, n))


# ------------------------------------------------------------------------------------- model


def _log_odds(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-odds of every next token (B, T - 1). What is padded on the right is not seen by what precedes it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    following = ids[:, 1:, None]
    others = logits.scatter(-1, following, -torch.inf).logsumexp(-1)
    return logits.gather(-1, following)[..., 0] - others


class _Tap:
    """Takes up what goes into the matrices of an expert's layer, and the gradients that come back."""

    def __init__(self, layer: LayerMoments, device: torch.device) -> None:
        self.matrices = {p: layer.matrices.pop(p).to(device) for p in PROJECTIONS}  # held once
        self.listening = True

    def product(self, projection: str, x: Tensor, weight: Tensor) -> Tensor:
        """W x of tokens (T, in), (T, out), noting x and later the gradient."""
        y = F.linear(x, weight)
        if self.listening:
            y.register_hook(functools.partial(self._note, projection, x.detach().float()))
        return y

    def _note(self, projection: str, x: Tensor, gradient: Tensor) -> None:
        g = gradient.detach().float()
        norms_x, norms_g = x.square().sum(-1), g.square().sum(-1)
        used = norms_g != 0  # padding and tokens that nothing depends on; NaN is kept, to be found
        x, g, norms_x, norms_g = x[used], g[used], norms_x[used], norms_g[used]
        held = self.matrices[projection]
        self.matrices[projection] = dataclasses.replace(
            held, input=held.input.add(x, norms_g), output=held.output.add(g, norms_x)
        )

    def count(self, tokens: int) -> None:
        """Note so many predicted tokens."""
        self.matrices = {p: dataclasses.replace(m, tokens=m.tokens + tokens) for p, m in self.matrices.items()}

    def broken(self) -> str | None:
        """A projection whose moments are not finite; None if there is none."""
        for projection, matrix in self.matrices.items():
            if not (math.isfinite(matrix.input.trace) and math.isfinite(matrix.output.trace)):
                return projection
        return None


class _Tapped(PairExperts):
    """The experts of one layer, the domain expert's matrices with taps."""

    def __init__(self, experts: FlexMoreExperts, tap: _Tap) -> None:
        super().__init__(experts)
        self._tap = tap

    def own(self, projection: str, x: Tensor, public: Callable[[], Tensor]) -> Tensor:
        return self._tap.product(projection, x, self.matrix(projection))

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()  # backward needs to come no further down
        return super().forward(x, top_k_index, top_k_weights)
