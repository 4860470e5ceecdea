"""The simulation file: a run, a partition of a data set into sites, and an executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from client.config import ALIGNERS, Budget, LabelColumns, NoisedEvaluation, Personal, SiteConfig
from common.backbones import CacheBits
from common.plugins import Frozen, LocalPath, Spec
from common.run import MAX_PUBLIC_SIZE, Name, PositiveInt, RunConfig, SolverSpec
from common.types import Unit

RUN_PREFIX = "run."
"""Beginning of a run's keys in a simulation file."""


class SimulatedTask(LabelColumns):
    """One task over all simulated sites.

    Attributes:
        public_size: declared number of units at every site, or site name -> declared number of units.
        sites: names of the sites that have the task; `all` are those that have the source.
    """

    public_size: Annotated[int, Field(ge=1, le=MAX_PUBLIC_SIZE)] | dict[Name, int]
    sites: list[Name] | Literal["all"] = "all"


Keep = Literal["all"] | dict[str, list[str]]
"""Records that a site keeps of those it was dealt: column -> accepted cells, or all of them."""


class Partition(Frozen):
    """The division of data sets into sites.

    Kinds: `iid` shuffles and deals out evenly; `dirichlet` draws each label's part at each site from Dirichlet(alpha),
    for the labels of task `by`; `column` makes one site for each value of column `by`; `natural` gives each site
    sources of its own under `sites`. With `natural`, a source under `divide` is dealt out evenly to the sites named
    there; of its part a site keeps `all` records, or those with one of the listed cells in each listed column.

    Attributes:
        kind: the way of dividing.
        num_sites: number of sites, with `iid` and `dirichlet`.
        alpha: concentration of the Dirichlet distribution; a small one makes sites unlike each other.
        by: a task, with `dirichlet`; a column, with `column`.
        sites: site name -> its own sources by name, with `natural`.
        divide: source name -> site name -> what the site keeps of its part, with `natural`.
        thin: source name -> column -> cell -> part of the training records with this cell that the sites have together;
            of records that are held out none is left out. It makes a set with rare labels of a balanced one.
        split: how units are held out: `hash` of the unit's id, the `source`'s own split, or `stratified` by label.
        test_fraction: part of the units that are held out.
        seed: seed of the division.
    """

    kind: Literal["iid", "dirichlet", "column", "natural"]
    num_sites: PositiveInt | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    by: str | None = None
    sites: dict[Name, dict[Name, Spec]] | None = None
    divide: dict[Name, Annotated[dict[Name, Keep], Field(min_length=1)]] = {}
    thin: dict[Name, dict[str, dict[str, Annotated[float, Field(gt=0, lt=1)]]]] = {}
    split: Literal["source", "hash", "stratified"] = "hash"
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> Partition:
        needed = {
            "iid": ("num_sites",),
            "dirichlet": ("num_sites", "alpha", "by"),
            "column": ("by",),
            "natural": () if self.divide else ("sites",),
        }[self.kind]
        if self.divide and self.kind != "natural":
            raise ValueError(f"partition.divide: expected it in kind natural, got {self.kind!r}")
        if self.thin and self.split != "source":
            raise ValueError(
                f"partition.thin: expected `split: source`, which says what to train on, got {self.split!r}"
            )
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"partition.{field}: expected a value for kind {self.kind!r}, got nothing")
        return self


class Executor(Frozen):
    """The executor: `in_process` runs all sites in this process one after the other, `batched` runs many sites of one
    source as rows of arrays, `flower` runs them as Ray actors.

    Attributes:
        kind: the executor.
        encoded_sites: number of sites that are asked by encoded messages and compared, with `batched`.
        encoded_every: so many rounds lie between two in which that is done; it is done in the first too.
        shards: number of parts into which `batched` divides the sites; above 1 each is a Ray actor, on this machine or
            on those of `ray_address`, and the result is the same to the bit.
        cpus_per_site: CPU cores that each Ray actor reserves.
        gpus_per_site: GPUs that each Ray actor reserves.
        ray_address: address of a running Ray cluster, with `flower` or shards; without it, Ray starts on this machine.
    """

    kind: Literal["in_process", "batched", "flower"] = "in_process"
    encoded_sites: PositiveInt = 2
    encoded_every: PositiveInt = 10
    shards: PositiveInt = 1
    cpus_per_site: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_site: Annotated[float, Field(ge=0)] = 0.0
    ray_address: str | None = None

    @model_validator(mode="after")
    def _check_settings_of_kind(self) -> Executor:
        ignored = {
            "in_process": ("shards", "encoded_sites", "encoded_every", "cpus_per_site", "gpus_per_site", "ray_address"),
            "batched": ("gpus_per_site",),
            "flower": ("shards", "encoded_sites", "encoded_every"),
        }[self.kind]
        for name in ignored:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: expected none beside `kind: {self.kind}`, which does not use it")
        return self


Baseline = Annotated[
    Literal[
        "baseline_prediction",
        "local",
        "non_private",
        "central",
        "random_backbone",
        "untouched",
        "untouched_restricted",
    ],
    # The name in files that were written before the field's word was used.
    BeforeValidator(lambda name: "baseline_prediction" if name == "obvious" else name),
]


