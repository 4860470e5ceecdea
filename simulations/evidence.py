"""The evidence of a simulated run for an output check: all its sites' ledgers, and attacks on their records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from client.config import SiteConfig
from client.personal.evidence import NO_ATTACK, explain_attacks, judge_attacks, state_ledger
from client.protocol.site import Site
from common.exports.parts.evidence import Evidence, open_leaving_model
from common.privacy.noise import Entropy, os_entropy
from common.types import BadInput
from server.reports.evidence import collect_run_evidence, read_run
from server.rounds.messenger import Observe
from simulations.partition import read_sites

MOST_ATTACKED = 10
"""Sites whose records are attacked: each trains heads of its own for it."""


def is_simulation(path: Path) -> bool:
    """Returns whether a folder is a simulated run's, or of the model of one."""
    return any(any((folder / "sites").glob("*/site.yaml")) for folder in (path, path.resolve().parent))


def collect_simulation_evidence(
    path: Path, *, attack: bool, observe: Observe, entropy: Entropy = os_entropy
) -> Evidence:
    """Returns what a simulator knows of a run's model: what its coordinator does, and every site's ledger.

    Args:
        path: folder of the run, or of its model.
        attack: whether the model is attacked with the sites' records.
        observe: receives the progress of the attack.
        entropy: source of the attack's random numbers.

    Raises:
        BadInput: there is no finished run with a model, its sites share a ledger, or a site has no charge of it.
        DigestMismatch: a head was changed since the model was written.
    """
    folder, summary, _ = read_run(path)
    if summary.executor == "batched":
        raise BadInput(
            f"{folder}: expected a run whose sites have a ledger each, got one of `executor.kind: batched`; "
            "`executor.kind: in_process` has them"
        )
    own = collect_run_evidence(path)
    took_part = [site for site in read_sites(folder / "sites") if _took_part(site, folder.name)]
    if not took_part:
        raise BadInput(f"{folder}: expected the ledgers of the sites that took part, found none")
    statements = [state_ledger(site, folder.name) for site in took_part]
    found = replace(
        own,
        party=f"the simulator of run {own.config.run} ({summary.executor})",
        statements=tuple(statements),
        attack_note=NO_ATTACK,
    )
    if not attack:
        return found
    from client.personal.membership import attack_heads  # Here: it loads torch.

    chosen = took_part[:MOST_ATTACKED]
    scores = {}
    for number, site in enumerate(chosen):
        observe("attack: sites", number, len(chosen))
        scores[site.name] = attack_heads(Site(site, entropy), folder.name, lambda phase, done, total: None)
    observe("attack: sites", len(chosen), len(chosen))
    few = "" if len(chosen) == len(took_part) else f" (the first {len(chosen)} of {len(took_part)} by name)"
    model = open_leaving_model(path)[1]
    return replace(
        found,
        attacks=judge_attacks(scores, statements[: len(chosen)], model),
        attack_note=explain_attacks(f"the units of {len(chosen)} simulated site(s){few}, pooled"),
    )


def _took_part(site: SiteConfig, run_id: str) -> bool:
    return site.locate_run(run_id).is_dir()
