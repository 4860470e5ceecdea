"""Everything that can be tried before joining, as a list of passes and failures, each failure with its remedy.

Nothing is sent but what a TLS handshake and one question about admission take; nothing is spent; counts of records are
for the local screen only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.config import Coordinator, SiteConfig
from client.connection import diagnose as probe
from client.connection.diagnose import (
    WARN_DAYS,
    connect_sentence,
    is_tls_error,
    open_tls,
    presented,
    trusting,
)
from client.connection.fleet import ConnectionLost, Fleet, JoinRefused, RunOver, clock_skew
from client.connection.keys import read_key
from client.connection.node import NODE_ID, Leaving
from client.data.checks import data_checks
from client.data.preview import Preview
from client.protocol import balance as budgets
from client.protocol.approvals import Approvals, Offer
from client.protocol.join import STOPPED
from client.protocol.site import Site
from common.bundle import compute_code_digest
from common.privacy.noise import os_entropy
from common.run import RunConfig
from common.types import BadInput, HeadwaterError

Outcome = Literal["pass", "warn", "fail"]
LOW_DISK_BYTES = 2 << 30
_OTHERS = 0o077


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what.
        outcome: `warn` does not keep a site from joining.
        detail: what was seen.
        remedy: what to do about it; "" where there is nothing to do.
    """

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


def check_site(config: SiteConfig, offers: Mapping[str, RunConfig], *, offline: bool) -> Iterator[Check]:
    """All checks, in the order in which a site needs them.

    Args:
        config: the site's file.
        offers: the runs that are offered, by name; with them, labels can be compared with what is asked.
        offline: leave out what needs the network.
    """
    yield Check("code", "pass", f"code digest {compute_code_digest()}")
    yield from _state(config)
    yield _device(config)
    yield _budget(config)
    for found in data_checks(config, offers):
        yield Check(*found)
    if config.coordinator is None:
        yield Check("coordinator", "fail", "none is named", "write the section `coordinator` (see a new site's file)")
        return
    yield from _credentials(config.coordinator)
    if not offline:
        yield from _network(config)


def approval_checks(site: Path, config: SiteConfig, offers: Mapping[Path, Offer]) -> Iterator[Check]:
    """Whether the offers that came with the kit may be joined.

    Args:
        site: the site's file, as the user names it.
        config: what it says.
        offers: by the files that hold them, as the user can open them.
    """
    approvals = Approvals(config.state_dir)
    for path, offer in offers.items():
        name = path.stem
        if config.approval == "automatic":
            yield Check(f"run {name}", "pass", "joined without an approval, as the site file says")
        elif offer.digest in {approval.digest for approval in approvals.all()}:
            yield Check(f"run {name}", "pass", f"approved, digest {offer.digest}")
        else:
            yield Check(f"run {name}", "warn", "not approved yet", f"python -m client approve {site} {path}")


def refused_by_backbone(preview: Preview) -> Check:
    """That the offered backbone cannot take some of a source's records."""
    detail = f"{len(preview.refused)} of the records looked at do not suit the offered backbone: {preview.refused[0]}"
    return Check(
        f"source {preview.source}", "warn" if preview.sheet else "fail", detail, "convert them, or decline the run"
    )


# --- this machine ----------------------------------------------------------------------------------------------------


def _state(config: SiteConfig) -> Iterator[Check]:
    folder = config.state_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    low = free < LOW_DISK_BYTES
    yield Check(
        "disk",
        "warn" if low else "pass",
        f"{free / (1 << 30):.1f} GiB free under {existing}",
        "features and backbones need room: free some, or name a larger disk in cache_dir" if low else "",
    )
    if not folder.exists():
        yield Check("state", "pass", f"{folder} will be made, readable by its owner only")
    elif folder.stat().st_mode & _OTHERS:
        yield Check("state", "fail", f"{folder} is open to others than its owner", f"chmod 700 {folder}")
    else:
        yield Check("state", "pass", f"{folder}, readable by its owner only")
    stopped = folder / STOPPED
    if stopped.exists():
        yield Check("stopped", "fail", "a preparation was stopped by a record", f"mend it and remove {stopped}")


def _device(config: SiteConfig) -> Check:
    try:
        return Check("device", "pass", f"{config.device}: {Site(config, os_entropy).device().type}")
    except BadInput as error:
        return Check("device", "fail", str(error), "write `device: auto` or `cpu`")


