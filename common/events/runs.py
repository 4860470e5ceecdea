"""The events of a run, at the coordinator and in a simulation: the lines of its `journal.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from common.events.facts import AuditVerdict, Event, Facts, Interval, Intervals, Metrics, nest_verdict
from common.events.outcomes import Outcomes
from common.types import Plan, Unit


class BackboneFacts(Facts):
    """A run's backbone."""

    kind: str = Field(description="Kind of the backbone.")
    model: str | None = Field(None, description="Architecture; null for kinds that have only one.")
    digest: str = Field(description="SHA-256 over architecture, preprocessing and weights, in hexadecimal digits.")
    tasks: tuple[str, ...] = Field((), description="Names of the tasks whose heads read its features.")


class RunStarted(Event):
    """A run began, or continues after an interruption."""

    event_name = "run_started"

    run_id: str = Field(description="Unique id of the run: the name of its folder.")
    name: str | None = Field(None, description="Name of the run, from its run file.")
    executor: str | None = Field(None, description="What carries messages between coordinator and sites.")
    path: str | None = Field(None, description="Folder of the run.")
    rounds: int = Field(description="Number of rounds that the run file asks for.")
    resumed: bool = Field(False, description="Whether the run continues after a checkpoint.")
    audit_required: bool = Field(False, description="Whether every site has to audit its solver before it joins.")
    tasks: Mapping[str, str] = Field({}, description="Name of each task -> its kind.")
    backbones: Mapping[str, BackboneFacts] = Field({}, description="Name of each backbone -> what it is.")


class SiteJoined(Event):
    """A site agreed to a run."""

    event_name = "joined"

    site: str = Field(description="Name of the site.")
    tasks: Mapping[str, int] = Field(
        description="Name of each task the site has -> its declared public size, in units."
    )
    unit: Unit = Field(description="What the site's budget protects.")
    delta: float = Field(description="Delta of the site's budget.")
    budget_epsilon: float = Field(description="Epsilon of the site's whole budget, over all runs.")
    first_round: int = Field(1, description="First round that the site was asked to take part in.")


class SiteRejected(Event):
    """A site's reply was not used, or none arrived."""

    event_name = "rejected"
    former_event_names = ("set_aside",)
    former_names = {"at": "stage"}

    site: str = Field(description="Name of the site, or its node id where the name is not known.")
    reason: str = Field(description="Why the reply was not used.")
    stage: str = Field("train", description="What was asked: join, backbone, prepare, vote, train or finish.")
    round: int | None = Field(None, description="Number of the round; null outside rounds.")


class SitePreparedAgain(Event):
    """A site had lost, or found damaged, what it prepared; nothing was charged, and it was asked to prepare again."""

    event_name = "prepared_again"

    site: str = Field(description="Name of the site.")
    ready: bool = Field(description="Whether it answered that it is ready.")
    round: int | None = Field(None, description="Number of the round; null outside rounds.")


class BackboneSent(Event):
    """A backbone's weights were sent to a site."""

    event_name = "backbone_sent"
    former_names = {"bytes": "size_bytes"}

    site: str = Field(description="Name of the site.")
    backbone: str | None = Field(None, description="Name of the backbone; null in journals of early versions.")
    size_bytes: int = Field(description="Size of all messages that carried it, in bytes, repeated parts included.")


class FeaturesReady(Event):
    """All sites that stay in the run have computed their features."""

    event_name = "features_ready"

    seconds: float = Field(description="Duration of sending backbones and computing features, in seconds.")


class RepliesAwaited(Event):
    """Some replies to a request arrived; others are still awaited."""

    event_name = "replies"
    former_names = {"at": "message_type", "nodes": "node_ids"}

    message_type: str = Field(description="Flower message type of the request.")
    round: int = Field(description="Number of the round; 0 outside rounds.")
    node_ids: tuple[int, ...] = Field(description="Flower node ids of the sites whose reply is awaited.")


class QuorumAwaited(Event):
    """A round has not got its quorum, and waits for sites that are not connected or have failed."""

    event_name = "quorum_awaited"

    round: int = Field(description="Number of the round.")
    sites: Mapping[str, str] = Field(description="Name of each site that is missing so far -> the reason.")
    seconds: float = Field(description="Longest further wait, in seconds; then the run is interrupted.")


