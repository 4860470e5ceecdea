"""The run file: what a coordinator asks for. Anything that affects privacy has no default.

Paths are relative to the file they are written in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from common.errors import describe, nearest
from common.plugins import Frozen, Spec, resolve
from common.types import DELTAS, EPSILONS, MAX_BACKBONES, NOISE_MULTIPLIERS, BadInput, Unit

if TYPE_CHECKING:
    from common.backbones.parts.hub.packs import StatedWeights

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""Names of runs, sites and tasks become file and record names: short, lower case, no dots or slashes."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]

Rounds = Annotated[int, Field(ge=1, le=100_000)]

MAX_PUBLIC_SIZE = 100_000_000

AUTO = "auto"
"""Kind of solver that no plug-in has: while a run file is read, settings take its place (`common.model.auto`)."""

ONLY_BACKBONE = "backbone"
"""Name of the backbone of a run that names none."""


def drop_unset(model: BaseModel, values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Returns a model's dumped values without those of some keys that its file does not set.

    The digest that a site approves covers the run as it was written: a key that a later version adds is in it only
    where a file uses the key.

    Args:
        model: the model.
        values: its dumped values.
        keys: the keys that came later.
    """
    unset = set(keys) - model.model_fields_set
    return {key: value for key, value in values.items() if key not in unset}


