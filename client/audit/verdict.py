"""A site's own audit before it agrees to a run that requires one: once for each run and code, kept on its disk.

It attacks the solver that would run here, with the site's own unit, sizes, delta and source of randomness, on synthetic
records. A verdict holds for one offer, the parts of the site's file that an audit reads, and one version of the code
and of the libraries that draw, clip and sum; so joining again costs nothing.

The coordinator waits for an answer no longer than the run's own time-out: an audit that is not done by then is given
up, and the site declines. `headwater site audit SITE.yaml RUN.yaml` says how long one takes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from client.config import SiteConfig
from common.bundle import compute_code_digest
from common.events import AuditVerdict
from common.files import private_folder, write_atomic
from common.privacy.noise import Entropy
from common.run import RunConfig

_LIBRARIES = ("torch", "opacus", "numpy", "scipy", "cryptography")


class AuditTooSlow(Exception):
    """An audit took longer than the coordinator waits."""


def get_audit_verdict(
    config: SiteConfig, run: RunConfig, offer: str, public_sizes: Mapping[str, int], entropy: Entropy
) -> AuditVerdict:
    """Returns the result of auditing a run here, from the disk where it is known.

    Args:
        config: the site's file.
        run: the run that is offered.
        offer: digest of the offer.
        public_sizes: task -> declared number of units, for the tasks the site would take part in.
        entropy: source of the site's keys.

    Raises:
        AuditTooSlow: the audit took longer than the coordinator waits; nothing is stored.
        BadInput: the run cannot be audited.
        RunFailed: nothing could be measured.
    """
    about = [offer, config.unit.value, config.budget.delta, dict(sorted(public_sizes.items())), _versions()]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    path = config.state_dir / "audits" / f"{key}.json"
    if path.exists():
        return AuditVerdict.model_validate_json(path.read_bytes())
    from client.audit.audit import (
        audit_run,  # Here: most runs require none, and it loads a third of a second of statistics.
    )

    deadline = time.monotonic() + run.cohort.timeout_s

    def stop_when_late(phase: str, done: int, total: int) -> None:
        if time.monotonic() > deadline:
            raise AuditTooSlow(f"{phase}: {done} of {total} steps after {run.cohort.timeout_s:g} s")

    verdict = audit_run(
        run, config.unit, public_sizes, delta=config.budget.delta, entropy=entropy, observe=stop_when_late
    )
    private_folder(path.parent)
    write_atomic(path, verdict.model_dump_json().encode())
    return verdict


def _versions() -> list[Any]:
    """Returns the digest of this site's code and the versions of the libraries that draw, clip and sum."""
    return [compute_code_digest(), {name: version(name) for name in _LIBRARIES}]