class MomentsMeasured(Event):
    """Sites released sums of their features and labels before the first round, and the heads' fixed numbers are set."""

    event_name = "moments"

    noise_multipliers: Mapping[str, float] = Field(
        description="Name of each site whose sums were used -> deviation of the noise in all its sums together, in "
        "units of the longest part of one unit; 0 without privacy."
    )
    num_sums: Mapping[str, int] = Field(
        description="Name of each sum, a backbone with `.mean` or a task, -> number of sites whose sum was used."
    )
    heads: str = Field(description="SHA-256 over all heads and trunks with these numbers, in hexadecimal digits.")
    seconds: float = Field(description="Time from the request to the last reply, in seconds.")


class VotesCounted(Event):
    """Sites voted on the backbone of a task; each vote is charged to its site's budget."""

    event_name = "votes"

    task: str = Field(description="Name of the task.")
    votes: Mapping[str, str] = Field(description="Name of each site that voted -> the candidate that it voted for.")
    chosen: str = Field(description="The candidate with most votes; of several, the first in the order of the file.")
    epsilon: float = Field(description="Pure epsilon of each vote.")
    sensitivity: float = Field(description="Bound on what one unit changes of the candidates' costs.")
    min_size: int = Field(description="Declared size from which on a site was asked.")
    abstained: tuple[str, ...] = Field((), description="Names of the sites that declare fewer units: not asked.")
    seconds: float = Field(description="Time from the request to the last vote, in seconds.")


class AcceptedUpdate(Facts):
    """A site's update that a round used."""

    former_names = {"down": "bytes_down", "up": "bytes_up"}

    bytes_down: int = Field(description="Size of the encoded request to the site, in bytes.")
    bytes_up: int = Field(description="Size of the encoded reply of the site, in bytes.")
    plan: Plan = Field(description="The plan that the site declares to have followed.")
    weights: Mapping[str, float] = Field(
        {}, description="Name of each head and trunk in the update -> its weight; empty in journals of early versions."
    )
    round: int | None = Field(
        None,
        description="Number of the round whose request the update answers, where that is the round before; null where "
        "it is the round itself.",
    )


class RoundEnded(Event):
    """A round of training ended: updates are aggregated, where enough arrived."""

    event_name = "round"
    former_names = {"tasks": "num_updates"}

    round: int = Field(description="Number of the round, from 1.")
    sites: Mapping[str, AcceptedUpdate] = Field(
        description="Name of each site whose update was used -> its update; names of sites whose updates have the same "
        "facts stand together, with commas between them."
    )
    num_updates: Mapping[str, int] = Field(
        description="Name of each head and trunk -> number of sites whose update of it was used."
    )
    updated: tuple[str, ...] = Field(description="Names of the heads and trunks that had enough updates to change.")
    heads: str | None = Field(
        None,
        description="SHA-256 over all heads and trunks after the round, in hexadecimal digits; null in journals of "
        "early versions.",
    )
    seconds: float = Field(description="Duration of the round, in seconds.")

    @field_validator("sites", mode="before")
    @classmethod
    def _separate_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not any("," in name for name in values):
            return values
        shared = {names: AcceptedUpdate.model_validate(update) for names, update in values.items()}
        return {name: update for names, update in shared.items() for name in names.split(",")}

    @field_serializer("sites")
    def _join_names(self, values: Mapping[str, AcceptedUpdate]) -> dict[str, AcceptedUpdate]:
        names: dict[int, list[str]] = {}
        for name, update in values.items():
            names.setdefault(id(update), []).append(name)
        return {",".join(own): values[own[0]] for own in names.values()}


