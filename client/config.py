"""The site file: what a hospital decides. Anything that affects privacy has no default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.backbones import CacheBits
from common.inputs import CellText, find_name, is_boxes, is_mask, parse_number, rename_parts
from common.plugins import Frozen, LocalPath, Spec
from common.process.address import AddressText
from common.run import MAX_PUBLIC_SIZE, Digest, Name, PositiveInt, drop_unset
from common.secure_sum.terms import MAX_SITES, SumRules, hash_values
from common.types import DELTAS, EPSILONS, BadInput, FilterKind, Unit, check_delta

MAIN = "main"
"""Name of the coordinator under the key `coordinator`."""


class Budget(Frozen):
    """The total that the population may spend, over all runs.

    Attributes:
        epsilon: the cap on epsilon.
        delta: delta at which everything is accounted; at most 1 / (10 * the largest public_size).
        filter: kind of the privacy filter that decides whether a charge fits: `gdp` counts each release as full batch,
            `renyi` counts sampled ones for less and full-batch ones for a little more; null: the first charge fixes it.
    """

    epsilon: Annotated[float, Field(ge=EPSILONS.low, le=EPSILONS.high)]
    delta: Annotated[float, Field(ge=DELTAS.low, le=DELTAS.high)]
    filter: FilterKind | None = None


class Allow(Frozen):
    """The runs that this site agrees to. `any` must be written; nothing is allowed by omission.

    Attributes:
        tasks: names of tasks, or `any`.
        backbones: digests of backbones, or `any`.
        solvers: kinds of solvers, or `any`.
        non_private: whether releases without noise are allowed.
    """

    tasks: list[Name] | Literal["any"]
    backbones: list[Digest] | Literal["any"]
    solvers: list[str] | Literal["any"]
    non_private: bool = False


class LabelColumns(Frozen):
    """The place of one task's labels in a data set.

    Attributes:
        source: name of an entry in `sources`.
        label: the label column; or one column for each label of a multi-label task, in the task's label order; or of a
            survival task the column of times and that of events.
        values: local value -> task value, of all columns alike or under a column's name; without it, local values are
            the task's own. Of a mask, local values are its numbers or their names, of boxes the names of objects.
        multiply: column -> number by which its numbers are multiplied, where the task's unit is another one.
        missing: what an empty label means: `skip` (the record has no label for this task), `refuse` (an error) or
            `read` (it is a label as it stands, such as the transcript of a recording in which nothing is said).
        unmapped: what a value outside `values` and the task's labels means, likewise; `skip` leaves out such boxes, and
            such places of a mask, where its values have names.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"column": "label"}
    source: str
    label: str | list[str]
    values: dict[CellText, CellText | dict[CellText, CellText]] | None = None
    multiply: dict[str, Annotated[float, Field(gt=0)]] | None = None
    missing: Literal["skip", "refuse", "read"]
    unmapped: Literal["skip", "refuse"] = "refuse"

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        by_column = [name for name, value in (self.values or {}).items() if not isinstance(value, str)]
        if by_column and len(by_column) != len(self.values or {}):
            raise ValueError(f"values: expected all of them under a column's name or none, got both, {by_column[0]!r}")
        for key, names in (("values", by_column), ("multiply", list(self.multiply or {}))):
            for name in names:
                if name not in self.columns:
                    raise ValueError(f"{key}: expected names of this task's columns, got {name!r}")
        return self

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("multiply",))

    @property
    def columns(self) -> list[str]:
        """The label columns."""
        return [self.label] if isinstance(self.label, str) else self.label

    def list_values(self, column: str) -> dict[str, str] | None:
        """Returns local value -> task value of a column; None where its values are the task's own."""
        if self.values is None:
            return None
        own = self.values.get(column)
        if isinstance(own, dict):
            return own
        flat = {local: value for local, value in self.values.items() if isinstance(value, str)}
        return flat if len(flat) == len(self.values) else None

    def read_cell(self, column: str, cell: str) -> str:
        """Returns the task's value for a column's local one; a value that is not listed may be the task's own.

        In a mask or boxes, the local names of places and objects are replaced.

        Raises:
            BadRecord: the cell is a damaged mask, or damaged boxes.
        """
        values, factor = self.list_values(column), (self.multiply or {}).get(column)
        if values is not None and (is_mask(cell) or is_boxes(cell)):
            local, own = list(values), list(values.values())
            return rename_parts(cell, lambda name: name if (at := find_name(name, local)) is None else own[at])
        found = find_name(cell, list(values or {}))
        if values is not None and found is not None:
            return list(values.values())[found]
        number = None if factor is None else parse_number(cell)
        # 0.1 x 3 is to be 0.3.
        return cell if number is None or factor is None else f"{number * factor:.12g}"


class SiteTask(LabelColumns):
    """One task at a site.

    Attributes:
        public_size: declared, public number of units; weights and divisors use it, never the true count.
        min_units: fewest units to train on, with a label and a record that the offered backbone takes, with which the
            site takes part; tried when a run is approved.
        mix: label -> its share among the site's own records, for `personal: adapt` where they have no labels; a label
            that is not named has none. Without it, labelled training records say it.
    """

    public_size: Annotated[int, Field(ge=1, le=MAX_PUBLIC_SIZE)]
    min_units: PositiveInt = 1
    mix: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        total = 1.0 if self.mix is None else math.fsum(self.mix.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"mix: expected shares that add up to 1, got {total:.6g}")
        return self


