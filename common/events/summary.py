"""A run's summary: its result and its cost, computed from its journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from common.events.facts import Facts, Metrics
from common.events.runs import BackboneFacts, HomeMetrics, NoisedMetrics
from common.types import Relation, Unit

SCHEMA_VERSION: Literal[2] = 2
"""Version of `Summary`. Version 1 had the key `schema` and is no longer written."""


class EvaluationRound(NoisedMetrics):
    """A task's noised metrics after one round."""

    round: int = Field(description="Number of the round after which the heads were evaluated.")


class TaskEvaluation(EvaluationRound):
    """A task's noised metrics after the last round that evaluated it, and after each such round."""

    rounds: tuple[EvaluationRound, ...] = Field(description="The metrics after every round that evaluated the task.")


class TaskSummary(Facts):
    """The result of a run for one task."""

    kind: str = Field(description="Kind of the task.")
    status: Literal["updated", "never_updated"] = Field(description="Whether any round changed the head.")
    updates: int = Field(description="Number of rounds that changed the head.")
    missed: int = Field(0, description="Number of completed rounds that did not change the head.")
    sites: tuple[str, ...] = Field(description="Names of the sites that joined with the task.")
    metrics: Metrics = Field(
        description="Metrics on the held-out records of all sites, the main one first; null where undefined. The "
        "simulator's own view, outside the privacy guarantee; empty in a deployed run."
    )
    per_site: Mapping[str, Metrics] = Field(description="Site name -> the same metrics on its own held-out records.")
    evaluation: TaskEvaluation | None = Field(
        description="Metrics on held-out units as sites released them, noised and charged; null where none did."
    )
    baselines: Mapping[str, Metrics] = Field(
        description="Name of each baseline -> its metrics; the simulator's own view, outside the privacy guarantee. "
        "`local` is the mean over sites, each evaluated on the held-out records of all sites."
    )
    personal: str | None = Field(
        None, description="How the sites adapted the final heads to themselves; null where they did not."
    )
    at_home: Mapping[str, HomeMetrics] = Field(
        {},
        description="Kind of heads -> their metrics, each site's on its own held-out records; the simulator's own "
        "view. Empty without `personal`.",
    )
    alignments: Mapping[str, str] = Field(
        {}, description="With `personal: adapt`, site -> which alignment it took, in words."
    )


class LeftOut(Facts):
    """A site's records that could not be used."""

    num_records: int = Field(description="Number of records.")
    path: str = Field(description="CSV file at the site that names each of them by file and row.")


class SiteSummary(Facts):
    """One site's part in a run, and what it cost."""

    status: Literal["completed", "partial", "declined", "rejected"] = Field(
        description="completed: took part to the end; partial: rejected after at least one round; declined: did not "
        "agree to the run; rejected: joined or was asked, and no reply of it was used."
    )
    reason: str | None = Field(None, description="Why the site is not `completed`; null where it is.")
    epsilon: float | None = Field(
        None, description="Epsilon spent in this run; null where the site took no part or the run is not private."
    )
    delta: float | None = Field(None, description="Delta of the site's budget; null where it did not join.")
    unit: Unit | None = Field(None, description="What the site's budget protects; null where it did not join.")
    relation: Relation | None = Field(None, description="Neighbouring relation; null where the site did not join.")
    budget_epsilon: float | None = Field(None, description="Epsilon of the site's budget; null where it did not join.")
    rounds: int = Field(0, description="Number of rounds that used an update of the site.")
    missed: int = Field(
        0, description="Number of completed rounds for which it was asked and that used no update of it."
    )
    evaluations: int = Field(0, description="Number of rounds after which the site released noised sums.")
    left_out: LeftOut | None = Field(None, description="Records that could not be used; null where there are none.")


class AuditSummary(Facts):
    """The known result of the privacy audit. A site's own result stays at the site."""

    required: bool = Field(description="Whether the run requires an audit.")
    passed: bool | None = Field(None, description="Whether the simulator's audit passed; null where it made none.")
    epsilon_claimed: float | None = Field(None, description="Epsilon of the whole run as composed, at `delta`.")
    epsilon_lower_95: float | None = Field(None, description="Lower bound, wrong in at most 5 % of audits.")
    epsilon_lower_99_9: float | None = Field(None, description="Lower bound, wrong in at most 0.1 % of audits.")
    noise_std_ratio: float | None = Field(None, description="Noise as measured / noise as accounted.")
    delta: float | None = Field(None, description="Delta at which all these epsilons hold.")
    reasons: tuple[str, ...] | None = Field(None, description="One sentence for each finding that refutes the claim.")


class ByteCounts(Facts):
    """Sizes of encoded messages, in bytes; null where none was sent."""

    down_per_site_round: int | None = Field(description="Mean size of a training request, in bytes.")
    up_per_site_round: int | None = Field(description="Mean size of an accepted training reply, in bytes.")
    backbone_per_site: int | None = Field(description="Largest size of all backbones sent to one site, in bytes.")


class Durations(Facts):
    """Wall-clock durations, in seconds."""

    total: float = Field(description="From the first event to the last, in seconds.")
    features: float = Field(description="Sending backbones and computing features, in seconds.")
    training: float = Field(description="All rounds of training, in seconds.")
    baselines: float = Field(description="All baselines of a simulation, in seconds.")


class Summary(Facts):
    """A run's result and its cost, computed from its journal and written to `summary.json`."""

    schema_version: Literal[2] = Field(SCHEMA_VERSION, description="Version of this schema.")
    run: str | None = Field(description="Name of the run; null where it failed before it started.")
    path: str | None = Field(description="Folder of the run; null where it failed before it started.")
    executor: str | None = Field(description="in_process, batched, flower, flower_app (`flwr run`) or deployment.")
    rounds: int = Field(description="Number of completed rounds.")
    status: Literal["completed", "partial", "interrupted", "failed"] = Field(
        description="completed: all rounds are done, with every site that was asked and every head and trunk; partial: "
        "all are done, but sites or tasks missed rounds, or a site the final heads; interrupted: a round did not reach "
        "its quorum, and the run can be resumed; failed: no usable result."
    )
    backbones: Mapping[str, BackboneFacts] = Field(description="Name of each backbone -> what it is.")
    tasks: Mapping[str, TaskSummary] = Field(description="Name of each task -> its result.")
    sites: Mapping[str, SiteSummary] = Field(description="Name of each site -> its part in the run, in order of name.")
    audit: AuditSummary = Field(description="The privacy audit.")
    bytes: ByteCounts = Field(description="Sizes of encoded messages.")
    seconds: Durations = Field(description="Durations.")

    def to_json(self) -> str:
        """Returns the summary as indented JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)


def summary_schema() -> str:
    """Returns the JSON Schema of `summary.json` as indented text; `docs/summary.schema.json` is this text."""
    return json.dumps(Summary.model_json_schema(mode="serialization"), indent=2) + "\n"
