"""The command `flexmore allocate`: the ranks that a rule gives under a budget, as a mixture file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flexmore_ray.errors import StoreError, UsageError
from flexmore_ray.tables import columns

if TYPE_CHECKING:
    from flexmore_ray.budget import Granularity
    from flexmore_ray.mixture import Parts
    from flexmore_ray.spec import MatrixKey
    from flexmore_ray.storage import AnyPath
    from flexmore_ray.store import FactorStore


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE")
    add("--budget", required=True, metavar="B", help="parameters such as 10.75B, or a ratio of the full mixture: 0.33x")
    add("--store", metavar="DIR", help="complete store whose spectra decide (default: a plain one in the cache)")
    add("--rule", default="optimal", metavar="NAME", help="optimal (default), uniform, energy or entropy")
    add("--granularity", metavar="G", help="of optimal: expert, projection, layer, or matrix (default)")
    add("--active", type=int, metavar="K", help="experts per token (default: as the checkpoint says)")
    add("--out", required=True, metavar="FILE", help="the mixture file, .yaml")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Allocate ranks and write them down.

    Raises:
        UsageError: an unknown rule or granularity, a budget that nothing of the rule's kind fits, or no such folder.
        StoreError: the store is not there, not complete, or of other weights.
    """
    from flexmore_ray.budget import discarded_energy, format_count
    from flexmore_ray.mixture import open_mixture
    from flexmore_ray.rules import allocate, check_rule, read_budget
    from flexmore_ray.spec import MixtureSpec
    from flexmore_ray.store import HEALED

    if args.granularity is not None and args.rule != "optimal":
        raise UsageError("--granularity: only --rule optimal has one; leave it out, or choose --rule optimal")
    granularity: Granularity = args.granularity or "matrix"
    check_rule(args.rule, granularity)
    out = _file(args.out)
    given = MixtureSpec(source=tuple(args.source), experts=args.experts, store=args.store, active=args.active)
    parts = open_mixture(given)
    budget = read_budget(args.budget, "parameters", parts)
    shape, born = parts.source.shape, parts.source.born_ranks
    keys = [key for name in parts.source.experts[1:] for key in shape.keys(name) if key not in born]
    if not keys:
        raise UsageError(f"{', '.join(args.source)}: has no domain expert with weights of its own to allocate ranks to")
    store = _complete_store(parts, keys)
    spectra = {key: store.spectrum(key).numpy() for key in keys}
    spec = allocate(parts, budget, spectra, args.rule, granularity=granularity, active=args.active)
    if spec is None:
        lowest = parts.with_spec(dataclasses.replace(given, ranks=dict.fromkeys((key.expert for key in keys), 1)))
        raise UsageError(
            f"--budget: {budget.limit:,} parameters are fewer than the public expert and rank 1 for every domain "
            f"expert need ({lowest.count().total:,}); raise it"
        )
    made = parts.with_spec(spec)
    spec.save(out)
    count, assignment = made.count(), made.assignment
    lost = {
        name: discarded_energy({key: spectra[key] for key in keys if key.expert == name}, assignment)
        for name in parts.source.experts[1:]
    }
    total = sum(lost.values())
    rows = [[name, str(assignment.summary(name)), f"{count.experts[name]:,}", f"{lost[name]:.4g}"] for name in lost]
    print(columns([["expert", "rank", "parameters", "discarded energy"], *rows]))
    of = "before healing" if store.weighting == HEALED else f"weighting {store.weighting}"
    print(
        f"\n{out}: {count.total:,} parameters ({format_count(count.total)}, {count.ratio:.3f} of full), discarded "
        f"energy {total:.4g} ({of}); next: flexmore eval {args.out} --tasks ..."
    )
    return {
        "out": str(out),
        "rule": args.rule,
        "granularity": granularity if args.rule == "optimal" else None,
        "ranks": spec.to_dict()["ranks"],
        "total": count.total,
        "ratio": count.ratio,
        "weighting": store.weighting,
        "discarded_energy": total,
        "experts": {name: {"params": count.experts[name], "discarded_energy": lost[name]} for name in lost},
    }


def _file(text: str) -> AnyPath:
    from flexmore_ray.storage import open_path

    out = open_path(text)
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out: a mixture file is called .yaml or .yml, got {text}")
    if isinstance(out, Path) and not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; make it, or choose another")
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another --out or remove it")
    return out


def _complete_store(parts: Parts, keys: Iterable[MatrixKey]) -> FactorStore:
    """The store that was named, or one in the cache that is made where it is missing; all ranks of some matrices."""
    from flexmore_ray.build import build_store
    from flexmore_ray.mixture import CachedFactors
    from flexmore_ray.store import HEALED

    if isinstance(parts.factors, CachedFactors):
        with tqdm(desc="decomposing", unit="matrix", disable=not sys.stderr.isatty(), leave=False) as bar:

            def advance(done: int, total: int, _: str) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return build_store(parts.source, parts.factors.folder, progress=advance)
    store: FactorStore = parts.factors
    full = parts.source.shape.full_rank
    for key in keys:
        if store.max_rank(key) < full:
            again = "decompose into it again without --max-rank"
            if store.weighting == HEALED:
                again = "heal without --max-rank, from a store that was decomposed without it"
            raise StoreError(
                f"{store.folder}: holds rank {store.max_rank(key)} of {key}, and a rule needs all {full}; {again}"
            )
    return store