class Split(Frozen):
    """Held-out units. By a keyed hash of the unit's id, or as a source's own split column says.

    A unit never changes sides when rows are added or reordered.

    Attributes:
        test_fraction: part of the units that are held out.
        salt: text that the hash begins with; another salt makes another split.
    """

    test_fraction: Annotated[float, Field(ge=0, lt=1)]
    salt: str = ""


class NoisedEvaluation(Frozen):
    """Held-out units are evaluated in noised counts, from a share of the budget fixed beforehand.

    Attributes:
        share: part of the budget that evaluations of all runs together may spend, and nothing else may.
        evaluations: how many the share pays for; each is noised accordingly.
    """

    share: Annotated[float, Field(ge=1e-6, lt=1)]
    evaluations: Annotated[int, Field(ge=1, le=1_000_000)]


Personal = Literal["none", "prior", "fit", "tied", "adapt"]
"""Ways in which a site adapts final heads to itself; see docs/personal.md, and docs/transfer.md for `adapt`."""

ALIGNERS = (Spec(kind="mean_std"), Spec(kind="coral_em"))
"""Aligners by default."""


class SecureSum(Frozen):
    """The secure sums that this site takes part in (docs/secure-sum.md). All sites of a federation write the same.

    Attributes:
        identity: file of this site's private identity key, which `headwater site identity` makes; it never leaves.
        roster: name of every site, this one among them -> its public identity key, from that site's own staff.
        min_sites: number of sites without which nothing is unmasked; a run's `cohort.min_sites` is the same.
        colluding: number of them that may collude with the coordinator; a run's `colluding` is the same.
    """

    identity: LocalPath
    roster: Annotated[dict[Name, Digest], Field(min_length=2, max_length=MAX_SITES)]
    min_sites: PositiveInt
    colluding: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _leave_honest_sites(self) -> SecureSum:
        if len(set(self.roster.values())) != len(self.roster):
            raise ValueError("roster: expected another key for each site, got one twice")
        if self.min_sites > len(self.roster):
            raise ValueError(f"min_sites: expected at most the {len(self.roster)} sites of the roster")
        try:
            SumRules(self.min_sites, self.colluding)
        except BadInput as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def rules(self) -> SumRules:
        """The rules of every sum."""
        return SumRules(self.min_sites, self.colluding)

    @property
    def digest(self) -> str:
        """64 hex digits over the roster and the rules."""
        return hash_values("site file", self.roster, self.min_sites, self.colluding).hex()


class Coordinator(Frozen):
    """Whom a deployed site joins.

    Attributes:
        address: host and port of the coordinator, such as `federation.example.org:9092`.
        ca: certificate of the authority that signed the coordinator's.
        key: this site's private key; it never leaves.
        health_port: loopback port of the health service, the status page and the metrics; None for none.
    """

    address: AddressText
    ca: LocalPath
    key: LocalPath
    health_port: Annotated[int, Field(ge=1, le=65535)] | None = None


