"""What a search has done, on disk: one JSON file per entry, written whole; tables and an Optuna journal made of them.

OUT/search.json       what the search is: the same command goes on, another one is refused
OUT/trials/00012.json one entry: a baseline or a trial; written when it starts and again when it ends
OUT/trials.parquet    all entries that have ended           OUT/front.parquet   those that no other beats
OUT/journal.log       an Optuna study of them, for optuna-dashboard; made anew at every start
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from flexmore_ray.atomic import write_file
from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.report.analysis import pareto_front
from flexmore_ray.storage import AnyPath, RemotePath, StorageError, at_once, matching
from search.space import Point

State = Literal["running", "complete", "stopped", "failed"]
STUDY = "flexmore-search"
_FORMAT = "flexmore-search-1"
_AGAIN = "delete it to run it again"
_STATES = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}

TRIAL_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("name", pa.string()),
        ("kind", pa.string()),  # baseline or trial
        ("state", pa.string()),  # complete, stopped (early) or failed
        ("fits", pa.bool_()),
        ("score", pa.float64()),  # at the last rung that it reached
        ("rungs", pa.list_(pa.float64())),
        ("documents", pa.int64()),
        ("cost", pa.int64()),  # what the budget measures
        ("parameters", pa.int64()),
        ("active", pa.int64()),
        ("ranks", pa.string()),  # JSON, as in a mixture file
        ("point", pa.string()),  # JSON, what the sampler chose; null for most baselines
        ("warm", pa.string()),  # of a warm start, the baseline that it is nearest to; else null
        ("mixture_id", pa.string()),
        ("groups", pa.string()),  # JSON, score by group at the last rung
        ("seconds", pa.float64()),
        ("started", pa.float64()),
        ("finished", pa.float64()),
        ("error", pa.string()),
    ]
)


@dataclasses.dataclass(kw_only=True)
class Entry:
    """One rank assignment that is evaluated."""

    number: int
    """Place in the search, from 0, baselines included."""
    name: str
    kind: Literal["baseline", "trial"]
    ranks: Mapping[str, Any]
    """By domain expert, in canonical form."""
    active: int
    mixture_id: str
    parameters: int
    cost: int
    """What the budget measures."""
    fits: bool
    """Whether it is within the budget."""
    point: Point | None = None
    """What the sampler chose; None for an assignment that is not in the space."""
    warm: str | None = None
    """Of a trial that is a warm start, the baseline whose nearest point it is; None for all others."""
    state: State = "running"
    rungs: list[float] = dataclasses.field(default_factory=list)
    """Score on all documents up to each rung that was reached."""
    groups: dict[str, float] = dataclasses.field(default_factory=dict)
    """Score by group at the last of these."""
    documents: int = 0
    seconds: float = 0.0
    started: float = 0.0
    finished: float | None = None
    error: str | None = None
    system: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What Optuna's sampler noted of its trial."""

    @property
    def index(self) -> int:
        """Of a trial, its place among the trials, from 0, as in its name."""
        return int(self.name.rpartition("-")[2])

    @property
    def score(self) -> float | None:
        """Score at the last rung that was reached; None if there is none."""
        return self.rungs[-1] if self.rungs else None

    @property
    def value(self) -> float:
        """Score of a complete entry.

        Raises:
            AssertionError: it is not complete.
        """
        assert self.state == "complete"
        return self.rungs[-1]

    def row(self) -> dict[str, Any]:
        """A row of `TRIAL_SCHEMA`."""
        row = {name: getattr(self, name) for name in TRIAL_SCHEMA.names}
        row |= {name: json.dumps(row[name], sort_keys=True) for name in ("ranks", "groups")}
        return row | {"point": None if self.point is None else json.dumps(self.point, sort_keys=True)}

    def frozen(self, distributions: Mapping[str, BaseDistribution], budget: int, *, front: bool) -> FrozenTrial:
        """The entry as a trial of Optuna, with its constraint: how far it is above the budget.

        Args:
            distributions: of the parameters.
            budget: the limit.
            front: whether the study has two objectives, score and cost.
        """
        values = None
        if self.state == "complete":
            values = [self.value, float(self.cost)] if front else [self.value]
        return optuna.trial.create_trial(
            state=_STATES[self.state],
            values=values,
            params=self.point or {},
            distributions=dict(distributions) if self.point else {},
            user_attrs={
                "name": self.name,
                "ranks": dict(self.ranks),
                "active": self.active,
                "parameters": self.parameters,
            },
            system_attrs=dict(self.system),
            intermediate_values={} if front else dict(enumerate(self.rungs)),
            constraints={"budget": float(self.cost - budget)},
        )


