"""The events of a site: the lines of its `site.jsonl` and `approvals.jsonl`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from common.events.facts import AuditVerdict, Event, nest_verdict


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
        return nest_verdict(values)


class BackboneUnusable(Event):
    """A backbone that the site's file names cannot be opened."""

    event_name = "own_backbone_unusable"

    detail: str = Field(description="Why, in one sentence.")


class EncodingContinues(Event):
    """A source of a run is being encoded, which takes long; written once a minute while it does."""

    event_name = "encoding"

    run_id: str = Field(description="Id of the run.")
    num_done: int = Field(description="Number of records of the source that are encoded.")
    num_records: int = Field(description="Number of records of the source.")
    rate: float = Field(description="Records a second since this process began with the source.")


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


class ChoiceEnded(Event):
    """The coordinator counted the votes on a backbone."""

    event_name = "choice_ended"

    run_id: str = Field(description="Id of the choice.")
    chosen: str = Field(description="Name of the candidate that was chosen.")


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
    | EncodingContinues
    | RunPrepared
    | ReplySent
    | ReplyResent
    | RequestDeclined
    | HeadsReceived
    | ChoiceEnded
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