class SiteConfig(Frozen):
    """One data holder.

    Attributes:
        name: name of the site.
        registry: id of the population whose records these are; one population has one ledger, also where two sites
            share a machine.
        unit: what the budget protects: an `example` or a `patient`.
        budget: what may be spent in total.
        allow: the tasks, backbones and solvers that this site agrees to.
        sources: where records are, by name.
        tasks: task name -> where its labels are.
        split: the held-out units.
        on_bad_record: `skip` leaves out a record that cannot be used, and lists it; with `stop` no run is approved
            while there is one.
        evaluation: evaluation of held-out units; `local`: only on this machine, nothing about them is ever sent.
        approval: `required`: runs are joined after `headwater site approve`; `automatic`: whatever `allow` covers.
        coordinator: whom to join; None where a simulation carries the messages. Its name is `main`.
        coordinators: further ones by name, or all; they share the budget. Nothing of one reaches another, but for the
            number of lines that the shared ledger has, and noised sums that an earlier run paid for (`moments`).
        personal: heads that the site adapts to itself after the last round: none; `prior` (to its own label
            frequencies), `fit` (and weights of its own, tied to the federated ones) and `adapt` (features moved to what
            the run released of its classes), which never leave; or `tied`, from what the site released in the run.
        aligners: ways of moving features that `personal: adapt` tries: the first is taken unless labels at home veto
            it, a further one where they speak for it.
        secure_sum: sums of which the coordinator sees nothing but the total; without it such runs are declined.
        own_backbones: opened from here instead of being received, where a run's backbone has their digest.
        reply_every_s: seconds; an answer for which records may have been read leaves when a whole number of such
            intervals has passed since its request came. Longer than any answer takes, it hides how long one took; 0: at
            once.
        plugins: folder of the site's own source kinds, one file each.
        ledger_dir: folder of the ledgers, which all site files and coordinators of a population share; by default one
            for this machine's user, `$XDG_DATA_HOME/headwater/ledgers` (`~/.local/share/headwater/ledgers`).
        state_dir: folder of the approvals, stored replies and prepared data.
        cache_dir: folder of cached features, where they are to lie elsewhere.
        cache_limit_gib: most GiB that the features of one source may take there; beyond it nothing is encoded.
        backbone_limit_gib: most GiB of a backbone's network and weights; a larger one is declined before memory is
            taken for it.
        cache_bits: bits of a cached feature; 8 take half the disk and change features by up to a 128th of the largest
            one of their place or record.
        device: device of backbones and training.
        precision: precision inside backbones; bfloat16 takes half the time and changes features a little (the site's
            journal says by how much).
    """

    model_config = ConfigDict(title="site file")

    name: Name
    registry: Name
    unit: Unit
    budget: Budget
    allow: Allow
    sources: Annotated[dict[Name, Spec], Field(min_length=1)]
    tasks: Annotated[dict[Name, SiteTask], Field(min_length=1)]
    split: Split
    on_bad_record: Literal["skip", "stop"]
    evaluation: NoisedEvaluation | Literal["local"]
    approval: Literal["required", "automatic"] = "required"
    coordinator: Coordinator | None = None
    coordinators: dict[Name, Coordinator] = {}
    personal: Personal = "none"
    aligners: Annotated[list[Spec], Field(min_length=1)] = list(ALIGNERS)
    secure_sum: SecureSum | None = None
    own_backbones: list[Spec] = []
    reply_every_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 1.0
    plugins: LocalPath | None = None
    ledger_dir: LocalPath | None = None
    state_dir: LocalPath
    cache_dir: LocalPath | None = None
    cache_limit_gib: Annotated[float, Field(gt=0)] = 64.0
    backbone_limit_gib: Annotated[float, Field(gt=0, le=8)] = 8.0
    cache_bits: CacheBits = 16
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _sources_exist(self) -> SiteConfig:
        for name, task in self.tasks.items():
            if task.source not in self.sources:
                raise ValueError(f"tasks.{name}.source: expected one of {', '.join(self.sources)}, got {task.source!r}")
        return self

    @model_validator(mode="after")
    def _delta_fits_the_sizes(self) -> SiteConfig:
        try:
            check_delta(self.budget.delta, max(task.public_size for task in self.tasks.values()), "budget.delta")
        except BadInput as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _refuse_a_second_main(self) -> SiteConfig:
        if MAIN in self.coordinators:
            raise ValueError(f"coordinators.{MAIN}: expected another name, because the one under `coordinator` has it")
        return self

    @model_validator(mode="after")
    def _stand_in_the_roster(self) -> SiteConfig:
        if self.secure_sum is not None and self.name not in self.secure_sum.roster:
            raise ValueError(f"secure_sum.roster: expected this site, {self.name}, among its names")
        return self

    def list_coordinators(self) -> dict[str, Coordinator]:
        """Returns all coordinators by name."""
        return {**({} if self.coordinator is None else {MAIN: self.coordinator}), **self.coordinators}

    def select(self, name: str | None) -> SiteConfig:
        """Returns the settings for one coordinator; None is the only one, or a simulation's.

        Raises:
            BadInput: there is no such coordinator, or more than one and no name.
        """
        known = self.list_coordinators()
        if name is None and len(known) < 2:
            return self
        if name is None or name not in known:
            names = ", ".join(known) or "nothing, because the site file names none"
            raise BadInput(f"--coordinator: expected {'one of ' if known else ''}{names}, got {name or 'nothing'}")
        if name == MAIN:
            return self.model_copy(update={"coordinators": {}})
        return self.model_copy(update={"coordinator": None, "coordinators": {name: known[name]}})

    @property
    def coordinator_name(self) -> str:
        """The name of the selected coordinator; `main` in a simulation."""
        return next(iter(self.select(None).list_coordinators()), MAIN)

    @property
    def coordinator_dir(self) -> Path:
        """The folder of the selected coordinator's runs, replies, approvals, backbones and journal."""
        name = self.coordinator_name
        return self.state_dir if name == MAIN else self.state_dir / "coordinators" / name

    def list_coordinator_dirs(self) -> dict[str, Path]:
        """Returns the folders of all coordinators that ever asked, by what the names of their charges begin with."""
        named = sorted((self.state_dir / "coordinators").glob("*"))
        return {"": self.state_dir} | {f"{path.name}/": path for path in named}

    def name_charge(self, run_id: str) -> str:
        """Returns the name under which the ledger charges a run of the selected coordinator.

        Two coordinators may choose one id. No id holds a slash, so that none can be mistaken for another's.
        """
        name = self.coordinator_name
        return run_id if name == MAIN else f"{name}/{run_id}"

    def locate_run(self, charged: str) -> Path:
        """Returns the folder of the run of a charge."""
        name, slash, run_id = charged.rpartition("/")
        return (self.state_dir / "coordinators" / name if slash else self.state_dir) / "runs" / run_id