class Privacy(Frozen):
    """Requested privacy of a whole run. Exactly one of target_epsilon and noise_multiplier; the other follows.

    A site accounts at its own delta and refuses what its budget does not cover.

    Attributes:
        unit: what one budget protects; a site whose own unit differs declines.
        delta: delta for which the noise is computed from `target_epsilon`; each site accounts at its own.
        target_epsilon: epsilon of the whole run, from which the noise follows.
        noise_multiplier: standard deviation of the noise in multiples of the clip norm, from which epsilon follows.
    """

    unit: Unit
    delta: Annotated[float, Field(ge=DELTAS.low, le=DELTAS.high)]
    target_epsilon: Annotated[float, Field(ge=EPSILONS.low, le=EPSILONS.high)] | None = None
    noise_multiplier: Annotated[float, Field(ge=NOISE_MULTIPLIERS.low, le=NOISE_MULTIPLIERS.high)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Privacy:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("expected exactly one of target_epsilon and noise_multiplier")
        return self


class Cohort(Frozen):
    """The sites that are asked in a round, the replies that a round needs (its quorum), and how long it waits.

    Attributes:
        fraction: part of the joined sites that are asked in a round.
        min_sites: number of sites that must join before the first round, that are asked at least in a round, and whose
            updates a round needs at least.
        min_replies_per_task: number of accepted updates that a round needs of each task, where so many of the sites
            asked have it; where fewer have it, the task is not updated in that round.
        timeout_s: seconds after which a round that has its quorum no longer waits for replies.
        join_timeout_s: seconds after which the run no longer waits for sites to join.
        grace_s: seconds for which a round that has its quorum waits for a site after the connection to it was lost, and
            beyond twice the longest time that the site has needed so far. A connected site that has not answered yet
            in the run is waited for until `timeout_s`.
        patience_s: seconds for which a round without its quorum waits for missing sites: those that are not connected
            or failed, and connected ones after `timeout_s`. Then the run ends, and can be resumed.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_sites: PositiveInt = 1
    min_replies_per_task: PositiveInt = 1
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    join_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    grace_s: Annotated[float, Field(ge=0)] = 30.0
    patience_s: Annotated[float, Field(ge=0)] = 600.0

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("grace_s", "patience_s"))

    def count_asked(self, num_sites: int) -> int:
        """Returns the number of sites that a round asks, of so many that joined."""
        return min(num_sites, max(self.min_sites, math.ceil(self.fraction * num_sites)))


class Evaluation(Frozen):
    """After which rounds the sites evaluate the heads on held-out units: every `every`th, and the last.

    Attributes:
        every: number of rounds between two evaluations.
        calibrate: releases also how far the heads' confidence is from their accuracy, from which the coordinator
            computes the temperature that probabilities need. It costs no budget; the noise in the other metrics grows
            by a fifth.
    """

    every: PositiveInt
    calibrate: bool = False

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("calibrate",))

    def due(self, round_: int, rounds: int) -> bool:
        """Returns true if the heads are evaluated after this round."""
        return round_ == rounds or (1 <= round_ < rounds and round_ % self.every == 0)

    def times(self, rounds: int) -> int:
        """Returns the number of evaluations that a run of so many rounds asks for."""
        return -(-rounds // self.every)


class TaskSpec(Spec):
    """A task's settings, and beside them the name of the backbone that it uses.

    Attributes:
        backbone: name of one of the run's backbones; None where there is only one.
    """

    backbone: Name | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the kind's own file is given: a task knows of no backbone."""
        return self.model_dump(exclude={"backbone"})


class Rates(Frozen):
    """Learning rate and weight decay of one parameter group.

    Attributes:
        learning_rate: learning rate of the step on the mean gradient.
        weight_decay: weight decay of that step.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class TrunkRates(Rates):
    """Learning rate and weight decay of the trunks.

    Attributes:
        layer_decay: factor on the rate from each block that trains to the one below it; the last block has the rate.
    """

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class SolverSpec(Spec):
    """A solver's settings, of which the run file itself reads what refers to the run's own tasks and trunks.

    Every kind that trains with such rates calls them `tasks` and `trunk`; their values are the kind's own. A private
    kind with the names of `common.privacy.update_norm.DescentSettings` promises updates of the length derived there.

    Attributes:
        tasks: rates of the heads of some tasks, by the task's name; the kind's other settings are those of the rest.
        trunk: rates of the part of a backbone that trains; None where the file gives none.
    """

    tasks: dict[str, Any] = {}
    trunk: Any = None

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), type(self).model_fields)

    def check_tasks(self, tasks: Collection[str], key: str) -> None:
        """Raises ValueError where a rate is of a task that the run does not have: it would never be used."""
        unknown = sorted(set(self.tasks) - set(tasks))
        if unknown:
            known = ", ".join(tasks)
            raise ValueError(f"{key}.tasks: expected some of {known}, got {unknown[0]!r}{nearest(unknown[0], tasks)}")


class Moments(Frozen):
    """Noised sums that sites release once, before the first round, and their parts of the run's privacy.

    A part is one of mu^2 (Gaussian differential privacy): parts of releases add up, and the rounds have the rest.

    Attributes:
        means: part for the mean of the features of each backbone on which a head with `centre` stands, all together.
        counts: part for how frequent each label is of each task whose head has a `prior`, all together.
        classes: part for the sum of the features of each class, of each task with classes whose head has a `prior`, all
            together; the run's model has them, and a site can adapt the head to records of another kind by them.
        scatter: part for the products of features with each other, of each backbone on which such a head stands, all
            together; they are for the same, and need `classes`.
    """

    means: Annotated[float, Field(ge=0, lt=1)] = 0.0
    counts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    classes: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scatter: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _leave_something(self) -> Moments:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"expected parts that are together above 0 and below 1, got {self.share:g}")
        return self

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("classes", "scatter"))

    @property
    def share(self) -> float:
        """The part of the run's mu^2 that all take together."""
        return self.means + self.counts + self.classes + self.scatter


class ChoiceSettings(Frozen):
    """A vote of the sites on the backbone of one task, in place of training; the run's `backbones` are the candidates.

    Each site releases only which of them fits its training records best, at the pure epsilon `privacy.target_epsilon`.

    Attributes:
        scorer: what a vote minimises.
    """

    scorer: Spec = Spec(kind="ridge")


class Schedule(Frozen):
    """A factor on each round's step, which follows from the number of the round alone.

    Attributes:
        warm_up: number of rounds in which the factor rises to 1, in equal parts; the round after them has 1.
        shape: course of the factor after that: `linear` and `cosine` fall from 1 to `end` in the last round.
        end: factor of the last round where it falls.
    """

    warm_up: Annotated[int, Field(ge=0, le=100_000)] = 0
    shape: Literal["constant", "linear", "cosine"] = "constant"
    end: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _fall_to_an_end(self) -> Schedule:
        if self.shape == "constant" and "end" in self.model_fields_set:
            raise ValueError("end: expected none beside `shape: constant`, which does not fall")
        return self

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), type(self).model_fields)

    def check_rounds(self, rounds: int) -> None:
        """Raises ValueError where a run of so many rounds ends before the schedule does."""
        needed = self.warm_up + (1 if self.shape == "constant" else 2)
        if needed > rounds:
            raise ValueError(f"expected a schedule of at most the run's {rounds} round(s), got one of {needed}")

    def compute_factor(self, round_: int, rounds: int) -> float:
        """Returns the factor of one round.

        Args:
            round_: number of the round, from 1.
            rounds: number of rounds of the run.
        """
        if round_ <= self.warm_up:
            return round_ / (self.warm_up + 1)
        if self.shape == "constant":
            return 1.0
        done = (round_ - self.warm_up - 1) / (rounds - self.warm_up - 1)
        left = 1.0 - done if self.shape == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
        return self.end + (1.0 - self.end) * left