def _budget(config: SiteConfig) -> Check:
    try:
        # As `start` would: a ledger that is gone from a site that answered is damage, not a fresh start.
        if Site(config, os_entropy).has_replies():
            Site(config, os_entropy).ledger()
        account = budgets.balance(config)
    except HeadwaterError as error:
        return Check("ledger", "fail", str(error), "python -m client recover, or amend; see docs/deploy-site.md")
    left = f"epsilon {budgets.rounded_down(account.left_epsilon, 2):g} of {account.terms.epsilon_cap:g} left"
    if account.left_epsilon <= 0:
        return Check("ledger", "fail", left, "every private run will be declined; the budget is never reset")
    if account.amendment_due:
        return Check("ledger", "fail", f"{left}, but the site file says other terms", "python -m client amend")
    return Check("ledger", "pass", left)


def _credentials(coordinator: Coordinator) -> Iterator[Check]:
    try:
        read_key(coordinator.key)
        yield Check("key", "pass", f"{coordinator.key}, readable by its owner only")
    except BadInput as error:
        yield Check("key", "fail", str(error), "chmod 600 it, or make a new one with `python -m client init`")
    try:
        trusting(coordinator.ca)
        yield Check("authority", "pass", str(coordinator.ca))
    except BadInput as error:
        yield Check("authority", "fail", str(error), "take ca.crt from the coordinator's kit")


# --- the network -----------------------------------------------------------------------------------------------------


def _network(config: SiteConfig) -> Iterator[Check]:
    coordinator = config.coordinator
    assert coordinator is not None
    proxy = probe.proxy_for(coordinator)
    yield Check("way out", "pass", "through the proxy of HTTPS_PROXY" if proxy else "direct, no proxy")
    try:
        connection = open_tls(coordinator, trusting(coordinator.ca))
    except BadInput:
        return  # Said above.
    except OSError as error:
        tls = is_tls_error(error)
        detail = probe.tls_sentence(coordinator) if tls else connect_sentence(coordinator, error)
        what, _, remedy = detail.rpartition(": ")
        yield Check("certificate" if tls else "reachable", "fail", what or detail, remedy if what else "")
        return
    try:
        connection.request("GET", "/health")
        date = connection.getresponse().getheader("date")
    except OSError:
        date = None
    finally:
        connection.close()
    yield Check("reachable", "pass", f"{coordinator.address} answers over TLS")
    yield _expiry(coordinator)
    yield _clock(date)
    yield _admission(config, coordinator)


def _expiry(coordinator: Coordinator) -> Check:
    try:
        shown = presented(coordinator)
    except (OSError, ValueError) as error:
        return Check("certificate", "warn", f"it cannot be read again ({type(error).__name__})", "try again")
    days = (shown.not_after - probe.utc_now()).days
    detail = f"for {coordinator.address.host}, issued by {shown.issuer}, valid for {days} more days"
    if days < WARN_DAYS:
        return Check("certificate", "warn", detail, "remind the coordinator's staff: `python -m server renew`")
    return Check("certificate", "pass", detail)


def _clock(date: str | None) -> Check:
    skew = clock_skew(date)
    if skew is None:
        return Check("clock", "warn", "the coordinator does not say what time it is", "")
    wrong = probe.skew_sentence(skew)
    if wrong:
        what, _, remedy = wrong.rpartition(": ")
        return Check("clock", "fail", what, remedy)
    return Check("clock", "pass", f"within {max(1, round(abs(skew)))} s of the coordinator's")


def _admission(config: SiteConfig, coordinator: Coordinator) -> Check:
    path: Path = config.state_dir / NODE_ID
    try:
        fleet = Fleet(coordinator, read_key(coordinator.key), stopping=Leaving().event)
    except BadInput:
        return Check("admitted", "warn", "not tried: there is no usable key", "")
    try:
        if path.exists():
            fleet.ask_admission(int(path.read_text(encoding="ascii")))
        else:
            # The first time, the coordinator is asked as by `start`, and left at once.
            fleet.deactivate(fleet.activate())
    except JoinRefused as refused:
        what, _, remedy = str(refused).partition(": ")
        return Check("admitted", "fail", what, remedy)
    except (ConnectionLost, RunOver) as error:
        return Check("admitted", "warn", f"it cannot be told ({error})", "try again")
    finally:
        fleet.close()
    return Check("admitted", "pass", "the coordinator knows this site's key")
