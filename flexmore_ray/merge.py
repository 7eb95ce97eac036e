"""Merge separately trained two-expert checkpoints into one FlexOlmo checkpoint.

Experts are put side by side as they are. Router rows are kept as each owner trained them, or
fitted together in closed form from moments that every owner can compute alone (`router.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from flexmore_ray.checkpoint import check_new, copy_tokenizer, new_folder, write_config, write_tensors
from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import load_mixture
from flexmore_ray.router import RIDGE, TEMPERATURE, batch_texts, fit_rows, gather_moments, read_texts
from flexmore_ray.source import Source, flexolmo_plan, open_source, with_missing_rows
from flexmore_ray.spec import DROP, FULL, ExpertRank, MixtureSpec, suggest
from flexmore_ray.storage import AnyPath


def merge(
    sources: Sequence[str],
    out: AnyPath,
    *,
    names: Sequence[str] | None = None,
    data: Mapping[str, AnyPath] | None = None,
    ridge: float = RIDGE,
    temperature: float = TEMPERATURE,
    active: int | None = None,
) -> Source:
    """Write one FlexOlmo checkpoint that holds every expert of the sources.

    Args:
        sources: ``name=FOLDER`` of each two-expert checkpoint.
        out: the folder to make; it appears only when it is complete and verified.
        names: the names that the sources must have, in order; None leaves them unchecked.
        data: a text file of each expert's own domain, the public one included, to fit the router
            rows from; None keeps the rows as they were trained.
        ridge: regularisation of the fit.
        temperature: the fitted rows are divided by it.
        active: experts per token for the config; None means 4, or all if there are fewer.

    Returns:
        The source that was merged.

    Raises:
        UsageError: an expert without data, data without an expert, `active` out of range.
        CheckpointError: the checkpoints do not share their public model, or cannot be written.
    """
    check_new(out)
    if data is not None and not (0 < ridge < float("inf") and 0 < temperature < float("inf")):
        raise UsageError(f"--ridge and --temperature: above 0 and finite are needed, got {ridge} and {temperature}")
    source = open_source(sources, names)
    if active is None:
        active = min(4, len(source.experts))
    if not 1 <= active <= len(source.experts):
        raise UsageError(f"--active: from 1 to {len(source.experts)} experts per token are possible, got {active}")
    rows = None if data is None else fit_router(source, data, ridge=ridge, temperature=temperature)
    with new_folder(out) as folder:
        write_tensors(folder, flexolmo_plan(source, rows))
        write_config(folder, source.config | {"num_experts_per_tok": active})
        copy_tokenizer(source.trunk.folder, folder)
    return source


def fit_router(source: Source, data: Mapping[str, AnyPath], *, ridge: float, temperature: float) -> Tensor:
    """Router rows (layers, experts, hidden), each expert's moments from its own data and model alone.

    The public expert's moments come from the public model, a domain expert's from its two-expert
    mixture, with the rows that it was trained with; an adapter that came without a row shares the
    tokens with the public expert half and half.
    """
    for name in data:
        if name not in source.experts:
            raise UsageError(f"--data: unknown expert {name!r}; {suggest(name, list(source.experts))}")
    if missing := [name for name in source.experts if name not in data]:
        raise UsageError(f"--data: --router ridge needs a text file of every expert, missing: {', '.join(missing)}")
    texts = {name: read_texts(path) for name, path in data.items()}
    moments = {}
    for name in source.experts:
        mixture = load_mixture(_own_mixture(source, name), source=with_missing_rows(source))
        moments[name] = gather_moments(mixture.model, batch_texts(mixture.tokenizer, texts[name]))
    return fit_rows(moments, ridge=ridge, temperature=temperature)


def _own_mixture(source: Source, name: str) -> MixtureSpec:
    """The mixture in which an owner reads its own data: the public expert and its own."""
    ranks: dict[str, ExpertRank] = dict.fromkeys(source.experts[1:], DROP)
    if name == source.experts[0]:
        return MixtureSpec(ranks=ranks, active=1)
    return MixtureSpec(ranks=ranks | {name: FULL}, active=2)