class Adjustment(Frozen):
    """Settings of any aggregation that act on a round's updates or new parameters, and so cost no privacy.

    With factor f of the schedule and the decay d, old parameters W and what the aggregator makes of them, W', the
    round's new parameters are W_start + (1 - d) (W + f (W' - W) - W_start).

    Attributes:
        schedule: factor on each round's step; without it 1.
        decay_to_start: part of the distance from the parameters before the first round that each round takes away.
        balance: `sites` lets each site count the same, whatever its size; groups by name, each with a list of sites,
            count the same each, and a site that is in none is one of its own. Without it each unit counts the same,
            which has the least noise.
    """

    schedule: Schedule | None = None
    decay_to_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    balance: Literal["sites"] | Annotated[dict[Name, list[Name]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_group_each(self) -> Self:
        listed = [site for sites in self.groups.values() for site in sites]
        twice = sorted({site for site in listed if listed.count(site) > 1})
        if twice:
            raise ValueError(f"balance: expected each site in one group, got {twice[0]} in more")
        return self

    @property
    def groups(self) -> Mapping[Name, Sequence[Name]]:
        """The declared groups of sites; none where each is one of its own, or each unit counts the same."""
        return self.balance if isinstance(self.balance, dict) else {}

    def weigh_sites(self, sizes: Mapping[str, float]) -> dict[str, float]:
        """Returns the weight of each site's mean update: its size, times what makes all groups count the same.

        The weights add up to all units. One unit of a site counts N / (G n) times as much as without groups, with N
        units at all sites, G groups among them and n units in the site's own.

        Args:
            sizes: site -> declared number of units; at least one.
        """
        if self.balance is None:
            return dict(sizes)
        group_of = {site: (name,) for name, sites in self.groups.items() for site in sites}
        own = {site: group_of.get(site, (site, "alone")) for site in sizes}
        totals: dict[tuple[str, ...], float] = {}
        for site, size in sizes.items():
            totals[own[site]] = totals.get(own[site], 0.0) + size
        share = sum(sizes.values()) / len(totals)
        return {site: size * share / totals[own[site]] for site, size in sizes.items()}

    def count_effective_units(self, sizes: Mapping[str, float]) -> float:
        """Returns the number of units without groups, at as many sites, whose mean update has the same noise.

        With equal noise in each site's sum, the mean over groups has sqrt(sum r^2 / K) times as much as that over
        units, r the factors of `weigh_sites` and K sites: never less than 1, because the r have mean 1 over units.

        Args:
            sizes: site -> declared number of units; at least one.
        """
        weights = self.weigh_sites(sizes)
        factors = [weights[site] / size for site, size in sizes.items()]
        return sum(sizes.values()) * math.sqrt(len(factors) / math.fsum(factor**2 for factor in factors))

    def compute_factor(self, round_: int, rounds: int) -> float:
        """Returns the factor on the step of one round.

        Args:
            round_: number of the round, from 1.
            rounds: number of rounds of the run.
        """
        return 1.0 if self.schedule is None else self.schedule.compute_factor(round_, rounds)


NO_ADJUSTMENT = Adjustment()


class AggregationSpec(Spec, Adjustment):
    """An aggregator's settings, beside them those of every kind, and other values of some for the heads of some tasks.

    Attributes:
        tasks: task -> setting -> its value for that task's head.
    """

    model_config = ConfigDict(extra="allow")

    tasks: dict[str, dict[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("tasks", *Adjustment.model_fields))

    def select(self, group: str | None) -> Spec:
        """Returns the settings of one head or trunk as the kind's own file reads them; None: without any task's own."""
        values = {**self.model_dump(exclude={"tasks"}), **self.tasks.get(group or "", {})}
        return Spec(**{name: value for name, value in values.items() if name not in Adjustment.model_fields})

    def select_adjustment(self, group: str) -> Adjustment:
        """Returns the settings of every kind for one head or trunk."""
        values = {**self.model_dump(), **self.tasks.get(group, {})}
        return Adjustment(**{name: values[name] for name in Adjustment.model_fields if name in values})

    def check_adjustments(self, rounds: int) -> None:
        """Raises ValueError where a setting of every kind is wrong for some task, or in a run of so many rounds."""
        for name, key in (("", "aggregation"), *((name, f"aggregation.tasks.{name}") for name in self.tasks)):
            try:
                adjustment = self.select_adjustment(name)
            except ValidationError as error:
                raise ValueError(describe(error, Adjustment, key)) from error
            if adjustment.schedule is not None:
                try:
                    adjustment.schedule.check_rounds(rounds)
                except ValueError as error:
                    raise ValueError(f"{key}.schedule: {error}") from error

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raises ValueError where a setting is of a task that the run does not have, or is the kind."""
        for name, settings in self.tasks.items():
            if name not in tasks:
                known = ", ".join(tasks)
                raise ValueError(f"aggregation.tasks: expected some of {known}, got {name!r}{nearest(name, tasks)}")
            if "kind" in settings:
                raise ValueError(f"aggregation.tasks.{name}: expected settings of kind {self.kind}, got another kind")


class Lora(Frozen):
    """Low-rank adapters beside linear layers: y = W x + (alpha / rank) B A x, of which A and B train.

    Attributes:
        rank: rank of the product B A.
        alpha: factor alpha of the formula.
        targets: last parts of the layers' names, such as `query` and `value`.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[int, Field(ge=1, le=65536)]
    targets: Annotated[list[str], Field(min_length=1)]


class Trainable(Frozen):
    """The part of a backbone that trains beside the heads; the rest is frozen, and encoded once.

    Attributes:
        from_: `from` in a file: the first block that trains, such as `layer4`; `input` is everything.
        lora: trains adapters from that block on, in place of its own weights.
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


def _require_less(schema: dict[str, Any]) -> None:
    """Lets an editor accept a run file without what `solver: {kind: auto}` chooses."""
    schema["required"] = [name for name in schema["required"] if name not in ("rounds", "aggregation")]


def _find_kind(spec: Any) -> Any:
    return spec.get("kind") if isinstance(spec, Mapping) else getattr(spec, "kind", None)


class RunConfig(Frozen):
    """One federated run, as the coordinator asks for it.

    Its backbones are given as `backbone`, where it is one, or as `backbones` by name. Only the methods of this class
    know which; everybody else asks them.

    Attributes:
        name: short name of the run; it begins the run's id.
        seed: seed of initial weights, cohorts and splits of a simulation; never of privacy noise or sampling.
        rounds: number of rounds.
        backbone: the one backbone of the run. Exactly one of `backbone` and `backbones`.
        backbones: the backbones of a run that has several, by name.
        tasks: the tasks by name; where there are several backbones, each task names its own.
        trainable: name of a backbone (`backbone`, where it has no other) -> what of it trains; without an entry it is
            frozen.
        licences: name of a backbone (`backbone`, where it has no other) -> licence of its weights, such as
            `Apache-2.0`, which the model's card repeats.
        solver: how a site turns features into an update.
        privacy: the privacy that the run asks for, or `non_private`.
        aggregation: how updates become new parameters.
        moments: noised sums that sites release before the first round; without it none.
        choice: sites vote on a backbone in one round, and nothing is trained (`headwater coordinator choose`).
        trust: `secure_sum`: the coordinator sees only the sum of at least `cohort.min_sites` sites' updates, and each
            site adds a part of the noise (docs/secure-sum.md); without it each site's update leaves with its own noise.
        colluding: with `trust: secure_sum`, the number of those sites that may collude with the coordinator.
        cohort: the sites that are asked in a round.
        evaluation: when sites evaluate the heads on held-out units and release noised statistics; without it never.
            Price and noise follow from each site's own file.
        delta_precision: numbers in which updates travel; float16 takes half the bytes. Rounding comes after the noise
            and costs no privacy.
        max_delta_norm: L2 norm over all heads above which a reply is rejected. With privacy each head's and trunk's
            change is bounded as well by what the solver's settings, the noise and the public size make possible.
        audit: `required`: each site audits its solver before it joins, and declines when the audit fails.
    """

    model_config = ConfigDict(title="run file", json_schema_extra=_require_less)

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    rounds: Rounds
    backbone: Spec | None = None
    backbones: Annotated[dict[Name, Spec], Field(min_length=1, max_length=MAX_BACKBONES)] | None = None
    tasks: Annotated[dict[Name, TaskSpec], Field(min_length=1)]
    trainable: dict[Name, Trainable] = {}
    licences: dict[Name, Annotated[str, StringConstraints(min_length=1, max_length=200)]] = {}
    solver: SolverSpec
    privacy: Privacy | Literal["non_private"]
    aggregation: AggregationSpec
    moments: Moments | None = None
    choice: ChoiceSettings | None = None
    trust: Literal["secure_sum"] | None = None
    colluding: Annotated[int, Field(ge=0)] | None = None
    cohort: Cohort = Cohort()
    evaluation: Evaluation | None = None
    delta_precision: Literal["float32", "float16"] = "float32"
    max_delta_norm: Annotated[float, Field(gt=0)] = 1e4
    audit: Literal["required", "on_request"] = "on_request"
    _chosen: tuple[str, ...] = PrivateAttr(default=())
    _stated: Mapping[str, StatedWeights] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _choose_settings(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        stated: Mapping[str, StatedWeights] = {}
        # Only its own file may name a table or a pack: an offer comes from elsewhere.
        if isinstance(values, Mapping) and info.context and info.context.get("is_file"):
            from common.backbones.parts.columns import replace_ranges  # Here: most files name none.
            from common.backbones.parts.hub.packs import replace_packs  # As above.

            try:
                replaced = replace_packs(values)
                values, stated = replace_ranges(replaced.values, info.context["base"]), replaced.stated
            except BadInput as error:
                raise ValueError(str(error)) from error
        if not (isinstance(values, Mapping) and _find_kind(values.get("solver")) == AUTO):
            run = handler(values)
            run._stated = stated
            return run
        from common.model.auto import choose_settings  # Here: it reads what this module defines.

        choice = choose_settings(values)
        run = handler(choice.settings)
        run._chosen, run._stated = choice.reasons, stated
        return run

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("licences", "moments", "choice", "trust", "colluding"))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The choices of `solver: {kind: auto}` and their reasons, one sentence each; none where it was not used."""
        return self._chosen

    @property
    def stated_weights(self) -> Mapping[str, StatedWeights]:
        """Name of a backbone that the file takes from a pack -> what the pack says of its weights."""
        return self._stated

    @model_validator(mode="after")
    def _each_task_on_a_backbone(self) -> RunConfig:
        if (self.backbone is None) == (self.backbones is None):
            got = "neither" if self.backbone is None else "both"
            raise ValueError(f"backbone: expected either it or `backbones`, several by name; got {got}")
        if self.choice is not None:
            return self._check_choice()
        names = list(self.backbone_specs)
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
        for key, named in (("trainable", self.trainable), ("licences", self.licences)):
            unknown = sorted(set(named) - set(names))
            if unknown:
                raise ValueError(f"{key}: expected some of {', '.join(names)}, got {unknown[0]!r}")
        self.solver.check_tasks(self.tasks, "solver")
        self.aggregation.check_tasks(self.tasks)
        self.aggregation.check_adjustments(self.rounds)
        rated = self.solver.trunk is not None
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

    def _check_choice(self) -> RunConfig:
        """Returns the run. Raises ValueError where it is not a vote on one task between several backbones, or more."""
        if len(self.backbones or {}) < 2:
            raise ValueError("backbones: expected at least two candidates with `choice`")
        if len(self.tasks) != 1 or next(iter(self.tasks.values())).backbone is not None:
            raise ValueError("tasks: expected one task without a backbone with `choice`")
        if self.rounds != 1:
            raise ValueError(f"rounds: expected 1 with `choice`, the vote, got {self.rounds}")
        if self.requested_privacy is None or self.requested_privacy.target_epsilon is None:
            raise ValueError("privacy: expected the epsilon of a vote as target_epsilon with `choice`")
        others = [key for key in ("trainable", "moments", "trust", "colluding", "evaluation") if getattr(self, key)]
        if self.audit == "required":
            others.append("audit")
        if others:
            raise ValueError(f"{others[0]}: expected none with `choice`, which trains nothing")
        return self

    @model_validator(mode="after")
    def _sum_securely(self) -> RunConfig:
        if self.trust is None:
            if self.colluding is not None:
                raise ValueError("colluding: expected none without `trust: secure_sum`")
            return self
        if self.colluding is None:
            raise ValueError("colluding: expected the number of sites that may collude with the coordinator, got none")
        if self.cohort.min_sites - self.colluding < 2:
            raise ValueError(
                "cohort.min_sites: expected at least two sites beside the colluding ones in a secure sum, got "
                f"{self.cohort.min_sites} of which {self.colluding} may collude"
            )
        if self.privacy == "non_private":
            raise ValueError("trust: expected a `privacy` section with secure_sum, whose sums are noised")
        if self.delta_precision != "float32":
            raise ValueError("delta_precision: expected float32 with `trust: secure_sum`, which sends whole numbers")
        if self.cohort.fraction < 1.0:
            raise ValueError("cohort.fraction: expected 1 with `trust: secure_sum`, which asks all sites in each round")
        if self.trainable:
            raise ValueError("trainable: expected nothing with `trust: secure_sum`, which sums heads only")
        if any(self.aggregation.select_adjustment(name).balance is not None for name in self.tasks):
            raise ValueError(
                "aggregation.balance: expected none with `trust: secure_sum`, whose sum has no sites in it"
            )
        return self

    def count_noises(self, num_sites: int) -> float:
        """Returns the variance of the noise in the sum of so many sites' updates, in multiples of one site's."""
        if self.colluding is None:
            return num_sites
        # Each adds a share that the sites which surely are honest make up together.
        return num_sites / (self.cohort.min_sites - self.colluding)

    @property
    def requested_privacy(self) -> Privacy | None:
        """The privacy that the run asks for; None in a run without privacy (`privacy: non_private`)."""
        return None if self.privacy == "non_private" else self.privacy

    @property
    def training_privacy(self) -> Privacy | None:
        """The privacy that is left for the rounds beside `moments`; None in a run without privacy."""
        from common.privacy.shares import keep_for_rounds  # Here: it reads what this module defines.

        return keep_for_rounds(self.requested_privacy, self.moments)

    def aggregation_of(self, group: str | None) -> Spec:
        """Returns the settings by which the updates of a head or trunk are aggregated; None: those of no task's own."""
        return self.aggregation.select(group)

    @property
    def backbone_specs(self) -> Mapping[Name, Spec]:
        """Every backbone of the run, by name."""
        if self.backbone is not None:
            return {ONLY_BACKBONE: self.backbone}
        assert self.backbones is not None
        return self.backbones

    def backbone_key(self, name: Name) -> str:
        """Returns the key of a backbone's settings in the run file."""
        return "backbone" if self.backbone is not None else f"backbones.{name}"

    def backbone_of(self, task: Name) -> Name:
        """Returns the name of the backbone that a task stands on."""
        return self.backbones_of(task)[0]

    def backbones_of(self, task: Name) -> tuple[Name, ...]:
        """Returns the names of the backbones that a site with a task needs: its own, or in a choice all candidates."""
        if self.choice is not None:
            return tuple(self.backbone_specs)
        return (self.tasks[task].backbone or next(iter(self.backbone_specs)),)

    def trunk_of(self, task: Name) -> str | None:
        """The entry of the heads that holds what trains of a task's backbone; None where all of it is frozen.

        Names of tasks have no dots: no task is called so.
        """
        name = self.backbone_of(task)
        return f"{name}.trunk" if name in self.trainable else None

    def parameter_group_sizes(self, sizes: Mapping[Name, int]) -> dict[str, int]:
        """Every entry of the heads at a site with these tasks, with its public size: the tasks, and their trunks.

        A trunk's size is the largest of its tasks': their units are the same patients as far as they overlap, and a
        site that has one task has all its units in it. Where they do not overlap the true number is larger, up to the
        sum, and a trunk's step too, by as much; a smaller learning rate makes up for it. No true count is used.
        """
        own = [(trunk, size) for task, size in sizes.items() if (trunk := self.trunk_of(task)) is not None]
        return {**sizes, **{trunk: max(size for name, size in own if name == trunk) for trunk, _ in own}}

    def with_backbone_specs(self, specs: Mapping[Name, Spec]) -> RunConfig:
        """The same run with other settings of its backbones."""
        if self.backbone is not None:
            return self.model_copy(update={"backbone": specs[ONLY_BACKBONE]})
        return self.model_copy(update={"backbones": {name: specs[name] for name in self.backbone_specs}})


def resolve_backbone_paths(run: RunConfig, prefix: str = "") -> RunConfig:
    """Returns the same run with all settings of its backbones, their paths absolute: it means the same in any folder.

    Args:
        run: the run.
        prefix: beginning of keys in error messages, where the run stands inside another file.

    Raises:
        BadInput: a backbone's setting is wrong.
    """
    specs = {}
    for name, spec in run.backbone_specs.items():
        kind = resolve("common.backbones", spec, prefix + run.backbone_key(name))
        specs[name] = Spec(**kind.model_dump(mode="json", by_alias=True))
    return run.with_backbone_specs(specs)
