"""Parts that several kinds of events share, and the base of all of them.

Invariant: a site keeps its journal for years, so a model also accepts the field and event names of earlier versions
(`former_names`) and ignores fields that this version does not know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Metrics = Mapping[str, float | None]
"""Metric name -> value, the task's main metric first; None where the metric is undefined."""

Interval = tuple[float, float]
"""The ends of a 95 % interval."""

Intervals = Mapping[str, Interval | None]
"""Metric name -> its interval; None where it is undefined."""

FEDERATED, PERSONAL, PERSONAL_UNIFORM = "federated", "personal", "personal, equal classes"
ALONE, ALONE_NOT_PRIVATE, ALONE_ADAPTED = "site alone", "site alone, not private", "site alone, adapted"
"""Kinds of heads that a site compares on its own held-out units. The last is an untrained head that the site adapted as
it adapted the federated one, which shows what the federation's head added. Heads for equally frequent classes stand
beside personal ones that know the site's own class mix."""


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


def nest_verdict(values: Any) -> Any:
    """Returns the values of an audit's event with its verdict in a field; earlier versions wrote it flat."""
    if isinstance(values, Mapping) and "verdict" not in values:
        return {**values, "verdict": values}
    return values
