"""Merge separately trained two-expert checkpoints into one FlexOlmo checkpoint.

Experts are put side by side as they are. Router rows are kept as each owner trained them, or
fitted together in closed form from moments that every owner can compute alone (`router.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexmore_ray.checkpoint.writing import check_new, copy_tokenizer, new_folder, write_config, write_tensors
from flexmore_ray.errors import UsageError
from flexmore_ray.refit import gather_owners
from flexmore_ray.router import RIDGE, TEMPERATURE, check_settings, fit_rows
from flexmore_ray.source import Source, flexolmo_plan, open_source
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
    check_settings(ridge, temperature)
    source = open_source(sources, names)
    if active is None:
        active = min(4, len(source.experts))
    if not 1 <= active <= len(source.experts):
        raise UsageError(f"--active: from 1 to {len(source.experts)} experts per token are possible, got {active}")
    rows = None
    if data is not None:
        rows = fit_rows(gather_owners(source, data), ridge=ridge, temperature=temperature)
    with new_folder(out) as folder:
        write_tensors(folder, flexolmo_plan(source, rows))
        write_config(folder, source.config | {"num_experts_per_tok": active})
        copy_tokenizer(source.trunk.folder, folder)
    return source