class Calibration(Facts):
    """A head's mean confidence beside its accuracy, and the temperature that mends it; from noised sums."""

    temperature: float | None = Field(
        description="Number by which the head's outputs are to be divided before they become probabilities; null where "
        "the noise is too large to tell."
    )
    interval: tuple[float, float] = Field(
        description="Lower and upper end of the temperature's interval of one standard error of the noise."
    )
    confidence_gap: float | None = Field(
        description="Mean confidence minus accuracy without the temperature (calibration error in one bin); null where "
        "the noise is too large to tell."
    )
    standard_error: float | None = Field(
        description="Standard error of the gap due to the privacy noise alone; null where it is too large to tell."
    )
    gap_left: float | None = Field(
        description="Expected distance between mean confidence and accuracy with the temperature, which the noise "
        "leaves; null without a temperature."
    )


class NoisedMetrics(Facts):
    """A task's metrics on held-out units, from the noised sums that sites released."""

    metrics: Metrics = Field(
        description="Metric name -> value, the main metric first; null where it is undefined or the noise has made it "
        "unreadable."
    )
    standard_errors: Metrics = Field(
        description="Metric name -> standard error due to the privacy noise alone; of an unreadable metric that before "
        "clipping it into its range. Null where the metric is undefined for much of the noise."
    )
    sites: tuple[str, ...] = Field(description="Names of the sites whose held-out units are counted.")
    calibration: Calibration | None = Field(
        None, description="The head's calibration; null where the run does not ask for it or the task has none."
    )

    def compute_interval(self, metric: str) -> Interval | None:
        """Returns the 95 % interval of a metric's noise, value +- 1.96 standard errors; None where it is unreadable."""
        value, error = self.metrics.get(metric), self.standard_errors.get(metric)
        return None if value is None or error is None else (value - 1.96 * error, value + 1.96 * error)


class HeadsEvaluated(Event):
    """Sites released noised sums of their held-out units after a round; each release is charged to its budget."""

    event_name = "evaluation"
    former_names = {"noise": "noise_multipliers", "without": "rejected"}

    round: int = Field(description="Number of the round after which the heads were evaluated.")
    tasks: Mapping[str, NoisedMetrics] = Field(description="Task name -> its metrics over all sites that released.")
    noise_multipliers: Mapping[str, float] = Field(
        description="Name of each site that released -> standard deviation of its noise / sensitivity; all its tasks "
        "together are one release."
    )
    rejected: Mapping[str, str] = Field({}, description="Name of each site whose release is missing -> the reason.")
    outcomes: Mapping[str, Outcomes] = Field(
        {}, description="Task name -> noised counts of predictions and scores over all sites that released."
    )


class RunEnded(Event):
    """All rounds of a run are done, and final heads were sent to the sites."""

    event_name = "run_ended"

    updates: Mapping[str, int] = Field(description="Name of each head and trunk -> number of rounds that changed it.")
    heads: str = Field(description="SHA-256 over the final heads and trunks, in hexadecimal digits.")
    num_received: int | None = Field(
        None, description="Number of sites that confirmed the final heads; null in journals of early versions."
    )
    num_sites: int | None = Field(None, description="Number of sites that joined; null in journals of early versions.")
    missing: Mapping[str, str] = Field(
        {}, description="Name of each site that did not confirm the final heads -> the reason."
    )


class RunInterruption(Event):
    """A round did not reach its quorum in time; the run can be resumed after its last whole round."""

    event_name = "run_interrupted"

    reason: str = Field(description="What is missing, with each missing site and its reason, in one sentence.")


class RunFailure(Event):
    """A deployed run ended without a usable result."""

    event_name = "run_failed"

    reason: str = Field(description="Why, in one sentence.")


class SolverAudited(Event):
    """A privacy audit of the run's solver ended; only a simulation journals its own."""

    event_name = "audit"

    verdict: AuditVerdict = Field(description="The result.")

    @model_validator(mode="before")
    @classmethod
    def _accept_flat_verdict(cls, values: Any) -> Any:
        return nest_verdict(values)


class RecordsLeftOut(Event):
    """Some of a simulated site's records could not be used."""

    event_name = "left_out"
    former_names = {"records": "num_records", "listed": "path"}

    site: str = Field(description="Name of the site.")
    num_records: int = Field(description="Number of records that could not be used.")
    path: str = Field(description="CSV file at the site that names each of them by file and row.")


class EpsilonSpent(Event):
    """The epsilon of the run according to a simulated site's own ledger."""

    event_name = "epsilon"

    site: str = Field(description="Name of the site.")
    epsilon: float = Field(description="Epsilon spent in the run, at the delta of the site's budget.")


