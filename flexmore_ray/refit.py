"""Router rows fitted again, in closed form, for a mixture whose experts were cut or healed (see `router.py`).

Every expert's moments come from its owner's texts through its own two-expert mixture, at the rank that it has in the
whole one: a truncated expert is told apart by what its own mixture makes of its texts, not the full expert's.

    NEW.router.safetensors    the rows of the kept experts
    NEW.yaml                  the mixture with them; written last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import MixtureLike, load_mixture, open_mixture
from flexmore_ray.pairs import own_mixture
from flexmore_ray.router import RIDGE, TEMPERATURE, RouterMoments, RouterRows, check_settings, fit_rows, gather_moments
from flexmore_ray.source import Source, with_missing_rows
from flexmore_ray.spec import FULL, ExpertRank, suggest
from flexmore_ray.storage import AnyPath
from flexmore_ray.store import FactorSource
from flexmore_ray.texts import batch_texts, read_texts

Progress = Callable[[str, int, int], None]
"""Told of an expert, its documents read, and in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refitted:
    """What a refit wrote.

    Attributes:
        mixture: the mixture file.
        router: the file of its router rows.
        mixture_id: of the mixture with these rows.
        tokens: by expert, tokens that its moments are of.
    """

    mixture: AnyPath
    router: AnyPath
    mixture_id: str
    tokens: Mapping[str, int]


def refit(
    mixture: MixtureLike,
    data: Mapping[str, AnyPath],
    out: AnyPath,
    *,
    experts: Sequence[str] | None = None,
    ridge: float = RIDGE,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Refitted:
    """Fit the router rows of a mixture at its ranks, and write a mixture file that names them.

    Args:
        mixture: a mixture file, a SOURCE string, or a spec; router rows that it names already take no part.
        data: by kept expert, the public one included, the file of its owner's texts.
        out: the mixture file to write, ``NAME.yaml``; the rows go to ``NAME.router.safetensors`` beside it.
        experts: names for the experts of an N-expert checkpoint; None keeps what the mixture says.
        ridge: regularisation of the fit.
        temperature: the fitted rows are divided by it.
        device: where to compute; float32 on the CPU, the checkpoint's own dtype elsewhere.
        progress: told of what is done.

    Raises:
        UsageError: a kept expert without data, data of any other, an empty file, or `out` exists or is no ``.yaml``.
        CheckpointError, StoreError: see `open_mixture`.
    """
    if out.suffix != ".yaml":
        raise UsageError(f"--out: a mixture file is called NAME.yaml, got {out}")
    router = out.parent / f"{out.stem}.router.safetensors"
    if out.exists():  # rows alone are of a run that was killed
        raise UsageError(f"{out}: exists already; choose another --out or remove it")
    check_settings(ridge, temperature)
    parts = open_mixture(mixture, experts)
    out.parent.mkdir(parents=True, exist_ok=True)
    ranks = {name: parts.spec.ranks.get(name, FULL) for name in parts.assignment.ranks}
    source = parts.source.with_own_rows
    moments = gather_owners(source, data, ranks, factors=parts.factors, device=device, progress=progress)
    rows = fit_rows(moments, ridge=ridge, temperature=temperature).to(source.dtype)
    RouterRows(rows=rows, experts=tuple(moments), base=source.base_digest, where=str(router)).save(router)
    dataclasses.replace(parts.spec, router=router.name, mixture_id=None).save(out)
    mixture_id = open_mixture(out).identified().mixture_id
    assert mixture_id is not None
    tokens = {name: owner.count for name, owner in moments.items()}
    return Refitted(mixture=out, router=router, mixture_id=mixture_id, tokens=tokens)


def gather_owners(
    source: Source,
    data: Mapping[str, AnyPath],
    ranks: Mapping[str, ExpertRank] | None = None,
    *,
    factors: FactorSource | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, RouterMoments]:
    """Router moments of every expert, each from its own texts and model alone; one model is in memory at a time.

    The public expert's moments come from the public model, a domain expert's from its two-expert
    mixture, with the rows that it was trained with; an adapter that came without a row shares the
    tokens with the public expert half and half.

    Args:
        source: the experts.
        data: by expert, the file of its owner's texts.
        ranks: of the experts to gather for, the public one included; None means all experts, full.
        factors: where factors come from; None means a store in the cache.
        device: where to compute.
        progress: told of what is done.

    Raises:
        UsageError: an expert without data, data of any other, or a file without documents.
    """
    ranks = dict.fromkeys(source.experts, FULL) if ranks is None else ranks
    for name in data:
        if name not in ranks:
            raise UsageError(f"--data: unknown expert {name!r}; {suggest(name, list(ranks))}")
    if missing := [name for name in ranks if name not in data]:
        raise UsageError(f"--data: router rows need a text file of every kept expert, missing: {', '.join(missing)}")
    texts = {name: read_texts(path) for name, path in data.items()}
    moments = {}
    for name, rank in ranks.items():
        spec = own_mixture(source, name, rank)
        mixture = load_mixture(spec, source=with_missing_rows(source), factors=factors, device=device)
        batches = _told(batch_texts(mixture.tokenizer, texts[name]), name, len(texts[name]), progress)
        moments[name] = gather_moments(mixture.model, batches)
    return moments


def _told(batches: Iterable[Any], name: str, total: int, progress: Progress | None) -> Iterator[Any]:
    """The batches, each told of once it has been read."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch["input_ids"])
        if progress:
            progress(name, done, total)
