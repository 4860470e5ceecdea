"""The privacy audit of a simulation: its run as the site with the smallest declared sizes would take part in it."""

from __future__ import annotations

from client.audit.attack import Observe
from client.audit.audit import audit_run
from common.events import AuditVerdict
from common.privacy.noise import Entropy, os_entropy
from common.types import RunFailed
from simulations.config import SimulationConfig


def audit_simulation(config: SimulationConfig, observe: Observe, entropy: Entropy = os_entropy) -> AuditVerdict:
    """Audits the run with all of its tasks at one site, where the joint clip covers most.

    Args:
        config: the simulation; its smallest declared sizes are used.
        observe: receives the progress.
        entropy: source of the keys of coins and noise.

    Raises:
        BadInput: the run promises no privacy, or asks for a solver or task that cannot be audited.
        RunFailed: nothing could be measured.
    """
    declared = {name: config.tasks[name].public_size for name in config.run.tasks}
    sizes = {name: size if isinstance(size, int) else min(size.values()) for name, size in declared.items()}
    return audit_run(config.run, config.unit, sizes, entropy=entropy, observe=observe)


def require_passed(verdict: AuditVerdict) -> None:
    """Raises RunFailed, naming the first reason, unless the audit passed."""
    if not verdict.passed:
        raise RunFailed(f"the privacy audit failed, so no head is exported: {verdict.reasons[0]}")