class MetricsEvaluated(Event):
    """A simulator evaluated a task's final head on held-out records, outside the privacy guarantee."""

    event_name = "metrics"

    task: str = Field(description="Name of the task.")
    pooled: Metrics = Field(description="Metrics on the held-out records of all sites together.")
    per_site: Mapping[str, Metrics] = Field(description="Name of each site -> metrics on its own held-out records.")
    pooled_intervals: Intervals = Field({}, description="Metric name -> 95 % interval over the choice of units.")
    per_site_intervals: Mapping[str, Intervals] = Field(
        {}, description="Name of each site -> the same intervals; empty where there are more sites than a page shows."
    )
    errors: tuple[str, ...] = Field((), description="Names of the metrics that are the better the smaller they are.")
    outcomes: Outcomes | None = Field(
        None, description="Counts of predictions and scores over all sites; null where the task counts none."
    )


class RoundEvaluated(Event):
    """A simulator evaluated a task's head after a round on held-out records, outside the privacy guarantee."""

    event_name = "round_metrics"

    round: int = Field(description="Number of the round after which the head was evaluated.")
    task: str = Field(description="Name of the task.")
    pooled: Metrics = Field(description="Metrics on the held-out records of all sites together.")


class BaselineEvaluated(Event):
    """A simulator trained and evaluated a baseline, outside the privacy guarantee."""

    event_name = "baseline"

    name: str = Field(description="Name of the baseline.")
    metrics: Mapping[str, Metrics] = Field(description="Task name -> metrics on the held-out records of all sites.")
    seconds: float = Field(description="Duration, in seconds.")
    intervals: Mapping[str, Intervals] = Field({}, description="Task name -> 95 % intervals of these metrics.")
    differences: Mapping[str, Intervals] = Field(
        {},
        description="Task name -> metric name -> 95 % interval of the federated heads' metric minus this one, on the "
        "same held-out units.",
    )


class HomeMetrics(Facts):
    """Metrics of one kind of heads, each site's on its own held-out records, with 95 % intervals over their units."""

    mean: Metrics = Field(description="Mean over the sites where the metric is defined.")
    mean_intervals: Intervals = Field(description="Metric name -> interval of the mean; null where it is undefined.")
    pooled: Metrics = Field(
        description="Metrics on all sites' records together, each record judged by its site's heads."
    )
    pooled_intervals: Intervals = Field(description="Metric name -> interval of the pooled metric.")
    per_site: Mapping[str, Metrics] = Field(description="Name of each site -> its metrics.")
    per_site_intervals: Mapping[str, Intervals] = Field(description="Name of each site -> intervals of its metrics.")
    differences: Mapping[str, Intervals] = Field(
        {},
        description="Name of each site -> metric name -> 95 % interval of the federated heads' metric minus this one, "
        "on the same held-out units.",
    )


class HomeEvaluated(Event):
    """A simulator compared heads that its sites adapted to themselves with others, outside the privacy guarantee."""

    event_name = "at_home"

    task: str = Field(description="Name of the task.")
    personal: str = Field(description="How the sites adapted the final heads: prior, fit, tied or adapt.")
    heads: Mapping[str, HomeMetrics] = Field(
        description="Kind of heads (federated, personal in up to two ways, site alone in three) -> their metrics."
    )
    alignments: Mapping[str, str] = Field(
        default_factory=dict, description="With `personal: adapt`, site -> which alignment it took, in words."
    )


RunEvent = (
    RunStarted
    | SiteJoined
    | SiteRejected
    | SitePreparedAgain
    | BackboneSent
    | FeaturesReady
    | RepliesAwaited
    | QuorumAwaited
    | MomentsMeasured
    | VotesCounted
    | RoundEnded
    | HeadsEvaluated
    | RunEnded
    | RunInterruption
    | RunFailure
    | SolverAudited
    | RecordsLeftOut
    | EpsilonSpent
    | RoundEvaluated
    | MetricsEvaluated
    | BaselineEvaluated
    | HomeEvaluated
)
"""An event of a run's `journal.jsonl`."""
