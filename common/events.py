"""The events of a run, of a site and of a coordinator's daemon, the journals that keep them, and a run's summary.

A journal is an append-only file with one JSON object a line; each line is one event, and every report is computed from
events. This module is the one place that names their fields.

Invariant: a line is complete and flushed to the disk before `FileJournal.write` returns; a torn last line (a crash
while writing) is skipped by the readers. A site keeps its journal for years, so the readers also accept the field and
event names of earlier versions (`former_names`) and skip lines that this version does not know.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, final, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.files import flush
from common.types import HeadwaterError, Plan, Relation, Unit

Metrics = Mapping[str, float | None]
"""Metric name -> value, the task's main metric first; None where the metric is undefined."""

Interval = tuple[float, float]
"""The ends of a 95 % interval."""

Intervals = Mapping[str, Interval | None]
"""Metric name -> its interval; None where it is undefined."""

FEDERATED, PERSONAL = "federated", "personal"
ALONE, ALONE_NOT_PRIVATE, ALONE_ADAPTED = "site alone", "site alone, not private", "site alone, adapted"
"""Kinds of heads that a site compares on its own held-out units. The last is an untrained head that the site adapted as
it adapted the federated one, which shows what the federation's head added."""

SCHEMA_VERSION: Literal[2] = 2
"""Version of `Summary`. Version 1 had the key `schema` and is no longer written."""


class Facts(BaseModel):
    """Base of everything written to a journal or summary: immutable, finite numbers, former field names accepted."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)

    former_names: ClassVar[Mapping[str, str]] = {}
    """Name of a field in journals of earlier versions -> its present name."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, values: Any) -> Any:
        if not cls.former_names or not isinstance(values, Mapping):
            return values
        return {cls.former_names.get(name, name): value for name, value in values.items()}


class Event(Facts):
    """Base of all events."""

    event_name: ClassVar[str]
    """Value of the key `event` in the journal."""
    former_event_names: ClassVar[tuple[str, ...]] = ()
    """Values of the key `event` in journals of earlier versions."""

    time: float = Field(
        default_factory=lambda: round(time.time(), 3), description="When it happened, in seconds since 1970 (UTC)."
    )


# --- events of a run, at the coordinator -----------------------------------------------------------------------------


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
    stage: str = Field("train", description="What was asked: join, backbone, prepare, train or finish.")
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
    sites: Mapping[str, AcceptedUpdate] = Field(description="Name of each site whose update was used -> its update.")
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


class AuditVerdict(Facts):
    """The result of a privacy audit."""

    epsilon_claimed: float = Field(description="Epsilon of the whole run as a ledger composes it, at `delta`.")
    epsilon_lower_95: float = Field(description="Lower bound on epsilon that is wrong in at most 5 % of audits.")
    epsilon_lower_99_9: float = Field(
        description="Lower bound on epsilon that is wrong in at most 0.1 % of audits; the audit fails where it exceeds "
        "the claim."
    )
    epsilon_lower_one_run_95: float | None = Field(
        None, description="Lower bound at 95 % that assumes no distribution of the canaries' scores."
    )
    noise_std_ratio: float = Field(description="Standard deviation of the noise as measured / as accounted.")
    delta: float = Field(description="Delta at which all these epsilons hold.")
    rounds: int | None = Field(None, description="Number of rounds of the run.")
    steps: int | None = Field(None, description="Number of noised sums that were observed.")
    canaries: int | None = Field(None, description="Number of canaries; each took part with probability 1/2.")
    seconds: float | None = Field(None, description="Duration of the audit, in seconds.")
    passed: bool = Field(description="Whether nothing refuted the claim.")
    reasons: tuple[str, ...] = Field(description="One sentence for each finding that refutes the claim.")
    tried: tuple[str, ...] = Field((), description="One sentence for each attack that was tried.")
    warnings: tuple[str, ...] = Field((), description="One sentence for each finding that does not refute the claim.")


class SolverAudited(Event):
    """A privacy audit of the run's solver ended; only a simulation journals its own."""

    event_name = "audit"

    verdict: AuditVerdict = Field(description="The result.")

    @model_validator(mode="before")
    @classmethod
    def _accept_flat_verdict(cls, values: Any) -> Any:
        return _nest_verdict(values)


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


