"""Moments on disk: files of owners, added up, and the metric that a decomposition takes from them.

FOLDER/EXPERT/layer-LLLL.safetensors    C and G of the layer's three matrices (see `flexmore_ray.moments`), and
                                        what they are of: weights, texts, settings
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open

from flexmore_ray.atomic import write_file
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.moments import DAMPING, FORMS, SKETCH_ROWS, WEIGHTINGS, Form, MatrixMoments, Moment, Weighting
from flexmore_ray.spec import PROJECTIONS, MatrixKey
from flexmore_ray.storage import AnyPath, StorageError, open_path
from flexmore_ray.storage.cache import local_file
from flexmore_ray.store import WeightSource, delta_digests, write_safetensors

FORMAT = "flexmore-moments-1"
MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the moments of given texts, and how they are kept.

    Attributes:
        form: one of `FORMS`.
        rows: of a sketch.
        max_tokens: longer documents are cut.
    """

    form: Form = "full"
    rows: int = SKETCH_ROWS
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"--moments: one of {', '.join(FORMS)} is needed, got {self.form!r}")
        for name, value, least in (("--sketch-rows", self.rows, 1), ("--max-tokens", self.max_tokens, 2)):
            if value < least:
                raise UsageError(f"{name}: an integer >= {least} is needed, got {value}")