class Sweep(Frozen):
    """Several runs: every combination of the listed values, once for each seed.

    Attributes:
        seeds: the seeds.
        values: key of the file -> its values.
    """

    seeds: Annotated[list[int], Field(min_length=1)]
    values: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Pretrain(Frozen):
    """Settings of `simulations pretrain`, which trains one of the run's backbones on public records.

    Attributes:
        backbone: name of the backbone; needed where the run has several.
        sources: sources of public records, which are trained on together.
        label: column of the labels; none for a backbone that writes texts, which is trained on pairs of texts.
        labels: values of the column.
        epochs: number of passes over all records.
        batch_size: number of records in a step.
        learning_rate: learning rate of the first step, which falls to 0 as a cosine; of pairs of texts it rises in the
            first steps and falls in a line.
        max_shift: each batch is shifted around the edge by up to this many pixels, as augmentation.
        seed: seed of initial weights, order and shifts.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"column": "label"}
    backbone: Name | None = None
    sources: Annotated[list[Spec], Field(min_length=1)]
    label: str | None = None
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    max_shift: Annotated[int, Field(ge=0)] = 0
    seed: int


class SimulationConfig(Frozen):
    """A run, a partition of data sets into sites, and an executor.

    Attributes:
        run: the run, as in a run file.
        sources: data sets that are divided into sites, by name.
        tasks: task name -> its labels and its sites.
        partition: the division into sites.
        leave_out: name of a site that does not train; metrics are then those on its held-out records alone, and say how
            the heads do at a site that they have not seen.
        unit: what each site's budget protects.
        budget: budget of each site.
        on_bad_record: whether a record that cannot be used is left out and listed, or stops the simulation.
        min_usable_share: the simulation stops before it trains where a site can use a smaller part of its records.
        evaluation: evaluation of held-out units, as in a site file.
        personal: heads that each site adapts to itself, as in a site file; they are then compared with the federated
            ones and with those of each site alone, on each site's own held-out records.
        aligners: ways of moving features that `personal: adapt` tries, as in a site file.
        executor: what carries the messages.
        baselines: baselines to compute.
        non_private_solver: solver of the baselines `non_private` and `central`; by default the run's own, without clip
            and noise.
        pretrain: settings of `simulations pretrain`.
        expect: task name -> what its result must beat; else the command exits with code 1.
        noise_seed: seed of sampling and noise, for papers only: the result is reproducible and not private.
        device: device of every site.
        precision: precision inside backbones, as in a site file.
        cache_bits: bits of a cached feature, as in a site file.
        cache_dir: folder of cached features.
        runs_dir: folder of the runs' folders.
        sweep: settings of `simulations sweep`.
    """

    model_config = ConfigDict(title="simulation file")

    run: RunConfig
    sources: dict[Name, Spec] = {}
    tasks: Annotated[dict[Name, SimulatedTask], Field(min_length=1)]
    partition: Partition
    leave_out: Name | None = None
    unit: Unit
    budget: Budget
    on_bad_record: Literal["skip", "stop"] = "skip"
    min_usable_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    evaluation: NoisedEvaluation | Literal["local"] = "local"
    personal: Personal = "none"
    aligners: Annotated[list[Spec], Field(min_length=1)] = list(ALIGNERS)
    executor: Executor = Executor()
    baselines: list[Baseline] = []
    non_private_solver: SolverSpec | None = None
    pretrain: Pretrain | None = None
    expect: dict[Name, Literal["beats_random_backbone"]] = {}
    noise_seed: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    cache_bits: CacheBits = 16
    cache_dir: LocalPath
    runs_dir: LocalPath
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _tasks_agree(self) -> SimulationConfig:
        for name in self.run.tasks:
            if name not in self.tasks:
                raise ValueError(f"tasks.{name}: expected where this task's labels are, got nothing")
        for key in ("divide", "thin"):
            unknown = sorted(set(getattr(self.partition, key)) - set(self.sources))
            if unknown:
                known = ", ".join(self.sources) or "none"
                raise ValueError(f"partition.{key}.{unknown[0]}: expected one of the file's sources ({known})")
        self.pretrained_backbone()
        other = self.non_private_solver
        if other is not None:
            other.check_tasks(self.run.tasks, "non_private_solver")
        if self.run.trainable and other is not None and other.trunk is None:
            raise ValueError("non_private_solver.trunk: expected a learning rate of its own for `trainable`, got none")
        if self.expect and "random_backbone" not in self.baselines:
            raise ValueError(
                "baselines: expected random_backbone among them, because `expect` compares with it; without it write "
                "`--set expect={}` too"
            )
        return self

    def list_training_sites(self, sites: Sequence[SiteConfig]) -> list[SiteConfig]:
        """Returns the sites that train: all but the one that is left out."""
        return [site for site in sites if site.name != self.leave_out]

    def list_judging_sites(self, sites: Sequence[SiteConfig]) -> list[SiteConfig]:
        """Returns the sites whose held-out records judge the heads: the one that is left out, else all."""
        return [site for site in sites if self.leave_out in (None, site.name)]

    def pretrained_backbone(self) -> Name | None:
        """Returns the name of the backbone that `simulations pretrain` trains; None without a `pretrain` section."""
        if self.pretrain is None:
            return None
        names = list(self.run.backbone_specs)
        if self.pretrain.backbone is None and len(names) == 1:
            return names[0]
        if self.pretrain.backbone not in names:
            got = self.pretrain.backbone or "nothing"
            raise ValueError(f"pretrain.backbone: expected one of {', '.join(names)}, got {got}")
        return self.pretrain.backbone
