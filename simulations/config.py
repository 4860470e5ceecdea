"""The simulation file: a run, a partition of a data set into sites, and an executor."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from client.config import Budget, LabelColumns, NoisedEvaluation
from common.plugins import Frozen, LocalPath, Spec
from common.run import MAX_PUBLIC_SIZE, Name, PositiveInt, RunConfig, SolverSpec
from common.types import Unit

RUN_PREFIX = "run."
"""Where a run's keys stand in a simulation file."""


class SimulatedTask(LabelColumns):
    """One task over all simulated sites.

    Attributes:
        public_size: declared number of units at each site, or of each site by its name.
        sites: names of the sites that have the task; `all` are those that have the source.
    """

    public_size: Annotated[int, Field(ge=1, le=MAX_PUBLIC_SIZE)] | dict[Name, int]
    sites: list[Name] | Literal["all"] = "all"


Keep = Literal["all"] | dict[str, list[str]]
"""Which of the records that were dealt out to a site it keeps: column -> cells."""


class Partition(Frozen):
    """How one data set becomes several sites.

    iid: shuffled evenly; dirichlet: label skew of strength `alpha` over the task `by`; column: one site for each value
    of column `by`; natural: each site brings its own sources under `sites`. A source of the file that several of them
    are to have parts of stands under `divide`: it is dealt out evenly to the sites named there, and of its part a site
    keeps `all` records, or those with one of the listed cells in each listed column.
    """

    kind: Literal["iid", "dirichlet", "column", "natural"]
    num_sites: PositiveInt | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    by: str | None = None
    sites: dict[Name, dict[Name, Spec]] | None = None
    divide: dict[Name, Annotated[dict[Name, Keep], Field(min_length=1)]] = {}
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
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"partition.{field}: expected a value for kind {self.kind!r}, got nothing")
        return self


class Executor(Frozen):
    """in_process: all sites in this process, through Flower's own encoding. flower: Ray actors."""

    kind: Literal["in_process", "flower"] = "in_process"
    cpus_per_site: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_site: Annotated[float, Field(ge=0)] = 0.0
    ray_address: str | None = None


Baseline = Annotated[
    Literal["baseline_prediction", "local", "non_private", "central", "random_backbone"],
    # The name in files that were written before the field's word was used.
    BeforeValidator(lambda name: "baseline_prediction" if name == "obvious" else name),
]


class Sweep(Frozen):
    """Several runs: every combination of the listed values, once per seed."""

    seeds: Annotated[list[int], Field(min_length=1)]
    values: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Pretrain(Frozen):
    """How `simulations pretrain` trains one of the run's backbones on public records, of all its sources together."""

    backbone: Name | None = None
    """Which, where the run has several."""
    sources: Annotated[list[Spec], Field(min_length=1)]
    column: str
    labels: Annotated[list[str], Field(min_length=2)]
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    max_shift: Annotated[int, Field(ge=0)] = 0
    """Each batch is moved, around the edge, by up to this many pixels: augmentation."""
    seed: int


class SimulationConfig(Frozen):
    """A run, a partition of a data set into sites, and an executor."""

    model_config = ConfigDict(title="simulation file")

    run: RunConfig
    sources: dict[Name, Spec] = {}
    tasks: Annotated[dict[Name, SimulatedTask], Field(min_length=1)]
    partition: Partition
    unit: Unit
    budget: Budget
    on_bad_record: Literal["skip", "stop"] = "skip"
    evaluation: NoisedEvaluation | Literal["local"] = "local"
    executor: Executor = Executor()
    baselines: list[Baseline] = []
    non_private_solver: SolverSpec | None = None
    """Solver of the non-private baselines; needed where any is asked for."""
    pretrain: Pretrain | None = None
    expect: dict[Name, Literal["beats_random_backbone"]] = {}
    noise_seed: int | None = None
    """For papers only: the result is reproducible, not private."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    """As in a site's file."""
    cache_dir: LocalPath
    runs_dir: LocalPath
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _tasks_agree(self) -> SimulationConfig:
        for name in self.run.tasks:
            if name not in self.tasks:
                raise ValueError(f"tasks.{name}: expected where this task's labels are, got nothing")
        unknown = sorted(set(self.partition.divide) - set(self.sources))
        if unknown:
            known = ", ".join(self.sources) or "none"
            raise ValueError(f"partition.divide.{unknown[0]}: expected one of the file's sources ({known})")
        self.pretrained_backbone()
        if self.non_private_solver is None and {"non_private", "central"} & set(self.baselines):
            raise ValueError("non_private_solver: expected a solver for the non-private baselines, got nothing")
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

    def pretrained_backbone(self) -> Name | None:
        """Name of the backbone that `simulations pretrain` trains; None where there is none."""
        if self.pretrain is None:
            return None
        names = list(self.run.backbone_specs)
        if self.pretrain.backbone is None and len(names) == 1:
            return names[0]
        if self.pretrain.backbone not in names:
            got = self.pretrain.backbone or "nothing"
            raise ValueError(f"pretrain.backbone: expected one of {', '.join(names)}, got {got}")
        return self.pretrain.backbone