@dataclasses.dataclass(kw_only=True, eq=False)
class LayerMoments:
    """Moments of one expert's matrices in one layer, and what they are of.

    Attributes:
        about: format, settings, digests of the weights, and `texts`: by the texts' digest, and the two-expert mixture
            at whose ranks they were read if not at the full expert (DIGEST@ID), documents done.
        matrices: by projection.
    """

    about: dict[str, Any]
    matrices: dict[str, MatrixMoments]

    def write(self, path: AnyPath) -> None:
        """Write the file whole."""
        tensors = {
            f"{projection}.{side}.{name}": tensor.cpu().contiguous()
            for projection, matrix in self.matrices.items()
            for side, moment in (("input", matrix.input), ("output", matrix.output))
            for name, tensor in moment.tensors().items()
        }
        tokens = {projection: matrix.tokens for projection, matrix in self.matrices.items()}
        text = json.dumps(self.about | {"tokens": tokens}, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # all of them aligned
        write_file(path, lambda file: write_safetensors(file, tensors, {"about": text}))

    def __add__(self, other: LayerMoments) -> LayerMoments:
        """Of both's texts; weights and settings must be the same."""
        if not isinstance(other, LayerMoments):
            return NotImplemented
        matrices = {p: matrix + other.matrices[p] for p, matrix in self.matrices.items()}
        return LayerMoments(about=self.about | {"texts": self.about["texts"] | other.about["texts"]}, matrices=matrices)

    @classmethod
    def read(cls, path: AnyPath) -> LayerMoments:
        """Read a file.

        Raises:
            FlexmoreError: it is missing, damaged or something else.
        """
        with _opened(path) as (file, about):
            matrices = {p: _read_matrix(file, p, about["tokens"][p]) for p in PROJECTIONS}
        return cls(about=about, matrices=matrices)


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file of moments, open for reading, and what it says of itself."""
    try:
        with safe_open(str(local_file(path)), framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            _check_about(about)
            yield file, about
    except StorageError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FlexmoreError(f"{path}: no file of moments that can be read ({reason}); gather it again") from None


def read_about(path: AnyPath) -> dict[str, Any]:
    """What a file says of itself, see `LayerMoments`. Reads no moment.

    Raises:
        FlexmoreError: it is missing, damaged or something else.
    """
    with _opened(path) as (_, about):
        return about


def _check_about(about: Any) -> None:
    """What a file says of itself: it comes from somebody else, maybe."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    for name, kind in (("weights", dict), ("texts", dict), ("settings", dict), ("base", str), ("tokens", dict)):
        if not isinstance(about.get(name), kind):
            raise ValueError(f"no {name}")
    if any(not isinstance(about["tokens"].get(p), int) or about["tokens"][p] < 0 for p in PROJECTIONS):
        raise ValueError("tokens are counts, one for each projection")
    if any(not isinstance(about["weights"].get(p), list) for p in PROJECTIONS):
        raise ValueError("weights are digests, two for each projection")
    for done in about["texts"].values():
        if not (isinstance(done, list) and len(done) == 2 and all(isinstance(n, int) for n in done)):
            raise ValueError("texts are documents done and in all")


def _read_matrix(file: Any, projection: str, tokens: int) -> MatrixMoments:
    names = set(file.keys())

    def moment(side: str) -> Moment:
        parts = {n: f"{projection}.{side}.{n}" for n in ("diagonal", "matrix", "sketch")}
        found = {n: file.get_tensor(full) for n, full in parts.items() if full in names}
        if "diagonal" not in found or found["diagonal"].ndim != 1:
            raise ValueError(f"no diagonal of {projection}.{side}")
        size = len(found["diagonal"])
        if "matrix" in found and found["matrix"].shape != (size, size):
            raise ValueError(f"{projection}.{side}.matrix is not {size} x {size}")
        if "sketch" in found and (found["sketch"].ndim != 2 or found["sketch"].shape[1] != size):
            raise ValueError(f"{projection}.{side}.sketch has not {size} columns")
        return Moment(**found)

    return MatrixMoments(input=moment("input"), output=moment("output"), tokens=tokens)


def layer_file(folder: AnyPath, expert: str, layer: int) -> AnyPath:
    """Where the moments of a layer lie."""
    return folder / expert / f"layer-{layer:04d}.safetensors"


class MomentStore:
    """Moments in folders, added up.

    Args:
        folders: what `gather` wrote, on one or more machines; an expert may be in several.

    Raises:
        UsageError: no folder is given.
    """

    def __init__(self, folders: Sequence[str | AnyPath]) -> None:
        self.folders = [open_path(folder) for folder in folders]
        if not self.folders:
            raise UsageError("--moments: a folder that flexmore moments wrote is needed")
        self._layer = functools.lru_cache(maxsize=1)(self._read_layer)
        self._about = functools.lru_cache(maxsize=None)(self._read_about)

    def matrix(self, key: MatrixKey, expert_digest: str, public_digest: str) -> MatrixMoments:
        """The moments of one matrix.

        Args:
            key: the matrix.
            expert_digest: SHA-256 of the expert's matrix.
            public_digest: SHA-256 of the public expert's.

        Raises:
            FlexmoreError: there are none, they are of other weights or not finished, or texts are counted twice.
        """
        self.check_weights(key, expert_digest, public_digest)
        return self._layer(key.expert, key.layer).matrices[key.projection]

    def check_weights(self, key: MatrixKey, expert_digest: str, public_digest: str) -> None:
        """Check that there are moments of one matrix, and that they are of these weights. Reads no moment.

        Raises:
            as `matrix`.
        """
        about = self.identity(key.expert, key.layer)
        if about["weights"][key.projection] != [expert_digest, public_digest]:
            raise FlexmoreError(f"{self._where()}: the moments of {key} are of another model; gather them for this one")

    def identity(self, expert: str, layer: int) -> dict[str, Any]:
        """What decides the moments of an expert's layer: texts, weights, settings. Reads no moment.

        Raises:
            as `matrix`.
        """
        return self._about(expert, layer)

    def _where(self) -> str:
        return ", ".join(map(str, self.folders))

    def _paths(self, expert: str, number: int) -> list[AnyPath]:
        return [path for folder in self.folders if (path := layer_file(folder, expert, number)).exists()]

    def _read_layer(self, expert: str, number: int) -> LayerMoments:
        return functools.reduce(operator.add, map(LayerMoments.read, self._paths(expert, number)))

    def _read_about(self, expert: str, number: int) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for path in self._paths(expert, number):
            about = read_about(path)
            for done, of in about["texts"].values():
                if done < of:
                    raise FlexmoreError(f"{path}: not finished, {done:,} of {of:,} documents; run its command again")
            for name in ("weights", "base", "settings"):
                if about[name] != total.setdefault(name, about[name]):
                    raise FlexmoreError(
                        f"{path}: of other {name} than {self.folders[0]}; only moments of one kind add up"
                    )
            if same := sorted(set(about["texts"]) & set(total.setdefault("texts", {}))):
                raise UsageError(f"--moments: {path} has texts that another folder has too ({same[0][:12]}); name one")
            total["texts"] |= about["texts"]
        if not total:
            raise FlexmoreError(
                f"{self._where()}: no moments of expert {expert}, layer {number}; gather them with: "
                f"flexmore moments SOURCE --data {expert}=FILE --out DIR"
            )
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric in which deltas are decomposed; plain data, so that it can be sent to other processes.

    Attributes:
        weighting: one of `WEIGHTINGS`, the sides that are weighted.
        folders: where the moments are.
        damping: see `flexmore_ray.moments`.
    """

    weighting: Weighting = "none"
    folders: tuple[str, ...] = ()
    damping: float = DAMPING

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # without moments that are open

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UsageError(f"--weighting: one of {', '.join(WEIGHTINGS)} is needed, got {self.weighting!r}")
        if (self.weighting == "none") != (not self.folders):
            raise UsageError("--weighting and --moments: give both, input, output or both with its folders, or neither")
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"--damping: above 0 and finite is needed, got {self.damping}")

    @functools.cached_property
    def moments(self) -> MomentStore:
        """The moments."""
        return MomentStore(self.folders)

    def check(self, source: WeightSource, experts: Sequence[str]) -> None:
        """Read what all moments are of, so that nothing is begun where some are missing or cannot be used.

        Raises:
            UsageError, FlexmoreError: see `MomentStore`.
        """
        if self.weighting != "none":
            for key in (key for expert in experts for key in source.shape.keys(expert)):
                self.moments.check_weights(key, *delta_digests(source, key))
                if self.moments.identity(key.expert, key.layer)["base"] != source.base_digest:
                    raise FlexmoreError(
                        f"{', '.join(self.folders)}: the moments of {key} are of another public model; gather them "
                        "for this one"
                    )

    def matrix(self, source: WeightSource, key: MatrixKey) -> MatrixMoments:
        """The moments of one matrix.

        Raises:
            FlexmoreError: see `MomentStore.matrix`; or they are of another size.
        """
        moments = self.moments.matrix(key, *delta_digests(source, key))
        sizes = len(moments.output.diagonal), len(moments.input.diagonal)
        if sizes != source.shape.matrix(key.projection):
            raise FlexmoreError(
                f"{', '.join(self.folders)}: the moments of {key} are not of its size; gather them again"
            )
        return moments

    def recipe(self, key: MatrixKey) -> str:
        """What decides the factors of a matrix besides its weights; empty in the plain metric."""
        if self.weighting == "none":
            return ""
        decides = [self.damping, self.moments.identity(key.expert, key.layer)]
        return f"{self.weighting}:{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]}"
