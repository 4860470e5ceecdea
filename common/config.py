"""Settings: YAML in, frozen models out. The only place that reads YAML.

Two owners, two files: a run file is the coordinator's, a site file is the hospital's. A simulation file is a run,
a partition of a data set into sites, and an executor. Anything that affects privacy has no default.

Paths are relative to the file they are written in. `${NAME}` and `${NAME:-default}` are taken from the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from common.errors import describe, instead, nearest
from common.plugins import Frozen, LocalPath, Spec
from common.types import MAX_BACKBONES, BadInput, Unit

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""Names of runs, sites and tasks become file and record names: short, lower case, no dots or slashes."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _is_address(value: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})", value)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(
            f"expected host:port, such as federation.example.org:9092, without http:// or https:// (it is always TLS), "
            f"got {value!r}"
        )
    return value


Address = Annotated[str, AfterValidator(_is_address)]
"""Host and port; no scheme, because a site never speaks anything but TLS."""
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
MAX_PUBLIC_SIZE = 100_000_000
ONLY_BACKBONE = "backbone"
"""Name of the backbone of a run that names none."""


# --- the coordinator's file ------------------------------------------------------------------------------------------


class Privacy(Frozen):
    """Requested privacy of a whole run. Exactly one of target_epsilon and noise_multiplier; the other follows.

    A site accounts at its own delta and refuses what its budget does not cover.
    """

    unit: Unit
    delta: Annotated[float, Field(ge=1e-12, lt=1)]
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    noise_multiplier: Annotated[float, Field(ge=1e-3)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Privacy:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("expected exactly one of target_epsilon and noise_multiplier")
        return self


class Cohort(Frozen):
    """Which sites are asked in a round, and how many replies a task needs to be updated."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_sites: PositiveInt = 1
    min_replies_per_task: PositiveInt = 1
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    join_timeout_s: Annotated[float, Field(gt=0)] = 120.0


