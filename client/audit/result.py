"""The result of an audit, and its table for a person. Light to import: most commands only show results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from common.privacy.accounting import rounded_up


@dataclass(frozen=True)
class AuditResult:
    """The result of an audit. All epsilons are of the whole run at `delta`.

    Attributes:
        epsilon_claimed: epsilon of the run as a ledger composes it.
        epsilon_lower_95: lower bound on epsilon from canaries, wrong in at most 5 % of audits.
        epsilon_lower_99_9: the same, wrong in at most 0.1 %; the audit fails where it exceeds the claim.
        epsilon_lower_one_run_95: lower bound at 95 % that assumes nothing about the distribution of canaries' scores.
        noise_std_ratio: standard deviation of released noise where no record reaches / the accounted one.
        delta: delta of the claim.
        rounds: number of rounds of the run.
        steps: number of noised sums that were observed; fewer than the run's only in a very long run.
        canaries: number of canaries, each of which was among the records with probability 1/2.
        seconds: duration of the audit in seconds.
        passed: whether nothing was refuted.
        reasons: one sentence for each refuted statement.
    """

    epsilon_claimed: float
    epsilon_lower_95: float
    epsilon_lower_99_9: float
    epsilon_lower_one_run_95: float
    noise_std_ratio: float
    delta: float
    rounds: int
    steps: int
    canaries: int
    seconds: float
    passed: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain values for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}


def make_audit_table(result: AuditResult) -> Table:
    """Returns a table of what is claimed, what the attack shows, and how much was measured."""
    table = Table(title=f"audit: {'passed' if result.passed else 'FAILED'}", title_justify="left", show_header=False)
    for name, value in (
        ("epsilon claimed", f"{rounded_up(result.epsilon_claimed):.2f}"),
        ("epsilon at least, 95 % confidence", f"{result.epsilon_lower_95:.2f}"),
        ("epsilon at least, 99.9 % confidence (the gate)", f"{result.epsilon_lower_99_9:.2f}"),
        ("epsilon at least, 95 %, no distribution assumed", f"{result.epsilon_lower_one_run_95:.2f}"),
        ("released noise / accounted noise", f"{result.noise_std_ratio:.3f}"),
        ("delta, rounds, noised steps audited", f"{result.delta:g}, {result.rounds}, {result.steps}"),
        ("canaries", str(result.canaries)),
        ("seconds", f"{result.seconds:.1f}"),
    ):
        table.add_row(name, value)
    return table