class BaselineEvaluated(Event):
    """A simulator trained and evaluated a baseline, outside the privacy guarantee."""

    event_name = "baseline"

    name: str = Field(description="Name of the baseline.")
    metrics: Mapping[str, Metrics] = Field(description="Task name -> metrics on the held-out records of all sites.")
    seconds: float = Field(description="Duration, in seconds.")


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


class HomeEvaluated(Event):
    """A simulator compared heads that its sites adapted to themselves with others, outside the privacy guarantee."""

    event_name = "at_home"

    task: str = Field(description="Name of the task.")
    personal: str = Field(description="How the sites adapted the final heads: prior, fit or tied.")
    heads: Mapping[str, HomeMetrics] = Field(
        description="Kind of heads (federated, personal, site alone in three ways) -> their metrics."
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
    | RoundEnded
    | HeadsEvaluated
    | RunEnded
    | RunInterruption
    | RunFailure
    | SolverAudited
    | RecordsLeftOut
    | EpsilonSpent
    | MetricsEvaluated
    | BaselineEvaluated
    | HomeEvaluated
)
"""An event of a run's `journal.jsonl`."""


# --- events of a site ------------------------------------------------------------------------------------------------


class RunJoined(Event):
    """The site agreed to a run."""

    event_name = "joined"
    former_names = {"run": "run_id"}

    run_id: str = Field(description="Id of the run.")
    tasks: tuple[str, ...] = Field((), description="Names of the run's tasks that the site takes part in.")
    first_round: int = Field(1, description="First round for which the site planned its noise and price.")
    rounds: int | None = Field(None, description="Number of rounds of the run; null in older journals.")


class RunAudited(Event):
    """The site audited the solver of a run that requires it; the result stays at the site."""

    event_name = "audit"
    former_names = {"run": "run_id"}

    run_id: str = Field(description="Id of the run.")
    verdict: AuditVerdict = Field(description="The result.")

    @model_validator(mode="before")
    @classmethod
    def _accept_flat_verdict(cls, values: Any) -> Any:
        return _nest_verdict(values)


class BackboneUnusable(Event):
    """A backbone that the site's file names cannot be opened."""

    event_name = "own_backbone_unusable"

    detail: str = Field(description="Why, in one sentence.")


class RunPrepared(Event):
    """Features of the site's records are computed and its label arrays written."""

    event_name = "prepared"
    former_names = {"run": "run_id", "problems": "num_left_out"}

    run_id: str = Field(description="Id of the run.")
    num_left_out: int = Field(description="Number of records that could not be used.")
    num_records: int | None = Field(None, description="Number of records of the run's sources.")
    num_usable: int | None = Field(None, description="Number of them of which nothing was left out.")
    precision_error: float | None = Field(
        None, description="Largest relative change of a feature through reduced precision; null in full precision."
    )


class ReplySent(Event):
    """A release was computed, charged, stored and sent."""

    event_name = "sent"
    former_names = {"run": "run_id", "what": "purpose", "mechanism": "num_releases", "bytes": "size_bytes"}

    run_id: str = Field(description="Id of the run.")
    round: int = Field(description="Number of the round.")
    purpose: Literal["training", "evaluation"] = Field("training", description="What the release is for.")
    num_releases: int = Field(0, description="Number of noised sums that the reply is made from.")
    size_bytes: int = Field(description="Size of the stored reply, in bytes.")
    seconds: float | None = Field(
        None, description="Duration from the request to the stored reply, in seconds; null in earlier journals."
    )


class ReplyResent(Event):
    """The stored reply to an identical request was sent again, which costs no budget."""

    event_name = "resent"
    former_names = {"run": "run_id", "what": "purpose", "bytes": "size_bytes"}

    run_id: str = Field(description="Id of the run.")
    round: int = Field(description="Number of the round.")
    purpose: Literal["training", "evaluation"] = Field("training", description="What the release is for.")
    size_bytes: int = Field(description="Size of the stored reply, in bytes.")