class Evaluation(Frozen):
    """After which rounds the sites evaluate the heads on held-out units: every `every`th, and the last."""

    every: PositiveInt

    def due(self, round_: int, rounds: int) -> bool:
        """Whether the heads are evaluated after this round of so many."""
        return round_ == rounds or (1 <= round_ < rounds and round_ % self.every == 0)

    def times(self, rounds: int) -> int:
        """How many evaluations a run of so many rounds asks for."""
        return -(-rounds // self.every)


class TaskSpec(Spec):
    """A task's settings, and beside them which of the run's backbones it stands on."""

    backbone: Name | None = None
    """None: the only one."""

    def settings(self) -> dict[str, Any]:
        """What the kind's own file is given: a task knows of no backbone."""
        return self.model_dump(exclude={"backbone"})


class Lora(Frozen):
    """Low-rank adapters beside linear layers: y = W x + (alpha / rank) B A x, of which A and B train.

    Attributes:
        rank: of B A.
        alpha: see above.
        targets: last parts of the layers' names, such as `query` and `value`.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[int, Field(ge=1, le=65536)]
    targets: Annotated[list[str], Field(min_length=1)]


class Trainable(Frozen):
    """How much of a backbone trains beside the heads; the rest is frozen, and encoded once.

    Attributes:
        from_: `from` in a file: the first block that trains, such as `layer4`; `input` is everything.
        lora: train adapters from that block on, in place of its own weights.
    """

    from_: Annotated[str, Field(alias="from")]
    lora: Lora | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_a_group(cls, values: Any) -> Any:
        if isinstance(values, str):
            raise ValueError(f"expected {{from: {values}}}, got {values!r}")
        return values

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"from": self.from_, "lora": None if self.lora is None else self.lora.model_dump()}


class RunConfig(Frozen):
    """One federated run, as the coordinator asks for it.

    Its backbones are given as `backbone`, where it is one, or as `backbones` by name. Only the methods of this class
    know which; everybody else asks them.
    """

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    backbone: Spec | None = None
    backbones: Annotated[dict[Name, Spec], Field(min_length=1, max_length=MAX_BACKBONES)] | None = None
    tasks: Annotated[dict[Name, TaskSpec], Field(min_length=1)]
    trainable: dict[Name, Trainable] = {}
    """By backbone (`backbone`, where it has no other name): what of it trains. Without an entry it is frozen."""
    solver: Spec
    privacy: Privacy | Literal["non_private"]
    aggregation: Spec
    cohort: Cohort = Cohort()
    evaluation: Evaluation | None = None
    """None: no site is asked. What an evaluation costs and how much noise it has, each site's own file says."""
    delta_precision: Literal["float32", "float16"] = "float32"
    """Of contributions on their way: float16 takes half the bytes. What is rounded was noised: it costs no privacy."""
    max_delta_norm: Annotated[float, Field(gt=0)] = 1e4
    """A reply whose L2 norm over all heads exceeds this is set aside."""
    audit: Literal["required", "on_request"] = "on_request"
    """`required`: a privacy audit must pass, else nothing is trained and no head is exported; see the verb `audit`."""

    @model_validator(mode="after")
    def _each_task_on_a_backbone(self) -> RunConfig:
        if (self.backbone is None) == (self.backbones is None):
            got = "neither" if self.backbone is None else "both"
            raise ValueError(f"backbone: expected either it or `backbones`, several by name; got {got}")
        names = list(self.encoders)
        for name, task in self.tasks.items():
            if task.backbone is None and len(names) > 1:
                raise ValueError(f"tasks.{name}.backbone: expected one of {', '.join(names)}, got nothing")
            if task.backbone is not None and task.backbone not in names:
                close = nearest(task.backbone, names)
                raise ValueError(
                    f"tasks.{name}.backbone: expected one of {', '.join(names)}, got {task.backbone!r}{close}"
                )
        unused = sorted(set(names) - {self.backbone_of(task) for task in self.tasks})
        if unused:
            raise ValueError(f"backbones.{unused[0]}: expected a task that stands on it, got none")
        unknown = sorted(set(self.trainable) - set(names))
        if unknown:
            raise ValueError(f"trainable: expected some of {', '.join(names)}, got {unknown[0]!r}")
        _check_task_rates(self.solver, self.tasks, "solver")
        rated = self.solver.settings().get("trunk") is not None
        if self.trainable and not rated:
            # The heads' rate is tens of times what a trained network bears.
            raise ValueError(
                "solver: expected a kind that trains a part of a backbone (dp_sgd, or sgd without privacy) with a rate "
                f"for it, `trunk: {{learning_rate: 0.1}}`, because of `trainable`; got {self.solver.kind} without"
            )
        if rated and "trainable" not in self.model_fields_set:
            raise ValueError(
                "solver.trunk: expected `trainable` beside it, which says what of a backbone trains (`{}`: nothing); "
                "got none"
            )
        return self

    @property
    def encoders(self) -> Mapping[Name, Spec]:
        """Every backbone of the run, by name."""
        if self.backbone is not None:
            return {ONLY_BACKBONE: self.backbone}
        assert self.backbones is not None
        return self.backbones

    def encoder_key(self, name: Name) -> str:
        """Where the settings of a backbone stand in the run's file."""
        return "backbone" if self.backbone is not None else f"backbones.{name}"

    def backbone_of(self, task: Name) -> Name:
        """Which backbone a task stands on."""
        return self.tasks[task].backbone or next(iter(self.encoders))

    def trunk_of(self, task: Name) -> str | None:
        """The entry of the heads that holds what trains of a task's backbone; None where all of it is frozen.

        Names of tasks have no dots: no task is called so.
        """
        name = self.backbone_of(task)
        return f"{name}.trunk" if name in self.trainable else None

    def entries(self, sizes: Mapping[Name, int]) -> dict[str, int]:
        """Every entry of the heads at a site with these tasks, with its public size: the tasks, and their trunks.

        A trunk's size is the largest of its tasks': their units are the same patients as far as they overlap, and a
        site that has one task has all its units in it. Where they do not overlap the true number is larger, up to the
        sum, and a trunk's step too, by as much; a smaller learning rate makes up for it. No true count is used.
        """
        own = [(trunk, size) for task, size in sizes.items() if (trunk := self.trunk_of(task)) is not None]
        return {**sizes, **{trunk: max(size for name, size in own if name == trunk) for trunk, _ in own}}

    def with_encoders(self, specs: Mapping[Name, Spec]) -> RunConfig:
        """The same run with other settings of its backbones."""
        if self.backbone is not None:
            return self.model_copy(update={"backbone": specs[ONLY_BACKBONE]})
        return self.model_copy(update={"backbones": {name: specs[name] for name in self.encoders}})


# --- the hospital's file ---------------------------------------------------------------------------------------------


class Budget(Frozen):
    """What the registry may spend in total, for ever."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class Allow(Frozen):
    """What this site agrees to. `any` must be written; nothing is allowed by omission."""

    tasks: list[Name] | Literal["any"]
    backbones: list[Digest] | Literal["any"]
    solvers: list[str] | Literal["any"]
    non_private: bool = False


class SiteTask(Frozen):
    """Where one task's labels are in the site's own data.

    Attributes:
        source: name of an entry in `sources`.
        column: the label column; or one column for each label of a multi-label task, in the task's label order.
        values: local value -> task value; without it, local values are the task's own.
        missing: what an empty label means: `skip` (the record has no label for this task) or `refuse` (an error).
        unmapped: what a value outside `values` and the task's labels means, likewise.
        public_size: declared, public number of units; weights and divisors use it, never the true count.
    """

    source: str
    column: str | list[str]
    values: dict[str, str] | None = None
    missing: Literal["skip", "refuse"]
    unmapped: Literal["skip", "refuse"] = "refuse"
    public_size: Annotated[int, Field(ge=1, le=MAX_PUBLIC_SIZE)]


class Split(Frozen):
    """Held-out units. By a keyed hash of the unit's id, or as a source's own split column says.

    A unit never changes sides when rows are added or reordered.
    """

    test_fraction: Annotated[float, Field(ge=0, lt=1)]
    salt: str = ""


class NoisedEvaluation(Frozen):
    """Held-out units are evaluated in noised counts, from a share of the budget fixed beforehand.

    Attributes:
        share: part of the budget that evaluations of all runs together may spend, and nothing else may.
        evaluations: how many the share pays for; each is noised accordingly.
    """

    share: Annotated[float, Field(gt=0, lt=1)]
    evaluations: PositiveInt


class Coordinator(Frozen):
    """Whom a deployed site joins.

    Attributes:
        address: host and port of the coordinator, such as `federation.example.org:9092`.
        ca: certificate of the authority that signed the coordinator's.
        key: this site's private key; it never leaves.
        health_port: loopback port of the health service; None for none.
    """

    address: Address
    ca: LocalPath
    key: LocalPath
    health_port: Annotated[int, Field(ge=1, le=65535)] | None = None


class SiteConfig(Frozen):
    """One data holder.

    Attributes:
        evaluation: of held-out units; `local`: only on this machine, nothing about them is ever sent.
        approval: `required`: runs are joined after `python -m client approve`; `automatic`: whatever `allow` covers.
        coordinator: whom to join; None where a simulation carries the messages.
        own_backbones: opened from here instead of being received, where a run's backbone has their digest.
        plugins: folder of the site's own source kinds, one file each.
    """

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
    own_backbones: list[Spec] = []
    plugins: LocalPath | None = None
    state_dir: LocalPath
    cache_dir: LocalPath | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    """Inside the backbone: bfloat16 takes half the time and changes features a little; the site's journal says by how
    much."""

    @model_validator(mode="after")
    def _sources_exist(self) -> SiteConfig:
        for name, task in self.tasks.items():
            if task.source not in self.sources:
                raise ValueError(f"tasks.{name}.source: expected one of {', '.join(self.sources)}, got {task.source!r}")
        return self


# --- a simulation ----------------------------------------------------------------------------------------------------


class SimulatedTask(Frozen):
    """Like `SiteTask`; public_size is per simulated site. `all` sites are those that have the source."""

    source: str
    column: str | list[str]
    values: dict[str, str] | None = None
    missing: Literal["skip", "refuse"]
    unmapped: Literal["skip", "refuse"] = "refuse"
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


Baseline = Literal["obvious", "local", "non_private", "central", "random_backbone"]


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
    non_private_solver: Spec | None = None
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
            _check_task_rates(other, self.run.tasks, "non_private_solver")
        if self.run.trainable and other is not None and other.settings().get("trunk") is None:
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
        names = list(self.run.encoders)
        if self.pretrain.backbone is None and len(names) == 1:
            return names[0]
        if self.pretrain.backbone not in names:
            got = self.pretrain.backbone or "nothing"
            raise ValueError(f"pretrain.backbone: expected one of {', '.join(names)}, got {got}")
        return self.pretrain.backbone


# The safe ones, from libyaml where it is there: eight times as fast, for thousands of simulated sites' files.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_DUMPER = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper

# --- reading ---------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """A validated model from a YAML file.

    Args:
        model: RunConfig, SiteConfig or SimulationConfig.
        path: the file.
        overrides: "key.path=value" strings; the value is YAML; one that starts with "./" or "../" is a path relative
            to the working directory.

    Raises:
        BadInput: in one sentence what is wrong and where.
    """
    values = read_yaml(path, overrides)
    _refuse_another_file(model, values, path)
    return parse(model, values, base=path.resolve().parent)


def _check_task_rates(solver: Spec, tasks: Collection[str], key: str) -> None:
    """Refuse rates of a task that the run does not have: they would never be used."""
    rates = solver.settings().get("tasks")
    unknown = sorted(set(rates) - set(tasks)) if isinstance(rates, Mapping) else []
    if unknown:
        known = ", ".join(tasks)
        raise ValueError(f"{key}.tasks: expected some of {known}, got {unknown[0]!r}{nearest(unknown[0], tasks)}")


def _refuse_another_file(model: type[BaseModel], values: Mapping[str, Any], path: Path) -> None:
    """Raise BadInput where the file is plainly one of another owner: its unknown keys would explain nothing."""
    kinds: dict[type[BaseModel], tuple[str, set[str]]] = {
        RunConfig: ("run file", {"solver", "aggregation"}),
        SiteConfig: ("site file", {"registry", "state_dir"}),
        SimulationConfig: ("simulation file", {"run", "partition"}),
    }
    found = [(kind, name) for kind, (name, keys) in kinds.items() if keys <= set(values)]
    if model not in kinds or len(found) != 1 or found[0][0] is model:
        return
    hints: dict[tuple[type[BaseModel], type[BaseModel]], str] = {
        (RunConfig, SimulationConfig): "; `python -m simulations sites FILE FOLDER` writes its run and sites as files",
        (SiteConfig, SimulationConfig): "; `python -m simulations sites FILE FOLDER` writes its run and sites as files",
        (SimulationConfig, RunConfig): ", which is the `run` section of one",
    }
    raise BadInput(f"{path}: expected a {kinds[model][0]}, got a {found[0][1]}{hints.get((model, found[0][0]), '')}")


def parse(model: type[Model], values: Mapping[str, Any], *, base: Path) -> Model:
    """A validated model from plain values; relative paths in it are relative to `base`."""
    try:
        return model.model_validate(values, context={"base": base})
    except ValidationError as error:
        raise BadInput(describe(error, model)) from error


def parse_text(model: type[Model], content: bytes, where: str) -> Model:
    """A validated model from YAML that a stranger wrote: no environment variable is filled in.

    Raises:
        BadInput: in one sentence what is wrong; `where` names the text.
    """
    try:
        values = yaml.load(content.decode(), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{where}: expected valid YAML, got {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{where}: expected keys and values, got {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInput(describe(error, model, where)) from error


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with environment variables filled in and overrides applied."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected a readable YAML file{instead(error)}") from error
    try:
        values = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise BadInput(f"{path}: expected valid YAML, got a syntax error{where}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    filled = _fill(values, "")
    assert isinstance(filled, dict)
    return filled


def as_override(key: str, value: Any) -> str:
    """The "key.path=value" string that sets a key to a plain value."""
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def write_yaml(path: Path, model: BaseModel) -> None:
    """Write a model as YAML, readable by `load`."""
    values = model.model_dump(mode="json")  # None too: a written null may be required (`crop: null`).
    path.write_text(yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"--set {override}: expected key.path=value")
    try:
        value = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {key}: expected a YAML value, got {text!r}") from error
    if isinstance(value, str) and value.startswith(("./", "../")):
        value = str(Path(value).resolve())
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise BadInput(f"--set {key}: {parent} is a value, not a group of keys")
        target = inner
    target[last] = value


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _fill(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _fill(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, key) for inner in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise BadInput(f"{key}: environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(lookup, value)
