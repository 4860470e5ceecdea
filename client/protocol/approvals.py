"""Approvals of runs at a site, and the offers that wait for one.

An approval names one run digest (common/offers.py): everything a run asks of a site. It covers one run under that
digest: before a run's first charge it is noted that the run uses an approval, and the same offer under another run id
needs another one. Approvals and uses are appended and never removed. Offers that wait are bounded in number and never
make room for others: a coordinator can neither fill the disk nor exchange what the staff is looking at.
"""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import instead
from common.events import (
    ApprovalConfirmed,
    ApprovalSuspended,
    ApprovalUsed,
    FileJournal,
    RunApproved,
    read_approval_journal,
    select_events,
)
from common.files import lock_file, private_folder, write_atomic
from common.offers import Offer, parse_offer
from common.plugins import refuse_unknown_kind
from common.run import RunConfig
from common.types import BadInput

MAX_WAITING = 32
_PREFIX = 8
_DIGEST = re.compile(rf"[0-9a-f]{{{_PREFIX},64}}")


def check_offer(offer: Offer) -> RunConfig:
    """Returns the settings of an offered run.

    Every kind is checked, also of tasks that this site has no part in: who approves a run reads them, so they may not
    be text.

    Raises:
        BadInput: they are no run's, name a kind that does not exist, or have backbones without a digest.
    """
    run = offer.run_config()
    if set(offer.backbones) != set(run.backbone_specs):
        raise BadInput(f"backbones: expected a digest for each of {', '.join(run.backbone_specs)}, and no other")
    named = [("common.backbones", spec, run.backbone_key(name)) for name, spec in run.backbone_specs.items()]
    named += [("client.solvers", run.solver, "solver")]
    if run.choice is not None:
        named.append(("common.scorers", run.choice.scorer, "choice.scorer"))
    named += [("common.tasks", spec, f"tasks.{name}") for name, spec in run.tasks.items()]
    for package, spec, key in named:
        refuse_unknown_kind(package, spec.kind, f"{key}.kind")
    return run


@dataclass(frozen=True)
class Approval:
    """One approval: which run, by whom, when (seconds since 1970), and the id of the run that used it, if one did."""

    digest: str
    run: str
    by: str
    time: float
    used_by: str | None = None


class Approvals:
    """A site's approvals and waiting offers, in its state folder; readable by the owner only."""

    def __init__(self, state_dir: Path) -> None:
        self._log = state_dir / "approvals.jsonl"
        self._waiting = state_dir / "waiting"

    def all(self) -> list[Approval]:
        """Returns every approval ever given, oldest first; of one digest the oldest are used first."""
        events = read_approval_journal(self._log)
        used: dict[str, dict[str, None]] = {}
        for use in select_events(events, ApprovalUsed):
            used.setdefault(use.digest, {})[use.run_id] = None
        runs = {digest: iter(ids) for digest, ids in used.items()}
        return [
            Approval(given.digest, given.run, given.by, given.time, next(runs.get(given.digest, iter(())), None))
            for given in select_events(events, RunApproved)
        ]

    def covers(self, digest: str, run_id: str) -> bool:
        """Returns true if a run under this digest uses an approval already, or there is one that no run uses."""
        used = self._used(digest)
        if run_id not in used and self.find_suspension(digest) is not None:
            return False
        return run_id in used or sum(approval.digest == digest for approval in self.all()) > len(used)

    def use(self, digest: str, run_id: str) -> bool:
        """Note that a run uses an approval, before it is charged; whether there is one. One process at a time."""
        private_folder(self._log.parent)
        with lock_file(self._log.parent / "approvals.lock"):
            if not self.covers(digest, run_id):
                return False
            if run_id not in self._used(digest):
                FileJournal(self._log).write(ApprovalUsed(digest=digest, run_id=run_id))
            return True

    def _used(self, digest: str) -> set[str]:
        used = select_events(read_approval_journal(self._log), ApprovalUsed)
        return {event.run_id for event in used if event.digest == digest}

    def find_suspension(self, digest: str) -> str | None:
        """Returns the reason for which an approval is not in force; None where it is, or where there is none."""
        for event in reversed(read_approval_journal(self._log)):
            if isinstance(event, ApprovalSuspended | ApprovalConfirmed) and event.digest == digest:
                return event.detail if isinstance(event, ApprovalSuspended) else None
        return None

    def approve(self, offer: Offer, *, hindrance: str | None = None) -> Approval:
        """Records that the present user of the system approves a run; the offer waits no longer once it is in force.

        Args:
            offer: the run.
            hindrance: reason for which its records are unusable; once approved again without, it is in force.
        """
        private_folder(self._log.parent)
        journal, suspended = FileJournal(self._log), self.find_suspension(offer.digest) is not None
        # First, so that no crash leaves the approval in force.
        if hindrance is not None:
            journal.write(ApprovalSuspended(digest=offer.digest, detail=hindrance))
        elif suspended:
            journal.write(ApprovalConfirmed(digest=offer.digest))
        if not suspended:
            journal.write(RunApproved(digest=offer.digest, run=check_offer(offer).name, by=getpass.getuser()))
        self._log.chmod(0o600)
        if hindrance is None:
            (self._waiting / f"{offer.digest}.json").unlink(missing_ok=True)
        return [approval for approval in self.all() if approval.digest == offer.digest][-1]

    def wait(self, offer: Offer) -> bool:
        """Keep an offer until somebody decides; whether it is new here. Where too many wait, it is not kept."""
        path = private_folder(self._waiting) / f"{offer.digest}.json"
        if path.exists() or sum(1 for _ in self._waiting.glob("*.json")) >= MAX_WAITING:
            return False
        write_atomic(path, offer.to_bytes())
        return True

    def waiting(self) -> list[Offer]:
        """Returns the offers that nobody decided on, oldest first."""
        return [offer for offer in self._read_waiting().values() if isinstance(offer, Offer)]

    def unreadable(self) -> dict[str, str]:
        """Returns digest -> reason for waiting offers that can no longer be read, such as those of another version."""
        return {digest: reason for digest, reason in self._read_waiting().items() if isinstance(reason, str)}

    def _read_waiting(self) -> dict[str, Offer | str]:
        found: dict[str, Offer | str] = {}
        for path in sorted(self._waiting.glob("*.json"), key=lambda item: item.stat().st_mtime):
            try:
                found[path.stem] = read_offer(path)
            except BadInput as error:
                found[path.stem] = str(error)
        return found

    def find(self, wanted: str) -> Offer:
        """The waiting offer with this name, or with a digest that begins so. What looks like a digest is no name.

        Raises:
            BadInput: none, or more than one.
        """
        is_digest = _DIGEST.fullmatch(wanted) is not None
        found = [
            offer
            for offer in self.waiting()
            if (offer.digest.startswith(wanted) if is_digest else check_offer(offer).name == wanted)
        ]
        if len(found) != 1:
            got = f"which {len(found)} waiting offers have" if found else "which is none of these"
            raise BadInput(
                f"expected a run file, an offer file, or the name or digest (at least {_PREFIX} digits) of one waiting "
                f"offer, got {wanted!r}, {got}"
            )
        return found[0]


def read_offer(path: Path) -> Offer:
    """Returns the offer in a file.

    Raises:
        BadInput: it cannot be read, or is no offer of a run whose kinds exist here.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: expected a run's offer{instead(error)}") from error
    offer = parse_offer(content, str(path))
    try:
        check_offer(offer)
    except BadInput as error:
        raise BadInput(f"{path}: expected a run's offer; {error}") from error
    return offer