class RequestDeclined(Event):
    """The site declined a request. The coordinator is told the reason and never the detail."""

    event_name = "declined"
    former_names = {"asked": "message_type", "refusal": "reason"}

    message_type: str | None = Field(None, description="Flower message type of the request; null where none was read.")
    reason: str = Field(description="The word of `DeclineReason` that was sent to the coordinator.")
    detail: str = Field(description="Why, in one sentence; it stays at the site.")


class HeadsReceived(Event):
    """The final heads of the site's tasks arrived and match their digest."""

    event_name = "finished"
    former_names = {"run": "run_id"}

    run_id: str = Field(description="Id of the run.")
    heads: str = Field(description="SHA-256 over the heads, in hexadecimal digits.")


class RecordsPurged(Event):
    """The site's staff excluded patients or records, and everything computed from records was removed."""

    event_name = "purged"
    former_names = {"new": "num_excluded", "features": "num_features", "runs": "num_runs"}

    num_excluded: int = Field(description="Number of ids that this purge added to the list of exclusions.")
    num_features: int = Field(description="Number of sources whose cached features were removed.")
    num_runs: int = Field(description="Number of runs whose prepared arrays were removed.")


SiteEvent = (
    RunJoined
    | RunAudited
    | BackboneUnusable
    | RunPrepared
    | ReplySent
    | ReplyResent
    | RequestDeclined
    | HeadsReceived
    | RecordsPurged
)
"""An event of a site's `site.jsonl`."""


class RunApproved(Event):
    """The site's staff approved a run."""

    event_name = "approved"

    digest: str = Field(description="Digest of the offer, in hexadecimal digits.")
    run: str = Field(description="Name of the run.")
    by: str = Field(description="Name of the operating system's user who approved it.")


class ApprovalUsed(Event):
    """A run was charged under an approval for the first time."""

    event_name = "used"

    digest: str = Field(description="Digest of the offer, in hexadecimal digits.")
    run_id: str = Field(description="Id of the run that uses the approval.")


class ApprovalSuspended(Event):
    """A run was approved whose records a trial found unusable: no run is joined under the approval."""

    event_name = "suspended"

    digest: str = Field(description="Digest of the offer, in hexadecimal digits.")
    detail: str = Field(description="Result of the trial, in one sentence.")


class ApprovalConfirmed(Event):
    """A later trial of the same run passed: the suspended approval is in force."""

    event_name = "confirmed"

    digest: str = Field(description="Digest of the offer, in hexadecimal digits.")


ApprovalEvent = RunApproved | ApprovalUsed | ApprovalSuspended | ApprovalConfirmed
"""An event of a site's `approvals.jsonl`."""


# --- events of the coordinator's daemon ------------------------------------------------------------------------------


class DaemonStarted(Event):
    """The daemon listens."""

    event_name = "daemon_started"
    former_event_names = ("link_started",)

    pid: int = Field(description="Id of the daemon's process.")
    bind: str = Field(description="Address that it listens on, as host:port.")


class DaemonStopped(Event):
    """The daemon ended on request."""

    event_name = "daemon_stopped"
    former_event_names = ("link_stopped",)


class RunsRemoved(Event):
    """Folders of runs that had ended were removed, because they were older than the federation keeps them."""

    event_name = "runs_removed"

    runs: tuple[str, ...] = Field(description="Ids of the runs.")
    days: float = Field(description="Age at which a run is removed, in days.")


class RequestRejected(Event):
    """A request from the network was rejected before Flower saw it."""

    event_name = "rejected"
    former_event_names = ("refused",)

    peer: str = Field(description="Network address of the sender.")
    site: str | None = Field(description="Name of the site that signed the request; null where none did.")
    path: str = Field(description="Path of the request.")
    reason: str = Field(description="Why it was rejected.")


class CommandRun(Event):
    """A command changed something at the coordinator, or gave something away."""

    event_name = "command"

    command: str = Field(description="Name of the command, such as `admit`.")
    what: str = Field(description="The site, run or file that it was for, in words.")
    user: str = Field(description="Name of the system's user whose process it was, or the user's number.")
    login: str | None = Field(description="User who had logged in, as Linux or else sudo says; null where unknown.")
    host: str = Field(description="Name of the machine.")


