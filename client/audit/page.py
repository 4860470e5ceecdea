"""An audit's result as a page for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from common.privacy.accounting import rounded_up

if TYPE_CHECKING:
    from client.audit.audit import AuditResult


def audit_table(result: AuditResult) -> Table:
    """What is claimed, what the attack shows, and how much was measured."""
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