class Ledger:
    """The folder of a search.

    Args:
        out: the folder; made if missing.
    """

    def __init__(self, out: AnyPath) -> None:
        self.out = out

    def claim(self, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Write what the search is, or check that the folder is of the same one.

        Args:
            identity: what must be equal for a search to go on.
            notes: the rest of `search.json`.

        Raises:
            UsageError: the folder holds another search (says what differs).
            FlexmoreError: its `search.json` cannot be read.
        """
        path = self.out / "search.json"
        begun = bool(matching(self.out / "trials", "[0-9]*.json"))
        if begun and not path.exists():
            raise UsageError(f"--out: {self.out} holds a search without its search.json; choose another folder")
        if begun:
            before = read_json(path).get("identity", {})
            for name, value in json.loads(json.dumps(identity)).items():
                if before.get(name) != value:
                    was = json.dumps(before.get(name))
                    raise UsageError(
                        f"--out: {self.out} holds another search, whose {name} is {_short(was)}, not "
                        f"{_short(json.dumps(value))}; choose another folder, or repeat that search's options"
                    )
        self.write_json("search.json", {"format": _FORMAT, **notes, "identity": identity})

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a file of the folder whole."""
        path = self.out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda file: file.write(json.dumps(data, indent=1).encode()))
        except StorageError:
            raise
        except OSError as error:
            raise FlexmoreError(f"{path}: cannot be written: {error.strerror}; the same command goes on") from error

    def read(self) -> list[Entry]:
        """All entries, by number.

        Raises:
            FlexmoreError: a file cannot be read (named).
        """
        return at_once(_read_entry, matching(self.out / "trials", "[0-9]*.json"))

    def write(self, entry: Entry) -> None:
        """Write one entry."""
        self.write_json(f"trials/{entry.number:05d}.json", dataclasses.asdict(entry))

    def write_tables(self, entries: Sequence[Entry]) -> None:
        """Write `trials.parquet` and `front.parquet`."""
        ended = [entry for entry in entries if entry.state != "running"]
        for name, rows in (("trials", ended), ("front", front(ended))):
            table = pa.Table.from_pylist([entry.row() for entry in rows], schema=TRIAL_SCHEMA)
            write_file(self.out / f"{name}.parquet", functools.partial(pq.write_table, table))


def _read_entry(path: AnyPath) -> Entry:
    try:
        return Entry(**read_json(path, _AGAIN))
    except TypeError as error:
        raise FlexmoreError(f"{path}: not an entry of a search ({error}); {_AGAIN}") from None


def front(entries: Iterable[Entry]) -> list[Entry]:
    """The complete entries that no other beats: none as cheap or cheaper scores higher; by cost."""
    complete = [entry for entry in entries if entry.state == "complete"]
    if not complete:
        return []
    cost, score = (np.array([getattr(entry, name) for entry in complete], float) for name in ("cost", "value"))
    picked = [entry for entry, chosen in zip(complete, pareto_front(cost, score), strict=True) if chosen]
    return sorted(picked, key=lambda entry: (entry.cost, entry.number))


class Journal:
    """An Optuna study in a file, for Optuna's own tools; never read back.

    Args:
        path: the file; one that is there is replaced. In an object store it is what `send` sends.
        front: whether the study has two objectives, score and cost.
    """

    def __init__(self, path: AnyPath, *, front: bool) -> None:
        self._sent_to = path if isinstance(path, RemotePath) else None
        if isinstance(path, RemotePath):
            self._folder = tempfile.TemporaryDirectory(prefix="flexmore-")  # kept until the journal is
            path = Path(self._folder.name) / path.name
        self._path = path
        for old in (path, Path(f"{path}.lock")):  # a killed run leaves Optuna's lock behind
            old.unlink(missing_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=STUDY,
            storage=JournalStorage(JournalFileBackend(str(path))),
            directions=["maximize", "minimize"] if front else ["maximize"],
        )

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial that has ended."""
        self._study.add_trial(trial)

    def send(self) -> None:
        """Put the file where it belongs, if that is in an object store."""
        if self._sent_to is not None:
            self._sent_to.write_bytes(self._path.read_bytes())


def read_json(path: AnyPath, way_out: str = "choose another folder") -> dict[str, Any]:
    """A JSON object of a search's folder.

    Args:
        path: the file.
        way_out: what an error tells the user to do.

    Raises:
        FlexmoreError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise FlexmoreError(f"{path}: cannot be read ({error}); {way_out}") from None
    if not isinstance(data, dict):
        raise FlexmoreError(f"{path}: not a JSON object; {way_out}")
    return data


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