DaemonEvent = DaemonStarted | DaemonStopped | RunsRemoved | RequestRejected | CommandRun
"""An event of a federation's `link.jsonl` or `commands.jsonl`."""


# --- journals --------------------------------------------------------------------------------------------------------

_AnyEvent = TypeVar("_AnyEvent", bound=Event)
_State = TypeVar("_State")


class Journal(Protocol):
    """Anything that keeps events."""

    def write(self, event: Event) -> None:
        """Append an event."""


class FileJournal:
    """A journal in a file. One writer; any number of readers."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, event: Event) -> None:
        """Append an event and flush it to the disk."""
        values = event.model_dump(mode="json")
        line = json.dumps({"time": values.pop("time"), "event": event.event_name, **values}, allow_nan=False)
        with self.path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self.path):
                file.write(b"\n")  # Seal a line torn by a crash, so that this one stays readable.
            file.write(line.encode() + b"\n")
            file.flush()
            flush(file.fileno())


def read_run_journal(path: Path) -> list[RunEvent]:
    """Returns the events of a run's `journal.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(RunEvent))


def read_site_journal(path: Path) -> list[SiteEvent]:
    """Returns the events of a site's `site.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(SiteEvent))


def read_approval_journal(path: Path) -> list[ApprovalEvent]:
    """Returns the events of a site's `approvals.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(ApprovalEvent))


def read_daemon_journal(path: Path) -> list[DaemonEvent]:
    """Returns the events of a federation's `link.jsonl` or `commands.jsonl` in order; an empty list without a file."""
    return _read(path, get_args(DaemonEvent))


@final
class JournalView(Generic[_State]):
    """A value that is computed from a journal's events, and brought up to date from the lines that are new.

    A journal that is another file than before, or shorter, is read from its beginning.
    """

    def __init__(
        self, path: Path, kinds: Any, create: Callable[[], _State], add: Callable[[_State, Any], object]
    ) -> None:
        """Reads nothing yet.

        Args:
            path: the journal; it need not exist.
            kinds: union of the events that count, such as `RunEvent`; other lines are skipped.
            create: returns the value of an empty journal.
            add: adds one event to the value.
        """
        self._path, self._kinds, self._create, self._add = path, get_args(kinds), create, add
        self._file, self._end, self._state = 0, 0, create()

    def read(self) -> _State:
        """Returns the value now."""
        if not self._path.exists():
            return self._state
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._end:
                self._file, self._end, self._state = found.st_ino, 0, self._create()
            file.seek(self._end)
            # A line without its end is being written, or was torn by a crash and is sealed by the next.
            lines, newline, _ = file.read().rpartition(b"\n")
        self._end += len(lines) + len(newline)
        for event in _parse(lines.decode("utf-8", errors="replace"), self._kinds):
            self._add(self._state, event)
        return self._state


def select_events(events: Iterable[Event], kind: type[_AnyEvent]) -> list[_AnyEvent]:
    """Returns the events of one class, in order."""
    return [event for event in events if isinstance(event, kind)]


def _read(path: Path, kinds: Iterable[type[Any]]) -> list[Any]:
    """Returns the readable lines of a journal as events of the given classes; others are skipped."""
    return _parse(path.read_text(encoding="utf-8", errors="replace"), kinds) if path.exists() else []


def _parse(text: str, kinds: Iterable[type[Any]]) -> list[Any]:
    by_name = {name: kind for kind in kinds for name in (kind.event_name, *kind.former_event_names)}
    events = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if isinstance(values, dict) and values.get("event") in by_name:
                events.append(by_name[values["event"]].model_validate(values))
        except (ValueError, TypeError, RecursionError, HeadwaterError):
            continue  # Torn by a crash while writing, or written by a version that this one does not understand.
    return events


def _nest_verdict(values: Any) -> Any:
    """Returns the values of an audit's event with its verdict in a field; earlier versions wrote it flat."""
    if isinstance(values, Mapping) and "verdict" not in values:
        return {**values, "verdict": values}
    return values


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


# --- summary ---------------------------------------------------------------------------------------------------------


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
    executor: str | None = Field(description="in_process, flower, flower_app (`flwr run`) or deployment.")
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
